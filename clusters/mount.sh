#!/usr/bin/env bash
# On every node: an NFS file system at /shared, for checkpoints, ledgers and data sets. mount.sh HOST:/PATH
set -euo pipefail
sudo mkdir -p /shared
mountpoint -q /shared || sudo mount -t nfs4 -o nfsvers=4.1,hard,timeo=600,retrans=2,noresvport "$1" /shared
sudo chown "$(id -u):$(id -g)" /shared

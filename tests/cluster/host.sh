#!/usr/bin/env bash
# One machine of the lab (lab.sh), inside its namespaces: what is its own, then sshd in the foreground.
set -euo pipefail
name=$1
mount --make-rprivate /
hostname "$name"
mount --bind "$lab/$name/tmp-ray" /tmp/ray
mount --bind "$lab/$name.passwd" /etc/passwd
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin /usr/sbin/sshd -D -e -f "$lab/sshd_config"

#!/usr/bin/env bash
# On every node: the package of this checkout and its pinned requirements, in ~/venv.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x ~/venv/bin/python ] || "${PYTHON:-python3}" -m venv ~/venv
~/venv/bin/python -m pip install -q -c constraints.txt .
line=". $PWD/clusters/env.sh"
grep -qxF "$line" ~/.bashrc 2>/dev/null || echo "$line" >> ~/.bashrc

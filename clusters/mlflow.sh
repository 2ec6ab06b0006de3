#!/usr/bin/env bash
# On the head: the MLflow server, on loopback; does nothing if it runs already. mlflow.sh STORE ARTIFACTS
# STORE is sqlite:////FILE, or postgresql://USER@HOST/DATABASE with the password in ~/.pgpass.
set -euo pipefail
healthy() { python -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:5000/health", timeout=5)' 2> /dev/null; }
healthy && exit
case $1 in
  sqlite:///*) file="${1#sqlite:///}"; mkdir -p "$(dirname "$file")" ;;
  postgresql*) python -m pip install -q -c "$(dirname "$0")/../constraints.txt" "psycopg[binary]" ;;
esac
mkdir -p "$2"
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false setsid nohup mlflow server --host 127.0.0.1 --port 5000 --workers 1 \
  --backend-store-uri "$1" --artifacts-destination "$2" >> ~/mlflow.log 2>&1 < /dev/null &
for _ in $(seq 120); do healthy && exit; sleep 1; done
echo "MLflow does not answer; see ~/mlflow.log on the head" >&2
exit 1

cd /tmp/w/leases
for v in 4.3.1 4.2.0 4.1.0 4.0.0 3.32.0 3.30.0; do
  pip install -q --no-deps --target /tmp/w/fl/$v filelock==$v 2>/dev/null
  echo "== $v"
  PYTHONPATH=/tmp/w/fl/$v:/tmp/w/leases timeout 300 python -m pytest -q -n 0 -p no:randomly tests/test_leases.py tests/test_folder_lock.py -k "not TestTraining" 2>&1 | grep -v Warning | tail -8
done

#!/usr/bin/env bash
# `ray up` on real ssh, a sweep, a worker lost in mid-sweep, a job from outside, `ray down`. On the laptop of the lab:
#   sudo tests/cluster/lab.sh DIR 2 tests/cluster/prove.sh         everything, a few minutes
#   sudo tests/cluster/lab.sh DIR 2 tests/cluster/prove.sh job     of sweep, job and small (a sweep that nobody disturbs)
# Prints what was typed and what was answered; ends with an error at the first thing that is not as it should be.
set -euo pipefail
: "${lab:?run me inside lab.sh}"
export RAY_UP_enable_autoscaler_v2=0
cluster="$lab/cluster.yaml" out="$lab/shared/out" log="$lab/last.log"
tiny="--set epochs=3 --set data.train_size=128 --set data.val_size=50 --set '*.attacks.*.steps=2'"

run() { # the command's own exit status
  echo; echo "\$ $*"
  bash -c "$*" 2>&1 | tee "$log" | { grep -vE "^(Warning: Permanently|Shared connection|bash: (cannot set|no job))" || true; }
}
fail() { echo "FAILED: $*" >&2; exit 1; }
ssh=(ssh -q -i "$lab/key" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null)
alive() {
  "${ssh[@]}" root@head bash 2> /dev/null <<'END' | sed -n 's/^alive //p'
source ~/.bashrc
python -c 'import ray; ray.init(address="auto", log_to_driver=False); print("alive", sum(n["Alive"] for n in ray.nodes()))'
END
}

run ray up -y "$cluster"
echo; echo "# the workers join"
hosts=$(ls "$lab"/*.pid | wc -l)
for _ in $(seq 60); do [ "$(alive)" = "$hosts" ] && break; sleep 1; done
[ "$(alive)" = "$hosts" ] || fail "not all $hosts machines joined"
run ray exec "$cluster" "'raysweep doctor --address auto --out $out'" || fail "the doctor found something"
grep -q "^ok     storage" "$log" || fail "the doctor said nothing of the storage"

sweep() { # trials
  run ray exec "$cluster" "\"raysweep tune lrat --address auto --out $out --name $what --trials $1 $tiny 2>&1 | cat\""
  grep -q "best checkpoint" "$log" || fail "the sweep did not end"
  grep -q '"state": "failed"' "$out/runs/$what"/trials/*/trial.json && fail "a trial failed"
  grep -L '"state": "\(finished\|stopped\)"' "$out/runs/$what"/trials/*/trial.json | grep . && fail "a trial did not end"
  return 0
}

cut_power() { # when two trials are at work
  until [ "$(cat "$out/runs/$what"/trials/*/trial.json 2> /dev/null | grep -c '"epoch": [1-9]')" -ge 2 ]; do sleep 0.3; done
  echo "# worker2 loses its power"
  kill -9 "$(cat "$lab/worker2.pid")"
}

job() {
  echo; echo "\$ ray dashboard $cluster &   # the head's loopback, through ssh"
  "${ssh[@]}" -N -L 8265:127.0.0.1:8265 root@head &
  local tunnel=$!
  until (exec 3<> /dev/tcp/127.0.0.1/8265) 2> /dev/null; do sleep 0.5; done
  local pipeline="raysweep run digits --address auto --out $out --set epochs=1 --set data.train_size=128"
  pipeline+=" --set stages.tune.trials=1 --set stages.promote.top=1 --set stages.autoattack.n=10"
  run ray job submit --address http://127.0.0.1:8265 -- "$pipeline"
  grep -q "Job .* succeeded" "$log" || fail "the job did not succeed"
  echo; echo "\$ RAY_AUTH_MODE=disabled ray job list --address http://127.0.0.1:8265   # without the token"
  { RAY_AUTH_MODE=disabled ray job list --address http://127.0.0.1:8265 2>&1 || true; } | grep -io "unauthorized: missing.*" |
    head -n 1 || fail "no token was wanted"
  kill "$tunnel"
}

for what in ${*:-sweep job}; do
  case $what in
    small) sweep 2 ;;
    sweep) cut_power & sweep 5; wait ;;
    job) job ;;
    *) fail "no part is called $what" ;;
  esac
done
run ray down -y "$cluster"
echo; echo "# done"

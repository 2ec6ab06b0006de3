#!/usr/bin/env bash
# On a worker, in the background: hear of the cloud taking this machine away, and tell Ray and the trials, which then
# write a checkpoint and go on elsewhere. preempted.sh aws|gcp
set -euo pipefail
metadata="${METADATA:-http://169.254.169.254}"

taken() {
  case $1 in
    aws)
      token=$(curl -fsS -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/latest/api/token") &&
        curl -fsS -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action"
      ;;
    gcp)
      [ "$(curl -fsS -m 2 -H 'Metadata-Flavor: Google' "$metadata/computeMetadata/v1/instance/preempted")" = TRUE ]
      ;;
  esac
}

watch() {
  until taken "$1" 2> /dev/null; do sleep 5; done
  echo "$(date -u +%FT%TZ) this machine is being taken away"
  # Nothing new comes here, and what goes does not count as failed.
  ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "spot notice" --deadline-remaining-seconds 100 || true
  # Ray Tune's name for a trial and Ray Train's for one of several workers of a trial, as far as the kernel keeps them.
  # Each writes a checkpoint and ends; Ray itself tells the workers.
  pkill -TERM -u "$(id -u)" '^ray::ImplicitFu' || true
  for _ in $(seq 60); do pgrep -u "$(id -u)" '^ray::(ImplicitFu|RayTrainWo)' > /dev/null || break; sleep 1; done
  ray stop
}

export -f taken watch
export metadata
setsid nohup bash -c "watch $1" >> ~/preempted.log 2>&1 < /dev/null &

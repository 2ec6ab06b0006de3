#!/usr/bin/env bash
# Machines on one machine: each a namespace with its own address, sshd, home, /tmp/ray, processes and /dev/shm, joined by
# a bridge from which no road leads out. Everything in it ends with the command.
#
#   sudo tests/cluster/lab.sh DIR WORKERS COMMAND...    runs COMMAND on the "laptop", beside `head`, `worker1`, ...
#
# Wants root, sshd, rsync and ip, and the virtual environment of the checkout (PYTHON, default: the python on PATH), whose
# requirements the machines share; raysweep itself is installed on each by `ray up`. DIR keeps homes and the shared
# folder, DIR/shared; COMMAND finds DIR/cluster.yaml, made from clusters/local.yaml, and in DIR/NAME.pid what to kill for
# a power cut.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
lab="$(realpath -m "$1")"; workers=$2; shift 2
python="$(realpath -s "$(command -v "${PYTHON:-python}")")"
site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
rm -f "$lab"/*.pid
mkdir -p "$lab/shared" "$lab/laptop/.ray" "$lab/laptop/tmp-ray" /tmp/ray

[ -f "$lab/key" ] || ssh-keygen -q -t ed25519 -N '' -f "$lab/key"
[ -f "$lab/host-key" ] || ssh-keygen -q -t ed25519 -N '' -f "$lab/host-key"
[ -f "$lab/laptop/.ray/auth_token" ] || (umask 077; od -An -tx1 -N32 /dev/urandom | tr -d ' \n' > "$lab/laptop/.ray/auth_token")
cat > "$lab/sshd_config" <<END
HostKey $lab/host-key
AuthorizedKeysFile $lab/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
END

names=(head); addresses=""
for i in $(seq "$workers"); do names+=("worker$i"); addresses+="${addresses:+, }10.77.0.1$i"; done
{ echo "127.0.0.1 localhost"; for i in "${!names[@]}"; do echo "10.77.0.1$i ${names[$i]}"; done; } > "$lab/hosts"
sed -e "s#head_ip: .*#head_ip: 10.77.0.10#; s#worker_ips: .*#worker_ips: [$addresses]#" \
  -e "s#ssh_user: .*#ssh_user: root#; s#ssh_private_key: .*#ssh_private_key: $lab/key#; s#/shared#$lab/shared#g" \
  -e "s#_workers: 2#_workers: $workers#" \
  -e 's#ray start --address=$RAY_HEAD_IP:6379#& --num-cpus=1 --object-store-memory=100000000#' \
  -e 's#--num-cpus=0#& --object-store-memory=100000000#' "$here/../../clusters/local.yaml" > "$lab/cluster.yaml"

for name in "${names[@]}"; do
  home="$lab/$name"
  mkdir -p "$home/tmp-ray"
  # A machine as it comes: Python with the requirements, and no raysweep.
  "$python" -m venv --without-pip "$home/venv"
  echo "$site" > "$home/venv/lib/$(basename "$(dirname "$site")")/site-packages/requirements.pth"
  for tool in ray mlflow; do
    sed "1s|.*|#!$home/venv/bin/python|" "$(dirname "$python")/$tool" > "$home/venv/bin/$tool"
    chmod +x "$home/venv/bin/$tool"
  done
  # There is no package index on the island.
  echo "export PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore" > "$home/.bashrc"
  { sed "s#^root:.*#root:x:0:0:root:$home:/bin/bash#" /etc/passwd | grep -v '^sshd:'
    echo "sshd:x:110:65534::/run/sshd:/usr/sbin/nologin"; } > "$lab/$name.passwd"
done

export lab here PATH="$(dirname "$python"):$PATH"
exec unshare --net --mount --pid --fork --uts --ipc --mount-proc --kill-child bash -euo pipefail -c '
  mount --make-rprivate /
  mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /dev/shm; mkdir -p /run/netns
  mount --bind "$lab/laptop/tmp-ray" /tmp/ray; mount --bind "$lab/hosts" /etc/hosts
  ip link set lo up; ip link add bridge type bridge; ip addr add 10.77.0.254/24 dev bridge; ip link set bridge up
  i=0
  for name in head $(seq -f "worker%g" '"$workers"'); do
    ip netns add "$name"; ip link add "v$i" type veth peer name eth0 netns "$name"; ip link set "v$i" master bridge up
    ip -n "$name" addr add "10.77.0.1$i/24" dev eth0; ip -n "$name" link set eth0 up; ip -n "$name" link set lo up
    ip netns exec "$name" unshare --mount --pid --fork --uts --ipc --mount-proc --kill-child \
      bash "$here/host.sh" "$name" > "$lab/$name.log" 2>&1 &
    echo $! > "$lab/$name.pid"
    i=$((i + 1))
  done
  export HOME="$lab/laptop" RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
  for name in head $(seq -f "worker%g" '"$workers"'); do
    until (exec 3<> "/dev/tcp/$name/22") 2> /dev/null; do sleep 0.2; done
  done
  cd "$here/../.."
  "$@"' lab "$@"

#!/usr/bin/env bash
# A real SLURM of two nodes on this machine, for tests: controller, two node daemons and munge, all in one folder.
#
#   bash tests/examples/slurm_cluster.sh start DIR    # then: export SLURM_CONF=DIR/slurm.conf
#   bash tests/examples/slurm_cluster.sh stop DIR
#
# Needs the programs of Debian's slurm-wlm and munge; touches nothing outside DIR (a short path: it holds a socket).
set -euo pipefail

if [[ $# -ne 2 || ($1 != start && $1 != stop) ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 2
fi
mkdir -p "$2"
dir=$(cd "$2" && pwd)
# Debian keeps the daemons where only root looks.
PATH=$PATH:/usr/sbin:/sbin

stop() {
  local name pid
  for name in n1 n2 slurmctld munged; do
    [[ -f $dir/$name.pid ]] || continue
    pid=$(<"$dir/$name.pid")
    kill "$pid" 2>/dev/null || true
    # Only when it has ended may the folder go.
    for _ in $(seq 100); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  done
}
if [[ $1 == stop ]]; then
  stop
  exit 0
fi

for program in munged slurmctld slurmd sinfo python3; do
  command -v "$program" >/dev/null || { echo "error: $program is not installed (Debian: slurm-wlm, munge)" >&2; exit 1; }
done
mkdir -p "$dir"/{state,spool,log,munge}
chmod 700 "$dir/munge"
head -c 1024 /dev/urandom >"$dir/munge/key"
chmod 600 "$dir/munge/key"

read -r controller_port port1 port2 < <(python3 - <<'PYTHON'
import socket
sockets = [socket.socket() for _ in range(3)]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*[one.getsockname()[1] for one in sockets])
PYTHON
)
user=$(id -un)
cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$controller_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job may start again when its old credential has expired: 5 s instead of 2 minutes.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
# Look for jobs that may start every second, not every minute.
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
JobRequeue=1
KillWait=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$port1 CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$port2 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=60 State=UP OverSubscribe=NO
CONF
export SLURM_CONF=$dir/slurm.conf

munged --force --socket="$dir/munge.socket" --key-file="$dir/munge/key" --log-file="$dir/munge/log" \
  --seed-file="$dir/munge/seed" --pid-file="$dir/munged.pid"
slurmctld
slurmd -N n1
slurmd -N n2
for _ in $(seq 100); do
  if [[ $(sinfo --noheader --format=%T --nodes=n1,n2 2>/dev/null | sort -u) == idle ]]; then
    echo "SLURM of two nodes is up; export SLURM_CONF=$SLURM_CONF"
    exit 0
  fi
  sleep 0.2
done
echo "error: the nodes did not come up in 20 s; see $dir/log" >&2
stop
exit 1

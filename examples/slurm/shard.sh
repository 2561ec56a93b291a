#!/usr/bin/env bash
# One task of an array job: run COMMAND … --shard I/N, with I and N from SLURM's array variables.
#
#   bash examples/slurm/shard.sh COMMAND [flag ...]
#
#   SHARDS  N, when only some tasks of an array are submitted again: SHARDS=64 sbatch --array=3,17 …
#
# On USR1, which the .sbatch files ask SLURM for before the time limit, the command is stopped by SIGTERM, which lets
# it keep what it has, and the task is put back into the queue. A task that is requeued for any reason (preemption, a
# lost node, kill -9) goes on where it was, because the commands do.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  exit 2
fi
fail() { echo "error: $1" >&2; exit 2; }

index=${SLURM_ARRAY_TASK_ID:-}
count=${SHARDS:-${SLURM_ARRAY_TASK_COUNT:-}}
[[ -n $index && -n $count ]] || fail "SLURM_ARRAY_TASK_ID or SLURM_ARRAY_TASK_COUNT is not set; submit with --array=0-N"
# Without this, `--array=3` would convert everything as shard 3 of 1, and `--array=1-4` would leave out the first.
if [[ -z ${SHARDS:-} && (${SLURM_ARRAY_TASK_MIN:-0} -ne 0 || ${SLURM_ARRAY_TASK_MAX:-$((count - 1))} -ne $((count - 1))) ]]; then
  fail "the array runs from ${SLURM_ARRAY_TASK_MIN:-0} to ${SLURM_ARRAY_TASK_MAX:-?} with $count tasks, needed 0-$((count - 1)); or say SHARDS=N beside a part of it"
fi
((index < count)) || fail "array task $index is outside of the $count shards; submit with --array=0-$((count - 1))"

echo "shard $index/$count on $(hostname), start ${SLURM_RESTART_COUNT:-0}, $(date -u +%FT%TZ)"
"$@" --shard "$index/$count" &
child=$!
requeue=
trap 'requeue=1; kill -TERM "$child" 2>/dev/null || true' USR1
trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
# A trapped signal ends `wait` early; the command's own status is what counts.
while :; do
  status=0
  wait "$child" || status=$?
  kill -0 "$child" 2>/dev/null || break
done
if [[ -n $requeue && $status -ne 0 ]]; then
  echo "shard $index/$count stopped before the time limit; it goes back into the queue"
  exec scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_$index"
fi
exit "$status"

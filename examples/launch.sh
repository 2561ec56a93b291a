#!/usr/bin/env bash
# Train on the GPUs (or, without any, the cores) of this one node.
#
#   bash examples/launch.sh RECIPE.yaml [key=value ...]
#
#   NPROC   processes on this node; default: one per visible GPU, or 1 without a GPU
#   PYTHON  the interpreter that has megatron_speech; default: .venv of this checkout, else python3
#
# TERM and USR1 let the run save and end; the same command continues.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; else PYTHON=python3; fi
fi

gpus=0
if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi --list-gpus | wc -l); fi
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}

# On Hopper, tensor and context parallelism overlap communication correctly only with one hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# torchrun sets one thread per process unless told; on a node without GPUs the cores are shared out instead.
if [[ $gpus -eq 0 ]]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + NPROC - 1) / NPROC ))}; fi

# The processes meet at the loopback address: the host's own name, torchrun's default, need not resolve.
"$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$NPROC" -m megatron_speech.cli train "$@" &
launcher=$!
# torchrun itself would end on these: at once on USR1, and 30 s after TERM it kills what has not saved by then. Its
# processes get the signal from here, save, and end as they should; torchrun ends with them.
forward() { kill -s "$1" $(<"/proc/$launcher/task/$launcher/children") 2>/dev/null || true; }
trap 'forward TERM' TERM
trap 'forward USR1' USR1
# A trapped signal ends `wait` early; torchrun's own status is what counts.
while :; do
  status=0
  wait "$launcher" || status=$?
  kill -0 "$launcher" 2>/dev/null || break
done
exit "$status"

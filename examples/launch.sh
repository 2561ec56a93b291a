#!/usr/bin/env bash
# Train on the GPUs (or, without any, the cores) of this one node.
#
#   bash examples/launch.sh RECIPE.yaml [key=value ...]
#
#   NPROC   processes on this node; default: one per visible GPU, or 1 without a GPU
#   PYTHON  the interpreter that has megatron_speech; default: .venv of this checkout, else python3
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
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

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m megatron_speech.cli train "$@"

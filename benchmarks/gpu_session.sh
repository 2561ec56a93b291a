#!/usr/bin/env bash
# Every check and figure that needs a GPU, in one command, on one GPU.
#
#   bash benchmarks/gpu_session.sh OUT_DIR
#
#   PYTHON       interpreter with PyTorch (CUDA), megatron-core and this project's dependencies; default python3
#   TE_SITE      a folder to put first on the import path (a ready Transformer Engine), if it is not installed
#   EXTRA_SITE   a folder to put last on the import path (missing pure-Python dependencies)
#
# Leaves OUT_DIR/*.log, loss_mask_*.json and gpu_check.json; prints a table. A step that fails does not stop the others;
# the exit status is 1 if any failed.
set -uo pipefail
if [[ $# -ne 1 ]]; then sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
out=$1
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$root"
export PYTHONPATH="${TE_SITE:+$TE_SITE:}$root${EXTRA_SITE:+:$EXTRA_SITE}${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1

"$PYTHON" - <<'PY' || { echo "no CUDA device is visible to $PYTHON: these checks need one" >&2; exit 1; }
import sys, torch
sys.exit(0 if torch.cuda.is_available() else 1)
PY

failed=0
step() { # name, command...
  local name=$1; shift
  local start=$SECONDS
  if "$@" > "$out/$name.log" 2>&1; then result=ok; else result=FAILED; failed=1; fi
  printf '%-28s %-7s %4d s   %s\n' "$name" "$result" $((SECONDS - start)) "$(tail -n 1 "$out/$name.log" | cut -c1-120)"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
step build_extension "$PYTHON" setup.py -q build_ext --inplace
step compile_check "$PYTHON" -m megatron_speech.ops.compile_check
step ops_on_cuda "$PYTHON" -m pytest -q tests/ops
step optimizer_on_cuda "$PYTHON" -m pytest -q tests/training/test_freezing.py tests/training/test_ema.py \
  tests/training/test_spikes.py tests/training/test_determinism.py -k "frozen or thirty or skipped_step or bit_identical"
step loss_mask_pt "$PYTHON" -m megatron_speech.cli benchmark loss-mask --policy pt --rows 32 --json "$out/loss_mask_pt.json"
step loss_mask_sft "$PYTHON" -m megatron_speech.cli benchmark loss-mask --policy sft --rows 32 --json "$out/loss_mask_sft.json"
step train_cuda_vs_cpu "$PYTHON" benchmarks/gpu_check.py --json "$out/gpu_check.json"
exit $failed

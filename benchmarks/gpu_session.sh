#!/usr/bin/env bash
# Every check and figure that needs a GPU, in one command, on one GPU, within 8 minutes.
#
#   bash benchmarks/gpu_session.sh OUT_DIR
#
#   PYTHON       interpreter with PyTorch (CUDA), megatron-core and this project's dependencies; default python3
#   TE_SITE      a folder to put first on the import path (a ready Transformer Engine), if it is not installed
#   EXTRA_SITE   a folder to put last on the import path (missing pure-Python dependencies)
#   BUDGET       seconds for all of it; default 480. A step gets its own limit or what is left, whichever is less; one
#                for which nothing is left is skipped, and told of.
#
# Leaves OUT_DIR/*.log, *.json and table.md; prints a line per step and the table. A step that fails does not stop the
# others; the exit status is 1 if any failed, ran out of time or was skipped.
set -uo pipefail
if [[ $# -ne 1 || $1 == -* ]]; then sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-480}
out=$1
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$root" || exit 2
export PYTHONPATH="${TE_SITE:+$TE_SITE:}$root${EXTRA_SITE:+:$EXTRA_SITE}${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 CUDA_DEVICE_MAX_CONNECTIONS=1

"$PYTHON" - <<'PY' || { echo "no CUDA device is visible to $PYTHON: these checks need one" >&2; exit 1; }
import sys, torch
sys.exit(0 if torch.cuda.is_available() else 1)
PY

failed=0
step() { # name, seconds at most, command...
  local name=$1 limit=$2 start=$SECONDS left status result
  shift 2
  left=$((BUDGET - SECONDS - 3))
  if ((limit > left)); then limit=$left; fi
  if ((limit < 2)); then
    printf '%-20s %-8s %5s   nothing is left of %d s\n' "$name" skipped '' "$BUDGET"
    failed=1
    return
  fi
  timeout -k 2 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  case $status in 0) result=ok ;; 124 | 137) result='TOO LONG' ;; *) result=FAILED ;; esac
  if ((status)); then failed=1; fi
  printf '%-20s %-8s %3d s   %s\n' "$name" "$result" $((SECONDS - start)) "$(tail -n 1 "$out/$name.log" | cut -c1-110)"
}

if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
fi
benchmark=("$PYTHON" -m megatron_speech.cli benchmark)
# What matters most comes first: time that runs out is missed at the end.
step build 120 "$PYTHON" setup.py -q build_ext --inplace --parallel 4
step loss_mask_equal 60 "$PYTHON" -m pytest -q tests/ops/test_loss_mask.py -k cuda_agrees_with_the_reference
step loss_mask_pt 25 "${benchmark[@]}" loss-mask --policy pt --rows 32 --json "$out/loss_mask_pt.json"
step loss_mask_sft 25 "${benchmark[@]}" loss-mask --policy sft --rows 32 --json "$out/loss_mask_sft.json"
step cuda_vs_cpu 90 "$PYTHON" benchmarks/gpu_check.py agreement --json "$out/agreement.json"
step hidden_syncs 40 "$PYTHON" benchmarks/gpu_check.py syncs --json "$out/syncs.json"
step speed_1b 75 "$PYTHON" benchmarks/gpu_check.py speed --preset 1b --json "$out/speed.json"
step head_equal 40 "$PYTHON" -m pytest -q tests/ops/test_cross_entropy_cuda.py
step head_1b 45 "${benchmark[@]}" head --hidden 2048 --rows 8192 --masked 0 0.5 0.95 --json "$out/head.json"
step transformer_engine 200 "$PYTHON" benchmarks/gpu_te_check.py --json "$out/transformer_engine.json"
step optimizer 60 "$PYTHON" -m pytest -q tests/training/test_freezing.py tests/training/test_ema.py \
  tests/training/test_spikes.py tests/training/test_determinism.py -k "frozen or thirty or skipped_step or bit_identical"
"$PYTHON" benchmarks/gpu_table.py "$out" | tee "$out/table.md"
exit $failed

#!/usr/bin/env bash
# Digits: text → spoken words in the voice of a reference recording, from recordings to scored speech.
#
#   bash examples/digits/run.sh [--connected] SAMPLES_JSONL OUT_DIR [KEY=VALUE ...]
#
#   --connected    several words at a time, in sequences that training never saw (recipe connected.yaml)
#   SAMPLES_JSONL  lines with wav_path, transcript, speaker_id (any short words, any speakers; several recordings each)
#   OUT_DIR        gets generated.jsonl + wavs, report.json, and the run with its checkpoint
#   KEY=VALUE      changes to examples/digits/recipe.yaml, such as stages.sft.tokens=10M
set -euo pipefail

road=run.py
if [[ ${1:-} == --connected ]]; then
  road=connected.py
  shift
fi
if [[ $# -lt 2 ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
make --no-print-directory -C "$root" venv
exec "$root/.venv/bin/python" "$root/examples/digits/$road" --samples "$1" --output-dir "$2" "${@:3}"

#!/usr/bin/env bash
# Digits: text → a spoken word in the voice of a reference recording, from recordings to scored speech.
#
#   bash examples/digits/run.sh SAMPLES_JSONL OUT_DIR [KEY=VALUE ...]
#
#   SAMPLES_JSONL  lines with wav_path, transcript, speaker_id (any short words, any speakers; several recordings each)
#   OUT_DIR        gets generated.jsonl + wavs, report.json, and the run with its checkpoint
#   KEY=VALUE      changes to examples/digits/recipe.yaml, such as stages.sft.tokens=10M
set -euo pipefail

if [[ $# -lt 2 ]]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
make --no-print-directory -C "$root" venv
exec "$root/.venv/bin/python" "$root/examples/digits/run.py" --samples "$1" --output-dir "$2" "${@:3}"

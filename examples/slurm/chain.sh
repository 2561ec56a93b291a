#!/usr/bin/env bash
# From samples to a fine-tuned model, submitted at once: conversions (array → merge), then the stages of a recipe.
#
#   bash examples/slurm/chain.sh CONVERSIONS.txt RECIPE.yaml STAGE[,STAGE...] [sbatch option ...] -- [key=value ...]
#
# A line of CONVERSIONS.txt is one dataset, `SHARDS OUTPUT_PREFIX [flag of preprocess_data.py ...]`, such as
#
#   64 data/tts --task tts --input codes/samples.jsonl --token-space ts.json
#
# The sbatch options are of the training jobs; those of the conversions stand in CONVERT_OPTIONS:
#   CONVERT_OPTIONS="--partition=cpu --time=4:00:00 --cpus-per-task=8"
set -euo pipefail

if [[ $# -lt 4 || ! -f $1 ]]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0"
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
conversions=$1
shift
read -r -a options <<<"${CONVERT_OPTIONS:-}"
merges=()
while read -r -a words; do
  if [[ ${#words[@]} -eq 0 || ${words[0]} == \#* ]]; then continue; fi
  said=$(bash "$here/submit.sh" "${words[0]}" "${words[1]}" "${options[@]}" -- "${words[@]:2}")
  echo "$said"
  merges+=("$(sed -n 's/.*; job \([0-9]*\) joins.*/\1/p' <<<"$said")")
done <"$conversions"
if [[ ${#merges[@]} -eq 0 ]]; then
  echo "error: $conversions names no conversion; to train on datasets that exist use submit_train.sh" >&2
  exit 2
fi
AFTER=$(IFS=:; echo "${merges[*]}") exec bash "$here/submit_train.sh" "$@"

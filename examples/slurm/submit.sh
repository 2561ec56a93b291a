#!/usr/bin/env bash
# Submit a conversion: an array of shards, and the job that joins them once all have succeeded.
#
#   bash examples/slurm/submit.sh SHARDS OUTPUT_PREFIX [sbatch option ...] -- [flag of preprocess_data.py ...]
#
# for example
#
#   bash examples/slurm/submit.sh 64 data/tts --partition=cpu --account=speech --time=4:00:00 --cpus-per-task=8 -- \
#     --task tts --input codes/samples.jsonl --token-space ts.json
#
# Logs go to OUTPUT_PREFIX.logs. A shard that fails (bad input) cancels the join; mend the cause and submit again.
set -euo pipefail

if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || $2 == -* ]]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0"
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
shards=$1
prefix=$2
shift 2
options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  options+=("$1")
  shift
done
if [[ $# -eq 0 ]]; then
  echo "error: a -- is needed between the sbatch options and the flags of preprocess_data.py" >&2
  exit 2
fi
shift

export MEGATRON_SPEECH=$root
mkdir -p "$prefix.logs"
array=$(sbatch --parsable "${options[@]}" --array="0-$((shards - 1))" --output="$prefix.logs/%x-%A_%a.log" \
  "$root/examples/slurm/preprocess.sbatch" "$prefix" "$@")
merge=$(sbatch --parsable "${options[@]}" --cpus-per-task=1 --dependency="afterok:${array%%;*}" \
  --kill-on-invalid-dep=yes --output="$prefix.logs/%x-%j.log" \
  "$root/examples/slurm/merge.sbatch" "$shards" "$prefix")
echo "array job ${array%%;*} converts $shards shards; job ${merge%%;*} joins them into $prefix; logs: $prefix.logs"

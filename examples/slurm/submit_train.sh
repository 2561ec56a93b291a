#!/usr/bin/env bash
# Submit the stages of a recipe as jobs that follow each other.
#
#   bash examples/slurm/submit_train.sh RECIPE.yaml STAGE[,STAGE...] [sbatch option ...] -- [key=value ...]
#
# for example
#
#   bash examples/slurm/submit_train.sh examples/recipes/pt_sft_1b.yaml s1,s2,s3,sft --nodes=4 --ntasks-per-node=8 \
#     --gpus-per-node=8 --time=24:00:00 -- run_dir=/shared/runs/a token_space=/shared/ts.json
#
#   AFTER  jobs that have to succeed first, such as merges: AFTER=17:18
#   LOGS   folder of the logs; default: logs
#
# A job ends when its stage does, and the next one starts only then; each is requeued by itself as often as needed.
set -euo pipefail

if [[ $# -lt 3 || $2 == -* ]]; then
  sed -n '2,15s/^# \{0,1\}//p' "$0"
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
recipe=$1
IFS=, read -r -a stages <<<"$2"
shift 2
options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  options+=("$1")
  shift
done
if [[ $# -eq 0 ]]; then
  echo "error: a -- is needed between the sbatch options and the key=value of the recipe" >&2
  exit 2
fi
shift

export MEGATRON_SPEECH=$root
logs=${LOGS:-logs}
mkdir -p "$logs"
after=${AFTER:-}
for stage in "${stages[@]}"; do
  dependency=()
  if [[ -n $after ]]; then dependency=(--dependency="afterok:$after" --kill-on-invalid-dep=yes); fi
  job=$(sbatch --parsable --job-name="$stage" --output="$logs/%x-%j.log" "${options[@]}" "${dependency[@]}" \
    "$root/examples/slurm/train.sbatch" "$recipe" --through "$stage" "$@")
  after=${job%%;*}
  echo "job $after trains stage $stage; log: $logs/$stage-$after.log"
done

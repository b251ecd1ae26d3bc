#!/usr/bin/env bash
# Train and evaluate a preset on MVTec AD bottle with three seeds; print the table of docs/results.md.
# Usage: bash benchmarks/bottle.sh DATA_ROOT [CONFIG [FLAGS OF TRAIN.PY …]]
set -euo pipefail
cd "$(dirname "$0")/.."
root=${1:?give the folder that holds bottle/}
config=${2:-configs/fastflow_efficientnet_lite0.yaml}
flags=("${@:3}")
python=${PYTHON:-.venv/bin/python}
name=$(basename "$config" .yaml)
files=()
for seed in 0 1 2; do
  run=${name}_seed$seed
  "$python" train.py -cfg "$config" -cat bottle --data "$root" --exp_dir "$run" --overwrite \
    -o "train.seed=$seed" ${flags[@]+"${flags[@]}"}
  "$python" eval.py -cat bottle --data "$root" --exp_dir "$run" --is_last
  files+=("results/$run/bottle/results.json")
done
"$python" -m utils.report compare "${files[@]}"
for seed in 0 1 2; do grep -h "done after epoch" "results/${name}_seed$seed/bottle/train.log" | tail -1; done

#!/usr/bin/env bash
# Seconds of a training epoch with and without the feature cache, in turn; prints the line of docs/results.md.
# Usage: bash benchmarks/feature_cache.sh DATA_ROOT
set -euo pipefail
cd "$(dirname "$0")/.."
root=${1:?give the folder that holds bottle/}
python=${PYTHON:-.venv/bin/python}
for _ in 1 2 3; do
  for cache in true false; do
    "$python" train.py -cfg configs/fastflow_efficientnet_lite0.yaml -cat bottle --data "$root" \
      --exp_dir "feature_cache_$cache" --overwrite --epochs 2 -o data.cache=$cache > /dev/null 2>&1
    "$python" - "$cache" <<'PY'
import json, sys
from pathlib import Path
lines = Path(f"results/feature_cache_{sys.argv[1]}/bottle/log.jsonl").read_text().splitlines()
epochs = [e["seconds"] for e in map(json.loads, lines) if e["event"] == "epoch"]
print(f"cache {sys.argv[1]}: {epochs[-1]:.1f} s per epoch")
PY
  done
done

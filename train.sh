#!/bin/sh
# Trains all 15 categories of MVTec AD one after the other, then evaluates them together.
# usage: sh train.sh [argument of train.py...]
#   for example: sh train.sh -cfg configs/fastflow_efficientnet_lite0.yaml --data /disk/mvtec
dir_name="${dir_name:-exp}" # results/$dir_name/<category>
python="${python:-}"        # empty: the one in .venv, else python3

cd -- "$(dirname -- "$0")" || exit 1
if [ -z "$python" ]; then
    python=python3
    for found in .venv/bin/python .venv/Scripts/python.exe; do
        [ ! -x "$found" ] || python=$found
    done
fi

failed=""
for category in toothbrush screw hazelnut transistor tile pill bottle cable capsule carpet grid \
    leather metal_nut wood zipper; do
    echo "== $category"
    "$python" train.py --exp_dir "$dir_name" "$@" --category "$category"
    code=$?
    [ "$code" -ne 130 ] || exit 130 # stopped by the user
    [ "$code" -eq 0 ] || failed="$failed $category"
done

echo "== evaluation"
"$python" eval.py --exp_dir "$dir_name" --category all
code=$?
[ -z "$failed" ] || echo "error: training failed, for the reasons above:$failed" >&2
[ -z "$failed" ] && [ "$code" -eq 0 ]

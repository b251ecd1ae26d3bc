#!/usr/bin/env bash
# Makes pretrained/bottle again, the small exported detector that main.gradio.py shows: FastFlow,
# half as many steps and 128 pixels, trained on the images in lite_data alone.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
run=results/pretrained_bottle
"$python" train.py -cfg configs/fastflow_efficientnet_lite0.yaml --data lite_data -cat bottle \
    --exp_dir "$run" --overwrite --epochs 30 -o model.input_size=128 -o model.steps=4
"$python" eval.py --exp_dir "$run" --data lite_data
"$python" deploy/export_model.py --exp_dir "$run" --data lite_data \
    --save_inference_dir pretrained/bottle

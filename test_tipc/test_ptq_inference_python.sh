#!/usr/bin/env bash
# Quantizes the backbone of a trained model to 8 bits after the training, and runs the result.
# usage: bash test_tipc/test_ptq_inference_python.sh PARAMS_FILE [whole_infer]
# exit:  0 passed, 1 a stage failed, 2 a mistake in the call
set -u
# shellcheck source=test_tipc/common_func.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common_func.sh"
# shellcheck source=test_tipc/deploy_func.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/deploy_func.sh"
trap 'exit 130' INT TERM

{ [ $# -ge 1 ] && [ "${2-whole_infer}" = whole_infer ]; } ||
    func_die "usage: bash test_tipc/test_ptq_inference_python.sh PARAMS_FILE [whole_infer]"
func_open_chain "$1" ptq PTQ inference
if ! func_export_bundle; then
    func_skip "export failed" "quantization and inference"
elif ! func_stage quantize "has been saved into" PTQ "--save_inference_dir=$bundle" \
    "--output=$log_path/inference_int8"; then
    func_skip "quantization failed" inference
else
    func_infer int8 "$log_path/inference_int8"
fi
func_end_chain ptq

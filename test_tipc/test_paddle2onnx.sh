#!/usr/bin/env bash
# Exports a trained model with paddle2onnx, runs it by ONNX Runtime, and compares with Paddle's scores.
# usage: bash test_tipc/test_paddle2onnx.sh PARAMS_FILE [paddle2onnx_infer]
# exit:  0 passed, 1 a stage failed, 2 a mistake in the call
set -u
# shellcheck source=test_tipc/common_func.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common_func.sh"
# shellcheck source=test_tipc/deploy_func.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/deploy_func.sh"
trap 'exit 130' INT TERM

{ [ $# -ge 1 ] && [ "${2-paddle2onnx_infer}" = paddle2onnx_infer ]; } ||
    func_die "usage: bash test_tipc/test_paddle2onnx.sh PARAMS_FILE [paddle2onnx_infer]"
func_open_chain "$1" paddle2onnx inference
if func_export_bundle; then
    if func_infer paddle "$bundle" --engine=paddle && func_infer onnx "$bundle" --engine=onnx; then
        func_compare compare "$log_path/paddle_fp32.txt" "$log_path/onnx_fp32.txt"
    else
        func_skip "inference failed" "comparison of the engines"
    fi
else
    func_skip "export failed" "inference and comparison"
fi
func_end_chain paddle2onnx

#!/usr/bin/env bash
# Starts the HTTP service on a trained model, sends images to it, compares with infer.py, and stops it.
# usage: bash test_tipc/test_serving_infer_python.sh PARAMS_FILE [serving_infer]
# exit:  0 passed, 1 a stage failed, 2 a mistake in the call
set -u
# shellcheck source=test_tipc/common_func.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common_func.sh"
# shellcheck source=test_tipc/deploy_func.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/deploy_func.sh"
trap 'exit 130' INT TERM

{ [ $# -ge 1 ] && [ "${2-serving_infer}" = serving_infer ]; } ||
    func_die "usage: bash test_tipc/test_serving_infer_python.sh PARAMS_FILE [serving_infer]"
func_open_chain "$1" serving inference serving client
if func_export_bundle && func_infer python "$bundle"; then
    func_words "$(func_of serving)"
    # the client starts the service, waits until it is ready, asks, and ends it: all of it is one stage
    func_stage client "images" client --images "$image" --results "$log_path/service_fp32.txt" \
        -- "$python" "${words[@]}" "$bundle" --port 0 &&
        func_compare compare "$log_path/python_fp32.txt" "$log_path/service_fp32.txt"
else
    func_skip "export or inference failed" "the service"
fi
func_end_chain serving

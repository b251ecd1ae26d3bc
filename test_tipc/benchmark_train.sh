#!/usr/bin/env bash
# Trains for a few epochs and writes the speed in images per second.
# usage: bash test_tipc/benchmark_train.sh PARAMS_FILE benchmark_train [dynamic_bs8_fp32_SingleP]
#        the third argument takes the place of the combinations in the params file
# exit:  0 passed, 1 a training failed, 2 a mistake in the call, 3 every combination had to be skipped
set -u
# shellcheck source=test_tipc/common_func.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common_func.sh"
trap 'exit 130' INT TERM

func_benchmark_params() {  # the section after line 32: lists of batch sizes, precisions and processes
    local line inside=no
    batch_list="" item_list="" process_list=SingleP epochs=1
    for line in "${lines[@]:32}"; do
        case "$inside $line" in
            *===*train_benchmark_params*) inside=yes ;;
            *===*) inside=no ;;
            "yes batch_size:"*) batch_list=$(func_parser_value "$line") ;;
            "yes fp_items:"*) item_list=$(func_parser_value "$line") ;;
            "yes process_type:"*) process_list=$(func_parser_value "$line") ;;
            "yes epoch:"*) epochs=$(func_parser_value "$line") ;;
        esac
    done
    [ -n "$batch_list" ] && [ -n "$item_list" ] || func_die \
        "$params has no batch_size: and fp_items: after a ===train_benchmark_params=== header"
}

func_narrow() {  # dynamic_bs8_fp32_SingleP: one combination
    [[ $1 =~ ^dynamic_bs([0-9]+)_(fp32|amp)_(SingleP|MultiP)$ ]] ||
        func_die "'$1' is not like dynamic_bs8_fp32_SingleP (fp32 or amp, SingleP or MultiP)"
    batch_list=${BASH_REMATCH[1]} item_list=${BASH_REMATCH[2]} process_list=${BASH_REMATCH[3]}
}

func_train_once() {  # batch size, precision, process type
    local name=${model_name}_bs$1_$2_$3 log speed problem=$no_gpu
    log=$log_path/train_log/${name}_log
    if [ "$2" = amp ] && [ -n "$problem" ]; then
        func_skip "mixed precision needs a GPU: $problem" "$name"
        return
    fi
    command=("$python")
    if [ "$3" = MultiP ]; then
        problem=$(func_gpu_problem 0,1)
        command+=(-m paddle.distributed.launch "--log_dir=$log_path/launch_log")
        if [ -n "$no_gpu" ]; then
            command+=(--nproc_per_node=2 --backend=gloo)
        elif [ -n "$problem" ]; then
            func_skip "$problem" "$name"
            return
        else
            command+=(--gpus=0,1)
        fi
    fi
    func_command "$trainer_py" "$device_key" "$device" "$exp_dir_key" "$log_path/run" \
        "$epoch_key" "$epochs" "$train_batch_key" "$1" "$data_key" "$data_value"
    [ "$2" = fp32 ] || command+=(-o train.amp=true)
    func_run "$log" "ips:" "${command[@]}" || return
    speed=$(sed -n 's/.*ips: *\([0-9.][0-9.]*\).*/\1/p' "$log" | tail -n 1)
    printf '{"model": "%s", "batch_size": %s, "precision": "%s", "process_type": "%s", "device": "%s", "ips": %s}\n' \
        "$model_name" "$1" "$2" "$3" "$device" "$speed" | tee "$log_path/index/${name}_speed"
}

{ [ $# -ge 2 ] && [ $# -le 3 ] && [ "$2" = benchmark_train ]; } ||
    func_die "usage: bash test_tipc/benchmark_train.sh PARAMS_FILE benchmark_train [dynamic_bs8_fp32_SingleP]"
func_enter_root "$1"
func_load_params "$params" lite_train_lite_infer
func_benchmark_params
[ $# -eq 2 ] || func_narrow "$3"
func_check_items "$params" batch_size "$batch_list" '^[1-9][0-9]*$' "a number"
func_check_items "$params" fp_items "$item_list" '^(fp32|amp)$' "fp32 or amp"
func_check_items "$params" process_type "$process_list" '^(SingleP|MultiP)$' "SingleP or MultiP"
func_check_items "$params" epoch "$epochs" '^[1-9][0-9]*$' "a number"
func_find_python "$python_asked"
PYTHON=$python bash test_tipc/prepare.sh "$params" lite_train_lite_infer || exit
func_probe_gpus
no_gpu=$(func_gpu_problem "") device=$device_value
[ -z "$no_gpu" ] || device=cpu
func_start benchmark_train results_benchmark.log
mkdir -p -- "$log_path/train_log" "$log_path/index"
IFS='|' read -r -a batches <<< "$batch_list"
IFS='|' read -r -a items <<< "$item_list"
IFS='|' read -r -a processes <<< "$process_list"
for process in "${processes[@]}"; do
    for item in "${items[@]}"; do
        for batch in "${batches[@]}"; do func_train_once "$batch" "$item" "$process"; done
    done
done
func_summary benchmark_train
[ "$count_failed" -eq 0 ] || exit 1
[ "$count_passed" -gt 0 ] || exit 3
exit 0

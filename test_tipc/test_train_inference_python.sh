#!/usr/bin/env bash
# Runs the chain train -> eval -> export -> inference of one params file in one mode.
# usage: bash test_tipc/test_train_inference_python.sh PARAMS_FILE MODE [GPU_ID, whole_infer only]
# exit:  0 passed, 1 a stage failed, 2 a mistake in the call, 3 every inference had to be skipped
set -u
# shellcheck source=test_tipc/common_func.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common_func.sh"
trap 'exit 130' INT TERM

func_inference() {  # folder of the exported model, suffix of the log names
    local use_gpu use_gpus batch_size batch_sizes
    IFS='|' read -r -a use_gpus <<< "$use_gpu_list"
    IFS='|' read -r -a batch_sizes <<< "$batch_size_list"
    for use_gpu in "${use_gpus[@]}"; do
        for batch_size in "${batch_sizes[@]}"; do
            case "$use_gpu" in
                True | gpu) func_infer_once "$1" gpu "$use_gpu" "$batch_size" "$2" ;;
                *) func_infer_once "$1" cpu "$use_gpu" "$batch_size" "$2" ;;
            esac
        done
    done
}

func_infer_once() {  # model folder, device, value for line 28, batch size, suffix
    local name="$log_path/python_infer_$2_batchsize_$4$5" reason=""
    wanted_inference=$((wanted_inference + 1))
    [ "$2" = cpu ] || reason=$(func_gpu_problem "$visible_gpu")
    if [ -n "$reason" ]; then
        func_skip "$reason" "inference on $2, batch size $4"
        return
    fi
    ran_inference=$((ran_inference + 1))
    rm -rf -- "$name" "$name.log" "${name}_fp32.txt"
    command=("$python")
    func_command "$inference_py" "$use_gpu_key" "$3" "$batch_size_key" "$4" "$infer_model_key" "$1" \
        "$image_key" "$image_value" "$benchmark_key" "$benchmark_value" --output "$name"
    func_run "$name.log" "score:" "${command[@]}" || return
    command=("$python" test_tipc/collect_results.py "$name/results.jsonl" "${name}_fp32.txt")
    func_run "${name}_collect.log" "images" "${command[@]}"
}

func_train_device() {  # entry of gpu_list: sets all_cards, visible_gpu, launch words and device
    local cards
    all_cards=${1##*;}
    visible_gpu=${all_cards%%,*}
    device=$device_value
    launch=()
    case "$1" in
        -1) visible_gpu="" device=cpu ;;
        -1,*)
            IFS=',' read -r -a cards <<< "$1"
            visible_gpu="" device=cpu
            launch=(-m paddle.distributed.launch "--nproc_per_node=${#cards[@]}" --backend=gloo
                "--log_dir=$log_path/launch_log") ;;
        *[,\;]*)
            launch=(-m paddle.distributed.launch "--gpus=$all_cards" "--log_dir=$log_path/launch_log") ;;
    esac
    case "$1" in *\;*) launch+=("--ips=${1%%;*}") ;; esac
    # only --device is known to take gpu and cpu; the layout reads other keys and does not use them
    [ "$device_key" = --device ] || device=""
}

func_train() {  # name of the chain
    local code first_card=$visible_gpu
    command=("$python" ${launch[@]+"${launch[@]}"})
    func_command "$trainer_py" "$device_key" "$device" "$exp_dir_key" "$exp_dir_value" \
        "$epoch_key" "$epoch_num" "$train_batch_key" "$train_batch_value" \
        "$pretrain_key" "$pretrain_value" "$data_key" "$data_value"
    [ ${#launch[@]} -eq 0 ] || visible_gpu=""  # the launcher hands out the cards itself
    func_run "$log_path/$1.log" "ips:" "${command[@]}"
    code=$?
    visible_gpu=$first_card
    return "$code"
}

func_eval() {  # name of the chain
    if [ "$eval_py" = null ]; then
        func_skip "line 17 is null" eval
        return
    fi
    command=("$python")
    func_command "$eval_py" "$device_key" "$device" "$data_key" "$data_value" "$exp_dir_key" "$exp_dir_value"
    func_run "$log_path/${1}_eval.log" "image-auc" "${command[@]}"
}

func_export() {  # name of the chain, folder for the exported model
    rm -rf -- "$2"
    mkdir -p -- "$2"
    command=("$python")
    func_command "$norm_export" "$exp_dir_key" "$exp_dir_value" "$save_infer_key" "$2"
    func_run "$log_path/${1}_export.log" "has been saved into" "${command[@]}"
}

func_chain() {  # trainer, entry of gpu_list
    local nodes name save_dir suffix=""
    func_train_device "$2"
    name=$1_gpus_$all_cards
    case "$2" in
        *\;*) IFS=',' read -r -a nodes <<< "${2%%;*}"; name=${name}_nodes_${#nodes[@]} ;;
    esac
    save_dir=$log_path/$name
    [ "$chains" -eq 0 ] || suffix=_$name  # later chains must not overwrite the first one's logs
    chains=$((chains + 1))
    rm -rf -- "$save_dir"  # a model of an earlier run must not pass for this one's
    if ! func_train "$name"; then
        func_skip "training failed" "eval, export and inference of $name"
        return
    fi
    func_eval "$name"
    if [ "$norm_export" = null ]; then
        func_skip "line 22 is null" "export and inference of $name"
    elif func_export "$name" "$save_dir"; then
        func_inference "$save_dir" "$suffix"
    else
        func_skip "export failed" "inference of $name"
    fi
}

func_trainer() {  # trainer: one chain per entry of gpu_list that can run here
    local entry entries reason tried=0
    IFS='|' read -r -a entries <<< "$gpu_list"
    for entry in "${entries[@]}"; do
        reason=""
        case "$entry" in
            -1*) [ "$1" != amp_train ] || reason="mixed precision needs a GPU" ;;
            *) reason=$(func_gpu_problem "${entry##*;}") ;;
        esac
        if [ -n "$reason" ]; then
            func_skip "$reason" "$1 on gpu_list entry $entry"
        else
            tried=$((tried + 1))
            func_chain "$1" "$entry"
        fi
    done
    [ "$tried" -eq 0 ] || return 0
    if [ "$1" = amp_train ]; then
        wanted_inference=$((wanted_inference + 1))
        func_skip "nothing was trained" "eval, export and inference of $1"
    else
        func_say "no entry of gpu_list:$gpu_list can run here, training on the CPU (entry -1) instead"
        func_chain "$1" -1
    fi
}

func_train_modes() {
    local trainer trainers
    if [ "$trainer_py" = null ]; then
        func_skip "line 14 is null" "train, eval, export and inference"
        return
    fi
    IFS='|' read -r -a trainers <<< "$trainer_list"
    for trainer in "${trainers[@]}"; do func_trainer "$trainer"; done
}

func_whole_infer() {  # GPU id or nothing
    visible_gpu=$1
    if [ "$infer_export" = null ]; then
        func_skip "line 25 is null, the exported model is in $save_infer_dir" export
    else
        command=("$python")
        func_command "$infer_export" "$export_weight_key" "$train_model" "$save_infer_key" "$save_infer_dir"
        if ! func_run "$log_path/whole_infer_export.log" "has been saved into" "${command[@]}"; then
            func_skip "export failed" inference
            return
        fi
    fi
    func_inference "$save_infer_dir" ""
}

func_finish() {
    local code=0
    [ "$wanted_inference" -eq 0 ] || [ "$ran_inference" -gt 0 ] || code=3
    [ "$count_failed" -eq 0 ] || code=1
    func_summary "$mode"
    [ "$code" -ne 3 ] || func_say "no inference could run on this machine; that is not a pass (exit code 3)"
    exit "$code"
}

{ [ $# -ge 2 ] && [ $# -le 3 ]; } ||
    func_die "usage: bash test_tipc/test_train_inference_python.sh PARAMS_FILE MODE [GPU_ID for whole_infer]"
func_enter_root "$1"
mode=$2
gpu_id=${3-}
func_check_mode "$mode"
if [ -n "$gpu_id" ]; then
    [ "$mode" = whole_infer ] || func_die "'$gpu_id': a GPU id is for whole_infer; other modes read line 4 (gpu_list)"
    case "$gpu_id" in *[!0-9]*) func_die "GPU id '$gpu_id' is not a number" ;; esac
fi
func_load_params "$params" "$mode"
func_find_python "$python_asked"
PYTHON=$python bash test_tipc/prepare.sh "$params" "$mode" || exit
func_probe_gpus

func_start "$mode" results_python.log
wanted_inference=0 ran_inference=0 chains=0
if [ "$mode" = whole_infer ]; then func_whole_infer "$gpu_id"; else func_train_modes; fi
func_finish

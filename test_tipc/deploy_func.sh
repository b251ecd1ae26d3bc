#!/usr/bin/env bash
# What the chains behind a trained model share: their params files, read by key, and the bundle.
# Sourced after common_func.sh.
# shellcheck disable=SC2034,SC2154  # the scripts that source this file use and set the variables

func_open_chain() {  # params file, name of the chain, keys that its file must have
    local chain=$2 key
    func_enter_root "$1"
    shift 2
    func_read_lines "$params"
    for key in model_name python export --exp_dir --image_path "$@"; do
        [ -n "$(func_of "$key")" ] || func_die "$params: no line '$key:value'"
    done
    model_name=$(func_of model_name)
    case "$model_name" in
        *[!A-Za-z0-9._-]*) func_die "$params: model_name '$model_name' is not letters, digits, . _ -" ;;
    esac
    image=$(func_of --image_path)
    run=$(func_of --exp_dir)
    [ -e "$image" ] || func_die "no image '$image': change --image_path of $params"
    [ -e "$run" ] || [ -e "results/$run" ] || func_die \
        "no trained model '$run': run test_train_inference_python.sh first, or change --exp_dir of $params"
    func_find_python "$(func_of python)"
    func_start "$chain" "results_$chain.log"
    bundle=$(dirname -- "$log_path")/exported
}

func_of() {  # key: the value of its line; nothing where there is none
    local line
    for line in ${lines[@]+"${lines[@]}"}; do
        case "$line" in "$1:"*) func_parser_value "$line"; return ;; esac
    done
}

func_stage() {  # log name, text that a working stage prints, key of the command, further words
    local log=$log_path/$1.log expected=$2 key=$3
    shift 3
    command=("$python")
    func_command "$(func_of "$key")"
    func_run "$log" "$expected" "${command[@]}" "$@"
}

func_export_bundle() {  # the trained model; chains behind the same training share what is exported
    local folder=$run stamp="$bundle.stamp" wanted
    [ -e "$folder" ] || folder=results/$run
    wanted=$(func_of export; cat -- "$folder"/*/last/meta.json 2> /dev/null | cksum)
    if [ -f "$bundle/inference.yml" ] && [ "$(cat "$stamp" 2> /dev/null)" = "$wanted" ]; then
        func_skip "$bundle is of this training already" export
        return
    fi
    rm -rf -- "$bundle" "$stamp"
    func_stage export "has been saved into" export "--exp_dir=$run" "--save_inference_dir=$bundle" || return
    printf '%s\n' "$wanted" > "$stamp"
}

func_infer() {  # name, bundle, further words: results in <name>_fp32.txt
    local name=$1 folder=$log_path/$1 model=$2
    shift 2
    rm -rf -- "$folder"
    func_stage "$name" "score:" inference "--save_inference_dir=$model" "--image_path=$image" \
        "--output=$folder" "$@" || return
    command=("$python" test_tipc/collect_results.py "$folder/results.jsonl" "${folder}_fp32.txt")
    func_run "${folder}_collect.log" "images" "${command[@]}"
}

func_compare() {  # name of the log, reference, results
    command=("$python" test_tipc/compare_results.py "--gt_file=$2" "--log_file=$3" --atol=1e-4 --rtol=1e-4)
    func_run "$log_path/$1.log" "^ok " "${command[@]}"
}

func_end_chain() {  # name of the chain
    func_summary "$1"
    [ "$count_failed" -eq 0 ] || exit 1
    exit 0
}

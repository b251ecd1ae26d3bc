#!/usr/bin/env bash
# Functions of all scripts of this folder; sourced, bash 3.2 and `set -u`.

# shellcheck disable=SC2034  # the scripts that source this file use the variables
MODES="lite_train_lite_infer lite_train_whole_infer whole_train_whole_infer whole_infer"

func_die() {  # message: a user's mistake, in one line
    printf 'test_tipc: %s\n' "$*" >&2
    exit 2
}

func_say() {
    printf 'test_tipc: %s\n' "$*"
}

# ---- one line of the params file: `key:value`, only the first colon divides, so URLs stay whole

func_parser_key() {
    printf '%s' "${1%%:*}"
}

func_parser_value() {
    printf '%s' "${1#*:}"
}

func_parser_params() {  # line, mode: the value of `MODE=value|MODE=value`; a plain value serves all
    local value item items per_mode=no
    value=$(func_parser_value "$1")
    IFS='|' read -r -a items <<< "$value"
    for item in ${items[@]+"${items[@]}"}; do
        case " $MODES " in
            *" ${item%%=*} "*) case "$item" in *=*) per_mode=yes ;; esac ;;
        esac
        case "$item" in
            "$2="*) printf '%s' "${item#*=}"; return ;;
        esac
    done
    [ "$per_mode" = yes ] || printf '%s' "$value"
}

func_set_params() {  # key, value: `key=value`, or nothing where either says null
    case "$2" in
        "" | " " | null) return ;;
    esac
    [ "$1" = null ] || printf '%s=%s' "$1" "$2"
}

func_words() {  # text: its shell words (quotes honoured, nothing expanded or run) in `words`
    local text word
    words=()
    text=$(printf '%s\n' "$1" | xargs printf '%s\n' 2>/dev/null) || return 1
    while IFS= read -r word; do words+=("$word"); done <<< "$text"
}

func_show() {  # words: one line that can be pasted into a shell
    local word text=""
    for word in "$@"; do
        case "$word" in
            "" | *[!A-Za-z0-9_./=:,@%+-]*) text="$text $(printf '%q' "$word")" ;;
            *) text="$text $word" ;;
        esac
    done
    printf '%s' "${text# }"
}

# ---- the status log: plain text in the file, colour only on a terminal

func_status() {  # colour, text, status log
    if [ -t 1 ]; then printf '\033[%sm%s\033[0m\n' "$1" "$2"; else printf '%s\n' "$2"; fi
    printf '%s\n' "$2" >> "$3"
}

status_check() {  # exit code, command, status log, model, log of the command; counts the outcome
    if [ "$1" -eq 0 ]; then
        count_passed=$((${count_passed-0} + 1))
        func_status 33 " Run successfully with command - $4 - $2 - $5 " "$3"
    else
        count_failed=$((${count_failed-0} + 1))
        func_status 31 " Run failed with command - $4 - $2 - $5 " "$3"
    fi
}

status_skip() {  # reason, stage, status log, model
    count_skipped=$((${count_skipped-0} + 1))
    func_status 36 " Run SKIPPED - $4 - $2 - $1 " "$3"
}

# ---- what the user gave

func_check_mode() {
    case " $MODES " in
        *" ${1// /_} "*) ;;
        *) func_die "unknown mode '$1': use one of ${MODES// /, }" ;;
    esac
}

func_enter_root() {  # params file: go to the checkout, keep paths given relative to where the user is
    local start=$PWD
    root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
    params=$1
    if [ -f "$start/$1" ]; then params=$start/$1; fi
    case "${PYTHON-}" in
        /*) ;;
        */*) if [ -x "$start/$PYTHON" ]; then PYTHON=$start/$PYTHON; fi ;;
    esac
    if [ -n "${TIPC_OUTPUT-}" ]; then
        case "$TIPC_OUTPUT" in
            /* | ?:*) ;;
            *) TIPC_OUTPUT=$start/$TIPC_OUTPUT ;;
        esac
    fi
    cd -- "$root" || exit 2
    [ -f "$params" ] || func_die "no params file '$1' in $start or $root"
}

func_runs() {  # interpreter: being in PATH is not enough, pyenv and Windows put stubs there
    "$1" -c "" > /dev/null 2>&1
}

func_find_python() {  # value of line 3: PYTHON, else the checkout's .venv, else line 3, else python3
    local candidate
    if [ -n "${PYTHON-}" ]; then
        func_runs "$PYTHON" || func_die "PYTHON='$PYTHON' does not run; name an interpreter"
        python=$PYTHON
        return
    fi
    for candidate in .venv/bin/python .venv/Scripts/python.exe "$1" python3 python; do
        if func_runs "$candidate"; then
            python=$candidate
            [ "$python" = "$1" ] || func_say "line 3 says python:$1, using $python"
            return
        fi
    done
    func_die "found no python ('$1', python3, python): install one or set PYTHON"
}

# ---- the params file: 32 lines, read by position

func_load_params() {  # file, mode: the lines as globals
    func_read_lines "$1"
    func_check_lines "$1"
    model_name=$(func_parser_value "${lines[1]}")
    python_asked=$(func_parser_value "${lines[2]}")
    gpu_list=$(func_parser_value "${lines[3]}")
    device_key=$(func_parser_key "${lines[4]}")
    device_value=$(func_parser_value "${lines[4]}")
    epoch_key=$(func_parser_key "${lines[5]}")
    epoch_num=$(func_parser_params "${lines[5]}" "$2")
    exp_dir_key=$(func_parser_key "${lines[6]}")
    exp_dir_value=$(func_parser_params "${lines[6]}" "$2")
    train_batch_key=$(func_parser_key "${lines[7]}")
    train_batch_value=$(func_parser_params "${lines[7]}" "$2")
    pretrain_key=$(func_parser_key "${lines[8]}")
    pretrain_value=$(func_parser_value "${lines[8]}")
    data_key=$(func_parser_key "${lines[10]}")
    data_value=$(func_parser_params "${lines[10]}" "$2")
    trainer_list=$(func_parser_value "${lines[12]}")
    trainer_py=$(func_parser_value "${lines[13]}")
    eval_py=$(func_parser_value "${lines[16]}")
    save_infer_key=$(func_parser_key "${lines[19]}")
    save_infer_dir=$(func_parser_value "${lines[19]}")
    export_weight_key=$(func_parser_key "${lines[20]}")
    norm_export=$(func_parser_value "${lines[21]}")
    train_model=$(func_parser_value "${lines[23]}")
    infer_export=$(func_parser_value "${lines[24]}")
    inference_py=$(func_parser_value "${lines[26]}")
    use_gpu_key=$(func_parser_key "${lines[27]}")
    use_gpu_list=$(func_parser_value "${lines[27]}")
    batch_size_key=$(func_parser_key "${lines[28]}")
    batch_size_list=$(func_parser_value "${lines[28]}")
    infer_model_key=$(func_parser_key "${lines[29]}")
    image_key=$(func_parser_key "${lines[30]}")
    image_value=$(func_parser_value "${lines[30]}")
    benchmark_key=$(func_parser_key "${lines[31]}")
    benchmark_value=$(func_parser_value "${lines[31]}")
    func_check_values "$1" "$2"
}

func_read_lines() {  # file: its lines without CR, BOM and outer blanks, in `lines`
    local line bom=$'\xef\xbb\xbf'
    lines=()
    while IFS= read -r line || [ -n "$line" ]; do
        [ ${#lines[@]} -gt 0 ] || line=${line#"$bom"}
        line=${line%$'\r'}
        line=${line#"${line%%[![:space:]]*}"}
        line=${line%"${line##*[![:space:]]}"}
        lines+=("$line")
    done < "$1"
}

func_check_lines() {  # file: blank lines would shift every position, so they are refused
    local number=0 line count=${#lines[@]} pair
    while [ "$count" -gt 32 ] && [ -z "${lines[$((count - 1))]}" ]; do count=$((count - 1)); done
    for line in ${lines[@]+"${lines[@]}"}; do
        number=$((number + 1))
        [ "$number" -le 32 ] || break
        [ -n "$line" ] || func_die "$1: line $number is blank; lines are read by position, write ## instead"
    done
    [ "$count" -ge 32 ] || func_die "$1 has $count lines: the layout has 32, read by position"
    if [ "$count" -gt 32 ]; then
        case "${lines[32]}" in
            ===*) ;;
            *) func_die "$1 has $count lines: the layout has 32; more only after a ===…=== header on line 33" ;;
        esac
    fi
    for pair in 1:=== 2:model_name: 3:python: 4:gpu_list: 5:-- 6:-- 7:-- 8:-- 9:-- 11:-- 13:trainer: \
        16:=== 17:eval: 19:=== 20:-- 21:-- 24:train_model: 27:inference: 28:-- 29:-- 30:-- 31:-- 32:--; do
        number=${pair%%:*}
        line=${lines[$((number - 1))]}
        case "$line" in
            "${pair#*:}"*) ;;
            *) func_die "$1: line $number must begin with '${pair#*:}', found '$line'" ;;
        esac
    done
    for number in 5 6 7 8 9 11 14 20 21 22 25 28 29 30 31 32; do
        line=${lines[$((number - 1))]}
        case "$line" in
            *:*) ;;
            *) func_die "$1: line $number must be 'key:value', found '$line'" ;;
        esac
    done
}

func_check_values() {  # file, mode
    local number
    # both become names of folders
    func_check_items "$1" 2 "$model_name" '^[A-Za-z0-9_][A-Za-z0-9._-]*$' "letters, digits, . _ -"
    func_check_items "$1" 13 "$trainer_list" '^[A-Za-z0-9_][A-Za-z0-9._-]*$' "letters, digits, . _ -"
    for number in 14 17 22 25 27; do
        func_words "$(func_parser_value "${lines[$((number - 1))]}")" && [ -n "${words[0]}" ] ||
            func_die "$1: line $number needs a command with balanced quotes, or null"
    done
    func_check_items "$1" 4 "$gpu_list" '^(-1(,-1)*|[0-9]+(,[0-9]+)*|[^;| ]+;[0-9]+(,[0-9]+)*)$' \
        "-1, a card, cards like 0,1 or ip1,ip2;0,1"
    func_check_items "$1" 28 "$use_gpu_list" '^(True|gpu|False|cpu)$' "True or False"
    func_check_items "$1" 29 "$batch_size_list" '^[1-9][0-9]*$' "a number"
    if [ "$2" = whole_infer ]; then
        func_check_set "$1" 20 "$save_infer_key" "$save_infer_dir" "$2"
        return
    fi
    func_check_set "$1" 6 "$epoch_key" "$epoch_num" "$2"
    func_check_set "$1" 7 "$exp_dir_key" "$exp_dir_value" "$2"
    func_check_set "$1" 11 "$data_key" "$data_value" "$2"
}

func_check_items() {  # file, line number, list, pattern, rule
    local item items
    IFS='|' read -r -a items <<< "$3"
    [ ${#items[@]} -gt 0 ] || func_die "$1: line $2 is empty; each alternative must be $5"
    for item in "${items[@]}"; do
        [[ $item =~ $4 ]] || func_die "$1: line $2: '$item' is not $5"
    done
}

func_check_set() {  # file, line number, key, value, mode
    case "$4" in
        "" | null) func_die "$1: line $2 ($3) has no value for mode $5" ;;
    esac
}

func_category() {  # command of line 14: the category it names, else bottle
    local previous="" word
    func_words "$1"
    category=bottle
    for word in "${words[@]}"; do
        case "$previous" in -cat | --category) category=$word ;; esac
        case "$word" in -cat=* | --category=*) category=${word#*=} ;; esac
        previous=$word
    done
}

# ---- running a stage

func_skip() {  # reason, stage
    status_skip "$1" "$2" "$status_log" "$model_name"
}

func_run() {  # log, text that a working stage prints, command words
    local log=$1 expected=$2 shown code begin=$SECONDS
    shift 2
    shown=$(func_show "$@")
    printf '\n==> %s\n' "$shown"
    (
        if [ -n "$visible_gpu" ]; then export CUDA_VISIBLE_DEVICES="$visible_gpu"; fi
        exec "$@"
    ) 2>&1 | tee "$log"
    code=${PIPESTATUS[0]}
    if [ "$code" -eq 0 ] && ! grep -q -- "$expected" "$log"; then
        printf "exit code 0, but the output has no '%s'\n" "$expected" | tee -a "$log"
        code=1
    fi
    status_check "$code" "$shown" "$status_log" "$model_name" "$log"
    printf ' %s s\n' $((SECONDS - begin))
    return "$code"
}

func_command() {  # interpreter words are in `command`; add the words of a line and key=value pairs
    local pair
    func_words "$1"
    command+=("${words[@]}")
    shift
    while [ $# -ge 2 ]; do
        pair=$(func_set_params "$1" "$2")
        [ -z "$pair" ] || command+=("$pair")
        shift 2
    done
}

func_probe_gpus() {  # how many GPUs Paddle can use, or `cpu-build`; asked once
    local answer
    answer=$("$python" -c 'import paddle
cuda = paddle.is_compiled_with_cuda()
print("gpus:", paddle.device.cuda.device_count() if cuda else "cpu-build")' 2>&1) ||
        func_die "$python cannot import paddle: $(printf '%s\n' "$answer" | tail -n 1)"
    gpus=$(printf '%s\n' "$answer" | tr -d '\r' | sed -n 's/^gpus: //p')
    [ -n "$gpus" ] || func_die "$python did not say how many GPUs there are: $answer"
}

func_gpu_problem() {  # cards `0,1`, or nothing for any one: why they cannot be used, or nothing
    local card cards
    if [ "$gpus" = cpu-build ]; then
        printf 'this Paddle has no CUDA (paddle.is_compiled_with_cuda() is False)'
    elif [ "$gpus" -eq 0 ]; then
        printf 'Paddle sees no GPU on this machine'
    else
        IFS=',' read -r -a cards <<< "$1"
        for card in ${cards[@]+"${cards[@]}"}; do
            [ "$card" -lt "$gpus" ] || { printf 'no card %s: Paddle sees %s' "$card" "$gpus"; return; }
        done
    fi
}

func_summary() {  # mode: the last line of the status log, with the time since the driver began
    local seconds=$SECONDS counts="$count_passed passed, $count_failed failed, $count_skipped skipped"
    printf '\n'
    func_status 0 " Summary - $model_name - $1 - $counts - total wall time $((seconds / 60)) min $((seconds % 60)) s " \
        "$status_log"
    printf 'status lines: %s\n' "$status_log"
}

func_start() {  # folder below the output, name of the status log: makes both, and sets the counters
    log_path=${TIPC_OUTPUT:-./test_tipc/output}/$model_name/$1
    status_log=$log_path/$2
    mkdir -p -- "$log_path" || func_die "cannot write to $log_path"
    : > "$status_log"
    export PYTHONUNBUFFERED=1  # so that a long training shows on the screen while it runs
    count_passed=0 count_failed=0 count_skipped=0 visible_gpu=""
}

#!/usr/bin/env bash
# Makes sure that the data of one mode is there; offline, installs nothing, may be run again.
# usage: bash test_tipc/prepare.sh PARAMS_FILE MODE
set -u
# shellcheck source=test_tipc/common_func.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common_func.sh"

func_has_files() {
    [ -d "$1" ] && [ -n "$(find -L "$1" -type f ! -name '.*' 2> /dev/null | head -n 1)" ]
}

func_make_lite_data() {  # folder of the category
    local log
    func_find_python "$python_asked"
    func_say "making $1 ($python -m datasets.synthetic_bottle)"
    log=$("$python" -m datasets.synthetic_bottle --out "$1" --seed 0 2>&1) ||
        func_die "could not make $1: $(printf '%s\n' "$log" | tail -n 1)"
}

func_check_data() {  # data root, category
    local folder=$1/$2 part remedy
    remedy="put the $2 category there in the MVTec AD layout ($folder/{train,test,ground_truth})"
    remedy="$remedy, or change line 11 ($data_key) of the params file"
    case "$folder" in
        lite_data/bottle | ./lite_data/bottle)
            [ -e "$folder" ] || func_make_lite_data "$folder"
            remedy="remove the folder $folder and run this again, it will be made anew" ;;
    esac
    for part in train/good test; do
        func_has_files "$folder/$part" || func_die "no images in $folder/$part: $remedy"
    done
}

func_check_trained() {  # value of line 24: a path, or a name under results/
    [ -e "$1" ] || [ -e "results/$1" ] || func_die \
        "no trained model '$1': train one first, or change line 24 (train_model) of the params file"
}

[ $# -eq 2 ] || func_die "usage: bash test_tipc/prepare.sh PARAMS_FILE MODE"
func_enter_root "$1"
func_check_mode "$2"
func_load_params "$params" "$2"
if [ "$2" != whole_infer ]; then
    func_category "$trainer_py"
    func_check_data "$data_value" "$category"
elif [ "$infer_export" != null ]; then
    func_check_trained "$train_model"
fi
[ -e "$image_value" ] || func_die "no image '$image_value': change line 31 ($image_key) of the params file"
func_say "the data of $2 is there"

#!/usr/bin/env bash
# Makes .venv, then trains, evaluates, predicts, exports and infers on the bundled pictures.
# usage: bash quickstart.sh                       run it again and it goes on, or reuses what is there
#        bash quickstart.sh --install [FILE...]   only .venv, requirements.txt and these further files
# PYTHON=/path/to/python3.x names the interpreter to make .venv with; EPOCHS=n the length of training.
set -euo pipefail

EPOCHS="${EPOCHS:-24}"
CONFIG=configs/fastflow_efficientnet_lite0.yaml
TESTED="3.10 3.11 3.12 3.13"

case "${PYTHON:-}" in
    "" | /* | [A-Za-z]:*) ;;
    */*) PYTHON=$PWD/$PYTHON ;;
esac
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

say() { printf '\n== %s\n' "$*"; }

die() {  # exit code, message
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

version_of() {  # interpreter; prints nothing if it is none
    "$1" -c 'import sys; sys.stdout.write("%d.%d" % sys.version_info[:2])' 2> /dev/null || true
}

is_tested() {  # version
    case " $TESTED " in *" $1 "*) [ -n "$1" ] ;; *) false ;; esac
}

find_base() {  # sets base: the interpreter to make .venv with
    local name version seen=""
    if [ -n "${PYTHON:-}" ]; then
        version=$(version_of "$PYTHON")
        is_tested "$version" ||
            die 2 "PYTHON=$PYTHON is ${version:-no working Python}; one of $TESTED is needed"
        base=$PYTHON
        return
    fi
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        version=$(version_of "$name")
        if is_tested "$version"; then
            base=$name
            return
        fi
        [ -z "$version" ] || seen="$seen$name is $version, "
    done
    die 2 "${seen}one of Python $TESTED is needed; install it, or name it in PYTHON=/path/to/python3.x"
}

find_venv_python() {  # sets python
    python=.venv/bin/python
    [ -x "$python" ] || [ ! -x .venv/Scripts/python.exe ] || python=.venv/Scripts/python.exe
}

make_venv() {
    local version
    find_venv_python
    if [ -z "$(version_of "$python")" ]; then
        find_base
        say "making .venv with $base ($(version_of "$base"))"
        "$base" -m venv --clear .venv ||
            die 1 "$base made no .venv, for the reason above (Debian, Ubuntu: apt install python3-venv)"
        find_venv_python
    fi
    version=$(version_of "$python")
    is_tested "$version" ||
        die 2 ".venv has Python $version; remove the folder .venv, one of Python $TESTED is needed"
    "$python" -m pip --version > /dev/null 2>&1 || "$python" -m ensurepip > /dev/null ||
        die 1 ".venv has no pip, for the reason above; remove the folder .venv and start again"
}

install() {  # requirement file
    local file=$1 stamp=".venv/installed-${1##*/}" wanted=.venv/wanted.txt sum
    [ -f "$file" ] || die 2 "$file: no such requirement file in $PWD"
    sum=$(cksum < "$file")
    [ "$(cat "$stamp" 2> /dev/null || true)" != "$sum" ] || return 0
    say "installing $file"
    cp -- "$file" "$wanted"
    if "$python" -m pip show --quiet paddlepaddle-gpu 2> /dev/null; then
        echo "paddlepaddle-gpu is there and stays"
        grep -vE '^paddlepaddle([^-a-z]|$)' "$file" > "$wanted" || true
    fi
    "$python" -m pip install --disable-pip-version-check -r "$wanted" ||
        die 1 "pip could not install $file, for the reason above"
    printf '%s\n' "$sum" > "$stamp"
}

stage() {  # name, result, what it is made from, command...: runs unless the result is the newer one
    local name=$1 result=$2 source=$3 started=$SECONDS
    shift 3
    if [ "$result" -nt "$source" ]; then
        times="$times$(printf '%-10s reused' "$name")"$'\n'
        return
    fi
    say "$name"
    "$@" || die "$?" "stage '$name' failed, for the reason above"
    times="$times$(printf '%-10s %4d s' "$name" $((SECONDS - started)))"$'\n'
}

train() {
    "$python" train.py -cfg "$CONFIG" -cat bottle --data lite_data --exp_dir quickstart \
        --epochs "$EPOCHS" --resume && touch "$run/trained"
}

forget_other_recipe() {  # results that another configuration or other pictures led to
    local recipe
    recipe="$EPOCHS epochs, $(cat "$CONFIG" pretrained/*.json lite_data/bottle/train/*/*.png | cksum)"
    [ "$(cat "$run/recipe" 2> /dev/null || true)" != "$recipe" ] || return 0
    rm -rf "$run"
    mkdir -p "$run"
    printf '%s\n' "$recipe" > "$run/recipe"
}

summary() {
    "$python" - "$run" << 'PYTHON'
import json
import sys
from pathlib import Path

from utils.report import console_table
from utils.runs import read_rows

run = Path(sys.argv[1])


def results(folder):
    lines = (run / folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {Path(line["path"]).name: line for line in map(json.loads, lines)}


print(console_table(read_rows([str(run / "results.json")])))
dynamic, exported = results("predictions"), results("inference_predictions")
print("\nscore of one image   dynamic model   exported model")
for name in exported:
    print(f"{name:20} {dynamic[name]['score']:14.6f} {exported[name]['score']:16.6f}")
print("\npictures, left the image, right the map:")
for line in dynamic.values():
    print(f"  {run / 'predictions' / line['picture']}  ({line['verdict']}, {line['score']:.3f})")
PYTHON
}

if [ "${1:-}" = --install ]; then
    shift
    make_venv
    for file in requirements.txt ${1+"$@"}; do install "$file"; done
    exit 0
fi
[ $# -eq 0 ] || die 2 "unknown argument '$1'; usage: bash quickstart.sh [--install [FILE...]]"

run=results/quickstart/bottle
last=$run/last/meta.json
times=""
SECONDS=0
make_venv
install requirements.txt
times="$(printf '%-10s %4d s' install "$SECONDS")"$'\n'
forget_other_recipe
stage train "$run/trained" "$run/recipe" train
stage evaluate "$run/results.json" "$last" \
    "$python" eval.py -cat bottle --exp_dir quickstart
stage predict "$run/predictions/results.jsonl" "$last" \
    "$python" predict.py --image_path 'images/bottle_*.png' -cat bottle --exp_dir quickstart
stage export "$run/inference/inference.yml" "$last" \
    "$python" deploy/export_model.py -cat bottle --exp_dir quickstart \
    --save_inference_dir "$run/inference"
stage infer "$run/inference_predictions/results.jsonl" "$run/inference/inference.yml" \
    "$python" deploy/infer.py --image_path images/bottle_bad.png \
    --save_inference_dir "$run/inference" --output "$run/inference_predictions"
say summary
summary || die "$?" "no summary, for the reason above"
printf '\n%s%-10s %4d s\n' "$times" altogether "$SECONDS"

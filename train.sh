#!/bin/sh
# Trains all 15 categories of MVTec AD, one or several at a time, then evaluates them together.
# usage: sh train.sh [--jobs N] [--gpus 0,1] [argument of train.py...]
#   for example: sh train.sh -cfg configs/fastflow_efficientnet_lite0.yaml --data /disk/mvtec
#   --jobs N     so many categories at a time
#   --gpus 0,1   on these GPUs in turn; without --jobs one category at a time on each
# After an interruption the same line with --resume goes on. categories="cap lid" names other ones.
dir_name="${dir_name:-exp}" # results/$dir_name/<category>
python="${python:-}"        # empty: the one in .venv, else python3
categories="${categories:-toothbrush screw hazelnut transistor tile pill bottle cable capsule carpet \
grid leather metal_nut wood zipper}"

cd -- "$(dirname -- "$0")" || exit 1
if [ -z "$python" ]; then
    python=python3
    for found in .venv/bin/python .venv/Scripts/python.exe; do
        [ ! -x "$found" ] || python=$found
    done
fi

fail() {
    echo "error: $1" >&2
    exit 2
}

jobs="" gpus="" left=$#
while [ "$left" -gt 0 ]; do
    case "$1" in
        --jobs | --gpus)
            [ "$left" -gt 1 ] || fail "$1: a value is missing"
            [ "$1" = --jobs ] && jobs=$2 || gpus=$2
            shift 2
            left=$((left - 2))
            ;;
        *)
            set -- "$@" "$1" # to the end: what train.py gets
            shift
            left=$((left - 1))
            ;;
    esac
done
case "$gpus" in *[!0-9,]*) fail "--gpus $gpus: must be numbers, like 0,1" ;; esac
gpus=$(echo "$gpus" | tr , ' ')
gpu_count=$(echo "$gpus" | wc -w)
[ -n "$jobs" ] || jobs=$((gpu_count > 1 ? gpu_count : 1))
case "$jobs" in "" | 0 | *[!0-9]*) fail "--jobs $jobs: must be a whole number from 1" ;; esac
[ "$jobs" -eq 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # cores are for the jobs

work=$(mktemp -d) || exit 1
trap 'rm -rf -- "$work"' EXIT

device_of() { # number of the worker
    [ "$gpu_count" -gt 0 ] || return 0
    # shellcheck disable=SC2086
    set -- "$1" $gpus
    shift $(($1 % gpu_count + 1))
    echo "gpu:$1"
}

train_some() { # number of the worker, arguments; takes one category after the other
    device=$(device_of "$1")
    shift
    for category in $categories; do
        mkdir "$work/$category" 2> /dev/null || continue # another worker has it
        echo "== $category${device:+ on $device}"
        "$python" train.py --exp_dir "$dir_name" ${device:+--device "$device"} "$@" \
            --category "$category" &
        child=$!
        trap 'kill "$child" 2> /dev/null; wait "$child"; exit 130' INT TERM
        wait "$child"
        code=$?
        [ "$code" -ne 130 ] || exit 130 # stopped by the user
        [ "$code" -eq 0 ] || echo "$category" >> "$work/failed"
    done
}

workers="" number=0
trap 'kill $workers 2> /dev/null; wait; exit 130' INT TERM
while [ "$number" -lt "$jobs" ]; do
    train_some "$number" "$@" &
    workers="$workers $!"
    number=$((number + 1))
done
for worker in $workers; do
    wait "$worker"
    [ $? -ne 130 ] || exit 130
done

echo "== evaluation"
"$python" eval.py --exp_dir "$dir_name" --category all
code=$?
failed=$(tr '\n' ' ' 2> /dev/null < "$work/failed")
[ -z "$failed" ] || echo "error: training failed, for the reasons above: ${failed% }" >&2
[ -z "$failed" ] && [ "$code" -eq 0 ]

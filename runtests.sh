#!/usr/bin/env bash
# Runs every check: ruff, mypy, and the test suite, in the .venv of quickstart.sh.
# usage: bash runtests.sh [argument of pytest...]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

bash quickstart.sh --install requirements-dev.txt requirements-onnx.txt requirements-openvino.txt \
    requirements-service.txt requirements-gradio.txt requirements-tensorboard.txt
bash quickstart.sh --install requirements-torch.txt > .venv/torch.log 2>&1 ||
    echo "PyTorch's CPU build is not to be had here (see .venv/torch.log): tests use the stored files"
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe

check() {
    printf '\n== %s\n' "$*"
    "$python" -m "$@"
}

check ruff check .
check ruff format --check .
check mypy
check pytest -q -n 2 --dist loadfile --no-loadscope-reorder ${1+"$@"}

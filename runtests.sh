#!/usr/bin/env bash
# Runs every check: ruff, mypy, and the test suite, in the .venv of quickstart.sh.
# usage: bash runtests.sh [argument of pytest...]
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

bash quickstart.sh --install requirements-dev.txt
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe

check() {
    printf '\n== %s\n' "$*"
    "$python" -m "$@"
}

check ruff check .
check ruff format --check .
check mypy
check pytest -q ${1+"$@"}

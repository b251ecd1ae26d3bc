#!/usr/bin/env bash
# Make the environment of the competitors that need PyTorch, on its CPU build; prints its Python for --peers.
# Usage: bash benchmarks/setup_peers.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-peers}
"${PYTHON:-python3}" -m venv "$folder"
python=$folder/bin/python
"$python" -m pip install --quiet -r requirements-torch.txt
# without dependencies: several of them name packages that pull a CUDA build of PyTorch
"$python" -m pip install --quiet --no-deps -r benchmarks/peers/requirements.txt
"$python" -c 'import benchmarks.peers.operators, anomalib.models' 2> /dev/null
echo "$python"

#!/usr/bin/env bash
# Runs commands on a GPU that computes nothing: what the host does for a GPU, where there is none.
# Needs gcc and binutils, and brings 3 GB of torch for CUDA into .venv-null-gpu (about 10 minutes, once).
# With arguments only some, as pytest takes them: bash tests/null_gpu/run.sh -k fsdp
set -euo pipefail
cd "$(dirname "$0")/../.."
TORCH=2.14.1 # a version whose wheel is for CUDA
python=.venv-null-gpu/bin/python
if [[ ! -e .venv-null-gpu/ready ]]; then
  "${PYTHON:-python3}" -m venv .venv-null-gpu
  grep -v "^torch==" tests/constraints.txt >.venv-null-gpu/constraints.txt
  $python -m pip install --quiet --no-compile "torch==$TORCH" "nvidia-cuda-crt<13.1"
  $python -m pip install --quiet --no-compile --constraint .venv-null-gpu/constraints.txt \
    "torch==$TORCH" --editable ".[test]"
  touch .venv-null-gpu/ready
fi
export OMP_NUM_THREADS=1 TESSERA_NULL_GPU=$PWD/.venv-null-gpu/null_gpu
$python -m tests.null_gpu.build "$TESSERA_NULL_GPU"
exec $python -m pytest -m slow tests/null_gpu "$@"

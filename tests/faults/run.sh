#!/usr/bin/env bash
# Runs every fault test, the slow ones too, and writes the figures into docs/reliability.md.
# With arguments only some, as pytest takes them: bash tests/faults/run.sh -k soak
# The figures stay in $TESSERA_FIGURES (default runs/figures.jsonl) as JSON lines; the newest count.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/setup.sh
set_up "[test,dev]"
source tests/system_packages.sh
install_system_packages
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
export TESSERA_FIGURES=${TESSERA_FIGURES:-$PWD/runs/figures.jsonl}
mkdir -p "$(dirname "$TESSERA_FIGURES")"
code=0
# Beside tests/faults: what belongs to the data, exactly once and without leaks, and to checkpoints.
pytest -m "slow or not slow" "$@" tests/faults tests/trainer/test_elastic.py \
  tests/trainer/test_document_leakage.py tests/trainer/test_vision_leakage.py \
  tests/trainer/test_checkpoints.py || code=$?
python -m tests.faults.figures "$TESSERA_FIGURES"
exit $code

#!/usr/bin/env bash
# Sets up everything on a fresh machine and passes the checks: format, lint, types, import rules, tests.
# Two or more processes share the tests. With arguments it is one, which gets them: bash tests/run.sh -k head
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
set_up "[test,dev]"
source tests/system_packages.sh
install_system_packages
PATH=$PWD/.venv/bin:$PATH
# Tests start hundreds of processes: each on one core, and none should compile the sources anew.
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
ruff format --check --quiet .
ruff check --quiet .
mypy
lint-imports
(($# == 0)) || exec pytest "$@"

scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$scratch"' EXIT
mkdir "$scratch/taken"
cores=$(nproc)
others=() code=0
for number in $(seq 2 $((cores < 2 ? 2 : cores > 4 ? 4 : cores))); do
  pytest --share="$scratch/taken" >"$scratch/$number" 2>&1 &
  others+=($!)
done
pytest --share="$scratch/taken" || code=$?
for index in "${!others[@]}"; do
  wait "${others[index]}" || code=$?
  cat "$scratch/$((index + 2))"
done
# Tests of a GPU in a process of their own: the others do not see it.
if command -v nvidia-smi >/dev/null; then pytest tests/gpu || code=$?; fi
exit $code

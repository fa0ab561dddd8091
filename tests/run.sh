#!/usr/bin/env bash
# Sets up everything on a fresh machine and passes the checks: format, lint, types, import rules, tests.
# Arguments go to pytest: bash tests/run.sh -k head
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
set_up "[test,dev]"
PATH=$PWD/.venv/bin:$PATH
ruff format --check --quiet .
ruff check --quiet .
mypy
lint-imports
exec pytest "$@"

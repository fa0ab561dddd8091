#!/usr/bin/env bash
# Sets up everything on a fresh machine and runs the demo: bash launch/demo.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
set_up ""
.venv/bin/tessera train experiment=demo "$@"
echo "  (the tessera command is on your path after: source .venv/bin/activate)"

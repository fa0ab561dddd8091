#!/usr/bin/env bash
# Installs a real Slurm where it may (Debian, as root) and runs the tests on clusters of this machine, about ten minutes.
# With arguments only some, as pytest takes them: bash tests/cluster/run.sh -k limit
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/setup.sh
set_up "[test,dev]"
missing=()
for package in slurm-wlm munge iproute2; do
  dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done
if ((${#missing[@]})); then
  [[ $(id -u) == 0 ]] || { echo "tests/cluster: apt-get install ${missing[*]}, and run this as root" >&2; exit 1; }
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "${missing[@]}" >/dev/null
fi
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
exec pytest -m "slow or not slow" "$@" tests/cluster

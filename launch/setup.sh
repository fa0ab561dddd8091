# Sourced by launch/demo.sh and tests/run.sh: makes .venv with Tessera in it, once.
#   set_up EXTRAS      EXTRAS: "" or "[test,dev]"
# PYTHON names the interpreter (3.11 or newer; default python3).

set_up() {
  local extras=$1 versions stamp
  versions=$(cat pyproject.toml tests/constraints.txt | cksum | cut -d' ' -f1)
  stamp=.venv/.tessera-$versions-${extras//[^a-z]/-}
  compgen -G "$stamp*" >/dev/null && return  # without extras, any set-up of these versions will do
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "set-up: $("${PYTHON:-python3}" --version) is too old; install Python 3.11 or newer, or set PYTHON" >&2
    exit 64
  }
  echo "set-up: installing into .venv (about 2 minutes, once)"
  [[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv .venv
  # torch first, at the tested version: a range could bring gigabytes of another build.
  .venv/bin/pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0
  .venv/bin/pip install --quiet --disable-pip-version-check --no-compile --constraint tests/constraints.txt --editable ".$extras"
  # pip compiles on one core. A few packages ship templates that are no Python: no error.
  .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null || true
  touch "$stamp"
}

# Sourced by tests/run.sh and tests/faults/run.sh: installs what .ci/apt.txt lists, where that may be done.
# Elsewhere, and without the internet, the tests that need a package are skipped, and say so; in CI they fail.

install_system_packages() {
  local package missing=()
  command -v dpkg >/dev/null || return 0
  while read -r package; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
  done < <(grep -v '^#' .ci/apt.txt)
  ((${#missing[@]})) || return 0
  if [[ $(id -u) != 0 ]] || ! { apt-get -qq update && apt-get -qq -y install --no-install-recommends "${missing[@]}"; } >/dev/null; then
    echo "tests: not installed: ${missing[*]} (apt-get install them as root); tests that need them are skipped" >&2
  fi
}

#!/usr/bin/env bash
# Usage: make-venv.sh VENV PYTHON FARM_PY
# Makes VENV with the packages that FARM_PY names in its PEP 723 header, when it is not there or
# names others now.
# Exit: 0 ok, 1 the packages cannot be had, 2 usage, 6 a tool is missing or too old
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done

main() {
  local venv python farm wanted
  [ $# -eq 3 ] || { sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 2; }
  venv=$1 python=$2 farm=$3
  wanted=$(sed -n 's/^# dependencies = \[\(.*\)\]$/\1/p' "$farm" | tr -d '",')
  if [ "$(cat "$venv/ready" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  if [ -e "$(dirname "$0")/check-tools.sh" ]; then
    FARM_PYTHON=$python bash "$(dirname "$0")/check-tools.sh"
  fi
  if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    printf 'farm: %s cannot make virtual environments: its venv package is missing\n' "$python" >&2
    printf '  try: %s\n' >&2 \
      'apt install python3-venv   or: dnf install python3   or: brew install python3'
    exit 6
  fi
  printf 'making %s with %s\n' "$venv" "$wanted"
  "$python" -m venv "$venv"
  printf '*\n' >"$venv/.gitignore"
  # shellcheck disable=SC2086  # one word a package
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $wanted || {
    printf 'farm: pip could not install %s\n  try: %s -m pip install %s\n' "$wanted" \
      "$venv/bin/python" "$wanted" >&2
    exit 1
  }
  printf '%s' "$wanted" >"$venv/ready"
}

main "$@"

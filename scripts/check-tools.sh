#!/usr/bin/env bash
# Usage: check-tools.sh [TOOL...]
# Checks the programs that the farm needs (default: git tmux make python3): there, and new enough.
# Silent when all is well. FARM_PYTHON names another python3.
# Exit: 0 ok, 2 usage, 6 a tool is missing or too old; stderr says which, the version found and
#   needed, and how to install it
set -euo pipefail
# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is not this script's.
ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done
export LC_ALL=C

install_line() {
  local apt=$1 dnf=$2 brew=$3
  printf '  try: apt install %s   or: dnf install %s   or: brew install %s\n' "$apt" "$dnf" \
    "$brew" >&2
}

install_hint() {
  case $1 in
    python3) install_line "python3 python3-venv" python3 python@3.12 ;;
    slurm) install_line slurm-client slurm slurm ;;
    ssh) install_line openssh-client openssh-clients openssh ;;
    *) install_line "$1" "$1" "$1" ;;
  esac
}

# Sets needed, and words: what the tool says of itself. No forks but the tool's own: this runs at
# each `up`.
ask() {
  words=
  case $1 in
    git) needed=2.30 words=$(git --version 2>/dev/null) ;;
    tmux) needed=3.0 words=$(tmux -V 2>/dev/null) ;;
    python3) needed=3.10 words=$("$2" --version 2>&1) ;;
    make) needed=3.81 words=$(make --version 2>/dev/null) ;;
    bash) needed=3.2 words=$(bash --version 2>/dev/null) ;;
    *) needed=0.0 ;;
  esac || words=
}

# Sets found to the first version number in words: "git version 2.39.5" -> 2.39, "tmux 3.3a" -> 3.3
find_version() {
  found=
  if [[ $words =~ ([0-9]+)\.([0-9]+) ]]; then found=${BASH_REMATCH[1]}.${BASH_REMATCH[2]}; fi
}

is_at_least() {
  local have_major=${1%%.*} have_minor=${1#*.} need_major=${2%%.*} need_minor=${2#*.}
  [ "$have_major" -gt "$need_major" ] ||
    { [ "$have_major" -eq "$need_major" ] && [ "$have_minor" -ge "$need_minor" ]; }
}

check() {
  local tool=$1 program=$1 needed words found
  case $tool in
    python3) program=${FARM_PYTHON:-python3} ;;
    slurm) program=sbatch ;;
  esac
  ask "$tool" "$program"
  if ! command -v "$program" >/dev/null 2>&1; then
    printf 'farm: %s is not installed; %s or newer is needed\n' "$tool" "$needed" >&2
    install_hint "$tool"
    return 6
  fi
  find_version
  if [ -n "$found" ] && ! is_at_least "$found" "$needed"; then
    printf 'farm: %s %s is too old; %s or newer is needed\n' "$tool" "$found" "$needed" >&2
    install_hint "$tool"
    return 6
  fi
}

main() {
  local tool status=0
  [ "${1:-}" != -h ] || { sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0; }
  [ $# -gt 0 ] || set -- git tmux make python3
  for tool in "$@"; do check "$tool" || status=$?; done
  exit "$status"
}

main "$@"

#!/usr/bin/env bash
# Usage: place.sh up -j JOB -u HUB:REPO [-o OPTIONS] [-p PYTHON] <LINES   put hosts where they lack
#        place.sh end -j JOB [-w SECONDS] [-p PYTHON] <LINES      end them, after SECONDS at most
# LINES: HOST<TAB>ENGINE<TAB>AGENTS; ENGINE is slurm (HOST is then s1, s2 ...) or ssh:BOX. What runs
# is found by JOB, the same for all hosts of a farm: nothing is kept here. HUB is how hosts reach
# this machine (empty: user@hostname), OPTIONS are sbatch's; PYTHON is taken where a host has it.
# A host gets start-spoke.sh with the toolkit in it, so it needs no folder of this machine.
# Prints: HOST<TAB>what its engine says; after `end` that is `ended`, or why not
# Exit: 0 ok, 1 the toolkit cannot be packed, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"

# One file with all that a host needs.
pack() { # HUB:REPO PYTHON
  local toolkit digest
  toolkit=$(cd "$here/../.." && COPYFILE_DISABLE=1 tar -cf - --exclude __pycache__ farm.py scripts |
    gzip -n | base64)
  digest=$(cksum <<<"$toolkit")
  printf '%s\n' '#!/usr/bin/env bash'
  printf '%s=%q\n' job "$job" hub "$1" python "$2" digest "$digest"
  cat "$here/start-spoke.sh"
  printf '%s\n' '# the toolkit' "$toolkit"
}

main() {
  local verb=${1-} job='' hub='' python=python3 options='' seconds=0 option lines folder
  if [ "$verb" = -h ]; then usage; exit 0; fi
  shift || true
  while getopts ':j:u:o:p:w:' option; do
    case $option in
      j) job=$OPTARG ;; u) hub=$OPTARG ;; o) options=$OPTARG ;; p) python=$OPTARG ;;
      w) seconds=${OPTARG%.*} ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "place.sh -h" ;;
    esac
  done
  case $verb:$job in
    up:?* | end:?*) ;;
    *) die 2 "up or end, and which job?" "place.sh -h" ;;
  esac
  case $hub in :*) hub=$(id -un)@$(hostname)$hub ;; esac
  lines=$(cat)
  [ -n "$lines" ] || return 0
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder as it is called now
  trap "rm -rf '$folder'" EXIT
  pack "$hub" "$python" >"$folder/spoke"
  awk -F '\t' '$2 == "slurm"' <<<"$lines" >"$folder/slurm"
  awk -F '\t' '$2 ~ /^ssh:/' <<<"$lines" >"$folder/ssh"
  if [ -s "$folder/ssh" ]; then
    bash "$here/place-ssh.sh" "$verb" "$job" "$folder/spoke" "$seconds" <"$folder/ssh" &
  fi
  if [ -s "$folder/slurm" ]; then
    bash "$here/place-slurm.sh" "$verb" "$job" "$folder/spoke" "$seconds" "$options" \
      <"$folder/slurm"
  fi
  wait
}

main "$@"

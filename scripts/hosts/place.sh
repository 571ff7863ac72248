#!/usr/bin/env bash
# Usage: place.sh up -j JOB -u HUB -r REPO [-o OPTIONS] <LINES    put hosts where they do not run
#        place.sh end -j JOB [-w SECONDS] <LINES                  end them, after SECONDS at most
# LINES: HOST<TAB>ENGINE<TAB>AGENTS; ENGINE is slurm (HOST is then s1, s2 ...) or ssh:BOX. What runs
# is found by JOB, the same for all hosts of a farm: nothing is kept here. HUB is how hosts reach
# this machine (default: user@hostname), OPTIONS are sbatch's.
# A host gets start-spoke.sh with the toolkit in it, so it needs no folder of this machine.
# Prints: HOST<TAB>what its engine says; after `end` that is `ended`, or why not
# Exit: 0 ok, 1 the toolkit cannot be packed, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"

# One file with all that a host needs.
pack() { # HUB
  local toolkit digest
  toolkit=$(cd "$here/../.." && COPYFILE_DISABLE=1 tar -cf - --exclude __pycache__ farm.py scripts |
    gzip -n | base64)
  digest=$(cksum <<<"$toolkit")
  printf '%s\n' '#!/usr/bin/env bash'
  printf '%s=%q\n' job "$job" hub "$1" python "${FARM_PYTHON:-python3}" digest "$digest"
  cat "$here/start-spoke.sh"
  printf '%s\n' '# the toolkit' "$toolkit"
}

main() {
  local verb=${1-} job='' hub='' repo='' options='' seconds=0 option lines folder
  if [ "$verb" = -h ]; then usage; exit 0; fi
  shift || true
  while getopts ':j:u:r:o:w:' option; do
    case $option in
      j) job=$OPTARG ;; u) hub=$OPTARG ;; r) repo=$OPTARG ;; o) options=$OPTARG ;;
      w) seconds=${OPTARG%.*} ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "place.sh -h" ;;
    esac
  done
  case $verb:$job in
    up:?* | end:?*) ;;
    *) die 2 "up or end, and which job?" "place.sh -h" ;;
  esac
  hub=${hub:-$(id -un)@$(hostname)}
  lines=$(cat)
  [ -n "$lines" ] || return 0
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder as it is called now
  trap "rm -rf '$folder'" EXIT
  pack "$hub:$repo" >"$folder/spoke"
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

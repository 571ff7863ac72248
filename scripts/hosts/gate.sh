#!/usr/bin/env bash
# Usage: gate.sh WHERE COMMIT COMMAND     in a gate's slot, with its environment (FARM_SLOT, TMPDIR)
#        gate.sh check WHERE              what would keep gates from running there
# Runs the gate COMMAND on COMMIT on another machine. WHERE is `ssh:HOST`, or `slurm[:URL] [OPTION
# of srun ...]`. The commit goes by a ref of the slot's own: pushed to HOST, fetched by a node of
# Slurm from URL, by default the repo's path, where nodes see that. Clone and caches lie in
# ~/.cache/farm-gates there; gates run without LFS and submodules. With FARM_ISOLATE=bwrap they run
# by isolate.sh, which goes along; another prefix cannot.
# Only the exit code that the gate's own shell there has told is a verdict, behind a word that
# the gate cannot know; all else is none. What an earlier run of this slot has left in Slurm is
# canceled first, and when this script ends in whatever way.
# Prints: the gate's output; in TMPDIR/note who has judged, or why nobody has.
#   check: what<TAB>the command that mends it
# Exit: the gate's, 137 when there is no verdict, 2 usage
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/../merge/common.sh"
export GIT_TERMINAL_PROMPT=0 LC_ALL=C
options='-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3'

quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

# Nothing of this may be met by what ends the slot's processes: it is what ends the rest.
guard() { # READS till this script is gone, then cancels
  cd / && unset FARM_SLOT TMPDIR
  cat >/dev/null
  scancel --quiet --name "$job" --user "$(id -un)"
}

no_verdict() { # WHY
  printf '%s\n' "$1" >"$TMPDIR/note"
  exit 137
}

# The word first, then what comes; the verdict's line goes to a file and is no output.
read_verdict() {
  awk -v file="$TMPDIR/verdict" 'NR == 1 { word = $1; next }
    index($0, "farm-gate-exit " word " ") == 1 { print substr($0, 17 + length(word)) > file; next }
    { print; fflush() }'
}

# The line of a command that a login shell takes: ours, by bash, with its arguments.
make_line() {
  local line='exec bash -c' word
  for word in "$(cat "$here/gate-here.sh")" farm-gate "$@" "${box[@]}"; do
    line+=" $(quote "$word")"
  done
  printf '%s' "$line"
}

by_ssh() { # HOST
  local store=.cache/farm-gates/$id.git take
  # shellcheck disable=SC2016  # it is for the shell there
  take='f() { [ -d "$1" ] || git init -q --bare "$1"; git-receive-pack "$1"; }; f'
  GIT_SSH_COMMAND="${GIT_SSH_COMMAND:-ssh} $options" GIT_SSH_VARIANT=ssh \
    quiet_git "$FARM_SLOT" push -q --no-verify --receive-pack="$take" "$1:$store" \
    "+$commit:$ref" </dev/null || no_verdict "$commit did not come to $1"
  # when ssh is killed, gate-here.sh sees that its input is over
  # shellcheck disable=SC2317  # judge calls it
  run_there() { eval "${GIT_SSH_COMMAND:-ssh} $options \"\$1\" \"\$2\""; }
  judge run_there "$1" "$(make_line "$store" "$ref" "$commit" "$slot" "$command")"
}

by_slurm() { # [URL] [OPTION ...]
  local hub=${1%%[ ]*} options=''
  case $1 in *' '*) options=${1#* } ;; esac
  hub=${hub:-$common}
  scancel --quiet --name "$job" --user "$(id -un)" || no_verdict "scancel failed: does Slurm run?"
  rm -f "$TMPDIR/guard" && mkfifo "$TMPDIR/guard"
  set -m
  guard <"$TMPDIR/guard" >/dev/null 2>&1 &
  set +m
  exec 9>"$TMPDIR/guard"
  git -C "$FARM_SLOT" update-ref "$ref" "$commit"
  # shellcheck disable=SC2086  # options of srun, several words
  judge srun --quiet --job-name "$job" --ntasks 1 --kill-on-bad-exit $options \
    bash -c "$(cat "$here/gate-here.sh")" farm-gate "$hub" "$ref" "$commit" "$slot" "$command" \
    "${box[@]}"
}

judge() { # COMMAND that runs gate-here.sh there; its input stays open until the end
  local code host word
  word=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  rm -f "$TMPDIR/verdict" "$TMPDIR/input" && mkfifo "$TMPDIR/input"
  exec 8<>"$TMPDIR/input"
  printf '%s\n' "$word" >&8
  { printf '%s\n' "$word"; "$@" <&8 8>&- 2>&1 || :; } 9>&- | read_verdict 8>&- 9>&-
  read -r code host 2>/dev/null <"$TMPDIR/verdict" ||
    no_verdict "the other machine has told no exit code"
  case $code in
    137 | 143) no_verdict "the gate was killed on $host (exit code $code)" ;;
    changed) no_verdict "the gate changed tracked files: $host" ;;
    no-sandbox) no_verdict "there can be no sandbox (FARM_ISOLATE) $host: apt install bubblewrap" ;;
    *[!0-9]*) no_verdict "no exit code: $code $host" ;;
  esac
  printf 'on %s\n' "$host" >"$TMPDIR/note"
  exit "$code"
}

check() {
  case $1 in
    ssh:*)
      eval "${GIT_SSH_COMMAND:-ssh} $options \"\${1#ssh:}\" 'git --version && bash --version'" \
        </dev/null >/dev/null 2>&1 ||
        printf '%s\t%s\n' "${1#ssh:} cannot be reached without a question, or lacks git or bash" \
          "ssh -o BatchMode=yes ${1#ssh:} git --version"
      ;;
    slurm*)
      sinfo -h >/dev/null 2>&1 || { printf 'sinfo fails: no Slurm here\tsinfo\n'; return; }
      if scontrol show config 2>/dev/null | grep -q '^SchedulerParameters.*\bdefer\b'; then
        printf '%s\t%s\n' "Slurm has SchedulerParameters=defer: each gate waits some 3 s for it" \
          "scontrol show config | grep SchedulerParameters"
      fi
      ;;
    *) printf '%s\t%s\n' "FARM_GATE_ON=$1 is neither here, slurm nor ssh:HOST" FARM_GATE_ON=slurm ;;
  esac
}

main() {
  local where=${1-} commit=${2-} command=${3-} slot id job ref box=('' '' '')
  case $where:$# in
    -h:1) usage; exit 0 ;;
    check:2) check "$2"; exit 0 ;;
    slurm*:3 | ssh:?*:3) ;;
    *) die 2 "where, which commit, which command?" "gate.sh -h" ;;
  esac
  case ${FARM_ISOLATE:-none} in
    none) ;;
    bwrap)
      box=("$(<"$here/../isolate.sh")" "${FARM_GATE_NETWORK-}" "$(<"$here/../sandbox/caches")") ;;
    *) no_verdict "gates on other machines run in no sandbox but bwrap (FARM_ISOLATE)" ;;
  esac
  open_repo "$FARM_SLOT"
  slot=${FARM_SLOT##*/} id=$(printf %s "$common" | git hash-object --stdin)
  id=${id:0:12} ref=refs/farm/gate/$slot job=farm-$id-$slot
  case $where in
    ssh:*) by_ssh "${where#ssh:}" ;;
    *) where=${where#slurm} && by_slurm "${where#:}" ;;
  esac
}

main "$@"

#!/usr/bin/env bash
# Usage: confine.sh agent|tree|setup|gate|slot REPO FOLDER COMMAND [ARGUMENT]...
# Runs COMMAND as FARM_ISOLATE says: none (or empty): just so; bwrap: by isolate.sh; else that is a
# command prefix, in which {worktree} {git} {refs} {mailbox} {home} stand for paths. FOLDER is a
# worktree or a gate's slot; beside it are all the others, which are hidden, as is REPO.
# agent: an agent's command: its worktree, refs/heads/farm/AGENT/, mailbox, the state of its CLI
#   (FARM_CLI_STATE, below HOME) and its TMPDIR can be written
# tree: the farm's own git on what an agent has left: the same with refs of rescued work, without
#   the mailbox and state; REPO can be read. A prefix is not used for it.
# setup: .farm/setup, as an agent without a mailbox
# gate: its slot, and a TMPDIR; nothing of git
# slot: the farm's own git in a gate's slot: the same, and git's entry for it. Also no prefix.
# Also read: FARM_SHOW and FARM_HIDE (paths, separated by colons; +PATH can be written), FARM_PASS
# (names), FARM_NETWORK and FARM_GATE_NETWORK (full, none), FARM_HOME, FARM_PYTHON,
# and what enter-scope.sh reads.
# Above it: isolate.sh
# Exit: COMMAND's own, 2 usage, 6 there can be no sandbox here
set -uo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/show-programs.sh"
. "$here/enter-scope.sh"

add_names() { # NAMES
  local name && set -f
  for name in ${1//,/ }; do box+=(-e "$name"); done
  set +f
}

# Each agent has a folder of its own in the place of these, where they are.
add_caches() {
  local name place # most programs want a ~/.cache, and HOME cannot be written
  [ -d "$HOME/.cache" ] || mkdir -p "$HOME/.cache"
  while IFS= read -r name; do
    [ -d "$HOME/$name" ] || continue
    [ -d "$private/caches/$name" ] || mkdir -p "$private/caches/$name" || return 1
    lead "$HOME/$name"
    box+=(-o "$place=$private/caches/$name")
  done <"$here/caches"
}

run_by_bwrap() {
  local box=(-x "$repo" -x "${folder%/*}" -t "$TMPDIR") private=${folder%/*}/private/$agent
  local mailbox=$repo/coordination/mailbox/$agent network=${FARM_NETWORK-} name follows=yes
  { [ -d "$private" ] && [ -d "$TMPDIR" ]; } || mkdir -p "$private" "$TMPDIR" || return 1
  # what an agent may write, it may have linked
  case ${FARM_AGENT_HOME:++}${FARM_SHOW-} in *+*) follows='' ;; esac
  case $kind in
    gate) network=${FARM_GATE_NETWORK-} ;;
    slot) box+=(-g "$folder" -s "$private" -d) ;;
    *) box+=(-g "$folder" -s "$private" -b "heads/farm/$agent") ;;
  esac
  case $kind in tree | setup) box+=(-d) ;; esac # not a process of the farm's own to signal
  add_list -x "${FARM_HIDE-}"
  add_toolkit "$@"
  case $kind in
    gate)
      IFS= read -r name <"$folder/.git" && name=${name#gitdir: } name=${name%/worktrees/*}
      [ -d "$private/farm" ] || mkdir -p "$private/worktrees" "$private/farm" || return 1
      box+=(-r "$name" -w "$folder" -r "$folder/.git" -o "$name/worktrees=$private/worktrees")
      [ ! -d "$name/farm" ] || box+=(-o "$name/farm=$private/farm")
      IFS= read -r name <"$folder/.git" && box+=(-r "${name#gitdir: }") ;;
    setup) add_list -r "$repo/.farm" ;;
    agent)
      box+=(-w "$mailbox" -r "$mailbox/pid")
      for name in "${FARM_PROMPT_FILE-}" "${FARM_CLI_SETTINGS-}"; do
        [ ! -e "$name" ] || box+=(-r "$name")
      done
      add_names "${FARM_CLI_PASS-}"
      add_list -w "${FARM_CLI_STATE-}" ;;
    tree)
      [ -d "${folder%/*}/kept/$agent" ] || mkdir -p "${folder%/*}/kept/$agent" || return 1
      box+=(-r "$repo" -w "${folder%/*}/kept/$agent" -b "farm/rescue/$agent" -b farm/returned) ;;
  esac
  case $kind:${FARM_AGENT_HOME-} in gate:* | slot:* | *:) ;; *) box+=(-w "$HOME") ;; esac
  case $kind in
    tree | slot)
      IFS= read -r name <"$folder/.git" && name=${name#gitdir: }
      set -- bash "$here/settle-git.sh" "$folder" "$name" "$agent" "$@" ;;
    *) add_caches ;;
  esac
  add_names "${FARM_PASS-}"
  add_list -r "${FARM_SHOW-}"
  [ "$network" != none ] || box+=(-n)
  # counted in the sandbox alone; as root it is not, and the loop looks
  if [ "$kind" = agent ] && [ "${FARM_AGENT_PROCESSES:-0}" -gt 0 ]; then
    set -- bash -c "ulimit -u $FARM_AGENT_PROCESSES; exec \"\$@\"" bash "$@"
  fi
  unset FARM_ISOLATE FARM_SHOW FARM_HIDE FARM_PASS FARM_NETWORK FARM_GATE_NETWORK
  . "$here/../isolate.sh" "${box[@]}" -- "$@" # which ends in an exec; another bash costs time
}

run_by_prefix() {
  local prefix=$FARM_ISOLATE git name value
  git=$(git -C "$repo" rev-parse --path-format=absolute --git-common-dir) || return 1
  for name in worktree="$folder" git="$git" refs="$git/refs/heads/farm/$agent" home="$HOME" \
    mailbox="$repo/coordination/mailbox/$agent"; do
    printf -v value %q "${name#*=}"
    prefix=${prefix//"{${name%%=*}}"/$value}
  done
  exec bash -c "exec $prefix \"\$@\"" bash "$@"
}

main() {
  local kind=${1-} repo=${2-} folder=${3-} agent name
  if [ "$kind" = -h ]; then sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0; fi
  case $kind in agent | tree | setup | gate | slot) [ $# -ge 4 ] || exit 2 ;; *) exit 2 ;; esac
  case ${FARM_ISOLATE:-none} in none) ;; *) enter_scope "$@" ;; esac
  shift 3
  agent=${folder##*/} agent=${agent%-worktree}
  unset FARM_IN_SCOPE FARM_NOTIFY # it may hold a token, and is none of theirs
  case $kind:${FARM_ISOLATE:-none} in
    *:bwrap)
      # /home may be a link, and bwrap puts nothing in the place of one
      ! cd -P -- "$HOME" 2>/dev/null || { HOME=$PWD && cd -- "$OLDPWD"; } || exit
      case $kind in gate) ;; *) export TMPDIR=${folder%/*}/tmp/$agent ;; esac
      run_by_bwrap "$@" ;;
    *:none | tree:* | slot:*) exec "$@" ;;
    *) run_by_prefix "$@" ;;
  esac
}
main "$@"

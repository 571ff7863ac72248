#!/usr/bin/env bash
# Usage: start-spoke.sh run NAME AGENTS    be the host NAME, in the foreground (%a in NAME: the
#                                          index of Slurm's array)
#        start-spoke.sh up NAME AGENTS     the same in the background, unless it runs: by systemd
#                                          where that outlives a logout, else in tmux
#        start-spoke.sh end NAME SECONDS   its end: SECONDS to do it itself, then it is told to
# What a host runs. place.sh sends it, alone: `job`, `hub`, `python` and `digest` are set above, and
# the toolkit is below. All of it lies in ~/farm-hosts/JOB/: NAME.log, the clone in NAME/.
# A key ~/.ssh/farm-NAME is used for the hub where there is one.
# Prints: up, end: how it is, in a line
# Exit: 0 ok, 1 something failed, 2 usage, 6 packages or a tool are missing
set -euo pipefail

# Sets toolkit, what was sent, unpacked once, and python, one that has its packages.
unpack() {
  local one venv=$folder.venv
  toolkit=$folder.toolkit
  if [ "$(cat "$toolkit/digest" 2>/dev/null)" != "$digest" ]; then
    rm -rf "$toolkit.new" && mkdir -p "$toolkit.new"
    sed '1,/^# the toolkit$/d' "$0" | base64 --decode | tar -xzf - -C "$toolkit.new"
    printf '%s\n' "$digest" >"$toolkit.new/digest"
    rm -rf "$toolkit" && mv "$toolkit.new" "$toolkit"
  fi
  for one in "$python" "$venv/bin/python" python3 ''; do
    if [ -z "$one" ]; then
      bash "$toolkit/scripts/make-venv.sh" "$venv" python3 "$toolkit/farm.py" >&2
      one=$venv/bin/python
    fi
    python=$one
    if "$python" -c 'import psutil, portalocker, tabulate' 2>/dev/null; then return; fi
  done
}

run_spoke() { # AGENTS
  local key=$HOME/.ssh/farm-$name v
  exec >>"$folder.log" 2>&1  # the input stays: tmux ends a pane whose terminal nobody has open
  # a job of Slurm has the environment of the hub's loop
  for v in ${!FARM_@} TMUX; do unset "$v"; done
  unpack
  if [ -e "$key" ]; then
    GIT_SSH_COMMAND="${GIT_SSH_COMMAND:-ssh} -i $(printf '%q' "$key") -o IdentitiesOnly=yes"
    export GIT_SSH_COMMAND
  fi
  FARM_PYTHON=$python exec "$toolkit/scripts/farm" spoke "$hub" -n "$1" --name "$name" \
    --folder "$folder"
}

# The pid of the one that `up` has started; none when it is over.
find_spoke() {
  local pid
  pid=$(systemctl --user show --property MainPID "$job-$name" 2>/dev/null) || pid=''
  pid=${pid#MainPID=}
  case $pid in
    '' | 0) pid=$(tmux -L "$job-$name" list-panes -a -F '#{pane_pid}' 2>/dev/null) || pid='' ;;
  esac
  printf '%s' "$pid"
}

start_spoke() { # AGENTS
  local last pid
  pid=$(find_spoke)
  if [ -n "$pid" ]; then
    printf 'runs (pid %s)\n' "$pid"
    return
  fi
  last=$(tail -n 1 "$folder.log" 2>/dev/null) || last=''
  if [ "$(loginctl show-user --property Linger "$(id -un)" 2>/dev/null)" = Linger=yes ] &&
    systemd-run --user --quiet --collect --unit="$job-$name" --setenv=PATH="$PATH" \
      --setenv=GIT_SSH_COMMAND="${GIT_SSH_COMMAND:-ssh}" bash "$0" run "$name" "$1" 2>/dev/null
  then
    printf 'started by systemd%s\n' "${last:+; it had ended: $last}"
  else
    tmux -L "$job-$name" -f /dev/null new-session -d \
      "exec bash $(printf '%q run %q %q' "$0" "$name" "$1")"
    printf 'started in tmux%s\n' "${last:+; it had ended: $last}"
  fi
}

is_over_in() { # SECONDS
  local turn
  for ((turn = 0; turn <= $1 * 2; turn++)); do
    if [ -z "$(find_spoke)" ]; then return; fi
    sleep 0.5
  done
  return 1
}

# A spoke that is told a second time lets its agents finish nothing. What has not ended in good
# order has left agents, in the tmux server of the host's own farm.
end_spoke() { # SECONDS
  local turn pid
  if [ -n "$(find_spoke)" ] && is_over_in "$1"; then
    return
  fi
  for turn in 1 2 8; do
    pid=$(find_spoke)
    [ -z "$pid" ] || kill -TERM "$pid" || :
    if is_over_in "$turn"; then break; fi
  done
  unpack
  if [ -e "$folder/repo/coordination/farm.json" ]; then
    FARM_PYTHON=$python "$toolkit/scripts/farm" --repo "$folder/repo" estop >>"$folder.log" 2>&1
  fi
  if ! is_over_in 0; then
    systemctl --user stop "$job-$name" 2>/dev/null || tmux -L "$job-$name" kill-server
  fi
}

main() {
  if [ "${1-}" = -h ]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
  fi
  job=${job:?place.sh sets it} hub=${hub?} python=${python:?} digest=${digest:?}
  [ $# -eq 3 ] || exit 2
  name=${2/\%a/${SLURM_ARRAY_TASK_ID-}}
  folder=$HOME/farm-hosts/$job/$name
  mkdir -p "$HOME/farm-hosts/$job"
  case $1 in
    run) run_spoke "$3" ;;
    up) start_spoke "$3" ;;
    end) end_spoke "$3" && printf 'ended\n' ;;
    *)
      printf 'farm: run, up or end?\n' >&2
      exit 2
      ;;
  esac
}

main "$@"
exit

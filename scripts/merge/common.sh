#!/usr/bin/env bash
# Usage: . common.sh      sourced first by each script of merge/ and agent/; it is never run itself
# What they share: an environment that names no other repo, how they fail, their header as help,
# git with nothing of the user's that makes it do more, the common git dir, fields of a line.
# Exit: none of its own; `die` ends the script with the code that it is given

# What names another repo (a hook's, an alias's, yadm's) or leads cd astray is none of a script's
# business. Below pinned-git.sh it is what that has set.
if [ -z "${FARM_PINNED-}" ]; then
  ours='CONFIG_|SSH|AUTHOR_[NE]|COMMITTER_[NE]|HTTP_|SSL_|PROXY_|LFS_'
  ours="^GIT_($ours|(ASKPASS|ALLOW_PROTOCOL|TERMINAL_PROMPT|EXEC_PATH)\$)"
  for v in ${!GIT_@} CDPATH; do [[ $v =~ $ours ]] || unset "$v"; done
fi

# What lands is what git's objects are, and not what somebody's replace refs show in their place: a
# gate would judge another tree than a clone of the target has.
export GIT_NO_REPLACE_OBJECTS=1

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

say() { printf 'farm: %s\n' "$*" >&2; }

die() { # CODE WHAT HINT
  printf 'farm: %s\n  try: %s\n' "$2" "$3" >&2
  exit "$1"
}

# git in FOLDER, with no hooks and no housekeeping; submodules stay as they are.
quiet_git() { # FOLDER ARGUMENT...
  git -C "$1" -c core.hooksPath=/dev/null -c gc.auto=0 -c maintenance.auto=false \
    -c submodule.recurse=false "${@:2}"
}

# Sets common, the git dir that all worktrees of REPO share, as an absolute path. A sandboxed agent
# can make a FIFO of its HEAD, at which every git that lists the worktrees would wait.
open_repo() { # REPO
  local head
  # shellcheck disable=SC2034  # it is for the script that calls this
  common=$(git -C "$1" rev-parse --path-format=absolute --git-common-dir 2>/dev/null) ||
    die 2 "$1 is no git repo" "git init"
  for head in "$common"/worktrees/*/HEAD; do [ ! -p "$head" ] || rm -f "$head"; done
}

# Whether git takes NAME for somebody's: not where it is nothing but blanks and these.
has_letters() { [[ $1 == *[!.,:\;\<\>\"\\\'[:space:]]* ]]; } # NAME

# Sets escaped, TEXT as a field of a line.
escape() { # TEXT
  escaped=${1//\\/\\\\} escaped=${escaped//$'\t'/\\t}
  escaped=${escaped//$'\n'/\\n} escaped=${escaped//$'\r'/\\r}
}

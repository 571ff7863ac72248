#!/usr/bin/env bash
# Usage: . show-programs.sh     sourced by confine.sh; it is never run by itself
# add_toolkit COMMAND..., which adds to `box` what shows the toolkit, its python and the programs
# that the person's command names by absolute paths, wherever they lie. It uses repo, folder and
# here, which confine.sh sets, FARM_HOME and FARM_PYTHON.
# Exit: none of its own
# shellcheck disable=SC2154  # they are set by confine.sh

# Whether a path can be seen in the sandbox without being shown.
is_seen() { # PATH
  case $1 in
    "$HOME"/*) return 0 ;;
    "$repo"/* | "${folder%/*}"/* | /tmp/* | /var/tmp/* | /run/* | /root/* | /home/*) return 1 ;;
  esac
}

# A link that can be seen is left, and what it leads to is shown: bwrap puts nothing in its place.
follow() { # PATH -> sets line
  if [ -L "$1" ] && is_seen "$1"; then line=$(readlink -f -- "$1"); else line=$1; fi
}

add_program() { # PATH: and where a venv's python comes from, which its pyvenv.cfg says
  local line='' place
  follow "$1"
  [ ! -e "$line" ] || is_seen "$line" || box+=(-r "$line")
  case $1 in */bin/*) ;; *) return ;; esac
  if ! [ -e "${1%/bin/*}/pyvenv.cfg" ]; then return; fi
  while IFS= read -r line && [ "${line#home = }" = "$line" ]; do :; done <"${1%/bin/*}/pyvenv.cfg"
  line=${line#home = }
  for place in "${1%/bin/*}" "${line%/bin}"; do
    follow "$place"
    case $line in '' | /usr) ;; *) [ ! -e "$line" ] || box+=(-r "$line") ;; esac
  done
}

add_toolkit() { # what agents run of it, and what the person's command names, wherever that lies
  local path home=${FARM_HOME:-$here/../..}
  add_program "$home/farm.py"
  add_program "$home/scripts"
  if [ -n "${FARM_PYTHON-}" ]; then add_program "$FARM_PYTHON"; fi
  set -f
  for path in ${!#}; do
    path=${path#[\'\"]} path=${path%[\'\"\;]}
    case $path in /?*) if [ -f "$path" ]; then add_program "$path"; fi ;; esac
  done
  set +f
}

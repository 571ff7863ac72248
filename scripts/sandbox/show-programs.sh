#!/usr/bin/env bash
# Usage: . show-programs.sh     sourced by confine.sh; it is never run by itself
# add_toolkit COMMAND..., which adds to `box` what shows the toolkit, its python and the programs
# that the person's command names by absolute paths, wherever they lie; and add_list OPTION PATHS,
# with an OPTION of isolate.sh. It uses repo, folder, here and follows (whether links are), which
# confine.sh sets, FARM_HOME and FARM_PYTHON.
# Exit: none of its own
# shellcheck disable=SC2034,SC2154  # they are set and used by confine.sh

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

# What is not there could be made by an agent: a file that a CLI obeys, in a folder of its state.
# Where one has left a link, it leads nowhere.
make_file() { # PATH
  local text=''
  case $1 in *.json*) text='{}' ;; esac
  set -C
  [ ! -d "${1%/*}" ] || printf '%s' "$text" 2>/dev/null >"$1"
  set +C
}

# bwrap puts nothing in the place of a link, nor behind one. Only one that no agent can have made is
# followed: it could lead to what is hidden.
lead() { # PATH -> sets place
  local part=$1
  place=$1
  while [ -n "$follows" ] && [ "$part" != "${part%/*}" ]; do
    if [ -L "$part" ]; then place=$(readlink -f -- "$1") && return; fi
    part=${part%/*}
  done
}

add_list() { # OPTION PATHS: absolute, or below HOME
  local path how rest=$2: tilde='~' place
  while [ -n "$rest" ]; do
    path=${rest%%:*} rest=${rest#*:}
    how=$1
    case $path in +*) how=-w path=${path#+} ;; -*) how=-r path=${path#-} ;; esac
    case $path in '') continue ;; /*) ;; *) path=$HOME/${path#"$tilde"/} ;; esac
    case $path in
      */) [ -d "$path" ] || mkdir -p "$path" ;;
      *)
        [ "$how$1" != -r-w ] || [ "${path%/*}" = "$HOME" ] || [ -e "$path" ] ||
          make_file "$path" ;;
    esac
    path=${path%/}
    [ -e "$path" ] || continue
    if [ "$how$1" = -r-w ] && [ -L "$path" ] && [ "${path%/*}" != "$HOME" ]; then
      printf 'farm: %s is a link, in the place of which an agent could put another\n' "$path" >&2
      exit 6
    fi
    lead "$path"
    box+=("$how" "$place")
  done
}

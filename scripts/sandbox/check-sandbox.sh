#!/usr/bin/env bash
# Usage: check-sandbox.sh
# Says whether isolate.sh can work here: it tries. If it cannot, stderr says what forbids it and
# what helps.
# Prints a line for each thing that a sandbox here leaves open: what<TAB>what helps
# Exit: 0 it works, 6 it cannot
set -uo pipefail
here=$(cd -P -- "$(dirname -- "$0")" && pwd)

stop() { # WHAT HINT
  printf 'farm: no sandbox of bubblewrap: %s\n  try: %s\n' "$1" "$2" >&2
  exit 6
}

is_set() { # FILE VALUE: whether a switch of the kernel is there and says so
  local value=''
  IFS= read -r value 2>/dev/null <"/proc/sys/$1" && [ "$value" = "$2" ]
}

explain() { # what bwrap said, when it failed
  local box=''
  is_set kernel/unprivileged_userns_clone 0 && [ "$(id -u)" != 0 ] &&
    stop 'kernel.unprivileged_userns_clone is 0' 'sudo sysctl kernel.unprivileged_userns_clone=1'
  is_set user/max_user_namespaces 0 &&
    stop 'user.max_user_namespaces is 0' 'sudo sysctl user.max_user_namespaces=10000'
  if is_set kernel/apparmor_restrict_unprivileged_userns 1 && [ "$(id -u)" != 0 ]; then
    stop 'AppArmor keeps it from making user namespaces
(kernel.apparmor_restrict_unprivileged_userns is 1)' \
      'sudo apt install apparmor-profiles && sudo ln -s \
/usr/share/apparmor/extra-profiles/bwrap-userns-restrict /etc/apparmor.d/ && sudo systemctl \
reload apparmor'
  fi
  if [ -e /.dockerenv ] || [ -e /run/.containerenv ] || [ -n "${container-}" ]; then
    box=' (inside a container, which is a sandbox already, if nothing else is in it)'
    stop "${1:-it ended without a word}$box" 'FARM_ISOLATE=none here, or start the container with
    --security-opt seccomp=unconfined --security-opt systempaths=unconfined'
  fi
  stop "${1:-it ended without a word}" 'bwrap --ro-bind / / --dev /dev --proc /proc true'
}

main() {
  local said
  if [ "${1-}" = -h ]; then sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0; fi
  [ "$(uname -s)" = Linux ] ||
    stop "it is for Linux, and this is $(uname -s)" "FARM_ISOLATE='sandbox-exec -f PROFILE'"
  command -v bwrap >/dev/null ||
    stop 'bwrap is not installed' 'apt-get install bubblewrap | dnf install bubblewrap'
  said=$(cd / && bash "$here/../isolate.sh" true 2>&1) || explain "$(tail -n 1 <<<"$said")"
  # shellcheck disable=SC2016  # perl's
  if ! command -v perl >/dev/null; then
    printf '%s\t%s\n' 'sandboxed agents can reach abstract sockets: perl is not installed' \
      'apt-get install perl, or FARM_NETWORK=none'
  elif ! perl -e 'exit(syscall(444, 0, 0, 1) < 6)'; then
    printf '%s\t%s\n' 'sandboxed agents can reach abstract sockets: the kernel is older than 6.12' \
      'FARM_NETWORK=none, where agents need no network'
  fi
  { command -v systemd-run && [ -S "${XDG_RUNTIME_DIR:-/none}/systemd/private" ]; } >/dev/null ||
    printf '%s\t%s\n' 'no systemd of the user: the loop keeps limits, and sees no file in memory' \
      'sudo loginctl enable-linger, and log in again'
  case ${HOSTTYPE-} in
    x86_64 | aarch64) ;;
    *) is_set dev/tty/legacy_tiocsti 0 ||
      printf '%s\t%s\n' 'sandboxed agents can type into the terminal of their pane' \
        'sudo sysctl dev.tty.legacy_tiocsti=0' ;;
  esac
}
main "$@"

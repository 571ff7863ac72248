#!/usr/bin/env bash
# Usage: isolate.sh [-w PATH]... [-r PATH]... [-x PATH]... [-o PATH=DIR]... [-e NAME]... [-t DIR]
#          [-g WORKTREE [-s DIR] [-b REFS]...] [-n] [-d] [--] COMMAND [ARGUMENT]...
# Runs COMMAND in a bubblewrap sandbox, in the folder it is called from: the system is read-only;
# processes, IPC and /tmp (-t: that folder) are its own; hidden are the host's sockets, other users'
# homes and what holds credentials (the lists below). It has no capabilities and ends with its
# caller. -w lets a path be written, -r shows it, -x hides it, -o has DIR in the place of PATH;
# -x goes first, -g last, else what is said last wins. Its environment is what the lists name, and
# -e: names, also with * in them. -n: no network. -d: without the caller's terminal and process
# group, which it could signal. Links in paths must be resolved.
# -g: a linked worktree of a git repo, with refs below refs/REFS/ for each -b; -s DIR keeps its
# tags, remotes and stash. Beside it, for -g: sandbox/isolate-git.sh; it says what can be written.
# Exit: COMMAND's own (128 + n: ended by a signal), 2 usage, 6 no bwrap: sandbox/check-sandbox.sh
set -uo pipefail
case ${BASH_SOURCE[0]} in */*) here=${BASH_SOURCE[0]%/*} ;; *) here=. ;; esac
# Below HOME, and in all the system: what holds keys, tokens, sessions, or what was typed.
secrets='.ssh .aws .gnupg .config/gh .config/hub .config/glab-cli .netrc .kube .docker .azure .oci
  .config/gcloud .config/op .config/rclone .config/containers .config/doctl .git-credentials .npmrc
  .config/git/credentials .yarnrc.yml .pypirc .pgpass .my.cnf .s3cfg .boto .gem/credentials .fly
  .cargo/credentials .cargo/credentials.toml .m2/settings.xml .m2/settings-security.xml .terraformrc
  .gradle/gradle.properties .terraform.d .vault-token .password-store .local/share/keyrings .heroku
  .local/share/kwalletd .local/share/containers .mozilla .thunderbird .config/google-chrome .env
  .config/chromium .config/BraveSoftware .config/microsoft-edge .databrickscfg .subversion/auth
  .Xauthority .ICEauthority .bash_history .zsh_history .python_history .node_repl_history .lesshst
  .psql_history .mysql_history .local/share/fish .claude .claude.json .codex .gemini .config/Code
  .local/share/opencode .aider.conf.yml .config/github-copilot .colima .lima .rd .cache/gh'
system='/etc/shadow /etc/shadow- /etc/gshadow /etc/gshadow- /etc/ssl/private /etc/sudoers /var/log
  /etc/sudoers.d /etc/krb5.keytab /etc/wireguard /etc/openvpn /etc/NetworkManager/system-connections
  /etc/letsencrypt /etc/kubernetes /etc/rancher /etc/docker /etc/security/opasswd /var/spool/cron
  /var/lib/docker /var/lib/kubelet /mnt/wslg /root /home'
# As outside, and read-only: how names are resolved; what of the kernel root could set, even without
# capabilities.
as_is='/run/systemd/resolve /run/resolvconf /run/NetworkManager/resolv.conf /run/current-system
  /run/opengl-driver /proc/sys /proc/irq /proc/bus /proc/fs /proc/acpi /proc/scsi /proc/driver
  /proc/sysrq-trigger /proc/mtrr'
passed='PATH HOME USER LOGNAME SHELL LANG LANGUAGE LC_* TERM COLORTERM NO_COLOR TZ TMPDIR FARM_*
  GIT_CONFIG_COUNT GIT_CONFIG_KEY_* GIT_CONFIG_VALUE_* GIT_TERMINAL_PROMPT GIT_OPTIONAL_LOCKS
  GIT_MERGE_AUTOEDIT GIT_AUTHOR_NAME GIT_AUTHOR_EMAIL GIT_COMMITTER_NAME GIT_COMMITTER_EMAIL'

fail() { printf 'farm: %s\n  try: %s\n' "$2" "$3" >&2; exit "$1"; } # CODE WHAT HINT

show() { # HOW PATH...
  local path
  for path in "${@:2}"; do box+=("--$1" "$path" "$path"); done
}

hide() { # PATH; where a link is on the way, which is rare, a process is forked to follow it
  if ! [ -e "$1" ]; then return; fi
  if [ -L "$1" ] || [ -L "${1%/*}" ] || [ -L "${1%/*/*}" ]; then set -- "$(readlink -f -- "$1")"; fi
  if [ -d "$1" ]; then box+=(--size 1048576 --tmpfs "$1"); else box+=(--ro-bind /dev/null "$1"); fi
}

hide_all() { # PATH...
  local path home
  for path in $system; do [ -L "$path" ] || hide "$path"; done
  show ro-bind "$HOME" ${FARM_USER_HOME:+"$FARM_USER_HOME"}
  for path in "$@"; do hide "$path"; done
  for home in "$HOME" ${FARM_USER_HOME:+"$FARM_USER_HOME"}; do
    for path in $secrets; do hide "$home/$path"; done
  done
}

# What comes along of the environment; not by the command line, which everybody can read. And of
# git: no packs, which are read-only; no signatures, whose keys are hidden.
print_environment() { # NAME...
  local name pattern pair n=${GIT_CONFIG_COUNT:-0}
  for pair in transfer.unpackLimit=1000000 commit.gpgSign=false tag.gpgSign=false gc.auto=0 \
    maintenance.auto=false fetch.writeCommitGraph=false; do
    export "GIT_CONFIG_KEY_$n=${pair%%=*}" "GIT_CONFIG_VALUE_$n=${pair#*=}"
    n=$((n + 1))
  done
  export GIT_CONFIG_COUNT=$n
  set -f
  # shellcheck disable=SC2086  # one pattern a word
  set -- $passed "$@"
  pattern=$* pattern="@(${pattern// /|})" && shopt -s extglob
  for name in $(compgen -e); do
    # shellcheck disable=SC2254  # it is a pattern
    case $name in $pattern) printf '%s\0' --setenv "$name" "${!name}" ;; esac
  done
}

# Forbids the ioctls TIOCSTI and TIOCLINUX, which type into the terminal what its shell reads later,
# and the calls of keyrings, as the keys of its session are the user's: load arch; not ours: deny;
# load the call; not of this ABI: deny; past keyctl: allow; from add_key on: deny; no ioctl: allow;
# load which; ...
print_filter() {
  local arch nr first last allow='\6\0\0\0\0\0\377\177' deny='\6\0\0\0\1\0\5\0'
  case $HOSTTYPE in
    x86_64) arch='\76\0\0\300' nr='\20\0\0\0' first='\370\0\0\0' last='\372\0\0\0' ;;
    aarch64) arch='\267\0\0\300' nr='\35\0\0\0' first='\331\0\0\0' last='\333\0\0\0' ;;
    *) printf '%b' "$allow"; return ;;
  esac
  printf '%b' '\40\0\0\0\4\0\0\0' '\25\0\0\11' "$arch" '\40\0\0\0\0\0\0\0' '\65\0\7\0\0\0\0\100' \
    '\45\0\5\0' "$last" '\65\0\5\0' "$first" '\25\0\0\3' "$nr" '\40\0\0\0\30\0\0\0' \
    '\25\0\2\0\22\124\0\0' '\25\0\1\0\34\124\0\0' "$allow" "$deny"
}

# Landlock keeps a process from abstract sockets that were made outside (kernel 6.12); signals of
# the terminal are COMMAND's to take, not bwrap's.
# shellcheck disable=SC2016  # perl's
guard='$SIG{INT} = $SIG{QUIT} = "DEFAULT"; my $wish = pack("QQQ", 0, 0, 1);
  my $rules = syscall(444, $wish, 24, 0);
  syscall(446, $rules, 0) == 0 || die "farm: landlock: $!\n" if $rules >= 0;
  exec { $ARGV[0] } @ARGV; print STDERR "farm: $ARGV[0]: $!\n"; exit 127'

main() {
  local option home box=() first=() names=() refs=() last=() hidden=() more=()
  local tree='' private='' temp=''
  while getopts w:r:x:o:e:t:g:s:b:ndh option; do
    case $option in
      w) last+=(--bind "$OPTARG" "$OPTARG") ;; r) last+=(--ro-bind "$OPTARG" "$OPTARG") ;;
      o) last+=(--bind "${OPTARG#*=}" "${OPTARG%%=*}") ;; x) hidden+=("$OPTARG") ;;
      e) names+=("$OPTARG") ;; b) refs+=("$OPTARG") ;; n) more+=(--unshare-net) ;;
      t) temp=$OPTARG ;; g) tree=$OPTARG ;; s) private=$OPTARG ;; d) more+=(--new-session) ;;
      h) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;; *) exit 2 ;;
    esac
  done
  shift $((OPTIND - 1))
  [ $# -gt 0 ] || fail 2 'which command?' 'isolate.sh -h'
  command -v bwrap >/dev/null || fail 6 'bwrap is not installed' 'apt-get install bubblewrap'
  # what lies in a tmpfs is nobody's memory: no limit would see it
  box=(--ro-bind / / --dev /dev --size 268435456 --tmpfs /dev/shm --remount-ro /dev --proc /proc
    --size 1048576 --tmpfs /run)
  for home in $as_is; do box+=(--ro-bind-try "$home" "$home"); done
  if [ -n "$temp" ]; then box+=(--bind "$temp" /tmp --bind "$temp" /var/tmp)
  else box+=(--tmpfs /tmp --tmpfs /var/tmp); fi
  option=$PWD
  cd -P -- "$HOME" || fail 2 "there is no folder $HOME" 'export HOME=FOLDER'
  HOME=$PWD && cd -- "$option" || exit 2
  hide_all ${hidden[@]+"${hidden[@]}"}
  [ -z "$temp" ] || show bind "$temp"
  box+=(${last[@]+"${last[@]}"})
  [ -z "$tree" ] ||
    { [ -r "$here/sandbox/isolate-git.sh" ] && . "$here/sandbox/isolate-git.sh"; } ||
    fail 6 'sandbox/isolate-git.sh is not beside this' 'copy that folder, too'
  [ -z "$tree" ] || add_git "$tree" "$private" ${refs[@]+"${refs[@]}"} ||
    fail 1 "the folders of $tree cannot be made" 'df -h .'
  set -- ${first[@]+"${first[@]}"} "$@"
  ! command -v perl >/dev/null || { set -- perl -e "$guard" -- "$@" && trap '' INT QUIT; }
  # What fails within <(...) is not seen here, but fails closed: of an empty filter bwrap ends, and
  # without its list a command has no variables at all.
  exec bwrap "${box[@]}" ${more[@]+"${more[@]}"} --unshare-user-try \
    --unshare-pid --unshare-ipc --unshare-uts --unshare-cgroup-try --die-with-parent \
    --cap-drop ALL --chdir "$PWD" --clearenv --args 8 --seccomp 9 -- "$@" \
    8< <(print_environment ${names[@]+"${names[@]}"}) 9< <(print_filter)
}
main "$@"

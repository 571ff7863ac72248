#!/usr/bin/env bash
# Usage: pinned-git.sh REPO COMMAND [ARGUMENT]...
# Run COMMAND with GIT_DIR set to REPO's and with all pinned that could bend a merge or a commit, so
# that every machine and both ways of merging reach the same shas: the options of merging, and the
# identity (the configured user.name and user.email, else farm <farm@localhost>). No hooks, signing,
# rerere, editor; no attributes of the user or the system.
# A cut of history behind which all is there, as `git fetch --depth=1` of an agent makes one for all
# worktrees, is none: else work from before it would share no history with the target.
# Objects are fsynced: what a power cut empties is never written again, for the next run takes it
# for being there.
# What stays: the merge drivers that the configuration defines, for the paths that the repo's
# attributes give them.
# Exit: COMMAND's own, 2 usage or no repo
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
. "$here/common.sh"

set_identity() {
  local key value known name=farm email=farm@localhost
  # The identity that the farm has begun with: an agent may have set another one in the settings
  # that all share.
  if [ -n "${FARM_IDENTITY-}" ]; then
    name=${FARM_IDENTITY%%$'\t'*} email=${FARM_IDENTITY#*$'\t'}
  else
    known=$(git config --get-regexp '^user\.(name|email)$') || [ $? -eq 1 ] ||
      die 1 "git cannot read its configuration" "git config -l"
    while read -r key value; do
      case $key=$value in
        user.name=?*) name=$value ;;
        user.email=?*) email=$value ;;
      esac
    done <<<"$known"
  fi
  export GIT_AUTHOR_NAME=$name GIT_AUTHOR_EMAIL=$email
  export GIT_COMMITTER_NAME=$name GIT_COMMITTER_EMAIL=$email
}

pin_settings() {
  local pair n=${GIT_CONFIG_COUNT:-0}
  for pair in gc.auto=0 maintenance.auto=false core.fsync=committed \
    core.hooksPath=/dev/null core.attributesFile=/dev/null core.fsmonitor=false \
    core.autocrlf=false core.splitIndex=false core.sparseCheckout=false index.sparse=false \
    merge.renames=true diff.renames=true merge.renameLimit=7000 diff.renameLimit=7000 \
    diff.algorithm=histogram merge.directoryRenames=conflict merge.conflictStyle=merge \
    merge.renormalize=false merge.verbosity=2 merge.verifySignatures=false merge.autoStash=false \
    rerere.enabled=false commit.gpgSign=false submodule.recurse=false \
    i18n.commitEncoding=UTF-8 i18n.logOutputEncoding=UTF-8 log.showSignature=false; do
    export "GIT_CONFIG_KEY_$n=${pair%%=*}" "GIT_CONFIG_VALUE_$n=${pair#*=}"
    n=$((n + 1))
  done
  export GIT_CONFIG_COUNT=$n GIT_ATTR_NOSYSTEM=1 GIT_EDITOR=true GIT_TERMINAL_PROMPT=0 \
    FARM_PINNED=1 LC_ALL=C
}

# Those cuts stay behind which a parent is not there: this repo is a shallow clone.
open_cuts() {
  local parents missing kept=$GIT_DIR/farm-shallow
  [ -s "$GIT_DIR/shallow" ] || return 0
  parents=$(git cat-file --batch <"$GIT_DIR/shallow" | tr -d '\0' | LC_ALL=C awk '
    $2 == "commit" && NF == 3 && length($1) >= 40 { commit = $1 }
    NF == 0 { commit = "" }
    $1 == "parent" && commit != "" { print $2, commit }')
  missing=$(cut -d ' ' -f 1 <<<"$parents" | git cat-file --batch-check | sed -n 's/ missing$//p')
  grep -F "${missing:-none}" <<<"$parents" | cut -d ' ' -f 2 | sort -u >"$kept.$$" || :
  mv "$kept.$$" "$kept"
  export GIT_SHALLOW_FILE=$kept
}

main() {
  local common
  case ${1-} in -h) usage; exit 0 ;; esac
  [ $# -ge 2 ] || die 2 "a repo and a command are needed" "pinned-git.sh -h"
  open_repo "$1"
  export GIT_DIR=$common
  shift
  open_cuts
  set_identity
  pin_settings
  exec "$@"
}
main "$@"

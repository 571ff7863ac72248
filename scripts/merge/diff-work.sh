#!/usr/bin/env bash
# Usage: diff-work.sh [-C REPO] -b TARGET [-s|-t|-n|-r] COMMIT-ISH   what it would bring to TARGET
#        diff-work.sh [-C REPO] -b TARGET [-s|-t|-n|-r] -w WORKTREE  the same, with what is unsaved
#        diff-work.sh [-C REPO] -f BEFORE [-s|-t|-n|-r] COMMIT-ISH   what it has changed since
# TARGET is a branch, or what it was: a commit.
# Prints a diff: on a terminal through git's pager and in git's colours; -s: git's --stat. Control
# characters in it, which could drive a terminal, are shown as ^X or <U+202E>, but not with -r,
# which prints exactly what git does. -t shows it in the difftool that the user's own settings name
# (git config --global diff.tool), one file after the other; the repo's settings, which an agent may
# have changed, name none. -n prints how many commits that is (no merges), then
# path<TAB>added<TAB>removed, a line each (\\ \t \n \r escaped; - for a binary file; a
# rename is two). No other external diff and no textconv is run, and nothing is changed: new files
# are looked at through an index of its own.
# Exit: 0 ok, 1 git failed, 2 usage or no repo, 3 no such commit, branch or worktree
set -euo pipefail
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
pager=${GIT_PAGER-} scratch=
. "$here/common.sh"

git_there() {
  quiet_git "$place" -c core.fsmonitor=false -c core.quotePath=false \
    -c diff.autoRefreshIndex=false "$@"
}

# Control characters become visible, bidirectional ones too; colours are those that git would take.
# shellcheck disable=SC2016  # awk's own
SHOWN='
BEGIN {
  for (i = 1; i < 32; i++) name[sprintf("%c", i)] = "^" sprintf("%c", i + 64)
  name["\177"] = "^?"
  for (i = 128; i < 160; i++) name["\302" sprintf("%c", i)] = sprintf("<U+%04X>", i)
  for (i = 170; i < 175; i++) name["\342\200" sprintf("%c", i)] = sprintf("<U+%04X>", 8064 + i)
  for (i = 166; i < 170; i++) name["\342\201" sprintf("%c", i)] = sprintf("<U+%04X>", 8128 + i)
  bad = "[\001-\010\013-\037\177]|\302[\200-\237]|\342\200[\252-\256]|\342\201[\246-\251]"
}
{
  out = ""
  while (match($0, bad)) {
    out = out substr($0, 1, RSTART - 1) name[substr($0, RSTART, RLENGTH)]
    $0 = substr($0, RSTART + RLENGTH)
  }
  line = out $0
  if (line ~ /^diff /) body = 0
  if (line ~ /^@@/) body = 1
  colour = ""
  if (line ~ /^@@/) colour = frag
  else if (!body) colour = meta
  else if (line ~ /^\+/) colour = new
  else if (line ~ /^-/) colour = old
  print (colour == "" ? line : colour line reset)
}'

show() { # GIT-DIFF'S ARGUMENTS: reads what git prints
  local colours=() name word
  if [ "$form" = raw ]; then cat; return; fi
  if [ ! -t 1 ]; then LC_ALL=C awk "$SHOWN"; return; fi
  if [ "$form" = diff ] && git_there config --get-colorbool color.diff true >/dev/null; then
    for word in old:red new:green meta:bold frag:cyan; do
      name=${word%:*}
      colours+=(-v "$name=$(git_there config --get-color "color.diff.$name" "${word#*:}")")
    done
    colours+=(-v "reset=$(git_there config --get-color '' reset)")
  fi
  [ -n "$pager" ] || pager=$(git_there var GIT_PAGER) || true
  export LESS=${LESS-FRX} LV=${LV--c}
  LC_ALL=C awk ${colours[@]+"${colours[@]}"} "$SHOWN" | sh -c "${pager:-cat}"
}

of_user() { (cd / && GIT_CEILING_DIRECTORIES=/ git config --get "$1") || true; }

show_in_tool() { # COMMIT...
  local tool own=() key
  tool=$(of_user diff.tool)
  [ -n "$tool" ] || die 3 "no difftool is set" "git config --global diff.tool vimdiff"
  for key in "difftool.$tool.cmd" "difftool.$tool.path"; do own+=(-c "$key=$(of_user "$key")"); done
  git_there "${own[@]}" difftool --no-prompt --tool="$tool" "$@" --
}

list_numbers() {
  local added removed path escaped
  git_there rev-list --count --no-merges "$base..${commit:-HEAD}"
  while IFS=$'\t' read -r -d '' added removed path; do
    escape "$path"
    printf '%s\t%s\t%s\n' "$escaped" "$added" "$removed"
  done
}

# New files are in a diff against the worktree once an index knows of them.
use_scratch_index() {
  local index
  index=$(git_there rev-parse --path-format=absolute --git-path index)
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/farm-diff.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  [ -L "$index" ] || [ ! -f "$index" ] || cp "$index" "$scratch/index"
  export GIT_INDEX_FILE=$scratch/index
  git_there add --intent-to-add --all -- . 2>/dev/null || true
}

find_base() { # COMMIT-ISH
  local known
  known=$(git_there rev-parse -q --verify --end-of-options "refs/heads/$target^{commit}" ||
    git_there rev-parse -q --verify --end-of-options "$target^{commit}") ||
    die 3 "there is no branch $target" "git branch"
  git_there merge-base "$known" "$1" || git_there hash-object -t tree /dev/null
}

main() {
  local repo=. target='' before='' worktree='' form=diff option base commit place words=()
  while getopts ':C:b:f:w:stnrh' option; do
    case $option in
      C) repo=$OPTARG ;; b) target=$OPTARG ;; f) before=$OPTARG ;; w) worktree=$OPTARG ;;
      s) form=stat ;; t) form=tool ;; n) form=numbers ;; r) form=raw ;;
      h) usage; exit 0 ;;
      *) die 2 "-$OPTARG is unknown or lacks its value" "diff-work.sh -h" ;;
    esac
  done
  shift $((OPTIND - 1))
  case ${target:+t}${before:+f}:${worktree:+w}:$# in
    t::1 | tf::1 | f::1 | t:w:0) ;;
    *) die 2 "a branch and a commit or a worktree are needed" "diff-work.sh -h" ;;
  esac
  export GIT_OPTIONAL_LOCKS=0
  place=$repo
  git_there rev-parse --git-dir >/dev/null 2>&1 || die 2 "$repo is no git repo" "git init"
  place=${worktree:-$repo}
  commit=$(git_there rev-parse -q --verify --end-of-options "${1:-HEAD}^{commit}" 2>/dev/null) ||
    die 3 "there is no commit ${1:-HEAD} in $place" "git -C $repo log --oneline"
  base=$before
  [ -n "$base" ] || base=$(find_base "$commit")
  if [ -n "$worktree" ]; then use_scratch_index; commit=; fi
  words=(diff --no-ext-diff --no-textconv --no-color --ignore-submodules=dirty "$base"
    ${commit:+"$commit"})
  case $form in
    numbers) git_there "${words[@]}" --no-renames --numstat -z -- | list_numbers ;;
    tool) show_in_tool "$base" ${commit:+"$commit"} ;;
    stat) git_there "${words[@]}" --stat -- | show ;;
    *) git_there "${words[@]}" -- | show ;;
  esac
}
main "$@"

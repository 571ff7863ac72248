#!/usr/bin/env bash
# Usage: run by the farm as an agent's command. A scripted agent for the demo and the tests: no network, no key.
# It reads the task's prompt and does what its first `do:` line says, the way a person would: edit, test, commit.
#   do: function NAME EXPRESSION   add textkit/NAME.py with a test, run the tests, commit
#   do: replace OLD NEW            change a word of README.md, commit
#   do: break NAME                 commit a change that breaks NAME, without running the tests; mend it when it comes back
#   do: nothing                    look around and leave without a commit
# DEMO_AGENTS=N: begin only when N agents hold a task in the repo DEMO_HUB (or half a minute is over), so that N work at once.
# Exit: 0 done, 1 it did not work out
set -euo pipefail

# How many hold a task: by their locks or, in a sandbox, where those are hidden, by their branches.
count_at_work() {
  local hub=${DEMO_HUB:-$FARM_REPO}/coordination locks
  if [ -d "$hub/agent_locks" ]; then
    locks=("$hub"/agent_locks/*.lock)
    printf '%s\n' "${#locks[@]}"
  else
    git for-each-ref --format='%(refname)' 'refs/heads/farm/*/t-*' | cut -d / -f 4 | sort -u | grep -c .
  fi
}

# Wait until enough agents are at work, with a deadline; once a worktree (TMPDIR is empty at each task).
wait_for_others() {
  local deadline=$((SECONDS + 30)) seen
  seen=$(git rev-parse --absolute-git-dir)/all-at-work
  while [ ! -e "$seen" ] && [ "$SECONDS" -lt "$deadline" ]; do
    if [ "$(count_at_work)" -ge "$DEMO_AGENTS" ]; then : >"$seen"; else sleep 0.1; fi
  done
}

run_tests() { "${DEMO_PYTHON:-python3}" -B -m unittest -q 2>&1 | tail -n 3; }

add_function() {
  local name=$1 expression=$2
  printf 'def %s(text):\n    return %s\n' "$name" "$expression" >"textkit/$name.py"
  printf 'import unittest\nfrom textkit.%s import %s\n\n\nclass Test(unittest.TestCase):\n    def test_text(self):\n        self.assertIsNotNone(%s("a b"))\n' \
    "$name" "$name" "$name" >"tests/test_$name.py"
  run_tests
  git add --all
  git commit --quiet --message "Add $name"
}

replace_word() {
  local old=$1 new=$2
  git merge --quiet --no-edit "$FARM_TARGET" >/dev/null 2>&1 || git reset --quiet --hard "$FARM_TARGET"
  sed "s/^words: .*/words: $old and $new/" README.md >README.tmp && mv README.tmp README.md
  git commit --quiet --all --message "Say $new for $old"
}

break_function() {
  local name=$1
  if [ "$FARM_ATTEMPT" -gt 1 ]; then
    printf 'it came back; what the prompt says: %s\n' "$(grep -c . "$FARM_PROMPT_FILE") lines"
    printf 'def %s(text):\n    return text.upper() + "!!"[:1]\n' "$name" >"textkit/$name.py"
    run_tests
  else
    printf 'def %s(text):\n    return text.lower()\n' "$name" >"textkit/$name.py"
  fi
  git commit --quiet --all --message "Change $name"
}

main() {
  local line verb first rest
  [ "${1:-}" != -h ] || { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0; }
  [ -z "${DEMO_AGENTS:-}" ] || wait_for_others
  line=$(sed -n 's/^do: //p' "$FARM_PROMPT_FILE" | sed -n 1p)
  read -r verb first rest <<<"$line"
  case $verb in
    function) add_function "$first" "$rest" ;;
    replace) replace_word "$first" "$rest" ;;
    break) break_function "$first" ;;
    nothing) ls >/dev/null ;;
    *) printf 'no do: line in %s\n' "$FARM_PROMPT_FILE"; exit 1 ;;
  esac
}

main "$@"

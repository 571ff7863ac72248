"""To see one task and to steer it: show, diff, edit, filters, revert."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
from farm_calls import UGLY, A, drain, make_commit, tree_of
from sandbox import git, run, wait_until
from screens import Screen

import farm as toolkit

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
HOSTILE = "plain\x1b[31mred\x1b]0;title\x07\x9b2J \u202eright to left\r\n"


# ---------------------------------------------------------------------------------------------- show


def test_show_has_the_whole_way_of_a_task(farm):
    agent = 'true; farm add "a child of $FARM_TASK"; [ "$FARM_ATTEMPT" = 1 ] && exit 3; echo x >f; git add f; git commit -qm f'
    farm.ok("add", "Fix it", "--prompt", "two\nlines", "--priority", "5", "--path", "f", "--budget", "3")
    drain(farm, "--gate", "true", agent=agent, check=False)
    told = json.loads(farm.ok("show", "t-0001", "--json"))
    assert [(one["attempt"], one["agent"], one["fate"]) for one in told["attempts"]] == [(1, A, "failed"), (2, A, "landed")]
    assert "exit code 3" in told["attempts"][0]["why"] and told["attempts"][1]["commit"]
    assert (told["state"], told["prompt"], told["tries"], told["gate"]["colour"]) == ("landed", "two\nlines", 1, "green")
    assert (told["commits"], told["files"]) == (1, [["f", "1", "0"]])
    assert "t-0002" in told["follow_ups"] and told["next"][0] == "./farm.py diff t-0001"
    shown = farm.ok("show", "t-0001")
    for words in ("t-0001 landed: Fix it", "priority: 5", "  two\n  lines", "f +1 -0", "gate: green", "follow_ups: t-0002",
                  f"cat {told['gate']['log']}", "next: ./farm.py revert t-0001"):
        assert words in shown
    assert os.path.exists(told["gate"]["log"])


def test_completion_knows_which_tasks_a_verb_may_name(farm):
    farm.ok("add", "one"), farm.ok("add", "two")
    farm.submit(A, {"a": "a"})
    farm.ok("merge")
    words = ["farm.py", "--repo", str(farm.repo)]
    known = {verb: toolkit.find_completions([*words, verb, ""], 4) for verb in ("show", "diff", "revert", "edit", "approve")}
    assert known == {**dict.fromkeys(("show", "diff", "revert"), ["t-0001", "t-0002"]), "edit": ["t-0002"], "approve": ["t-0002"]}
    assert "--attempt" in toolkit.find_completions([*words, "diff", "--"], 4)


def test_show_says_what_holds_a_task_up_and_what_to_type(farm):
    farm.ok("add", "one"), farm.ok("add", "two", "--after", "t-0001")
    assert "waits: after t-0001, which is pending" in farm.ok("show", "t-0002")
    farm.claim(A)
    assert "next: ./farm.py attach 1" in farm.ok("show", "t-0001")
    farm.refused(3, "show", "t-0009"), farm.refused(3, "diff", "t-0009"), farm.refused(2, "show")
    assert "t-0002 has no such work" in farm.refused(3, "diff", "t-0002")


def test_no_text_of_an_agent_drives_the_terminal(farm, screen):
    farm.ok("add", UGLY, "--prompt", UGLY)
    farm.submit(A, {"f.txt": HOSTILE, "\x1b[31mname\u202e": "x\n"})
    for verb in (["show"], ["diff"], ["diff", "--stat"], ["show", "--json"]):
        done = farm(verb[0], "t-0001", *verb[1:])
        text = done.stdout.replace("\u202e", "") if "--json" in verb else done.stdout
        assert done.returncode == 0 and not CONTROL.search(text), verb
    assert "+plain^[[31mred^[]0;title^G<U+009B>2J <U+202E>right to left^M" in farm.ok("diff", "t-0001")
    assert "+plain\x1b[31mred" in farm.ok("diff", "t-0001", "--raw")
    one = screen("diff", "t-0001", env={**os.environ, "GIT_PAGER": "cat"})
    assert one.end() == 0
    colours = set(re.findall(r"\x1b[^m]*m?", one.read()))
    assert "\x1b[32m" in colours and colours <= {"\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[36m", "\x1b[m"}
    assert not CONTROL.search(re.sub(r"\x1b\[\d*m|\r\n", "", one.read()))


# ---------------------------------------------------------------------------------------------- diff


def changed(farm, *args: str) -> set[str]:
    """The files of a diff."""
    return set(re.findall(r"^diff --git a/(\S+)", farm.ok("diff", *args), re.MULTILINE))


def test_diff_of_submitted_work_is_its_own_whatever_the_target_has_since(farm):
    farm.ok("add", "one")
    farm.submit(A, {"mine.txt": "x\n"})
    git(farm.repo, "update-ref", "refs/heads/main", make_commit(farm.repo, {"theirs.txt": "y\n"}))
    git(farm.repo, "reset", "-q", "--hard")
    assert changed(farm, "t-0001") == {"mine.txt"}
    assert "mine.txt | 1 +" in farm.ok("diff", "t-0001", "--stat")


def test_diff_of_work_that_goes_on_has_what_is_unsaved_and_leaves_the_index_alone(worked):
    worked.start_work()
    (tree_of(worked) / "README.md").write_text("changed\n")
    before = git(tree_of(worked), "status", "--porcelain")
    index = (worked.git_dir() / "index").read_bytes()
    assert changed(worked, "t-0001") == {"t-0001.txt", "notes.txt", "README.md"}
    assert (worked.git_dir() / "index").read_bytes() == index
    assert git(tree_of(worked), "status", "--porcelain") == before and "?? notes.txt" in before
    worked.ok("down", "--now", timeout=120)


@pytest.mark.parametrize("style", ["merge", "squash", "rebase"])
def test_diff_of_landed_and_of_returned_work(farm, style):
    agent = """[ "$FARM_ATTEMPT" = 1 ] && echo x >BAD || git rm -q BAD
for i in 1 2; do echo $FARM_ATTEMPT >f$i.$FARM_TASK; git add -A; git commit -qm "step $i"; done"""
    farm.ok("add", "one"), farm.ok("add", "other")
    drain(farm, "--style", style, "--gate", "! [ -e BAD ]", agent=agent)
    assert changed(farm, "t-0001", "--attempt", "1") >= {"BAD"}
    assert changed(farm, "t-0001") == {"f1.t-0001", "f2.t-0001"}
    assert json.loads(farm.ok("show", "t-0001", "--json"))["files"][0][0] == "f1.t-0001"
    farm.refused(3, "diff", "t-0001", "--attempt", "7")


def test_diff_of_returned_work_is_that_of_its_kept_ref(farm):
    farm.ok("add", "one")
    farm.submit(A, {"BAD": "x\n"})
    farm("merge", "--gate", "! [ -e BAD ]")
    assert farm.task("t-0001")["start"].startswith("refs/farm/returned/")
    assert changed(farm, "t-0001") == changed(farm, "t-0001", "--attempt", "1") == {"BAD"}


def test_diff_runs_nothing_that_an_agent_has_named(farm, sandbox):
    mark = sandbox.root / "ran"
    git(farm.repo, "config", "diff.external", f"touch {mark}")
    git(farm.repo, "config", "diff.evil.textconv", f"touch {mark}; cat")
    git(farm.repo, "config", "diff.evil.command", f"touch {mark}")
    farm.ok("add", "one")
    farm.submit(A, {"f.txt": "x\n", ".gitattributes": "* diff=evil\n"})
    assert "+x" in farm.ok("diff", "t-0001") and not mark.exists()


def test_a_pager_of_the_users_gets_the_diff_on_a_terminal(farm, screen):
    farm.ok("add", "one")
    farm.submit(A, {"f.txt": "x\n"})
    one: Screen = screen("diff", "t-0001", env={**os.environ, "GIT_PAGER": "sed s/^/paged:/"})
    assert one.end() == 0 and "paged:" in one.read()
    done = run(farm.argv("diff", "t-0001"), env={"GIT_PAGER": "sed s/^/paged:/"})
    assert "paged:" not in done.stdout and "\x1b" not in done.stdout and "+x" in done.stdout


def test_the_difftool_is_that_of_the_users_own_settings(farm, sandbox):
    farm.ok("add", "one"), farm.ok("add", "two")
    farm.submit(A, {"f.txt": "x\n", "g.txt": "y\n"})
    assert "no difftool is set" in farm.refused(3, "diff", "t-0001", "--tool")
    mark, seen = sandbox.root / "ran", sandbox.root / "seen"
    git(farm.repo, "config", "--global", "diff.tool", "mine")
    git(farm.repo, "config", "--global", "difftool.mine.cmd", f'cat "$REMOTE" >>{seen}')
    for key in ("diff.external", "difftool.mine.cmd"):
        git(farm.repo, "config", key, f"touch {mark}")
    git(farm.repo, "config", "diff.tool", "other")
    farm.ok("diff", "t-0001", "--tool")
    assert (seen.read_text(), mark.exists()) == ("x\ny\n", False)


# ---------------------------------------------------------------------------------------------- edit, filters


def test_edit_changes_what_it_is_told_and_no_more(farm):
    farm.ok("add", "one", "--prompt", "p", "--path", "a b/**"), farm.ok("add", "two")
    before = farm.task("t-0001")
    farm.ok("edit", "t-0001", "--priority", "7", "--after", "t-0002")
    now = farm.task("t-0001")
    assert [now.pop(key) for key in ("priority", "after", "state")] == [7, ["t-0002"], "waiting"]
    assert "t-0002" in now.pop("waits")
    assert now == {key: value for key, value in before.items() if key != "state"} | {"rev": 2}
    farm.ok("edit", "t-0001", "--after", "", "--prompt", "other", "--title", "new", "--max-attempts", "9")
    told = json.loads(farm.ok("show", "t-0001", "--json"))
    assert (told["state"], told["prompt"], told["title"], told["max_attempts"]) == ("pending", "other", "new", 9)
    assert "would wait for itself" in farm.refused(2, "edit", "t-0001", "--after", "t-0001")
    assert "no such task" in farm.refused(2, "edit", "t-0001", "--after", "t-0099")
    farm.refused(2, "edit", "t-0001", "--title", " "), farm.refused(3, "edit", "t-0099", "--title", "x")
    assert farm.task("t-0001")["rev"] == 3


def test_edit_opens_the_editor_as_git_does(farm, sandbox):
    farm.ok("add", "one", "--prompt", "first\n\nsecond: with a colon", "--path", "a b/**")
    farm.refused(3, "edit", "t-0001", env={"EDITOR": "true"})
    script = "sed -i.bak -e 's/^title: one$/title: better/' -e 's/^priority: 0$/priority: -3/' -e 's/second/2nd/'"
    farm.ok("edit", "t-0001", env={"EDITOR": "false", "GIT_EDITOR": script})
    told = json.loads(farm.ok("show", "t-0001", "--json"))
    assert (told["title"], told["priority"], told["paths"]) == ("better", -3, ["a b/**"])
    assert told["prompt"] == "first\n\n2nd: with a colon"
    git(farm.repo, "config", "core.editor", "false")  # an agent could have set it
    git(farm.repo, "config", "--global", "core.editor", "sed -i.bak 's/^title: better$/title: best/'")
    farm.ok("edit", "t-0001", env={"EDITOR": "false"}, cwd=farm.repo)
    git(farm.repo, "config", "--global", "--unset", "core.editor")
    assert farm.task("t-0001")["title"] == "best"
    said = farm.refused(2, "edit", "t-0001", env={"EDITOR": "sed -i.bak 's/^priority: .*/priority: high/'"})
    assert "priority must be a number" in said
    meanwhile = f"farm() {{ {' '.join(farm.argv('edit', 't-0001', '--priority', '1'))}; }}; farm; echo more >>"
    said = farm.refused(4, "edit", "t-0001", env={"EDITOR": meanwhile})
    kept = re.search(r"your text is in (\S+)", said)[1]
    assert "has moved" in said and open(kept).read().endswith("more\n") and farm.task("t-0001")["priority"] == 1


def test_edit_of_what_somebody_holds_is_refused_and_says_who(farm):
    farm.ok("add", "one")
    farm.submit(A, {"a": "a"})
    assert "t-0001 is ready" in farm.refused(4, "edit", "t-0001", "--priority", "1")
    farm.ok("add", "two"), farm.claim(A)
    assert f"held by {A}" in farm.refused(4, "edit", "t-0002", env={"EDITOR": "touch /nonexistent/opened; false"})
    farm("merge")
    farm.refused(4, "edit", "t-0001", "--priority", "1")


def test_tasks_are_filtered_and_sorted(farm):
    for number, title in enumerate(("Fix the login", "fix the logout", "Write docs")):
        farm.ok("add", title, "--priority", str(number))
    farm.claim(A), farm.ok("cancel", "t-0002")

    def ids(*args: str) -> list[str]:
        return [line.split("\t")[0] for line in farm.ok("tasks", *args).splitlines()]

    assert ids("--match", "FIX") == ["t-0001", "t-0002"] and ids("--agent", "1") == ids("--state", "claimed") == ["t-0003"]
    assert ids("--sort", "priority") == ["t-0003", "t-0002", "t-0001"] and ids() == ["t-0001", "t-0002", "t-0003"]
    assert ids("--state", "pending", "--state", "canceled", "--sort", "title") == ["t-0001", "t-0002"]
    assert "added_at" in farm.refused(2, "tasks", "--sort", "colour") and ids("--match", "nothing") == []


def test_many_are_canceled_and_retried_at_once(farm):
    for title in ("Fix a", "Fix b", "Keep c"):
        farm.ok("add", title, "--max-attempts", "1")
    farm.refused(3, "retry", "--failed")
    for number in (1, 3):
        claim = farm.claim(A, "--id", f"t-000{number}")
        farm.ok("fail", A, "--fence", claim["fence"], "--why", "x")
    farm.ok("retry", "--failed")
    assert [task["state"] for task in farm.json("tasks")] == ["pending"] * 3
    farm.claim(A, "--id", "t-0001")
    assert f"held by {A}" in farm.refused(4, "cancel", "--match", "fix")
    assert [task["state"] for task in farm.json("tasks")] == ["claimed", "canceled", "pending"]
    farm.refused(3, "cancel", "--match", "nothing"), farm.refused(2, "cancel")


# ---------------------------------------------------------------------------------------------- revert


@pytest.mark.parametrize("style", ["merge", "squash", "rebase"])
def test_a_revert_takes_out_what_a_task_has_landed_and_nothing_else(farm, style):
    agent = """for i in 1 2; do echo $i >>f.$FARM_TASK; git add -A; git commit -qm "step $i"; done"""
    for number in range(3):
        farm.ok("add", f"task {number}", "--prompt", "the prompt")
    drain(farm, "--style", style, "--gate", "true", agent=agent)
    before = git(farm.repo, "ls-tree", "--name-only", "main").split()
    assert farm.ok("revert", "t-0002", "--retry").split() == ["revert-t-0002", "t-0004"]
    assert farm.task("revert-t-0002")["state"] == "ready" and "+" not in farm.ok("diff", "revert-t-0002", "--stat")
    second = int(time.time())
    wait_until(lambda: int(time.time()) > second, message="another second, in which a commit is another one")
    assert "revert-t-0002 already" in farm.refused(2, "revert", "t-0002")
    pin = git(farm.repo, "rev-parse", "refs/farm/ready/revert-t-0002")
    assert pin == farm.task("revert-t-0002")["commit"], "its pin keeps the work that is in the queue"
    log = farm.repo.parent / "gated"
    farm.ok("merge", "--style", style, "--gate", f"ls >>{log}")
    assert git(farm.repo, "ls-tree", "--name-only", "main").split() == [name for name in before if name != "f.t-0002"]
    assert "f.t-0001" in log.read_text() and "f.t-0002" not in log.read_text()
    again = json.loads(farm.ok("show", "t-0004", "--json"))
    assert (again["state"], again["title"]) == ("pending", "task 1")
    assert again["prompt"].startswith("the prompt\n\nThis was done before")
    assert farm.ok("revert", "revert-t-0002") == "revert-revert-t-0002"
    farm.ok("merge", "--style", style, "--gate", "true")
    assert sorted(git(farm.repo, "ls-tree", "--name-only", "main").split()) == sorted(before)
    assert farm.ok("revert", "t-0002") == "revert-t-0002.2"


def test_a_revert_that_conflicts_comes_back_with_the_hunks_and_a_red_one_lands_not(farm):
    farm.ok("add", "one"), farm.ok("add", "two")
    farm.submit(A, {"README.md": "first\n"})
    farm.ok("merge")
    farm.refused(4, "revert", "t-0002"), farm.refused(3, "revert", "t-0009")
    farm.submit(A, {"README.md": "second\n"})
    farm.ok("merge")
    farm.ok("revert", "t-0001")
    assert farm("merge").returncode == 5
    back = farm.task("revert-t-0001")
    assert back["state"] in ("waiting", "pending") and "conflicts with main in README.md" in back["reason"]
    assert "<<<<<<< main\nsecond\n=======" in (farm.folder / "returns/revert-t-0001.1.txt").read_text()
    farm.ok("revert", "t-0002")
    assert farm("merge", "--gate", "grep second README.md").returncode == 5
    assert git(farm.repo, "show", "main:README.md") == "second"
    farm.ok("retry", "revert-t-0001")
    assert farm.claim(A, "--id", "revert-t-0001")["task"]["start"].startswith("refs/farm/returned/revert-t-0001/")

"""A remote that refuses what lands, and the pull request from a branch of the farm's own."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from farm_calls import A, Caller
from sandbox import git, wait_until

HOOK = """#!/bin/sh
[ -e "$GIT_DIR/open" ] && { echo 'Create a pull request by visiting: https://forge.example/new?x=1'; exit 0; }
printf 'error: GH006: Protected branch update failed for refs/heads/main.\\n'
printf 'error: Changes must be made through a \\033[31mpull request\\033[0m.\\n'
exit 1
"""
GH = """#!/bin/bash
{ printf '%q ' "$@"; printf 'in %s\\n' "$PWD"; } >>"$HOME/gh.calls"
case "$1 $2" in
  "pr list") [ ! -e "$HOME/opened" ] || echo 7 ;;
  "pr create") cat >"$HOME/opened"; echo https://forge.example/pull/7 ;;
  "pr edit") cat >"$HOME/opened"; echo https://forge.example/pull/7 ;;
  *) exit 9 ;;
esac
"""


@pytest.fixture
def hub(sandbox) -> Path:
    """A bare remote whose hook refuses each push until it has a file `open`."""
    hub = sandbox.work / "hub.git"
    git(sandbox.work, "init", "-q", "--bare", "-b", "main", hub)
    return hub


@pytest.fixture
def farm(make_repo, hub) -> Caller:
    repo = make_repo("app", files={"a.txt": "one\n"})
    git(repo, "remote", "add", "origin", hub)
    git(repo, "push", "-q", "-u", "origin", "main")
    hook = hub / "hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(HOOK)
    hook.chmod(hook.stat().st_mode | stat.S_IXUSR)
    return Caller(repo, os.getpid())


def test_a_refused_push_says_it_in_the_remotes_words_and_is_tried_again(farm, hub):
    farm.ok("add", "one")
    farm.submit(A, {"f": "x"})
    before = git(farm.repo, "rev-parse", "main")
    said = farm.refused(1, "merge", "--gate", "true", "--remote", "origin")
    assert "Protected branch update failed" in said and "made through a pull request" in said and "\x1b" not in said
    assert "pre-receive hook declined" in said
    assert farm.task("t-0001")["state"] == "ready" and git(farm.repo, "rev-parse", "main") == before
    watching = farm.start("merge", "--watch", "--gate", "true", "--remote", "origin")
    try:
        trouble = wait_until(lambda: json.loads(farm("status", "--json").stdout)["trouble"], 30, "what is shown as blocked")
        assert "Protected branch update failed" in trouble[0] and "Protected branch" in farm("status").stdout
        assert "\x1b" not in trouble[0] and git(hub, "rev-parse", "main") == before
        (hub / "open").touch()
        wait_until(lambda: farm.task("t-0001")["state"] == "landed", 60, "the landing, without a word of ours")
    finally:
        watching.terminate()
        said = watching.communicate(timeout=30)[1]
    assert git(hub, "rev-parse", "main") == git(farm.repo, "rev-parse", "main") != before
    assert said.count("could not push") <= 6, "it was tried again without a pause"


def test_no_network_loses_nothing_and_says_so(farm, hub):
    git(farm.repo, "remote", "set-url", "origin", "/nowhere/hub.git")
    farm.ok("add", "one")
    farm.submit(A, {"f": "x"})
    assert "'/nowhere/hub.git' does not appear to be a git repository" in farm.refused(1, "merge", "--gate", "true",
                                                                                      "--remote", "origin")
    assert farm.task("t-0001")["state"] == "ready"


@pytest.mark.parametrize("has_gh", [True, False], ids=["gh", "no gh"])
def test_a_branch_of_the_farms_own_has_one_pull_request_with_the_tasks_in_it(farm, hub, sandbox, monkeypatch, has_gh):
    (hub / "open").touch()
    git(farm.repo, "branch", "agents"), git(farm.repo, "push", "-q", "origin", "agents")
    tools = sandbox.root / "tools"
    tools.mkdir()
    if has_gh:
        (tools / "gh").write_text(GH)
        (tools / "gh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    land = ("merge", "--gate", "true", "--remote", "origin", "--into", "agents")
    env = {"FARM_PULL_REQUEST": "yes"}
    for number, title in enumerate(("Fix it, closes #1 @team", "two \x1b[2J`rm`")):
        farm.ok("add", title)
        farm.submit(A, {f"f{number}": "x"})
        done = farm(*land, env=env)
        assert done.returncode == 0, done.stderr
        assert "https://forge.example/" + ("pull/7" if has_gh else "new?x=1") in done.stderr
    assert git(hub, "ls-tree", "--name-only", "agents").split() == ["a.txt", "f0", "f1"]
    assert git(hub, "ls-tree", "--name-only", "main").split() == ["a.txt"]
    if not has_gh:
        return
    calls = (sandbox.home / "gh.calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls] == [["pr", "list"], ["pr", "create"], ["pr", "list"], ["pr", "edit"]]
    assert "--head agents --base main" in calls[1] and "edit 7 --body-file -" in calls[3] and f"in {farm.repo}" in calls[3]
    text = (sandbox.home / "opened").read_text()
    assert "\n    t-0001 Fix it, closes #1 @team\n    t-0002 two `rm`" in text.replace("two  ", "two ") and "\x1b" not in text


def test_a_forge_that_fails_stops_no_landing(farm, hub, sandbox, monkeypatch):
    (hub / "open").touch()
    git(farm.repo, "branch", "agents"), git(farm.repo, "push", "-q", "origin", "agents")
    (sandbox.root / "gh").write_text("#!/bin/sh\necho 'HTTP 401: Bad credentials' >&2; exit 1\n")
    (sandbox.root / "gh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{sandbox.root}:{os.environ['PATH']}")
    farm.ok("add", "one")
    farm.submit(A, {"f": "x"})
    done = farm("merge", "--gate", "true", "--remote", "origin", "--into", "agents", env={"FARM_PULL_REQUEST": "yes"})
    assert done.returncode == 0 and "no pull request: HTTP 401: Bad credentials" in done.stderr
    assert farm.task("t-0001")["state"] == "landed"

"""Another TMUX_TMPDIR, a new key in the environment, a terminal that nobody knows, hints that can be typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from farm_calls import FARM, A, Caller
from paths import ROOT, SCRIPTS
from sandbox import git, run, wait_until


@pytest.fixture
def elsewhere(sandbox) -> dict[str, str]:
    (sandbox.tmux / "t").mkdir()
    return {"TMUX_TMPDIR": str(sandbox.tmux / "t")}


def state_of(app: Caller, name: str = A) -> str:
    return next((agent["state"] for agent in app.json("status")["agents"] if agent["agent"] == name), "")


def test_a_shell_with_another_tmux_tmpdir_reaches_the_same_sessions(app, elsewhere):
    app.ok("add", "one")
    app.ok("up", "-n", "1", "--agent", "sleep 3; echo x >f", "--gate", "true", env=elsewhere)
    wait_until(lambda: state_of(app) == "working", 20, "it at work")
    assert "0 agents started, 1 were running" in app("up", "-n", "1").stderr
    wait_until(lambda: app.task("t-0001")["state"] == "landed", 30, "its landing")
    assert app.task("t-0001")["attempts"] == 0
    app.ok("down", "--now", timeout=60)
    assert run(["tmux", "-L", "x", "ls"
                ]).returncode and not list(Path(elsewhere["TMUX_TMPDIR"]).rglob("farm-app-*.lock"))


def test_a_socket_that_somebody_tidied_away_is_made_anew(app):
    app.ok("add", "one")
    app.ok("up", "-n", "1", "--agent", "sleep 1000")
    wait_until(lambda: state_of(app) == "working", 20, "it at work")
    socket = Path((app.repo / ".git/farm/tmux").read_text().split("\t")[0])
    for _ in range(5):
        socket.unlink()
        askers = [app.start("status") for _ in range(3)]
        for asker in askers:
            asker.communicate(timeout=30)
        wait_until(socket.exists, 20, "the socket made anew")
    assert state_of(app) == "working"
    events = [json.loads(line)["event"] for line in (app.repo / "coordination/events.jsonl").read_text().splitlines()]
    assert events.count("session-started") == 1 and "session-ended" not in events, "nobody took it for dead"
    app.ok("down", "--now", timeout=60)


def test_up_brings_what_the_shell_has_now_to_idle_agents_gates_and_later_to_busy_ones(app, tmp_path):
    agent = (f"echo \"$FARM_AGENT_NAME $KEY ${{GONE-none}}\" >>{tmp_path}/seen; "
             f"[ ! -e {tmp_path}/hold ] || sleep 4; echo x >$FARM_TASK")
    gate = f"echo gate $KEY >>{tmp_path}/gates"
    app.ok("up", "-n", "1", "--agent", agent, "--gate", gate, env={"KEY": "old-secret", "GONE": "there"})
    app.ok("add", "one")
    (tmp_path / "hold").touch()
    wait_until((tmp_path / "seen").exists, 20, "the first task")
    said = app("up", "-n", "2", "--agent", agent, "--gate", gate, env={"KEY": "new-secret"}).stderr
    assert "KEY" in said and "GONE" in said and "secret" not in said
    (tmp_path / "hold").unlink()
    for number in range(4):
        app.ok("add", f"more {number}")
    wait_until(lambda: len(app.json("tasks")) == sum(task["state"] == "landed" for task in app.json("tasks")), 60,
               "all landed")
    app.ok("down", "--now", timeout=60)
    lines = (tmp_path / "seen").read_text().splitlines()
    assert lines[0] == f"{A} old-secret there" and {line.split(" ", 1)[1] for line in lines[1:]} == {"new-secret none"}
    assert (tmp_path / "gates").read_text().splitlines()[-1] == "gate new-secret"
    assert "secret" not in "".join(path.read_text() for path in (app.repo / ".git/farm").iterdir() if path.is_file())


def test_scripts_go_without_the_start_file_and_the_functions_of_the_shell_and_agents_gates_and_setup_have_it(app, tmp_path):
    """A cluster's BASH_ENV defines `module`; one that prints, or a function called `git`, is no part of what scripts say."""
    start = tmp_path / "start.sh"
    start.write_text("echo hello; tool() { printf '%s\n' $1; }\n")
    setup = app.repo / ".farm/setup"
    setup.parent.mkdir()
    setup.write_text(f"#!/bin/bash\ntool prepared >>{tmp_path}/setup\n")
    setup.chmod(0o755)
    env = {"BASH_ENV": str(start)}
    for name in ("git", "printf", "mkdir", "grep"):
        env[f"BASH_FUNC_{name}%%"] = f"() {{ echo noise; command {name} \"$@\"; }}"
    app.ok("add", "one", env=env)
    done = app("run", "-n", "1", "--agent", "tool x >$FARM_TASK", "--gate", f"tool green >>{tmp_path}/gate",
               "--until-drained", env={**env, "FARM_NOTIFY": f"tool told >>{tmp_path}/notice"}, timeout=90)
    assert (done.returncode, git(app.repo, "show", "main:t-0001")) == (0, "x"), done.stderr
    seen = [(tmp_path / name).read_text().splitlines()[0] for name in ("setup", "gate", "notice")]
    assert seen == ["prepared", "green", "told"]
    assert "hello" not in app.ok("status", env=env)


def test_a_farm_goes_on_when_the_shells_own_tmpdir_is_gone(app, tmp_path):
    """That of nix-shell goes with the shell."""
    temp = tmp_path / "temp"
    temp.mkdir()
    app.ok("up", "-n", "1", "--agent", "sleep 1; echo x >$FARM_TASK", "--gate", "true", env={"TMPDIR": str(temp)})
    shutil.rmtree(temp)
    for name in ("one", "two"):
        app.ok("add", name, env={"TMPDIR": str(temp)})
    app.ok("up", "-n", "2", "--agent", "sleep 1; echo x >$FARM_TASK", "--gate", "true", env={"TMPDIR": str(temp)})
    wait_until(lambda: [task["state"] for task in app.json("tasks")] == ["landed", "landed"], 60, "both landed")
    app.ok("down", "--now", timeout=60)


def test_a_terminal_that_this_host_does_not_know_is_taken_for_a_common_one(app):
    app.ok("up", "-n", "1", "--agent", "sleep 1000")
    words = f"{sys.executable} {FARM} --repo {app.repo} attach 1"
    done = subprocess.run(["script", "-qc", f"timeout 3 {words}", "/dev/null"],
                          env={**os.environ, "TERM": "xterm-nobody"}, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=30)
    assert "does not know the terminal 'xterm-nobody'" in done.stdout and "no session" not in done.stdout
    app.ok("down", "--now", timeout=60)


@pytest.mark.parametrize(("argv", "cwd", "typed"), [
    ([sys.executable, "farm.py"], ROOT, "./farm.py --repo {repo}"),
    ([str(FARM)], Path("/"), f"{FARM} --repo {{repo}}"),
    ([str(SCRIPTS / "farm")], Path("/"), f"{FARM} --repo {{repo}}"),
], ids=["in its folder", "by its path", "by the shim"])
def test_a_hint_can_be_typed_where_the_reader_stands(app, argv, cwd, typed):
    done = run([*argv, "--repo", app.repo, "attach", "7"], cwd=cwd)
    hint = done.stderr.split("  try: ")[1].strip()
    assert hint == typed.format(repo=app.repo) + " status"
    assert run(["bash", "-c", hint], cwd=cwd).returncode == 0


def test_a_hint_for_a_repo_with_a_blank_in_its_name_is_one_word(make_repo, sandbox):
    repo = make_repo("my app")
    done = run([sys.executable, FARM, "--repo", repo, "nonsense"], cwd=sandbox.home)
    assert run(["bash", "-c", done.stderr.split("  try: ")[1].strip()], cwd=sandbox.home).returncode == 0


def test_no_hint_of_an_agents_verb_names_a_file(app):
    app.ok("add", "one")
    app.claim(A)
    done = run([SCRIPTS / "farm", "--repo", app.repo, "submit", A, "--fence", "t-0009.1"], env={"FARM_TASK": "t-0001"})
    assert "try: farm tasks" in done.stderr


def test_doctor_names_what_blocks_a_repo_with_the_command_that_mends_it(app):
    repo = app.repo
    (repo / ".git/index.lock").touch()
    assert "index.lock" in app("doctor").stdout
    (repo / ".git/index.lock").unlink()
    git(repo, "branch", "other")
    (repo / "a.txt").write_text("two\n")
    git(repo, "commit", "-qam", "two")
    for what, words, undo in (("merge", ["merge", "x"], "merge"), ("cherry-pick", ["cherry-pick", "x"], "cherry-pick"),
                              ("rebase", ["rebase", "x"], "rebase")):
        git(repo, "checkout", "-q", "-B", "x", "other")
        (repo / "a.txt").write_text("three\n")
        git(repo, "commit", "-qam", "three")
        git(repo, "checkout", "-q", "main")
        run(["git", "-C", repo, *words])
        shown = app("doctor").stdout
        assert f"a {what} is in the middle" in shown and f"{undo} --abort" in shown
        git(repo, undo, "--abort")
    git(repo, "bisect", "start")
    assert "bisect reset" in app("doctor").stdout


def test_doctor_sees_landed_work_that_the_target_has_lost(app):
    app.ok("add", "one")
    app.ok("run", "-n", "1", "--agent", "echo x >f", "--gate", "true", "--until-drained", timeout=60)
    assert "any more" not in app("doctor").stdout
    git(app.repo, "reset", "-q", "--hard", "HEAD~1")
    assert "does not have" in app("doctor").stdout


def test_gits_own_words_are_passed_on(app):
    (app.repo / ".git/config").write_text("[core\n")
    shown = app("doctor").stdout + app("up", "-n", "1", "--agent", "true").stderr
    assert "bad config" in shown and "is not a git repository" not in shown


def test_what_an_agent_changes_that_all_share_is_named_with_its_agent_and_the_way_back(app):
    app.ok("add", "one")
    agent = "git config user.name Evil; git config core.hooksPath /nowhere; echo x >f; sleep 1000"
    app.ok("up", "-n", "1", "--agent", agent, "--gate", "true")
    wait_until(lambda: "core.hookspath" in app("status").stdout, 60, "the loop's look")
    shown = app("doctor").stdout
    assert "user.name was" in shown and f"at work then: {A}" in shown and "config --local --unset-all core.hookspath" in shown
    app.ok("down", "--now", timeout=60)
    app.ok("up", "-n", "1", "--agent", "true")
    assert "core.hookspath" not in app("status").stdout, "a person's up has found it good"
    app.ok("down", "--now", timeout=60)


def test_merges_keep_the_identity_that_the_farm_began_with(app):
    app.ok("add", "one")
    app.ok("run", "-n", "1", "--agent", "git config user.name Evil; echo x >f", "--gate", "true", "--until-drained",
            timeout=60)
    assert git(app.repo, "log", "-1", "--format=%cn", "main") == "Test Person"


def test_a_red_target_names_the_agent_that_has_pushed_there(app):
    git(app.repo, "checkout", "-q", "--detach")
    app.ok("add", "-f", "-", input="bad\ngood\n")
    agent = (
        "case $FARM_TASK in t-0001) echo BAD >bad; git add -A; git commit -qm bad; git push -q . HEAD:main; sleep 1000;; "
        "*) until git cat-file -e main:bad; do sleep 0.1; done 2>/dev/null; echo x >f;; esac")
    app.ok("up", "-n", "2", "--agent", agent, "--gate", "test ! -e bad", "--into", "main")
    wait_until(lambda: "itself is red" in app("status").stdout, 40, "the red target")
    holder = next(agent["agent"] for agent in app.json("status")["agents"] if agent["task"] == "t-0001")
    assert f"that commit was made by {holder} for t-0001" in app("status").stdout
    app.ok("down", "--now", timeout=60)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full: Linux")
def test_where_nothing_can_be_told_the_work_goes_on(app):
    """stderr is a log on a full disk, or a terminal that is gone."""
    app.ok("add", "one")
    with open("/dev/full", "w") as full:
        argv = app.argv("run", "-n", "1", "--agent", "echo x >f", "--gate", "true", "--until-drained")
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=full, timeout=120)
    assert (done.returncode, app.task("t-0001")["state"]) == (0, "landed")


def make_locale(folder: Path) -> dict[str, str]:
    """The environment of a user on an old system, whose locale is German in ISO-8859-1."""
    made = shutil.which("localedef") and run(["localedef", "-i", "de_DE", "-f", "ISO-8859-1", folder / "de_DE.ISO-8859-1"])
    if not made or not (folder / "de_DE.ISO-8859-1").exists():
        pytest.skip("no locale can be made here (localedef, and its sources)")
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1"}


def test_text_is_utf_8_whatever_the_locale_says(app, sandbox):
    env = make_locale(sandbox.root)
    title = "„Über“ ✓"
    app.ok("add", title, env=env)
    app.ok("run", "-n", "1", "--agent", 'echo "$FARM_TITLE" >ü.txt; echo ✓', "--gate", "echo ✓; ls", "--until-drained", env=env)
    assert title in app.ok("tasks", env=env) and title in app.ok("show", "t-0001", env=env) and "✓" in app.ok("logs", "1", env=env)
    assert git(app.repo, "show", "main:ü.txt") == title and title in git(app.repo, "log", "-1", "--format=%s", "main")
    assert json.loads(app.ok("tasks", "--json", env=env))[0]["title"] == title

"""One cause that fails everything uses up nobody's attempts, says itself once, and is tried again; reasons are this
attempt's."""

from __future__ import annotations

import json
import time

import pytest
from farm_calls import Caller
from sandbox import git, run, wait_until

LIMITED = {"FARM_GRACE_SECONDS": "2"}


def run_all(app: Caller, agent: str, tasks: int = 6, gate: str = "true", **env: str):
    app.ok("add", "-f", "-", input="".join(f"task {number}\n" for number in range(tasks)))
    return app("run", "-n", "3", "--agent", agent, "--gate", gate, "--until-drained", env={**LIMITED, **env},
                timeout=90)


def attempts(app: Caller) -> int:
    return sum(task["attempts"] for task in app.json("tasks"))


@pytest.mark.parametrize(("agent", "words"), [
    ("bash -c ./tools/no-such-agent", "not found: ./tools/no-such-agent"),
    ("true; no-such-cli --flag", "not found: no-such-cli"),
    ("exec /etc/passwd", "cannot execute: /etc/passwd"),
], ids=["path", "command", "may not be run"])
def test_a_command_that_cannot_start_costs_no_attempt_and_says_what_is_missing(app, agent, words):
    done = run_all(app, agent)
    assert (done.returncode, attempts(app)) == (5, 0)
    assert done.stderr.count("limited") == 1 and words in done.stderr
    assert words in json.dumps(app.json("tasks"))


def test_the_same_quick_end_of_different_tasks_pauses_and_most_attempts_are_kept(app):
    done = run_all(app, "echo 'unknown option --fast' >&2; exit 2", tasks=8)
    assert done.returncode == 5 and attempts(app) <= 4 and "unknown option --fast" in done.stderr


def test_a_lone_task_that_fails_quickly_uses_its_attempts_up(app):
    done = run_all(app, "exit 1", tasks=1)
    assert done.returncode == 5 and app.task("t-0001")["state"] == "failed"


def test_after_the_pause_one_agent_tries_and_a_success_opens_the_way(app, tmp_path):
    agent = f"[ -e {tmp_path}/mended ] || exec no-such-cli; echo x >\"$FARM_TASK\""
    assert run_all(app, agent, tasks=3).returncode == 5
    (tmp_path / "mended").touch()
    limits = app.folder / "limits.json"
    data = json.loads(limits.read_text())
    for limit in data["presets"].values():
        limit["until"] = "2020-01-01T00:00:00Z"
    limits.write_text(json.dumps(data))
    assert app("run", "-n", "3", "--agent", agent, "--gate", "true", "--until-drained", env={"FARM_AS_TOLD": "1"},
                timeout=90).returncode == 0
    assert attempts(app) == 0 and json.loads(limits.read_text())["presets"] == {}


def test_a_hook_that_no_message_satisfies_is_a_fault_of_the_setup(app):
    hook = app.repo / ".git/hooks/commit-msg"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'TICKET-123 is missing' >&2\nexit 1\n")
    hook.chmod(0o755)
    done = run_all(app, "echo x >\"$FARM_TASK\"", tasks=8)
    assert done.returncode == 5 and attempts(app) <= 4 and "TICKET-123 is missing" in done.stderr
    assert git(app.repo, "for-each-ref", "refs/farm/rescue"), "its work is not kept"


@pytest.mark.parametrize("program", ["false", "sh -c 'sleep 1000' x"], ids=["no key", "nobody answers"])
def test_signing_that_does_not_work_is_said_by_up_and_doctor_before_any_work(app, program, sandbox):
    fake = sandbox.root / "gpg"
    fake.write_text(f"#!/bin/sh\nexec {program}\n")
    fake.chmod(0o755)
    for key, value in (("commit.gpgSign", "true"), ("gpg.program", fake)):
        git(app.repo, "config", key, value)
    assert "cannot be signed" in app.refused(4, "up", "-n", "1", "--agent", "true")
    assert "cannot be signed" in app("doctor", timeout=60).stdout


def test_a_person_whose_name_git_does_not_know_hears_it_before_any_work(app):
    git(app.repo, "config", "user.useConfigOnly", "true")
    for key in ("user.name", "user.email"):
        run(["git", "-C", app.repo, "config", "--unset", key])
    nobody = {"GIT_CONFIG_GLOBAL": "/dev/null"}
    assert "whose name" in app.refused(4, "up", "-n", "1", "--agent", "true", env=nobody)
    assert "whose name" in app("doctor", env=nobody).stdout
    named = {f"GIT_{who}_{what}": "me@x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    app.ok("add", "one")
    app.ok("run", "-n", "1", "--agent", "echo x >f", "--gate", "true", "--until-drained", env={**nobody, **named}, timeout=60)


def test_a_path_is_looked_up_where_the_agent_will_run(app):
    assert "./agent.sh" in app.refused(6, "up", "-n", "1", "--agent", "./agent.sh --go")
    (app.repo / "agent.sh").write_text("#!/bin/sh\necho x >f\n")
    (app.repo / "agent.sh").chmod(0o755)
    git(app.repo, "add", "-A")
    git(app.repo, "commit", "-q", "-m", "agent")
    app.ok("add", "one")
    app.ok("run", "-n", "1", "--agent", "./agent.sh --go", "--gate", "true", "--until-drained", timeout=60)


def test_a_reason_has_whole_lines_of_this_attempt_only(app):
    app.ok("add", "-f", "-", input="first\nsecond\n")
    words = "$(printf 'word %.0s' $(seq 12))"
    agent = f'echo "said by $FARM_TASK"; for i in 1 2 3 4 5 6; do echo "line $i {words}"; done; sleep 0.3; exit 3'
    app("run", "-n", "1", "--agent", agent, "--until-drained", env={**LIMITED, "FARM_MAX_ATTEMPTS": "1"}, timeout=60)
    for task in app.json("tasks"):
        said = task["reason"].partition("exit code 3: ")[2]
        assert said.startswith("line ") and said.endswith("word")


# -- gates


def test_a_gate_that_cannot_run_is_no_verdict_and_the_run_ends(app):
    done = run_all(app, "echo x >\"$FARM_TASK\"", 1, "no-such-gate --all")
    assert done.returncode == 5 and "not found: no-such-gate" in done.stderr and "itself is red" not in done.stderr
    assert app.task("t-0001")["state"] == "ready" and attempts(app) == 0


def test_a_gate_that_one_task_has_taken_away_blames_that_task(app):
    (app.repo / "gate.sh").write_text("#!/bin/sh\nexit 0\n")
    (app.repo / "gate.sh").chmod(0o755)
    git(app.repo, "add", "-A")
    git(app.repo, "commit", "-q", "-m", "gate")
    app.ok("add", "one", "--max-attempts", "1")
    app("run", "-n", "1", "--agent", "git rm -q gate.sh", "--gate", "./gate.sh", "--until-drained", env=LIMITED,
         timeout=60)
    assert app.task("t-0001")["state"] == "failed"


def test_a_wrong_gate_is_known_before_the_first_task_is_done(app):
    app.ok("add", "one")
    app.ok("up", "-n", "1", "--agent", "sleep 1000", "--gate", "no-such-gate")
    wait_until(lambda: "not found: no-such-gate" in app("status").stdout, 60, "the gate's fault")
    app.ok("down", "--now", timeout=60)


def test_a_good_target_is_gated_once_at_the_start(app, tmp_path):
    app.ok("up", "-n", "1", "--agent", "true", "--gate", f"echo x >>{tmp_path}/gated")
    wait_until((tmp_path / "gated").exists, 60, "its gate")
    time.sleep(1.5)
    app.ok("down", "--now", timeout=60)
    assert (tmp_path / "gated").read_text() == "x\n"


# -- ends of a run


def test_a_run_in_which_everybody_is_parked_ends_and_says_so(app):
    app.ok("add", "one")
    app.ok("add", "two", "--after", "t-0001")
    git(app.repo, "branch", "farm/agent-001")
    done = app("run", "-n", "1", "--agent", "true", "--until-drained", env=LIMITED, timeout=60)
    assert done.returncode == 1 and "branch -m" in done.stderr

"""The farm end to end: real git, real tmux, scripted agents."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from paths import ROOT
from repo_calls import AGENT, add_tasks, down, farm, landed_on_main, live_pids, states, status, tasks, up, wait_for_states
from sandbox import commit_files, git, run, wait_until

WAIT_FOR_GO = 'until [ -e "$FARM_REPO/go" ]; do sleep 0.05; done; '


def test_ten_agents_land_twenty_tasks_exactly_once(make_repo):
    repo = make_repo()
    add_tasks(repo, 20)
    up(repo, 10)
    wait_for_states(repo, {"landed": 20})
    assert sorted(landed_on_main(repo)) == [f"t-{number:04d}" for number in range(1, 21)]
    assert all((repo / f"t-{number:04d}.txt").exists() for number in range(1, 21))
    assert git(repo, "status", "--porcelain") == ""
    down(repo)


def test_ten_agents_work_at_the_same_time_each_in_its_own_worktree(make_repo):
    repo = make_repo()
    add_tasks(repo, 10)
    up(repo, 10, WAIT_FOR_GO + AGENT)
    wait_until(lambda: states(repo) == {"claimed": 10}, 30, "ten claims at once")
    working = [agent for agent in status(repo)["agents"] if agent["state"] == "working"]
    assert len({agent["worktree"] for agent in working}) == 10
    assert all(git(agent["worktree"], "branch", "--show-current") == agent["branch"] for agent in working)
    (repo / "go").touch()
    (repo / ".git/info/exclude").write_text("go\n")
    wait_for_states(repo, {"landed": 10})
    down(repo)


def test_up_twice_adopts_what_runs(make_repo):
    repo = make_repo()
    up(repo, 3)
    before = live_pids(repo)
    said = up(repo, 3).stderr
    assert "0 agents started, 3 were running" in said
    assert live_pids(repo) == before
    down(repo)


def test_an_up_with_another_gate_reaches_the_merger_that_runs(make_repo):
    repo = make_repo()
    add_tasks(repo, 1)
    up(repo, 1)
    wait_for_states(repo, {"landed": 1})
    before = live_pids(repo)
    assert "start anew" in up(repo, 1, gate="! test -e t-0002.txt").stderr
    add_tasks(repo, 1, title="one that the new gate refuses", max_attempts=1)
    wait_for_states(repo, {"landed": 1, "failed": 1})
    assert live_pids(repo) == before
    down(repo)


def test_an_up_by_another_version_of_the_toolkit_starts_loop_and_merger_anew(make_repo):
    """Those that run have its old code in memory, and look for its old scripts."""
    repo = make_repo()
    up(repo, 1)
    loop, sessions = status(repo)["loop"]["pid"], live_pids(repo)
    assert "start anew" not in up(repo, 1).stderr
    told = json.loads((repo / "coordination/farm.json").read_text())
    (repo / "coordination/farm.json").write_text(json.dumps({**told, "toolkit": "1.1"}))
    assert "the toolkit has changed: the loop and the merger start anew" in up(repo, 1).stderr
    wait_until(lambda: status(repo)["loop"]["pid"] not in (None, loop), 20, "another loop")
    assert live_pids(repo) == sessions
    down(repo)


def test_a_lock_that_a_dead_agents_claim_ends_for_keeps_its_unsaved_work(make_repo):
    repo = make_repo()
    add_tasks(repo, 1)
    run([ROOT / "scripts/mk-worktrees.sh", "-C", repo, "-n", "1"], check=True)
    owner = subprocess.Popen(["sleep", "60"])
    farm(repo, "claim", "agent-001", "--owner-pid", str(owner.pid), check=True)
    (repo.parent / "repo-farm/agent-001-worktree/unsaved.txt").write_text("precious\n")
    owner.kill()
    owner.wait()
    farm(repo, "lock", "agent-002", "schema", "--owner-pid", str(os.getpid()), check=True)
    rescue = tasks(repo)[0]["rescue"]
    assert git(repo, "show", f"{rescue}:unsaved.txt") == "precious"


def test_two_ups_at_once_make_one_farm(make_repo):
    repo = make_repo()
    argv = [sys.executable, str(ROOT / "farm.py"), "--repo", str(repo), "up", "-n", "4", "--agent", AGENT, "--gate", "true"]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    add_tasks(repo, 4)
    wait_for_states(repo, {"landed": 4})
    assert len(live_pids(repo)) == 4
    assert len(git(repo, "worktree", "list").splitlines()) <= 1 + 4 + 4  # main, agents, at most four gate slots
    down(repo)


def test_down_twice_is_fine_and_leaves_nothing(make_repo):
    repo = make_repo()
    up(repo, 2)
    down(repo)
    down(repo)
    assert live_pids(repo) == {}


def test_two_farms_in_two_repos_do_not_meet(make_repo):
    one, two = make_repo("one"), make_repo("two")
    for repo in (one, two):
        add_tasks(repo, 3)
        up(repo, 2)
    for repo in (one, two):
        wait_for_states(repo, {"landed": 3})
    down(one)
    assert len(live_pids(two)) == 2
    down(two)


def test_the_users_own_tmux_server_is_untouched(make_repo, farm_cleanup):
    repo = make_repo()
    run(["tmux", "-L", "mine", "-f", "/dev/null", "new-session", "-d", "-s", "agent-001", "sleep 300"], check=True)
    before = run(["tmux", "-L", "mine", "list-panes", "-a", "-F", "#{pane_pid} #{session_name}"]).stdout
    up(repo, 2)
    down(repo)
    assert run(["tmux", "-L", "mine", "list-panes", "-a", "-F", "#{pane_pid} #{session_name}"]).stdout == before


def test_the_users_git_config_and_dirty_checkout_are_untouched(make_repo, sandbox):
    repo = make_repo(files={"a.txt": "one\n", "b.txt": "two\n"})
    (repo / "b.txt").write_text("edited by hand\n")
    (repo / "notes.txt").write_text("untracked\n")
    configs = [repo / ".git/config", sandbox.home / ".gitconfig"]
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in configs]
    add_tasks(repo, 3)
    up(repo, 2)
    wait_for_states(repo, {"landed": 3})
    down(repo)
    farm(repo, "clean")
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in configs] == before
    assert (repo / "b.txt").read_text() == "edited by hand\n"
    assert git(repo, "status", "--porcelain").splitlines() == [" M b.txt", "?? notes.txt"]
    assert git(repo, "stash", "list") == ""


def test_a_farm_outlives_the_session_that_started_it(make_repo):
    repo = make_repo()
    add_tasks(repo, 4)
    starter = subprocess.Popen([sys.executable, str(ROOT / "farm.py"), "--repo", str(repo), "up", "-n", "2", "--agent", AGENT,
                                "--gate", "true"], start_new_session=True, stderr=subprocess.DEVNULL)
    starter.wait(60)
    try:
        os.killpg(starter.pid, signal.SIGHUP)
    except ProcessLookupError:
        pass  # nothing of the farm was in that process group
    wait_for_states(repo, {"landed": 4})
    down(repo)


def test_killing_loop_and_merger_stops_nothing_for_long(make_repo):
    repo = make_repo()
    add_tasks(repo, 6)
    up(repo, 2, WAIT_FOR_GO + AGENT)
    wait_until(lambda: states(repo)["claimed"] == 2, 30, "two claims")
    wait_until((repo / "coordination/merger.lock").exists, 30, "a merger")
    for name in ("loop.lock", "merger.lock"):
        pid = (repo / "coordination" / name).read_text().split("\t")[0]
        if pid:
            os.kill(int(pid), signal.SIGKILL)
    (repo / "go").touch()
    wait_for_states(repo, {"landed": 6})
    down(repo)


def test_a_killed_session_gives_its_task_back_and_its_unsaved_work_is_kept(make_repo):
    repo = make_repo()
    add_tasks(repo, 1)
    up(repo, 1, 'echo precious > unsaved.txt; ' + WAIT_FOR_GO + AGENT)
    wait_until((repo.parent / "repo-farm/agent-001-worktree/unsaved.txt").exists, 30, "the agent to write")
    session = psutil.Process(live_pids(repo)["agent-001"])
    for process in [session, *session.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # the children of one that was killed may end by themselves
            process.kill()
    (repo / "go").touch()
    wait_for_states(repo, {"landed": 1})
    rescues = farm(repo, "rescue", "list").stdout.splitlines()
    assert any("precious" in git(repo, "show", f"{line.split(chr(9))[0]}:unsaved.txt") for line in rescues)
    assert tasks(repo)[0]["attempts"] == 1
    down(repo)


def test_an_agent_that_fails_until_its_attempts_are_used_up_leaves_a_failed_task_with_the_reason(make_repo):
    repo = make_repo()
    add_tasks(repo, 1, max_attempts=2)
    done = farm(repo, "run", "-n", "1", "--agent", "echo out of ideas; exit 3", "--gate", "true", "--until-drained")
    assert done.returncode == 5
    task = tasks(repo)[0]
    assert (task["state"], task["attempts"]) == ("failed", 2)
    assert "exit code 3" in task["reason"] and "out of ideas" in task["reason"]


def test_work_that_conflicts_comes_back_and_its_second_attempt_starts_from_its_own_commits(make_repo):
    repo = make_repo(files={"words.txt": "none\n"})
    add_tasks(repo, 2)
    first = WAIT_FOR_GO + 'echo "$FARM_TASK" > words.txt; git commit -qam "first $FARM_TASK"'
    again = 'git log --format=%s > seen.txt; git merge -q -X theirs --no-edit main; git add -A; git commit -q -m again'
    agent = f'if [ "$FARM_ATTEMPT" -gt 1 ]; then {again}; else {first}; fi'
    up(repo, 2, agent)
    wait_until(lambda: states(repo) == {"claimed": 2}, 30, "two claims")
    (repo / "go").touch()
    (repo / ".git/info/exclude").write_text("go\n")
    wait_for_states(repo, {"landed": 2})
    again = next(task for task in tasks(repo) if task["attempts"] == 1)
    assert f"first {again['id']}" in (repo / "seen.txt").read_text()
    returned = git(repo, "for-each-ref", "--format=%(refname)", f"refs/farm/returned/{again['id']}/")
    assert returned == f"refs/farm/returned/{again['id']}/1"
    assert "words.txt" in (repo / f"coordination/returns/{again['id']}.1.txt").read_text()
    down(repo)


def test_main_is_green_at_every_value_of_its_reflog_although_an_agent_breaks_the_tests(make_repo):
    gate = 'for file in t-*.txt; do [ "$file" = "t-*.txt" ] || ! grep -q BROKEN "$file" || exit 1; done'
    repo = make_repo()
    add_tasks(repo, 6, max_attempts=1)
    agent = '[ "$FARM_TASK" != t-0003 ] || echo BROKEN > "$FARM_TASK.txt"; ' + AGENT.replace(">", ">>")
    done = farm(repo, "run", "-n", "3", "--agent", agent, "--gate", gate, "--until-drained")
    assert done.returncode == 5
    assert states(repo) == {"landed": 5, "failed": 1}
    for value in git(repo, "reflog", "--format=%H", "main").splitlines():
        names = git(repo, "ls-tree", "--name-only", value).splitlines()
        assert "t-0003.txt" not in names
    reason = next(task["reason"] for task in tasks(repo) if task["state"] == "failed")
    assert "the gate fails with it" in reason


def test_a_task_waits_for_those_it_comes_after(make_repo):
    repo = make_repo()
    farm(repo, "add", "first", "--id", "a", check=True)
    farm(repo, "add", "second", "--id", "b", "--after", "a", check=True)
    assert farm(repo, "run", "-n", "2", "--agent", AGENT, "--gate", "true", "--until-drained").returncode == 0
    assert landed_on_main(repo) == ["a", "b"]


def test_a_run_ends_where_a_long_chain_of_tasks_waits_for_a_canceled_one(make_repo):
    """Each but the first comes after the two before it: to follow every way would never end."""
    repo = make_repo()
    farm(repo, "add", "the first", "--id", "n-0", check=True)
    farm(repo, "cancel", "n-0", check=True)
    path = repo / "coordination/task_queue/pending.json"
    chain = [{"id": f"n-{number}", "title": "next", "after": [f"n-{max(0, number - back)}" for back in (1, 2)]}
             for number in range(1, 1200)]
    path.write_text(json.dumps({"schema": 1, "tasks": json.loads(path.read_text())["tasks"] + chain}))
    assert farm(repo, "run", "-n", "1", "--agent", "true", "--gate", "true", "--until-drained").returncode == 5
    assert states(repo) == {"canceled": 1, "waiting": 1199}


def test_run_until_drained_leaves_no_session_and_no_claim(make_repo):
    repo = make_repo()
    add_tasks(repo, 3)
    assert farm(repo, "run", "-n", "2", "--agent", AGENT, "--gate", "true", "--until-drained").returncode == 0
    assert live_pids(repo) == {}
    assert list((repo / "coordination/agent_locks").glob("*.lock")) == []


def test_ctrl_c_of_a_foreground_run_stops_the_farm_and_frees_every_claim(make_repo):
    repo = make_repo()
    add_tasks(repo, 2)
    argv = [sys.executable, str(ROOT / "farm.py"), "--repo", str(repo), "run", "-n", "2", "--agent", "sleep 300", "--gate", "true"]
    loop = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**os.environ, "FARM_GRACE_SECONDS": "0.2"})
    wait_until(lambda: states(repo) == {"claimed": 2}, 30, "two claims")
    loop.send_signal(signal.SIGINT)
    assert loop.wait(30) == 130
    assert states(repo) == {"pending": 2}
    assert [task["attempts"] for task in tasks(repo)] == [0, 0]


def test_a_task_is_worked_on_from_the_newest_target(make_repo):
    repo = make_repo()
    add_tasks(repo, 1)
    head = commit_files(repo, {"late.txt": "by a person\n"})
    farm(repo, "run", "-n", "1", "--agent", "git rev-parse HEAD > base.txt", "--gate", "true", "--until-drained")
    assert (repo / "base.txt").read_text().strip() == head


def test_what_an_agent_leaves_uncommitted_is_committed_under_the_tasks_title(make_repo):
    repo = make_repo()
    farm(repo, "add", "Write it 'all' down", check=True)
    farm(repo, "run", "-n", "1", "--agent", "echo text > new.txt", "--gate", "true", "--until-drained")
    assert git(repo, "log", "-1", "--format=%s", "main^2") == "Write it 'all' down"


@pytest.mark.parametrize("count", [10])
def test_the_demo_checks_its_own_outcome(count):
    done = run([sys.executable, ROOT / "tests/campaigns/demo.py", "-n", str(count)], timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "main is green" in done.stdout


def test_a_sandboxed_agent_makes_its_moves_through_its_mailbox(make_repo):
    repo = make_repo()
    add_tasks(repo, 2)
    agent = ('[ -d "$FARM_MAILBOX" ] && ' + AGENT + ' && farm lock "$FARM_AGENT_NAME" schema --wait 20 && '
             'farm submit "$FARM_AGENT_NAME" --fence "$FARM_FENCE" && farm unlock "$FARM_AGENT_NAME" schema')
    done = farm(repo, "run", "-n", "2", "--agent", agent, "--gate", "true", "--until-drained", env={"FARM_SANDBOXED": "1"})
    assert (done.returncode, states(repo)) == (0, {"landed": 2}), done.stderr
    events = [json.loads(line) for line in (repo / "coordination/events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "submitted" for event in events) == 2
    assert [path.name for path in (repo / "coordination/mailbox/agent-001").iterdir() if "." in path.name] in ([], ["claim.err"])


def test_a_merge_in_a_session_opens_no_editor_at_which_nobody_sits(make_repo):
    repo = make_repo()
    add_tasks(repo, 1)
    agent = ('export GIT_EDITOR="sleep 600 #"; git checkout -q -b side && echo s >s && git add s && git commit -qm side && '
             'git checkout -q - && echo x >x && git add x && git commit -qm work && [ -t 0 ] && [ -t 1 ] && git merge side')
    up(repo, 1, agent)
    wait_for_states(repo, {"landed": 1})
    assert (repo / "s").exists()
    down(repo)


def test_what_was_asked_in_an_attempt_that_has_ended_is_not_done_in_the_next(make_repo):
    """A lock, say, that nobody would give up."""
    repo = make_repo()
    add_tasks(repo, 1)
    box = repo / "coordination/mailbox/agent-001"
    box.mkdir(parents=True)
    (box / "1.request").write_text(json.dumps(["lock", "agent-001", "stale"]))
    agent = 'farm lock agent-001 mine && farm unlock agent-001 mine && echo x >"$FARM_TASK" && git add -A && git commit -qm x'
    done = farm(repo, "run", "-n", "1", "--agent", agent, "--until-drained", env={"FARM_SANDBOXED": "1"})
    assert (done.returncode, states(repo)) == (0, {"landed": 1}), done.stderr
    assert "stale" not in "".join(path.read_text() for path in (repo / "coordination/agent_locks").iterdir())
    assert not list(box.glob("1.*"))


def test_a_mailbox_makes_no_move_for_another_agent(make_repo):
    repo = make_repo()
    add_tasks(repo, 1)
    box = repo / "coordination/mailbox/agent-001"
    box.mkdir(parents=True)
    (box / "1.request").write_text(json.dumps(["submit", "agent-002", "--fence", "t-0001.2"]))
    farm(repo, "answer", "agent-001", check=True)
    assert json.loads((box / "1.answer").read_text())["code"] == 4


def test_a_session_that_keeps_dying_is_parked_and_up_starts_it_again(make_repo):
    repo = make_repo()
    up(repo, 1)

    def kill_or_parked() -> bool:
        agent = status(repo)["agents"][0]
        with contextlib.suppress(psutil.NoSuchProcess):
            if agent["pid"]:
                psutil.Process(agent["pid"]).kill()
        return agent["state"] == "parked"

    history = repo / "coordination/loop.json"
    wait_until(lambda: "agent-001" in history.read_text() if history.exists() else False, 30, "the loop")
    data = json.loads(history.read_text())
    now = time.time()
    loop = int((repo / "coordination/loop.lock").read_text().split("\t")[0])
    os.kill(loop, signal.SIGKILL)
    data["agents"]["agent-001"]["ends"] = [now - 5, now - 4, now - 3, now - 2]  # four ends just now; the next one is the fifth
    history.write_text(json.dumps(data))
    wait_until(kill_or_parked, 60, "the agent to be parked")
    cause = status(repo)["agents"][0]["cause"]
    assert "signal 9" in cause or cause == "its process is gone"  # tmux 3.3 now and then misses how a child ended
    up(repo, 1)
    wait_until(lambda: status(repo)["agents"][0]["state"] == "idle", 30, "the parked agent to be started again")
    down(repo)

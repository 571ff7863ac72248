"""A host's side: `farm spoke`, its own farm, and what it carries to the hub and from it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator

import psutil
import pytest
from farm_calls import landed, make_commit
from host_calls import Served, Spoke, make_ssh
from repo_calls import landed_on_main
from sandbox import git, run, wait_until
from sshd import Sshd

import farm as toolkit


@pytest.fixture
def ssh(farm, sandbox) -> str:
    return str(make_ssh(sandbox.root, farm.repo))


# What it does is in the task's title; the first attempt of each goes wrong in its own way.
ODD = """
: >"$HUB/seen-$FARM_TASK-$FARM_ATTEMPT"
case $FARM_TITLE-$FARM_ATTEMPT in
  fails-1) farm fail "$FARM_AGENT_NAME" --fence "$FARM_FENCE" --why 'not today'; exit ;;
  gives-up-1) farm fail "$FARM_AGENT_NAME" --fence "$FARM_FENCE" --why never --no-retry; exit ;;
  dies-1) echo unsaved >unsaved.txt; tmux kill-session ;;
  red-1) echo red >red.txt ;;
  red-2) git rm -q red.txt; grep -c 'red.txt is there' "$FARM_PROMPT_FILE" >told.txt ;;
  asks-1) farm lock "$FARM_AGENT_NAME" schema; echo "lock $?" >asked.txt; farm add more; echo "add $?" >>asked.txt ;;
  waits-1) until [ -e "$HUB/go" ]; do sleep 0.05; done ;;
esac
echo "$FARM_ATTEMPT" >>"$FARM_TASK.txt"
"""


def test_what_happens_to_attempts_on_a_host_is_as_on_the_hub(farm, ssh, monkeypatch, farm_cleanup):
    """One host, whose agents fail, die, give up and hand in red work, and whose spoke is killed, started again, and
    started twice."""
    monkeypatch.setenv("HUB", str(farm.repo.parent))
    titles = ["fails", "dies", "red", "asks", "waits", "gives-up"]
    ids = dict(zip(titles, (farm.ok("add", title) for title in titles), strict=True))
    gate = "if [ -e red.txt ]; then echo red.txt is there; exit 1; fi"
    merger = farm.start("merge", "--watch", "--gate", gate)
    spoke = Spoke(farm, "h1", ssh, 3, ODD).start()
    wait_until((farm.repo.parent / f"seen-{ids['waits']}-1").exists, 40, f"waits to begin: {spoke.said()}")
    fence = next(claim["fence"] for claim in farm.json("locks") if claim["task"] == ids["waits"])
    spoke.process.kill()
    assert spoke.process.wait() == -9
    spoke.start()
    lock = spoke.folder.with_name("h1.lock")
    wait_until(lambda: lock.read_text().startswith(f"{spoke.process.pid}\t"), 20, "its lock")
    second = Spoke(farm, "h1", ssh, 3, ODD).start()
    assert second.process.wait(20) == 4
    wait_until(lambda: len(landed(farm)) == 4, 60, f"four landed: {spoke.said()}")
    # the one that was at work all the time goes on under the same claim
    assert [claim["fence"] for claim in farm.json("locks") if claim["task"] == ids["waits"]] == [fence]
    (farm.repo.parent / "go").touch()
    wait_until(lambda: len(landed(farm)) == 5, 40, f"five landed: {spoke.said()}")
    wait_until(lambda: farm.task(ids["gives-up"])["state"] == "failed", 40, f"one gives up: {spoke.said()}")
    tasks = {task["title"]: task for task in farm.json("tasks")}
    assert {title: task["attempts"] for title, task in tasks.items()} == {
        "fails": 1, "dies": 1, "red": 1, "asks": 0, "waits": 0, "gives-up": 1,
    }
    assert (tasks["gives-up"]["state"], tasks["gives-up"]["reason"]) == ("failed", "never")
    assert git(farm.repo, "show", "main:asked.txt").split() == ["lock", "4", "add", "4"]
    assert int(git(farm.repo, "show", "main:told.txt")) >= 1
    events = (farm.folder / "events.jsonl").read_text()
    assert "not today" in events and re.search(r"agent-00\d died", events)
    rescued = git(farm.repo, "for-each-ref", "--format=%(refname)", "refs/farm/in/h1/rescue").split()
    assert [git(farm.repo, "show", f"{ref}:unsaved.txt") for ref in rescued] == ["unsaved"]
    spoke.end()
    merger.terminate()
    merger.wait(20)


# The first attempt ends on the target's own branch, where git brings nothing to the host's clone any more.
ON_TARGET = 'git checkout -q main; [ "$FARM_ATTEMPT" = 2 ] && echo x >"$FARM_TASK.txt"'


def test_an_agent_that_is_on_the_targets_branch_keeps_its_host_from_nothing(farm, ssh, farm_cleanup):
    task = farm.ok("add", "one")
    spoke = Spoke(farm, "h1", ssh, 1, ON_TARGET).start()
    wait_until(lambda: farm.task(task)["attempts"] == 1, 40, f"its first attempt: {spoke.said()}")
    make_commit(farm.repo, {"newer.txt": "x"})
    wait_until(lambda: farm.task(task)["state"] == "ready", 40, f"its second attempt: {spoke.said()}")
    spoke.end()


# A commit that old tools have made so, and that git does not take where it looks (an agent that has merged some history).
BROKEN = """
echo x >"$FARM_TASK.txt"; git add -A; git commit -q -m work
if [ "$FARM_TITLE-$FARM_ATTEMPT" = broken-1 ]; then
  odd=$(git cat-file commit HEAD | sed '/^author/s/[+-][0-9]*$/+051800/' | git hash-object -t commit -w --stdin --literally)
  git reset -q --hard "$odd"
fi
"""


def test_a_commit_that_git_on_the_hub_takes_for_broken_goes_back_and_keeps_no_other_there(farm, ssh, farm_cleanup):
    broken, whole = farm.ok("add", "broken"), farm.ok("add", "whole")
    spoke = Spoke(farm, "h1", ssh, 2, BROKEN).start()
    wait_until(lambda: farm.task(broken)["attempts"] == 1, 60, f"it goes back: {spoke.said()}")
    assert "badTimezone" in farm.task(broken)["reason"]
    for task in (whole, broken):
        wait_until(lambda task=task: farm.task(task)["state"] == "ready", 60, f"both are handed in: {spoke.said()}")
    spoke.end()


@pytest.fixture
def sshd(farm, sandbox, monkeypatch) -> Iterator[Sshd]:
    monkeypatch.setenv("FARM_HOST_LEASE_SECONDS", "12")
    server = Sshd(sandbox.root / "sshd", farm.repo)
    yield server.start()
    server.kill()


def test_the_door_lets_a_host_do_its_own_work_and_nothing_else(farm, sshd):
    """With the real ssh: what an agent that has found its host's key could try."""
    ssh = sshd.let_in("h1").split()
    sshd.let_in("h2")
    farm.ok("add", "a task")
    main, config = git(farm.repo, "rev-parse", "main"), (farm.repo / ".git/config").read_bytes()
    for words in ("", "sh", "id; git-upload-pack x", "farm serve h2", "farm serve; id", "farm add x", "scp -f /etc/passwd",
                  "git-upload-archive x", "git-receive-pack", "internal-sftp"):
        done = run([*ssh, "hub", *([words] if words else [])], input="id\n")
        assert done.returncode == 4 and "uid=" not in done.stdout, (words, done)
    forwarded = run([*ssh, "-o", "ExitOnForwardFailure=yes", "-N", "-R", "0:127.0.0.1:22", "hub"], timeout=20)
    assert forwarded.returncode == 255
    clone = farm.repo.parent / "clone"
    env = {"GIT_SSH_COMMAND": " ".join(ssh)}
    run(["git", "clone", "-q", f"hub:/etc/nothing{farm.repo}", clone], env=env, check=True)
    commit = make_commit(clone, {"new.txt": "text\n"})
    (farm.repo / ".git/hooks/post-receive").write_text("#!/bin/sh\ntouch ran\n")
    (farm.repo / ".git/hooks/post-receive").chmod(0o755)

    def push(*specs: str) -> int:
        return run(["git", "-C", clone, "push", "-q", "origin", *specs], env=env).returncode

    refs = ("refs/heads/main", "refs/heads/new", "refs/farm/in/h2/t-0001.2", "refs/farm/ready/t-0001", "refs/tags/v1",
            "refs/farm/in/h1", "refs/farm/in/h11/t-0001.2", "HEAD", "refs/farm/in/h2/../h1/x")
    assert [ref for ref in refs if push(f"+{commit}:{ref}") == 0] == []
    assert push(f"{commit}:refs/farm/in/h1/t-0001.2") == 0
    assert push(":refs/farm/in/h1/t-0001.2") != 0
    assert git(farm.repo, "for-each-ref", "--format=%(refname)").split() == ["refs/farm/in/h1/t-0001.2", "refs/heads/main"]
    assert git(farm.repo, "rev-parse", "main") == main and (farm.repo / ".git/config").read_bytes() == config
    assert not list(farm.repo.rglob("ran"))
    with Served(farm, argv=[*ssh, "hub", "farm serve"]) as served:
        served.hello()
        assert served.claim()["code"] == 0
        assert served.ask("claim", agent="h2-agent-001", preset="", takes=[])["code"] == 4


# A commit that says who has made it, then a wait for `go` beside the hub's repo, then another.
STEPS = """
echo "first on ${DOOR_HOST:-hub}" >>"$FARM_TASK.txt"; git add -A && git commit -q -m "first of $FARM_TASK"
until [ -e "GO" ]; do sleep 0.1; done
echo "second on ${DOOR_HOST:-hub}" >>"$FARM_TASK.txt"
"""


def add_tasks(farm, count: int) -> None:
    farm.ok("add", "-f", "-", input="".join(f"another {number} {count}\n" for number in range(count)))


def wait_for_landed(farm, count: int, hosts: dict[str, Spoke]) -> None:
    said = "\n".join(f"{name}: {spoke.said()}" for name, spoke in hosts.items())
    wait_until(lambda: len(landed(farm)) == count, 90, f"{count} landed, of {farm.json('tasks')}\n{said}")


def test_three_hosts_over_ssh_one_lost_one_frozen_one_cut_off_and_each_task_lands_once(farm, sshd, farm_cleanup):
    """One machine goes with all that runs on it, one spoke stands still for longer than its lease, and the third one's
    `serve` is killed, as is the sshd with every connection."""
    add_tasks(farm, 7)
    agent = STEPS.replace("GO", str(farm.repo.parent / "go"))
    loop = farm.start("run", "-n", "1", "--agent", agent, "--gate", "true")
    hosts = {name: Spoke(farm, name, sshd.let_in(name)).start() for name in ("h1", "h2", "h3")}
    refs = ("for-each-ref", "--format=%(refname)", "refs/farm/in")
    wait_until(lambda: len(git(farm.repo, *refs).split()) == 6, 60, "six first commits on the hub")
    held = {name: [claim["task"] for claim in farm.json("locks") if claim["agent"].startswith(name)] for name in hosts}

    hosts["h1"].kill_all()
    hosts["h3"].process.send_signal(signal.SIGSTOP)
    kill_serve("h2")
    sshd.kill()
    sshd.start()
    (farm.repo.parent / "go").touch()
    wait_for_landed(farm, 7, hosts)
    hosts["h3"].process.send_signal(signal.SIGCONT)
    late = re.compile("is another's by now")
    wait_until(lambda: len(late.findall(hosts["h3"].said())) == 2, 30, "two late submits")
    # nobody wants them any more, and they are kept
    assert {git(farm.repo, "show", f"{ref}:{task}.txt")[-5:] for ref, task in refs_of(farm, "h3")} == {"on h3"}

    hosts["h1"].start()
    add_tasks(farm, 6)
    wait_for_landed(farm, 13, hosts)
    farm.ok("down", "--now", timeout=60)
    assert [spoke.process.wait(60) for spoke in hosts.values()] == [0, 0, 0], hosts["h1"].said()
    assert loop.wait(60) == 0 or loop.returncode == 143
    check_history(farm, held)


def refs_of(farm, host: str) -> list[tuple[str, str]]:
    refs = git(farm.repo, "for-each-ref", "--format=%(refname)", f"refs/farm/in/{host}").split()
    return [(ref, ref.split("/")[-1].rpartition(".")[0]) for ref in refs]


def kill_serve(host: str) -> None:
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] and process.info["cmdline"][-2:] == ["serve", host]:
            process.kill()


def check_history(farm, held: dict[str, list[str]]) -> None:
    """Each task has landed once, with no attempt counted and all that had been committed anywhere."""
    on_main = landed_on_main(farm.repo)
    assert sorted(on_main) == sorted(landed(farm)) and len(on_main) == 13
    assert {task["attempts"] for task in farm.json("tasks")} == {0}
    for task_id in on_main:
        lines = git(farm.repo, "show", f"main:{task_id}.txt").splitlines()
        assert [line.split()[0] for line in lines].count("second") == 1, lines
        for name in ("h1", "h3"):
            if task_id in held[name]:
                assert lines[0] == f"first on {name}" and name not in lines[-1], lines
    events = map(json.loads, (farm.folder / "events.jsonl").read_text().splitlines())
    reasons = {event["why"].split(" (")[0] for event in events if event["event"] == "owner-died"}
    lost = {f"{name}-agent-{number:03d} on {name} was not heard of in its lease" for name in ("h1", "h3") for number in (1, 2)}
    assert reasons == lost


def test_what_has_ended_on_a_host_is_begun_there_by_nobody_until_the_hub_has_taken_it(store):
    with store.transaction() as tx:
        for task in list(tx.state.pending.values()):
            tx.state.pending[task.id] = task._replace(extra={"hub": {"fence": f"{task.id}.2"}})
        tx.state.pending["t-0001"] = tx.state.pending["t-0001"]._replace(ended_by="fail")
        tx.write("pending")
    with store.transaction() as tx:
        assert [task.id for task in toolkit.TaskQueue(tx).claimable("agent-001")] == ["t-0002"]


def test_a_hub_that_hangs_is_asked_again_over_a_new_connection_and_given_up_at_the_deadline(tmp_path, monkeypatch):
    """The first connection swallows what it is told; the second one answers; the third one is silent for good."""
    script = tmp_path / "hanging-ssh"
    script.write_text(
        f'#!/bin/bash\nread -r turns <{tmp_path}/turns; echo $((turns + 1)) >{tmp_path}/turns\n'
        'while read -r line; do case $turns in 0) exit ;; 1) echo \'{"code": 0, "mode": "paused", "lease_seconds": 2}\' ;; '
        "*) sleep 60 ;; esac; done\n"
    )
    script.chmod(0o755)
    (tmp_path / "turns").write_text("0\n")
    monkeypatch.setenv("GIT_SSH_COMMAND", str(script))
    link = toolkit.Link("hub", {"pid": "0", "start": "", "boot": ""})
    try:
        assert link.ask("renew", claims=[])["mode"] == link.mode == "paused"
        link.close()  # as a cut would; from now on nothing answers, and a quarter of the lease is half a second
        with pytest.raises(toolkit.FarmError, match="the hub does not answer"):
            link.ask("renew", claims=[])
    finally:
        link.close()

"""Gates on other machines: a verdict is what the gate's own shell there has told, and all else is none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator

import psutil
import pytest
from farm_calls import A, landed, make_commit
from sandbox import wait_until
from slurm import NODES, Slurm


@pytest.fixture
def slurm(sandbox, monkeypatch) -> Iterator[Slurm]:
    monkeypatch.setenv("FARM_GATE_ON", "slurm")
    monkeypatch.setenv("FARM_SLOTS", "3")
    one = Slurm(sandbox.root / "slurm")
    for key, value in one.env.items():
        monkeypatch.setenv(key, value)
    try:
        yield one.start()
    finally:
        one.stop()


# In the place of ssh: the command, in this machine's HOME, by a shell as sshd starts it.
NO_SSH = """#!/bin/sh
while :; do case $1 in -o) shift 2 ;; -*) shift ;; *) break ;; esac; done
shift; cd "$HOME"; exec sh -c "$*"
"""


@pytest.fixture
def box(sandbox, monkeypatch) -> None:
    path = sandbox.root / "no-ssh"
    path.write_text(NO_SSH)
    path.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(path))
    monkeypatch.setenv("FARM_GATE_ON", "ssh:box1")


def submit(farm, name: str) -> str:
    task = farm.ok("add", name)
    claim = farm.claim(A)
    farm.ok("submit", A, "--fence", claim["fence"], "--commit", make_commit(farm.repo, {f"{name}.txt": name}))
    return task


def runs(farm) -> list[tuple]:
    files = [json.loads(path.read_text()) for path in (farm.folder / "results").glob("*.json")]
    return sorted((run["colour"], run["exit_code"], run["note"].split("-")[0]) for file in files for run in file["runs"])


# What a gate could try: to tell a verdict by itself, with what it finds in its parents; then it is red or green, by its files.
GATE = """
for pid in $$ $PPID; do tr '\\0' '\\n' <"/proc/$pid/cmdline"; tr '\\0' '\\n' <"/proc/$pid/environ"; done >/dev/null
echo 'farm-gate-exit 0 0 forged'; read -r word && echo "farm-gate-exit $word 0 forged"
[ -n "$FARM_SLOT" ] && [ -d .git ] && ! [ -e red.txt ] && ! [ -e ../red ]
"""


def test_a_green_lands_a_red_comes_back_and_each_verdict_names_its_host(farm, box):
    green, red = submit(farm, "green"), submit(farm, "red")
    farm("merge", "--gate", GATE, timeout=120)
    assert landed(farm) == [green] and farm.task(red)["attempts"] == 1
    found = runs(farm)
    assert {run[:2] for run in found} == {("green", 0), ("red", 1)} and all(run[2].startswith("on ") for run in found), found


def test_a_gate_on_a_host_has_every_file_also_where_the_one_before_it_made_the_clone_sparse(farm, box):
    make_sparse = "git config core.sparseCheckout true && echo nowhere >.git/info/sparse-checkout && git read-tree -m -u HEAD"
    for name in ("one", "two"):
        task = submit(farm, name)
        farm("merge", "--gate", f"test -e {name}.txt && {{ {make_sparse} || :; }}", timeout=120)
        assert task in landed(farm), runs(farm)


def test_hosts_that_disagree_on_a_tree_are_named_as_a_flake_is_and_the_work_lands(farm, box, sandbox):
    node = "SLURMD_NODENAME=n1; [ -e seen ] || SLURMD_NODENAME=n0; export SLURMD_NODENAME;"
    (sandbox.root / "no-ssh").write_text(NO_SSH.replace("exec sh", f"{node} exec sh"))
    task = submit(farm, "green")
    gate = "! [ -e green.txt ] || [ -e ~/seen ] || { touch ~/seen; false; }"
    said = farm("merge", "--gate", gate, timeout=120).stderr
    assert landed(farm) == [task], said
    assert "was both green and red (red on n0, green on n1); nobody's work goes back for it" in said


@pytest.mark.skipif("FARM_TESTS_WITHOUT_SANDBOX" in os.environ, reason="admitted: bwrap cannot work here")
def test_where_gates_have_a_sandbox_those_on_hosts_have_it_too_or_give_no_verdict(farm, box, sandbox, monkeypatch):
    """It reads no key, writes nothing beside its own folder, and has a cache of its own, also in the place of a link; no bwrap
    there, no verdict."""
    monkeypatch.setenv("FARM_ISOLATE", "bwrap")
    (sandbox.home / "scratch").mkdir()
    (sandbox.home / ".npm").symlink_to(sandbox.home / "scratch")
    for path in (".ssh/id_key", ".npm/package"):
        (sandbox.home / path).parent.mkdir(exist_ok=True)
        (sandbox.home / path).write_text("secret")
    task = submit(farm, "green")
    gate = f"""! [ -e "$HOME/.ssh/id_key" ] && [ -z "$(ls -A "$HOME/.npm")" ] && echo x >"$HOME/.npm/mine" && echo x >built
      ! echo x >"$HOME/made" && ! echo x >.git/made && ! echo x >{farm.repo}/made && echo x >"$TMPDIR/made" && git log -1"""
    farm("merge", "--gate", gate, timeout=120)
    assert (landed(farm), (sandbox.home / ".npm/mine").exists()) == ([task], False), farm.ok("show", task)
    other = submit(farm, "other")
    (sandbox.root / "no-ssh").write_text(NO_SSH.replace('exec sh', 'PATH=$HOME/bin exec sh'))
    (sandbox.home / "bin").mkdir()
    for name in ("bash", "sh", "git", "git-receive-pack", "cut", "mkdir", "rm", "cat", "head", "tr", "perl", "readlink"):
        (sandbox.home / "bin" / name).symlink_to(shutil.which(name))
    farm("merge", "--gate", "true", timeout=120)
    assert landed(farm) == [task] and "there can be no sandbox" in farm.ok("show", other)


@pytest.mark.parametrize(("gate", "why"), [("kill -9 $PPID", "told no exit code"), ("exit 137", "was killed on"),
                                           ("echo more >>green.txt", "changed tracked files: M green.txt")])
def test_a_gate_that_ends_its_own_shell_or_changes_what_it_tests_gives_no_verdict(farm, box, gate, why):
    task = submit(farm, "green")
    farm("merge", "--gate", f"if [ -e green.txt ]; then {gate}; fi", timeout=120)
    assert landed(farm) == [] and why in farm.ok("show", task)
    assert [run for run in runs(farm) if run[0] == "red"] == []
    events = map(json.loads, (farm.folder / "events.jsonl").read_text().splitlines())
    notes = [event["note"] for event in events if event["event"] == "gate-ended" and event["colour"] == "none"]
    assert len(notes) >= 2 and all(why in note for note in notes), "it runs again"


def test_a_box_that_is_not_reached_is_named_by_doctor_and_judges_nothing(farm, box, sandbox):
    (sandbox.root / "no-ssh").write_text("#!/bin/sh\nexit 255\n")
    task = submit(farm, "green")
    assert "box1 cannot be reached" in farm("doctor").stdout
    done = farm("merge", "--gate", "true", timeout=120)
    assert farm.task(task)["state"] == "ready" and "did not come to box1" in done.stdout + done.stderr


def find_groups(merger: int) -> set[int]:
    """The process groups of the sruns below a merger."""
    found = set()
    for process in psutil.Process(merger).children(recursive=True):
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.name() == "srun":
                found.add(os.getpgid(process.pid))
    return found


def test_slurm_runs_gates_and_what_is_killed_there_or_here_leaves_no_job(farm, slurm):
    green, red = submit(farm, "green"), submit(farm, "red")
    farm("merge", "--gate", GATE, timeout=120)
    assert landed(farm) == [green] and farm.task(red)["attempts"] == 1
    assert {run[2].removeprefix("on ") for run in runs(farm)} <= set(NODES)

    submit(farm, "slow")
    merger = farm.start("merge", "--gate", "[ -e slow.txt ] && sleep 300")
    [group] = wait_until(lambda: find_groups(merger.pid), 40, "srun")
    wait_until(lambda: "RUNNING" in [job[3] for job in slurm.jobs()], 40, "its job")
    merger.kill()  # nobody can catch that: neither the merger nor what has started srun
    merger.wait()
    with contextlib.suppress(ProcessLookupError):  # it has ended with the merger
        os.killpg(group, signal.SIGKILL)
    wait_until(lambda: slurm.jobs() == [], 30, "its job to be canceled")

"""Where agents run: FARM_ON shares them out, hosts are put on boxes by ssh or run as jobs of Slurm, and are ended again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator

import kubernetes_validate
import psutil
import pytest
import yaml
from boxes import Boxes
from farm_calls import landed
from paths import ROOT, SCRIPTS
from repo_calls import landed_on_main
from sandbox import find_processes, run, wait_until
from slurm import Slurm
from sshd import need_sshd

import farm as toolkit

# A first commit, then a wait for a file beside the hub's repo, then another.
AGENT = """
echo first >"$FARM_TASK.txt"; git add -A; git commit -qm first
until [ -e GO ]; do sleep 0.1; done
echo second >>"$FARM_TASK.txt"
"""


def settings_of(**given) -> toolkit.Settings:
    return toolkit.Settings(**{name: entry.default for name, entry in toolkit.SETTINGS.items()} | given)


@pytest.mark.parametrize(
    ("n", "on", "shares"),
    [
        (7, "", {"here": ["here", 7]}),
        (40, "slurm", {f"s{index}": ["slurm", 10] for index in range(1, 5)}),
        (12, "slurm", {"s1": ["slurm", 6], "s2": ["slurm", 6]}),
        (40, "ssh:box1 ssh:me@box2 here", {"box1": ["ssh:box1", 13], "me-box2": ["ssh:me@box2", 13], "here": ["here", 14]}),
        (1, "here ssh:box1", {"here": ["here", 1]}),
    ],
)
def test_agents_are_shared_out_evenly_and_slurm_gets_no_job_too_large(n, on, shares):
    settings = settings_of(n=n, on=on)
    assert toolkit.share_out(settings) == shares
    assert toolkit.count_here(settings) == shares.get("here", ["", 0])[1]


@pytest.mark.parametrize("on", ["box1", "ssh:", "ssh:-oProxyCommand=x", "ssh:a;b", "k8s"])
def test_what_is_no_place_is_refused(farm, on):
    assert f"on: '{on}' is none of here, slurm and ssh:BOX" in farm.refused(2, "up", "--agent", "true", "--on", on)


def test_an_engine_that_is_not_installed_and_a_mix_are_refused_before_anything_starts(farm):
    path = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
    for name in os.environ["PATH"].split(":"):
        if os.path.exists(f"{name}/sbatch"):
            folder = farm.repo.parent / "bin"
            folder.mkdir()
            for tool in ("git", "tmux", "bash", "sh", "sed", "env", "python3", "cat", "dirname", "hostname", "id"):
                (folder / tool).symlink_to(next(f"{one}/{tool}" for one in path.split(":") if os.path.exists(f"{one}/{tool}")))
            path = str(folder)
            break
    said = farm.refused(6, "up", "--agent", "true", "--on", "slurm", env={"PATH": path})
    assert "slurm is not installed" in said and "apt install slurm-client" in said
    said = farm.refused(2, "up", "-n", "2", "--agent", "claude:1,codex:1", "--on", "ssh:box1")
    assert "a mix of agents can run here only" in said


def kill_host(token: str, name: str) -> None:
    """kill -9 of all that runs for a host: its spoke, its tmux servers, its agents."""
    for _ in range(20):
        mine = [process for process in find_processes(token) if is_of_host(process, name)]
        for process in mine:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if not mine:
            return
        psutil.wait_procs(mine, timeout=2)


def is_of_host(process: psutil.Process, name: str) -> bool:
    try:
        words = [*process.cmdline(), process.environ().get("FARM_REPO", "")]
    except (psutil.Error, OSError):
        return False
    return any(f"/{name}/" in f"{word}/" or word.endswith(f"-{name}") for word in words)


def add_tasks(farm, count: int) -> None:
    farm.ok("add", "-f", "-", input="".join(f"task {number}\n" for number in range(count)))


def holders(farm) -> dict[str, int]:
    """host -> how many tasks its agents hold."""
    hosts = [claim["agent"].rpartition("-agent-")[0] for claim in farm.json("locks")]
    return {host: hosts.count(host) for host in set(hosts)}


def check_history(farm, count: int) -> None:
    """Each has landed once, and none was blamed."""
    on_main = landed_on_main(farm.repo)
    assert len(on_main) == len(set(on_main)) == count
    assert {task["attempts"] for task in farm.json("tasks")} == {0}


def hosts_line(farm) -> str:
    return next((line for line in farm.ok("status").splitlines() if line.startswith("hosts: ")), "")


@pytest.fixture
def up(farm, monkeypatch, farm_cleanup):
    """Start a farm of twelve agents that wait for `go`."""
    monkeypatch.setenv("FARM_HOST_LEASE_SECONDS", "12")
    monkeypatch.setenv("FARM_GRACE_SECONDS", "5")

    def start(on: str) -> None:
        agent = AGENT.replace("GO", str(farm.repo.parent / "go"))
        farm.ok("up", "-n", "12", "--agent", agent, "--gate", "true", "--on", on, timeout=60)

    yield start
    farm("down", "--now", timeout=120)


@pytest.fixture
def boxes(farm, sandbox, monkeypatch) -> Iterator[Boxes]:
    need_sshd()
    made = Boxes(sandbox.root / "boxes", farm.repo, ["box1", "box2", "box3"]).start()
    for name, value in made.env.items():
        monkeypatch.setenv(name, value)
    yield made
    made.stop()


def test_twelve_agents_on_two_boxes_and_here_land_each_task_once_although_a_box_dies(farm, boxes, sandbox, up):
    add_tasks(farm, 20)
    up("ssh:box1 ssh:box2 here")
    wait_until(lambda: holders(farm) == {"box1": 4, "box2": 4, "": 4}, 90, "twelve claims")
    boxes.unplug("box1")
    kill_host(sandbox.token, "box1")
    (farm.repo.parent / "go").touch()
    wait_until(lambda: len(landed(farm)) == 20, 90, "all landed")
    assert "No route to host" in hosts_line(farm) and "box1 heard" in hosts_line(farm), hosts_line(farm)
    said = farm("down", timeout=120)
    assert (said.returncode, said.stderr.count("its claims lapse")) == (0, 1), said.stderr
    assert "box1 could not be ended" in said.stderr
    check_history(farm, 20)
    placed = json.loads((farm.folder / "placed.json").read_text())["hosts"]
    assert list(placed) == ["box1"]
    assert [process for process in find_processes(sandbox.token) if is_of_host(process, "box2")] == []


@pytest.fixture
def slurm(sandbox, monkeypatch) -> Iterator[Slurm]:
    cluster = Slurm(sandbox.root / "slurm")
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    yield cluster.start()
    cluster.stop()


def test_twelve_agents_in_three_jobs_of_slurm_whose_node_and_controller_are_killed(
    farm, boxes, sandbox, slurm, up, monkeypatch
):
    """A job cancelled by hand comes back; one node dies with all that it runs; the controller is killed and begins anew."""
    names = ["s1", "s2", "s3"]
    for name in names:
        key = sandbox.home / ".ssh" / f"farm-{name}"
        with (boxes.folder / "authorized").open("a") as file:
            file.write(farm.ok("spoke-key", name, "-o", str(key)) + "\n")
    monkeypatch.setenv("FARM_PER_HOST", "4")
    add_tasks(farm, 20)
    up("slurm")
    wait_until(lambda: holders(farm) == dict.fromkeys(names, 4), 90, "twelve claims")
    before = {job[1]: job for job in slurm.jobs()}
    assert {job[0] for job in before.values()} == {toolkit.farm_socket(str(farm.repo))} and len(before) == 3

    slurm.kill("slurmctld")
    slurm.kill(before["2"][4])
    kill_host(sandbox.token, "s2")
    wait_until(lambda: "slurm: " in hosts_line(farm), 40, "a word that Slurm does not answer")
    slurm.start_controller()
    wait_until(lambda: len(slurm.jobs()) >= 2, 40, "the controller")
    slurm.ask("scancel", before["1"][2])
    (farm.repo.parent / "go").touch()
    wait_until(lambda: len(landed(farm)) == 20, 90, "all landed")

    def came_back() -> bool:  # it may wait: of three nodes two live, and the dead one's job may have been given the second
        return any(job[1] == "1" and job[2] != before["1"][2] for job in slurm.jobs())

    wait_until(came_back, 60, "the cancelled job")
    assert sorted(job[1] for job in slurm.jobs()) == sorted({job[1] for job in slurm.jobs()}), "a host is placed twice"
    farm.ok("down", timeout=120)
    check_history(farm, 20)
    assert [job for job in slurm.jobs() if job[3] != "COMPLETING"] == []


def test_a_box_whose_systemd_outlives_a_logout_runs_its_spoke_there(tmp_path):
    """loginctl, systemd-run and systemctl are stand-ins that write down how they are called."""
    for name, text in {
        "loginctl": "echo Linger=yes",
        "systemctl": f"if [ -e {tmp_path}/called ]; then echo MainPID=42; else echo MainPID=0; fi",
        "systemd-run": f'printf "%s\\n" "$@" >{tmp_path}/called',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    told = 'job=farm-x-1234 hub=hub:/x python=python3 digest=1\n' + (SCRIPTS / "hosts/start-spoke.sh").read_text()
    (tmp_path / "spoke").write_text(told)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    argv = ["bash", tmp_path / "spoke", "up", "box1", "3"]
    assert [run(argv, env=env, check=True).stdout for _ in range(2)] == ["started by systemd\n", "runs (pid 42)\n"]
    called = (tmp_path / "called").read_text().splitlines()
    assert "--unit=farm-x-1234-box1" in called and called[-5:] == ["bash", str(tmp_path / "spoke"), "run", "box1", "3"]


def test_the_manifest_for_kubernetes_is_valid_and_runs_a_spoke_for_each_index():
    text = re.search(r"^```yaml\n(.*?)^```", (SCRIPTS / "README.md").read_text(), re.S | re.M)[1]
    job = yaml.safe_load(text)
    for version in ("1.30", "1.33"):
        kubernetes_validate.validate(job, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**job, "spec": {**job["spec"], "completionsMode": "Indexed"}}, "1.33", strict=True)
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"]) == ("Indexed", spec["parallelism"])
    (container,) = spec["template"]["spec"]["containers"]
    command = container["args"][0].splitlines()[-1].split()
    assert command[:3] == ["exec", "/farm/scripts/farm", "spoke"] and '"k$JOB_COMPLETION_INDEX"' in command
    argv = [sys.executable, "-c", "import sys, farm; print(farm.parse_options('spoke', sys.argv[1:]))", *command[3:]]
    assert "'name': '\"k$JOB_COMPLETION_INDEX\"'" in run(argv, cwd=SCRIPTS.parent, check=True).stdout


def test_the_demo_on_two_boxes_and_here_checks_its_own_outcome():
    need_sshd()
    argv = [sys.executable, ROOT / "tests/campaigns/demo.py", "-n", "3", "--on", "ssh:box1 ssh:box2 here"]
    done = run(argv, timeout=180)
    assert (done.returncode, done.stdout.count("(box1-agent-001") > 0) == (0, True), done.stdout + done.stderr
    assert "3 agents on ssh:box1 ssh:box2 here" in done.stdout and "main is green" in done.stdout

"""The farm's main job on an embedded example: a small program, twelve tasks, ten scripted agents, and a check of the outcome.

    python tests/campaigns/demo.py [-n AGENTS] [--keep] [--on 'ssh:box1 ssh:box2 here']

--on: the agents run on several hosts, all of them played by this machine, by an sshd of the demo's own on 127.0.0.1.

Exit 1 when main is red, a task is lost or doubled, or fewer agents than asked for worked at once.
"""
from __future__ import annotations

import argparse
import collections
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from boxes import Boxes, find_sshd
from paths import ROOT

FILES = {
    "README.md": "# textkit\n\nSmall functions on text.\n\nwords: few\n",
    "textkit/__init__.py": "",
    "textkit/shout.py": 'def shout(text):\n    return text.upper() + "!"\n',
    "tests/__init__.py": "",
    "tests/test_shout.py": "import unittest\nfrom textkit.shout import shout\n\n\nclass Test(unittest.TestCase):\n"
                           '    def test_shout(self):\n        self.assertEqual(shout("a"), "A!")\n',
}

FUNCTIONS = {"reverse": "text[::-1]", "count": "len(text.split())", "title": "text.title()", "strip": "text.strip()",
             "first": "text.split()[0]", "last": "text.split()[-1]", "lower": "text.lower()", "swap": "text.swapcase()"}


def demo_tasks() -> list[dict]:
    """Eight plain tasks, a pair on the same line, one that breaks the tests, one that never commits."""
    tasks = [{"title": f"Add a function {name}", "prompt": f"do: function {name} {body}"} for name, body in FUNCTIONS.items()]
    tasks += [{"title": "README: say many words", "prompt": "do: replace few many"},
              {"title": "README: say short words", "prompt": "do: replace few short"},
              {"title": "Change shout", "prompt": "do: break shout"},
              {"title": "Look around", "prompt": "do: nothing", "max_attempts": 2}]
    return tasks


def make_repo(folder: Path) -> None:
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for command in (["init", "-q"], ["symbolic-ref", "HEAD", "refs/heads/main"], ["config", "user.name", "Demo"],
                    ["config", "user.email", "demo@example.invalid"], ["add", "."], ["commit", "-q", "-m", "textkit"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)


def farm(repo: Path, *args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "farm.py"), "--repo", str(repo), *args], text=True, check=False, **options)


def most_at_once(repo: Path) -> int:
    """The largest number of tasks that were claimed at the same time, from the farm's history."""
    held, most = set(), 0
    for line in (repo / "coordination" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        task = event.get("task", {}).get("id")
        if event["event"] == "claimed":
            held.add(task)
        elif task:
            held.discard(task)
        most = max(most, len(held))
    return most


def find_faults(repo: Path, tasks: list[dict], agents: int, gate: str) -> list[str]:
    """Everything that must hold at the end and does not."""
    faults = []
    if subprocess.run(["bash", "-c", gate], cwd=repo, capture_output=True, check=False).returncode:
        faults.append("main is red")
    states = collections.Counter(task["state"] for task in tasks)
    if states != {"landed": 11, "failed": 1}:
        faults.append(f"11 tasks should have landed and 1 failed, not {dict(states)}")
    log = subprocess.run(["git", "-C", str(repo), "log", "--first-parent", "--format=%(trailers:key=Farm-Task,valueonly)"],
                         capture_output=True, text=True, check=True).stdout.split()
    if sorted(log) != sorted(task["id"] for task in tasks if task["state"] == "landed"):
        faults.append(f"main does not hold each landed task exactly once: {sorted(log)}")
    if not all((repo / "textkit" / f"{name}.py").exists() for name in FUNCTIONS):
        faults.append("a function is missing in the checkout")
    if most_at_once(repo) < agents:
        faults.append(f"only {most_at_once(repo)} of {agents} agents worked at once")
    return faults


def came_back(repo: Path) -> list[tuple[str, str]]:
    """(task, why) of every return and failure, in the order they happened."""
    events = [json.loads(line) for line in (repo / "coordination" / "events.jsonl").read_text().splitlines()]
    return [(event["task"]["id"], event["why"]) for event in events if event["event"] in ("returned", "attempt-failed")]


def report(repo: Path, tasks: list[dict], seconds: float) -> None:
    print(f"\nlanded on main in {seconds:.1f} s:")
    for task in tasks:
        if task["state"] == "landed":
            tries = f", attempt {task['attempts'] + 1}" if task["attempts"] else ""
            print(f"  {task['id']}  {task['landed_commit'][:10]}  {task['title']}  ({task['agent']}{tries})")
    print("came back on the way:")
    for task_id, why in came_back(repo):
        print(f"  {task_id}  {why[:110]}")
    for task in tasks:
        if task["state"] != "landed":
            print(f"{task['state']}: {task['id']} {task['title']}: {task['reason'][:90]}")


def run_demo(folder: Path, agents: int, on: str) -> int:
    repo = folder / "textkit"
    make_repo(repo)
    names = [word.removeprefix("ssh:") for word in on.split() if word.startswith("ssh:")]
    if not names:
        return run_farm(folder, repo, agents, [])
    boxes = Boxes(folder / "boxes", repo, names).start()
    os.environ.update(boxes.env)
    try:
        return run_farm(folder, repo, agents, ["--on", on])
    finally:
        boxes.stop()


def run_farm(folder: Path, repo: Path, agents: int, on: list[str]) -> int:
    gate = f"{shlex.quote(sys.executable)} -B -m unittest -q"
    script = shlex.quote(str(ROOT / "tests/campaigns/demo-agent.sh"))
    command = f"DEMO_AGENTS={agents} DEMO_HUB={shlex.quote(str(repo))} DEMO_PYTHON={shlex.quote(sys.executable)} bash {script}"
    lines = "\n".join(json.dumps(task) for task in demo_tasks())
    farm(repo, "add", "-f", "-", input=lines, stdout=subprocess.DEVNULL)
    where = f" on {on[1]}" if on else ""
    print(f"{agents} agents{where}, {len(demo_tasks())} tasks, gate: python -m unittest", flush=True)
    started = time.monotonic()
    farm(repo, "run", "-n", str(agents), "--agent", command, "--gate", gate, "--until-drained", *on,
         stderr=(folder / "farm.log").open("w"))
    tasks = json.loads(farm(repo, "tasks", "--json", stdout=subprocess.PIPE).stdout)
    report(repo, tasks, time.monotonic() - started)
    farm(repo, "clean", stdout=subprocess.DEVNULL)
    faults = find_faults(repo, tasks, agents, gate)
    for fault in faults:
        print(f"WRONG: {fault}")
    if faults:
        print((folder / "farm.log").read_text())
    else:
        print(f"main is green, each task is accounted for, {agents} agents worked at once, nothing is left running")
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=10, help="agents")
    parser.add_argument("--keep", action="store_true", help="keep the throw-away repo")
    parser.add_argument("--on", default="", help="where agents run: words of here and ssh:NAME, all played by this machine")
    options = parser.parse_args()
    if "ssh:" in options.on and not find_sshd():
        print("there is no sshd here: apt install openssh-server", file=sys.stderr)
        return 6
    folder = Path(tempfile.mkdtemp(prefix="farm-demo-"))
    for name in [name for name in os.environ if name.startswith("FARM_") and name != "FARM_ISOLATE"]:
        del os.environ[name]
    try:
        return run_demo(folder, options.n, options.on)
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

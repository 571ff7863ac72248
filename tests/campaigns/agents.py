"""Real coding CLIs, unattended: ten Claude Code sessions take twenty tasks to main, and the other CLIs one each.

    python tests/campaigns/agents.py [--clis FOLDER] [--seconds 480] [-n AGENTS] [--only claude|reboot|login|others] [--keep]

The CLIs come from npm into FOLDER (default: .venv/agents) and talk to the stand-in on 127.0.0.1; their HOME, the repo and
tmux are throw-away ones. On the way: a permission question, a failing API, a usage limit, a kill -9, a conflict, agents that do
not submit, a reboot, a missing login. Prints a line a check; exit 1 when one failed. Skipped, with the reason, where npm cannot
install Claude Code.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from agents_ground import GATE, PACKAGES, Campaign, campaign_tasks, function_script, install_all
from paths import ROOT


class Skipped(Exception):
    """The campaign cannot run here, and why."""


# ---------------------------------------------------------------------------------------------- ten sessions of Claude Code


class Watch:
    """What a person would see and do while the farm runs: looks once a second, answers a question, kills one CLI."""

    def __init__(self, campaign: Campaign, asked: Path) -> None:
        self.campaign, self.asked = campaign, asked
        self.started = time.monotonic()
        self.all_working: float | None = None
        self.causes: set[str] = set()
        self.waiting: dict = {}
        self.killed: dict = {}
        self.sent: subprocess.CompletedProcess | None = None
        self.rss: list[int] = []
        self.states: set[str] = set()
        threading.Thread(target=self.read_limits, daemon=True).start()

    def read_limits(self) -> None:
        """A failing API is over at the next success of any agent: a look each second would miss it."""
        path = self.campaign.repo / "coordination/limits.json"
        while time.monotonic() < self.campaign.deadline:
            with contextlib.suppress(OSError, ValueError):
                self.causes |= {limit["cause"] for limit in json.loads(path.read_text())["presets"].values()}
            time.sleep(0.1)

    def look(self) -> bool:
        """One look; true when every task is at its end."""
        agents = self.campaign.agents()
        tasks = {task["id"]: task for task in self.campaign.json("tasks")}
        self.states |= {agent["state"] for agent in agents}
        self.causes |= {agent["cause"] for agent in agents if agent["cause"]}
        if self.all_working is None and sum(agent["state"] == "working" for agent in agents) >= self.campaign.options.n:
            self.all_working = time.monotonic() - self.started
            self.rss = [agent["rss_bytes"] for agent in agents]
            self.cpu = self.loop_usage()
        for agent in agents:
            title = tasks.get(agent["task"], {}).get("title", "")
            if agent["state"] == "waiting" and "permission" in title:
                self.answer(agent)
            if agent["state"] == "working" and "killed" in title and not self.killed:
                self.kill(agent)
            if agent["state"] == "working" and "README" in title and self.sent is None:
                self.sent = self.campaign.farm("send", agent["agent"], "--", "- a word from a person;\nsecond line;")
        return all(task["state"] in ("landed", "failed") for task in tasks.values())

    def loop_usage(self) -> tuple[float, int]:
        """(CPU seconds, bytes) of the loop and all that it has started but the agents."""
        pid = self.campaign.json("status")["loop"]["pid"]
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)] if pid else []
        times = [process.cpu_times() for process in tree]
        return sum(sum(time_[:4]) for time_ in times), sum(process.memory_info().rss for process in tree)

    def answer(self, agent: dict) -> None:
        """A person attaches, reads the question, and presses Enter on `Yes`."""
        screen = self.campaign.tmux("capture-pane", "-p", "-t", f"={agent['agent']}:")
        if "Do you want to proceed?" in screen:
            self.waiting = self.waiting or {**agent, "list": self.campaign.farm("status").stdout}
            self.campaign.tmux("send-keys", "-t", f"={agent['agent']}:", "Enter")

    def kill(self, agent: dict) -> None:
        """kill -9 the CLI once it has made its first request."""
        turn = self.campaign.repo / "coordination/mailbox" / agent["agent"] / "turn.json"
        pid = (self.campaign.repo / "coordination/mailbox" / agent["agent"] / "pid").read_text().strip()
        written = Path(agent["worktree"], "tests/test_killed.py").exists()
        if turn.exists() and pid.isdigit() and written:
            name = psutil.Process(int(pid)).name()
            os.kill(int(pid), signal.SIGKILL)
            self.killed = {**agent, "name": name, "at": time.time()}


def run_claude(campaign: Campaign) -> None:
    asked = campaign.folder / "asked-for.txt"
    tasks = campaign_tasks(asked, campaign.options.n)
    added = campaign.farm("add", "-f", "-", input="\n".join(json.dumps(task) for task in tasks))
    campaign.check(f"{len(tasks)} tasks are added", added.returncode == 0 and len(added.stdout.split()) == len(tasks), added.stderr)
    watch = Watch(campaign, asked)
    up = campaign.farm("up", "-n", str(campaign.options.n), "--agent", "claude", "--gate", GATE)
    if not campaign.check("up starts the farm", up.returncode == 0, up.stdout + up.stderr):
        return
    done = campaign.wait_for(watch.look, campaign.options.seconds)
    seconds = time.monotonic() - watch.started
    check_tasks(campaign, done, seconds)
    check_troubles(campaign, watch)
    check_costs(campaign)
    report_rows(campaign, watch)
    check_end(campaign)


def check_tasks(campaign: Campaign, done: bool, seconds: float) -> None:
    tasks = campaign.json("tasks")
    states = collections.Counter(task["state"] for task in tasks)
    left = [(task["title"], task["state"], task["reason"][:150]) for task in tasks if task["state"] != "landed"]
    campaign.check(f"every task came to its end unattended ({seconds:.0f} s)", done, left)
    campaign.check("19 of 20 landed, the impossible one failed", states == {"landed": 19, "failed": 1}, left)
    gate = subprocess.run(["bash", "-c", GATE], cwd=campaign.repo, env=campaign.env, capture_output=True, text=True)
    campaign.check("main is green", gate.returncode == 0, gate.stderr[-300:])
    log = subprocess.run(
        ["git", "-C", str(campaign.repo), "log", "--first-parent", "--format=%(trailers:key=Farm-Task,valueonly)"],
        capture_output=True,
        text=True,
        env=campaign.env,
    ).stdout.split()
    campaign.check(
        "main holds each landed task once", sorted(log) == sorted(task["id"] for task in tasks if task["state"] == "landed"), log
    )
    by_title = {task["title"].removeprefix("Task "): task for task in tasks}
    for name in ("unsent", "unsaved", "permission", "failing", "killed", "overtaken", "limited"):
        task = by_title[name]
        campaign.check(f"{name}: landed", task["state"] == "landed", (task["state"], task["reason"]))
    released = collections.Counter(event["task"]["id"] for event in campaign.events() if event["event"] == "released")
    for name in ("failing", "overtaken", "limited"):
        task = by_title[name]
        campaign.check(
            f"{name}: given back and taken up again, and no attempt was counted",
            released[task["id"]] and not task["attempts"],
            task,
        )
    campaign.check(
        "impossible: failed with the agent's own reason",
        "it cannot be done" in by_title["impossible"]["reason"],
        by_title["impossible"]["reason"],
    )
    words = [by_title["README: say many words"], by_title["README: say short words"]]
    campaign.check(
        "conflict: one of the two came back once, and both landed",
        sorted(task["attempts"] for task in words) == [0, 1] and all(task["state"] == "landed" for task in words),
        words,
    )


def check_permission(campaign: Campaign, watch: Watch) -> None:
    if campaign.env.get("FARM_PERMISSIONS") == "all":
        campaign.check("permission: nobody was asked, as agents have all of them", not watch.waiting, watch.waiting)
        inside = campaign.env.get("FARM_ISOLATE") != "none"
        campaign.check("permission: what it wrote elsewhere came no further than its sandbox", inside != watch.asked.exists())
        return
    campaign.check(
        "permission: status said waiting, and for what",
        watch.waiting.get("state") == "waiting" and "touch" in watch.waiting.get("cause", ""),
        (watch.waiting, watch.states),
    )
    first = (watch.waiting.get("list") or "").splitlines()[:1]
    campaign.check(
        "permission: the waiting agent is shown first, with how to get there",
        first and watch.waiting["agent"] in first[0] and "attach" in watch.waiting["list"],
        watch.waiting.get("list", ""),
    )
    campaign.check("permission: the command ran only after a person said yes", watch.asked.exists())


def check_troubles(campaign: Campaign, watch: Watch) -> None:
    requests = campaign.requests()
    check_permission(campaign, watch)
    campaign.check(
        "usage limit: status named it, and until when",
        any("usage limit until" in cause for cause in watch.causes),
        sorted(watch.causes),
    )
    campaign.check("API failure: it was noted by that name", "API failure" in watch.causes, sorted(watch.causes))
    campaign.check("kill -9: a CLI was killed at its work", watch.killed, watch.states)
    check_conversation(campaign, "kill -9", "Task killed", watch.killed.get("at", 0))
    refused = [request["at"] for request in requests if request.get("status") == 429]
    check_conversation(campaign, "usage limit", "Task overtaken", refused[-1] if refused else 0)
    sent = watch.sent
    campaign.check("send: text to a busy agent was taken", sent is not None and sent.returncode == 0, sent)
    campaign.check(
        "send: the model has seen it",
        any("a word from a person" in prompt for request in requests for prompt in request.get("prompts", [])),
    )


def check_conversation(campaign: Campaign, name: str, title: str, at: float) -> None:
    """The requests about a task after `at` (epoch seconds) belong to the conversation from before, and hold its messages."""
    requests = [request for request in campaign.requests() if any(title in prompt for prompt in request.get("prompts", []))]
    before = {request["session"] for request in requests if request["at"] < at}
    later = [request for request in requests if request["at"] > at]
    good = later and {request["session"] for request in later} == before and later[0]["messages"] > 4
    campaign.check(f"{name}: the conversation went on with its earlier messages", good, (before, later[:1]))


def check_costs(campaign: Campaign) -> None:
    path = campaign.repo / "coordination/usage.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    last = {line.get("conversation") or line["task"]: line for line in lines}
    good = [request for request in campaign.requests() if request["path"] == "/v1/messages" and request.get("status") == 200]
    tokens = sum(line["tokens_in"] for line in last.values())
    campaign.check(
        "cost: every task has a line", len({line["task"] for line in lines}) == 20, len({line["task"] for line in lines})
    )
    lost = 1200 * 2  # of a CLI that was killed or ended before it wrote its last reply down
    campaign.check(
        "cost: the tokens are those that the API counted", abs(tokens - 1200 * len(good)) <= lost, (tokens, 1200 * len(good))
    )
    campaign.check("cost: there are dollars", sum(line["cost_usd"] for line in last.values()) > 0)


def report_rows(campaign: Campaign, watch: Watch) -> None:
    """The rows of the group `agents`: what ten sessions take, and what of it is the farm's own share."""
    campaign.check(f"all {campaign.options.n} agents worked at once", watch.all_working is not None, watch.states)
    if watch.all_working is None:
        return
    cpu, rss = watch.cpu
    print(f"agents: up to {campaign.options.n} agents working\t{watch.all_working:.1f} s")
    print(f"agents: memory an agent\t{sum(watch.rss) / len(watch.rss) / 2**20:.0f} MiB (its whole process tree)")
    print(f"agents: the farm's own share\t{rss / 2**20:.0f} MiB, {cpu:.1f} s of CPU until then")


def check_end(campaign: Campaign) -> None:
    config = json.loads((campaign.home / ".claude.json").read_text())
    campaign.check("the shared .claude.json is whole", config.get("hasCompletedOnboarding") is True)
    down = campaign.farm("down")
    campaign.check("down stops everything", down.returncode == 0, down.stderr)
    campaign.wait_for(lambda: not campaign.processes(), 10)
    left = [" ".join(process.cmdline())[:100] for process in campaign.processes()]
    campaign.check("nothing is left running", not left, left)
    clean = campaign.farm("clean")
    campaign.check("clean removes every worktree", clean.returncode == 0, clean.stderr)


# ---------------------------------------------------------------------------------------------- a reboot


def run_reboot(campaign: Campaign) -> None:
    """Every process of the farm is killed at once while five sessions are in the middle of a turn; then `up`."""
    agents = min(5, campaign.options.n)
    names = [f"rebooted_{number}" for number in range(agents)]
    for name in names:
        script = [*function_script(name, "text"), "SLEEP 20", f"RUN {GATE}", "COMMIT Add it", "SUBMIT"]
        campaign.farm("add", f"Reboot {name}", "--prompt", "\n".join(script))
    up = ["up", "-n", str(agents), "--agent", "claude", "--gate", GATE]
    campaign.farm(*up)
    folder = campaign.folder / "textkit-farm"
    written = campaign.wait_for(lambda: len(list(folder.glob("agent-*-worktree/tests/test_rebooted_*.py"))) == agents, 60)
    campaign.check(f"reboot: {agents} sessions were in the middle of their turns", written)
    for process in campaign.processes():
        with contextlib.suppress(psutil.Error):
            process.kill()
    at = time.time()
    campaign.wait_for(lambda: not campaign.processes(), 10)
    campaign.check("reboot: up starts the farm again", campaign.farm(*up).returncode == 0)
    campaign.wait_for(lambda: all(task["state"] == "landed" for task in reboot_tasks(campaign)), 120)
    left = [(task["title"], task["state"], task["reason"]) for task in reboot_tasks(campaign) if task["state"] != "landed"]
    campaign.check("reboot: every task landed", not left, left)
    for name in names:
        check_conversation(campaign, f"reboot, {name}", f"Reboot {name}", at)
    campaign.farm("down")


def reboot_tasks(campaign: Campaign) -> list[dict]:
    return [task for task in campaign.json("tasks") if task["title"].startswith("Reboot")]


# ---------------------------------------------------------------------------------------------- a missing login


def run_login(campaign: Campaign) -> None:
    """Nobody is logged in; then a person logs in and types `up`."""
    token = campaign.env.pop("CLAUDE_CODE_OAUTH_TOKEN")
    for number in range(3):
        script = [*function_script(f"login_{number}", "text"), "SUBMIT"]
        campaign.farm("add", f"Login {number}", "--prompt", "\n".join(script))
    up = ["up", "-n", "2", "--agent", "claude", "--gate", GATE]
    campaign.farm(*up)
    said = campaign.wait_for(lambda: all("not logged in" in agent["cause"] for agent in campaign.agents()), 60)
    campaign.check("login: every agent says that it is not logged in", said, [agent["cause"] for agent in campaign.agents()])
    end = int(time.time() + 86400) * 1000
    login = {
        "accessToken": token,
        "refreshToken": "none",
        "expiresAt": end,
        "scopes": ["user:inference"],
        "subscriptionType": "max",
    }
    (campaign.home / ".claude/.credentials.json").write_text(json.dumps({"claudeAiOauth": login}))
    campaign.farm(*up)

    def tasks() -> list[dict]:
        return [task for task in campaign.json("tasks") if task["title"].startswith("Login")]

    campaign.wait_for(lambda: all(task["state"] == "landed" for task in tasks()), 60)
    good = all(task["state"] == "landed" and task["attempts"] == 0 for task in tasks())
    campaign.check("login: after it and `up` every task landed, and no attempt was counted", good, tasks())
    campaign.farm("down")


# ---------------------------------------------------------------------------------------------- the other CLIs


def run_others(campaign: Campaign, names: list[str]) -> None:
    """One task through each, headless. They wait for each other, so that none takes another's."""
    before = {task["id"] for task in campaign.json("tasks")}
    for number in range(len(names)):
        script = [f"GATHER {len(names)}", *function_script(f"other_{number}", "text"), "COMMIT Add it", "SAY done", "Thank you."]
        campaign.farm("add", f"Another function, {number}", "--prompt", "\n".join(script))
    campaign.env.update(FARM_PERMISSIONS="all", IS_SANDBOX="1")
    mix = ",".join(f"{name}:1" for name in names)
    command = [sys.executable, str(ROOT / "farm.py"), "--repo", str(campaign.repo), "run", "--agent", mix, "--gate", GATE]
    seconds = max(30, min(200, campaign.deadline - time.monotonic()))
    try:
        subprocess.run([*command, "--until-drained"], env=campaign.env, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        campaign.check("the other CLIs ended in time", False, f"{seconds:.0f} s")
    tasks = {task["id"]: task for task in campaign.json("tasks") if task["id"] not in before}
    path = campaign.repo / "coordination/usage.jsonl"
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if line["task"] in tasks] if path.exists() else []
    for name in names:
        line = next((line for line in lines if line["preset"] == name), {"task": ""})
        task = tasks.get(line["task"], {})
        good = task.get("state") == "landed" and task["attempts"] == 0
        campaign.check(f"{name}: its task landed", good, (task.get("state"), task.get("reason")))
        campaign.check(
            f"{name}: its tokens are counted", line.get("tokens_in", 0) >= 3600 and line.get("tokens_out", 0) >= 240, line
        )
    campaign.farm("down", "--now")


# ---------------------------------------------------------------------------------------------- all of it


def run_campaign(folder: Path, options: argparse.Namespace) -> int:
    clis = Path(options.clis).resolve()
    wanted = list(PACKAGES) if options.only in (None, "others") else ["claude"]
    answers = install_all(clis, wanted)
    if answers["claude"]:
        raise Skipped(answers["claude"])
    campaign = Campaign(folder, clis, options)
    try:
        if options.only in (None, "claude"):
            run_claude(campaign)
        if options.only in (None, "reboot"):
            run_reboot(campaign)
        for name in wanted:
            if answers[name]:
                print(f"skip {name}: {answers[name]}")
        if options.only in (None, "login"):
            run_login(campaign)
        if options.only in (None, "others"):
            run_others(campaign, ["claude-print", *(name for name in wanted[1:] if not answers[name])])
    finally:
        campaign.end()
    failed = campaign.results.count(False)
    print(f"{len(campaign.results) - failed} passed, {failed} failed")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clis", default=str(ROOT / ".venv/agents"), help="where the CLIs are, or are installed")
    parser.add_argument("--seconds", type=float, default=480, help="the campaign ends after so many")
    parser.add_argument("-n", type=int, default=10, help="interactive sessions")
    parser.add_argument("--only", choices=("claude", "reboot", "login", "others"), help="a part of it")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder")
    options = parser.parse_args()
    for name in [name for name in os.environ if re.match("FARM_(?!ISOLATE$|PERMISSIONS$)|GIT_|TMUX", name)]:
        del os.environ[name]
    folder = Path(tempfile.mkdtemp(prefix="fa-", dir="/tmp")).resolve()
    try:
        return run_campaign(folder, options)
    except Skipped as reason:
        print(f"skipped: {reason}")
        return 0
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

"""The campaign of real coding CLIs: the CLIs, their tasks, and the farm in a scratch folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from demo import FILES, FUNCTIONS, make_repo
from paths import ROOT
from stand_in import StandIn

PACKAGES = {
    "claude": "@anthropic-ai/claude-code@2.1.330",
    "codex": "@openai/codex@0.169.0",
    "gemini": "@google/gemini-cli@0.61.0",
    "opencode": "opencode-ai@1.18.33",
}
INSTALL_SECONDS = 150.0
GATE = f"{shlex.quote(sys.executable)} -B -m unittest -q"


# ---------------------------------------------------------------------------------------------- the CLIs


def program(clis: Path, name: str) -> Path:
    return clis / name / "node_modules" / ".bin" / name


def install(clis: Path, name: str) -> str:
    """Install one CLI from npm unless it is there; "" or why it cannot be."""
    if program(clis, name).exists():
        return ""
    if not shutil.which("npm"):
        return "npm is not installed"
    folder = clis / name
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", str(folder), PACKAGES[name]]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"npm took longer than {INSTALL_SECONDS:g} s"
    if done.returncode or not program(clis, name).exists():
        shutil.rmtree(folder, ignore_errors=True)
        return "npm: " + " ".join(done.stderr.split() or ["no such program was installed"])[:200]
    return ""


def install_all(clis: Path, names: list[str]) -> dict[str, str]:
    """name -> why it is not there ("" when it is)."""
    answers = {}
    threads = [threading.Thread(target=lambda name=name: answers.update({name: install(clis, name)})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def seed_home(home: Path, repo: Path, url: str) -> None:
    """What a person has answered once, and where the models are."""
    files = {
        ".claude.json": {"hasCompletedOnboarding": True, "projects": {str(repo): {"hasTrustDialogAccepted": True}}},
        ".gemini/settings.json": {"security": {"auth": {"selectedType": "gemini-api-key"}}},
        ".gemini/trustedFolders.json": {str(repo.parent): "TRUST_FOLDER"},
        ".config/opencode/opencode.json": {
            "provider": {
                "fake": {
                    "npm": "@ai-sdk/openai-compatible",
                    "options": {"baseURL": f"{url}/v1", "apiKey": "fake"},
                    "models": {"fake": {"tool_call": True}},
                }
            },
            "model": "fake/fake",
            "permission": "allow",
            "autoupdate": False,
        },
    }
    for name, value in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(json.dumps(value))
    (home / ".codex").mkdir()
    (home / ".codex/config.toml").write_text(
        'model = "fake"\nmodel_provider = "fake"\n[model_providers.fake]\nname = "fake"\n'
        f'base_url = "{url}/v1"\nenv_key = "FAKE_KEY"\nwire_api = "responses"\n'
    )
    (home / ".gitconfig").write_text("[user]\n\tname = Test Person\n\temail = test@example.invalid\n")


def make_environment(folder: Path, home: Path, clis: Path, url: str, token: str) -> dict[str, str]:
    """Only what the CLIs need: nothing of the caller's own keys or settings, and no way out but 127.0.0.1."""
    path = [str(program(clis, name).parent) for name in PACKAGES] + [str(Path(sys.executable).parent), os.environ["PATH"]]
    nowhere = "http://127.0.0.1:9"
    return {
        "HOME": str(home),
        "PATH": os.pathsep.join(path),
        "TMPDIR": str(folder / "tmp"),
        "TMUX_TMPDIR": str(folder / "tmux"),
        "TERM": "xterm-256color",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "SHELL": "/bin/bash",
        "USER": "test",
        "TZ": "UTC",
        "TEST_TOKEN": token,
        "GIT_CONFIG_NOSYSTEM": "1",
        "FARM_PYTHON": sys.executable,
        # how agents are isolated is the caller's; the CLIs, this interpreter and the key of one are shown in sandboxes
        **{name: os.environ[name] for name in ("FARM_ISOLATE", "FARM_PERMISSIONS") if name in os.environ},
        "FARM_SHOW": os.pathsep.join([str(clis), str(Path(sys.executable).parents[1])]),
        "FARM_PASS": "FAKE_KEY",
        "ANTHROPIC_BASE_URL": url,
        "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-no-token-at-all-0000000000000000000000",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "CLAUDE_CODE_MAX_RETRIES": "1",
        "FAKE_KEY": "fake",
        "GEMINI_API_KEY": "fake",
        "GOOGLE_GEMINI_BASE_URL": url,
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "HTTPS_PROXY": nowhere,
        "HTTP_PROXY": nowhere,
        "https_proxy": nowhere,
        "http_proxy": nowhere,
    }


# ---------------------------------------------------------------------------------------------- the tasks


def function_script(name: str, body: str) -> list[str]:
    test = (
        f"import unittest\\nfrom textkit.{name} import {name}\\n\\n\\nclass Test(unittest.TestCase):\\n    def test_text(self):\\n"
        f"        self.assertIsNotNone({name}('a b'))\\n"
    )
    return [f"WRITE textkit/{name}.py::def {name}(text):\\n    return {body}\\n", f"WRITE tests/test_{name}.py::{test}"]


def campaign_tasks(asked: Path, agents: int) -> list[dict]:
    """Twenty tasks: plain ones, and one for each kind of trouble. asked: a file that only a permitted command writes."""
    more = {f"{name}_twice": f"({body}, {body})" for name, body in FUNCTIONS.items()}
    tasks = []
    for number, (name, body) in enumerate([*FUNCTIONS.items(), *more.items()][:10]):
        script = [f"GATHER {agents}"] * (number < agents) + function_script(name, body)
        tasks.append({"title": f"Add {name}", "prompt": script + ["SLEEP 2", f"RUN {GATE}", "COMMIT Add it", "SUBMIT"]})
    for name, rest in {
        "unsent": ["COMMIT Add it"],
        "unsaved": ["NOCOMMIT"],
        "permission": [f"RUN touch {asked}", "SUBMIT"],
        "failing": ["FIRST ERROR 529::3::Overloaded", "SUBMIT"],
        "killed": ["SLEEP 25", "RUN git status", "SUBMIT"],
    }.items():
        tasks.append({"title": f"Task {name}", "prompt": function_script(name, "text") + rest})
    for word in ("many", "short"):
        text = FILES["README.md"].replace("few", word).replace("\n", "\\n")
        merge = "AGAIN RUN git merge --quiet --no-edit -X ours main"
        tasks.append(
            {
                "title": f"README: say {word} words",
                "prompt": ["FIRST SLEEP 3", f"FIRST WRITE README.md::{text}", "FIRST COMMIT Say it", merge, "SUBMIT"],
            }
        )
    tasks.append({"title": "Task impossible", "prompt": ["FAIL it cannot be done"], "max_attempts": 1})
    tasks.append(
        {"title": "Task overtaken", "prompt": [*function_script("overtaken", "text"), "AWAIT", "RUN git status", "SUBMIT"]}
    )
    tasks.append({"title": "Task limited", "prompt": ["LIMIT minute", *function_script("limited", "text"), "SUBMIT"]})
    by_name = {task["title"].removeprefix("Task "): task for task in tasks}
    by_name["failing"]["id"] = "failing"  # the limit comes after the failure, so that each is seen
    by_name["limited"]["after"] = ["failing"]
    return [{**task, "prompt": "\n".join(task["prompt"])} for task in tasks]


# ---------------------------------------------------------------------------------------------- the campaign


class Campaign:
    """A farm in a scratch folder, and what is asked of it."""

    def __init__(self, folder: Path, clis: Path, options: argparse.Namespace) -> None:
        self.folder, self.options, self.token = folder, options, secrets.token_hex(8)
        self.deadline = time.monotonic() + options.seconds
        self.repo, self.home, self.log = folder / "textkit", folder / "home", folder / "requests.jsonl"
        for name in ("home", "tmp", "tmux"):
            (folder / name).mkdir()
        self.server = StandIn(log=str(self.log))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.env = make_environment(folder, self.home, clis, self.server.url, self.token)
        make_repo(self.repo)
        seed_home(self.home, self.repo, self.server.url)
        self.results: list[bool] = []

    # -- asking the farm

    def farm(self, *args: str, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "farm.py"), "--repo", str(self.repo), *args]
        return subprocess.run(command, env=self.env, text=True, capture_output=True, timeout=120, **options)

    def json(self, verb: str):
        done = self.farm(verb, "--json")
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise SystemExit(f"farm {verb} --json: exit code {done.returncode}\n{done.stdout}{done.stderr}") from None

    def agents(self) -> list[dict]:
        return [agent for agent in self.json("status")["agents"] if agent["agent"] != "control"]

    def events(self) -> list[dict]:
        path = self.repo / "coordination/events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def requests(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def tmux(self, *args: str) -> str:
        sockets = list((self.folder / "tmux").glob("tmux-*/farm-*"))
        command = ["tmux", "-S", str(sockets[0]), *args]
        return subprocess.run(command, env=self.env, text=True, capture_output=True, timeout=20).stdout if sockets else ""

    # -- checks

    def check(self, name: str, good: object, detail: object = "") -> bool:
        self.results.append(bool(good))
        print(f"{'ok  ' if good else 'FAIL'} {name}{'' if good or detail == '' else f': {detail}'}", flush=True)
        return bool(good)

    def wait_for(self, ask, seconds: float):
        """The first true answer of `ask`, or its last one at the deadline."""
        end = min(time.monotonic() + seconds, self.deadline)
        while not (answer := ask()) and time.monotonic() < end:
            time.sleep(0.4)
        return answer

    # -- cleaning up

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("TEST_TOKEN") == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self) -> None:
        """End whatever is left, and nothing that is not ours."""
        self.tmux("kill-server")
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.server.shutdown()

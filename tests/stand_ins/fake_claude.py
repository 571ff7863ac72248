#!/usr/bin/env python3
"""A stand-in for the interactive Claude Code, for fast tests: the same flags, hooks and transcript, and a prompt that scripts it.

It calls the hooks of `--settings`, writes the conversation to ~/.claude/projects, refuses a session id that is in use, and stays
after its last turn until SIGTERM, as the real one does (recordings of that are below recorded/). Directives, one a line:

    WORK            writes TASK.txt and commits it
    RUN command     runs it by bash
    ASK             asks for a permission, and waits until the file `go` is in the repo
    STOP            one more end of the turn without anything done (then it is sent back, or ended)
    LIMIT text      a usage limit with this text, as long as the file `limited` is in the repo
    ERROR kind      the turn fails with this error once
    CRASH           kills itself once
    SLEEP seconds
    COST dollars    what the status line tells
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(os.environ["FARM_REPO"])
CONVERSATIONS = Path.home() / ".claude/projects/any"


def take(words: list[str]) -> tuple[dict, str]:
    """Flags with a value, and the prompt behind `--`."""
    cut = words.index("--")
    return dict(zip(words[:cut:2], words[1:cut:2], strict=True)), words[cut + 1]


class Session:
    def __init__(self, flags: dict, prompt: str):
        self.id = flags.get("--session-id") or flags["--resume"]
        self.path = CONVERSATIONS / f"{self.id}.jsonl"
        self.settings = json.loads(Path(flags["--settings"]).read_text())
        self.prompt, self.resumed = prompt, "--resume" in flags
        if self.path.exists() != self.resumed:
            sys.exit(f"Error: Session ID {self.id} is already in use, or there is no conversation of that id.")
        CONVERSATIONS.mkdir(parents=True, exist_ok=True)

    def write(self, **line) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def hook(self, event: str, **more) -> dict:
        answer = {}
        for entry in self.settings["hooks"].get(event, []):
            for one in entry["hooks"]:
                told = json.dumps({"hook_event_name": event, "session_id": self.id, **more})
                done = subprocess.run(["sh", "-c", one["command"]], input=told, capture_output=True, text=True, check=True)
                answer = json.loads(done.stdout) if done.stdout else answer
        return answer

    def once(self, what: str) -> bool:
        """Whether this conversation does it for the first time."""
        is_first = what not in self.path.read_text()
        self.write(type="done", what=what)
        return is_first

    def follow(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "WORK":
            task = os.environ["FARM_TASK"]
            Path(f"{task}.txt").write_text(f"{task} {'resumed' if self.resumed else 'fresh'}\n")
            subprocess.run(["bash", "-c", f"git add -A && git commit -q -m 'work on {task}'"], check=True)
        elif word == "RUN":
            subprocess.run(["bash", "-c", rest], check=False)
        elif word == "ASK":
            self.hook("PermissionRequest", tool_name="Bash", tool_input={"command": "make \x1b[31mdeploy"})
            while not (REPO / "go").exists():
                time.sleep(0.02)
            self.hook("PostToolUse")
        elif word == "CRASH" and self.once("crash"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "SLEEP":
            time.sleep(float(rest))
        elif word == "COST":
            told = json.dumps({"session_id": self.id, "cost": {"total_cost_usd": float(rest)}})
            subprocess.run(["sh", "-c", self.settings["statusLine"]["command"]], input=told, text=True, check=True)

    def find_error(self, lines: list[str]) -> dict | None:
        for word, _, rest in (line.partition(" ") for line in lines):
            if word == "LIMIT" and (REPO / "limited").exists():
                return {"error": "rate_limit", "last_assistant_message": rest}
            if word == "ERROR" and self.once(f"error {rest}"):
                return {"error": rest, "last_assistant_message": "scripted"}
        return None

    def turn(self) -> None:
        self.write(type="user", message={"content": self.prompt})
        self.hook("UserPromptSubmit", prompt=self.prompt)
        first = json.loads(self.path.read_text().splitlines()[0])  # a resumed conversation knows its task
        script = first["message"]["content"].splitlines()
        error = self.find_error(script)
        if error:
            self.hook("StopFailure", **error)
            return
        usage = {"input_tokens": 100, "output_tokens": 10, "cache_read_input_tokens": 1000}
        self.write(type="assistant", message={"id": f"msg-{time.time_ns()}", "usage": usage})
        for line in script:
            self.follow(line)
        if self.hook("Stop", stop_hook_active=False).get("decision") == "block":
            print("sent back")
            self.hook("Stop", stop_hook_active=True)

    def end(self, *_) -> None:
        self.write(type="cost-state", totalCostUSD=0.25)
        sys.exit(143)


session = Session(*take(sys.argv[1:]))
signal.signal(signal.SIGTERM, session.end)
session.turn()
while True:
    signal.pause()

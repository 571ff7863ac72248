"""Attempts and turns in process: a clock that stands still, claims, and the hooks that a CLI calls."""

from __future__ import annotations

import os
from datetime import datetime, timezone

import farm as toolkit

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc).timestamp()


def settings_of(**values) -> toolkit.Settings:
    return toolkit.Settings(**{name: setting.default for name, setting in toolkit.SETTINGS.items()} | values)


class Clock:
    def __init__(self):
        self.seconds = NOW

    def now(self) -> float:
        return self.seconds

    monotonic = now


def claim(store, agent: str, conversation: str = "", preset: str = "claude") -> toolkit.Claim:
    with store.transaction() as tx:
        told = {"preset": preset, "id": conversation} if conversation else {"preset": preset}
        return toolkit.TaskQueue(tx).claim(agent, toolkit.identify(os.getpid()), "", told)


def hook(store, event: str, agent: str = "agent-001", fence: str = "t-0002.2", **more) -> dict | None:
    os.makedirs(store.path("mailbox", agent), exist_ok=True)
    return toolkit.note_turn(store, agent, fence, {"hook_event_name": event, **more})


def turn(store) -> dict:
    return toolkit.read_mail(store, "agent-001", toolkit.TURN_FILE, "t-0002.2")

"""Settings: where each comes from, odd numbers and odd commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from farm_calls import A, drain
from sandbox import git

# ---------------------------------------------------------------------------------------------- settings


SOURCES = ("default", "last up", "farm.env", "environment", "flag")


@pytest.mark.parametrize("highest", range(len(SOURCES)), ids=SOURCES)
def test_the_nearest_setting_counts(farm, highest):
    """max_attempts stands for all: it is set in every source up to `highest`, to that source's number."""
    farm.ok("add", "makes the folders")
    remembered = {"schema": 1, "mode": "down", "settings": {"max_attempts": 11}}
    if highest >= 1:
        (farm.folder / "farm.json").write_text(json.dumps(remembered))
    if highest >= 2:
        (farm.repo / "farm.env").write_text("# settings\n\nFARM_MAX_ATTEMPTS='12'\n")
    env = {"FARM_MAX_ATTEMPTS": "13"} if highest >= 3 else {}
    flag = ["--max-attempts", "14"] if highest >= 4 else []
    farm.ok("add", "a", *flag, env=env)
    assert farm.task("t-0002")["max_attempts"] == [3, 11, 12, 13, 14][highest]


def test_an_empty_variable_counts_as_not_set(farm):
    farm.ok("add", "a", env={"FARM_MAX_ATTEMPTS": ""})
    assert farm.task("t-0001")["max_attempts"] == 3


def test_a_setting_that_is_no_number_says_where_it_comes_from(farm):
    (farm.repo / "farm.env").write_text("FARM_MAX_ATTEMPTS=many\n")
    assert "farm.env" in farm.refused(2, "add", "a")


def test_a_line_of_farm_env_that_is_no_setting_is_named(farm):
    (farm.repo / "farm.env").write_text("FARM_N=2\nnonsense\n")
    assert "line 2" in farm.refused(2, "add", "a")


@pytest.mark.parametrize("line", ["FARM_GATE=test ! -e b.txt", "export FARM_GATE='test ! -e b.txt'"])
def test_the_gate_of_farm_env_decides(farm, line):
    (farm.repo / "farm.env").write_text(line + "\n")
    farm.ok("add", "a")
    farm.submit(A, {"b.txt": "b"})
    farm("merge")
    assert "test ! -e b.txt" in farm.task("t-0001")["reason"]


# ---------------------------------------------------------------------------------------------- odd numbers and commands


@pytest.mark.parametrize("count", ["0", "-1", "ten", "", "1.5", "1e9"])
def test_a_number_of_agents_that_makes_no_sense_is_a_usage_error(farm, count):
    farm.refused(2, "up", "-n", count, "--agent", "true")


def test_a_refused_up_starts_nothing(farm):
    farm("up", "-n", "0", "--agent", "true")
    assert (git(farm.repo, "worktree", "list").count("\n"), Path(f"{farm.repo}-farm").exists()) == (0, False)


@pytest.mark.parametrize("setting", ["N=0", "STYLE=x", "GATE_TIMEOUT=soon", "GATE_TIMEOUT=-1", "GATE_TIMEOUT=nan", "SLOTS=-1"])
def test_a_setting_that_makes_no_sense_is_a_usage_error(farm, setting):
    farm.refused(2, "merge", env=dict([("FARM_" + setting).split("=")]))


@pytest.mark.parametrize("verb", ["up", "run"])
def test_an_agent_command_that_is_not_there_exits_6(farm, verb):
    assert "no-such-agent" in farm.refused(6, verb, "-n", "1", "--agent", "no-such-agent --flag")


def test_no_agent_and_no_claude_exits_6_and_points_to_the_demo(farm):
    assert "make demo" in farm.refused(6, "up", "-n", "1", env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"})


def test_a_preset_that_is_not_installed_exits_6(farm):
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    assert "aider" in farm.refused(6, "up", "-n", "1", "--agent", "aider", env=env)


def test_an_unknown_agent_leaves_no_session_and_no_worktree(farm):
    farm("up", "-n", "1", "--agent", "no-such-agent")
    assert not Path(f"{farm.repo}-farm").exists()


def test_an_agent_that_only_fails_keeps_its_last_words_and_run_until_drained_exits_5(farm):
    farm.ok("add", "Fail", "--max-attempts", "1")
    done = drain(farm, agent="echo the disk is made of cheese; exit 3", check=False)
    task = farm.task("t-0001")
    assert (done.returncode, task["state"], "cheese" in task["reason"]) == (5, "failed", True)

"""The command line: completion, help, first use, and what is printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys

import pytest
from farm_calls import FARM, SHIM, UGLY, A, B, C
from sandbox import run
from screens import up, wait_for_state

import farm as toolkit

CONTROL_CHARACTERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


# ---------------------------------------------------------------------------------------------- completion, help, first use


def complete(farm, line: str, cwd=None) -> set[str]:
    """What bash offers for a command line whose cursor is at its end."""
    words = line.split(" ")
    array = " ".join(f"'{word}'" for word in words)
    script = f"""eval "$({sys.executable} {FARM} completion bash)"
COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _farm; printf '%s\\n' "${{COMPREPLY[@]}}" """
    return set(run(["bash", "-c", script], cwd=cwd or farm.repo, check=True).stdout.split())


def test_bash_completes_verbs_options_agents_and_tasks(farm):
    farm.ok("add", "one"), farm.ok("add", "two")
    farm.claim(A)
    assert complete(farm, "./farm.py st") == {"status"}
    assert complete(farm, "./farm.py status --") == {"--json", "--watch", "--help"}
    assert complete(farm, "./farm.py attach ") == {A}
    assert complete(farm, "./farm.py cancel t-") == {"t-0001", "t-0002"}
    assert complete(farm, "./farm.py add x --after t-0001 --after ") == {"t-0001", "t-0002"}
    assert complete(farm, "./farm.py rescue r") == {"restore"}
    assert complete(farm, "./farm.py completion z") == {"zsh"}


def test_completion_follows_repo_and_works_anywhere(farm, sandbox):
    farm.ok("add", "one")
    assert complete(farm, f"farm.py --repo {farm.repo} retry ", sandbox.home) == {"t-0001"}
    assert "status" in complete(farm, "farm.py ", sandbox.home)
    assert complete(farm, "farm.py retry ", sandbox.home) == set()


def test_completion_of_a_damaged_farm_is_silent(farm):
    farm.ok("add", "one")
    (farm.folder / "task_queue" / "pending.json").write_text("{")
    assert complete(farm, "farm.py retry ") == set()


def test_zsh_takes_its_completion(farm):
    zsh = shutil.which("zsh")
    if not zsh:
        pytest.skip("there is no zsh here (apt install zsh)")
    text = run([sys.executable, FARM, "completion", "zsh"], check=True).stdout
    assert run([zsh, "-f", "-c", "autoload -U compinit; compinit -D\n" + text]).returncode == 0


def test_completion_of_another_shell_is_a_usage_error(farm):
    assert "completion bash" in farm.refused(2, "completion", "fish")


@pytest.mark.parametrize("verb", sorted(toolkit.VERBS))
def test_the_example_of_each_verbs_help_is_one_that_it_takes(farm, verb):
    shown = run([sys.executable, FARM, verb, "--help"], check=True).stdout
    example = shown.rpartition("example: ")[2].strip()
    assert example
    text = example.replace("$$", "1").removeprefix('eval "$(').removesuffix(')"')
    words = shlex.split(text)
    assert words[0] in ("farm", "./farm.py") and words[1] == verb
    args, options = toolkit.parse_options(verb, words[2:])
    assert "help" not in options


def test_farm_alone_says_where_it_stands_and_three_things_to_type(farm):
    shown = run([sys.executable, FARM], cwd=farm.repo, check=True).stdout
    commands = [line for line in shown.splitlines() if line.startswith(f"  {FARM} ")]
    assert "tasks: none" in shown and len(commands) == 3 and f"{FARM} add" in commands[0]
    up(farm, 1, "sleep 1000")
    farm.ok("add", "one")
    wait_for_state(farm, A, "working")
    shown = run([sys.executable, FARM], cwd=farm.repo, check=True).stdout
    assert "working 1" in shown and "loop: running" in shown and shown.count(f"  {FARM} ") == 3
    farm.ok("down", "--now", timeout=120)


def test_farm_alone_outside_a_repo_says_how_it_is_called(sandbox):
    shown = run([sys.executable, FARM], cwd=sandbox.home, check=True).stdout
    assert "not inside a git repository" in shown and "usage: farm.py" in shown


@pytest.mark.parametrize(
    ("words", "near"),
    [(["status", "--jsn"], "status --json"), (["merge", "--gatte", "x"], "merge --gate"), (["statsu"], "status"), (["tell"], "")],
)
def test_a_wrong_word_suggests_the_near_one(farm, words, near):
    assert f"try: ./farm.py {near}" in farm.refused(2, *words)


# ---------------------------------------------------------------------------------------------- what is printed


def with_control_characters(text: str) -> list[str]:
    """The lines that hold one, newlines and the tabs between fields left out."""
    return [line for line in text.replace("\t", " ").split("\n") if CONTROL_CHARACTERS.search(line)]


@pytest.mark.parametrize("verb", ["tasks", "queue", "locks", "status", "claim", "merge"])
def test_no_control_character_is_ever_printed(farm, verb):
    farm.ok("add", UGLY, "--prompt", UGLY)
    farm.ok("add", "b " + UGLY, "--path", UGLY)
    farm.submit(A, {"a.txt": "a"})
    farm.lock(C, UGLY, check=True)
    for options in [[B, "--owner-pid", str(farm.owner)]] if verb == "claim" else [["--json"], []]:
        done = farm(verb, *options)
        assert (done.returncode, with_control_characters(done.stdout + done.stderr)) == (0, [])


def test_json_keeps_text_exactly(farm):
    farm.ok("add", UGLY)
    assert farm.task("t-0001")["title"] == UGLY.strip()


def test_an_error_prints_no_control_character(farm):
    farm.lock(A, UGLY, check=True)
    assert with_control_characters(farm.lock(B, UGLY).stderr) == []


@pytest.mark.parametrize("verb", ["tasks", "queue", "locks", "merge", "status", "doctor"])
def test_json_is_one_document(farm, verb):
    farm.ok("add", "a")
    json.loads(farm(verb, "--json").stdout)


def test_a_verb_that_is_not_there_is_a_usage_error_that_names_the_near_one(farm):
    assert "status" in farm.refused(2, "statsu")


def test_an_option_that_is_not_there_is_a_usage_error(farm):
    farm.refused(2, "tasks", "--colour")


def test_an_option_without_its_value_is_a_usage_error(farm):
    farm.refused(2, "add", "Fix", "--prompt")


def test_no_verb_prints_the_usage(sandbox):
    done = run([SHIM], cwd=sandbox.home)
    assert "usage" in (done.stdout + done.stderr).lower()


VERBS = (
    "add tasks claim renew release fail submit cancel retry lock unlock locks with-lock queue merge up run down clean status"
    " attach logs send rescue doctor report"
)


def test_every_verb_explains_itself(sandbox):
    silent = [verb for verb in VERBS.split() if verb not in run([SHIM, verb, "--help"], cwd=sandbox.home).stdout]
    assert silent == []


def test_farm_py_can_be_run_as_a_program(farm):
    assert run([FARM, "--repo", farm.repo, "add", "Fix"], check=True).stdout == "t-0001\n"


def test_a_reader_that_goes_away_is_no_error(farm):
    farm.ok("add", "-f", "-", input="".join(f"task {number} {'x' * 200}\n" for number in range(500)))
    done = run(["bash", "-o", "pipefail", "-c", '"$@" | head -n 1', "bash", *farm.argv("tasks")])
    assert (done.returncode in (0, 141), done.stderr) == (True, "")

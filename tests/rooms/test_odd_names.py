"""Odd names of repos, files and tasks go their whole way."""

from __future__ import annotations

import json
import os
import shlex

import pytest
from farm_calls import A, Caller, drain, landed, make_commit
from sandbox import commit_files, git

ODD_NAMES = {
    "spaces": " two  words ",
    "quotes": "it's \"so\"",
    "unicode": "ünï çødé 文",
    "newline": "new\nline",
    "shell": "$(touch pwned) `touch pwned`; touch pwned & #{pane_id} %s",
    "backslash": "back\\slash\\n\\t",
    "dash": "-n --help",
    "tab": "a\ttab",
}
MIXED_NAME = "".join(ODD_NAMES.values())
COPY_PROMPT = 'cp "$FARM_PROMPT_FILE" prompt.txt'


@pytest.mark.parametrize("name", [MIXED_NAME, "-n --help"], ids=["mixed", "dash"])
def test_a_farm_works_in_a_folder_of_any_name(make_repo, name):
    farm = Caller(make_repo(name), os.getpid())
    farm.ok("add", "Write a file")
    drain(farm)
    assert landed(farm) == ["t-0001"]


@pytest.mark.parametrize("name", ["-it's-\"so\"/ünï-çødé;$(touch${IFS}pwned)#{pane_id}%s&|x"])
def test_work_lands_on_a_branch_of_any_name(farm, name):
    git(farm.repo, "symbolic-ref", "HEAD", f"refs/heads/{name}")
    git(farm.repo, "commit", "-q", "--allow-empty", "-m", "first")
    farm.ok("add", "Write a file")
    drain(farm)
    assert git(farm.repo, "ls-tree", "--name-only", f"refs/heads/{name}").split() == ["README.md", "made.txt"]


def test_titles_of_any_text_reach_main_and_run_nothing(farm):
    titles = [MIXED_NAME, "-n --help", "x" * 5000, "'\\", "# not a comment"]
    farm.ok("add", "-f", "-", input="".join(json.dumps({"title": title}) + "\n" for title in titles))
    drain(farm, agent='date >"$FARM_TASK"')
    assert (len(landed(farm)), list(farm.repo.rglob("pwned"))) == (len(titles), [])


def test_the_commit_of_what_is_left_over_carries_the_title(farm):
    farm.ok("add", "--", "-n it's \"so\" $(touch pwned) ünï")
    drain(farm)
    assert git(farm.repo, "log", "-1", "--format=%s", "main^2") == "-n it's \"so\" $(touch pwned) ünï"


def test_an_agent_reads_the_prompt_as_it_was_given(farm):
    prompt = "\n".join(["first", *ODD_NAMES.values(), "last"])
    farm.ok("add", "-f", "-", input=json.dumps({"title": "Read", "prompt": prompt}))
    farm.claim(A)
    assert prompt in (farm.folder / "prompts" / "t-0001.1.md").read_text()


def test_a_prompt_of_a_megabyte_reaches_the_agent(farm):
    farm.ok("add", "-f", "-", input=json.dumps({"title": "Long", "prompt": "word " * 200_000}))
    drain(farm, agent=COPY_PROMPT)
    assert git(farm.repo, "show", "main:prompt.txt").count("word ") >= 199_999


@pytest.mark.parametrize("text", ["\ud800", "\0", "\udc80"], ids=ascii)
def test_text_that_is_no_utf8_is_no_trouble_in_title_and_prompt(farm, text):
    farm.ok("add", "-f", "-", input=json.dumps({"title": f"odd {text}", "prompt": f"odd {text}"}))
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    assert landed(farm) == ["t-0001"]


def test_files_of_any_name_land(farm):
    farm.ok("add", "Write")
    drain(farm, agent="".join(f"printf text >./{shlex.quote(name)}; " for name in ODD_NAMES.values()))
    assert [git(farm.repo, "show", f"main:{name}") for name in ODD_NAMES.values()] == ["text"] * len(ODD_NAMES)


def test_conflicts_in_files_of_any_name_come_back_with_the_name(farm):
    for name in ODD_NAMES.values():
        (farm.repo / name).write_text("base\n")
    commit_files(farm.repo, {}, "base")
    farm.ok("add", "Conflict")
    claim = farm.claim(A)
    git(farm.repo, "checkout", "-q", "-b", f"farm/{A}/t-0001")
    commit_files(farm.repo, dict.fromkeys(ODD_NAMES.values(), "theirs\n"))
    git(farm.repo, "checkout", "-q", "main")
    commit_files(farm.repo, dict.fromkeys(ODD_NAMES.values(), "ours\n"))
    farm.ok("submit", A, "--fence", claim["fence"])
    assert farm("merge").returncode == 5
    assert "ünï" in farm.task("t-0001")["reason"]


def test_a_file_in_the_way_of_any_name_blocks_and_stays(farm):
    farm.ok("add", "Write")
    commit = make_commit(farm.repo, {"it's.txt": "theirs"})
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--commit", commit)
    (farm.repo / "it's.txt").write_text("mine")
    assert farm("merge").returncode == 5
    assert (farm.repo / "it's.txt").read_text() == "mine"

"""Every command of the README runs, in a copy of the toolkit, with stand-ins for ssh, scp, gh and the coding CLIs."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from paths import ROOT
from sandbox import git, run

import farm as toolkit

README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "scripts/README.md", "tests/README.md")}
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M)]
LINES = [line for block in BLOCKS for line in block.splitlines()]
SKIPPED = {"make demo": "test_farm runs it", "make test": "this is it"}

STAND_INS = {
    "claude": '#!/bin/sh\necho "$FARM_TASK" > "done-$FARM_TASK.txt"\n',
    "codex": '#!/bin/sh\necho "$FARM_TASK" > "done-$FARM_TASK.txt"\n',
    "gh": """#!/bin/sh\necho '[{"body":"It fails.","labels":[],"number":12,"title":"Fix it","url":"https://example.org/12"}]'\n""",
    "ssh": '#!/bin/sh\nshift\ncd "$HOME" && exec sh -c "$*"\n',
    "scp": '#!/bin/sh\nto=$HOME/farm\nmkdir -p "$to" && cp -r farm.py scripts Makefile "$to" && ln -s "$FARM_VENV" "$to/.venv"\n',
}

APP = {"Makefile": "test:\n\ttrue\n", "test.sh": "exit 0\n"}


@pytest.fixture
def checkout(make_repo, sandbox, monkeypatch):
    """A checkout of the toolkit beside a repo `app`, and the same under HOME for the other machine."""
    copy = make_repo("toolkit", files={"tasks.md": "- [ ] one thing\n- [ ] another\n"})
    for name in ("Makefile", "farm.py"):
        shutil.copy2(ROOT / name, copy / name)
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    os.symlink(ROOT / ".venv", copy / ".venv")
    (copy / ".gitignore").write_text(".venv\n__pycache__\n")
    git(copy, "add", "-A")
    git(copy, "commit", "-q", "-m", "toolkit")
    for app in (make_repo("app", files=APP), sandbox.home / "app"):
        if not app.exists():
            shutil.copytree(make_repo("other", files=APP), app)
        git(app, "init", "-q", "--bare", f"{app}.git")
        git(app, "remote", "add", "origin", f"{app}.git")
    (sandbox.home / "tasks.md").write_text("- [ ] far away\n")
    trusted = {
        str(path): {"hasTrustDialogAccepted": True} for path in (copy, copy.parent / "app", sandbox.home / "app")
    }
    (sandbox.home / ".claude.json").write_text(json.dumps({"hasCompletedOnboarding": True, "projects": trusted}))
    for name, text in STAND_INS.items():
        path = sandbox.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sandbox.root / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FARM_VENV", str(ROOT / ".venv"))
    return copy


def is_fine(line: str, code: int) -> bool:
    """0, or what the command says when there is nothing there: an attach without a terminal, a clean that keeps."""
    if "attach" in line:
        return code != 127
    return code == 0 or ("clean" in line
                         or "rm-worktrees" in line) and code == 4 or line.endswith("--json") and code == 0


def test_every_command_of_the_readme_runs(checkout, farm_cleanup):
    failed = []
    for line in LINES:
        if line in SKIPPED:
            continue
        done = run(["bash", "-c", line], cwd=checkout, timeout=120)
        if not is_fine(line, done.returncode):
            failed.append(f"{line}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    assert failed == []


def test_help_explains_every_setting_every_option_and_every_cli():
    shown = run([sys.executable, ROOT / "farm.py", "help", "settings"], check=True).stdout
    assert [
        name for name, entry in toolkit.SETTINGS.items()
        if f"FARM_{name.rstrip('_').upper()} " not in shown or entry.meaning not in shown
    ] == []
    shown = run([sys.executable, ROOT / "farm.py", "help", "clis"], check=True).stdout
    assert [name for name in toolkit.CLIS if not re.search(rf"^{name} ", shown, re.M)] == []
    for name, verb in toolkit.VERBS.items():
        lines = toolkit.option_lines(verb.options)
        assert [line for line in lines if len(line.split(None, 1)) < 2 or not line[21:].strip()] == [], name


def test_the_readme_can_be_finished():
    lines = README.splitlines()
    assert 140 <= len(lines) <= 180 and max(map(len, lines)) <= 160


def test_the_page_about_scripts_names_every_script():
    names = sorted(path.name for path in (ROOT / "scripts").rglob("*.sh"))
    assert [name for name in names if f"`{name}`" not in PAGES["scripts/README.md"]] == []


def test_each_room_of_farm_py_is_in_the_contents_and_names_the_tests_that_prove_it():
    text = (ROOT / "farm.py").read_text()
    contents = " ".join(text[text.index("Contents."):text.index("Files below")].split())
    rooms = re.findall(r"^# -+ ([^\n]+)\n((?:# [^\n]*\n)+)", text, re.M)
    assert len(rooms) > 30 and [name for name, _ in rooms if name not in contents] == []
    named = {name: re.findall(r"tests/[\w/*.]+\.py", banner) for name, banner in rooms}
    assert [name for name, paths in named.items() if not paths] == []
    assert [path for paths in named.values() for path in paths if not list(ROOT.glob(path))] == []


def test_the_readmes_status_is_the_one_that_was_made():
    assert (ROOT / "tests" / "pictures" / "status.txt").read_text() in README


def test_the_readmes_picture_is_small():
    picture = (ROOT / "tests" / "pictures" / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000


def test_files_that_the_readme_links_to_exist():
    links = [(ROOT / name).parent / link for name, page in PAGES.items()
             for link in re.findall(r"\]\(([^)#]+)\)", page)]
    assert [link for link in links if not link.exists()] == []


def test_coordination_readme_names_every_file_that_a_farm_makes(checkout):
    text = (ROOT / "coordination" / "README.md").read_text()
    farm = [checkout / ".venv/bin/python", "farm.py"]
    run([*farm, "add", "a task"], cwd=checkout, check=True)
    run([*farm, "run", "-n", "1", "--agent", "date > x", "--gate", "true", "--until-drained"], cwd=checkout, check=True)
    made = [path for path in (Path(checkout) / "coordination").iterdir() if path.name not in (".gitignore", "README.md")]
    assert [path.name for path in made if path.name not in text] == []

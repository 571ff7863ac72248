"""The Makefile: its help, its variables with odd text in them, another repo by REPO, and the copy into a repo by install-into."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from farm_calls import bytes_below, fake_tool
from paths import ROOT, SCRIPTS
from sandbox import git, run

TARGETS = ("help setup demo farm add plan status watch show attach overview logs merge pause resume stop estop clean report doctor "
           "test lint bench install-into")
VARIABLES = "N BASE AGENT GATE TASKS REPO A T GOAL YES"
TOP_LEVEL = {"Makefile", "farm.py", "scripts", "coordination", "tests", "README.md"}
ODD_TEXTS = {
    "spaces": "two  words",
    "single": "it's",
    "double": 'say "so"',
    "both": "it's \"so\" and 'so'",
    "shell": "a; b && c | d > e & (f) `g` *",
    "backslash": "back\\slash \\n",
    "unicode": "ünï çødé",
    "dollar": 'mytool "$(cat "$FARM_PROMPT_FILE")"',
    "make": "100% #1 $@ :=",
}
RECORD_ARGV = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


class Make:
    """make with a stand-in for .venv, whose python only notes how it was called."""

    def __init__(self, folder: Path):
        self.venv, self.log = folder / "venv", folder / "calls"
        (self.venv / "bin").mkdir(parents=True)
        python = self.venv / "bin" / "python"
        python.write_text(RECORD_ARGV.format(python=sys.executable, log=str(self.log)))
        python.chmod(0o755)
        self.use_ready_venv()

    def use_ready_venv(self) -> None:
        """Mark the stand-in as made for exactly the packages that farm.py names."""
        packages = re.search(r"^# dependencies = \[(.*)\]$", (ROOT / "farm.py").read_text(), re.MULTILINE)
        (self.venv / "ready").write_text(re.sub('[",]', "", packages[1]))

    def __call__(self, *args: str, **options):
        options.setdefault("cwd", ROOT)
        return run(["make", "--no-print-directory", f"VENV={self.venv}", *args], **options)

    def calls(self, *args: str, **options) -> list[list[str]]:
        """The arguments of each call of farm.py that `make ARGS` made."""
        self(*args, check=True, **options)
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [argv[argv.index("-c") + 3 :] for argv in map(json.loads, lines) if "import farm" in " ".join(argv)]


@pytest.fixture
def make(sandbox) -> Make:
    folder = sandbox.root / "stand-in"
    folder.mkdir()
    return Make(folder)


def value_after(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


# ---------------------------------------------------------------------------------------------- help and layout


def test_make_alone_prints_the_help():
    assert run(["make", "-s"], cwd=ROOT).stdout == run(["make", "-s", "help"], cwd=ROOT, check=True).stdout


def test_make_alone_calls_nothing_else(make):
    assert make.calls() == []


@pytest.mark.parametrize("target", TARGETS.split())
def test_help_explains_every_target(target):
    lines = run(["make", "-s", "help"], cwd=ROOT, check=True).stdout.splitlines()
    assert [line for line in lines if re.match(rf"\s*(make )?{target}\s+\S", line)]


@pytest.mark.parametrize("variable", VARIABLES.split())
def test_help_explains_every_variable(variable):
    lines = run(["make", "-s", "help"], cwd=ROOT, check=True).stdout.splitlines()
    assert [line for line in lines if re.match(rf"\s*{variable}\b.*\w", line)]


@pytest.mark.parametrize("variable", VARIABLES.split())
def test_every_variable_stands_on_top_and_can_be_overridden(variable):
    top = (ROOT / "Makefile").read_text().split("\n##@")[0]
    assert re.search(rf"^{variable} *\?=", top, re.MULTILINE)


def test_an_unknown_target_is_refused():
    assert run(["make", "no-such-target"], cwd=ROOT).returncode == 2


def test_the_top_level_is_exactly_what_it_should_be():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of the toolkit's own repo")
    names = git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    tops = {name.split("/")[0] for name in names if name and (ROOT / name).exists()}
    assert {name for name in tops if not name.startswith(".")} == TOP_LEVEL


def test_the_run_time_packages_are_named_once():
    texts = [path for path in [ROOT / "Makefile", *SCRIPTS.iterdir()] if path.is_file() and "portalocker" in path.read_text()]
    assert texts == []


# ---------------------------------------------------------------------------------------------- variables


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
@pytest.mark.parametrize(("target", "variable"), [("farm", "AGENT"), ("farm", "GATE"), ("merge", "GATE")])
def test_a_variable_of_any_text_reaches_farm_py_as_one_argument(make, target, variable, text):
    assert value_after(make.calls(target, f"{variable}={text}")[-1], f"--{variable.lower()}") == text


@pytest.mark.parametrize("text", ["two words", "it's", 'say "so"', "ünï", "a;b&c", "$HOME"])
@pytest.mark.parametrize("target", ["status", "farm", "add"])
def test_a_repo_of_any_name_reaches_farm_py_as_one_argument(make, target, text):
    assert value_after(make.calls(target, f"REPO=../{text}", "TASKS=tasks.md")[0], "--repo") == f"../{text}"


@pytest.mark.parametrize("text", ["my tasks.md", "it's.md", 'say "so".md'])
@pytest.mark.parametrize("target", ["farm", "add"])
def test_a_task_file_of_any_name_reaches_farm_py_as_one_argument(make, target, text):
    assert value_after(make.calls(target, f"TASKS={text}")[0], "-f") == text


def test_a_branch_of_any_name_reaches_farm_py_as_one_argument(make):
    assert value_after(make.calls("farm", "BASE=it's-\"so\"")[-1], "--into") == "it's-\"so\""


def test_a_variable_may_come_from_the_environment(make):
    assert value_after(make.calls("farm", env={"AGENT": "it's mine"})[-1], "--agent") == "it's mine"


def test_n_reaches_up(make):
    assert value_after(make.calls("farm", "N=3")[-1], "-n") == "3"


def test_where_agents_run_reaches_up(make):
    assert value_after(make.calls("farm", "ON=ssh:box1 ssh:box2 here")[-1], "--on") == "ssh:box1 ssh:box2 here"


def test_where_gates_run_reaches_up(make):
    assert value_after(make.calls("farm", "GATE_ON=slurm -p short")[-1], "--gate-on") == "slurm -p short"


def test_ten_agents_are_the_default(make):
    assert value_after(make.calls("farm")[-1], "-n") == "10"


def test_what_is_not_set_is_left_to_farm_py(make):
    assert not {"--agent", "--gate", "--into", "--on", "--gate-on"} & set(make.calls("farm")[-1])


def test_tasks_are_added_before_the_farm_starts(make):
    assert [argv[2] for argv in make.calls("farm", "TASKS=tasks.md")] == ["add", "up"]


def test_without_tasks_the_farm_just_starts(make):
    assert [argv[2] for argv in make.calls("farm")] == ["up"]


def test_no_farm_starts_when_its_tasks_cannot_be_added(make):
    (make.venv / "bin" / "python").write_text(f'#!/bin/sh\necho "$*" >>"{make.log}"\ncase "$*" in *" add "*) exit 3 ;; esac\n')
    assert make("farm", "TASKS=nothing.md").returncode != 0
    assert " up " not in make.log.read_text()


VERBS = "status attach logs merge pause resume stop estop clean report doctor"


@pytest.mark.parametrize("target", VERBS.split())
def test_each_target_calls_its_verb(make, target):
    assert make.calls(target)[-1][2] == {"stop": "down"}.get(target, target)


@pytest.mark.parametrize("target", ["attach", "logs"])
def test_a_names_the_agent(make, target):
    assert make.calls(target, "A=3")[-1][-1] == "3"


def test_a_failing_verb_fails_the_target(make):
    (make.venv / "bin" / "python").write_text("#!/bin/sh\nexit 5\n")
    assert make("merge").returncode != 0


# ---------------------------------------------------------------------------------------------- set-up


def test_a_made_venv_costs_nothing_again(make):
    before = bytes_below(make.venv)
    make("setup", check=True)
    assert (bytes_below(make.venv), make.log.exists()) == (before, False)


def test_setup_names_a_tool_that_is_too_old_and_how_to_install_it(make, sandbox):
    (make.venv / "ready").unlink()
    done = make("setup", env={"PATH": fake_tool(sandbox.work / "fake", "tmux", "tmux 2.1")})
    assert done.returncode != 0
    words = ["tmux 2.1", "3.0", "apt install tmux", "dnf install tmux", "brew install tmux"]
    assert [word for word in words if word not in done.stderr] == []


def test_setup_names_the_package_when_python_has_no_venv(sandbox):
    script = "#!/bin/sh\ncase $1 in --version) echo Python 3.11.2 ;; *) exit 1 ;; esac\n"
    (sandbox.work / "python3").write_text(script)
    (sandbox.work / "python3").chmod(0o755)
    done = run(["bash", SCRIPTS / "make-venv.sh", sandbox.work / "venv", sandbox.work / "python3", ROOT / "farm.py"])
    assert (done.returncode, "python3-venv" in done.stderr) == (6, True)


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  --version) echo Python 3.11.2 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""


def test_git_does_not_see_the_venv_of_a_copy(make_repo, sandbox):
    repo, python = make_repo(), sandbox.work / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    run(["bash", SCRIPTS / "make-venv.sh", repo / ".venv", python, ROOT / "farm.py"], check=True)
    assert (git(repo, "status", "--porcelain"), (repo / ".venv" / "ready").exists()) == ("", True)


# ---------------------------------------------------------------------------------------------- another repo


@pytest.fixture
def real_make(make) -> Make:
    """make whose .venv runs the interpreter of the tests, which has all packages."""
    (make.venv / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return make


@pytest.mark.parametrize("name", ["app", "my app", "it's"])
def test_repo_works_on_another_repo_without_copying_anything(real_make, make_repo, name):
    repo = make_repo(name)
    (repo.parent / "tasks.md").write_text("- [ ] First\n")
    real_make("-f", str(ROOT / "Makefile"), "add", f"REPO=../{name}", "TASKS=../tasks.md", cwd=repo.parent / name, check=True)
    assert "First" in (repo / "coordination" / "task_queue" / "pending.json").read_text()
    assert {path.name for path in repo.iterdir()} == {".git", "README.md", "coordination"}


def test_n_0_is_refused_with_one_clear_line(real_make, make_repo):
    done = real_make("farm", f"REPO={make_repo()}", "N=0", "AGENT=true")
    assert done.returncode != 0
    assert "at least one agent" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------- install-into


def install_into(make: Make, dest: Path, **options):
    return make("install-into", f"DEST={dest}", **options)


@pytest.mark.parametrize("name", ["app", "my app", "it's", 'say "so"', "ünï"])
def test_install_into_copies_the_toolkit(make, make_repo, name):
    repo = make_repo(name)
    install_into(make, repo, check=True)
    wanted = {"farm.py", *(f"scripts/{path.relative_to(SCRIPTS)}" for path in SCRIPTS.rglob("[!.]*") if path.is_file())}
    assert [path for path in wanted if (repo / path).read_bytes() != (ROOT / path).read_bytes()] == []


def test_install_into_keeps_what_may_be_run_so(make, make_repo):
    repo = make_repo()
    install_into(make, repo, check=True)
    assert [name for name in ("farm.py", "scripts/mk-worktrees.sh", "scripts/farm") if not os.access(repo / name, os.X_OK)] == []


def test_install_into_gives_a_makefile_to_a_repo_without_one(make, make_repo):
    repo = make_repo()
    install_into(make, repo, check=True)
    assert (repo / "Makefile").read_bytes() == (ROOT / "Makefile").read_bytes()


def test_install_into_gives_farm_mk_to_a_repo_with_a_makefile(make, make_repo):
    repo = make_repo(files={"Makefile": "all:\n\t@echo mine\n"})
    install_into(make, repo, check=True)
    assert ((repo / "Makefile").read_text(), (repo / "farm.mk").exists()) == ("all:\n\t@echo mine\n", True)


@pytest.mark.parametrize("name", ["makefile", "GNUmakefile"])
def test_install_into_sees_a_makefile_of_another_name(make, make_repo, name):
    repo = make_repo(files={name: "all:\n\t@echo mine\n"})
    install_into(make, repo)
    assert run(["make", "-s"], cwd=repo).stdout == "mine\n"
    assert (repo / "farm.mk").exists()


def test_farm_mk_prints_its_help(make, make_repo):
    repo = make_repo(files={"Makefile": "all:\n\t@echo mine\n"})
    install_into(make, repo, check=True)
    done = run(["make", "-s", "-f", "farm.mk"], cwd=repo, check=True)
    assert re.search(r"install-into|status", done.stdout)


def test_farm_mk_may_be_included_in_ones_own_makefile(make, make_repo):
    repo = make_repo(files={"Makefile": "all:\n\t@echo mine\ninclude farm.mk\n"})
    install_into(make, repo, check=True)
    make.calls("status", cwd=repo)
    assert f"{repo}/scripts/.." in json.loads(make.log.read_text())


def test_install_into_touches_nothing_that_is_there(make, make_repo):
    files = dict.fromkeys(["farm.py", "scripts/rescue.sh", "scripts/other.sh", "Makefile", "farm.mk"], "mine:\n")
    repo = make_repo(files=files)
    install_into(make, repo)
    assert {name: (repo / name).read_text() for name in files} == files


def test_install_into_says_which_files_it_kept_and_fails(make, make_repo):
    repo = make_repo(files={"farm.py": "mine\n"})
    done = install_into(make, repo)
    assert done.returncode != 0
    assert "farm.py" in done.stdout + done.stderr


def test_install_into_where_scripts_is_a_file_fails_and_keeps_it(make, make_repo):
    repo = make_repo(files={"scripts": "mine\n"})
    assert install_into(make, repo).returncode != 0
    assert (repo / "scripts").read_text() == "mine\n"


def test_install_into_does_not_write_through_a_link(make, make_repo, sandbox):
    repo = make_repo()
    (repo / "farm.py").symlink_to(sandbox.work / "elsewhere")
    install_into(make, repo)
    assert not (sandbox.work / "elsewhere").exists()


def test_install_into_installs_nothing_beside_files_of_another_content(make, make_repo):
    """Half of a toolkit beside someone else's scripts would not work: all or nothing."""
    repo = make_repo(files={"scripts/rescue.sh": "mine\n"})
    install_into(make, repo)
    assert git(repo, "status", "--porcelain", "-uall") == ""


def test_install_into_twice_changes_nothing_and_exits_0(make, make_repo):
    repo = make_repo()
    install_into(make, repo, check=True)
    before = bytes_below(repo)
    install_into(make, repo, check=True)
    assert bytes_below(repo) == before


def test_install_into_twice_beside_a_makefile_of_ones_own_changes_nothing(make, make_repo):
    repo = make_repo(files={"Makefile": "all:\n"})
    install_into(make, repo, check=True)
    before = bytes_below(repo)
    install_into(make, repo, check=True)
    assert bytes_below(repo) == before


def test_install_into_nothing_is_refused(make):
    assert make("install-into").returncode != 0


def test_install_into_a_folder_that_is_not_there_says_so(make, sandbox):
    done = install_into(make, sandbox.work / "nowhere")
    assert done.returncode != 0
    assert "nowhere" in done.stderr


def test_install_into_copies_no_tests_and_no_state(make, make_repo):
    repo = make_repo()
    install_into(make, repo, check=True)
    assert {path.name for path in repo.iterdir()} == {".git", "README.md", "Makefile", "farm.py", "scripts"}


@pytest.mark.parametrize("name", ["app", "my app"])
def test_the_copy_works_by_its_own_makefile(real_make, make_repo, name):
    repo = make_repo(name)
    install_into(real_make, repo, check=True)
    (repo / "tasks.md").write_text("First\n")
    real_make("add", "TASKS=tasks.md", cwd=repo, check=True)
    assert "First" in (repo / "coordination" / "task_queue" / "pending.json").read_text()


def test_the_copy_works_by_its_shim(make, make_repo):
    repo = make_repo()
    install_into(make, repo, check=True)
    assert run([repo / "scripts" / "farm", "add", "First"], cwd=repo, check=True).stdout == "t-0001\n"


def test_the_copy_stays_out_of_git_status_but_for_its_own_files(make, make_repo):
    repo = make_repo()
    install_into(make, repo, check=True)
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "with the toolkit")
    run([repo / "scripts" / "farm", "add", "First"], cwd=repo, check=True)
    assert git(repo, "status", "--porcelain") == ""

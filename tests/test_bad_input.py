"""Odd names, repos and numbers, damaged files, no room, missing tools: nothing is lost, and one clear line says what is wrong."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SCRIPTS, commit_files, git, run, wait_until, write_files
from farm_calls import (
    FARM,
    SHIM,
    Caller,
    assert_is_error,
    bytes_below,
    copy_repo,
    living_process,
    make_commit,
    make_folder_for_all_tests,
)

sys.path[:0] = [str(ROOT)]
import farm as toolkit  # noqa: E402  (needs the path above)

A, B = "agent-001", "agent-002"
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
QUEUE_FILES = ["task_queue/pending.json", "merge_queue/ready-to-merge.json", f"agent_locks/{A}.lock"]
COPY_PROMPT = 'cp "$FARM_PROMPT_FILE" prompt.txt'


@pytest.fixture
def farm(sandbox) -> Caller:
    return Caller(copy_repo(sandbox.work / "repo"), os.getpid())


def drain(farm: Caller, *args: str, agent: str = "date >made.txt", check: bool = True) -> subprocess.CompletedProcess[str]:
    """The whole way of every task by one agent, in the foreground, until nothing is left to do."""
    argv = ["run", "-n", "1", "--agent", agent, "--until-drained", *args]
    done = farm(*argv, timeout=120)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def landed(farm: Caller) -> list[str]:
    return [task["id"] for task in farm.json("tasks") if task["state"] == "landed"]


# ---------------------------------------------------------------------------------------------- odd names


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


# ---------------------------------------------------------------------------------------------- odd repos

LOOKS_AT_THE_REPO = [["tasks"], ["add", "a"], ["status"], ["merge"], ["up", "-n", "1", "--agent", "true"], ["doctor"], ["down"]]


@pytest.mark.parametrize("argv", LOOKS_AT_THE_REPO, ids=lambda argv: argv[0])
def test_outside_a_repo_every_verb_says_so(sandbox, argv):
    done = run([sys.executable, FARM, *argv], cwd=sandbox.home)
    assert_is_error(done, 3)
    assert "git" in done.stderr


@pytest.mark.parametrize("argv", LOOKS_AT_THE_REPO, ids=lambda argv: argv[0])
def test_a_repo_that_is_not_there_is_one_clear_line(sandbox, argv):
    assert_is_error(run([sys.executable, FARM, "--repo", sandbox.home / "nowhere", *argv]), 3)


@pytest.mark.parametrize("argv", [["up", "-n", "1", "--agent", "true"], ["merge"], ["status"]], ids=lambda argv: argv[0])
def test_a_bare_repo_is_one_clear_line(sandbox, argv):
    git(sandbox.work, "init", "-q", "--bare", "bare.git")
    assert_is_error(run([sys.executable, FARM, "--repo", sandbox.work / "bare.git", *argv]), 3)


@pytest.mark.parametrize("argv", [["up", "-n", "1", "--agent", "true"], ["merge"]], ids=lambda argv: argv[0])
def test_a_repo_without_commits_is_one_clear_line(make_repo, argv):
    farm = Caller(make_repo(commits=0), os.getpid())
    assert "commit" in farm.refused(3, *argv)


def test_tasks_can_be_added_before_the_first_commit(make_repo):
    assert Caller(make_repo(commits=0), os.getpid()).ok("add", "a") == "t-0001"


@pytest.mark.parametrize("verb", ["up", "merge"])
def test_a_detached_head_is_refused_and_the_branches_are_named(farm, verb):
    git(farm.repo, "checkout", "-q", "--detach")
    assert "main" in farm.refused(3, verb, *(["-n", "1", "--agent", "true"] if verb == "up" else []))


def test_with_a_detached_head_work_lands_on_the_branch_that_is_named(farm):
    git(farm.repo, "checkout", "-q", "--detach")
    head = git(farm.repo, "rev-parse", "HEAD")
    farm.ok("add", "Write")
    drain(farm, "--into", "main")
    assert git(farm.repo, "ls-tree", "--name-only", "main").split() == ["README.md", "made.txt"]
    assert git(farm.repo, "rev-parse", "HEAD") == head


def test_without_a_main_the_branch_that_is_checked_out_is_the_target(make_repo):
    farm = Caller(make_repo(branch="trunk"), os.getpid())
    farm.ok("add", "Write")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    assert "a.txt" in git(farm.repo, "ls-tree", "--name-only", "trunk")


@pytest.mark.parametrize("verb", ["up", "run", "merge"])
def test_a_target_that_is_not_there_names_the_branches_that_are(make_repo, verb):
    farm = Caller(make_repo(branch="trunk"), os.getpid())
    flags = ["-n", "1", "--agent", "true"] if verb != "merge" else []
    assert "trunk" in farm.refused(3, verb, "--into", "main", *flags)


@pytest.mark.parametrize("kind", ["tag", "commit"])
def test_a_target_that_is_no_branch_is_refused(farm, kind):
    git(farm.repo, "tag", "v1")
    farm.refused(3, "merge", "--into", "v1" if kind == "tag" else git(farm.repo, "rev-parse", "HEAD"))


def test_a_shallow_clone_works(farm, sandbox):
    commit_files(farm.repo, {"more.txt": "more"})
    git(sandbox.work, "clone", "-q", "--depth", "1", f"file://{farm.repo}", "shallow")
    clone = Caller(sandbox.work / "shallow", os.getpid())
    clone.ok("add", "Write")
    drain(clone)
    assert "made.txt" in git(clone.repo, "ls-tree", "--name-only", "main")


def test_a_dirty_checkout_keeps_every_edit(farm):
    commit_files(farm.repo, {"tracked.txt": "old\n", "staged.txt": "old\n"})
    write_files(farm.repo, {"tracked.txt": "edited\n", "staged.txt": "staged\n", "untracked.txt": "new\n"})
    git(farm.repo, "add", "staged.txt")
    before = git(farm.repo, "status", "--porcelain", "-uall")
    farm.ok("add", "Write")
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    assert git(farm.repo, "status", "--porcelain", "-uall") == before
    assert (farm.repo / "tracked.txt").read_text() == "edited\n"


def test_agents_start_from_the_commit_not_from_the_dirty_checkout(farm):
    (farm.repo / "README.md").write_text("half an edit\n")
    farm.ok("add", "Read")
    drain(farm, agent="cp README.md copy.txt")
    assert git(farm.repo, "show", "main:copy.txt") == "a throw-away repo"


def test_work_beside_a_submodule_lands_and_submodules_are_said_not_to_be_supported(farm, make_repo):
    git(farm.repo, "submodule", "add", "-q", str(make_repo("other")), "sub")
    git(farm.repo, "commit", "-q", "-m", "with a submodule")
    farm.ok("add", "Write")
    assert "submodule" in drain(farm).stderr
    assert git(farm.repo, "diff", "--name-only", "main~1", "main") == "made.txt"


def make_hook(repo: Path, *names: str) -> None:
    for name in names:
        path = repo / ".git" / "hooks" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho the hook {name} says no >&2\nexit 1\n")
        path.chmod(0o755)


def test_failing_hooks_of_merging_do_not_stop_the_farm(farm):
    make_hook(farm.repo, "post-checkout", "post-merge", "pre-merge-commit", "pre-push", "post-commit", "post-rewrite")
    farm.ok("add", "Write")
    drain(farm)
    assert landed(farm) == ["t-0001"]


def test_a_hook_that_refuses_the_agents_commit_is_the_reason_of_the_failure_and_its_work_is_kept(farm):
    make_hook(farm.repo, "pre-commit")
    farm.ok("add", "Write", "--max-attempts", "1")
    drain(farm, agent="echo precious >made.txt", check=False)
    assert "the hook pre-commit says no" in farm.task("t-0001")["reason"]
    ref = farm.ok("rescue", "list").split("\t")[0]
    assert git(farm.repo, "show", f"{ref}:made.txt") == "precious"


USER_SETTINGS = """merge.ff=false commit.gpgSign=true core.autocrlf=true merge.conflictStyle=diff3 rebase.autoStash=true
status.showUntrackedFiles=no core.quotePath=false color.ui=always push.default=nothing commit.verbose=true"""


def test_the_users_git_settings_do_not_change_what_lands(farm):
    for setting in USER_SETTINGS.split():
        git(farm.repo, "config", *setting.split("="))
    farm.ok("add", "Write")
    commit = make_commit(farm.repo, {"a.txt": "a"})
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--commit", commit)
    farm.ok("merge", "--gate", "test -e a.txt")
    assert landed(farm) == ["t-0001"]


def test_the_users_git_config_is_untouched(farm, sandbox):
    before = (farm.repo / ".git" / "config").read_bytes(), (sandbox.home / ".gitconfig").read_bytes()
    farm.ok("add", "Write")
    drain(farm)
    farm.ok("clean")
    assert ((farm.repo / ".git" / "config").read_bytes(), (sandbox.home / ".gitconfig").read_bytes()) == before


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


# ---------------------------------------------------------------------------------------------- damaged files


@functools.cache
def three_tasks() -> Path:
    """A repo whose farm has one task in each place: pending, claimed, ready."""
    farm = Caller(copy_repo(make_folder_for_all_tests() / "repo"), os.getpid())
    farm.ok("add", "-f", "-", input="one\ntwo\nthree\n")
    farm.submit(B, {"b.txt": "b"})
    farm.claim(A)
    return farm.repo


@pytest.fixture
def damaged(sandbox) -> Caller:
    """A farm with one task in each place; a test then damages one file."""
    return Caller(copy_repo(sandbox.work / "repo", three_tasks()), os.getpid())


DAMAGE = {
    "cut": b'{\n "schema": 1,\n "tasks": [',
    "empty": b"",
    "null": b"null\n",
    "list": b"[]\n",
    "bytes": b"\xff\xfe{}",
    "newer": b'{"schema": 99}\n',
    "wrong-type": b'{"schema": 1, "tasks": {}, "ready": 7, "agent": 3}\n',
}


@pytest.mark.parametrize("name", QUEUE_FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_stops_the_verb_with_its_path(damaged, name, damage):
    (damaged.folder / name).write_bytes(DAMAGE[damage])
    assert name in damaged.refused(7, "claim", "agent-003", "--owner-pid", str(damaged.owner))


@pytest.mark.parametrize("name", QUEUE_FILES)
def test_a_damaged_file_is_never_rewritten(damaged, name):
    (damaged.folder / name).write_bytes(DAMAGE["cut"])
    before = bytes_below(damaged.folder)
    for line in ("add new", f"claim agent-003 --owner-pid {damaged.owner}", "cancel t-0003", "merge", "status"):
        damaged(*line.split())
    assert bytes_below(damaged.folder) == before


@pytest.mark.parametrize("line", ["add new", "tasks", "queue", "locks", "merge", "cancel t-0003", "doctor"])
def test_every_verb_exits_7_on_a_damaged_queue(damaged, line):
    (damaged.folder / "task_queue/pending.json").write_bytes(DAMAGE["cut"])
    assert damaged(*line.split()).returncode == 7


def test_damage_is_told_with_line_and_column(damaged):
    (damaged.folder / "task_queue/pending.json").write_text('{\n "schema": 1,\n "tasks": [,]\n}\n')
    assert "line 3, column 12" in damaged.refused(7, "tasks")


@pytest.mark.parametrize(
    "record",
    [
        '{"id": "t-0009"',
        '{"id": 7, "title": "x"}',
        '{"title": "x", "state": "asleep"}',
        '"text"',
        "{}",
        '{"id": "t-0009", "title": "x", "paths": [1]}',
        '{"id": "t-0009", "title": "x", "rev": true}',
        '{"id": "../../x", "title": "x"}',
    ],
)
def test_a_hand_written_record_that_is_wrong_stops_the_verb(damaged, record):
    (damaged.folder / "task_queue/pending.json").write_text('{"schema": 1, "tasks": [\n' + record + "\n]}\n")
    damaged.refused(7, "claim", "agent-003", "--owner-pid", str(damaged.owner))


@pytest.mark.parametrize(
    ("broken", "still"),
    [
        ("task_queue/pending.json", {"ready": 1, "claimed": 1}),
        ("merge_queue/ready-to-merge.json", {"claimed": 1, "pending": 1}),
        (f"agent_locks/{A}.lock", {"ready": 1, "pending": 1}),
    ],
)
def test_status_shows_what_it_can_of_a_damaged_farm(damaged, broken, still):
    (damaged.folder / broken).write_bytes(DAMAGE["cut"])
    done = damaged("status", "--json")
    shown = json.loads(done.stdout)
    assert (done.returncode, any(broken in problem for problem in shown["problems"])) == (7, True)
    assert still.items() <= shown["tasks"].items()


def test_status_lists_every_damaged_file(damaged):
    for name in QUEUE_FILES:
        (damaged.folder / name).write_bytes(DAMAGE["cut"])
    problems = json.loads(damaged("status", "--json").stdout)["problems"]
    assert [name for name in QUEUE_FILES if not any(name in problem for problem in problems)] == []


@pytest.mark.parametrize("name", ["farm.json", "agents.json"])
def test_status_survives_damage_in_what_the_loop_wrote(damaged, name):
    (damaged.folder / name).write_text("{")
    done = damaged("status", "--json")
    assert (done.returncode, name in json.dumps(json.loads(done.stdout)["problems"])) == (7, True)


def test_a_queue_file_that_is_gone_is_damage_not_an_empty_queue(damaged):
    (damaged.folder / "task_queue/pending.json").unlink()
    damaged.refused(7, "tasks")


class SavedInTwoSteps(toolkit.Disk):
    """A disk on which an editor is in the middle of a save for the first two looks at the pending list."""

    looks = 0

    def read(self, path: str) -> bytes:
        whole = super().read(path)
        self.looks += path.endswith("pending.json")
        return whole[:40] if path.endswith("pending.json") and self.looks < 3 else whole


def test_a_file_that_an_editor_is_saving_is_looked_at_again(damaged):
    assert len(toolkit.Store(str(damaged.repo), SavedInTwoSteps()).load().all_tasks()) == 3


def test_everything_works_again_once_the_file_is_mended(damaged):
    path = damaged.folder / "task_queue/pending.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    damaged.refused(7, "tasks")
    path.write_bytes(whole)
    assert len(damaged.json("tasks")) == 3


def test_a_torn_line_of_history_is_no_damage(damaged):
    with (damaged.folder / "events.jsonl").open("a") as file:
        file.write('{"at": "2026-')
    damaged.ok("add", "more")
    assert json.loads((damaged.folder / "events.jsonl").read_text().splitlines()[-1])["event"] == "added"


# ---------------------------------------------------------------------------------------------- no room, no permission


@pytest.fixture
def read_only():
    """A function that makes a folder read-only, for root too where the file system can."""
    locked = []

    def lock(folder: Path) -> None:
        for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            path.chmod(0o555)
            locked.append(path)
            if os.geteuid() == 0 and run(["chattr", "+i", path]).returncode:
                pytest.skip("nothing is read-only for root here")

    yield lock
    for path in locked:
        if os.geteuid() == 0:
            run(["chattr", "-i", path])
        path.chmod(0o755)


@pytest.mark.parametrize("line", ["add new", "claim 3 --owner-pid OWNER", "cancel t-0003", "lock 3 x --owner-pid OWNER"])
def test_a_read_only_folder_is_one_clear_line_and_nothing_changes(damaged, read_only, line):
    before = bytes_below(damaged.folder)
    read_only(damaged.folder)
    damaged.refused(1, *line.replace("OWNER", str(damaged.owner)).split())
    assert bytes_below(damaged.folder) == before


@pytest.mark.parametrize("verb", ["tasks", "queue", "locks", "status"])
def test_a_read_only_farm_can_be_looked_at(damaged, read_only, verb):
    read_only(damaged.folder)
    damaged.ok(verb)


def test_a_repo_that_cannot_be_written_is_one_clear_line(farm, read_only):
    read_only(farm.repo)
    farm.refused(1, "add", "new")


@pytest.mark.parametrize("name", ["coordination", "coordination/task_queue", "coordination/agent_locks"])
def test_a_file_where_a_folder_should_be_is_one_clear_line(farm, name):
    path = farm.repo / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("in the way")
    done = farm("add", "new")
    assert done.returncode in (1, 7), done.stderr
    assert_is_error(done, done.returncode)


def test_a_folder_where_a_queue_file_should_be_is_one_clear_line(damaged):
    (damaged.folder / "task_queue/pending.json").unlink()
    (damaged.folder / "task_queue/pending.json").mkdir()
    done = damaged("add", "new")
    assert_is_error(done, done.returncode)


def run_with_small_files(farm: Caller, blocks: int, *argv: str) -> subprocess.CompletedProcess[str]:
    """A verb that may write no file beyond `blocks` KiB."""
    return run(["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "bash", *farm.argv(*argv)])


def test_a_file_that_cannot_grow_is_one_clear_line_and_nothing_is_lost(damaged):
    damaged.ok("add", "-f", "-", input="".join(f"task {number}\n" for number in range(30)))
    before = bytes_below(damaged.folder)
    assert_is_error(run_with_small_files(damaged, 2, "add", "new"), 1)
    assert bytes_below(damaged.folder) == before


FULL_DISK = """
set -eu
mount -t tmpfs -o size=256k tmpfs "$1/coordination"
shift
"$@" add -f "$TASKS" >/dev/null
head -c 1000000 /dev/zero >"$FILLED" 2>/dev/null || true
code=0
"$@" add "one too many" || code=$?
rm "$FILLED"
"$@" tasks | wc -l >&2
exit "$code"
"""


def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(farm, sandbox):
    if run(["unshare", "-m", "true"]).returncode:
        pytest.skip("no mount namespace may be made here")
    (sandbox.work / "tasks").write_text("".join(f"task {number}\n" for number in range(20)))
    farm.folder.mkdir()
    env = {"TASKS": str(sandbox.work / "tasks"), "FILLED": str(farm.folder / "filled")}
    done = run(["unshare", "-m", "bash", "-c", FULL_DISK, "bash", farm.repo, SHIM, "--repo", farm.repo], env=env)
    assert (done.returncode, done.stderr.splitlines()[-1].strip()) == (1, "20"), done.stderr
    assert done.stderr.startswith("farm: ") and "Traceback" not in done.stderr


def test_no_room_stops_new_work_with_a_word_about_it(farm):
    farm.ok("add", "Write")
    commit = make_commit(farm.repo, {"a.txt": "a"})
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--commit", commit)
    farm("merge", "--gate", "true", env={"FARM_MIN_FREE_MIB": str(10**9)}, timeout=60)
    assert farm.task("t-0001")["state"] in ("ready", "landed")


# ---------------------------------------------------------------------------------------------- gates that misbehave


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def submit_one(farm: Caller) -> None:
    farm.ok("add", "Write")
    farm.ok("submit", A, "--fence", farm.claim(A)["fence"], "--commit", make_commit(farm.repo, {"a.txt": "a"}))


def pids_in(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()]


def test_a_gate_that_hangs_is_ended_with_its_whole_group(farm, sandbox):
    submit_one(farm)
    gate = f"trap '' TERM HUP; sleep 600 & echo $$ $! >>{sandbox.work}/pids; (trap '' TERM; sleep 600)"
    farm("merge", "--gate", gate, env={"FARM_GATE_TIMEOUT": "0.5"}, timeout=60)
    wait_until(lambda: all(gone(pid) for pid in pids_in(sandbox.work / "pids")), message="the end of the gate's processes")


def test_work_whose_gate_hangs_comes_back_with_that_reason(farm):
    submit_one(farm)
    done = farm("merge", "--gate", "sleep 600", env={"FARM_GATE_TIMEOUT": "0.5"}, timeout=60)
    assert done.returncode == 5
    assert "took longer" in farm.task("t-0001")["reason"] or "took longer" in done.stderr


def test_what_a_green_gate_leaves_running_is_ended(farm, sandbox):
    submit_one(farm)
    farm.ok("merge", "--gate", f"sleep 600 & echo $! >>{sandbox.work}/pids; exit 0", timeout=60)
    wait_until(lambda: all(gone(pid) for pid in pids_in(sandbox.work / "pids")), message="the end of the gate's process")


def test_a_gate_that_prints_without_end_is_bounded(farm):
    submit_one(farm)
    farm("merge", "--gate", "head -c 30000000 /dev/zero | tr '\\0' x; false", timeout=60)
    assert max(path.stat().st_size for path in (farm.folder / "results").iterdir()) < 2_000_000


def test_a_gate_that_reads_input_gets_none(farm):
    submit_one(farm)
    farm.ok("merge", "--gate", "! read -r line", timeout=60)
    assert landed(farm) == ["t-0001"]


def test_a_gate_that_edits_tracked_files_lands_nothing(farm):
    submit_one(farm)
    farm("merge", "--gate", "echo edited >a.txt", timeout=60)
    assert landed(farm) == []


def test_a_gate_command_that_is_not_there_blames_nobody(farm):
    submit_one(farm)
    done = farm("merge", "--gate", "no-such-gate", timeout=60)
    assert (done.returncode, farm.task("t-0001")["attempts"]) == (5, 0)


@pytest.mark.parametrize("gate", ["test \"$(cat 'a.txt')\" = a # it's \\so", "test $(( 1 + 1 )) = 2 &&\ntrue"])
def test_a_gate_is_run_as_it_was_written(farm, gate):
    submit_one(farm)
    farm.ok("merge", "--gate", gate, timeout=60)
    assert landed(farm) == ["t-0001"]


# ---------------------------------------------------------------------------------------------- missing and old tools


TOOLS = """awk basename bash cat chmod cksum cmp cp cut date dirname env expr find flock git grep head id kill ln ls make
mkdir mkfifo mktemp mv od perl ps pwd python3 readlink realpath rm rmdir sed sh sleep sort stat tail tee tmux touch tr uname uniq
wc xargs"""


@pytest.fixture
def path_without(sandbox):
    """A PATH on which all the tools are that the farm may use, but the named ones."""

    def make(*names: str) -> str:
        folder = sandbox.work / "bin"
        folder.mkdir()
        for tool in set(TOOLS.split()) - set(names):
            if shutil.which(tool):
                (folder / tool).symlink_to(shutil.which(tool))
        return str(folder)

    return make


def fake_tool(folder: Path, name: str, says: str) -> str:
    """A PATH on which `name` is a script that only prints `says`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
    (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("tool", ["git", "tmux"])
def test_a_missing_tool_exits_6_with_what_to_install(farm, path_without, tool):
    said = farm.refused(6, "up", "-n", "1", "--agent", "true", env={"PATH": path_without(tool)})
    assert [word for word in (tool, f"apt install {tool}", f"dnf install {tool}", f"brew install {tool}") if word not in said] == []


@pytest.mark.parametrize(
    ("tool", "says", "found", "needed"),
    [("git", "git version 2.25.1", "2.25", "2.30"), ("tmux", "tmux 2.8", "2.8", "3.0"), ("tmux", "tmux 1.9a", "1.9", "3.0")],
)
def test_a_tool_that_is_too_old_exits_6_with_both_versions(farm, sandbox, tool, says, found, needed):
    said = farm.refused(6, "up", "-n", "1", "--agent", "true", env={"PATH": fake_tool(sandbox.work / "fake", tool, says)})
    assert [word for word in (tool, found, needed, "apt", "dnf", "brew") if word not in said] == []


NEW_ENOUGH = {
    "git": ["git version 2.30.0", "git version 2.39.5 (Apple Git-154)", "git version 3.0.rc1", "git version 2.100.0.windows.1"],
    "tmux": ["tmux 3.0", "tmux 3.4a", "tmux next-3.5", "tmux master", "tmux 10.1"],
}


@pytest.mark.parametrize(("tool", "says"), [(tool, says) for tool in NEW_ENOUGH for says in NEW_ENOUGH[tool]])
def test_a_tool_that_is_new_enough_passes(sandbox, tool, says):
    done = run(["bash", SCRIPTS / "check-tools.sh", tool], env={"PATH": fake_tool(sandbox.work / "fake", tool, says)})
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_missing_tool_is_named_at_once(sandbox, path_without):
    done = run(["bash", SCRIPTS / "check-tools.sh"], env={"PATH": path_without("git", "tmux", "make")})
    assert (done.returncode, [tool for tool in ("git", "tmux", "make") if f"farm: {tool} " not in done.stderr]) == (6, [])


def test_an_old_python_exits_6_with_what_to_install(sandbox):
    env = {"PATH": fake_tool(sandbox.work / "fake", "python3", "Python 3.8.10")}
    done = run(["bash", SCRIPTS / "check-tools.sh"], env=env)
    assert (done.returncode, [word for word in ("3.8", "3.10", "apt", "dnf", "brew") if word not in done.stderr]) == (6, [])


def test_doctor_names_the_missing_tool_and_exits_6(farm, path_without):
    farm.ok("add", "a")
    done = farm("doctor", env={"PATH": path_without("tmux")})
    assert (done.returncode, "apt install tmux" in done.stdout + done.stderr) == (6, True)


def test_agents_verbs_need_no_git_and_no_tmux(farm, path_without):
    env = {"PATH": path_without("git", "tmux")}
    for line in ("add a", f"claim {A} --owner-pid {farm.owner}", f"lock {A} x --owner-pid {farm.owner}", f"unlock {A} x", "tasks"):
        farm.ok(*line.split(), env=env)


def test_agents_verbs_need_no_package(farm):
    farm.ok("add", "a")
    done = run([sys.executable, "-I", "-S", FARM, "--repo", farm.repo, "claim", A, "--owner-pid", str(farm.owner)])
    assert done.returncode == 0, done.stderr


def test_a_dead_owner_is_replaced_without_git_when_it_has_no_worktree(farm, path_without):
    farm.ok("add", "a")
    with living_process() as owner:
        farm.ok("claim", A, "--owner-pid", str(owner.pid))
        owner.kill()
        owner.wait()
    assert farm.claim(B, "--wait", "20", env={"PATH": path_without("git", "tmux")})["agent"] == B


def test_a_copy_of_the_toolkit_without_its_packages_says_how_to_get_them(farm, sandbox):
    copy = sandbox.work / "copy"
    copy.mkdir()
    for name in ("farm.py", "scripts"):
        run(["cp", "-R", ROOT / name, copy / name], check=True)
    bare = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    done = run([bare, "-S", copy / "farm.py", "--repo", farm.repo, "merge"])
    assert_is_error(done, 6)
    assert "install" in done.stderr or "setup" in done.stderr

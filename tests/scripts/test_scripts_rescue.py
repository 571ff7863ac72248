"""rescue.sh and restore-rescue.sh: whatever is unsaved in a worktree is kept, and comes back."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from paths import SCRIPTS
from sandbox import commit_files, git, run, wait_until, write_files

ODD_FILE = "d'1 \"é\n\t*/a b\\c"
BASE = {"a.txt": "a\n", "b.txt": "b\n", ".gitignore": "*.log\n"}


@pytest.fixture
def worktree(make_repo) -> Path:
    """A linked worktree of a small repo."""
    repo = make_repo(files=BASE)
    folder = repo.parent / "agent-001-worktree"
    git(repo, "worktree", "add", "-q", "-b", "farm/agent-001/t-0001", folder)
    return folder


def rescue(verb: str, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run([SCRIPTS / "rescue.sh", verb, *arguments], cwd=cwd)


def save(worktree: Path) -> str:
    """The ref under which the worktree's unsaved work is now."""
    done = rescue("save", worktree)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\t")[0]


def files_of(worktree: Path, ref: str) -> dict[str, str]:
    """Every file of the commit `ref` with its text."""
    names = git(worktree, "ls-tree", "-r", "-z", "--name-only", ref).split("\0")[:-1]
    return {name: run(["git", "-C", worktree, "show", f"{ref}:{name}"]).stdout for name in names}


def conflict(worktree: Path, verb: str) -> None:
    """Leave the worktree in the middle of a merge or rebase whose a.txt conflicts."""
    git(worktree, "switch", "-q", "-c", "other", "main")
    commit_files(worktree, {"a.txt": "theirs\n"})
    git(worktree, "switch", "-q", "farm/agent-001/t-0001")
    commit_files(worktree, {"a.txt": "ours\n"})
    assert run(["git", "-C", worktree, verb, "other"]).returncode == 1


def index_bytes(worktree: Path) -> bytes:
    return Path(git(worktree, "rev-parse", "--git-path", "index")).read_bytes()


# --- save -------------------------------------------------------------------------------------------------------------


def test_a_clean_worktree_has_nothing_to_save(worktree):
    done = rescue("save", worktree)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_ref_names_agent_and_time_and_points_at_the_printed_commit(worktree):
    write_files(worktree, {"a.txt": "edited\n"})
    ref, sha = rescue("save", "-a", "agent-007", worktree).stdout.strip().split("\t")
    assert (ref.startswith("refs/farm/rescue/agent-007/2"), git(worktree, "rev-parse", ref)) == (True, sha)


def test_the_agents_name_comes_from_the_folder(worktree):
    write_files(worktree, {"a.txt": "edited\n"})
    assert save(worktree).startswith("refs/farm/rescue/agent-001/")


def test_unstaged_edits_and_deletions_are_saved(worktree):
    write_files(worktree, {"a.txt": "edited\n"})
    (worktree / "b.txt").unlink()
    assert files_of(worktree, save(worktree)) == {".gitignore": "*.log\n", "a.txt": "edited\n"}


def test_an_edit_of_the_same_length_and_second_as_the_staged_content_is_saved(worktree):
    write_files(worktree, {"a.txt": "1\n"})
    git(worktree, "add", "a.txt")
    write_files(worktree, {"a.txt": "2\n"})
    edited_at = (worktree / "a.txt").stat().st_mtime
    wait_until(lambda: int(time.time()) > int(edited_at) + 1, message="a second in which git trusts the file's date")
    assert files_of(worktree, save(worktree))["a.txt"] == "2\n"


def test_untracked_files_are_saved_and_ignored_ones_are_not(worktree):
    write_files(worktree, {"new/file.txt": "new\n", "build.log": "log\n"})
    assert files_of(worktree, save(worktree)) == {**BASE, "new/file.txt": "new\n"}


def test_odd_names_are_saved(worktree):
    write_files(worktree, {ODD_FILE: "odd\n"})
    assert files_of(worktree, save(worktree))[ODD_FILE] == "odd\n"


def test_bytes_that_are_no_text_are_saved(worktree):
    (worktree / "raw").write_bytes(bytes(range(256)))
    ref = save(worktree)
    shown = subprocess.run(["git", "-C", worktree, "show", f"{ref}:raw"], capture_output=True, check=True, timeout=60)
    assert shown.stdout == bytes(range(256))


def test_executable_bits_and_links_are_saved(worktree):
    (worktree / "a.txt").chmod(0o755)
    (worktree / "link").symlink_to("nowhere at all")
    listed = git(worktree, "ls-tree", save(worktree), "a.txt", "link")
    assert [line.split()[0] for line in listed.splitlines()] == ["100755", "120000"]


def test_staged_content_that_the_files_no_longer_have_is_the_second_parent(worktree):
    write_files(worktree, {"a.txt": "staged\n"})
    git(worktree, "add", "a.txt")
    write_files(worktree, {"a.txt": "edited again\n"})
    ref = save(worktree)
    assert [files_of(worktree, at)["a.txt"] for at in (ref, f"{ref}^2")] == ["edited again\n", "staged\n"]


def test_staged_content_is_saved_where_the_files_are_back_at_head(worktree):
    write_files(worktree, {"a.txt": "staged\n"})
    git(worktree, "add", "a.txt")
    write_files(worktree, {"a.txt": "a\n"})
    assert files_of(worktree, f"{save(worktree)}^2")["a.txt"] == "staged\n"


def test_the_rescue_stands_on_head(worktree):
    write_files(worktree, {"a.txt": "edited\n"})
    assert git(worktree, "rev-parse", f"{save(worktree)}^1") == git(worktree, "rev-parse", "HEAD")


@pytest.mark.parametrize("verb", ["merge", "rebase"])
def test_work_in_the_middle_of_a_conflict_is_saved(worktree, verb):
    conflict(worktree, verb)
    write_files(worktree, {"a.txt": "half resolved\n", "note.txt": "note\n"})
    saved = files_of(worktree, save(worktree))
    assert (saved["a.txt"], saved["note.txt"]) == ("half resolved\n", "note\n")


def test_a_merge_in_progress_goes_on_as_it_was(worktree):
    conflict(worktree, "merge")
    before = git(worktree, "status")
    save(worktree)
    assert git(worktree, "status") == before


def test_what_a_rebase_has_put_aside_is_pinned_once(worktree):
    """git keeps it in a file of the rebase only (rebase.autoStash): it would go with the worktree."""
    git(worktree, "checkout", "-q", "-b", "other")
    commit_files(worktree, {"a.txt": "other\n"})
    git(worktree, "checkout", "-q", "-")
    commit_files(worktree, {"a.txt": "mine\n", "b.txt": "b\n"})
    write_files(worktree, {"b.txt": "unsaved\n"})
    assert run(["git", "-C", worktree, "rebase", "-q", "--autostash", "other"]).returncode
    assert (worktree / "b.txt").read_text() == "b\n"
    for _ in range(2):
        save(worktree)
    [ref] = git(worktree, "for-each-ref", "--format=%(refname)", "refs/farm/rescue/*/autostash-*").split()
    assert git(worktree, "show", f"{ref}:b.txt") == "unsaved"
    assert rescue("show", "-C", worktree, ref).returncode == 0


def test_the_agents_index_stays_byte_for_byte(worktree):
    write_files(worktree, {"a.txt": "staged\n", "new.txt": "new\n"})
    git(worktree, "add", "a.txt")
    before = index_bytes(worktree)
    save(worktree)
    assert index_bytes(worktree) == before


def test_an_index_lock_is_no_hindrance(worktree):
    write_files(worktree, {"a.txt": "edited\n"})
    Path(git(worktree, "rev-parse", "--git-path", "index.lock")).touch()
    assert files_of(worktree, save(worktree))["a.txt"] == "edited\n"


def test_a_damaged_index_is_no_hindrance(worktree):
    write_files(worktree, {"a.txt": "edited\n"})
    Path(git(worktree, "rev-parse", "--git-path", "index")).write_bytes(b"")
    assert files_of(worktree, save(worktree)) == {**BASE, "a.txt": "edited\n"}


def test_a_repo_inside_is_saved_as_files(worktree):
    git(worktree, "init", "-q", "inner")
    commit_files(worktree / "inner", {"in.txt": "in\n"})
    git(worktree, "init", "-q", "inner-without-commits")
    write_files(worktree, {"inner-without-commits/x.txt": "x\n"})
    saved = files_of(worktree, save(worktree))
    assert (saved["inner/in.txt"], saved["inner-without-commits/x.txt"]) == ("in\n", "x\n")


def test_a_branch_without_commits_is_saved(worktree):
    git(worktree, "switch", "-q", "--orphan", "empty")
    write_files(worktree, {"first.txt": "first\n"})
    assert files_of(worktree, save(worktree)) == {"first.txt": "first\n"}


def test_a_detached_commit_that_no_ref_reaches_is_pinned(worktree):
    git(worktree, "switch", "-q", "--detach")
    own = commit_files(worktree, {"own.txt": "own\n"})
    assert git(worktree, "rev-parse", save(worktree)) == own


def test_a_detached_commit_that_a_branch_reaches_needs_no_rescue(worktree):
    git(worktree, "switch", "-q", "--detach")
    assert rescue("save", worktree).stdout == ""


def test_the_same_state_is_kept_once(worktree):
    write_files(worktree, {"a.txt": "staged\n"})
    git(worktree, "add", "a.txt")
    write_files(worktree, {"a.txt": "edited\n"})
    assert save(worktree) == save(worktree)


def test_two_states_within_a_second_are_both_kept(worktree):
    refs = set()
    for number in range(3):
        write_files(worktree, {"a.txt": f"{number}\n"})
        refs.add(save(worktree))
    assert len(refs) == 3


def test_saving_works_from_a_subfolder(worktree):
    write_files(worktree, {"deep/er/x.txt": "x\n", "a.txt": "edited\n"})
    saved = files_of(worktree, save(worktree / "deep" / "er"))
    assert (saved["deep/er/x.txt"], saved["a.txt"]) == ("x\n", "edited\n")


def test_saving_works_without_an_identity(worktree, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    git(worktree, "config", "user.useConfigOnly", "true")
    write_files(worktree, {"a.txt": "edited\n"})
    assert git(worktree, "show", "-s", "--format=%an <%ae>", save(worktree)) == "farm <farm@localhost>"


def test_line_endings_that_git_would_warn_of_are_no_hindrance(worktree):
    git(worktree, "config", "core.autocrlf", "true")
    git(worktree, "config", "core.safecrlf", "true")
    write_files(worktree, {"new.txt": "unix\nlines\n"})
    assert "new.txt" in files_of(worktree, save(worktree))


def test_no_lock_and_no_scratch_file_stays_behind(worktree, sandbox):
    write_files(worktree, {"a.txt": "edited\n"})
    save(worktree)
    assert list((sandbox.root / "tmp").iterdir()) == []


def test_a_folder_that_is_no_worktree_is_not_found(sandbox):
    assert rescue("save", sandbox.work).returncode == 3


# --- list and show ----------------------------------------------------------------------------------------------------


def test_list_names_ref_sha_date_and_subject(worktree):
    write_files(worktree, {"a.txt": "edited\n"})
    ref = save(worktree)
    fields = rescue("list", "-C", worktree).stdout.rstrip("\n").split("\t")
    assert (fields[:2], fields[3]) == (
        [ref, git(worktree, "rev-parse", ref)],
        "rescue: unsaved work of agent-001 on farm/agent-001/t-0001",
    )


def test_list_of_nothing_is_empty(worktree):
    done = rescue("list", "-C", worktree)
    assert (done.returncode, done.stdout) == (0, "")


def test_show_prints_names_and_difference(worktree):
    write_files(worktree, {"a.txt": "edited\n"})
    shown = rescue("show", "-C", worktree, save(worktree)).stdout
    assert (" a.txt | 2 +-" in shown, "+edited" in shown) == (True, True)


def test_show_of_an_unknown_ref_is_not_found(worktree):
    assert rescue("show", "-C", worktree, "refs/farm/rescue/none").returncode == 3


# --- restore ----------------------------------------------------------------------------------------------------------


def restore(worktree: Path, ref: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return rescue("restore", "-C", worktree, ref, folder)


@pytest.fixture
def saved(worktree) -> str:
    """The ref of rescued work: a.txt edited, and files with odd names, a mode and a link added."""
    write_files(worktree, {"a.txt": "edited\n", ODD_FILE: "odd\n", "run.sh": "#!/bin/sh\n"})
    (worktree / "run.sh").chmod(0o755)
    (worktree / "link").symlink_to("a.txt")
    return save(worktree)


def test_restore_writes_what_was_added_or_changed(worktree, saved, sandbox):
    restore(worktree, saved, sandbox.work / "back")
    found = {str(path.relative_to(sandbox.work / "back")) for path in (sandbox.work / "back").rglob("*") if path.is_file()}
    assert found == {"a.txt", ODD_FILE, "run.sh", "link"}


def test_restore_keeps_modes_and_links(worktree, saved, sandbox):
    restore(worktree, saved, sandbox.work / "back")
    back = sandbox.work / "back"
    assert (os.access(back / "run.sh", os.X_OK), os.readlink(back / "link")) == (True, "a.txt")


def test_restore_twice_finds_everything_the_same(worktree, saved, sandbox):
    restore(worktree, saved, sandbox.work / "back")
    done = restore(worktree, saved, sandbox.work / "back")
    assert (done.returncode, {line.split("\t")[0] for line in done.stdout.splitlines()}) == (0, {"same"})


def test_restore_names_a_file_that_differs_and_writes_nothing(worktree, saved, sandbox):
    write_files(sandbox.work / "back", {"a.txt": "mine\n"})
    done = restore(worktree, saved, sandbox.work / "back")
    left = [path.name for path in (sandbox.work / "back").iterdir()]
    assert (done.returncode, done.stdout, left) == (4, "differs\ta.txt\n", ["a.txt"])


def test_restore_never_writes_through_a_link(worktree, sandbox):
    write_files(worktree, {"new/x.txt": "x\n"})
    ref = save(worktree)
    (sandbox.work / "back").mkdir()
    (sandbox.work / "target").mkdir()
    (sandbox.work / "back" / "new").symlink_to(sandbox.work / "target")
    done = restore(worktree, ref, sandbox.work / "back")
    assert (done.returncode, list((sandbox.work / "target").iterdir())) == (4, [])


def test_restore_of_an_unknown_ref_is_not_found(worktree, sandbox):
    assert restore(worktree, "refs/farm/rescue/none", sandbox.work / "back").returncode == 3


def test_restore_works_when_the_worktree_is_gone(worktree, saved, sandbox):
    shutil.rmtree(worktree)
    restore(sandbox.work / "repo", saved, sandbox.work / "back")
    assert (sandbox.work / "back" / "a.txt").read_text() == "edited\n"


def test_a_verb_that_does_not_exist_is_a_usage_error(sandbox):
    assert rescue("drop", cwd=sandbox.work).returncode == 2

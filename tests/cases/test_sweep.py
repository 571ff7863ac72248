"""Settings of git, paths, hooks and kinds of repos that bend what others take for granted: a task goes its whole way in each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from farm_calls import Caller
from sandbox import git, run

# Grouped so that none hides another; each is set for the user, as people have them.
SETTINGS = {
    "what is shown": {
        "color.ui": "always", "color.status": "always", "color.diff": "always", "color.branch": "always", "column.ui": "always",
        "status.short": "true", "status.branch": "true", "status.showStash": "true", "status.relativePaths": "false",
        "status.showUntrackedFiles": "all", "status.renames": "copies", "status.aheadBehind": "false",
        "core.quotePath": "false",
        "core.abbrev": "4", "log.decorate": "full", "log.showSignature": "true", "log.date": "relative", "log.follow": "true",
        "log.mailmap": "true", "format.pretty": "oneline", "diff.noprefix": "true", "diff.mnemonicPrefix": "true",
        "diff.external": "false", "diff.renames": "copies", "diff.algorithm": "patience", "diff.ignoreSubmodules": "all",
        "diff.relative": "true", "diff.orderFile": "/dev/null", "diff.colorMoved": "zebra", "diff.wordRegex": ".",
        "advice.detachedHead": "true", "advice.statusHints": "true", "core.pager": "false", "pager.log": "false",
        "pager.diff": "false",
        "pager.branch": "false", "pager.config": "false", "blame.coloring": "repeatedLines", "branch.sort": "-committerdate",
        "tag.sort": "-version:refname", "core.commentChar": ";", "grep.lineNumber": "true", "grep.patternType": "perl",
    },
    "what is merged": {
        "merge.ff": "only", "merge.conflictStyle": "diff3", "merge.log": "true", "merge.renames": "false",
        "merge.branchdesc": "true",
        "merge.verifySignatures": "false", "merge.autoStash": "true", "merge.stat": "true", "merge.tool": "false",
        "merge.suppressDest": "*", "pull.rebase": "true", "rebase.autoStash": "true", "rebase.autoSquash": "true",
        "rebase.updateRefs": "true", "rerere.enabled": "true", "rerere.autoUpdate": "true", "commit.verbose": "true",
        "commit.status": "false", "commit.cleanup": "scissors", "core.editor": "sleep 1000", "sequence.editor": "sleep 1000",
        "branch.autoSetupMerge": "always", "branch.autoSetupRebase": "always", "checkout.defaultRemote": "origin",
        "checkout.guess": "false", "push.default": "nothing", "push.followTags": "true", "push.gpgSign": "if-asked",
        "submodule.recurse": "true", "tag.gpgSign": "true", "tag.forceSignAnnotated": "true", "help.autoCorrect": "immediate",
    },
    "what is stored": {
        "core.fsmonitor": "false", "core.untrackedCache": "true", "core.splitIndex": "true", "core.preloadIndex": "true",
        "index.version": "4", "index.threads": "1", "feature.manyFiles": "true", "core.trustctime": "false",
        "core.checkStat": "minimal",
        "core.logAllRefUpdates": "always", "core.sharedRepository": "group", "core.compression": "0",
        "core.bigFileThreshold": "1k",
        "core.looseCompression": "0", "gc.auto": "1", "gc.autoDetach": "false", "gc.pruneExpire": "now",
        "gc.reflogExpire": "now",
        "maintenance.auto": "true", "fetch.prune": "true", "fetch.pruneTags": "true", "fetch.fsckObjects": "true",
        "transfer.fsckObjects": "true", "receive.denyCurrentBranch": "refuse", "pack.threads": "1",
        "i18n.commitEncoding": "UTF-8",
        "i18n.logOutputEncoding": "ISO-8859-1", "core.precomposeUnicode": "true", "core.protectNTFS": "true",
        "core.safecrlf": "true",
        "core.autocrlf": "input", "core.eol": "lf", "core.whitespace": "error", "apply.whitespace": "error",
        "init.defaultBranch": "trunk",
        "alias.status": "log", "alias.commit": "version", "alias.add": "version", "user.useConfigOnly": "true",
        "protocol.allow": "always",
        "worktree.guessRemote": "true", "add.ignoreErrors": "true", "stash.showPatch": "true", "core.excludesFile": "/dev/null",
        "core.attributesFile": "/dev/null", "clean.requireForce": "true", "credential.helper": "!false",
        "uploadpack.allowFilter": "true",
    },
}
AGENT = "echo x >\"f-$FARM_TASK\"; [ $FARM_TASK = t-0001 ] || git mv a.txt b.txt"


def go_the_whole_way(repo: Path, agent: str = AGENT, **env: str) -> Caller:
    """Two tasks to main, then everything that looks, and clean."""
    farm = Caller(repo, os.getpid())
    farm.ok("add", "-f", "-", input="one\ntwo\n")
    argv = ("run", "-n", "2", "--agent", agent, "--gate", "true", "--until-drained")
    done = farm(*argv, env={"FARM_GRACE_SECONDS": "5", **env}, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    for verb in ("tasks", "queue", "status", "locks"):
        farm.json(verb)
    doctor = farm("doctor")
    assert "all is well" in doctor.stdout, doctor.stdout
    farm.ok("clean", timeout=60)
    return farm


def test_there_are_as_many_settings_as_were_promised():
    assert sum(map(len, SETTINGS.values())) >= 78


@pytest.mark.parametrize("group", SETTINGS)
def test_a_task_goes_its_way_whatever_git_is_told(make_repo, group):
    repo = make_repo("app", files={"a.txt": "one\n"})
    for key, value in SETTINGS[group].items():
        git(repo, "config", "--global", key, value)
    go_the_whole_way(repo)
    assert git(repo, "-c", "color.ui=never", "ls-tree", "-r", "--name-only", "main").split() == ["b.txt", "f-t-0001", "f-t-0002"]


@pytest.mark.parametrize("name", ["-dash it's #ünï 100%", "~a:b;$c {d} *e", 'quo"te\\back', "new\nline"])
def test_a_task_goes_its_way_in_a_folder_of_any_name(make_repo, sandbox, name):
    repo = make_repo("plain", files={"a.txt": "one\n"})
    (sandbox.work / "in").mkdir()
    go_the_whole_way(repo.rename(sandbox.work / "in" / name))


HOOKS = ("post-checkout", "post-merge", "post-commit", "pre-push", "reference-transaction", "post-index-change", "pre-auto-gc",
         "post-rewrite", "pre-rebase", "prepare-commit-msg")


def test_hooks_that_fail_stop_no_landing(make_repo):
    repo = make_repo("app", files={"a.txt": "one\n"})
    for name in HOOKS[:2] + HOOKS[3:4] + HOOKS[5:]:
        hook = repo / ".git/hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text("#!/bin/sh\necho hook >&2\nexit 1\n" if name != "prepare-commit-msg" else "#!/bin/sh\nexit 0\n")
        hook.chmod(0o755)
    go_the_whole_way(repo)


def test_a_dirty_checkout_keeps_its_edits(make_repo):
    repo = make_repo("app", files={"a.txt": "one\n", "mine.txt": "mine\n"})
    (repo / "mine.txt").write_text("edited\n")
    (repo / "untracked").write_text("new\n")
    (repo / "staged").write_text("staged\n")
    git(repo, "add", "staged")
    go_the_whole_way(repo)
    assert git(repo, "status", "--porcelain").split("\n") == ["M mine.txt".rjust(11), "A  staged", "?? untracked"]


def test_a_farm_goes_on_in_a_repo_that_was_moved(make_repo, sandbox):
    repo = make_repo("app", files={"a.txt": "one\n"})
    Caller(repo, os.getpid()).ok("add", "before")
    go_the_whole_way(repo.rename(sandbox.work / "moved"), "echo x >\"f-$FARM_TASK\"")


@pytest.mark.parametrize("kind", ["sha256", "shallow", "partial"])
def test_a_task_goes_its_way_in_a_repo_of_another_kind(make_repo, sandbox, kind):
    source, repo = make_repo("source", files={"a.txt": "one\n"}, commits=3), sandbox.work / "app"
    if kind == "sha256":
        git(sandbox.work, "init", "-q", "--object-format=sha256", "-b", "main", repo)
        (repo / "a.txt").write_text("one\n")
        git(repo, "add", "-A")
        git(repo, "commit", "-q", "-m", "first")
    else:
        git(source, "config", "uploadpack.allowFilter", "true")
        option = "--depth=1" if kind == "shallow" else "--filter=blob:none"
        git(sandbox.work, "clone", "-q", option, f"file://{source}", repo)
    go_the_whole_way(repo)


def test_a_tmux_conf_of_any_kind_changes_nothing(make_repo, sandbox):
    (sandbox.home / ".tmux.conf").write_text("set -g default-command 'exit 1'\nset -g exit-empty on\nset -g remain-on-exit off\n"
                                             "set -g base-index 1\nset -g prefix None\nset -g default-shell /bin/false\n")
    run(["tmux", "-V"], check=True)
    go_the_whole_way(make_repo("app", files={"a.txt": "one\n"}))

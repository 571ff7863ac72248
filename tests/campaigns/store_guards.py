"""Guards of the store, left out one at a time: the campaign must notice each."""

from __future__ import annotations

import paths  # noqa: F401  (sets sys.path)
import pytest
import simulated_disk as sim
from simulated_disk import World
from store_campaign import campaign
from store_moves import MOVES

import farm as toolkit


def skip_within(patch: pytest.MonkeyPatch, world: World, owner: type, method: str) -> None:
    """No fsync of a folder while `owner.method` runs."""
    original, fsync_folder = getattr(owner, method), world.store.disk.fsync_folder

    def without_fsync(*args, **options):
        world.store.disk.fsync_folder = lambda path: None
        try:
            return original(*args, **options)
        finally:
            world.store.disk.fsync_folder = fsync_folder

    patch.setattr(owner, method, without_fsync)


def leave_out_data_fsync(patch: pytest.MonkeyPatch, world: World) -> None:
    fsync, system = world.system.fsync, world.system
    patch.setattr(system, "fsync", lambda fd: fsync(fd) if isinstance(system.open_files[fd][0], sim.Folder) else None)


def leave_out_folder_fsync(patch: pytest.MonkeyPatch, world: World) -> None:
    skip_within(patch, world, toolkit.Store, "write_durably")


def leave_out_unlink_fsync(patch: pytest.MonkeyPatch, world: World) -> None:
    skip_within(patch, world, toolkit.Transaction, "remove_lock")


def leave_out_first_fsync(patch: pytest.MonkeyPatch, world: World) -> None:
    skip_within(patch, world, toolkit.Store, "make_folders")


def leave_out_settling(patch: pytest.MonkeyPatch, world: World) -> None:
    patch.setattr(toolkit.Transaction, "sync_folders", lambda tx: None)


def leave_out_dirty_mark(patch: pytest.MonkeyPatch, world: World) -> None:
    patch.setattr(toolkit.Transaction, "mark_dirty", lambda tx: None)


def leave_out_healing(patch: pytest.MonkeyPatch, world: World) -> None:
    patch.setattr(toolkit.Transaction, "heal", lambda tx: None)


def leave_out_exclusive_link(patch: pytest.MonkeyPatch, world: World) -> None:
    original = toolkit.Store.write_durably

    def replace(store: toolkit.Store, name: str, data: bytes, *, exclusive: bool = False, **options) -> None:
        original(store, name, data, **options)

    patch.setattr(toolkit.Store, "write_durably", replace)


def leave_out_rename(patch: pytest.MonkeyPatch, world: World) -> None:
    """Files are written in place."""
    def write_in_place(store: toolkit.Store, name: str, data: bytes, **_options) -> None:
        descriptor = world.system.open(store.path(name), toolkit.os.O_WRONLY | toolkit.os.O_CREAT | toolkit.os.O_TRUNC)
        world.system.write(descriptor, data)
        world.system.fsync(descriptor)
        world.system.close(descriptor)
        store.disk.fsync_folder(toolkit.os.path.dirname(store.path(name)))

    patch.setattr(toolkit.Store, "write_durably", write_in_place)


def leave_out_temp_unlink(patch: pytest.MonkeyPatch, world: World) -> None:
    """A temp file that a killed writer left is truncated."""
    original = world.system.open
    patch.setattr(world.system, "open", lambda path, flags, mode=0o777: original(
        path, flags & ~toolkit.os.O_EXCL | toolkit.os.O_TRUNC if path.endswith(".tmp") else flags, mode))


def leave_out_order(patch: pytest.MonkeyPatch, world: World) -> None:
    """The source goes first, then the destination is written."""
    def move(tx: toolkit.Transaction, task: toolkit.Task, place: str, event: str, **_details) -> toolkit.Task:
        holder = tx.state.find_holder(task.id)
        source = "claimed" if holder else "ready" if task.id in tx.state.ready else "pending"
        if source != place and {source, place} != {"ready", "landed"}:
            tx.drop_source(source, task.id)
        tx.state.ready.pop(task.id, None)
        getattr(tx.state, place)[task.id] = task._replace(rev=task.rev + 1)
        tx.write("pending" if place == "pending" else "ready")
        return task

    patch.setattr(toolkit.Transaction, "move", move)


def leave_out_rev(patch: pytest.MonkeyPatch, world: World) -> None:
    """Of two copies the one further on its way wins, whatever their revs are."""
    original = toolkit.State.drop_losers

    def drop_losers(state: toolkit.State) -> None:
        pending = state.pending
        state.pending = {task_id: task._replace(rev=0) for task_id, task in pending.items()}
        original(state)
        state.pending = {task_id: pending[task_id] for task_id in state.pending}

    patch.setattr(toolkit.State, "drop_losers", drop_losers)


def leave_out_archive_fsync(patch: pytest.MonkeyPatch, world: World) -> None:
    original = world.store.disk.append
    patch.setattr(world.store.disk, "append", lambda path, data, durably=False: original(path, data))


def leave_out_archive_first(patch: pytest.MonkeyPatch, world: World) -> None:
    """The queue file forgets what has landed before the archive has it."""
    original = toolkit.Transaction.archive

    def archive(tx: toolkit.Transaction) -> None:
        landed, tx.state.landed = tx.state.landed, {}
        tx.write("ready")
        tx.state.landed = landed
        original(tx)

    patch.setattr(toolkit.Transaction, "archive", archive)


def leave_out_archived_is_over(patch: pytest.MonkeyPatch, world: World) -> None:
    original = toolkit.State.drop_losers

    def drop_losers(state: toolkit.State) -> None:
        archived, state.archived = state.archived, toolkit.Ids()
        original(state)
        state.archived = archived

    patch.setattr(toolkit.State, "drop_losers", drop_losers)


def leave_out_fence(patch: pytest.MonkeyPatch, world: World) -> None:
    def get_claimed(queue: toolkit.TaskQueue, agent: str, fence: str, verb: str) -> toolkit.Task | None:
        return queue.state.find_task(fence.rpartition(".")[0])

    patch.setattr(toolkit.TaskQueue, "get_claimed", get_claimed)


def leave_out_mutex(patch: pytest.MonkeyPatch, world: World) -> None:
    patch.setattr(world.system.fcntl, "flock", lambda descriptor, operation: None)


GUARDS = {  # what is left out -> how, and the part of the campaign that must find it
    "fsync of a file's data": (leave_out_data_fsync, lambda run: run.cut_move("claim", MOVES["claim"])),
    "fsync of the folder after a rename or link": (leave_out_folder_fsync, lambda run: run.cut_move("submit", MOVES["submit"])),
    "fsync of the folder after an unlink": (leave_out_unlink_fsync, lambda run: run.cut_move("unlock all", MOVES["unlock all"])),
    "fsync of new folders in their parents": (leave_out_first_fsync, lambda run: run.run_first_use()),
    "fsync of all folders before healing": (leave_out_settling, lambda run: run.run_pair("submit", "look")),
    "the mark of a killed writer": (leave_out_dirty_mark, lambda run: run.run_pair("cancel", "cancel")),
    "healing": (leave_out_healing, lambda run: run.cut_move("claim", MOVES["claim"])),
    "link, which never replaces": (leave_out_exclusive_link, lambda run: run.meet_hand_made_locks()),
    "temp file and rename": (leave_out_rename, lambda run: run.cut_move("cancel", MOVES["cancel"])),
    "unlinking a stale temp file": (leave_out_temp_unlink, lambda run: run.run_pair("claim", "lock, as agent-006")),
    "destination before source": (leave_out_order, lambda run: run.cut_move("submit", MOVES["submit"])),
    "the higher rev wins": (leave_out_rev, lambda run: run.meet_stale_editors()),
    "fsync of the archive": (leave_out_archive_fsync, lambda run: run.cut_move("land", MOVES["land"])),
    "the archive before the queue file": (leave_out_archive_first, lambda run: run.cut_move("land", MOVES["land"])),
    "what is in the archive is over": (leave_out_archived_is_over, lambda run: run.meet_stale_editors()),
    "the fence": (leave_out_fence, lambda run: run.meet_late_agents()),
    "the mutex": (leave_out_mutex, lambda run: run.watch_mutex()),
}


def find_violation(guard: str) -> str:
    """The first thing that goes wrong without `guard`; empty when the model does not notice."""
    leave_out, search = GUARDS[guard]
    with campaign(stop_at_first=True) as run, pytest.MonkeyPatch.context() as patch:
        leave_out(patch, run.world)
        search(run)
    return run.violations[0] if run.violations else ""

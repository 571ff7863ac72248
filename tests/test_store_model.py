"""Nothing is ever lost: the store's moves on a simulated disk, with the power failing at every step.

`python tests/test_store_model.py [--states N]` runs a longer campaign and prints what it went through.
"""
from __future__ import annotations

import argparse
import errno
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent)]
import simulated_disk as sim  # noqa: E402  (needs the path above)
from simulated_disk import FOLDER, REPO, World, clone, images, mounted, tree_of, watched  # noqa: E402

farm = sim.farm
SUBSETS = 64

# ---------------------------------------------------------------------------------------------- moves


def in_transaction(move: Callable) -> Callable[[World], None]:
    """`move(world, tx)` as one whole verb."""
    def verb(world: World) -> None:
        with world.store.transaction() as tx:
            move(world, tx)

    return verb


def add(*titles: str) -> Callable:
    drafts = [farm.Task(title=title, source=f"list:{title}") for title in titles]
    return in_transaction(lambda world, tx: farm.TaskQueue(tx).add(drafts, 3))


def claim(agent: str, task_id: str = "") -> Callable:
    return in_transaction(lambda world, tx: farm.TaskQueue(tx).claim(agent, world.owner_of(agent), task_id))


def with_fence(verb: str, agent: str, *args, **options) -> Callable:
    """renew, fail or release of what `agent` holds, by the fence of its claim when that verb was first tried."""
    def move(world: World, tx: farm.Transaction) -> None:
        getattr(farm.TaskQueue(tx), verb)(agent, FENCES[agent], *args, **options)

    return in_transaction(move)


def submit(agent: str) -> Callable[[World], None]:
    """The verb itself; only git's part is stood in for."""
    def verb(world: World) -> None:
        farm.verb_submit(SimpleNamespace(store=world.store, repo=REPO, name="submit", args=[agent], agent=lambda: agent,
                                         options={"fence": FENCES[agent]}))

    return verb


def on_queue(verb: str, task_id: str, *args) -> Callable:
    return in_transaction(lambda world, tx: getattr(farm.TaskQueue(tx), verb)(task_id, *args))


def return_work(task_id: str) -> Callable:
    def move(world: World, tx: farm.Transaction) -> None:
        if task_id in tx.state.ready:
            farm.TaskQueue(tx).give_back(tx.state.ready[task_id], "it conflicts", "return", start="refs/farm/returned/x/1")

    return in_transaction(move)


def land(*ids: str) -> Callable:
    def move(world: World, tx: farm.Transaction) -> None:
        for task_id in ids:
            if task_id in tx.state.ready:
                tx.move(tx.state.ready[task_id]._replace(state="landed", landed_commit="c0ffee"), "landed", "landed")

    return in_transaction(move)


def acquire(agent: str, *names: str) -> Callable:
    return in_transaction(lambda world, tx: farm.LockRegistry(tx).acquire(agent, list(names), world.owner_of(agent)))


def unlock(agent: str, *names: str) -> Callable:
    return in_transaction(lambda world, tx: farm.LockRegistry(tx).release(agent, list(names)))


def give_up(agent: str) -> Callable:
    def move(world: World, tx: farm.Transaction) -> None:
        if agent in tx.state.claims:
            farm.LockRegistry(tx).give_up(tx.state.claims[agent])

    return in_transaction(move)


FENCES = {"agent-001": "t-0002.2", "agent-002": "t-0003.2"}

MOVES = {
    "add": add("new"),
    "add three": add("new", "newer", "newest"),
    "claim": claim("agent-006"),
    "claim, as one with locks": claim("agent-004"),
    "renew": with_fence("renew", "agent-001"),
    "submit": submit("agent-001"),
    "submit, keeping locks": submit("agent-002"),
    "fail": with_fence("fail", "agent-001", "no idea"),
    "fail for good": with_fence("fail", "agent-001", "no use", retry=False),
    "fail, keeping locks": with_fence("fail", "agent-002", "no idea"),
    "release": with_fence("release", "agent-001"),
    "release, keeping locks": with_fence("release", "agent-002"),
    "cancel": on_queue("cancel", "t-0001"),
    "cancel what is ready": on_queue("cancel", "t-0004"),
    "retry": on_queue("retry", "t-0006", 3),
    "return": return_work("t-0004"),
    "return for good": return_work("t-0005"),
    "land": land("t-0004"),
    "lock": acquire("agent-007", "db"),
    "lock more": acquire("agent-004", "db"),
    "unlock one": unlock("agent-004", "deploy"),
    "unlock all": unlock("agent-004", "deploy", "port:8080"),
    "give up": give_up("agent-001"),
}
COMPOSITE_MOVES = {  # several moves under one mutex: each may be made, or not, by itself
    "expire": in_transaction(lambda world, tx: farm.LockRegistry(tx).expire()),
    "land two": land("t-0004", "t-0005"),
}
COUNTING_MOVES = ("renew", "retry")  # made twice, they count twice
LATER_MOVES = {  # by others, after a kill: an agent whose name sorts before or after the killed one's
    "claim t-0002 as agent-000": claim("agent-000", "t-0002"),
    "claim t-0002 as agent-009": claim("agent-009", "t-0002"),
    "claim t-0004 as agent-009": claim("agent-009", "t-0004"),
    "claim anything": claim("agent-009"),
    "lock, as agent-006": acquire("agent-006", "db"),
    "look": in_transaction(lambda world, tx: None),
}


def build_base(world: World) -> None:
    """Ten tasks in all states and places, and agents alive and dead, with and without tasks and locks."""
    world.system.restart(clone(World().system.root))
    with world.store.transaction() as tx:
        drafts = [farm.Task(title=f"task {number}", max_attempts=1 if number == 5 else 0) for number in range(1, 11)]
        farm.TaskQueue(tx).add(drafts, 3)
    for agent, task_id in (("agent-001", "t-0004"), ("agent-001", "t-0005"), ("agent-001", "t-0007"), ("agent-001", "t-0006")):
        claim(agent, task_id)(world)
        with world.store.transaction() as tx:
            queue, fence = farm.TaskQueue(tx), f"{task_id}.2"
            if task_id == "t-0006":
                queue.fail(agent, fence, "no use", retry=False)
            else:
                queue.submit(agent, fence, "farm/agent-001/" + task_id, "c0ffee")
    land("t-0007")(world)
    for agent, task_id in (("agent-001", "t-0002"), ("agent-002", "t-0003"), ("agent-003", "t-0008"), ("agent-008", "t-0010")):
        claim(agent, task_id)(world)
    for agent, *names in (("agent-002", "schema"), ("agent-003", "docs"), ("agent-004", "deploy", "port:8080"),
                          ("agent-005", "ci")):
        acquire(agent, *names)(world)
    on_queue("cancel", "t-0009")(world)
    for agent in ("agent-003", "agent-005"):
        world.kill(agent)


# ---------------------------------------------------------------------------------------------- the campaign


class Campaign:
    """Cuts moves at their steps, recovers, compares; counts what it did and keeps what was wrong."""

    def __init__(self, seed: int = 1, limit: int = 10 ** 9, *, stop_at_first: bool = False):
        self.rng, self.limit, self.stop_at_first = random.Random(seed), limit, stop_at_first
        self.counts: Counter = Counter()
        self.violations: list[str] = []
        self.seen: dict[tuple, set] = {}
        self.world = World()
        with mounted(self.world):
            build_base(self.world)
        self.base = self.world.system.root
        self.steps_of: dict[str, int] = {}

    def is_over(self) -> bool:
        return self.counts["disk states"] >= self.limit or bool(self.stop_at_first and self.violations)

    def start(self, root: sim.Folder, **trouble) -> None:
        self.world.system.restart(root, **trouble)

    def attempt(self, move: Callable, root: sim.Folder, **trouble) -> str:
        """Run a move on `root`: done, cut, refused (nothing to do for it) or failed (by the disk)."""
        self.start(root, **trouble)
        try:
            move(self.world)
        except sim.Cut:
            return "cut"
        except farm.FarmError:
            return "refused"
        except OSError:
            outcome = "failed"
        else:
            outcome = "done"
        assert self.world.system.mutex < 0, "the mutex was kept"
        return outcome

    def view(self, root: sim.Folder) -> dict:
        self.start(clone(root))
        return self.world.view()

    def complain(self, what: str) -> None:
        self.violations.append(what)

    def judge(self, root: sim.Folder, is_fine: Callable[[dict], bool], label: str) -> int:
        """Recover on a copy of `root`: nothing may be lost, doubled, or in a state that no one was told of. Returns its steps."""
        self.start(clone(root))
        try:
            if not is_fine(self.world.view()):
                self.complain(f"{label}: a move was undone, or half made")
        except (AssertionError, farm.FarmError, OSError, ValueError, KeyError) as error:
            self.complain(f"{label}: {type(error).__name__}: {error}")
        return self.world.system.steps

    def judge_images(self, root: sim.Folder, is_fine: Callable[[dict], bool], label: str, *, key: tuple,
                     again: bool = False) -> None:
        """All that a power cut may leave of `root`, each recovered; `again`: with a second cut at each step of the recovery."""
        seen = self.seen.setdefault(key, set())
        for image in images(root, SUBSETS, self.rng):
            if image in seen or self.is_over():
                continue
            seen.add(image)
            self.counts["disk states"] += 1
            steps = self.judge(tree_of(image), is_fine, label)
            for fuse in range(1, steps + 1) if again else ():
                self.cut_recovery(tree_of(image), fuse, is_fine, label, key)

    def cut_recovery(self, root: sim.Folder, fuse: int, is_fine: Callable[[dict], bool], label: str, key: tuple) -> None:
        """Cut the healing itself in a step, by kill and by power cut."""
        self.attempt(LATER_MOVES["look"], root, fuse=fuse)
        self.counts["crash points while healing"] += 1
        self.judge(root, is_fine, f"{label}, killed in step {fuse} of healing")
        self.judge_images(root, is_fine, f"{label}, cut in step {fuse} of healing", key=key)

    # -- one move

    def outcomes(self, move: Callable) -> tuple[list[dict], sim.Folder]:
        """The views before and after each single move that `move` is made of, and the disk at the end."""
        views, root = [self.view(self.base)], clone(self.base)
        with watched(lambda tx: views.append(sim.view_of(tx.state))):
            outcome = self.attempt(move, root)
        assert outcome == "done", f"this move is not possible in the base state: {outcome}"
        return views, root

    def cut_move(self, name: str, move: Callable) -> None:
        """Every step of one move: killed there, or the power cut there; and the power cut after it was acknowledged."""
        views, root = self.outcomes(move)
        self.judge_images(root, lambda view: view == views[-1], f"{name}, acknowledged", key=(name, "done"), again=True)
        for fuse in range(1, self.steps(name) + 1):
            root = clone(self.base)
            self.attempt(move, root, fuse=fuse)
            self.counts["crash points"] += 1
            self.judge(root, lambda view: view in views, f"{name}, killed in step {fuse}")
            label = f"{name}, power cut in step {fuse}"
            self.judge_images(root, lambda view: view in views, label, key=(name, "cut"), again=True)

    def break_move(self, name: str, move: Callable, error: int) -> None:
        """Every step of one move fails once, as on a full or broken disk: as before or made, and then it can be repeated."""
        views, _ = self.outcomes(move)
        for number in range(1, self.steps(name) + 1):
            root = clone(self.base)
            outcome = self.attempt(move, root, error_at=number, error=error)
            self.counts["disk errors"] += 1
            fine = views if outcome != "done" else views[-1:]
            label = f"{name}, {errno.errorcode[error]} in step {number}"
            self.judge(root, lambda view, fine=fine: view in fine, label)
            self.judge_images(root, lambda view, fine=fine: view in fine, label + ", power cut", key=(name, "error", outcome))
            is_made = self.view(root) == views[-1]
            if self.attempt(move, root) != "done" or self.view(root) != views[-1] and not (is_made and name in COUNTING_MOVES):
                self.complain(f"{label}: repeated, it is not what it would have been")

    # -- a killed move, and another one on what it left in the page cache

    def pairs(self) -> Iterator[tuple[str, int, str]]:
        """(first move, the step it is killed in or 0, later move) in a random but repeatable order."""
        later = [*MOVES, *LATER_MOVES]
        triples = [(first, fuse, second) for first in MOVES for fuse in range(self.steps(first) + 1) for second in later]
        self.rng.shuffle(triples)
        yield from triples

    def steps(self, name: str) -> int:
        """How many steps a move takes in the base state."""
        if name not in self.steps_of:
            self.attempt({**MOVES, **COMPOSITE_MOVES}[name], clone(self.base))
            self.steps_of[name] = self.world.system.steps
        return self.steps_of[name]

    def cut_pair(self, first: str, fuse: int, second: str) -> None:
        """Kill `first` in step `fuse` (0: not at all); then let the power fail in each step of `second`, and after it."""
        killed = clone(self.base)
        self.attempt(MOVES[first], killed, fuse=fuse)
        self.world.now += 1000
        try:
            self.cut_second(first, fuse, second, killed)
        finally:
            self.world.now -= 1000

    def cut_second(self, first: str, fuse: int, second: str, killed: sim.Folder) -> None:
        move = {**MOVES, **LATER_MOVES}[second]
        views = [self.view(self.base), self.view(self.after(first)), self.view(killed)]
        done = clone(killed)
        if self.attempt(move, done) != "done":
            return
        last = self.view(done)
        label, key = f"{first} {f'killed in step {fuse}' if fuse else 'made'}, then {second}", (first, fuse, second)
        if not fuse:
            views = views[1:]  # it was acknowledged: nothing brings back what was before it
        told = changed_names(views[-1], last)
        if first == second:
            told |= changed_names(views[0], views[1])

        def is_fine(view: dict) -> bool:
            """Each task and lock is as it was at one of the moments, ..."""
            return all(view.get(name) in [moment.get(name) for moment in (*views, last)] for name in {*view, *last, *views[0]})

        def is_kept(view: dict) -> bool:
            """... and what `second` said is done is done."""
            return is_fine(view) and all(view.get(name) == last.get(name) for name in told)

        self.judge_images(done, is_kept, label + ", acknowledged", key=(*key, "done"))
        for step in range(1, 1000):
            root = clone(killed)
            if self.attempt(move, root, fuse=step) != "cut" or self.is_over():
                return
            self.counts["crash points in a second move"] += 1
            self.judge_images(root, is_fine, f"{label}, power cut in step {step}", key=(*key, "cut"))

    def after(self, name: str) -> sim.Folder:
        root = clone(self.base)
        self.attempt(MOVES[name], root)
        return root

    # -- without a crash: others who write, and agents that come back late

    def meet_hand_made_locks(self) -> None:
        """While a lock is made, a person makes one of that name by hand, before any step: the person's stays."""
        text = b'{"schema": 1, "agent": "%s", "owner": {"host": "elsewhere"}, "locks": ["by hand"]}\n'
        for name, agent in (("claim", "agent-006"), ("lock", "agent-007")):
            path = f"{FOLDER}/agent_locks/{agent}.lock"
            for number in range(1, self.steps(name) + 1):
                wanted = self.attempt_beside(MOVES[name], path, text % agent.encode(), number)
                self.counts["writes by others"] += 1
                if wanted is not None and self.world.system.read(path) != wanted:
                    self.complain(f"{name}: a lock file made by hand before step {number} was overwritten")

    def attempt_beside(self, move: Callable, path: str, data: bytes, number: int) -> bytes | None:
        """Run a move; before its step `number`, put a file where none is yet. Returns what was put."""
        system, put = self.world.system, []

        def observer(_call: str, _path: str) -> None:
            if system.steps == number and system.find(path) is None:
                put.append(data)
                system.put(path, data)

        system.observer = observer
        try:
            self.attempt(move, clone(self.base))
        finally:
            system.observer = lambda call, path: None
        return put[0] if put else None

    def meet_late_agents(self) -> None:
        """An agent that was taken for dead comes back with its old fence: it is refused, and changes nothing."""
        root = clone(self.base)
        self.start(root)
        pid = self.world.owner_of("agent-001").pid
        start = self.world.alive[pid]
        self.world.kill("agent-001")
        COMPOSITE_MOVES["expire"](self.world)
        self.world.now += 1000
        claim("agent-009", "t-0002")(self.world)
        before = self.view(root)
        for name in ("submit", "fail", "release", "renew"):
            self.counts["late verbs"] += 1
            copy = clone(root)
            if self.attempt(MOVES[name], copy) != "refused" or self.view(copy) != before:
                self.complain(f"{name} with the fence of an old claim was not refused")
                break
        self.world.alive[pid] = start
        self.world.now -= 1000

    def meet_stale_editors(self) -> None:
        """An editor saves a queue file that it read long ago: work that went on since then is not started again."""
        with mounted(World()) as old:
            add(*(f"task {number}" for number in range(1, 11)))(old)
        self.save_over("task_queue/pending.json", old.system.read(f"{FOLDER}/task_queue/pending.json"), clone(self.base))
        returned = clone(self.base)
        self.attempt(MOVES["return"], returned)
        ready = "merge_queue/ready-to-merge.json"
        self.start(self.base)
        self.save_over(ready, self.world.system.read(f"{FOLDER}/{ready}"), returned)

    def save_over(self, name: str, text: bytes, root: sim.Folder) -> None:
        """What is not in the file itself stays as it is; a task that is nowhere else is as the editor has it."""
        before = self.view(root)
        self.start(root)
        self.world.system.put(f"{FOLDER}/{name}", text)
        self.counts["writes by others"] += 1
        kept = [key for key in before if key.startswith("claim ") or before[key][0] != "pending" or name.startswith("merge")]
        self.judge(root, lambda view: all(view[key] == before[key] for key in kept), f"an editor's old {name}")

    def watch_mutex(self) -> None:
        """No step of any move, the first ones of a farm included, may happen without the mutex."""
        system, bare = self.world.system, ("mkdir", "create")  # what the mutex file itself needs

        def observer(call: str, path: str) -> None:
            self.counts["steps watched"] += 1
            if system.mutex < 0 and not (call in bare and path in (FOLDER, FOLDER + "/.lock")):
                self.complain(f"{call} {path} without the mutex")

        system.observer = observer
        try:
            self.attempt(add("first"), clone(World().system.root))
            for move in {**MOVES, **COMPOSITE_MOVES}.values():
                self.attempt(move, clone(self.base))
        finally:
            system.observer = lambda call, path: None

    # -- all of it

    def run_moves(self) -> None:
        for name, move in {**MOVES, **COMPOSITE_MOVES}.items():
            self.cut_move(name, move)

    def run_errors(self, *errors: int) -> None:
        for name, move in {**MOVES, **COMPOSITE_MOVES}.items():
            for error in errors:
                self.break_move(name, move, error)

    def run_pairs(self, count: int) -> None:
        for triple in itertools.islice(self.pairs(), count):
            if not self.is_over():
                self.cut_pair(*triple)

    def run_pair(self, first: str, second: str) -> None:
        for fuse in range(1, self.steps(first) + 1):
            if not self.is_over():
                self.cut_pair(first, fuse, second)

    def run_first_use(self) -> None:
        """The very first move of a farm, in a repo without coordination/."""
        empty, first = clone(World().system.root), add("first")
        after_root = clone(empty)
        self.attempt(first, after_root)
        steps, after = self.world.system.steps, self.view(after_root)
        self.judge_images(after_root, lambda view: view == after, "first add, acknowledged", key=("first", "done"))
        for fuse in range(1, steps + 1):
            root = clone(empty)
            self.attempt(first, root, fuse=fuse)
            self.counts["crash points"] += 1
            self.judge(root, lambda view: view in ({}, after), f"first add, killed in step {fuse}")
            label = f"first add, power cut in step {fuse}"
            self.judge_images(root, lambda view: view in ({}, after), label, key=("first", "cut"), again=True)

    def run_others(self) -> None:
        self.meet_hand_made_locks()
        self.meet_late_agents()
        self.meet_stale_editors()


def changed_names(before: dict, after: dict) -> set[str]:
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


@contextmanager
def campaign(seed: int = 1, limit: int = 10 ** 9, *, stop_at_first: bool = False) -> Iterator[Campaign]:
    run = Campaign(seed, limit, stop_at_first=stop_at_first)
    with mounted(run.world):
        yield run


# ---------------------------------------------------------------------------------------------- guards, left out one at a time


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
    skip_within(patch, world, farm.Store, "write_durably")


def leave_out_unlink_fsync(patch: pytest.MonkeyPatch, world: World) -> None:
    skip_within(patch, world, farm.Transaction, "remove_lock")


def leave_out_first_fsync(patch: pytest.MonkeyPatch, world: World) -> None:
    skip_within(patch, world, farm.Store, "make_folders")


def leave_out_settling(patch: pytest.MonkeyPatch, world: World) -> None:
    patch.setattr(farm.Transaction, "settle_folders", lambda tx: None)


def leave_out_dirty_mark(patch: pytest.MonkeyPatch, world: World) -> None:
    patch.setattr(farm.Transaction, "mark_dirty", lambda tx: None)


def leave_out_healing(patch: pytest.MonkeyPatch, world: World) -> None:
    patch.setattr(farm.Transaction, "heal", lambda tx: None)


def leave_out_exclusive_link(patch: pytest.MonkeyPatch, world: World) -> None:
    original = farm.Store.write_durably

    def replace(store: farm.Store, name: str, data: bytes, *, exclusive: bool = False, **options) -> None:
        original(store, name, data, **options)

    patch.setattr(farm.Store, "write_durably", replace)


def leave_out_rename(patch: pytest.MonkeyPatch, world: World) -> None:
    """Files are written in place."""
    def write_in_place(store: farm.Store, name: str, data: bytes, **_options) -> None:
        descriptor = world.system.open(store.path(name), farm.os.O_WRONLY | farm.os.O_CREAT | farm.os.O_TRUNC)
        world.system.write(descriptor, data)
        world.system.fsync(descriptor)
        world.system.close(descriptor)
        store.disk.fsync_folder(farm.os.path.dirname(store.path(name)))

    patch.setattr(farm.Store, "write_durably", write_in_place)


def leave_out_temp_unlink(patch: pytest.MonkeyPatch, world: World) -> None:
    """A temp file that a killed writer left is truncated."""
    original = world.system.open
    patch.setattr(world.system, "open", lambda path, flags, mode=0o777: original(
        path, flags & ~farm.os.O_EXCL | farm.os.O_TRUNC if path.endswith(".tmp") else flags, mode))


def leave_out_order(patch: pytest.MonkeyPatch, world: World) -> None:
    """The source goes first, then the destination is written."""
    def move(tx: farm.Transaction, task: farm.Task, place: str, event: str, **_details) -> farm.Task:
        holder = tx.state.find_holder(task.id)
        source = "claimed" if holder else "ready" if task.id in tx.state.ready else "pending"
        if source != place and {source, place} != {"ready", "landed"}:
            tx.drop_source(source, task.id)
        tx.state.ready.pop(task.id, None)
        getattr(tx.state, place)[task.id] = task._replace(rev=task.rev + 1)
        tx.write("pending" if place == "pending" else "ready")
        return task

    patch.setattr(farm.Transaction, "move", move)


def leave_out_rev(patch: pytest.MonkeyPatch, world: World) -> None:
    """Of two copies the one further on its way wins, whatever their revs are."""
    original = farm.State.drop_losers

    def drop_losers(state: farm.State) -> None:
        pending = state.pending
        state.pending = {task_id: task._replace(rev=0) for task_id, task in pending.items()}
        original(state)
        state.pending = {task_id: pending[task_id] for task_id in state.pending}

    patch.setattr(farm.State, "drop_losers", drop_losers)


def leave_out_fence(patch: pytest.MonkeyPatch, world: World) -> None:
    def get_claimed(queue: farm.TaskQueue, agent: str, fence: str, verb: str) -> farm.Task | None:
        return queue.state.find_task(fence.rpartition(".")[0])

    patch.setattr(farm.TaskQueue, "get_claimed", get_claimed)


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


# ---------------------------------------------------------------------------------------------- tests


def report_of(run: Campaign) -> str:
    return "\n".join([f"{len(run.violations)} violations", *run.violations[:10], str(dict(run.counts))])


def test_a_power_cut_or_a_kill_in_any_step_of_any_move_loses_nothing():
    with campaign() as run:
        run.run_moves()
    assert not run.violations, report_of(run)
    assert run.counts["crash points"] > 250, report_of(run)


def test_a_power_cut_during_the_very_first_move_leaves_a_farm_that_works():
    with campaign() as run:
        run.run_first_use()
    assert not run.violations, report_of(run)


def test_a_disk_error_in_any_step_leaves_a_move_unmade_or_made_and_it_can_be_repeated():
    with campaign() as run:
        run.run_errors(errno.ENOSPC)
    assert not run.violations, report_of(run)


def test_a_power_cut_after_a_kill_undoes_nothing_that_was_acknowledged():
    with campaign() as run:
        run.run_pairs(50)
    assert not run.violations, report_of(run)


def test_nobody_overwrites_a_lock_or_restarts_work_that_went_on_without_him():
    with campaign() as run:
        run.run_others()
    assert not run.violations, report_of(run)


def test_nothing_is_written_without_the_mutex():
    with campaign() as run:
        run.watch_mutex()
    assert not run.violations, report_of(run)


@pytest.mark.parametrize("guard", GUARDS)
def test_the_model_notices_when_a_guard_is_left_out(guard):
    assert find_violation(guard), f"without {guard} nothing went wrong in the model"


# ---------------------------------------------------------------------------------------------- longer campaign


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=60_000, help="disk states to recover from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    started = time.monotonic()
    with campaign(options.seed, options.states) as run:
        for part in (run.run_moves, run.run_first_use, run.run_others, run.watch_mutex):
            part()
        run.run_errors(errno.ENOSPC, errno.EIO)
        run.run_pairs(10 ** 9)
    noticed = {guard: find_violation(guard) for guard in GUARDS}
    table = {"moves": len(MOVES) + len(COMPOSITE_MOVES), **run.counts, "violations": len(run.violations),
             "guards left out": len(noticed), "of these noticed": sum(map(bool, noticed.values())),
             "seconds": round(time.monotonic() - started)}
    for name, count in table.items():
        print(f"{name:<30} {count:>9,}")
    for line in run.violations[:20]:
        print(line)
    for guard, violation in noticed.items():
        print(f"without {guard}: {violation or 'NOTHING NOTICED'}")
    return 1 if run.violations or not all(noticed.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Nothing is ever lost: the store's moves, with the power failing at every step, and what is found afterwards."""

from __future__ import annotations

import errno
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import paths  # noqa: F401  (sets sys.path)
import simulated_disk as sim
from simulated_disk import FOLDER, World, clone, images, mounted, tree_of, watched
from store_moves import COMPOSITE_MOVES, COUNTING_MOVES, LATER_MOVES, MOVES, UNORDERED_MOVES, add, build_base, claim
from store_views import view_of

import farm as toolkit

SUBSETS = 64


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
        except toolkit.FarmError:
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
        except (AssertionError, toolkit.FarmError, OSError, ValueError, KeyError) as error:
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
        with watched(lambda tx: views.append(view_of(tx.state))):
            outcome = self.attempt(move, root)
        assert outcome == "done", f"this move is not possible in the base state: {outcome}"
        return views, root

    def is_between(self, name: str, view: dict, views: list[dict]) -> bool:
        """Whether a move that was not acknowledged may have left this: one of the views, or parts of them."""
        return view in views or name in UNORDERED_MOVES and is_mixed(view, views)

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
            self.judge_images(root, lambda view: self.is_between(name, view, views), label, key=(name, "cut"), again=True)

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
            self.judge_images(root, lambda view, fine=fine: self.is_between(name, view, fine), label + ", power cut",
                              key=(name, "error", outcome))
            is_made = self.view(root) != views[0]
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
            return is_mixed(view, [*views, last])

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
        archived = clone(self.base)
        self.attempt(MOVES["land"], archived)
        self.save_over("task_queue/pending.json", old.system.read(f"{FOLDER}/task_queue/pending.json"), archived)
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


def is_mixed(view: dict, moments: list[dict]) -> bool:
    """Each task and lock is as it was at one of the moments."""
    return all(view.get(name) in [moment.get(name) for moment in moments] for name in {*view, *moments[0], *moments[-1]})


def changed_names(before: dict, after: dict) -> set[str]:
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


@contextmanager
def campaign(seed: int = 1, limit: int = 10 ** 9, *, stop_at_first: bool = False) -> Iterator[Campaign]:
    run = Campaign(seed, limit, stop_at_first=stop_at_first)
    with mounted(run.world):
        yield run

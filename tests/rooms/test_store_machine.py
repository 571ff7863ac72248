"""Any order of verbs, by any agents, with owners and verbs killed and the power cut: what must always hold of tasks and locks."""
from __future__ import annotations

import json
import random
from collections.abc import Callable

import simulated_disk as sim
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from store_views import view_of

import farm as toolkit

AGENTS = st.sampled_from([f"agent-{number:03d}" for number in range(1, 5)])
TASKS = st.integers(1, 9).map("t-{:04d}".format)
PATHS = st.sampled_from([[], [], ["src/a.c"], ["src/b.c"], ["src/**"], ["docs"]])
OVERLAPS = [{"src/a.c"}, {"src/b.c"}, {"docs"}, {"src/**"}, {"src/a.c", "src/**"}, {"src/b.c", "src/**"}]
PICK = st.integers(0, 8)
MAX_ATTEMPTS = 2


class StoreMachine(RuleBasedStateMachine):
    """Each rule is one verb, run on a disk in memory; `arm` makes the next one end in a kill or a power cut."""

    def __init__(self):
        super().__init__()
        self.world = sim.World()
        self.mount = sim.mounted(self.world)
        self.mount.__enter__()
        self.view: dict = {}
        self.told: dict[str, str] = {}  # agent -> the fence that its last claim printed
        self.fences: dict[str, str] = {}  # fence -> agent
        self.highest: dict[str, int] = {}  # task -> its highest rev so far
        self.finished: set[str] = set()
        self.armed: tuple | None = None

    def teardown(self):
        self.mount.__exit__(None, None, None)

    # -- how a verb runs

    def perform(self, verb: Callable):
        """Run `verb(tx)` as one transaction; returns its answer, or None when it was refused or cut. Refused changes nothing."""
        if self.armed:
            return self.perform_cut(verb)
        self.world.system.restart()
        try:
            with self.world.store.transaction() as tx:
                answer = verb(tx)
        except toolkit.FarmError:
            answer, refused = None, True
        else:
            refused = False
        view = self.look()
        assert not refused or view == self.view, "a refused verb changed something"
        self.view = view
        return answer

    def perform_cut(self, verb: Callable) -> None:
        """Afterwards the state is one of those that the verb would have passed through."""
        (fuse, is_power_cut, seed), self.armed = self.armed, None
        system, views = self.world.system, [self.view]
        for root, fuse_here in ((sim.clone(system.root), 0), (system.root, fuse)):
            system.restart(root, fuse=fuse_here)
            try:
                with sim.watched(lambda tx: views.append(view_of(tx.state))), self.world.store.transaction() as tx:
                    verb(tx)
            except (sim.Cut, toolkit.FarmError):
                continue
        if is_power_cut:
            self.cut_power(seed)
        self.view = self.look()
        assert self.view in views, "a verb that was cut was half made"

    def cut_power(self, seed: int) -> None:
        rng = random.Random(seed)
        image = rng.choice(list(sim.images(self.world.system.root, 32, rng)))
        self.world.system.restart(sim.tree_of(image))
        self.world.boot += "+"
        for pid in self.world.alive:
            self.world.alive[pid] = ""

    def look(self) -> dict:
        self.world.system.restart()
        return self.world.view()

    def record(self, task_id: str) -> dict:
        return json.loads(self.view[task_id][1])

    def place(self, task_id: str) -> str:
        return self.view.get(task_id, ("nowhere",))[0]

    # -- what happens around the verbs

    @rule(fuse=st.integers(1, 25), is_power_cut=st.booleans(), seed=st.integers(0, 99))
    def arm(self, fuse, is_power_cut, seed):
        self.armed = (fuse, is_power_cut, seed)

    @rule(agent=AGENTS)
    def kill_owner(self, agent):
        self.world.kill(agent)

    @rule(seconds=st.sampled_from([1, 60, 4000]))
    def wait(self, seconds):
        self.world.now += seconds

    # -- the verbs

    @initialize(priorities=st.lists(st.integers(0, 1), min_size=3, max_size=6))
    def add_many(self, priorities):
        drafts = [toolkit.Task(title="task", priority=priority) for priority in priorities]
        self.perform(lambda tx: toolkit.TaskQueue(tx).add(drafts, MAX_ATTEMPTS))

    @precondition(lambda self: len(self.tasks()) < 9)
    @rule(priority=st.integers(0, 1), paths=PATHS, after=st.none() | TASKS)
    def add(self, priority, paths, after):
        draft = toolkit.Task(title="task", priority=priority, paths=paths, after=[after] if after else [])
        answers = self.perform(lambda tx: toolkit.TaskQueue(tx).add([draft], MAX_ATTEMPTS))
        if answers:
            assert self.place(answers[0][0].id) == "pending"

    @precondition(lambda self: any(place == "pending" for _, (place, _) in self.tasks()))
    @rule(agent=AGENTS)
    def claim(self, agent):
        owner, before = self.world.owner_of(agent), self.view
        best = self.find_best(agent)
        claim = self.perform(lambda tx: toolkit.TaskQueue(tx).claim(agent, owner))
        if claim is None:
            return
        if claim.fence not in self.fences:
            assert claim.task["id"] == best or before.get("claim " + agent), f"{claim.task['id']} was claimed before {best}"
        assert self.fences.setdefault(claim.fence, agent) == agent, f"{claim.fence} was given to two agents"
        assert self.place(claim.task["id"]) == f"claimed by {agent}"
        self.told[agent] = claim.fence

    def find_best(self, agent: str) -> str | None:
        """The task that comes next, worked out from the records alone: priority, then first come."""
        held = [path for key, (place, text) in self.tasks() if place.startswith("claimed") and place != f"claimed by {agent}"
                for path in json.loads(text).get("paths", [])]
        free = []
        for key, (place, text) in self.tasks():
            task = json.loads(text)
            is_due = task.get("not_before", "") <= toolkit.utc(self.world.now)
            is_clear = not any({path, other} in OVERLAPS for path in task.get("paths", []) for other in held)
            is_next = all(name in self.finished for name in task.get("after", []))
            if place == "pending" and task["state"] == "pending" and is_due and is_clear and is_next:
                free.append((-task.get("priority", 0), task["seq"], key))
        return min(free)[2] if free else None

    def tasks(self) -> list:
        return [item for item in self.view.items() if not item[0].startswith("claim ")]

    def end_claim(self, agent: str, verb: str, move: Callable):
        """`move(queue, fence)` with the fence that the agent was told last, be it still its own or long taken by another."""
        fence = self.told[agent]
        task_id, before, was_cut = fence.rpartition(".")[0], self.view, bool(self.armed)
        is_own = self.place(task_id) == f"claimed by {agent}" and self.record(task_id)["fence"] == fence
        answer = self.perform(lambda tx: move(toolkit.TaskQueue(tx), fence) or True)
        if not was_cut:
            assert not is_own or answer, f"{verb} with the current fence was refused"
            assert is_own or self.view == before, f"{verb} with an old fence changed something"

    def pick_told(self, number: int) -> str:
        return sorted(self.told)[number % len(self.told)]

    @precondition(lambda self: self.told)
    @rule(number=PICK)
    def renew(self, number):
        self.end_claim(self.pick_told(number), "renew", lambda queue, fence: queue.renew(self.pick_told(number), fence))

    @precondition(lambda self: self.told)
    @rule(number=PICK)
    def submit(self, number):
        agent = self.pick_told(number)
        self.end_claim(agent, "submit", lambda queue, fence: queue.submit(agent, fence, f"farm/{agent}/x", "c0ffee"))

    @precondition(lambda self: self.told)
    @rule(number=PICK, is_final=st.booleans())
    def fail(self, number, is_final):
        agent = self.pick_told(number)
        self.end_claim(agent, "fail", lambda queue, fence: queue.fail(agent, fence, "no idea", retry=not is_final))

    @precondition(lambda self: self.told)
    @rule(number=PICK)
    def release(self, number):
        agent = self.pick_told(number)
        self.end_claim(agent, "release", lambda queue, fence: queue.release(agent, fence))

    @precondition(lambda self: self.tasks())
    @rule(number=PICK, verb=st.sampled_from(["cancel", "retry"]))
    def decide(self, number, verb):
        task_id, (place, _) = sorted(self.tasks())[number % len(self.tasks())]
        more = [MAX_ATTEMPTS] if verb == "retry" else []
        task = self.perform(lambda tx: getattr(toolkit.TaskQueue(tx), verb)(task_id, *more))
        assert not (task and place.startswith("claimed")), f"{verb} took a task from its holder"

    def ready(self) -> list[str]:
        return sorted(task_id for task_id, (place, _) in self.tasks() if place == "ready")

    @precondition(lambda self: self.ready())
    @rule(number=PICK)
    def land(self, number):
        task_id = self.ready()[number % len(self.ready())]
        self.perform(lambda tx: tx.move(tx.state.ready[task_id]._replace(state="landed"), "landed", "landed"))

    @precondition(lambda self: self.ready())
    @rule(number=PICK)
    def return_work(self, number):
        task_id = self.ready()[number % len(self.ready())]
        self.perform(lambda tx: toolkit.TaskQueue(tx).give_back(tx.state.ready[task_id], "it conflicts", "return"))

    @rule(agent=AGENTS, name=st.sampled_from(["schema", "port:8080"]), is_taken=st.booleans())
    def lock(self, agent, name, is_taken):
        owner = self.world.owner_of(agent)
        if is_taken:
            self.perform(lambda tx: toolkit.LockRegistry(tx).acquire(agent, [name], owner))
        else:
            self.perform(lambda tx: toolkit.LockRegistry(tx).release(agent, [name]))

    @precondition(lambda self: any(key.startswith("claim ") for key in self.view))
    @rule()
    def expire(self):
        before, alive, was_cut = self.view, dict(self.world.alive), bool(self.armed)
        self.perform(lambda tx: toolkit.TaskQueue(tx).expire() or True)
        for key in before:
            if key.startswith("claim "):
                owner = json.loads(before[key])["owner"]
                is_alive = owner["boot"] == self.world.boot and alive[owner["pid"]] == owner["start"]
                assert was_cut or (self.view.get(key) == before[key]) == is_alive, f"{key}: alive {is_alive}"

    # -- what always holds; World.view has seen to it that each task is in exactly one place

    @invariant()
    def no_task_is_lost_or_comes_back(self):
        assert set(self.highest) <= set(self.view), f"lost: {set(self.highest) - set(self.view)}"
        for task_id, (place, text) in self.tasks():
            task = json.loads(text)
            assert task["rev"] >= self.highest.get(task_id, 0), f"{task_id}: its rev fell to {task['rev']}"
            assert task.get("attempts", 0) <= task["max_attempts"], f"{task_id}: {task['attempts']} attempts"
            assert task_id not in self.finished or place == "landed", f"{task_id} has landed, and is {place}"
            self.highest[task_id] = task["rev"]
            if place == "landed":
                self.finished.add(task_id)

    @invariant()
    def no_two_agents_hold_what_excludes_each_other(self):
        held = []
        for key, text in self.view.items():
            if key.startswith("claim "):
                held += [(name, key) for name in json.loads(text).get("locks", [])]
        for _, (place, text) in self.tasks():
            if place.startswith("claimed"):
                held += [(path, place) for path in json.loads(text).get("paths", [])]
        for index, (name, holder) in enumerate(held):
            for other, other_holder in held[index + 1:]:
                assert holder == other_holder or name != other and {name, other} not in OVERLAPS, f"{name}, {other}: held by two"


def test_no_order_of_verbs_kills_and_power_cuts_loses_doubles_or_reruns_a_task():
    repeatable = settings(max_examples=150, stateful_step_count=50, deadline=None, derandomize=True)
    run_state_machine_as_test(StoreMachine, settings=repeatable)

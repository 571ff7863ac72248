"""The store's moves on a simulated disk, and the farm in which they are made."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import paths  # noqa: F401  (sets sys.path)
from simulated_disk import REPO, World, clone

import farm as toolkit


def in_transaction(move: Callable) -> Callable[[World], None]:
    """`move(world, tx)` as one whole verb."""
    def verb(world: World) -> None:
        with world.store.transaction() as tx:
            move(world, tx)

    return verb


def add(*titles: str) -> Callable:
    drafts = [toolkit.Task(title=title, source=f"list:{title}") for title in titles]
    return in_transaction(lambda world, tx: toolkit.TaskQueue(tx).add(drafts, 3))


def claim(agent: str, task_id: str = "") -> Callable:
    return in_transaction(lambda world, tx: toolkit.TaskQueue(tx).claim(agent, world.owner_of(agent), task_id))


def with_fence(verb: str, agent: str, *args, **options) -> Callable:
    """renew, fail or release of what `agent` holds, by the fence of its claim when that verb was first tried."""
    def move(world: World, tx: toolkit.Transaction) -> None:
        getattr(toolkit.TaskQueue(tx), verb)(agent, FENCES[agent], *args, **options)

    return in_transaction(move)


def renew_all(*agents: str) -> Callable[[World], None]:
    """What a host's connection does with a line that renews: no lock file is synced by itself, the folder is at the end."""
    def verb(world: World) -> None:
        host = SimpleNamespace(store=world.store, get_agent=lambda words: words["agent"], note_agents=lambda *told: None,
                               pass_orders=lambda done: {})
        words = {"claims": [{"agent": agent, "fence": FENCES[agent]} for agent in agents], "agents": []}
        toolkit.HostMoves.renew(host, words)

    return verb


def submit(agent: str) -> Callable[[World], None]:
    """The verb itself; only git's part is stood in for."""
    def verb(world: World) -> None:
        toolkit.verb_submit(SimpleNamespace(store=world.store, repo=REPO, name="submit", args=[agent], agent=lambda: agent,
                                         get={"fence": FENCES[agent]}.get))

    return verb


def on_queue(verb: str, task_id: str, *args) -> Callable:
    return in_transaction(lambda world, tx: getattr(toolkit.TaskQueue(tx), verb)(task_id, *args))


def return_work(task_id: str) -> Callable:
    def move(world: World, tx: toolkit.Transaction) -> None:
        if task_id in tx.state.ready:
            toolkit.TaskQueue(tx).give_back(tx.state.ready[task_id], "it conflicts", "return", start="refs/farm/returned/x/1")

    return in_transaction(move)


def approve(task_id: str) -> Callable[[World], None]:
    return lambda world: toolkit.approve(world.store, task_id, "c0ffee", "person")


def send_back(task_id: str) -> Callable:
    """A person's `return`, which is no attempt."""
    def move(world: World, tx: toolkit.Transaction) -> None:
        if task_id in tx.state.ready:
            ref = "refs/farm/returned/x/0.3"
            toolkit.TaskQueue(tx).give_back(tx.state.ready[task_id], "a person says: no", "return", start=ref, counts=False)

    return in_transaction(move)


def edit(task_id: str, **options) -> Callable[[World], None]:
    """The verb itself."""
    return lambda world: toolkit.verb_edit(SimpleNamespace(store=world.store, state=world.store.snapshot(),
                                                           one=lambda what: task_id, options=options))


def land(*ids: str) -> Callable:
    def move(world: World, tx: toolkit.Transaction) -> None:
        for task_id in ids:
            if task_id in tx.state.ready:
                tx.move(tx.state.ready[task_id]._replace(state="landed", landed_commit="c0ffee"), "landed", "landed")

    return in_transaction(move)


def acquire(agent: str, *names: str) -> Callable:
    return in_transaction(lambda world, tx: toolkit.LockRegistry(tx).acquire(agent, list(names), world.owner_of(agent)))


def unlock(agent: str, *names: str) -> Callable:
    return in_transaction(lambda world, tx: toolkit.LockRegistry(tx).release(agent, list(names)))


def give_up(agent: str) -> Callable:
    def move(world: World, tx: toolkit.Transaction) -> None:
        if agent in tx.state.claims:
            toolkit.TaskQueue(tx).end_claim(tx.state.claims[agent])

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
    "approve": approve("t-0004"),
    "return by a person": send_back("t-0004"),
    "edit": edit("t-0001", title="another", after=["t-0007"]),
    "land": land("t-0004"),
    "lock": acquire("agent-007", "db"),
    "lock more": acquire("agent-004", "db"),
    "unlock one": unlock("agent-004", "deploy"),
    "unlock all": unlock("agent-004", "deploy", "port:8080"),
    "give up": give_up("agent-001"),
}
COMPOSITE_MOVES = {  # several moves under one mutex: each may be made, or not, by itself
    "expire": in_transaction(lambda world, tx: toolkit.TaskQueue(tx).expire()),
    "land two": land("t-0004", "t-0005"),
    "renew two": renew_all("agent-001", "agent-002"),
}
UNORDERED_MOVES = ("renew two",)  # until it is acknowledged, a power cut keeps any of its files
COUNTING_MOVES = ("renew", "renew two", "retry", "edit")  # made twice, they count twice
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
        drafts = [toolkit.Task(title=f"task {number}", max_attempts=1 if number == 5 else 0) for number in range(1, 11)]
        toolkit.TaskQueue(tx).add(drafts, 3)
    for agent, task_id in (("agent-001", "t-0004"), ("agent-001", "t-0005"), ("agent-001", "t-0007"), ("agent-001", "t-0006")):
        claim(agent, task_id)(world)
        with world.store.transaction() as tx:
            queue, fence = toolkit.TaskQueue(tx), f"{task_id}.2"
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

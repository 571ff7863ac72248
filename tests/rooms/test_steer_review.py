"""Review before landing: who waits, what an approval is of, what comes back, a reviewer's command, and kills."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
from farm_calls import A, bytes_below
from merge_calls import GREEN, Queue, edited_line, new_file
from sandbox import commit_files, git, wait_until
from screens import Screen, up

import farm as toolkit

pytestmark = pytest.mark.usefixtures("no_gate_is_left")
ALL = {"FARM_REVIEW": "all"}


def shown(queue: Queue) -> dict[str, str]:
    """id -> state in the merge queue."""
    return {entry["id"]: entry["state"] for entry in queue.json("queue")}


def events(queue: Queue) -> list[dict]:
    return [json.loads(line) for line in (queue.folder / "events.jsonl").read_text().splitlines()]


def unseen(queue: Queue) -> list[str]:
    """What has landed without a yes to exactly its commit."""
    told = events(queue)
    seen = {(event["task"]["id"], event["task"]["commit"]) for event in told if event["event"] == "approved"}
    return [event["task"]["id"] for event in told
            if event["event"] == "landed" and (event["task"]["id"], event["task"]["commit"]) not in seen]


# ---------------------------------------------------------------------------------------------- who waits, and who does not


def test_green_work_waits_and_an_approval_lands_it_without_another_gate(queue):
    one, two = queue.ready_all([new_file("f"), new_file("g")])
    done = queue.merge(env=ALL)
    assert shown(queue) == {one: "review", two: "review"} and queue.landed() == []
    assert f"waits for a review: {one}, {two}" in done.stderr and "review 2" in queue.summary()
    assert [task["id"] for task in queue.json("tasks")] == [one, two]
    assert queue.ok("tasks", "--state", "review").count("\n") == 1
    gates = len(queue.gated())
    commit = queue.task(one)["commit"]
    assert queue.ok("approve", f"{one}@{commit[:12]}") == f"{one}\t{commit}"
    queue.merge(env=ALL)
    assert (queue.landed(), shown(queue), len(queue.gated()) - gates) == ([one], {two: "review"}, 1)
    assert len(queue.gated()) == len(set(queue.gated())), "a tree was gated twice"
    assert queue.ok("approve", "--all").startswith(two)
    queue.merge(env=ALL)
    assert (queue.landed(), queue.red_values(), unseen(queue)) == ([one, two], [], [])
    queue.refused(3, "approve", "--all"), queue.refused(3, "approve"), queue.refused(3, "approve", "t-0099")
    assert "is landed" in queue.refused(4, "approve", one)


def test_only_what_touches_the_paths_waits_and_others_land_past_it(queue):
    inside, outside, odd = queue.ready_all([{"db/one.sql": "x\n"}, new_file("f"), {"db/a\tb": "x\n"}])
    queue.merge(env={"FARM_REVIEW": "db/**, *.lock"})
    assert (queue.landed(), shown(queue)) == ([outside], {inside: "review", odd: "review"})
    moved = queue.ready({"README.md": None, "db/README.md": "text\n"})
    queue.merge(env={"FARM_REVIEW": "README.md"})
    assert shown(queue) == {moved: "review"} and queue.landed() == [outside, inside, odd]


def test_work_on_top_of_what_is_reviewed_waits_only_for_that(queue):
    below = queue.ready({"db/one.sql": "x\n"})
    above = queue.ready(new_file("f"), base=f"farm/{A}/{below}")
    env = {"FARM_REVIEW": "db/**"}
    queue.merge(env=env)
    assert shown(queue) == {below: "review", above: "review"}
    queue.ok("approve", below)
    queue.merge(env=env)
    assert queue.landed() == [below, above]


def test_what_waits_holds_up_nobody_and_is_gated_again_on_the_new_tree(queue):
    first = queue.ready(edited_line(1, "BETTER"))
    queue.merge(env=ALL)
    second = queue.ready(edited_line(1, "other"), prompt="another")  # it conflicts with the one that waits
    queue.ok("approve", second)
    queue.merge(code=5, env=ALL)
    assert queue.landed() == [second] and "conflicts with main in long.txt" in queue.reason(first)
    third, fourth = queue.ready_all([new_file("f"), new_file("g", "half\n")])
    gate = "! { [ -e g.txt ] && [ -e person.txt ]; }"
    queue.merge(gate, env=ALL)
    assert shown(queue) == {third: "review", fourth: "review"}
    commit_files(queue.repo, new_file("person"))
    queue.merge(gate, code=5, env=ALL)
    assert shown(queue) == {third: "review"} and "the gate fails with it" in queue.reason(fourth)


def test_red_work_comes_back_and_nobody_is_asked(queue):
    bad, good = queue.ready_all([new_file("f", "BAD\n"), new_file("g")])
    asked = queue.outside / "asked"
    queue.merge(code=5, env={**ALL, "FARM_REVIEWER": f"grep -c . >>{asked}; exit 0"})
    assert queue.landed() == [good] and "gate fails" in queue.reason(bad) and len(asked.read_text().split()) == 1


@pytest.mark.parametrize("setting", ["no", "", "0"])
def test_without_a_review_nothing_waits(queue, setting):
    queue.ready(new_file("f"))
    queue.merge(env={"FARM_REVIEW": setting})
    assert shown(queue) == {}


# ---------------------------------------------------------------------------------------------- of what an approval is


def test_an_approval_is_of_exactly_the_commit_that_was_shown(queue):
    one = queue.ready(new_file("f"))
    queue.merge(env=ALL)
    first = queue.task(one)["commit"]
    assert "f.txt" in queue.ok("diff", f"{one}@{first}")
    queue.ok("return", one, "--why", "the name is wrong")
    queue.make_branches({one: new_file("other")}, git(queue.repo, "rev-parse", "main"))
    queue.submit_task(one)
    assert f"is ready at {queue.task(one)['commit'][:10]}" in queue.refused(4, "approve", f"{one}@{first}")
    queue.merge(env=ALL)
    assert shown(queue) == {one: "review"} and queue.landed() == []
    queue.ok("approve", one)
    claim_again(queue, one, new_file("third"))
    queue.merge(env=ALL)
    assert shown(queue) == {one: "review"} and queue.landed() == [], "an old approval was taken for the new commit"
    queue.ok("approve", one)
    claim_again(queue, one, {})
    with pytest.raises(toolkit.Refused):  # as a reviewer's command may, whose answer comes late
        toolkit.approve(toolkit.Store(str(queue.repo)), one, first, "reviewer")
    queue.merge(env=ALL)
    assert shown(queue) == {one: "review"}, "the same commit, submitted again, needs a yes again"


def claim_again(queue: Queue, task_id: str, files: dict) -> None:
    """Return a task and submit it again, with other files where there are some."""
    queue.ok("return", task_id, "--why", "again")
    if files:
        queue.make_branches({task_id: files}, git(queue.repo, "rev-parse", "main"))
    queue.submit_task(task_id)


def test_an_approval_of_what_does_not_merge_any_more_says_so(queue):
    one = queue.ready(edited_line(1, "mine"))
    queue.merge(env=ALL)
    commit_files(queue.repo, edited_line(1, "theirs"))
    assert "does not merge with main any more (conflict long.txt)" in queue.refused(5, "approve", one)
    assert "approved" not in queue.task(one)


def test_an_agent_cannot_approve_its_own_work(queue):
    one = queue.ready(new_file("f"))
    queue.merge(env=ALL)
    queue.refused(4, "approve", one, env={"FARM_SESSION": "x"})
    assert "approved" not in queue.task(one)


# ---------------------------------------------------------------------------------------------- what comes back


def test_returned_work_has_the_words_and_its_commits_and_no_attempt_less(queue):
    one = queue.ready(new_file("f"))
    queue.merge(env=ALL)
    commit = queue.task(one)["commit"]
    queue.refused(2, "return", one), queue.refused(2, "return", one, "--why", " ")
    queue.ok("return", one, "--why", "keep the old\nname \x1b[2J")
    back = queue.task(one)
    assert (back["state"], back["attempts"], git(queue.repo, "rev-parse", back["start"])) == ("pending", 0, commit)
    queue.submit_task(one)
    queue.ok("return", one, "--why", "and test it", "--fail")
    assert queue.task(one)["attempts"] == 1 and queue.task(one)["state"] in ("waiting", "pending")  # a second of backoff
    kept = git(queue.repo, "for-each-ref", "--format=%(refname)", "refs/farm/returned").split()
    assert len(kept) == 2 and "keep the old\nname \n" in queue.returned_text(one, 0)
    queue.ok("retry", one)
    claim = queue.claim(A, "--id", one)
    prompt = (queue.folder / f"prompts/{one}.2.md").read_text()
    assert "a person says: and test it" in prompt and f"git show --stat {commit}" not in prompt
    assert claim["task"]["start"] == kept[0] or claim["task"]["start"] == kept[1]
    assert "is claimed" in queue.refused(4, "return", one, "--why", "x")


def landing_of(queue: Queue, task_id: str) -> tuple:
    """What a merger knows of an entry that it is about to land, and a Landing to record it."""
    store = toolkit.Store(str(queue.repo))
    task, base = store.snapshot().ready[task_id], git(queue.repo, "rev-parse", "main")
    landing = toolkit.Landing(toolkit.Site(store, toolkit.load_settings(str(queue.repo)), "main"), toolkit.Tally())
    return landing, [(task_id, task.commit, base, task.rev)]


def test_what_is_returned_in_the_middle_of_its_landing_is_landed(queue):
    one = queue.ready(new_file("f"))
    landing, entries = landing_of(queue, one)
    queue.ok("return", one, "--why", "too late")
    landing.record(entries)
    assert queue.states() == {one: "landed"}


def test_what_is_submitted_anew_in_the_middle_of_a_landing_is_not_taken_for_it(queue):
    one = queue.ready(new_file("f"))
    landing, entries = landing_of(queue, one)
    claim_again(queue, one, new_file("g"))
    landing.record(entries)
    assert queue.states() == {one: "ready"}


# ---------------------------------------------------------------------------------------------- a reviewer's command


def reviewer(queue: Queue, script: str) -> dict[str, str]:
    path = queue.outside / "reviewer"
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return {**ALL, "FARM_REVIEWER": str(path)}


def test_a_reviewers_command_reads_prompt_and_diff_and_lands_or_returns(queue):
    env = reviewer(queue, f"pwd >{queue.outside}/place; ls -A >>{queue.outside}/place; env >{queue.outside}/env\n"
                   'text=$(cat); case $text in *"+wrong"*) echo "line 1"; echo "f.txt is wrong"; exit 1 ;; esac\n'
                   '[[ $text == "work on "*"do it well"*"+++ b/"* ]]')
    wrong, right = queue.ready_all([new_file("f", "wrong\n"), new_file("g")], prompt="do it well")
    queue.merge(code=5, env=env)
    assert queue.landed() == [right] and unseen(queue) == []
    back = queue.task(wrong)
    assert back["reason"] == "the reviewer says no: line 1 f.txt is wrong" and back["attempts"] == 1
    place, *inside = (queue.outside / "place").read_text().splitlines()
    assert inside == [] and not place.startswith(str(queue.repo) + "/")
    told = (queue.outside / "env").read_text()
    assert "FARM_REPO" not in told and "FARM_REVIEWER" not in told and str(queue.repo) not in told.replace(place, "")


@pytest.mark.parametrize("script", ["exit 7", "exec nonexistent-command", "sleep 60"])
def test_no_answer_of_the_reviewer_leaves_it_to_a_person(queue, script):
    one, two = queue.ready_all([new_file("f"), new_file("g")])
    done = queue.merge(env={**reviewer(queue, f"echo x >>{queue.outside}/asked; {script}"), "FARM_GATE_TIMEOUT": "1"})
    assert shown(queue) == {one: "review", two: "review"} and done.stderr.count("so a person decides") == 2
    assert (queue.outside / "asked").read_text().count("x") == 2, "each is asked about once"
    queue.ok("approve", one)
    queue.merge(env=ALL)
    assert queue.landed() == [one]


def test_what_a_reviewer_costs_is_counted_as_far_as_it_tells(queue):
    result = json.dumps({"type": "result", "total_cost_usd": 0.25, "usage": {"input_tokens": 7, "output_tokens": 3}})
    one = queue.ready(new_file("f"))
    env = reviewer(queue, f"cat >/dev/null; echo '{result}'")
    queue.merge(env={**env, "FARM_REVIEWER": f"{env['FARM_REVIEWER']} claude -p"})
    told = json.loads(queue.ok("show", one, "--json"))
    assert (told["state"], told["cost_usd"], told["tokens_in"]) == ("landed", 0.25, 7)


# ---------------------------------------------------------------------------------------------- what a person sees


def test_status_show_and_a_damaged_note_say_what_waits(queue, farm_cleanup):
    one = queue.ready(new_file("f"))
    queue.merge(env=ALL)
    status = json.loads(queue("status", "--json").stdout)
    commit = queue.task(one)["commit"]
    assert status["reviews"] == [{"id": one, "commit": commit, "title": "work on f.txt"}]
    assert f"next: ./farm.py diff {one} # {one} waits for a review: work on f.txt" in queue("status").stdout
    assert f"./farm.py approve {one}@{commit[:12]}" in queue.ok("show", one)
    (queue.folder / "merge_queue/now.json").write_text('{"reviews": 7}')
    assert shown(queue) == {one: "ready"}
    (queue.folder / "merge_queue/now.json").write_text("{")
    assert queue.ok("tasks").startswith(f"{one}\tready")


def test_a_run_ends_when_all_that_is_left_waits_for_a_review(farm):
    farm.ok("add", "one")
    note = farm.repo.parent / "told"
    done = farm("run", "-n", "1", "--agent", "date >x", "--gate", "true", "--until-drained", timeout=90,
                env={**ALL, "FARM_GRACE_SECONDS": "2", "FARM_NOTIFY": f"cat >>{note}"})
    assert done.returncode == 5 and "t-0001 wait for a review" in done.stderr
    told = [json.loads(line) for line in note.read_text().splitlines()]
    assert [(one["event"], one["task"], one["try"]) for one in told] == [("review", "t-0001", "./farm.py diff t-0001")]


def test_the_watch_screen_looks_says_yes_and_says_no(farm, screen, farm_cleanup):
    up(farm, 2, "date >$FARM_TASK; git add -A; git commit -qm \"$(printf 'x\\033[31m')\"", "--review", "all")
    farm.ok("add", "first"), farm.ok("add", "second")
    wait_until(lambda: len(json.loads(farm("status", "--json").stdout)["reviews"]) == 2, 60, "two that wait")
    one: Screen = screen("status", "--watch", env={**os.environ, "GIT_PAGER": "cat"})
    one.wait_for("review 2")
    mark = len(one.read())
    first, second = [task["id"] for task in json.loads(farm("status", "--json").stdout)["reviews"]]
    one.type("y")  # nothing was looked at yet
    one.type("v")
    one.wait_for("press Enter", mark)
    assert f"+++ b/{first}" in one.read()[mark:] and "approve" not in one.read()[mark:]
    one.type("\n")
    one.wait_for("q leave", len(one.read()) - 5)
    one.type("y")
    wait_until(lambda: farm.task(first)["state"] == "landed", 60, "what was approved")
    mark = len(one.read())
    one.wait_for("review 1", mark)
    one.type("v")
    one.wait_for("press Enter", mark)
    one.type("\n")
    one.wait_for("q leave", len(one.read()) - 5)
    one.type("n")
    one.wait_for(f"what is wrong with {second}", mark)
    one.type("not so\n")
    wait_until(lambda: "a person says: not so" in farm.task(second)["reason"], 30, "what was returned")
    one.type("q")
    assert one.end() == 0
    farm.ok("down", "--now", timeout=120)


# ---------------------------------------------------------------------------------------------- kills


def test_kills_at_any_step_land_nothing_unseen_and_nothing_twice(queue, farm_cleanup):
    chance = random.Random(3)
    env = {**reviewer(queue, "sleep 0.0$((RANDOM % 9)); case $(cat) in *+yes*) exit 0 ;; *+no*) echo no; exit 1 ;; esac; exit 9"),
           "GATE_TOKEN": os.environ["GATE_TOKEN"]}
    kinds = {task_id: kind for kind in ("yes", "no", "ask")
             for task_id in queue.ready_all([new_file(f"{kind}{number}", f"{kind}\n") for number in range(2)], max_attempts=1)}
    gate = queue.counted(GREEN)
    for _ in range(6):
        process = queue.start("merge", "--gate", gate, "--slots", "2", "--watch", env=env)
        time.sleep(chance.uniform(0.2, 1.2))
        if chance.random() < 0.5:
            queue("approve", "--all")
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    queue("merge", "--gate", gate, "--slots", "2", env=env)
    queue("approve", "--all")
    queue("merge", "--gate", gate, "--slots", "2", env=env)
    told = queue.states()
    assert unseen(queue) == [] and queue.red_values() == []
    assert sorted(queue.landed()) == sorted({*queue.landed()}) == sorted(key for key, state in told.items() if state == "landed")
    assert all(told[key] == "landed" for key, kind in kinds.items() if kind in ("yes", "ask"))
    assert {told[key] for key, kind in kinds.items() if kind == "no"} <= {"failed", "landed"}
    assert bytes_below(queue.folder / "agent_locks") == {}

"""Tasks from a file: checklists, JSON lines, plain lines, issues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from farm_calls import A, assert_is_error

# ---------------------------------------------------------------------------------------------- add -f


FORMATS = {
    "checklist": "# Plan\n\n- [ ] First\n- [x] Done long ago\n* [ ] Second\n",
    "json-lines": '{"title": "First"}\n\n{"title": "Second", "priority": 2}\n',
    "json-array": '[{"title": "First"},\n {"title": "Second"}]',
    "issues": '[{"number": 7, "title": "First", "body": "text"}, {"number": 9, "title": "Second", "body": null}]',
    "plain": "# a comment\nFirst\n\n  Second  \n",
    "windows": "- [ ] First\r\n- [x] Done\r\n- [ ] Second\r\n",
    "byte-order-mark": "\ufeffFirst\nSecond\n",
    "own-ids": '{"id": "one", "title": "First"}\n{"id": "two", "title": "Second", "after": ["one"]}\n',
}


@pytest.fixture(params=FORMATS)
def task_file(request, sandbox) -> Path:
    path = sandbox.work / f"{request.param}.txt"
    path.write_text(FORMATS[request.param], encoding="utf-8", newline="")
    return path


def test_add_f_adds_what_the_file_lists(farm, task_file):
    farm.ok("add", "-f", str(task_file))
    assert [task["title"] for task in farm.json("tasks")] == ["First", "Second"]


def test_add_f_twice_adds_nothing_twice(farm, task_file):
    farm.ok("add", "-f", str(task_file))
    before = farm.json("tasks")
    farm.ok("add", "-f", str(task_file))
    assert farm.json("tasks") == before


def test_add_f_reads_standard_input(farm):
    assert farm.ok("add", "-f", "-", input="First\nSecond\n").split() == ["t-0001", "t-0002"]


def test_add_f_again_does_not_bring_back_what_is_canceled(farm, sandbox):
    (sandbox.work / "t").write_text("First\n")
    farm.ok("add", "-f", str(sandbox.work / "t"))
    farm.ok("cancel", "t-0001")
    farm.ok("add", "-f", str(sandbox.work / "t"))
    assert [task["state"] for task in farm.json("tasks")] == ["canceled"]


def test_add_f_again_does_not_bring_back_what_has_landed(farm, sandbox):
    (sandbox.work / "t").write_text("First\n")
    farm.ok("add", "-f", str(sandbox.work / "t"))
    farm.submit(A, {"a.txt": "a"})
    farm.ok("merge")
    farm.ok("add", "-f", str(sandbox.work / "t"))
    assert [task["state"] for task in farm.json("tasks")] == ["landed"]


def test_add_f_again_adds_the_line_that_is_new(farm, sandbox):
    path = sandbox.work / "t"
    path.write_text("First\n")
    farm.ok("add", "-f", str(path))
    path.write_text("Zeroth\nFirst\n")
    farm.ok("add", "-f", str(path))
    assert [task["title"] for task in farm.json("tasks")] == ["First", "Zeroth"]


def test_text_below_a_checkbox_is_its_prompt(farm):
    farm.ok("add", "-f", "-", input="- [ ] First\n  do this\n\n  and that\n- [ ] Second\n")
    assert farm.claim(A)["task"]["prompt"] == "do this\n\nand that"


def test_a_checkbox_comes_after_the_deeper_ones_below_it(farm):
    farm.ok("add", "-f", "-", input="- [ ] Whole\n  - [ ] Part\n")
    assert farm.claim(A)["task"]["title"] == "Part"


def test_text_after_the_list_belongs_to_no_task(farm):
    farm.ok("add", "-f", "-", input="- [ ] First\n\nA closing remark.\n")
    assert "prompt" not in farm.claim(A)["task"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"title": "First"}\n{"title": \n', "line 2"),
        ('{"title": "First"}\n{"prompt": "no title"}\n', "line 2"),
        ('{"title": "First"}\n{"title": "x", "priority": "high"}\n', "priority"),
        ('{"title": "First"}\n{"title": "x", "after": "t-1"}\n', "after"),
        ('{"title": "First"}\n{"title": "x", "after": [3]}\n', "after"),
        ('{"title": "First"}\n{"title": "x", "paths": [3]}\n', "paths"),
        ('{"title": "First"}\n{"title": "x", "after": ["#7"]}\n', "#7"),
        ('{"title": "First"}\n{"title": "x", "after": ["#1"]}\n', "#1"),
        ('{"title": "First"}\n{"title": "x", "after": ["nothing"]}\n', "nothing"),
        ('{"title": "First"}\n{"title": "x", "id": "a/b"}\n', "a/b"),
        ('[{"title": "First"}, 7]', "item 2"),
        ('[{"title": "First"}, \n]', "line"),
        ('{"title": "First", "id": "x"}\n{"title": "Second", "id": "x"}\n', "x"),
    ],
)
def test_add_f_names_what_is_wrong_and_where(farm, text, where):
    assert where in farm.refused(2, "add", "-f", "-", input=text)


def test_add_f_adds_all_or_nothing(farm):
    farm.refused(2, "add", "-f", "-", input='{"title": "First"}\n{"title": \n')
    assert farm.json("tasks") == []


def test_add_f_of_a_file_that_is_not_there_says_so(farm):
    assert "no/such.md" in farm.refused(3, "add", "-f", "no/such.md")


def test_add_f_of_a_folder_says_so(farm):
    done = farm("add", "-f", str(farm.repo))
    assert_is_error(done, done.returncode)
    assert done.returncode in (1, 2, 3)


def test_add_f_of_bytes_that_are_no_text_is_a_usage_error(farm, sandbox):
    (sandbox.work / "t").write_bytes(b"First\n\xff\xfe\n")
    farm.refused(2, "add", "-f", str(sandbox.work / "t"))


def test_add_f_refuses_a_title_beside_the_file(farm, task_file):
    farm.refused(2, "add", "A title", "-f", str(task_file))


# ---------------------------------------------------------------------------------------------- add


CHECKLIST = """\
# Plan

1. [ ] Whole
   what it is for

       indented = "code"
   - [ ] Part one
     about part one
     - [ ] Detail
   - [x] Part two, done
     this belongs to nobody
   ```
   - [ ] not a task, but an example
   ```
   more of the whole
- [ ] Alone
"""


def added(farm, text: str) -> dict[str, dict]:
    farm.ok("add", "-f", "-", input=text)
    records = json.loads((farm.folder / "task_queue" / "pending.json").read_text())["tasks"]
    return {record["title"]: record for record in records}


def test_sub_items_come_first_and_texts_keep_to_their_items(farm):
    tasks = added(farm, CHECKLIST)
    assert list(tasks) == ["Whole", "Part one", "Detail", "Alone"]
    ids = {title: task["id"] for title, task in tasks.items()}
    after = {title: task.get("after", []) for title, task in tasks.items()}
    assert after == {"Whole": [ids["Part one"]], "Part one": [ids["Detail"]], "Detail": [], "Alone": []}
    assert tasks["Part one"]["prompt"] == "about part one"
    assert tasks["Whole"]["prompt"] == (
        'what it is for\n\n    indented = "code"\n```\n- [ ] not a task, but an example\n```\nmore of the whole')


ISSUES = [
    {"body": "It fails.\r\n\r\n- [ ] a box of the issue's own\r\n", "labels": [{"id": "L", "name": "bug", "color": "f00"}],
     "number": 12, "title": "Fix the \"login\" test", "url": "https://github.com/o/r/issues/12"},
    {"body": "", "labels": [], "number": 7, "title": "[ui] Say hello", "url": "https://github.com/o/r/issues/7"},
]


@pytest.mark.parametrize("form", ["one line", "pretty", "an object a line", "pretty objects"])
def test_issues_of_gh_are_taken_as_they_are(farm, form):
    text = {"one line": json.dumps(ISSUES), "pretty": json.dumps(ISSUES, indent=2),
            "an object a line": "\n".join(map(json.dumps, ISSUES)),
            "pretty objects": "\n".join(json.dumps(issue, indent=2) for issue in ISSUES)}[form]
    tasks = added(farm, text)
    assert list(tasks) == ['Fix the "login" test', "[ui] Say hello"]
    assert tasks['Fix the "login" test']["prompt"] == "It fails.\n\n- [ ] a box of the issue's own\n"
    assert (tasks["[ui] Say hello"]["source"], tasks["[ui] Say hello"]["url"]) == ("issue 7", "https://github.com/o/r/issues/7")
    changed = [{**ISSUES[0], "title": "Fix it"}, ISSUES[1]]
    farm.ok("add", "-f", "-", input=json.dumps(changed))
    assert len(farm.json("tasks")) == 2


def test_plain_lines_may_begin_with_a_bracket(farm):
    assert list(added(farm, "[ui] first\n[db] second\n")) == ["[ui] first", "[db] second"]


NEARLY = ["- [] no space", "-[ ] no space", "- [ ]no space", "- [ ]", "* [?] what", "  - [  ] two", "1. []x"]


@pytest.mark.parametrize("line", NEARLY)
def test_a_line_that_is_nearly_a_task_names_itself_and_adds_nothing(farm, line):
    said = farm.refused(2, "add", "-f", "-", input=f"- [ ] good\n\n{line}\n- [ ] good too\n")
    assert "-, line 3: " in said and "nothing was added" in said
    assert farm.json("tasks") == []


@pytest.mark.parametrize("line", ["- [link](https://example.org)", "- [1] a note", "- plain", "[ ] no bullet"])
def test_other_lines_of_a_list_are_no_mistake(farm, line):
    assert list(added(farm, f"- [ ] good\n\n{line}\n")) == ["good"]


@pytest.mark.parametrize(("text", "where"), [('{"title": "a"}\n{"title": \n{"title": "b"}\n', "line 2"),
                                             ('[\n {"title": "a"},\n {"title": }\n]', "line 3"),
                                             ('{\n "title": "a"\n}\n{\n "titel": "b"\n}', "item 2")])
def test_a_bad_line_of_json_names_itself_and_adds_nothing(farm, text, where):
    assert where in farm.refused(2, "add", "-f", "-", input=text)
    assert farm.json("tasks") == []

"""Task files that lm-eval would stumble over."""

import os

import pytest

from shardprune.errors import InputError
from shardprune.evaluation.tasks import load_tasks
from shardprune.recipes.evaluate import TaskFields


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("task: 5", "task is 5; use a name or a list of names"),
        ("task:", "task is None; use a name or a list of names"),
        ("group: 5\ntask: [first]", "group is 5; use a name or a list of names"),
        ("group: mine\ntask: 5", "task is 5; use a name or a list of names"),
        ("task: mine\ntag: [a, 1]", r"tag is \['a', 1\]; use a name or a list of names"),
        ("task: mine\nx: 2020-13-45", "month must be in 1..12"),
        ("task: mine\nx: " + "[" * 3000, "is not YAML: it is nested deeper than 32"),
        ("task: mine\ninclude: pipe", "'.*/pipe' is no file"),
        ("task: mine\ninclude: [5]", "unsupported operand"),
        (None, "'.*/task.yaml' is no file"),
    ],
    ids=range(10),
)
def test_files_that_cannot_be_read(tmp_path, content, reason):
    os.mkfifo(tmp_path / "pipe")
    if content is None:
        os.mkfifo(tmp_path / "task.yaml")
    else:
        (tmp_path / "task.yaml").write_text(content)
    recipe = TaskFields.checked({"tasks": "mine", "tasks_dir": str(tmp_path)})
    with pytest.raises(InputError, match=f"^tasks_dir: '{tmp_path}/task.yaml' cannot be read by lm-eval: {reason}"):
        load_tasks(recipe)


def test_tasks_are_names():
    with pytest.raises(InputError, match="^tasks: 5 is not allowed; use a valid tuple$"):
        TaskFields.checked({"tasks": 5})
    with pytest.raises(InputError, match="^tasks: 5 is not allowed; use a valid string$"):
        TaskFields.checked({"tasks": ["first", 5]})

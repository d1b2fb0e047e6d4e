"""Code in the tasks of a directory is run only where that is allowed."""

import lm_eval.utils
import pytest

from shardprune import EvaluateRecipe
from shardprune.errors import InputError
from shardprune.evaluation.tasks import evaluate_tasks, load_tasks
from shardprune.recipes.evaluate import TaskFields
from tests.evaluation.material import make_readable, sharded, write_task

ESCAPE = "{{ cycler.__init__.__globals__.os.system('touch RAN') }}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A directory of tasks that is the current one; what is run there leaves a file RAN."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(folder, name="task", **fields):
    return TaskFields.checked({"tasks": name, "tasks_dir": str(folder), **fields})


def changed(folder, old, new):
    file = folder / "task.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def with_function(folder, name):
    write_task(folder, "task")
    (folder / "own.py").write_text("open('RAN', 'w').close()\ndef text(document):\n    return ''\n")
    changed(folder, "doc_to_text: ''", f"doc_to_text: !function {name}")


@pytest.mark.parametrize("name", ["own.text", "os.path.basename"])
def test_functions_are_run_only_where_that_is_allowed(here, name):
    with_function(here, name)
    said = (
        f"tasks_dir: a task in '{here}' names the Python function '{name}', which is not run; --allow-task-code runs it"
    )
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        load_tasks(asked(here))
    assert not (here / "RAN").exists()


def test_functions_of_a_trusted_directory_are_run(here):
    with_function(here, "own.text")
    (task,) = load_tasks(asked(here, allow_task_code=True))
    assert (here / "RAN").exists()
    assert task.doc_to_text({"good": "a"}) == ""


def test_a_function_of_an_included_file_is_none_of_lm_eval_s(here):
    with_function(here, "own.text")
    (here / "task.yaml").rename(here / "base.txt")
    (here / "other.yaml").write_text("include: base.txt\ntask: other\n")
    with pytest.raises(InputError, match="names the Python function 'own.text', which is not run"):
        load_tasks(asked(here, "other"))
    assert not (here / "RAN").exists()


@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_target", "doc_to_choice"])
def test_templates_do_not_leave_the_sandbox(here, field):
    write_task(here, "task", **{field: ESCAPE})
    own = lm_eval.utils.env
    with pytest.raises(InputError, match="tasks: a template of a task leaves Jinja's sandbox: .*--allow-task-code"):
        evaluate_tasks(sharded(make_readable(here / "model")), load_tasks(asked(here)), asked(here))
    assert not (here / "RAN").exists()
    assert lm_eval.utils.env is own


def test_templates_of_a_trusted_directory_do_what_they_like(here):
    write_task(here, "task", doc_to_text=ESCAPE)
    (task,) = load_tasks(asked(here, allow_task_code=True))
    assert task.doc_to_text(next(iter(task.test_docs()))) == 0
    assert (here / "RAN").exists()


def test_filters_and_methods_of_templates_work_in_the_sandbox(here):
    write_task(here, "task", doc_to_text="{{ good.split()[0] | upper }} {{ good | regex_replace('[a-z]+', '') }}")
    (task,) = load_tasks(asked(here))
    results = evaluate_tasks(sharded(make_readable(here / "model")), [task], asked(here))
    assert results["task"].samples == 6


@pytest.mark.parametrize("metric", [{"metric": "./own.py"}, {"metric": "acc", "hf_evaluate": True}])
def test_metrics_are_those_of_lm_eval(here, metric):
    (here / "own.py").write_text("open('RAN', 'w').close()\n")
    write_task(here, "task", metric_list=[metric])
    with pytest.raises(InputError, match="tasks_dir: metric '.*' is none of lm-eval's but a script of the hub"):
        load_tasks(asked(here))
    assert not (here / "RAN").exists()


def test_allowing_code_needs_a_directory():
    with pytest.raises(InputError, match="allow_task_code: True has no effect without tasks_dir"):
        EvaluateRecipe.checked({"model": "m", "tasks": "piqa", "allow_task_code": True})

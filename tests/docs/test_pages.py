"""The commands and the Python of README and docs/*.md run as they stand, in the order of their page.

A block that is indented, or fenced as `console` or `python`, runs; one behind `<!-- not run: why -->` does not, and
test_commands.py reads its commands. A model, or an output of a run, that a page names without having made it is a tiny
model that was pruned to half its weights, or a mixture of experts. Recipes have the sizes of SMALL, and data sets
twelve rows, whatever a page says: what is wrong in an option, field, value, file, order, output or Python is found, and
numbers of real models and names of the hub are not.
"""

import io
import json
import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import datasets
import pytest

from shardprune.cli import main
from shardprune.evaluation.tasks import SETS
from shardprune.recipes.settings import Settings
from shardprune.storage import stdlib
from tests.docs.pages import PAGES, ROOT, Page
from tests.evaluation.material import write_task
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.running import run as prune
from tests.support.tiny import GROUPED, make_model, make_tokens
from tests.support.words import WORDS, words_tokenizer

# test_extending.py runs extending.md on a copy of the package; reference.md has the examples of the help.
ELSEWHERE = ("extending.md", "reference.md")
SLOW = ("70b-one-node.md", "coming-from.md", "experts.md", "planning.md")
TEXT = " ".join(WORDS[3:] * 10)
ROW = {"text": TEXT, "sentence": TEXT, "instruction": "one two", "input": "", "output": "three four five"}
SMALL = {"backend": "local", "device": "cpu", "threads": 1, "report": False, "samples": 8, "seqlen": 24}
LONG = {"max_position_embeddings": 4096}
SMALL |= {"eval_windows": 2, "windows": 2, "steps": 1, "batch": 4, "workers": 1}
LEFT_TO_THE_COMMAND = {"address", "wave", "micro_batch", "epochs"}
NAME = r"(?<![\w./-])(?P<name>runs/[\w-]+|remote/[\w/-]+|OUT\b)"  # of an output
OUTPUT = re.compile(rf"(?P<made>--out |--to |--file |\bout=\"|\"out\": \")?{NAME}")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a model of which half is zeros, and the tasks of the papers with two documents each."""
    folder = tmp_path_factory.mktemp("pages")
    name, values = GROUPED["llama-3.1"]
    make_model(folder / "model", "llama", configs={"llama": (name, {**values, **LONG})})
    words_tokenizer().save_pretrained(folder / "model")
    make_architecture(folder / "mixture", "qwen3_moe", {**MIXTURES["qwen3_moe"], "num_experts": 32, **LONG})
    words_tokenizer().save_pretrained(folder / "mixture")
    make_tokens(folder / "tokens.npy")
    prune(folder, "pruned", sparsity=0.5)
    for task in SETS["zeroshot"]:
        write_task(folder / "tasks", task, documents=2)
    return folder


@pytest.fixture(autouse=True)
def place(tiny, tmp_path, monkeypatch) -> None:
    """The working directory of a page, with the repository's files, in which recipes become small once checked."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("build", "runs"):
            (tmp_path / entry.name).symlink_to(entry)
    construct, load_dataset = Settings.__init__, datasets.load_dataset

    def construct_small(self, **values):
        construct(self, **values)
        for name in {"model", "sparse", "teacher"} & values.keys():
            if values[name] and not re.match(rf"/|{NAME}", values[name]):  # of earlier runs
                provide(values[name], tiny)
        if getattr(self, "command", "pipeline") == "pipeline":  # whose steps are small
            return
        small = {name: value for name, value in SMALL.items() if name in type(self).model_fields}
        small |= {"shards": min(values["shards"], 4)} if values.get("shards") else {}
        small |= {"path": values["path"][:2]} if values.get("path") else {}
        small |= {"tasks_dir": str(tiny / "tasks")} if values.get("tasks") else {}
        if self.command == "evaluate" and not self.perplexity:
            del small["seqlen"], small["windows"]
        construct(self, **{name: values[name] for name in values.keys() - LEFT_TO_THE_COMMAND} | small)

    def load_row(path, *arguments, **options):
        return load_dataset(path, *arguments, **options) if path == "json" else datasets.Dataset.from_list([ROW] * 12)

    monkeypatch.setattr(Settings, "__init__", construct_small)
    monkeypatch.setattr(datasets, "load_dataset", load_row)
    monkeypatch.setattr(stdlib, "documents", lambda split: [TEXT] * 12)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


def provide(name: str, tiny: Path) -> None:
    """Put a tiny model where a page names one; where the name says so (Qwen3-30B-A3B), it has experts."""
    if not Path(name).exists():
        shutil.copytree(tiny / ("mixture" if re.search(r"-A\d+B", name) else "pruned"), name)


def follow(page: Page, tiny: Path) -> None:
    """Run a page from top to bottom; the first thing that is wrong on it ends the test with its line."""
    names = {"__name__": "__main__"}
    for block in page.blocks:
        if block.language == "yaml" and block.runs:  # a command may stand before its recipe
            file = Path(block.file or "RECIPE.yaml")
            # Folders of the repository are links here.
            assert file.resolve().is_relative_to(Path().resolve()), f"{page.name}:{block.line}: writes to {file}"
            file.write_text(block.text)
    for block in page.blocks:
        place = f"{page.name}:{block.line}"
        assert block.language, f"{place}: a fence without a language; use text for what is none"
        if block.language == "json":
            [json.loads(value) for value in re.split(r"\n(?={)", block.text)]
        elif block.language == "python" and block.runs:
            read_what_is_made(block.text, tiny)
            with redirect_stdout(io.StringIO()):
                exec(compile("\n" * (block.line - 1) + block.text, page.name, "exec"), names)
        elif block.runs:
            for line, words, shown in block.commands():
                run(f"{page.name}:{line}", [word.replace("s3://", "remote/") for word in words], shown, tiny)


def read_what_is_made(text: str, tiny: Path) -> None:
    """Put the outputs that a command or a program reads where they are, unless the page has made them there."""
    found = list(OUTPUT.finditer(text))
    for name in {output["name"] for output in found} - {output["name"] for output in found if output["made"]}:
        provide(name, tiny)


def run(place: str, words: list[str], shown: str, tiny: Path) -> None:
    """Run a command of shardprune, and compare what it prints with what is shown under it."""
    assert words[0] == "shardprune", f"{place}: {words[0]} cannot run; put <!-- not run: why --> before the block"
    read_what_is_made(" ".join(words), tiny)
    if "--out OUT " in " ".join([*words, ""]):
        shutil.rmtree("OUT", ignore_errors=True)  # which stands for another directory each time
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as end:
        main(words[1:])
    assert end.value.code == 0, f"{place}: exit code {end.value.code}: {said.getvalue().strip()}"
    for part in re.split(r"^\s*\.\.\.\s*$", shown, flags=re.MULTILINE):
        assert "".join(part.split()) in "".join(said.getvalue().split()), f"{place}: prints else:\n{said.getvalue()}"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.long] * (path.name in SLOW))
        for path in PAGES
        if path.name not in ELSEWHERE
    ],
    ids=lambda path: path.name,
)
def test_what_a_page_shows_runs(path, tiny):
    follow(Page.read(path), tiny)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Text.\n\n    shardprune prune MODEL \\\n      --out OUT --sparsity 1.5", "wrong.md:3: .*1.5 is not allowed"),
        ("    shardprnue prune MODEL --out OUT", "wrong.md:1: shardprnue cannot run"),
        ("```yaml\nalocation: owl\n```\n\n    shardprune prune MODEL --out OUT --recipe RECIPE.yaml", "no field"),
        ("```console\n$ shardprune prune --help\n...\nno such line\n```", "wrong.md:2: prints else"),
        ("```python\nraise AssertionError('here')\n```", "here"),
        ("```\ntext\n```", "wrong.md:2: a fence without a language"),
    ],
)
def test_what_is_wrong_on_a_page_is_found(text, found, tiny):
    with pytest.raises(AssertionError, match=re.compile(found, re.DOTALL)):
        follow(Page("wrong.md", text), tiny)

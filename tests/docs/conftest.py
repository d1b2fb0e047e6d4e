"""Where pages run: a folder in which every name on a page stands for something tiny."""

import os
import re
import shutil
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import datasets
import pytest

from shardprune import Recipe, prune
from shardprune.evaluation.tasks import SETS
from shardprune.recipes.settings import Settings
from shardprune.report.progress import Reporter
from shardprune.storage import stdlib
from tests.docs.pages import ROOT
from tests.evaluation.material import write_task
from tests.support.tiny import GROUPED, make_model, make_tokens
from tests.support.words import WORDS, words_tokenizer

# Fields of a recipe that are smaller here, and those that are left to the command.
SMALL = {
    **{"backend": "local", "device": "cpu", "threads": 1, "report": False, "samples": 8, "seqlen": 24},
    **{"eval_windows": 2, "windows": 2, "steps": 1, "batch": 4, "workers": 1},
}
DROPPED = ("address", "wave", "micro_batch", "epochs")
LAYERS = 4
OUTPUTS = re.compile(
    r"(?<![\w/.-])(?:runs/|remote/|OUT\b)[\w./-]*"
)  # of runs, which a page may name before it makes them
TEXT = " ".join(WORDS[3:] * 10)
# The data sets that are loaded by a short name: name and configuration on the hub, and a row.
HUB = {
    ("allenai/c4", None): {"text": TEXT},
    ("Salesforce/wikitext", "wikitext-2-raw-v1"): {"text": TEXT},
    ("ptb-text-only/ptb_text_only", "penn_treebank"): {"sentence": TEXT},
    ("yahma/alpaca-cleaned", None): {"instruction": "one two", "input": "", "output": "three four five"},
}


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A dense model, the same pruned, and the tasks of the papers with two documents each."""
    folder = tmp_path_factory.mktemp("pages")
    words_tokenizer().save_pretrained(folder / "dense")
    name, values = GROUPED["llama-3.1"]
    tiny = {"llama": (name, {**values, "num_hidden_layers": LAYERS, "max_position_embeddings": 4096})}
    make_model(folder / "dense", "llama", configs=tiny)
    tokens = make_tokens(folder / "tokens.npy", samples=8)
    fields = {"model": str(folder / "dense"), "out": str(folder / "pruned"), "sparsity": 0.5, "calibration": tokens}
    fields |= {name: value for name, value in SMALL.items() if name in Recipe.model_fields}
    prune(Recipe.checked(fields), Reporter(quiet=True))
    for task in SETS["zeroshot"]:
        write_task(folder / "tasks", task, documents=2)
    return folder


def provide(name: str, source: Path) -> None:
    """Put a model where a page's command reads one, unless the page has made one there."""
    if not Path(name).exists():
        shutil.copytree(source, name)


@pytest.fixture
def folder(material, tmp_path, monkeypatch) -> Path:
    """The working directory of a page: the repository's files, and recipes that become small once they are checked."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("build", "runs"):
            (tmp_path / entry.name).symlink_to(entry)
    construct, load = Settings.__init__, datasets.load_dataset

    def construct_small(self, **values):
        construct(self, **values)
        command = getattr(self, "command", None)
        for name in ("model", "sparse", "teacher"):
            if (model := getattr(self, name, None)) and not OUTPUTS.match(model) and not Path(model).is_absolute():
                provide(model, material / ("pruned" if name == "sparse" or command == "recover" else "dense"))
        small = {name: value for name, value in SMALL.items() if name in type(self).model_fields}
        if getattr(self, "shards", None):
            small["shards"] = min(self.shards, LAYERS)
        if getattr(self, "path", None):
            small["path"] = self.path[:2]
        if getattr(self, "tasks", None):
            small["tasks_dir"] = str(material / "tasks")
        if command == "evaluate" and not self.perplexity:
            del small["seqlen"], small["windows"]
        if command not in (None, "pipeline"):  # whose steps are small
            construct(self, **{name: value for name, value in values.items() if name not in DROPPED} | small)

    def load_dataset(path, name=None, **options):
        row = HUB.get((path, name))
        return datasets.Dataset.from_list([row] * 12) if row else load(path, name, **options)

    monkeypatch.setattr(Settings, "__init__", construct_small)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(stdlib, "documents", lambda split: [TEXT] * 12)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path

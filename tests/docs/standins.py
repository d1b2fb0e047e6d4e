"""What stands in for the models, data and sizes of the pages: the one table of substitutions.

A page's commands run in a directory of their own in which a tiny model lies under the hub name of the real one, and
small data sets under those of the papers' (`datasets` and `shardprune` both take a directory of that name first). So
the words of a command stay what they are; only sizes are made smaller, by the options of SMALL at its end.

A new page needs a line here if it
- names a model of the hub that is not in HUB, a data set of the hub (`Material._hub`), or another of the PLACES,
- calls a recipe that it does not show by a name that RECIPES does not match, or
- uses an option that must be smaller in a test (SMALL), or that must not be used (DROPPED).
"""

import gzip
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import yaml

from shardprune import Recipe, RecoverRecipe, prune
from shardprune.evaluation.tasks import SETS
from shardprune.recipes.pipeline import PipelineRecipe
from shardprune.recipes.settings import Settings
from shardprune.report.progress import Reporter
from shardprune.storage.sources import split_jsonl
from tests.evaluation.material import write_task
from tests.support.tiny import CONFIGS, GROUPED, VOCABULARY, make_llava, make_model
from tests.support.words import WORDS, words_tokenizer

ROOT = Path(__file__).resolve().parents[2]

# -- models: the first pattern that a name contains, in lower case; any other name is a Llama's --------------------
FAMILIES = {
    "llava": "llava",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma2",
    "phi": "phi3",
    "opt-350m": "opt-350m",
    "opt": "opt",
    "": "llama-3.1",
}
HUB = {  # the hub names that pages use, so that a mistyped one is found
    "huggyllama/llama-7b",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "meta-llama/Meta-Llama-3-8B",
}
POSITIONS = 4096
LAYERS = {"70b": 8, "405b": 8, "": 6}  # by what a name contains: ZeRO-3 takes its time for every layer
PRUNED = re.compile(r"SPARSE|OUT\w*|.*(^|/)(runs|pruned|out)(/.*|$)|.*-(50|60|70|2of4|owl|pruned)\b.*")  # not dense
CONFIG_OF = {  # what `plan` reads: the real ones
    "meta-llama/Llama-3.1-8B": "ray_configs/models/llama-3.1-8b/config.json",
    "meta-llama/Llama-3.1-70B": "ray_configs/models/llama-3.1-70b/config.json",
    "meta-llama/Llama-3.1-405B": "ray_configs/models/llama-3.1-405b/config.json",
}

# -- words of a page that mean something else here ----------------------------------------------------------------
PLACES = ("shared", "data", "scratch", "lustre", "path")  # first parts of absolute paths: below the page's directory
SOURCES = {"stdlib": "stdlib.txt"}  # which takes seconds to be tokenised
SCHEMES = {"gs://": "memory://gs/", "hf://": ""}
KEPT = re.compile(r"AWS_\w+|GOOGLE_\w+|HF_\w+|PATH|RAY_(ADDRESS|AUTH_\w+)|CUDA_\w+|SLURM_\w+")  # never exported
PLACEHOLDER = re.compile(r"(OUT|DIR)\w*$")  # another directory each time that it is written

COLUMNS = ("text", "content", "good", "bad", "sentence_good", "sentence_bad")  # of a FILE.jsonl, beside instructions

# -- sizes --------------------------------------------------------------------------------------------------------
LOCAL = {"backend": "local", "device": "cpu", "threads": 1, "report": False}
CALIBRATED = {"samples": 8, "seqlen": 24, "eval_windows": 2, **LOCAL}
SMALL: dict[str, dict[str, Any]] = {
    "prune": CALIBRATED,
    "rebuild": CALIBRATED,
    "mop": CALIBRATED,
    "recover": {"steps": 2, "batch": 4, "workers": 1, "seqlen": 24, "eval_windows": 2, **LOCAL},
    "evaluate": LOCAL,
    "pipeline": LOCAL,
}
MEASURED = {"seqlen": 24, "windows": 2}  # of `evaluate`, where it measures perplexity
DROPPED = ("--address", "--micro-batch", "--wave", "--epochs")  # with their values

# -- recipes ------------------------------------------------------------------------------------------------------
RECIPES = re.compile(r"RECIPE(\.yaml)?|r(ecipe)?\.yaml")
RECIPE_OF: dict[str, dict[str, Any]] = {
    "prune": {"model": "MODEL", "out": "OUT", "sparsity": 0.5, "calibration": "c4"},
    "mop": {"model": "MODEL", "remove": 0.2, "calibration": "c4"},
    "rebuild": {"model": "DENSE", "sparse": "SPARSE", "calibration": "c4"},
    "recover": {"model": "MODEL", "data": "alpaca"},
    "evaluate": {"perplexity": ["wikitext2"]},
    "plan": {"sparsity": 0.5},
    "pipeline": {
        "model": "MODEL",
        "prune": {"sparsity": 0.5, "calibration": "c4"},
        "recover": {"data": "alpaca", "keep_sparsity": True},
        "evaluate": {"perplexity": "wikitext2"},
    },
}
MODEL_FIELDS, SOURCE_FIELDS = ("model", "sparse", "teacher"), ("calibration", "eval", "perplexity", "data")


def small_of(command: str, settings: Settings) -> dict[str, Any]:
    """The fields that make a command small."""
    small = dict(SMALL.get(command, {}))
    if (getattr(settings, "shards", None) or 1) > max(LAYERS.values()):
        small["shards"] = max(LAYERS.values())
    if getattr(settings, "perplexity", ()):
        small |= MEASURED
    if getattr(settings, "tasks", ()) and not settings.tasks_dir:  # type: ignore[attr-defined]
        small["tasks_dir"] = "lm-eval-tasks"
    return small


def made_small(command: str, values: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The fields of a recipe, made small."""
    dropped = {option.removeprefix("--").replace("-", "_") for option in DROPPED}
    kept = {name: value for name, value in values.items() if name not in dropped}
    return kept | small_of(command, settings)


def small_pipeline(recipe: PipelineRecipe, values: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's recipe with small steps."""
    small = dict(values)
    for step in recipe.steps:
        section = made_small(step, values[step], recipe.section(step))
        if step == "mop" and "path" in section:
            section["path"] = section["path"][:3]
        small[step] = section
    return small


class Material:
    """Models, made once; and what is put where a page's commands look for something."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
        self._outputs = set(re.findall(r"\bout(?:[ =]|: )\"?([\w./:-]+)", "".join(page.read_text() for page in pages)))
        self._draw = random.Random(0)
        self._hub()

    # -- models ---------------------------------------------------------------------------------------------------

    def model(self, name: str, pruned: bool = False) -> Path:
        """The tiny model that stands in for the one of a name; pruned if the name says so, too."""
        family = next(family for part, family in FAMILIES.items() if part in name.lower())
        layers = next(LAYERS[part] for part in LAYERS if part in name.lower())
        dense = self.folder / "models" / f"{family}-{layers}"
        if not dense.exists():
            words_tokenizer().save_pretrained(dense)
            if family == "llava":
                make_llava(dense)
            else:
                make_model(dense, family, configs=_with_layers(family, layers))
        if not pruned and not PRUNED.match(name):
            return dense
        sparse = self.folder / "pruned" / dense.name
        if not sparse.exists():
            tokens = self.file("tokens.npy")
            fields = {"sparsity": 0.5, "calibration": str(tokens), "eval": str(tokens), **CALIBRATED}
            prune(Recipe.checked({"model": str(dense), "out": str(sparse), **fields}), Reporter(quiet=True))
        return sparse

    def provide_model(self, name: str, pruned: bool = False) -> None:
        """Put a model where a command looks for it, unless something is there that the page means by its name."""
        if "://" in name:
            files, path = fsspec.url_to_fs(name)
            if not files.exists(f"{path}/config.json"):
                source = self.model(name, pruned)
                for file in source.iterdir():
                    if file.is_file():
                        files.pipe(f"{path}/{file.name}", file.read_bytes())
            return
        if name == "MODEL":
            shutil.rmtree(name, ignore_errors=True)  # a pruned one for some commands, a dense one for others
        if not Path(name).exists():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.model(name, pruned), name)

    def _check_known(self, name: str) -> None:
        """Check that a model is one that a page makes, or one of the hub.

        Raises:
            LookupError: it is neither.
        """
        if "://" in name or Path(name).exists():
            return
        if (made := re.search(r"(^|/)(runs/.*)", name)) and not any(out.endswith(made[2]) for out in self._outputs):
            raise LookupError(f"no page makes {made[2]!r}")
        if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not made and name not in HUB:
            raise LookupError(f"{name!r} is not in HUB of tests/docs/standins.py")

    # -- text -----------------------------------------------------------------------------------------------------

    def text(self, words: int = 60) -> str:
        return " ".join(self._draw.choices(WORDS[3:], k=words))

    def file(self, name: str) -> Path:
        """A file of data of the form that its name says."""
        path = self.folder / "files" / Path(name).name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            _WRITERS[path.suffix](self, path)
        return path

    def provide_source(self, source: str) -> None:
        """Put a file of text, tokens or instructions where a command looks for it, unless something is there."""
        url = (split_jsonl(source) or (source,))[0]
        if url.startswith("hf:") or Path(url).suffix not in _WRITERS:
            return  # its data set lies there already
        if "://" in url:
            files, path = fsspec.url_to_fs(url)
            if not files.exists(path):
                files.pipe(path, self.file(url).read_bytes())
        elif not Path(url).exists():
            Path(url).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.file(url), url)

    def _hub(self) -> None:
        """The papers' data sets, with the names, columns and files that they have on the hub."""
        texts = [{"text": self.text()} for _ in range(12)]
        c4 = self.folder / "hub" / "allenai" / "c4" / "en"
        c4.mkdir(parents=True)
        for split in ("train.00000-of-01024", "validation.00000-of-00008"):
            with gzip.open(c4 / f"c4-{split}.json.gz", "wt") as file:
                file.write(_lines(texts))
        self._data_set("Salesforce/wikitext", "wikitext-2-raw-v1", texts)
        self._data_set("ptb-text-only/ptb_text_only", "penn_treebank", [{"sentence": row["text"]} for row in texts])
        self._data_set("yahma/alpaca-cleaned", "default", self.instructions())

    def instructions(self) -> list[dict[str, str]]:
        return [{"instruction": self.text(4), "input": "", "output": self.text(6)} for _ in range(8)]

    def _data_set(self, name: str, config: str, rows: list[dict[str, str]]) -> None:
        folder = self.folder / "hub" / name
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text(_lines(rows))
        (folder / "test.jsonl").write_text(_lines(rows))
        splits = [{"split": split, "path": f"{split}.jsonl"} for split in ("train", "test")]
        described = yaml.safe_dump({"configs": [{"config_name": config, "data_files": splits}]})
        (folder / "README.md").write_text(f"---\n{described}---\n")

    # -- all that a recipe reads ----------------------------------------------------------------------------------

    def provide(self, settings: Settings) -> None:
        """Put models, data and tasks where the settings of a command say that they are."""
        for name in MODEL_FIELDS:
            if value := getattr(settings, name, None):
                self._check_known(value)
                self.provide_model(value, pruned=name == "model" and isinstance(settings, RecoverRecipe))
        for name in SOURCE_FIELDS:
            value = getattr(settings, name, None) or ()
            for source in (value,) if isinstance(value, str) else value:
                self.provide_source(source)
        for name in getattr(settings, "tasks", ()):
            for task in SETS.get(name, (name.replace("*", "one"),)):
                folder = Path(getattr(settings, "tasks_dir", None) or "lm-eval-tasks")
                if not (folder / f"{task}.yaml").exists():
                    write_task(folder.absolute(), task, documents=3)
        if isinstance(settings, PipelineRecipe):
            for step in settings.steps:
                section = settings.section(step)
                made = section.model.startswith(f"{settings.out}/")  # by a step before it
                self.provide(section.model_copy(update={"model": None}) if made else section)

    def furnish(self, folder: Path) -> None:
        """Make a directory one in which the commands of a page can run: the repository's files, and the hub's."""
        for entry in ROOT.iterdir():
            if not entry.name.startswith(".") and entry.name not in ("runs", "shared"):
                (folder / entry.name).symlink_to(entry)
        for owner in (self.folder / "hub").iterdir():
            (folder / owner.name).symlink_to(owner)


def _with_layers(family: str, layers: int) -> dict[str, tuple[str, dict]]:
    """The configs of tiny models, with enough layers for a search and groups of heads that can go."""
    name, values = (GROUPED if family != "opt-350m" else CONFIGS)[family]
    return {family: (name, {**values, "num_hidden_layers": layers, "max_position_embeddings": POSITIONS})}


def _lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _tokens(_: Material, path: Path) -> None:
    np.save(path, np.random.default_rng(0).integers(0, VOCABULARY, (8, 24)))


_WRITERS: dict[str, Callable[[Material, Path], Any]] = {
    ".npy": _tokens,
    ".txt": lambda material, path: path.write_text(material.text(600)),
    ".json": lambda material, path: path.write_text(json.dumps(material.instructions())),
    ".jsonl": lambda material, path: path.write_text(
        _lines([{name: material.text() for name in COLUMNS} | row for row in material.instructions()])
    ),
}

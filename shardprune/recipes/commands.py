"""The table of commands that carry out a recipe.

It feeds the command line, the Slurm jobs, `shardprune pipeline`, the entry files of jobs/, docs/reference.md and
`from shardprune import ...`. It lies beside the recipes, below all of its readers, and names a command's story by its
module: stories import torch, Ray and transformers, which must wait until a recipe is checked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from shardprune.recipes.evaluate import EvaluateRecipe
from shardprune.recipes.experts import ExpertsRecipe
from shardprune.recipes.imports import uncollected
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.pipeline import PipelineRecipe
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe
from shardprune.recipes.recover import RecoverRecipe
from shardprune.recipes.settings import Settings


@dataclass(frozen=True)
class Command:
    """A command: its name, its recipe, the module of its story, and its help.

    Attributes:
        module: the module with a function of the command's name, which takes the recipe.
        panel: the title under which `shardprune --help` lists it.
        help: a summary, and after a blank line more where there is more to say.
        example: words after `shardprune` and the command's name; the line has at most 78 characters.
        file_first: the recipe's file is the first argument instead of `--recipe FILE`.
    """

    name: str
    recipe: type[Settings]
    module: str
    panel: str
    help: str
    example: str
    file_first: bool = False

    @property
    def story(self) -> Callable[..., Any]:
        """The function that carries out a recipe; imported on first use."""
        with uncollected():
            return cast(Callable[..., Any], getattr(import_module(self.module), self.name))

    def words(self, file: str) -> list[str]:
        """Return the command with a recipe's file, as words of a command line."""
        return [self.name, *([] if self.file_first else ["--recipe"]), file]


PRUNE, HEAL = "Prune", "Heal and measure"
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "prune",
            PruneRecipe,
            "shardprune.commands.prune",
            PRUNE,
            "Prune a checkpoint with SparseGPT, Wanda or magnitude.\n\n"
            "The output is an ordinary Hugging Face checkpoint, with result.json beside it.",
            "meta-llama/Llama-3.1-8B --sparsity 0.5 --out runs/half",
        ),
        Command(
            "rebuild",
            RebuildRecipe,
            "shardprune.commands.prune",
            PRUNE,
            "Rebuild the masks of a pruned checkpoint with LLM-Barber.\n\nZeros move; their number stays the same.",
            "meta-llama/Llama-3.1-8B runs/half --out runs/half-rebuilt",
        ),
        Command(
            "mop",
            MopRecipe,
            "shardprune.commands.mop",
            PRUNE,
            "Remove layers and width in turn (MoP).\n\nThe output is an ordinary, smaller checkpoint.",
            "meta-llama/Llama-3.1-8B --remove 0.3 --out runs/mop",
        ),
        Command(
            "experts",
            ExpertsRecipe,
            "shardprune.commands.experts",
            PRUNE,
            "Remove experts of a mixture-of-experts model (REAP and others).\n\n"
            "The output is an ordinary checkpoint with fewer experts in every layer.",
            "Qwen/Qwen3-30B-A3B --remove 0.25 --out runs/experts",
        ),
        Command(
            "recover",
            RecoverRecipe,
            "shardprune.commands.recover",
            HEAL,
            "Fine-tune a pruned checkpoint under DeepSpeed ZeRO.\n\nThe output is an ordinary checkpoint.",
            "runs/half --data alpaca --keep-sparsity --out runs/healed",
        ),
        Command(
            "evaluate",
            EvaluateRecipe,
            "shardprune.commands.evaluate",
            HEAL,
            "Measure perplexity and lm-eval tasks on the shards of a model.\n\n"
            "Results are added to the model's result.json.",
            "runs/half --perplexity wikitext2 --tasks zeroshot",
        ),
        Command(
            "pipeline",
            PipelineRecipe,
            "shardprune.commands.pipeline",
            HEAL,
            "Prune (or mop, or experts), recover and evaluate as one job.\n\n"
            "The job resumes at the step that was interrupted.",
            "jobs/recipes/pipeline-mop-llama-3-8b-30.yaml --out healed",
            file_first=True,
        ),
    )
}
RECIPES = {name: command.recipe for name, command in COMMANDS.items()}


# Names beside these commands, by their modules.
BESIDE = {
    "ExportRecipe": "shardprune.recipes.export",
    "export": "shardprune.commands.export",
    "load_exported": "shardprune.model.exported_model",
    "to_semi_structured": "shardprune.model.semi_structured",
}


def public_places() -> dict[str, str]:
    """Return the modules of the names that `shardprune` offers in Python: every command's recipe and story, and what
    serves their outputs."""
    recipes = {command.recipe.__name__: command.recipe.__module__ for command in COMMANDS.values()}
    return recipes | {command.name: command.module for command in COMMANDS.values()} | BESIDE

"""Options that measurements of pruned models share."""

import argparse
from typing import Any

from shardprune.recipes.demo import bundled_model


def parser_of(document: str | None, samples: int = 32) -> argparse.ArgumentParser:
    """Return the parser of a measurement, by its module's docstring: with the model that is pruned, the texts by which
    it is, and those that are measured."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--eval", default="stdlib")
    parser.add_argument("--eval-windows", type=int)
    return parser


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of a sparse model and of what it is fine-tuned on."""
    parser.add_argument("--sparsity", type=float, default=0.7)
    add_data(parser)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options of what a model is fine-tuned on, of which `training_fields` makes fields of a recipe."""
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)


def training_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a fine-tuning with windows as long as those that are measured."""
    names = ("data", "eval", "eval_windows", "seqlen", "steps", "threads")
    return {name: getattr(options, name) for name in names} | {"length": options.seqlen}

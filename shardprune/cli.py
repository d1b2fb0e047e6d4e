"""The `shardprune` command: options become a recipe, the recipe becomes a run. No logic here."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from shardprune.cluster.signals import EXIT_CODE, stoppable
from shardprune.cluster.slurm.batch import BatchJob
from shardprune.cluster.slurm.commands import COMMANDS, check_fit, command_of, words_of
from shardprune.errors import InputError, SolverError, Stopped, StorageError, TrainingError, WorkerLost
from shardprune.planning.recipe import PlanRecipe
from shardprune.recipes.evaluate import EvaluateRecipe
from shardprune.recipes.help_text import HEAL, LOOK, PLAN, PRUNE, START, HelpfulCommand, HelpfulGroup
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.options import completion, given, with_options
from shardprune.recipes.pipeline import PipelineRecipe
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe
from shardprune.recipes.recover import RecoverRecipe
from shardprune.recipes.settings import Settings

FIRST_STEPS = """First steps:

  shardprune demo                       # a small model, no GPU, no network
  shardprune plan meta-llama/Llama-3.1-8B --gpus 1 --gpu-memory 80GB
  shardprune prune meta-llama/Llama-3.1-8B --out runs/llama-8b-50 \\
    --sparsity 0.5 --calibration c4 --eval wikitext2
  shardprune status runs/llama-8b-50    # while it runs, from anywhere"""

app = typer.Typer(
    cls=HelpfulGroup,
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune large language models on all the GPUs there are.",
    epilog=FIRST_STEPS,
)

# Some versions of typer carry a click of their own; this is the base of whichever they raise.
ClickException: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


@app.callback()
def _commands() -> None:
    pass


def _command(panel: str, *example: str) -> Callable[..., Any]:
    """A command in a panel of the help, with an example of one line or more."""
    lines = " \\\n    ".join(example)
    return app.command(cls=HelpfulCommand, rich_help_panel=panel, epilog=f"Example:\n\n  {lines}")


Model = Annotated[
    str | None, typer.Argument(help="Directory, URL or hub name; may stand in the recipe", show_default=False)
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        help="YAML file with any of the fields below; options override it", metavar="FILE", show_default=False
    ),
]


@_command(
    PRUNE,
    "shardprune prune meta-llama/Llama-3.1-8B --out runs/llama-8b-50",
    "--sparsity 0.5 --calibration c4 --eval wikitext2",
)
@with_options(PruneRecipe)
def prune(
    model: Model = None,
    *,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Prune a checkpoint. The result is an ordinary checkpoint, with result.json beside it."""
    from shardprune.commands.prune import prune as run

    settings = PruneRecipe.load(recipe, given({"model": model, **options}))
    print_result(run(settings), settings)


@_command(
    PRUNE,
    "shardprune rebuild meta-llama/Llama-3.1-8B runs/llama-8b-50",
    "--out runs/llama-8b-50-rebuilt --calibration c4 --eval wikitext2",
)
@with_options(RebuildRecipe)
def rebuild(
    dense: Annotated[
        str | None, typer.Argument(help="The model before it was pruned; `model` in a recipe", show_default=False)
    ] = None,
    sparse: Annotated[str | None, typer.Argument(help="The same model, pruned by any tool", show_default=False)] = None,
    *,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Mend the masks of a pruned checkpoint with LLM-Barber. Zeros only move; their number stays."""
    from shardprune.commands.prune import rebuild as run

    settings = RebuildRecipe.load(recipe, given({"model": dense, "sparse": sparse, **options}))
    print_result(run(settings), settings)


@_command(
    PRUNE,
    "shardprune mop meta-llama/Llama-3.1-8B --out runs/llama-8b-mop",
    "--remove 0.3 --keep 0.2 --calibration c4 --eval wikitext2",
)
@with_options(MopRecipe)
def mop(
    model: Model = None,
    *,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Make a model shallower and narrower in turn (MoP). The result is an ordinary, smaller checkpoint."""
    from shardprune.commands.mop import mop as run

    settings = MopRecipe.load(recipe, given({"model": model, **options}))
    print_result(run(settings), settings)


@_command(
    HEAL,
    "shardprune recover runs/llama-8b-50 --out runs/llama-8b-50-healed",
    "--data alpaca --zero 3 --workers 8 --keep-sparsity",
)
@with_options(RecoverRecipe)
def recover(
    model: Model = None,
    *,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Fine-tune a pruned checkpoint under DeepSpeed ZeRO. The result is an ordinary checkpoint again."""
    from shardprune.commands.recover import recover as run

    settings = RecoverRecipe.load(recipe, given({"model": model, **options}))
    print_result(run(settings), settings)


@_command(
    HEAL,
    "shardprune evaluate runs/llama-8b-50 --perplexity wikitext2",
    "--tasks zeroshot --shards 2",
)
@with_options(EvaluateRecipe)
def evaluate(
    model: Model = None,
    *,
    recipe: RecipeFile = None,
    **options: Any,
) -> None:
    """Measure perplexity and lm-eval tasks over the shards of a model. Results join its result.json."""
    from shardprune.commands.evaluate import evaluate as run

    settings = EvaluateRecipe.load(recipe, given({"model": model, **options}))
    print_result(run(settings), settings)


@_command(
    HEAL,
    "shardprune pipeline jobs/recipes/pipeline-mop-llama-3-8b-30.yaml",
    "--out runs/llama-8b-mop-healed",
)
@with_options(PipelineRecipe)
def pipeline(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, and a section for each step")],
    *,
    model: Annotated[
        str | None,
        typer.Option(help="Directory, URL or hub name; overrides the recipe's", metavar="TEXT", show_default=False),
    ] = None,
    **options: Any,
) -> None:
    """Prune (or mop), recover and evaluate as one job, which resumes at the step that was cut off."""
    from shardprune.commands.pipeline import pipeline as run

    settings = PipelineRecipe.load(recipe, given({"model": model, **options}))
    for result in run(settings).values():
        print_result(result)
    if settings.report:
        print_place_of_report(settings.out)


@_command(LOOK, "shardprune status s3://bucket/llama-70b-50")
def status(
    out: Annotated[str, typer.Argument(help="Directory or URL of the run's result")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each run")] = False,
) -> None:
    """Say where a running or dead run stands and when it will end, from anywhere that sees its output."""
    import time
    from dataclasses import asdict

    from shardprune.report.status import status_of

    for found in status_of(out):
        print(json.dumps(asdict(found)) if as_json else "\n".join(found.lines(time.time())))


@_command(LOOK, "shardprune report --compare runs/llama-8b-50 runs/llama-8b-50-rebuilt")
def report(
    outs: Annotated[list[str], typer.Argument(metavar="OUT", help="Outputs of finished runs or pipelines")],
    *,
    compare: Annotated[
        bool, typer.Option("--compare", help="One page: perplexity against compression and seconds of all of them")
    ] = False,
    file: Annotated[
        str | None, typer.Option(help="File of the comparison (default: comparison.html)", metavar="FILE")
    ] = None,
) -> None:
    """Write OUT/report.html: what a run achieved, as one page that needs no network. Runs do so at their end."""
    from shardprune.report.page.write import write_comparison, write_report

    if file and not compare:
        raise InputError("file", f"{file!r} is for --compare; a report is OUT/report.html")
    places = [write_comparison(outs, file or "comparison.html")] if compare else [write_report(out) for out in outs]
    for place in places:
        print(f"report: {place}")


@_command(
    PLAN,
    "shardprune plan meta-llama/Llama-3.1-70B --nodes 2 --gpus 8",
    "--gpu-memory 80GB --sparsity 0.5",
)
@with_options(PlanRecipe)
def plan(
    model: Annotated[
        str | None, typer.Argument(help="config.json, directory, URL or hub name of a checkpoint", show_default=False)
    ] = None,
    *,
    recipe: RecipeFile = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Simulate it: timeline, idle share, growth")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON")] = False,
    **options: Any,
) -> int:
    """Say what a run will take, and whether it fits: layout, memory, bytes, seconds. No weight is read.

    Exit code 1 where nothing fits."""
    from shardprune.planning.plan import plan as run

    return print_plan(run(PlanRecipe.load(recipe, given({"model": model, **options})), simulate), as_json)


@_command(
    PLAN,
    "shardprune slurm jobs/recipes/owl-sparsegpt-70.yaml --nodes 4",
    "--gpus-per-node 8 --time 4:00:00 --submit",
    "-- /shared/Llama-3.1-70B --out /shared/llama-70b-owl",
)
@with_options(BatchJob)
def slurm(
    recipe: Annotated[Path, typer.Argument(help="YAML file of any command", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model and options of that command, which override the file",
            metavar="-- OVERRIDES",
            show_default=False,
        ),
    ] = None,
    *,
    command: Annotated[
        str | None,
        typer.Option(
            help=f"{' | '.join(COMMANDS)} (default: the one whose fields the recipe has)",
            metavar="NAME",
            autocompletion=completion(tuple(COMMANDS)),
        ),
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(help="File to write, or - to print it (default: RECIPE.sbatch here)", metavar="FILE"),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Hand it to sbatch")] = False,
    **options: Any,
) -> None:
    """Write, and submit, a Slurm job that runs a recipe on a Ray cluster of its own."""
    from shardprune.cluster.slurm.submission import submit as hand_over
    from shardprune.cluster.slurm.submission import write_script

    job = BatchJob.checked({"job_name": recipe.stem, **given(options)})
    overrides = overrides or []
    name, settings = command_of(recipe, lambda name: _parsed(name, recipe, overrides), command)
    check_fit(settings, job)
    text = job.script([*words_of(name, recipe.absolute()), *overrides], Path.cwd())
    file = script or Path(f"{recipe.stem}.sbatch")
    if str(file) == "-":
        if submit:
            raise InputError("script", "'-' is printed, not submitted; name a file, or none")
        print(text, end="")
        return
    write_script(file, text)
    print(f"submitted job {hand_over(file)} ({file})" if submit else f"written {file}; submit it with: sbatch {file}")


def _parsed(command: str, recipe: Path, overrides: list[str]) -> Settings:
    """The settings that a command line makes of a recipe and options."""
    parser = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    try:
        values = given(parser.make_context(command, words_of(command, recipe)[1:] + overrides).params)
    except ClickException as error:
        raise InputError(command, error.format_message()) from error  # type: ignore[attr-defined]
    values.pop("recipe")
    return COMMANDS[command].load(recipe, {"model" if name == "dense" else name: values[name] for name in values})


@_command(START, "shardprune demo --out runs/demo")
def demo(
    out: Annotated[str, typer.Option(help="Directory of the result", metavar="TEXT")] = "runs/demo",
    shards: Annotated[int, typer.Option(help="Shards, one Ray actor each", metavar="N")] = 2,
) -> None:
    """Prune the bundled model to half its weights on Ray shards. Needs no network."""
    from shardprune.commands.prune import prune as run
    from shardprune.recipes.demo import demo_recipe

    settings = demo_recipe(out, shards)
    print_result(run(settings), settings)


def main(arguments: list[str] | None = None) -> None:
    """Run the command: exit code 0 on success, 2 with one line on bad input, 1 with one line where a run
    cannot go on, 143 with one line where SIGTERM ended it, 1 with a traceback where the program is wrong."""
    try:
        with stoppable():
            code = app(arguments, standalone_mode=False)
    except InputError as error:
        sys.exit(_fail(str(error), 2))
    except ClickException as error:
        message = error.format_message()  # type: ignore[attr-defined]
        sys.exit(_fail(message, 2) if message else 2)  # without one the help was shown, as nothing was asked for
    except (SolverError, StorageError, TrainingError, WorkerLost) as error:
        sys.exit(_fail(str(error), 1))
    except Stopped:
        sys.exit(
            _fail("stopped by SIGTERM; what is finished is kept, and the same command goes on from there", EXIT_CODE)
        )
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(
            _fail("stopped by Ctrl-C; what a run has finished is kept, and the same command goes on from there", 130)
        )
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()


def print_result(result: Any, settings: Any = None) -> None:
    """What a run achieved and, with its settings, where its report is."""
    from shardprune.report.result import EvaluationResult
    from shardprune.report.summary import evaluation_summary, summary

    Console().print(evaluation_summary(result) if isinstance(result, EvaluationResult) else summary(result))
    if settings and settings.report:
        print_place_of_report(settings.out or result.recipe["out"])


def print_place_of_report(out: str | None) -> None:
    """Where the report of an output is; nothing where there is no output, or it has none."""
    from shardprune.report.page.write import report_of

    if out and (place := report_of(out)):
        print(f"report: {place}")


def print_plan(planned: Any, as_json: bool) -> int:
    """What a run will take; the exit code."""
    from shardprune.planning.printing import show

    if as_json:
        print(json.dumps(planned.as_json(), indent=1))
    else:
        show(planned, Console())
    return 0 if planned.fits else 1

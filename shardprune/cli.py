"""The `shardprune` command: options become a recipe, the recipe becomes a run. No logic here.

A recipe is checked before its story is imported, and with it torch, Ray or plotly: bad input is refused in a second.
"""

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Annotated, Any, NoReturn

import typer

import shardprune
from shardprune.cluster.slurm.batch import BatchJob
from shardprune.commands.slurm import slurm as write_job
from shardprune.errors import InputError
from shardprune.extras import check_extra
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.training.recipe import TrainingPlanRecipe
from shardprune.printable import message, printable
from shardprune.process import failed, run
from shardprune.recipes.commands import COMMANDS, RECIPES, Command
from shardprune.recipes.demo import demo_recipe
from shardprune.recipes.export import ExportRecipe
from shardprune.recipes.imports import uncollected
from shardprune.recipes.options import completion, given, recipe_of, with_fields, with_options
from shardprune.recipes.settings import Settings
from shardprune.recipes.supplied_files import supplied_files
from shardprune.standard_streams import lost_text, without_libraries
from shardprune.storage.json_file import dump_json

START, PLAN, LOOK, SERVE = (
    "Start here",
    "Plan and run on clusters",
    "Look",
    "Serve",
)  # panels, beside those of the table of commands
FIRST_STEPS = (
    "First steps:",
    "shardprune demo                       # a small model, no GPU, no network",
    "shardprune plan meta-llama/Llama-3.1-8B --gpus 1 --gpu-memory 80GB",
    "shardprune prune meta-llama/Llama-3.1-8B --sparsity 0.5 --out runs/half",
    "shardprune status runs/half           # while it runs, from anywhere",
)

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune large language models on all the GPUs there are.",
    epilog="\n\n".join(FIRST_STEPS),  # typer joins single line breaks
)

# Some versions of typer carry a click of their own; this is the base of whichever they raise.
ClickException: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"shardprune {shardprune.__version__}")
        raise typer.Exit


def _print_files(asked: bool) -> None:
    if asked:
        print(printable(str(supplied_files())))
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version", callback=_print_version, is_eager=True)
    ] = False,
    files: Annotated[
        bool,
        typer.Option(
            "--files",
            help="Print the directory of recipes, jobs, and files for Ray and Slurm",
            callback=_print_files,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


def _say_what_begins(command: str, model: str) -> None:
    """Print a first line to a terminal: what a story imports, and reading a model, takes seconds."""
    if sys.stderr.isatty():
        print(message(f"shardprune {shardprune.__version__}: {command} {model}"), file=sys.stderr, flush=True)


def _command(panel: str, example: str, **settings: Any) -> Callable[..., Any]:
    """Register a command in a panel of the help, with an example below its options.

    The parser returns a call of the command and does not make it: it would turn an interrupt, the end of a file or a
    broken pipe in the middle of a run into ends of its own.
    """
    register = app.command(rich_help_panel=panel, epilog=f"Example:\n\n{example}", **settings)

    def registered(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def parsed(**options: Any) -> Callable[[], Any]:
            return functools.partial(command, **options)

        register(parsed)
        return command

    return registered


@_command(START, "shardprune demo --out runs/demo")
def demo(
    out: Annotated[str, typer.Option(help="Directory of the result", metavar="TEXT")] = "runs/demo",
    shards: Annotated[int, typer.Option(help="Shards, one Ray actor each", metavar="N")] = 2,
) -> None:
    """Prune the bundled model to 50 % on Ray shards, without a network."""
    settings = demo_recipe(out, shards)
    _say_what_begins("demo", "of the bundled model")
    _carry_out(COMMANDS["prune"], settings)


def _carry_out(command: Command, settings: Any) -> None:
    with without_libraries():
        result = command.story(settings)
    show(result, settings)


def _add(command: Command) -> None:
    """Register a command of the table."""

    def carry_out(**options: Any) -> None:
        settings: Any = recipe_of(command.recipe, options, command.file_first)
        _say_what_begins(command.name, settings.model)
        _carry_out(command, settings)

    example = f"shardprune {command.name} {command.example}"
    register = _command(command.panel, example, name=command.name, help=command.help)
    register(with_options(command.recipe, command.file_first)(carry_out))


for row in COMMANDS.values():
    _add(row)


@_command(SERVE, "shardprune export runs/half --format sparse --to runs/half-sparse")
@with_options(ExportRecipe)
def export(**options: Any) -> None:
    """Write a pruned checkpoint in a smaller form, or in an engine's, or the checkpoint back from a smaller form.

    sparse and semi-structured keep the weights to the bit."""
    recipe = recipe_of(ExportRecipe, options)
    _say_what_begins("export", recipe.model)
    with uncollected():
        from shardprune.commands.export import export as run

    found = run(recipe)
    sizes = f"{found.stored_bytes:,} bytes, {(found.stored_bytes or 0) / found.bytes:.1%} of the checkpoint's"
    if recipe.restore:
        sizes = f"{found.bytes:,} bytes, as they were"
    print(printable(f"{recipe.to}: {len(found.files or ())} files, {sizes}"))


@_command(PLAN, "shardprune plan meta-llama/Llama-3.1-70B --nodes 2 --gpus 8 --sparsity 0.5")
@with_options(PlanRecipe)
def plan(
    *,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate the run: timeline, idle share, growth with the GPUs")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    **options: Any,
) -> int:
    """Estimate layout, memory, traffic and seconds of a run. Reads no weights.

    Exit code 1 if nothing fits."""
    recipe = recipe_of(PlanRecipe, options)
    _say_what_begins("plan", recipe.model)
    with uncollected():
        from shardprune.planning.plan import plan as run
        from shardprune.planning.printing import show as show_plan
        from shardprune.report.console import PlainConsole

    planned = run(recipe, simulate)
    if as_json:
        print(dump_json(planned.as_json(), indent=1))
    else:
        show_plan(planned, PlainConsole())
    return 0 if planned.fits else 1


@_command(PLAN, "shardprune plan-recovery MODEL --teacher DENSE --nodes 2 --gpus 8", name="plan-recovery")
@with_options(TrainingPlanRecipe)
def plan_recovery(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False, **options: Any
) -> int:
    """Estimate memory, traffic and seconds of a fine-tuning. Reads no weights.

    Every ZeRO stage, with and without offloading and recomputing, unless options choose. Exit code 1 if nothing
    fits."""
    recipe = recipe_of(TrainingPlanRecipe, options)
    _say_what_begins("plan-recovery", recipe.model)
    with uncollected():
        from shardprune.planning.training.plan import plan_training
        from shardprune.planning.training.printing import show as show_plan
        from shardprune.report.console import PlainConsole

    planned = plan_training(recipe)
    if as_json:
        print(dump_json(planned.as_json(), indent=1))
    else:
        show_plan(planned, PlainConsole())
    return 0 if planned.fits else 1


@_command(PLAN, "shardprune slurm jobs/recipes/mosaic-70.yaml --nodes 4 -- MODEL --out OUT")
@with_fields(BatchJob)
def slurm(
    recipe: Annotated[str, typer.Argument(help="YAML recipe of any command", metavar="RECIPE", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Arguments and options of that command", metavar="-- OVERRIDES", show_default=False),
    ] = None,
    *,
    command: Annotated[
        str | None,
        typer.Option(
            help=f"Command to run ({' | '.join(COMMANDS)}; default: found from the recipe)",
            metavar="NAME",
            autocompletion=completion(tuple(COMMANDS)),
        ),
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(help="Script to write, or - to print it (default: RECIPE.sbatch)", metavar="FILE"),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the script with sbatch")] = False,
    **options: Any,
) -> None:
    """Write, and submit, a Slurm job that runs a recipe on its own Ray cluster."""
    words = overrides or []
    job = BatchJob.checked({"job_name": PurePath(recipe).stem, **given(options)})
    print(write_job(recipe, words, job, lambda name: recipe_on(name, recipe, words), command, script, submit))


@_command(LOOK, "shardprune status s3://bucket/llama-70b-50")
def status(
    out: Annotated[str, typer.Argument(help="Output directory or URL of the run", metavar="OUT")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per run")] = False,
) -> None:
    """Show progress and remaining time of a run, alive or dead, from its output."""
    from shardprune.report.status import status_of

    for found in status_of(out):
        print(dump_json(asdict(found)) if as_json else "\n".join(found.lines(time.time())))


@_command(LOOK, "shardprune check s3://bucket/llama-70b-50")
def check(
    out: Annotated[str, typer.Argument(help="Output directory or URL of a finished run", metavar="OUT")],
) -> int:
    """Check that an output is whole and what it says it is, from its files.

    Exit code 1, and one line for each fault, if it is not."""
    with uncollected():
        from shardprune.commands.check import check as run

    verdicts = run(out)
    print("\n".join(line for verdict in verdicts for line in verdict.lines))
    return 1 if any(verdict.faults for verdict in verdicts) else 0


@_command(LOOK, "shardprune report --compare runs/half runs/half-rebuilt")
def report(
    outs: Annotated[list[str], typer.Argument(help="Outputs of runs or pipelines", metavar="OUT")],
    *,
    compare: Annotated[bool, typer.Option("--compare", help="Compare several outputs on one page")] = False,
    file: Annotated[
        str | None,
        typer.Option(help="File of the comparison, which ends in .html (default: comparison.html)", metavar="FILE"),
    ] = None,
) -> None:
    """Write OUT/report.html, a page that needs no network, or a comparison with JSON and CSV beside it."""
    if file and not compare:
        raise InputError("file", f"{file!r} is for --compare; a report is OUT/report.html")
    check_extra("report", "report")
    from shardprune.report.page.write import write_comparison, write_report

    if compare:
        place, unfinished, unmeasured = write_comparison(outs, file or "comparison.html")
        for reason, names in (("not finished", unfinished), ("no perplexity (--eval)", unmeasured)):
            for name in names:
                print(printable(f"{reason}: {name}"), file=sys.stderr)
        places = [place]
    else:
        places = [write_report(out) for out in outs]
    for place in places:
        print(printable(f"report: {place}"))


# The fields of every command that has a panel for them.
SETTINGS: dict[str, type[Settings]] = {
    **RECIPES,
    "export": ExportRecipe,
    "plan": PlanRecipe,
    "plan-recovery": TrainingPlanRecipe,
    "slurm": BatchJob,
}


def recipe_on(name: str, file: str, words: list[str]) -> Settings:
    """Return the recipe that a command would carry out if it were called with a file and further words.

    Raises:
        InputError: the file, a word or a field is wrong.
    """
    command = COMMANDS[name]
    parser = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    try:
        options = parser.make_context(name, command.words(file)[1:] + words).params
    except ClickException as error:
        raise InputError(name, error.format_message()) from error  # type: ignore[attr-defined]
    except typer.Exit as error:  # of --help
        raise InputError(
            name, f"{' '.join(words)!r} only shows something; give options that override the recipe"
        ) from error
    return recipe_of(command.recipe, options, command.file_first)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and end the process, as `shardprune.process.run` says."""
    run(functools.partial(carry_out, arguments))


def carry_out(arguments: list[str] | None = None) -> int:
    """Carry out a command line and return its exit code: 0, 2 if it cannot be parsed, 1 if nothing that was planned
    fits."""
    try:
        command = app(arguments, standalone_mode=False)
    except ClickException as error:
        text = error.format_message()  # type: ignore[attr-defined]
        return failed(text, 2) if text else 2  # without one the help was shown, as nothing was asked for
    code = command() if callable(command) else command  # the code of --help
    return code if isinstance(code, int) else 0


def show(results: Any, settings: Any) -> None:
    """Print the result of a run, or those of a pipeline's steps, and the place of the report."""
    from shardprune.report.console import PlainConsole
    from shardprune.report.page.place import report_of
    from shardprune.report.result import EvaluationResult
    from shardprune.report.summary import evaluation_summary, remark_on_numbers, summary
    from shardprune.report.verdict import verdict

    steps = list(results.values()) if isinstance(results, dict) else [results]
    for result in steps:
        if not isinstance(result, EvaluationResult):
            PlainConsole().print(verdict(result))
        PlainConsole().print(evaluation_summary(result) if isinstance(result, EvaluationResult) else summary(result))
        if remark := remark_on_numbers(result):
            PlainConsole().print(remark)
    out = settings.out or steps[-1].recipe["out"]
    if settings.report and out and (place := report_of(out)):
        print(printable(f"report: {place}"))
    if out and (reason := lost_text()):  # the run's product lies in its output
        lost = f"standard output cannot be written ({reason}); the result is in {out}"
        print(printable(lost), file=sys.stderr)


if __name__ == "__main__":
    main()

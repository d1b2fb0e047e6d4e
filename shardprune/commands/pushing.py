"""Pushing a finished output to the Hugging Face hub, by the hub's own client."""

import functools
from collections.abc import Callable
from typing import Protocol, TypeVar

from huggingface_hub import HfApi, get_token, is_offline_mode

from shardprune.errors import InputError, StorageError, first_line
from shardprune.model.companions import is_template
from shardprune.report.progress import Reporter
from shardprune.report.result import Result
from shardprune.storage.folder import of_storage
from shardprune.storage.locations import absolute
from shardprune.storage.output_names import CARD


class Pushes(Protocol):
    """A recipe with an output, and the repository that receives it."""

    @property
    def out(self) -> str: ...

    @property
    def push(self) -> str | None: ...


R = TypeVar("R", bound=Pushes)


def pushed(story: Callable[[R, Reporter | None], Result]) -> Callable[..., Result]:
    """Let a story push its finished output where its recipe says so. Whether that can work is found before it begins;
    an output that cannot be pushed after all is whole, and the same command tries again.

    Raises:
        InputError: there is no token, the hub does not take it or cannot be reached, or the output is not local.
        StorageError: the hub refuses the output.
    """

    @functools.wraps(story)
    def carried_out(recipe: R, reporter: Reporter | None = None) -> Result:
        reporter = reporter or Reporter()
        check_push(recipe)
        result = story(recipe, reporter)
        if recipe.push is not None:
            _push(recipe.push, recipe.out, result, reporter)
        return result

    return carried_out


def check_push(recipe: Pushes) -> None:
    """Check that the output of a recipe can be pushed where it says, if it does.

    Raises:
        InputError: there is no token, the hub does not take it or cannot be reached, or the output is not local.
    """
    name = recipe.push
    if name is None:
        return
    if "://" in absolute(recipe.out):
        raise InputError("push", f"{name!r} needs a local output, and {recipe.out} is none; `hf upload` pushes a copy")
    if is_offline_mode():
        raise InputError("push", f"{name!r} cannot be reached: HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise InputError("push", f"{name!r} needs a token: `hf auth login`, or HF_TOKEN")
    try:
        HfApi().whoami()
    except Exception as error:
        if not _of_hub(error):
            raise
        raise InputError("push", f"{name!r}: the hub does not take the token: {first_line(error)}") from error


def _push(name: str, out: str, result: Result, reporter: Reporter) -> None:
    """Push the files of the model and its card, not those that speak of machines."""
    files = [file for file in result.files if "/" not in file or is_template(file)]
    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        found = api.upload_folder(
            repo_id=name,
            folder_path=absolute(out),
            allow_patterns=[*files, CARD],
            commit_message=f"shardprune {result.command}",
        )
    except Exception as error:
        if not _of_hub(error):
            raise
        reason = f"{out} is whole, and cannot be pushed to {name!r}: {first_line(error)}"
        raise StorageError("push", f"{reason}; the same command tries again") from error
    reporter.say(f"pushed to {name}: {found.commit_url}")


def _of_hub(error: Exception) -> bool:
    """Return whether an error is one of the hub, or of the way to it; its client raises ValueError for a card that the
    hub does not take."""
    return of_storage(error) or isinstance(error, ValueError)

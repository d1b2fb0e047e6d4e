"""The folders of an output that can hold a run."""

from shardprune.storage.folder import Folder
from shardprune.storage.output_names import PIPELINE, PRUNED, RECOVERED, is_of_kept


def run_folders(out: str) -> list[Folder]:
    """Return all folders of an output that can hold a run: itself and those of a pipeline's steps, in their order.

    Args:
        out: a path or URL.
    """
    names = Folder(out, "out").names() if Folder(out, "out").is_file(PIPELINE) else []
    steps = PRUNED, *sorted(filter(is_of_kept, names)), RECOVERED
    return [Folder(url, "out") for url in (out, *(f"{out}/{name}" for name in steps))]

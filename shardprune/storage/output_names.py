"""Names of the files and folders in a run's output directory."""

import re

STATE = "run.json"
RESULT = "result.json"
EVENTS = "events.jsonl"
OWNER = "owner.json"
CARD = "README.md"  # of a model, as the hub reads it
EXPORT = "export.json"  # of an export: what it is made of
CONVERSION = "conversion.json"  # of a model in an engine's format: what it is made of
RESTORED = "restore.json"  # while a checkpoint is made of an export
ALLOCATION = "allocation.json"
WRITTEN = SELF_TOKENS, SELF_RECORD = "self.npy", "self.json"  # of a text that the run's own model has written
EXPERTS = "experts.json"  # statistics of the experts of a dense model
BESIDE = (ALLOCATION, EXPERTS, *WRITTEN)  # files beside a model that other runs may read
PIPELINE = "pipeline.json"
PRUNED, RECOVERED = "pruned", "recovered"  # folders of a pipeline's output, one for each step that makes a model
KEPT = re.compile(r"iteration-\d+")  # folders of an output of mop: the models of iterations that it kept


def kept_folder(iteration: int) -> str:
    """Return the name of the folder of an iteration that mop keeps."""
    return f"iteration-{iteration:02d}"


def run_of(model: str) -> str:
    """Return the folder of the run that made a model: its own, or the one above of an iteration that mop kept."""
    above, _, name = model.rstrip("/").rpartition("/")
    return above if KEPT.fullmatch(name) else model


def is_of_kept(folder: str) -> bool:
    """Return whether a folder is one of a pipeline in which an iteration that mop kept is recovered."""
    step, _, name = folder.rstrip("/").rpartition("/")[2].partition("-")
    return step == RECOVERED and KEPT.fullmatch(name) is not None

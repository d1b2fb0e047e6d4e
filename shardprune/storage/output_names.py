"""Names of the files and folders in a run's output directory."""

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
PRUNED, RECOVERED = "pruned", "recovered"  # folders of a pipeline's output, one for each step that makes a model


def run_folders(out: str) -> tuple[str, ...]:
    """Return the paths or URLs of all folders of an output that can hold a run: itself and those of a pipeline's
    steps.
    """
    return out, f"{out}/{PRUNED}", f"{out}/{RECOVERED}"

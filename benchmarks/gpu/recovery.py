"""A short fine-tuning of the bundled model in this process, where DeepSpeed is installed."""

import importlib.util
import tempfile

from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting
from shardprune import RecoverRecipe, recover
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter


def run(setting: Setting, rows: Rows) -> None:
    if not importlib.util.find_spec("deepspeed"):
        rows.add("skipped", "DeepSpeed is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model": bundled_model(),
            "out": f"{folder}/out",
            "data": "stdlib",
            "steps": setting.size(8, 1),
            "batch": 2,
            "length": setting.size(256, 64),
            "threads": setting.size(4, 1),
            "device": setting.device,
            "backend": "local",
            "report": False,
        }
        result = recover(RecoverRecipe.checked(values), Reporter(quiet=True))
    recovery = result.recovery
    assert recovery is not None
    rows.add("steps", recovery.steps)
    rows.add("seconds", result.seconds["total"], "s")
    rows.add("loss of the last step", recovery.losses[-1].loss)

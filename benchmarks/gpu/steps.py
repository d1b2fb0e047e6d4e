"""The table of steps: those that answer the most come first, so that a machine that is lost leaves the most behind."""

from dataclasses import dataclass
from importlib import import_module

from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting


@dataclass(frozen=True)
class Step:
    """A module of this package whose `run(setting, rows)` carries the step out; it is killed after `limit` seconds."""

    name: str
    limit: int

    def run(self, setting: Setting, rows: Rows) -> None:
        import_module(f"benchmarks.gpu.{self.name}").run(setting, rows)


STEPS = {
    step.name: step
    for step in (
        Step("facts", 15),
        Step("numerics", 25),
        Step("suite", 120),
        Step("rates", 15),
        Step("layer", 60),
        Step("variants", 25),
        Step("profile", 35),
        Step("whole_run", 35),
        Step("improving", 75),
        Step("memory", 35),
        Step("masked_update", 25),
        Step("recovery", 25),
        Step("semi_structured", 45),
    )
}
SECONDS = 9 * 60  # all limits together

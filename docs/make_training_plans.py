"""The table on trainings of a 70B model that docs/recovery.md has.

python -m docs.make_training_plans     print the table; a minute
"""

from pathlib import Path

from shardprune.planning.training.plan import Way, plan_training
from shardprune.planning.training.recipe import TrainingPlanRecipe
from shardprune.storage.quantities import gigabytes

CONFIG = str(Path(__file__).parent.parent / "ray_configs/models/llama-3.1-70b/config.json")
MACHINES = {"8 x 80 GB": 1, "16 x 80 GB": 2, "32 x 80 GB": 4}  # nodes of eight GPUs
TRAININGS = {
    "low-rank, zeros kept, teacher": {"keep_sparsity": True, "teacher": CONFIG},
    "low-rank, zeros kept, stored teacher": {"keep_sparsity": True, "teacher": CONFIG, "teacher_top": 64},
    "full, zeros kept": {"full": True, "keep_sparsity": True},
}
HEAD = """\
| training | GPUs | options | weights | optimizer, gradients | activations, workspace | teacher | a GPU's peak | \
fullest node | s/step |
|---|---|---|---|---|---|---|---|---|---|
"""


def rows() -> str:
    """Return the rows of the table."""
    made = ""
    for training, options in TRAININGS.items():
        for machines, nodes in MACHINES.items():
            given = {**options, "model": CONFIG, "nodes": nodes, "gpus": 8, "batch": 32, "length": 2048}
            plan = plan_training(TrainingPlanRecipe.checked({**given, "zero": 3, "micro_batch": 1}))
            made += "".join(f"| {training} | {machines} | {' | '.join(_cells(way))} |\n" for way in plan.ways)
    return made


def _cells(way: Way) -> list[str]:
    device = way.memory.device
    peak = gigabytes(device.peak) + ("" if way.fits else ": does not fit")
    sums = (
        device.weights,
        device.optimizer + device.gradients,
        device.activations + device.workspace + device.buckets,
        device.teacher,
    )
    return [f"`{way.options}`", *map(gigabytes, sums), peak, gigabytes(way.node), f"{way.work.seconds:.1f}"]


if __name__ == "__main__":
    print(HEAD + rows(), end="")

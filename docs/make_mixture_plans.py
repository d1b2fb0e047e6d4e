"""The table on public mixtures of experts that docs/planning.md has.

python -m docs.make_mixture_plans     print the table; some minutes
"""

import tempfile
from pathlib import Path

from shardprune.planning.choosing import Candidate, choose
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.workload import read_model
from shardprune.storage.quantities import duration, gigabytes
from tests.support.public_mixtures import PUBLIC, public_config

MACHINES = {"8 x H100, 80 GB": (1, 8, "h100"), "4 x 8 x H200, 141 GB": (4, 8, "h200")}
HEAD = """\
| model | machines | layout | `--expert-chunks` | a GPU's peak | step of the peak | fullest node | time |
|---|---|---|---|---|---|---|---|
"""


def rows() -> str:
    """Return the rows of the table."""
    made = ""
    for name in PUBLIC:
        with tempfile.TemporaryDirectory() as folder:
            public_config(name).save_pretrained(folder)
            model = read_model(str(Path(folder)))
        for machines, (nodes, gpus, hardware) in MACHINES.items():
            recipe = PlanRecipe.checked(
                {"model": name, "nodes": nodes, "gpus": gpus, "hardware": hardware, "sparsity": 0.5}
            )
            candidate = choose(recipe, model, "exact")
            assert candidate is not None
            cells = [f"{name}, {model.parameters / 1e9:.0f} B", machines, *_cells(candidate)]
            made += f"| {' | '.join(cells)} |\n"
    return made


def _cells(candidate: Candidate) -> list[str]:
    setup, (device, _) = candidate.setup, candidate.worst
    layout = f"{len(setup.layout.shards)} x {setup.layout.replicas}, {'streamed' if setup.streamed else 'resident'}"
    peak = gigabytes(device.device.peak) if candidate.fits else f"{gigabytes(device.device.peak)}: does not fit"
    step = f"{device.phase}, {device.step}"
    return [layout, str(setup.chunks), peak, step, gigabytes(candidate.node), duration(candidate.seconds.total)]


if __name__ == "__main__":
    print(HEAD + rows(), end="")

"""Our run, as a process of its own: python -m benchmarks.peers.ours MODEL TOKENS OUT THREADS.

Imports come before the clock starts, as in the peer's; reading the weights and writing the layers are inside. They are
made as those of the command line are, without the collector.
"""

import json
import sys
import time

import numpy

from shardprune.recipes.imports import uncollected

with uncollected():
    import torch

    from benchmarks.peers.floor import rate
    from shardprune import Recipe, prune
    from shardprune.model.opening import open_model
    from shardprune.report.progress import Reporter


def main() -> None:
    model, tokens, out, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    open_model(model)  # imports the code of the model's family
    samples, seqlen = numpy.load(tokens).shape
    values = {
        "model": model,
        "out": out,
        "sparsity": 0.5,
        "calibration": tokens,
        "samples": samples,
        "seqlen": seqlen,
        "device": "cpu",
        "dtype": "float32",
        "threads": int(threads),
        "backend": "local",
        "report": False,
    }
    recipe = Recipe.checked(values)
    wall, cpu = time.perf_counter(), time.process_time()
    result = prune(recipe, Reporter(quiet=True))
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps({**taken, "prune": result.seconds["prune"], "rate": rate()}))


if __name__ == "__main__":
    main()

"""Prune (or mop, or experts), recover and evaluate a checkpoint, as a recipe says.

python -m jobs.pipeline RECIPE [OPTIONS of `shardprune pipeline`]
"""

from jobs.entry import run

if __name__ == "__main__":
    run("pipeline")

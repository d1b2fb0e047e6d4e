"""Prune a checkpoint, as a recipe says.

python -m jobs.prune RECIPE [OPTIONS of `shardprune prune`]
"""

from jobs.entry import run

if __name__ == "__main__":
    run("prune")

"""Measure a checkpoint, as a recipe says.

python -m jobs.evaluate RECIPE [OPTIONS of `shardprune evaluate`]
"""

from jobs.entry import run

if __name__ == "__main__":
    run("evaluate")

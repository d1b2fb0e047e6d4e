"""Mend the masks of a pruned checkpoint, as a recipe says.

python -m jobs.rebuild RECIPE [OPTIONS of `shardprune rebuild`]
"""

from jobs.entry import run

if __name__ == "__main__":
    run("rebuild")

"""Make a checkpoint shallower and narrower in turn (MoP), as a recipe says.

python -m jobs.mop RECIPE [OPTIONS of `shardprune mop`]
"""

from jobs.entry import run

if __name__ == "__main__":
    run("mop")

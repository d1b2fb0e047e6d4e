"""Remove experts of a mixture-of-experts checkpoint, as a recipe says.

python -m jobs.experts RECIPE [OPTIONS of `shardprune experts`]
"""

from jobs.entry import run

if __name__ == "__main__":
    run("experts")

"""Fine-tune a pruned checkpoint, as a recipe says.

python -m jobs.recover RECIPE [OPTIONS of `shardprune recover`]
"""

from jobs.entry import run

if __name__ == "__main__":
    run("recover")

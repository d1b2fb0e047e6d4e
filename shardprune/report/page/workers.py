"""Labels of workers in plots; neighbours share a line if there are many."""

Key = tuple[int, int]  # shard, replica

LINES = 32  # of a plot; with more workers, each line stands for several


def lines_of(keys: list[Key]) -> list[tuple[str, list[Key]]]:
    """Return the labels of lines and the workers of each, in the order of shards and replicas."""
    keys = sorted(keys)
    per_line = max(1, -(-len(keys) // LINES))
    groups = [keys[start : start + per_line] for start in range(0, len(keys), per_line)]
    return [(_name(group[0]) + (f" to {_name(group[-1])}" if len(group) > 1 else ""), group) for group in groups]


def _name(key: Key) -> str:
    return f"{key[0]}.{key[1]}"

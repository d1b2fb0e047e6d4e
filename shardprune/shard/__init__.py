"""A shard of decoder layers and the work on it. Runs without Ray."""

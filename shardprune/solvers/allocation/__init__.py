"""Which projection gives up how much. Plain arithmetic on a few numbers per projection."""

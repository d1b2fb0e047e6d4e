"""The table of pruning methods. A new method is one file beside this one and one line here."""

from shardprune.solvers.method import Method

METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude.prune", needs=None),
    "wanda": Method("wanda.prune", needs="squares"),
    "wanda-variant": Method("wanda.prune_variant", needs="squares", named=False),  # by an option of its own
    "sparsegpt": Method("sparsegpt.prune", needs="gram"),
}

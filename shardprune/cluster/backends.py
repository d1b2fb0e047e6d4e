"""The table of backends."""

from shardprune.cluster.group import Backend
from shardprune.cluster.local_backend import LocalBackend
from shardprune.recipes.groups import BackendFields


def backend_of(fields: BackendFields) -> Backend:
    """Return the backend that a recipe asks for; Ray is imported only for `ray`."""
    if fields.backend == "local":
        return LocalBackend()
    from shardprune.cluster.ray_backend import RayBackend

    return RayBackend(fields.address, fields.patience_seconds)

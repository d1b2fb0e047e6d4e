"""The table of backends."""

from shardprune.cluster.group import Backend
from shardprune.cluster.local_backend import LocalBackend


def backend_of(name: str, address: str | None) -> Backend:
    """Return the backend of a name; Ray is imported only for `ray`."""
    if name == "local":
        return LocalBackend()
    from shardprune.cluster.ray_backend import RayBackend

    return RayBackend(address)

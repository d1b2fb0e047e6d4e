"""The table of backends."""

from shardprune.cluster.group import Backend
from shardprune.cluster.local_backend import LocalBackend


def backend_of(name: str, address: str | None) -> Backend:
    """The backend of a name; Ray is imported only where it is used."""
    if name == "local":
        return LocalBackend()
    from shardprune.cluster.ray_backend import RayBackend

    return RayBackend(address)

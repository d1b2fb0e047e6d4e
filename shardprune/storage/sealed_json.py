"""JSON objects with a seal, the digest of all other fields: what was changed is not taken for what was written."""

from collections.abc import Mapping
from typing import Any

from shardprune.storage.digests import digest_of
from shardprune.storage.json_file import dump_json
from shardprune.storage.malformed import Malformed

SEAL = "seal"


def sealed_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an object with its seal."""
    return {**fields, SEAL: _seal(fields)}


def unsealed(value: Any) -> dict[str, Any]:
    """Return the fields of an object without its seal.

    Raises:
        Malformed: it is no object, or its seal is missing or another one.
    """
    if not isinstance(value, dict):
        raise Malformed("is no object")
    fields = {name: own for name, own in value.items() if name != SEAL}
    if value.get(SEAL) != _seal(fields):
        raise Malformed("is damaged: its seal is not that of its content")
    return fields


def _seal(fields: Mapping[str, Any]) -> str:
    return digest_of(dump_json(fields).encode())

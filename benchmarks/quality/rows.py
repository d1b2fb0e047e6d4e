"""The rows of the table: recipes of `shardprune prune`, of which each row names what differs from SparseGPT's.

A row that the recipes of this version do not take, or that a setting does not go with (an allocation beside N:M), is
left out, and the benchmark says so. A new part is a line here.
"""

from typing import Any

BASELINE = "SparseGPT"
STREAM: dict[str, Any] = {"targets": "stream"}
TRAINED: dict[str, Any] = {"reconstruct": 100}
ALPS: dict[str, Any] = {"method": "alps"}
OWL: dict[str, Any] = {"allocation": "owl"}
FISHER: dict[str, Any] = {"allocation": "fisher"}

ROWS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    # each part alone
    **{f"SparseGPT, damping {value}": {"damping": value} for value in (0.03, 0.1, 0.3)},
    "SparseGPT, damping auto": {"damping": "auto"},
    "Wanda": {"method": "wanda"},
    "OWL": OWL,
    "Fisher": FISHER,
    "ALPS": ALPS,
    "refit": {"refit": True},
    "stream targets": STREAM,
    "reconstruction": TRAINED,
    # together
    "ALPS + OWL": ALPS | OWL,
    "ALPS + Fisher": ALPS | FISHER,
    "OWL + stream targets": OWL | STREAM,
    "Fisher + stream targets": FISHER | STREAM,
    "ALPS + stream targets": ALPS | STREAM,
    "ALPS + Fisher + stream targets": ALPS | FISHER | STREAM,
    "OWL + reconstruction": OWL | TRAINED,
    "Fisher + reconstruction": FISHER | TRAINED,
    "ALPS + reconstruction": ALPS | TRAINED,
    "ALPS + OWL + reconstruction": ALPS | OWL | TRAINED,
    "ALPS + Fisher + reconstruction": ALPS | FISHER | TRAINED,
    "stream targets + reconstruction": STREAM | TRAINED,
    "ALPS + Fisher + stream targets + reconstruction": ALPS | FISHER | STREAM | TRAINED,
    # the dial
    "quality fast": {"quality": "fast", "targets": "auto"},
    "quality balanced": {"quality": "balanced", "targets": "auto"},
    "quality best": {"quality": "best", "targets": "auto"},
    "quality best, damping 0.01": {"quality": "best", "targets": "auto", "damping": 0.01},
}


def amount(setting: str) -> dict[str, Any]:
    """Return the fields of a setting: a sparsity such as 0.7, or a pattern such as 2:4."""
    return {"pattern": setting} if ":" in setting else {"sparsity": float(setting)}

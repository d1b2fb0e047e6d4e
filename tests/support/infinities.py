"""Configs with numbers that are not finite: limits of Mamba's time steps, in both forms that transformers writes."""

import json
from typing import Any

from transformers import PretrainedConfig

INFINITE = ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h")
FORMS = ("tagged", "bare")  # of transformers 5, and before, as Python writes it and JSON has it not
TAGGED = {"__float__": "Infinity"}


def with_infinities(config: PretrainedConfig, form: str) -> str:
    """Return the content of the config.json of a model with all fields."""
    text = config.to_json_string(use_diff=False)
    fields: dict[str, Any] = json.loads(text)
    assert fields["time_step_limit"] == [0.0, TAGGED]
    if form == "bare":
        fields["time_step_limit"][1] = float("inf")
        text = json.dumps(fields, indent=2) + "\n"
        assert "Infinity" in text
    return text

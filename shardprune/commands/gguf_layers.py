"""Which layers differ from the others in GGUF: for some families llama.cpp knows it by their index alone.

Its converter writes no list of layers for them. A model from whose middle a layer was removed would run with windows,
or without positions, where others had them, and nothing would say so.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from shardprune.errors import InputError

# Attention over all tokens, not a window or chunk of them, in every nth layer: load_swa_pattern of llama.cpp's models.
FULL_ATTENTION = {
    "afmoe": 4,
    "cohere2": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gpt_oss": 2,
    "llama4_text": 4,
}
# No rotary positions in every nth layer: n_no_rope_layer_step.
NO_POSITIONS = {"llama4_text": 4, "smollm3": 4}


def check_layers(config: PretrainedConfig) -> None:
    """Check that GGUF can say which layers of a model differ.

    Raises:
        InputError: llama.cpp would take others for them.
    """
    family = config.model_type
    types: Sequence[str] = getattr(config, "layer_types", None) or ()
    full = [kind == "full_attention" for kind in types]
    if family != "llama4_text" or not all(full):  # of which the converter writes that there are no chunks
        _check(family, "attention over all tokens", FULL_ATTENTION, full)
    rotary: Sequence[Any] = getattr(config, "no_rope_layers", None) or ()  # 1 where there are positions
    _check(family, "no rotary positions", NO_POSITIONS, [not used for used in rotary])


def _check(family: str, what: str, periods: dict[str, int], differ: list[bool]) -> None:
    if family not in periods or not differ:
        return
    period = periods[family]
    if differ != [(index + 1) % period == 0 for index in range(len(differ))]:
        found = ", ".join(str(index) for index, one in enumerate(differ) if one) or "none"
        raise InputError(
            "format",
            f"'gguf' has no word for which layers have {what}: llama.cpp takes the last of every {period} layers of a "
            f"{family} for one, and here they are {found} of 0 to {len(differ) - 1}",
        )

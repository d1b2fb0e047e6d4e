"""The class of transformers that loads a whole checkpoint as a model that writes text."""

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

CAUSAL, IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"


def auto_class_of(model_type: str) -> str:
    """Return the name of the class for a config's `model_type`: `AutoModelForImageTextToText` for models that see
    images, of some of which `AutoModelForCausalLM` loads the language tower alone and others it does not know."""
    return IMAGES if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else CAUSAL

"""The images that rows of a training show, and the frozen vision tower that sees them, by their configs alone."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from shardprune.errors import first_line
from shardprune.model.config_file import language_config
from shardprune.model.vision import META, Vision, image_shape
from shardprune.planning.training.passes import Uncounted


@dataclass(frozen=True)
class Images:
    """The images of a training's rows.

    Attributes:
        per_row: images that a row shows at most; with 0 the tower is in memory, but none is seen.
        model: whole config of the trained model.
        teacher: whole config of the teacher; None without one.
    """

    per_row: int
    model: PretrainedConfig
    teacher: PretrainedConfig | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What sizes depend on, to be compared."""
        return self.per_row, self.model.to_json_string(), self.teacher.to_json_string() if self.teacher else None


@dataclass(frozen=True)
class Tower:
    """A vision tower with its projector.

    Attributes:
        parameters: all frozen, and whole in every process.
        tokens: of a row that stand for an image.
        operations: multiplications and additions for an image.
    """

    parameters: int
    tokens: int
    operations: int


def tower_of(config: PretrainedConfig) -> Tower:
    """Count the tower of a whole config, for an image on the meta device.

    Raises:
        Uncounted: the model's code cannot run there.
    """
    try:
        vision = Vision(config, language_config(config), torch.float32, META)
        with FlopCounterMode(display=False) as counter:
            tokens = vision.features_on_meta({"pixel_values": meta_pixels(config, 1)})
    except Exception as error:  # code that looks at values fails in any way where there are none
        raise Uncounted(first_line(error)) from error
    return Tower(vision.parameters, tokens, counter.get_total_flops())


def meta_pixels(config: PretrainedConfig, count: int) -> torch.Tensor:
    """Return the pixels of images as processors make them, without values."""
    return torch.empty(count, *image_shape(config), dtype=torch.float32, device=META)


def with_sight(config: PretrainedConfig, language: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the multimodal model of a whole config, without its head, around a language model."""
    return Vision(config, language.config, dtype, META).around(language.base_model)

"""The images that rows of a training show, and the frozen vision tower that sees them, by their configs alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig, PreTrainedModel

from shardprune.errors import first_line
from shardprune.model.config_file import language_config
from shardprune.model.meta_device import META, without_values
from shardprune.model.vision import Arguments, Vision, image_shape
from shardprune.planning.training.passes import Uncounted


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a training's rows.

    Attributes:
        per_row: images that a row shows at most; with 0 the tower is in memory, but none is seen.
        model: whole config of the trained model.
        teacher: whole config of the teacher; None without one.
        shown: what the model is given of the images of a row with the most of them; None: each is a square of the size
            for which its tower is made.
    """

    per_row: int
    model: PretrainedConfig
    teacher: PretrainedConfig | None = None
    shown: dict[str, Tensor] | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What sizes depend on, to be compared."""
        shown = [(name, tensor.shape, _values(tensor)) for name, tensor in (self.shown or {}).items()]
        models = self.model.to_json_string(), self.teacher.to_json_string() if self.teacher else None
        return self.per_row, models, tuple(shown)

    def of_row(self, config: PretrainedConfig) -> dict[str, Tensor]:
        """Return what a model of a whole config is given of a row's images."""
        if self.shown is not None:
            return without_values(self.shown)
        return repeated(square(config), self.per_row)


def _values(tensor: Tensor) -> object:
    return None if tensor.is_floating_point() else str(tensor.tolist())


@dataclass(frozen=True)
class Tower:
    """A vision tower with its projector.

    Attributes:
        parameters: all frozen, and whole in every process.
        features: of each image, or of each part of one that it sees alone.
        operations: multiplications and additions for these images.
    """

    parameters: int
    features: tuple[int, ...]
    operations: int

    @property
    def tokens(self) -> int:
        """The number of tokens that stand for these images."""
        return sum(self.features)

    def as_json(self) -> dict[str, int]:
        return {"parameters": self.parameters, "tokens": self.tokens, "operations": self.operations}


def tower_of(config: PretrainedConfig, inputs: dict[str, Tensor]) -> Tower:
    """Count the tower of a whole config.

    Args:
        inputs: what it is given of images, on the meta device.

    Raises:
        Uncounted: the model's code cannot run there.
    """
    try:
        vision = Vision(config, language_config(config), torch.float32, META)
        with FlopCounterMode(display=False) as counter:
            features = vision.features_on_meta(inputs) if inputs else []
    except Exception as error:  # code that looks at values fails in any way where there are none
        raise Uncounted(first_line(error)) from error
    return Tower(vision.parameters, tuple(features), counter.get_total_flops())


def square(config: PretrainedConfig) -> dict[str, Tensor]:
    """Return what a model is given of an image of the size for which its tower is made, pixels without values.

    Raises:
        Uncounted: it is made for no size.
    """
    shape = image_shape(config)
    if shape is None:
        raise Uncounted("images are as large as they are")
    channels, height, width = shape
    made = {"pixel_values": torch.empty(1, channels, height, width, dtype=torch.float32, device=META)}
    if "image_sizes" in Arguments.of(config.vision_config).of_images:
        made["image_sizes"] = torch.tensor([[height, width]])
    return made


def as_large(config: PretrainedConfig, width: int, height: int) -> dict[str, Tensor] | None:
    """Return what a model is given of an image of so many pixels, in whole patches; None if its tokens do not depend on
    them, or on what its processor alone knows (InternVL's parts)."""
    vision = config.vision_config
    if "image_grid_thw" in Arguments.of(config).of_images:  # Qwen
        merged, size = vision.spatial_merge_size, vision.patch_size
        rows, columns = (max(1, round(side / (size * merged))) * merged for side in (height, width))
        values = vision.in_channels * vision.temporal_patch_size * size * size
        patches = torch.empty(rows * columns, values, dtype=torch.float32, device=META)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, rows, columns]])}
    if "image_sizes" in Arguments.of(vision).of_images:  # Pixtral
        size = vision.patch_size * getattr(config, "spatial_merge_size", 1)
        fewer = max(1, width / vision.image_size, height / vision.image_size)
        high, wide = (-(-int(side / fewer) // size) * size for side in (height, width))
        pixels = torch.empty(1, vision.num_channels, high, wide, dtype=torch.float32, device=META)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[high, wide]])}
    return None


def repeated(inputs: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """Return what a model is given of the same images several times."""
    return {name: torch.cat([tensor] * times) for name, tensor in inputs.items()} if times else {}


def completed(
    config: PretrainedConfig, inputs: dict[str, Tensor], of_row: dict[str, Tensor], features: Sequence[int]
) -> dict[str, Tensor]:
    """Return the arguments of a model's forward pass on rows that show images, as `Processor.completed` does.

    The tokens have values: a model's code looks at where they stand for images.

    Args:
        inputs: of rows without images.
        of_row: what the model is given of each row's images.
        features: of each of them, which here are as many tokens at the beginning of a row, with another one between
            images if there is room.
    """
    arguments, (rows, length) = Arguments.of(config), inputs["input_ids"].shape
    between = int(sum(features) + len(features) <= length)
    shown = [place for count in features for place in [True] * count + [False] * between][:length]
    types = torch.tensor([shown + [False] * (length - len(shown))] * rows).long()
    ids = torch.where(types.bool(), config.image_token_id, (config.image_token_id == 0) * 1)
    given = {**inputs, "input_ids": ids} | repeated(of_row, rows)
    if not arguments.positions:
        del given["position_ids"]
    if arguments.types:
        given[arguments.types] = types
    return given


def with_sight(config: PretrainedConfig, language: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the multimodal model of a whole config, without its head, around a language model."""
    return Vision(config, language.config, dtype, META).around(language.base_model)

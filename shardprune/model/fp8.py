"""FP8 checkpoints, as transformers knows them: weights of eight bits with scales by blocks, rows or tensors.

A weight `q_proj.weight` has its scales beside it, `q_proj.weight_scale_inv`, by which it is multiplied; one that holds
all experts of a layer, `experts.down_proj`, has `experts.down_proj_scale_inv`. Modules that were not converted have no
such weight. Other quantised checkpoints are not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from shardprune.errors import InputError
from shardprune.storage.json_file import fitting
from shardprune.storage.malformed import located
from shardprune.storage.safetensors_file import Entry
from shardprune.storage.scaled_tensors import ScaledEntry, dequantised
from shardprune.storage.stacks import Place

METHOD = "fp8"
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
SCALES = ("weight_scale_inv", "scale", "qscale_weight")  # DeepSeek-V3 and most others; DeepSeek-V4; Mistral
OF_INPUTS = ("activation_scale", "qscale_act")  # scales of the activations
WRITTEN = (torch.bfloat16, torch.float16, torch.float32)

Size = Annotated[int, Field(ge=1)]


class QuantisationConfig(BaseModel):
    """The field `quantization_config` of an FP8 checkpoint's config.json, as far as its weights depend on it.

    Attributes:
        weight_block_size: rows and columns that have one scale; None: one for each tensor.
    """

    weight_block_size: tuple[Size, Size] | None = (128, 128)


def quantisation_of(raw: Mapping[str, Any], place: str, field: str) -> QuantisationConfig | None:
    """Return how the weights of an FP8 checkpoint are stored, by the content of its config.json; None for others.

    Args:
        place: path or URL of the file, for the error.

    Raises:
        InputError: names `field`, and what is wrong in the file.
    """
    found = raw.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        return None
    with located(field, f"{place}: quantization_config"):
        return fitting(found, QuantisationConfig)


@dataclass(frozen=True)
class Fp8Weights:
    """The weights of an FP8 checkpoint, which are read in a `dtype`.

    Attributes:
        place: path or URL of the checkpoint, which a recipe's `field` gives, for errors.
    """

    config: QuantisationConfig
    dtype: torch.dtype
    place: str
    field: str

    def companions(self, files: Mapping[str, Entry]) -> dict[str, str]:
        """Return the names of the scales among stored tensors, each with the name of its weight."""
        found: dict[str, str] = {}
        for name, entry in files.items():
            if entry.dtype in DTYPES:
                found |= {own: name for own in (*_scales(name), *_scales_of_inputs(name)) if own in files}
        return found

    def places_of_scales(self, places: Mapping[str, Place], files: Mapping[str, Entry]) -> dict[str, Place]:
        """Return the places of scales by names beside those of their weights: `q_proj.weight_scale_inv`,
        `q_proj.activation_scale`.

        Args:
            places: of the weights, by name.

        Raises:
            InputError: scales are of several experts, and have no part for each.
        """
        own: dict[str, list[str]] = {}
        for scales, weight in self.companions(files).items():
            own.setdefault(weight, []).append(scales)
        found = {}
        for name, place in places.items():
            for scales in own.get(place.name, ()):
                named = names_of_scales(name)[scales in _scales_of_inputs(place.name)]
                part = place.slice
                if part is not None:
                    part = replace(part, shape=files[scales].shape)
                    if len(part.shape) != 3:
                        raise self._error(f"scales {scales} {list(part.shape)} of all experts")
                found[named] = Place(scales, part)
        return found

    def entry(self, place: Place, files: Mapping[str, Entry]) -> Entry:
        """Return where the tensor at a place is, by the entries of the stored ones; a weight is found with its scales.

        Raises:
            InputError: it has no scales, or they do not fit it.
        """
        weight = place.entry(files)
        if weight.dtype not in DTYPES:
            return weight
        name = next((own for own in _scales(place.name) if own in files), None)
        if name is None:
            raise self._error(f"{place.name} in {_word(weight.dtype)} without its scales {_scales(place.name)[0]}")
        whole = files[name]
        if whole.dtype not in SCALE_DTYPES:
            known = ", ".join(map(_word, SCALE_DTYPES))
            raise self._error(f"scales {name} of {_word(whole.dtype)}; they must be of {known}")
        misfit = f"scales {name} {list(whole.shape)}, which are not those of {place.name} {list(weight.shape)}"
        scales = Place(name)
        if place.slice is not None:
            layout, grid = place.slice.layout, whole.shape
            if layout.transposed or layout.interleaved or len(grid) != 3 or grid[0] != place.slice.shape[0]:
                raise self._error(f"experts of a layer in one tensor {place.name} in a layout that FP8 has not")
            if grid[1] % place.slice.count:
                raise self._error(misfit)
            scales = Place(name, replace(place.slice, shape=grid))
        own = scales.entry(files)
        block = self._block(weight.shape, own.shape)
        if block is None:
            raise self._error(misfit)
        if place.slice is not None and not self._fits_parts(weight.shape[0], own.shape[0], place.slice.count):
            raise self._error(f"{misfit}: a block is of two parts of an expert")
        return ScaledEntry.of(weight, self.dtype, own, str(scales), block)

    def products(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return stored tensors as they are read, without scales.

        Raises:
            InputError: a weight has no scales, or they do not fit it.
        """
        files = {name: Entry(self.place, one.dtype, tuple(one.shape), 0, one.nbytes) for name, one in tensors.items()}
        scales, found = self.companions(files), {}
        for name in tensors.keys() - scales.keys():
            found[name], entry = tensors[name], self.entry(Place(name), files)
            if isinstance(entry, ScaledEntry):
                found[name] = dequantised(tensors[name], tensors[entry.scales_name], entry.block, self.dtype)
        return found

    def _error(self, found: str) -> InputError:
        return InputError(self.field, f"{self.place} holds {found}")

    def _fits_parts(self, rows: int, scales: int, count: int) -> bool:
        """Return whether blocks of rows end where parts of an expert do, of which there are `count` in a tensor, each
        with so many rows of weights and of scales: blocks of the config's size, or else equal parts."""
        size = self.config.weight_block_size
        if count == 1:
            return True
        if size and scales * count == -(-rows * count // size[0]):
            return rows % size[0] == 0
        return rows % scales == 0

    def _block(self, shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int] | None:
        """Return the rows and columns of a weight that have one scale: the config's, where the number of scales is that
        of such blocks, or else equal parts; None where there is neither."""
        grid = (1, 1) if grid in ((), (1,)) else grid
        if len(shape) != 2 or len(grid) != 2 or 0 in (*shape, *grid):
            return None
        size = self.config.weight_block_size
        if size and grid == (-(-shape[0] // size[0]), -(-shape[1] // size[1])):
            return min(size[0], shape[0]), min(size[1], shape[1])
        if shape[0] % grid[0] or shape[1] % grid[1]:
            return None
        return shape[0] // grid[0], shape[1] // grid[1]


def names_of_scales(weight: str) -> tuple[str, str]:
    """Return the names, in the model, of the scales of a weight and of those for its inputs."""
    return f"{weight}_scale_inv", f"{weight.removesuffix('weight')}{OF_INPUTS[0]}"


def written_dtype(stated: Any) -> torch.dtype:
    """Return the dtype in which weights are read of a config that states one; bfloat16 where it states none."""
    return stated if stated in WRITTEN else torch.bfloat16


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scales(weight: str) -> tuple[str, ...]:
    """Return the names that the scales of a stored weight may have."""
    module = weight.removesuffix(".weight")
    return (f"{weight}_scale_inv",) if module == weight else tuple(f"{module}.{leaf}" for leaf in SCALES)


def _scales_of_inputs(weight: str) -> tuple[str, ...]:
    """Return the names that scales for the inputs of a stored weight may have."""
    module = weight.removesuffix(".weight")
    joint = "_" if module == weight else "."
    return tuple(f"{module}{joint}{leaf}" for leaf in OF_INPUTS)

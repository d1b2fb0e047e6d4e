"""The recipe of `shardprune export`."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from shardprune.errors import InputError
from shardprune.recipes.groups import check_survives_ray_job
from shardprune.recipes.settings import Settings, optional
from shardprune.storage.locations import refuse_hub

LOSSLESS = ("sparse", "semi-structured")  # formats that lead back to the checkpoint
CONVERTED = ("gguf", "ctranslate2", "openvino")  # formats that a converter writes, a program of another project


class ExportFields(Settings):
    """Destination and form of an export."""

    title: ClassVar[str] = "Output"

    to: str = Field(min_length=1, description="Directory or URL to write")
    format: Literal["sparse", "semi-structured", "gguf", "ctranslate2", "openvino", "torchao"] = Field(
        "sparse",
        description="sparse: mask and values; semi-structured: 2:4, for torch's kernels when loaded; gguf (llama.cpp), "
        "ctranslate2, openvino: by their converters; torchao: int8 weights for transformers",
    )
    compression: Literal["none", "zstd"] = Field("none", description="Compression of mask and values")
    dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = Field(
        "auto", description="Numbers of the weights that a converter writes; auto: as in the checkpoint"
    )
    converter: str | None = optional(
        "the one on PATH",
        "Program that converts: convert_hf_to_gguf.py of llama.cpp, ct2-transformers-converter or optimum-cli",
        min_length=1,
    )
    restore: bool = Field(False, description="Write the checkpoint that an export was made of, to the bit")


class ExportRecipe(ExportFields):
    """The recipe of `shardprune export`."""

    command: ClassVar[str] = "export"

    model: str = Field(min_length=1, description="Checkpoint: directory, URL or hub name; with --restore an export")

    @model_validator(mode="after")
    def _fits(self) -> "ExportRecipe":
        check_survives_ray_job("to", self.to)
        refuse_hub(self.to, "to")
        if self.restore:
            for name in ("format", "compression"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise InputError(name, f"{getattr(self, name)!r} has no effect with restore")
        self.needs(f"format {' or '.join(LOSSLESS)}", self.format in LOSSLESS, "compression")
        self.needs(f"format {', '.join(CONVERTED)}", self.format in CONVERTED, "dtype", "converter")
        return self

"""The recipe of `shardprune export`."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from shardprune.errors import InputError
from shardprune.recipes.groups import check_survives_ray_job
from shardprune.recipes.settings import Settings
from shardprune.storage.locations import refuse_hub

Format = Literal["sparse", "semi-structured"]


class ExportFields(Settings):
    """Destination and form of an export."""

    title: ClassVar[str] = "Output"

    to: str = Field(min_length=1, description="Directory or URL to write")
    format: Format = Field(
        "sparse", description="sparse: mask and values; semi-structured: 2:4, for torch's kernels when loaded"
    )
    compression: Literal["none", "zstd"] = Field("none", description="Compression of mask and values")
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
        return self

"""The container in which processes of a job run on its nodes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

FORMS = ("apptainer", "pyxis")
USE = "use apptainer:IMAGE or pyxis:IMAGE"
# A comma or a colon would begin another mount, or its place inside.
MOUNT = re.compile(r"/[^,:]*(?::/[^,:]*(?::(?:ro|rw))?)?")
MOUNT_FORMS = "use /DIR, /DIR:/INSIDE or /DIR:/INSIDE:ro, without further commas and colons"


@dataclass(frozen=True)
class Container:
    """An image, and the directories of the nodes that are seen inside.

    Attributes:
        form: `apptainer`, a program that runs a command in an image, or `pyxis`, a plugin of Slurm that gives srun
            options to do that with Enroot.
        image: whatever that form takes: a file, or an address in a registry.
        mounts: as MOUNT has them.
    """

    form: str
    image: str
    mounts: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, mounts: Sequence[str] = ()) -> "Container":
        """Return the container of FORM:IMAGE.

        Raises:
            ValueError: the form is unknown, or there is no image.
        """
        form, _, image = text.partition(":")
        if form not in FORMS or not image.strip():
            raise ValueError(USE)
        return cls(form, image, tuple(mounts))

    def srun_options(self, folder: str) -> list[str]:
        """Return what srun is given, for a command that runs in a directory which is one of the mounts."""
        if self.form == "apptainer":
            return []
        mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in self.mounts)
        return [f"--container-image={self.image}", f"--container-mounts={mounts}", f"--container-workdir={folder}"]

    def around(self, command: Sequence[str], folder: str, gpus: bool) -> list[str]:
        """Return what srun is to run for a command."""
        if self.form == "pyxis":  # its image says whether GPUs are seen, as NVIDIA's and PyTorch's do
            return [*command]
        options = [*(["--nv"] if gpus else []), *(f"--bind={mount}" for mount in self.mounts), f"--pwd={folder}"]
        return ["apptainer", "exec", *options, self.image, *command]

"""Converters: programs of other projects that write a local checkpoint in an engine's own format.

Each runs as a process of its own, in whatever environment it is installed in: their requirements need not fit ours.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardprune.errors import ConversionError, InputError, first_line
from shardprune.model.config_file import shortened


@dataclass(frozen=True)
class Converter:
    """A converter.

    Attributes:
        programs: names that it is installed under, in the order they are looked for.
        dtypes: its own names of the number formats that it writes.
        arguments: its arguments after the program, from the checkpoint's folder, the folder to write and a number
            format by its own name.
        made: the file in that folder without which it has not succeeded.
        remedy: the way to get it.
    """

    programs: tuple[str, ...]
    dtypes: dict[str, str]
    arguments: Callable[[Path, Path, str], list[str]]
    made: str
    remedy: str


GGUF = "model.gguf"

CONVERTERS = {
    "gguf": Converter(
        ("convert_hf_to_gguf.py", "convert-hf-to-gguf", "convert_hf_to_gguf"),
        {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "q8_0"},
        lambda source, to, dtype: [f"{source}", "--outfile", f"{to / GGUF}", "--outtype", dtype],
        GGUF,
        "give --converter llama.cpp/convert_hf_to_gguf.py, and pip install 'shardprune[gguf]'",
    ),
    "ctranslate2": Converter(
        ("ct2-transformers-converter",),
        {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int8": "int8"},
        lambda source, to, dtype: ["--model", f"{source}", "--output_dir", f"{to}", "--force", "--quantization", dtype],
        "model.bin",
        "pip install 'shardprune[ctranslate2]'",
    ),
    "openvino": Converter(
        ("optimum-cli",),
        {"float32": "fp32", "float16": "fp16", "int8": "int8"},
        lambda source, to, dtype: [
            *("export", "openvino", "--model", f"{source}", "--task", "text-generation-with-past"),
            *("--weight-format", dtype, f"{to}"),
        ],
        "openvino_model.xml",
        "pip install 'optimum-intel[openvino]' in an environment of its own, and give --converter ENV/bin/optimum-cli",
    ),
}


def program_of(format: str, given: str | None) -> list[str]:
    """Return the words that start a format's converter: the program given, or the one beside this Python or on PATH.

    A program given that ends in .py runs in this Python.

    Raises:
        InputError: there is none, or the one given cannot be run.
    """
    if given is not None:
        place = Path(given).absolute()
        if not place.is_file():
            raise InputError("converter", f"{given!r} is no file; give the converter's program")
        if place.suffix == ".py":
            return [sys.executable, str(place)]
        if not os.access(place, os.X_OK):
            raise InputError("converter", f"{given!r} cannot be run; give a program, or a file that ends in .py")
        return [str(place)]
    converter = CONVERTERS[format]
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    for name in converter.programs:
        if found := shutil.which(name, path=search):
            return [found]
    raise InputError("format", f"{format!r} needs {converter.programs[0]}: {converter.remedy}")


def dtype_of(format: str, dtype: str, checkpoint: str) -> str:
    """Return the number format to write, by its name in torch.

    Args:
        dtype: of the recipe; `auto` is the checkpoint's.
        checkpoint: number format of the checkpoint's weights.

    Raises:
        InputError: the converter does not write it.
    """
    wanted, known = checkpoint if dtype == "auto" else dtype, CONVERTERS[format].dtypes
    if wanted not in known:
        shown = f"'auto' is {wanted} here, which" if dtype == "auto" else repr(wanted)
        raise InputError("dtype", f"{shown} is not written as {format}; use one of {', '.join(known)}")
    return wanted


def run_converter(program: list[str], format: str, source: Path, to: Path, dtype: str) -> None:
    """Convert a checkpoint.

    Args:
        program: words that start the converter.
        source: folder of the checkpoint.
        to: empty folder to write.
        dtype: number format by its name in torch.

    Raises:
        ConversionError: the converter ends with an error, or without its file.
    """
    converter = CONVERTERS[format]
    words = [*program, *converter.arguments(source, to, converter.dtypes[dtype])]
    # It has all that it needs: one that asked the hub for more would depend on a network and on another's files.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    except OSError as error:
        raise ConversionError(f"{program[-1]} cannot be run: {first_line(error)}") from error
    said = [line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    if done.returncode:
        reason = shortened(said[-1]) if said else "no reason given"
        raise ConversionError(f"{Path(program[-1]).name} ended with code {done.returncode}: {reason}")
    made = to / converter.made
    if not made.is_file() or not made.stat().st_size:
        raise ConversionError(f"{Path(program[-1]).name} ended without writing {converter.made}")

"""The kinds of input: which file or option is changed, in which way, and which commands read it."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from shardprune.cli import app
from tests.fuzz import mutations, tensor_mutations, yaml_mutations
from tests.fuzz.commands import COMMANDS, CONFIG_READERS, HEADER_READERS, TEXTS, Command
from tests.fuzz.odd_words import ODD_NAMES, ODD_WORDS

Change = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Input:
    """An input in a folder of its own, and the command that is given it."""

    words: list[str]
    command: Command


Build = Callable[[Path, Path, random.Random], Input]  # of material and folder
WELL_FORMED = "well-formed"  # the kind of inputs that nothing is wrong with: every command in turn


def well_formed(material: Path, folder: Path, number: int) -> Input:
    """The material as it is, which the command must take."""
    command = list(COMMANDS.values())[number % len(COMMANDS)]
    _copied(material, folder, command.needs)
    return Input(list(command.words), command)


def _copied(material: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        source, target = material / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, target)


def _changed(file: str, change: Change, *names: str, base: str = "") -> Build:
    """Input in which one file is changed; `base` is the file whose content it has before, if it is not there."""

    def build(material: Path, folder: Path, draw: random.Random) -> Input:
        command = COMMANDS[draw.choice(names)]
        _copied(material, folder, command.needs)
        # A command may read the file under another model's name.
        place = folder / file
        if not place.parent.exists():
            place = folder / command.needs[0] / place.name
        content = (material / (base or file)).read_bytes()
        place.write_bytes(change(content, draw))
        return Input(list(command.words), command)

    return build


def _layer(change: Change) -> Build:
    """Input in which the finished layer of an unfinished run is changed."""

    def build(material: Path, folder: Path, draw: random.Random) -> Input:
        command = COMMANDS["prune again"]
        _copied(material, folder, command.needs)
        place = next(path for path in sorted((folder / "half").glob("model-*")))
        place.write_bytes(change(place.read_bytes(), draw))
        return Input(list(command.words), command)

    return build


def _record(content: bytes, draw: random.Random) -> bytes:
    """Change the record in a layer file's header."""
    size = int.from_bytes(content[:8], "little")
    tree = mutations.parsed(content[8 : 8 + size].decode())
    metadata = next(value for name, value in tree if name == "__metadata__")
    at = next(at for at, (name, _) in enumerate(metadata) if name == "shardprune")
    record = mutations.json_file(metadata[at][1].encode(), draw).decode(errors="replace")
    metadata[at] = ("shardprune", record)
    header = mutations.written(tree).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _damaged_output(material: Path, folder: Path, draw: random.Random) -> Input:
    """A finished output of which a file is gone, cut, changed, or another one."""
    name = draw.choice(("prune finished", "check"))
    command = COMMANDS[name]
    _copied(material, folder, command.needs)
    free = ("README.md", "report.html", "events.jsonl")  # of which nothing is made, and which anybody may change
    files = sorted(path for path in (folder / "pruned").iterdir() if path.name not in free)
    place = draw.choice(files)
    kind = draw.random()
    if kind < 0.4:
        place.unlink()
    elif kind < 0.6:
        place.write_bytes(place.read_bytes()[: draw.randrange(place.stat().st_size)])
    elif name == "prune finished" and place.name == "result.json":  # which nothing but a new count can doubt
        place.write_bytes(place.read_bytes()[:-9])
    elif name == "prune finished" and place.suffix == ".safetensors":  # whose weights are not read for that
        place.write_bytes(tensor_mutations.safetensors_header(place.read_bytes(), draw))
    elif place.suffix == ".safetensors":
        change = draw.choice((tensor_mutations.safetensors_data, tensor_mutations.safetensors_header))
        place.write_bytes(change(place.read_bytes(), draw))
    elif place.suffix == ".json":
        content = place.read_bytes()
        changed = mutations.json_file(content, draw)
        while place.name == "result.json" and not _can_be_doubted(content, changed):
            changed = mutations.json_file(content, draw)
        place.write_bytes(changed)
    else:
        place.unlink()
        place.mkdir()
    return Input(list(command.words), command)


# Fields of result.json that say nothing about the model: nothing else tells what they were.
MEASURED = {"version", "recipe", "calibration", "perplexity", "seconds", "workers", "restarts"}


def _can_be_doubted(before: bytes, after: bytes) -> bool:
    """Whether a result says something about its model that can be found to be wrong."""
    try:
        values, given = json.loads(after), json.loads(before)
    except (ValueError, RecursionError):
        return True
    if not isinstance(values, dict):
        return True
    return any(values.get(name) != given.get(name) for name in (values.keys() | given.keys()) - MEASURED)


def _special_file(material: Path, folder: Path, draw: random.Random) -> Input:
    """In the place of a file a pipe, a device, a folder, or a link to itself, out of the folder, or to nothing."""
    places = {
        "prune": ("tokens.npy", "model/config.json", "model/model.safetensors", "model/generation_config.json"),
        "prune on text": ("text.txt", "model/tokenizer.json", "model/tokenizer_config.json"),
        "prune on lines": ("documents.jsonl",),
        "prune sharded": ("sharded/model.safetensors.index.json", "tokens.npy"),
        "prune again": ("half/run.json", "half/events.jsonl", "half/model-00002-of-00003.safetensors"),
        "prune a recipe": ("prune.yaml",),
        "recover with settings": ("deepspeed.json", "documents.jsonl"),
        "status": ("half/run.json", "half/events.jsonl"),
        "report": ("measured/result.json", "measured/events.jsonl"),
        "evaluate a result": ("measured/result.json",),
        "plan": ("model/config.json",),
    }
    name = draw.choice(sorted(places))
    command = COMMANDS[name]
    _copied(material, folder, command.needs)
    place = folder / draw.choice(places[name])
    place.unlink()
    kind = draw.choice(("pipe", "zero", "null", "folder", "itself", "nothing", "locked"))
    if kind == "pipe":
        os.mkfifo(place)
    elif kind in ("zero", "null"):
        place.symlink_to(f"/dev/{kind}")
    elif kind == "folder":
        place.mkdir()
    elif kind == "itself":
        place.symlink_to(place.name)
    else:
        place.symlink_to("/no/such/file" if kind == "nothing" else "/proc/self/mem")
    return Input(list(command.words), command)


TRACKED = "tensorboard:logs"


def _odd_name(material: Path, folder: Path, draw: random.Random) -> Input:
    """An odd name or URL in the place of a model, an output or a text."""
    name = draw.choice(
        (
            "prune",
            "plan",
            "evaluate",
            "mop",
            "rebuild",
            "recover",
            "recover, watched",
            "status",
            "report",
            "compare",
            "prune a recipe",
            "slurm",
        )
    )
    command = COMMANDS[name]
    _copied(material, folder, command.needs)
    words = list(command.words)
    known = {
        "model",
        "pruned",
        "out",
        "tokens.npy",
        "half",
        "measured",
        "documents.jsonl",
        "prune.yaml",
        "job.yaml",
        "c.html",
        TRACKED,
    }
    at = draw.choice([at for at, word in enumerate(words) if word in known])
    odd_name = draw.choice(ODD_NAMES)
    if draw.random() < 0.3 and words[at] in ("tokens.npy", "documents.jsonl"):
        odd_name += draw.choice((".npy", ".txt", ".jsonl", ".jsonl:text"))
    possible = "/" not in odd_name and odd_name.strip(". ") and len(os.fsencode(odd_name)) < 200
    if draw.random() < 0.15 and possible and (folder / words[at]).exists() and not os.path.lexists(folder / odd_name):
        # A file that is there, under an odd name.
        (folder / words[at]).rename(folder / odd_name)
    words[at] = f"{TRACKED.partition(':')[0]}:{odd_name}" if words[at] == TRACKED else odd_name
    return Input(words, Command(command.words, command.needs))


# With these Ray starts, a compiler does, a script is submitted, or what is tried is not the option.
UNTRIED = {"backend", "address", "offload", "submit", "help", "out", "script"}


def _odd_option(material: Path, folder: Path, draw: random.Random) -> Input:
    """One or two options with odd values."""
    name = draw.choice(
        (
            "prune",
            "plan",
            "evaluate",
            "mop",
            "rebuild",
            "recover",
            "slurm",
            "prune a recipe",
            "pipeline",
            "evaluate tasks",
        )
    )
    command = COMMANDS[name]
    _copied(material, folder, (*command.needs, *(text for text in TEXTS if text not in command.needs)))
    parameters = typer.main.get_command(app).commands[command.words[0]].params  # type: ignore[attr-defined]
    options = [found for found in parameters if found.param_type_name == "option" and found.name not in UNTRIED]
    words = list(command.words)
    for option in draw.sample(options, draw.choice((1, 1, 2))):
        words.append(draw.choice([word for word in (*option.opts, *option.secondary_opts) if word.startswith("--")]))
        if not option.is_flag:
            words.append(draw.choice(ODD_WORDS))
    return Input(words, Command(command.words, command.needs))


def _beside(material: Path, folder: Path, draw: random.Random) -> Input:
    """A checkpoint with more files beside it than it needs, or fewer."""
    name = draw.choice(("prune", "prune sharded", "evaluate", "plan"))
    command = COMMANDS[name]
    _copied(material, folder, command.needs)
    model = folder / command.needs[0]
    kind = draw.randrange(8)
    if kind == 0:  # another model's index beside the one file
        shutil.copyfile(material / "sharded/model.safetensors.index.json", model / "model.safetensors.index.json")
    elif kind == 1:
        for path in (material / "pruned").glob("model*"):
            shutil.copyfile(path, model / path.name)
    elif kind == 2:
        shutil.copyfile(material / "model/model.safetensors", model / "model.safetensors")
    elif kind == 3:
        (model / "adapter_config.json").write_bytes(
            mutations.json_file((material / "adapter_config.json").read_bytes(), draw)
        )
    elif kind == 4:
        (model / "my_hf_token.txt").write_text("SECRET")
        (model / "tokenizer.extra.txt").symlink_to("/proc/self/environ")
    elif kind == 5:
        draw.choice(sorted(model.iterdir())).unlink()
    elif kind == 6:
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch owned'\ntR.")
    else:
        (model / "modeling_own.py").write_text("open('owned', 'w')")
        (model / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('touch owned') }}")
    return Input(list(command.words), command)


EXPORTED = "exported/sparse-model-00002-of-00003.safetensors"
KINDS: dict[str, Build] = {
    "config": _changed("model/config.json", mutations.json_file, *CONFIG_READERS),
    "config of a mixture": _changed(
        "mixture/config.json", mutations.json_file, "experts", "prune a mixture", "plan a mixture"
    ),
    "data of a mixture": _changed(
        "mixture/model.safetensors", tensor_mutations.safetensors_data, "experts", "prune a mixture"
    ),
    "index": _changed(
        "sharded/model.safetensors.index.json", mutations.json_file, "prune sharded", "plan sharded", "evaluate sharded"
    ),
    "generation config": _changed("model/generation_config.json", mutations.json_file, "prune", "evaluate", "mop"),
    "tokenizer": _changed("model/tokenizer.json", mutations.json_file, "prune on text", "evaluate on text", "prune"),
    "tokenizer config": _changed(
        "model/tokenizer_config.json", mutations.json_file, "prune on text", "evaluate on text", "prune"
    ),
    "files beside": _beside,
    "safetensors header": _changed("model/model.safetensors", tensor_mutations.safetensors_header, *HEADER_READERS),
    "safetensors data": _changed("model/model.safetensors", tensor_mutations.safetensors_data, *HEADER_READERS),
    "statistics of experts": _changed("fewer/experts.json", mutations.json_file, "experts by statistics"),
    "export.json": _changed("exported/export.json", mutations.json_file, "restore"),
    "index of an export": _changed("exported/sparse-model.safetensors.index.json", mutations.json_file, "restore"),
    "export header": _changed(EXPORTED, tensor_mutations.safetensors_header, "restore"),
    "export data": _changed(EXPORTED, tensor_mutations.safetensors_data, "restore"),
    "npy": _changed("tokens.npy", tensor_mutations.npy_file, "prune", "evaluate", "recover on ids", "mop"),
    "text": _changed("text.txt", mutations.text_file, "prune on text", "evaluate on text", "recover on text"),
    "json lines": _changed("documents.jsonl", mutations.json_lines, "prune on lines", "evaluate on lines", "recover"),
    "instructions": _changed("instructions.json", mutations.json_file, "recover on instructions"),
    "instruction lines": _changed("instructions.jsonl", mutations.json_lines, "recover on instruction lines"),
    "DeepSpeed settings": _changed("deepspeed.json", mutations.json_file, "recover with settings"),
    "recipe": _changed("prune.yaml", yaml_mutations.yaml_file, "prune a recipe", "plan a recipe"),
    "recipe of a job": _changed("job.yaml", yaml_mutations.yaml_file, "slurm"),
    "recipe of mop": _changed("mop.yaml", yaml_mutations.yaml_file, "mop a recipe"),
    "recipe of recover": _changed("recover.yaml", yaml_mutations.yaml_file, "recover a recipe"),
    "recipe of evaluate": _changed("evaluate.yaml", yaml_mutations.yaml_file, "evaluate a recipe"),
    "recipe of pipeline": _changed("pipeline.yaml", yaml_mutations.yaml_file, "pipeline"),
    "run.json": _changed(
        "half/run.json", mutations.json_file, "prune again", "prune again", "status", "check an unfinished run"
    ),
    "result.json": _changed(
        "measured/result.json",
        mutations.json_file,
        "status finished",
        "report",
        "compare",
        "evaluate a result",
        "check a result",
    ),
    "result.json of mop": _changed("mopped/result.json", mutations.json_file, "report of a search"),
    "layer record": _layer(_record),
    "layer data": _layer(tensor_mutations.safetensors_data),
    "layer header": _layer(tensor_mutations.safetensors_header),
    "events": _changed("half/events.jsonl", mutations.json_lines, "prune again", "status"),
    "events of a result": _changed(
        "measured/events.jsonl", mutations.json_lines, "report", "status finished", "compare"
    ),
    "finished output": _damaged_output,
    "task": _changed("tasks/pairs.yaml", yaml_mutations.yaml_file, "evaluate tasks"),
    "task data": _changed("tasks/pairs.jsonl", mutations.json_lines, "evaluate tasks"),
    "special file": _special_file,
    "name or URL": _odd_name,
    "option": _odd_option,
}
HEAVY = {"task", "task data"}  # kinds whose commands import lm-eval

"""`shardprune check`: outputs damaged by hand, of which each is found and named."""

import io
import json
import os
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from shardprune.cli import carry_out, main
from shardprune.commands.check import check
from shardprune.errors import InputError
from tests.commands.test_damaged_outputs import FRAME, INDEX, LAYER, PROJECTION, rewritten
from tests.support.running import run, search_run
from tests.support.tiny import make_model
from tests.support.words import words_tokenizer


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Outputs of a model with a tokenizer: half its weights zero, 2:4, a composite, a search that kept an iteration."""
    from tests.support.tiny import make_tokens

    folder = tmp_path_factory.mktemp("outputs")
    words_tokenizer().save_pretrained(folder / "model")
    make_model(folder / "model", "llama-3.1")
    make_tokens(folder / "tokens.npy")
    run(folder, "half", sparsity=0.5)
    run(folder, "two-four", pattern="2:4")
    run(folder, "composite", structured=0.3, sparsity=0.5)
    search_run(folder, "search", path="LG", remove=0.3, depth_rule="third-last", keep="1")
    return folder


WHOLE = ("half", "two-four", "composite", "search")


def lines_of(out):
    return [line for verdict in check(str(out)) for line in verdict.lines]


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_output_is_one_line(outputs, name):
    (line,) = lines_of(outputs / name)
    assert line.startswith(f"{outputs / name} is whole: ")


def test_an_output_in_memory(outputs):
    import fsspec

    fsspec.filesystem("memory").put(str(outputs / "half"), "/checked", recursive=True)
    (line,) = lines_of("memory://checked")
    assert line.startswith("memory://checked is whole: 39 tensors, ")
    assert line.endswith("50.0000% of the projections' weights are zero")


# -- damages --------------------------------------------------------------------------------------------------------


def removed(name):
    return lambda out: (out / name).unlink()


def edited(name, **fields):
    """A JSON file with other values of some fields."""

    def edit(out):
        content = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps(content | fields))

    return edit


def in_result(change):
    def edit(out):
        content = json.loads((out / "result.json").read_text())
        change(content)
        (out / "result.json").write_text(json.dumps(content))

    return edit


def flipped(name, place):
    """One bit of a file's data, from its end."""

    def flip(out):
        content = bytearray((out / name).read_bytes())
        content[place] ^= 16
        (out / name).write_bytes(content)

    return flip


def changed(change, name=LAYER):
    return lambda out: rewritten(out / name, change)


def half_filled(tensors, _):
    tensors[PROJECTION][:, :2] = 1.0


def index_without(out):
    content = json.loads((out / INDEX).read_text())
    del content["weight_map"][PROJECTION]
    (out / INDEX).write_text(json.dumps(content))


def swapped(out):
    a, b = out / LAYER, out / "model-00004-of-00005.safetensors"
    a.rename(out / "x")
    b.rename(a)
    (out / "x").rename(b)


def stated_zeros(tensors, metadata):
    record = json.loads(metadata["shardprune"])
    record["projections"][0]["zeros"] -= 1
    metadata["shardprune"] = json.dumps(record)


def sealed_again(change):
    """A layer file whose data, digests and seal all agree, and whose manifest does not know it: as a forger would."""
    from safetensors.torch import load_file, save_file

    from shardprune.storage.digests import tensor_digest
    from shardprune.storage.folder import Folder
    from shardprune.storage.manifest import manifest_of
    from shardprune.storage.seals import read_sealed, sealed

    def forge(out):
        _, record, _ = read_sealed(Folder(str(out), "out"), LAYER)
        tensors = load_file(out / LAYER)
        change(tensors, record)
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        save_file(tensors, out / LAYER, {"format": "pt", **sealed(record, digests, shapes)})
        files = manifest_of(Folder(str(out), "out"), [LAYER])
        in_result(lambda content: content["files"].update({LAYER: files[LAYER].model_dump()}))(out)

    return forge


def one_zero_less(tensors, record):
    weight = tensors[PROJECTION].view(-1)
    weight[int((weight == 0).nonzero()[0])] = 1.0


def infinite(tensors, record):
    weight = tensors[PROJECTION].view(-1)
    weight[int((weight != 0).nonzero()[0])] = torch.inf


def another_run(tensors, record):
    record["fingerprint"] = "0" * 64


BITS = "model-00005-of-00005.safetensors"
DAMAGES = {
    "layer removed": ("half", removed(LAYER), f"{LAYER} is missing"),
    "frame removed": ("half", removed(FRAME), f"{FRAME} is missing"),
    "index removed": ("half", removed(INDEX), f"{INDEX} is missing"),
    "config removed": ("half", removed("config.json"), "config.json is missing"),
    "tokenizer removed": ("half", removed("tokenizer.json"), "tokenizer.json is missing"),
    "layer cut": ("half", lambda out: os.truncate(out / LAYER, 9000), f"{LAYER} has 9,000 bytes and had "),
    "bit of a layer": ("half", flipped(BITS, -1), f"{BITS}: model.layers.3.* is not what was written"),
    "bit of the embedding": ("half", flipped(FRAME, -9000), f"{FRAME}: .* is not what was written"),
    "bit of a header": ("half", flipped(LAYER, 200), f"{LAYER} is not what was written"),
    "other weights": ("half", changed(half_filled), f"{LAYER}: {PROJECTION} is not what was written"),
    "other dtype": (
        "half",
        changed(lambda tensors, _: tensors.update({PROJECTION: tensors[PROJECTION].bfloat16()})),
        f"{LAYER} has another header than was written",
    ),
    "a tensor too few": (
        "half",
        changed(lambda tensors, _: tensors.pop(PROJECTION)),
        f"{INDEX} places {PROJECTION} in {LAYER}",
    ),
    "two layers swapped": ("half", swapped, f"{INDEX} places .* in .*, which has no such tensor"),
    "index without a tensor": ("half", index_without, f"{INDEX} (has .* bytes and had|is not what was written)"),
    "config of another shape": ("half", edited("config.json", intermediate_size=40), "the config implies"),
    "a stated number of zeros": ("half", changed(stated_zeros), f"{LAYER} has another header than was written"),
    "a file too many": (
        "half",
        lambda out: shutil.copy(out / LAYER, out / "extra.safetensors"),
        "extra.safetensors belongs to no part of the model",
    ),
    "result without a name": ("half", in_result(lambda content: content.pop("command")), "result.json is no result"),
    "achieved sparsity": (
        "half",
        in_result(lambda content: content["sparsity"].update(achieved=0.6)),
        "result.json says 0.6 of the sparsity that was achieved, and it is 0.5",
    ),
    "sparsity of a layer": (
        "half",
        in_result(lambda content: content["sparsity"]["layers"][2].update(achieved=0.4)),
        "result.json says 0.4 of the sparsity of layer 2, and it is 0.5",
    ),
    "number of parameters": (
        "composite",
        in_result(lambda content: content["model"].update(parameters_after=7)),
        "result.json says 7 of the parameters after",
    ),
    "shape after": (
        "search",
        in_result(lambda content: content["structure"]["after"].update(layers=4)),
        "result.json says another shape of the model than its config",
    ),
    "a kept iteration cut": (
        "search",
        lambda out: os.truncate(out / "iteration-01" / "model-00002-of-00004.safetensors", 5000),
        "iteration-01/model-00002-of-00004.safetensors has 5,000 bytes",
    ),
    "a zero gone, sealed again": (
        "half",
        sealed_again(one_zero_less),
        f"{PROJECTION} has .* zeros, and its record says",
    ),
    "broken 2:4, sealed again": (
        "two-four",
        sealed_again(half_filled),
        f"{PROJECTION} has .* groups of weights that are not 2:4",
    ),
    "infinite, sealed again": (
        "half",
        sealed_again(infinite),
        f"{PROJECTION} has 1 elements that are infinite or no number",
    ),
    "of another run, sealed again": ("half", sealed_again(another_run), f"{LAYER} belongs to another run"),
    "cut off": (
        "half",
        lambda out: (out / "result.json").rename(out / "run.json"),
        "run.json is there: the run is not finished; the same command goes on",
    ),
}


@pytest.fixture(scope="module")
def printed(outputs, tmp_path_factory):
    """What the command prints of each damaged output, lines of `OUT`, and its exit code."""
    found = {}
    for name, (whole, damage, _) in DAMAGES.items():
        out = shutil.copytree(outputs / whole, tmp_path_factory.mktemp("damaged") / "out")
        damage(out)
        with redirect_stdout(io.StringIO()) as text:
            code = carry_out(["check", str(out)])
        found[name] = [line.replace(str(out), "OUT") for line in text.getvalue().splitlines()], code
    return found


def naming(name, lines):
    """The lines that name a damage."""
    return [line for line in lines if re.search(DAMAGES[name][2], line)]


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(printed, name):
    lines, code = printed[name]
    assert all(line.startswith("OUT") for line in lines)
    assert naming(name, lines), lines
    assert code == 1


def test_the_table_of_the_page_is_what_is_printed(printed):
    """But for sizes of files, in whose headers the digits of floats differ from machine to machine."""
    rows = ["| damage | line | exit code |", "|---|---|---|"]
    rows += [
        f"| {name} | `{naming(name, lines)[0].removeprefix('OUT: ')}` | {code} |"
        for name, (lines, code) in printed.items()
    ]
    page = (Path(__file__).parents[2] / "docs" / "failures.md").read_text()
    assert _without_sizes("\n".join(rows)) in _without_sizes(page), "\n".join(rows)


def _without_sizes(text):
    return re.sub(r"[\d,]+ bytes and had [\d,]+", "sizes", text)


def test_the_command(outputs, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", str(outputs / "half")])
    assert ended.value.code == 0
    out = shutil.copytree(outputs / "half", tmp_path / "out")
    (out / LAYER).unlink()
    with pytest.raises(SystemExit) as ended:
        main(["check", str(out)])
    assert ended.value.code == 1
    whole, *faults = capsys.readouterr().out.splitlines()
    assert whole.startswith(f"{outputs / 'half'} is whole")
    assert faults[0] == f"{out}: {LAYER} is missing"


@pytest.mark.parametrize("place", ["nowhere", "model"])
def test_what_is_no_output_is_refused(outputs, place):
    with pytest.raises(InputError, match="^out: .* holds no run that makes a model; give the output directory of one$"):
        check(str(outputs / place))

"""`shardprune export` into formats of engines: what converters get and leave, and the numbers that engines compute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shardprune
from shardprune.cli import main
from shardprune.commands import conversion as story
from shardprune.errors import ConversionError, InputError, StorageError
from shardprune.recipes.export import ExportRecipe
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from shardprune.storage.sealed_json import sealed_fields
from tests.support.converters import SCRIPT, gpt2_tokenizer, installed, llama_cpp, optimum_cli
from tests.support.running import run
from tests.support.tiny import CONFIGS, make_model, make_tokens, snapshot
from tests.support.words import words_tokenizer

# A program that is started as llama.cpp's converter is, and shows what it was given.
SHOWING = """
import json, os, sys
from pathlib import Path
source, to = Path(sys.argv[1]), Path(sys.argv[3])
print("a warning", file=sys.stderr)
sizes = {path.name: path.stat().st_size for path in source.iterdir()}
to.write_text(json.dumps([source.name, sizes, sys.argv[4:], os.environ["HF_HUB_OFFLINE"]]))
"""
# One that writes an engine's folder, with folders inside.
NESTING = """
import sys
from pathlib import Path
to = Path(sys.argv[sys.argv.index("--output_dir") + 1])
for name in ("model.bin", "additional_chat_templates/tool.jinja", "parts/deep/one.bin"):
    (to / name).parent.mkdir(parents=True, exist_ok=True)
    (to / name).write_text(name)
(to / "empty").mkdir()
"""
FAILING = """
import sys
from pathlib import Path
Path(sys.argv[3]).write_bytes(b"half")
print("converting")
raise NotImplementedError("the pre-tokenizer is unknown")
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """An output in float32 that lost structures and half of its weights, and a dense model in bfloat16."""
    folder = tmp_path_factory.mktemp("outputs")
    make_model(folder / "model", "llama")
    words_tokenizer().save_pretrained(folder / "model")
    make_tokens(folder / "tokens.npy")
    run(folder, "composite", structured=0.2, sparsity=0.5, method="magnitude", measure_error=False)
    (folder / "composite" / "LICENSE").write_text("the terms")
    (folder / "composite" / "additional_chat_templates").mkdir()
    (folder / "composite" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    make_model(folder / "bfloat16", "llama", torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    contents = {"showing.py": SHOWING, "nesting.py": NESTING, "failing.py": FAILING, "silent.py": ""}
    contents["wordy.py"] = "raise ValueError('no conversion of this; known are ' + 'x, ' * 1000)"
    for name, content in contents.items():
        (folder / name).write_text(content)
    return folder


def exported(source, to, format, **fields):
    recipe = ExportRecipe.checked({"model": str(source), "to": str(to), "format": format, **fields})
    return shardprune.export(recipe, Reporter(quiet=True))


def test_a_converter_gets_the_checkpoint_and_leaves_its_file(outputs, programs, tmp_path):
    (outputs / "composite" / "pytorch_model.bin").write_bytes(b"what the converter would take first")
    found = exported(outputs / "composite", tmp_path / "made", "gguf", converter=str(programs / "showing.py"))
    name, given, words, offline = json.loads((tmp_path / "made" / "model.gguf").read_text())
    assert (name, words, offline) == ("composite", ["--outtype", "f32"], "1")
    assert given.keys() >= {"config.json", "tokenizer.json", "README.md", "LICENSE", "model.safetensors.index.json"}
    assert not given.keys() & {"pytorch_model.bin", "result.json", "events.jsonl"}
    assert all(size == (outputs / "composite" / file).stat().st_size for file, size in given.items())
    assert set(os.listdir(tmp_path / "made")) == {"model.gguf", "LICENSE", "conversion.json"}
    weights = list((outputs / "composite").glob("*.safetensors"))
    assert found.bytes == sum(path.stat().st_size for path in weights)
    assert found.stored_bytes == sum((tmp_path / "made" / file).stat().st_size for file in ("model.gguf", "LICENSE"))


def test_the_same_command_finds_it_finished_and_others_are_refused(outputs, programs, tmp_path):
    place, showing = tmp_path / "made", str(programs / "showing.py")
    exported(outputs / "composite", place, "gguf", converter=showing)
    before = snapshot(place)
    exported(outputs / "composite", place, "gguf", converter=str(programs / "failing.py"))
    for model, dtype in (("composite", "float16"), ("bfloat16", "auto")):
        with pytest.raises(InputError, match="to: .* holds another conversion"):
            exported(outputs / model, place, "gguf", dtype=dtype, converter=showing)
    with pytest.raises(InputError, match="to: .* is not empty and holds no export"):
        exported(outputs / "composite", place, "sparse")
    with pytest.raises(InputError, match="model: .* from which no way leads back"):
        exported(place, tmp_path / "back", "sparse", restore=True)
    with pytest.raises(InputError, match="place: .* from which no way leads back"):
        shardprune.load_exported(str(place))
    assert snapshot(place) == before
    (place / "model.gguf").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"model\.gguf is not what was written"):
        exported(outputs / "composite", place, "gguf", converter=showing)
    for content in ("{", json.dumps(sealed_fields({"version": 2}))):
        (place / "conversion.json").write_text(content)
        with pytest.raises(InputError, match="is not empty and holds no conversion"):
            exported(outputs / "composite", place, "gguf", converter=showing)


def test_what_was_cut_off_is_made_again(outputs, programs, tmp_path, monkeypatch):
    showing = str(programs / "showing.py")
    exported(outputs / "composite", tmp_path / "whole", "gguf", converter=showing)

    def dying(program, format, source, to, dtype):
        (to / "model.gguf").write_bytes(b"half")
        os._exit(9)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(story, "run_converter", dying)
        exported(outputs / "composite", tmp_path / "cut", "gguf", converter=showing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "cut" / "model.gguf").exists()
    exported(outputs / "composite", tmp_path / "cut", "gguf", converter=showing)
    assert snapshot(tmp_path / "cut") == snapshot(tmp_path / "whole")


NESTED = {"model.bin", "additional_chat_templates/tool.jinja", "parts/deep/one.bin"}


@pytest.fixture
def memory(monkeypatch):
    """The file system in memory, with a folder /conversions that lasts as long as the test."""
    monkeypatch.setattr("shardprune.storage.owner.LOOK_SECONDS", 0.05)
    system = fsspec.filesystem("memory")
    system.makedirs("/conversions")
    yield system
    system.rm("/conversions", recursive=True)


def files_in(system, place):
    return {path.removeprefix(f"{place}/") for path in system.find(place)}


def test_folders_that_a_converter_leaves_are_put_too(outputs, programs, tmp_path, memory):
    nesting = str(programs / "nesting.py")
    for place, system, root in (
        (tmp_path / "made", fsspec.filesystem("file"), str(tmp_path / "made")),
        ("memory://conversions/made", memory, "/conversions/made"),
    ):
        found = exported(outputs / "composite", place, "ctranslate2", converter=nesting)
        assert found.files.keys() >= NESTED
        assert files_in(system, root) == {*found.files, "conversion.json"}
        assert all(system.cat(f"{root}/{name}") == name.encode() for name in NESTED)
        assert exported(outputs / "composite", place, "ctranslate2", converter=str(programs / "silent.py")) == found
        system.pipe(f"{root}/parts/deep/one.bin", b"cut")
        with pytest.raises(InputError, match=r"parts/deep/one\.bin is not what was written"):
            exported(outputs / "composite", place, "ctranslate2", converter=nesting)
    assert set(os.listdir(tmp_path / "made")) == {name.split("/")[0] for name in (*found.files, "conversion.json")}


def test_what_storage_refused_is_made_again_by_the_same_command(outputs, programs, tmp_path, memory, monkeypatch):
    nesting, place = str(programs / "nesting.py"), "memory://conversions/made"
    whole = exported(outputs / "composite", tmp_path / "whole", "ctranslate2", converter=nesting)
    write = Folder.write

    def full(folder, name, parts):
        if name == "model.bin" and not folder.local:
            raise StorageError("to", "the bucket is full")
        write(folder, name, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", full)
        with pytest.raises(StorageError, match="the bucket is full"):
            exported(outputs / "composite", place, "ctranslate2", converter=nesting)
    begun = files_in(memory, "/conversions/made")
    assert {"additional_chat_templates/tool.jinja", "conversion.json"} <= begun
    assert "model.bin" not in begun
    # A converter that fails then does not take the record from the files either.
    with pytest.raises(ConversionError):
        exported(outputs / "composite", place, "ctranslate2", converter=str(programs / "silent.py"))
    assert files_in(memory, "/conversions/made") == begun
    memory.pipe("/conversions/made/parts/deep/.one.bin.0123abcd.tmp", b"ha")
    assert exported(outputs / "composite", place, "ctranslate2", converter=nesting) == whole
    assert files_in(memory, "/conversions/made") == {*whole.files, "conversion.json"}


def test_a_local_file_that_cannot_be_put_is_one_line(outputs, programs, tmp_path, monkeypatch):
    place, nesting = tmp_path / "made", str(programs / "nesting.py")
    replace = os.replace

    def refusing(source, to):
        if Path(to).name == "one.bin":
            raise OSError(28, "No space left on device")
        replace(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refusing)
        with pytest.raises(StorageError, match=r"^to: .*/parts/deep/one\.bin cannot be written: .*No space left"):
            exported(outputs / "composite", place, "ctranslate2", converter=nesting)
    assert {"conversion.json", "model.bin"} <= set(os.listdir(place))
    assert not (place / "converting").exists()
    found = exported(outputs / "composite", place, "ctranslate2", converter=nesting)
    assert files_in(fsspec.filesystem("file"), str(place)) == {*found.files, "conversion.json"}
    assert (place / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"


def test_object_storage(outputs, programs, memory):
    memory.put(str(outputs / "composite"), "/conversions/model", recursive=True)
    exported("memory://conversions/model", "memory://conversions/made", "gguf", converter=f"{programs}/showing.py")
    name, given, *_ = json.loads(memory.cat("/conversions/made/model.gguf"))
    assert name == "model"
    assert given["config.json"] == (outputs / "composite" / "config.json").stat().st_size
    assert memory.exists("/conversions/made/conversion.json")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("failing.py", "failing.py ended with code 1: NotImplementedError: the pre-tokenizer is unknown"),
        (
            "wordy.py",
            "wordy.py ended with code 1: ValueError: no conversion of this; known are " + "x, " * 85 + "...",
        ),
        ("silent.py", "silent.py ended without writing model.gguf"),
    ],
)
def test_a_converter_that_fails_is_one_line_and_leaves_nothing(program, reason, outputs, programs, tmp_path, capsys):
    words = [outputs / "composite", "--to", tmp_path / "made", "--format", "gguf", "--converter", programs / program]
    assert said(capsys, 1, *words) == f"error: {reason}"
    assert list(tmp_path.iterdir()) == []


def said(capsys, code, *words):
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, words)])
    assert ended.value.code == code
    return capsys.readouterr().err.splitlines()[-1]


def test_bad_input_is_one_line_and_leaves_nothing(outputs, programs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing" / "python"))
    model, place = outputs / "composite", tmp_path / "made"
    (programs / "text").write_text("no program")
    refused = {
        "error: format: 'gguf' needs convert_hf_to_gguf.py: give --converter": ["--format", "gguf"],
        "error: format: 'ctranslate2' needs ct2-transformers-converter: pip install 'shardprune[ctranslate2]'": [
            "--format",
            "ctranslate2",
        ],
        "error: format: 'openvino' needs optimum-cli: pip install 'optimum-intel[openvino]' in an environment of": [
            "--format",
            "openvino",
        ],
        f"error: converter: '{tmp_path}/x.py' is no file": ["--format", "gguf", "--converter", tmp_path / "x.py"],
        f"error: converter: '{programs}/text' cannot be run": ["--format", "gguf", "--converter", programs / "text"],
        "error: converter: 'x' has no effect without format gguf, ctranslate2, openvino": ["--converter", "x"],
        "error: dtype: 'int8' has no effect without format gguf, ctranslate2, openvino": [
            *("--dtype", "int8", "--format", "torchao")
        ],
        "error: compression: 'zstd' has no effect without format sparse or semi-structured": [
            *("--compression", "zstd", "--format", "gguf")
        ],
        "error: dtype: 'bfloat16' is not written as openvino; use one of float32, float16, int8": [
            *("--format", "openvino", "--dtype", "bfloat16", "--converter", programs / "showing.py")
        ],
    }
    for start, words in refused.items():
        line = said(capsys, 2, model, "--to", place, *words)
        assert line.startswith(start), line
    words = ["--format", "openvino", "--converter", programs / "showing.py"]
    line = said(capsys, 2, outputs / "bfloat16", "--to", place, *words)
    assert line.startswith("error: dtype: 'auto' is bfloat16 here, which is not written as openvino; use one of"), line
    assert list(tmp_path.iterdir()) == []


def test_torchao_that_is_not_installed_is_named(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr("shardprune.model.int8.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^format: 'torchao' needs torchao: pip install 'shardprune\[torchao\]'$"):
        exported(outputs / "composite", tmp_path / "made", "torchao")


# -- engines ----------------------------------------------------------------------------------------------------------


def logits_of(source, tokens):
    """Logits [tokens, vocabulary] of transformers in float32."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(torch.tensor([tokens])).logits[0]


def test_ctranslate2_computes_what_transformers_do(outputs, tmp_path):
    engine = pytest.importorskip("ctranslate2", reason="pip install 'shardprune[ctranslate2]'")
    installed("ctranslate2")
    exported(outputs / "composite", tmp_path / "made", "ctranslate2")
    words = ["one", "two", "three", "seven", "two"]
    tokens = AutoTokenizer.from_pretrained(outputs / "composite").convert_tokens_to_ids(words)
    found = engine.Generator(str(tmp_path / "made"), intra_threads=1).forward_batch([tokens])
    ours = torch.from_numpy(np.array(found.to(engine.DataType.float32)))[0]
    torch.testing.assert_close(ours, logits_of(outputs / "composite", tokens), atol=1e-5, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "made").tokenize("one two") == ["one", "two"]


def test_gguf_has_the_tensors_and_the_name_of_a_real_pre_tokenizer(tmp_path):
    sources = llama_cpp()
    from gguf import GGUFReader

    wide = {"hidden_size": 32, "intermediate_size": 96, "vocab_size": 50_257, "num_hidden_layers": 2}
    make_model(tmp_path / "model", "wide", torch.float32, {"wide": ("LlamaConfig", {**CONFIGS["llama"][1], **wide})})
    gpt2_tokenizer(sources).save_pretrained(tmp_path / "model")
    make_tokens(tmp_path / "tokens.npy")
    run(tmp_path, "out", structured=0.2, sparsity=0.5, method="magnitude", measure_error=False)
    exported(tmp_path / "out", tmp_path / "made", "gguf", converter=str(sources / SCRIPT))
    held = GGUFReader(tmp_path / "made" / "model.gguf")
    assert held.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    tensors = {tensor.name: np.array(tensor.data) for tensor in held.tensors}
    for place, name in (("ffn_down", "mlp.down_proj"), ("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
        assert np.array_equal(tensors[f"blk.1.{place}.weight"], theirs[f"model.layers.1.{name}.weight"])
    assert held.fields["llama.feed_forward_length"].contents() == theirs["model.layers.0.mlp.up_proj.weight"].shape[0]


def test_a_tokenizer_that_llama_cpp_does_not_know_is_one_line(outputs, tmp_path):
    sources = llama_cpp()
    with pytest.raises(ConversionError, match="ended with code 1: "):
        exported(outputs / "composite", tmp_path / "made", "gguf", converter=str(sources / SCRIPT))
    assert list(tmp_path.iterdir()) == []


def test_openvino_computes_what_transformers_do(outputs, tmp_path):
    program = optimum_cli()
    exported(outputs / "composite", tmp_path / "made", "openvino", converter=program)
    code = (
        "import json, sys, numpy, openvino\n"
        "exact = {'INFERENCE_PRECISION_HINT': 'f32'}\n"
        "model = openvino.Core().compile_model(sys.argv[1] + '/openvino_model.xml', 'CPU', exact)\n"
        "tokens = numpy.array([json.loads(sys.argv[2])])\n"
        "given = {'input_ids': tokens, 'attention_mask': numpy.ones_like(tokens)}\n"
        "given['beam_idx'] = numpy.zeros(1, 'int32')\n"
        "given['position_ids'] = numpy.arange(tokens.shape[1])[None]\n"
        "names = {name for port in model.inputs for name in port.names}\n"
        "found = model({name: value for name, value in given.items() if name in names})['logits']\n"
        "print(json.dumps(found[0].tolist()))\n"
    )
    tokens = [3, 4, 5, 9, 4]
    python = Path(program).parent / "python"
    done = subprocess.run([python, "-c", code, tmp_path / "made", json.dumps(tokens)], capture_output=True, check=True)
    ours = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(ours, logits_of(outputs / "composite", tokens), atol=1e-5, rtol=1e-4)


def test_int8_of_torchao_keeps_zeros_and_loads_in_transformers(outputs, tmp_path):
    pytest.importorskip("torchao", reason="pip install 'shardprune[torchao]'")
    exported(outputs / "composite", tmp_path / "made", "torchao")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto")
    dense = AutoModelForCausalLM.from_pretrained(outputs / "composite")
    for index, layer in enumerate(dense.model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                held = ours.get_submodule(f"model.layers.{index}.{name}").weight
                assert held.qdata.dtype == torch.int8
                zeros = module.weight == 0
                assert zeros.float().mean() > 0.3
                assert not held.dequantize()[zeros].any()
    tokens = [3, 4, 5, 9, 4]
    with torch.no_grad():
        found, wanted = ours(torch.tensor([tokens])).logits[0], logits_of(outputs / "composite", tokens)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    assert AutoTokenizer.from_pretrained(tmp_path / "made").tokenize("one two") == ["one", "two"]

"""Files beside the weights: which of them belong to a checkpoint, and what may stand in their place."""

import json
import os
import shutil

import fsspec
import pytest
from transformers import AutoTokenizer

from shardprune import ExportRecipe, export
from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.opening import open_model
from shardprune.report.progress import Reporter
from tests.support.running import run
from tests.support.tiny import make_tokens

SECRETS = (
    "my_hf_token.txt",
    "token",
    "tokens.json",
    ".token.txt",
    "hf-token.model",
    "adapter_config.json",
    "notes.txt",
)


def test_outputs_have_the_files_of_the_list_and_no_others(copy, tmp_path):
    for name in SECRETS:
        (copy / name).write_text("{}")
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "merges.txt").mkdir()
    with pytest.raises(InputError, match=r"^model: .*/merges\.txt is not a file$"):
        Checkpoint(str(copy)).companions()
    (copy / "merges.txt").rmdir()
    make_tokens(tmp_path / "tokens.npy")
    run(tmp_path, "out", sparsity=0.5, method="magnitude")
    expected = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("model")}
    assert written == expected | {"chat_template.jinja", "README.md", "result.json", "events.jsonl", "allocation.json"}


TEMPLATES = {"default": "{{ messages[0]['content'] }}", "tool_use": "tool: {{ messages[0]['content'] }}"}


@pytest.mark.parametrize("storage", ["local", "memory"])
def test_every_chat_template_goes_where_the_model_goes(copy, tmp_path, storage, capsys):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(copy)
    inside = copy / "additional_chat_templates"
    (inside / "notes.txt").write_text("stays where it is")
    make_tokens(tmp_path / "tokens.npy")
    place = f"{tmp_path}/made" if storage == "local" else f"memory://templates/{tmp_path.name}"
    found = run(tmp_path, f"{place}/out", sparsity=0.5, method="magnitude")
    assert "additional_chat_templates/tool_use.jinja" in found.files
    for asked in (
        {"model": f"{place}/out", "to": f"{place}/small"},
        {"model": f"{place}/small", "to": f"{place}/back", "restore": True},
    ):
        export(exporting(**asked), Reporter(quiet=True))
        capsys.readouterr()
        export(exporting(**asked), Reporter())
        assert f"{asked['to']} is finished already" in capsys.readouterr().err
    for name in ("out", "small", "back"):
        files = fsspec.get_mapper(f"{place}/{name}")
        assert files["additional_chat_templates/tool_use.jinja"] == (inside / "tool_use.jinja").read_bytes()
        assert not any(path.endswith((".tmp", "notes.txt")) for path in files)
    if storage == "local":
        assert all(
            AutoTokenizer.from_pretrained(f"{place}/{name}").chat_template == TEMPLATES for name in ("out", "back")
        )


def exporting(**fields):
    return ExportRecipe.checked(fields)


def test_a_template_that_is_a_link_out_of_the_folder_is_refused(copy, tmp_path):
    (tmp_path / "secret").write_text("{{ secret }}")
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"^model: .*/tool_use\.jinja is a link that leaves the folder"):
        Checkpoint(str(copy))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("linked", ["absolute", "relative"])
def test_a_link_that_leaves_the_folder_is_refused(copy, tmp_path, name, linked):
    outside = tmp_path / "outside.json"
    shutil.move(copy / name, outside)
    (copy / name).symlink_to(outside if linked == "absolute" else os.path.relpath(outside, copy))
    with pytest.raises(InputError, match=rf"^model: .*/{name} is a link that leaves the folder; put the file itself"):
        Checkpoint(str(copy)).companions()


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[]", "holds "), ("{", "is not JSON: "), ('{"compile_config": "x"}', "cannot be read: ")],
)
def test_settings_of_generation_that_transformers_does_not_read_are_refused(copy, content, reason):
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=rf"^model: .*/generation_config\.json {reason}"):
        open_model(str(copy))


def test_links_inside_the_folder_and_to_a_snapshots_blobs_are_followed(copy, tmp_path):
    (copy / "other").mkdir()
    shutil.move(copy / "tokenizer.json", copy / "other" / "x")
    (copy / "tokenizer.json").symlink_to("other/x")
    (tmp_path / "link").symlink_to(copy)
    assert "tokenizer.json" in Checkpoint(str(tmp_path / "link")).companions()

    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in copy.iterdir():
        if path.is_file():
            shutil.copyfile(path, repository / "blobs" / f"blob-{path.name}")
            (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    checkpoint = Checkpoint(str(snapshot))
    assert {"config.json", "tokenizer.json"} <= {*checkpoint.companions()}
    assert checkpoint.tokenizer()("one two").input_ids == [3, 4]
    secret = repository / "secret.json"
    secret.write_text("{}")
    (snapshot / "chat_template.json").symlink_to("../../secret.json")
    with pytest.raises(InputError, match=r"chat_template\.json is a link that leaves the folder"):
        checkpoint.companions()


def test_a_pipe_and_a_huge_file_are_refused(copy):
    os.mkfifo(copy / "vocab.json")
    with pytest.raises(InputError, match=r"^model: .*/vocab\.json is not a file$"):
        Checkpoint(str(copy)).companions()
    (copy / "vocab.json").unlink()
    with open(copy / "tokenizer.model", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"^model: .*/tokenizer\.model has 1099511627776 bytes; such a file has at"):
        Checkpoint(str(copy)).companions()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1, "a": 2}', '{"temperature": NaN}'])
def test_a_config_that_would_keep_an_output_from_loading_is_refused(copy, content):
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"^model: .*/generation_config\.json (is not JSON|holds|has the name)"):
        open_model(str(copy))


def test_companions_behind_a_url(copy):
    memory = fsspec.filesystem("memory")
    (copy / "my_hf_token.txt").write_text("secret")
    memory.put(f"{copy}/", "/companions/", recursive=True)
    assert Checkpoint("memory://companions").companions() == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_an_adapter_beside_the_weights_is_said_not_to_be_applied(copy, tmp_path, caplog):
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    make_tokens(tmp_path / "tokens.npy")
    run(tmp_path, "out", sparsity=0.5, method="magnitude")
    line = f"{copy} holds weights and an adapter: the weights are taken, the adapter is not applied"
    assert [record.getMessage() for record in caplog.records if "adapter" in record.getMessage()] == [line]


def test_an_adapter_alone_is_no_model(copy):
    (copy / "model.safetensors").unlink()
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError, match=r"^model: .* holds an adapter without the weights .*; merge it"):
        Checkpoint(str(copy))

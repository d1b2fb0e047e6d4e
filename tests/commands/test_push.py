"""`--push`: a finished output on a stand-in of the hub, by the hub's own client."""

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from shardprune.errors import InputError, StorageError
from tests.support.hub import TOKEN, running_hub
from tests.support.running import run, search_run
from tests.support.tiny import make_model, make_tokens, snapshot
from tests.support.words import words_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    make_model(folder / "model", "llama-3.1")
    make_tokens(folder / "tokens.npy")
    return folder


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as hub:
        for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_the_model_and_its_card_arrive(folder, tmp_path, hub):
    run(folder, tmp_path / "half", sparsity=0.5, push="someone/half")
    pushed = hub.files["someone/half"]
    there = snapshot(tmp_path / "half")
    assert there.keys() - pushed.keys() == {"result.json", "events.jsonl"}
    assert pushed == {name: there[name] for name in pushed}
    assert "README.md" in pushed
    assert hub.private["someone/half"]
    run(folder, tmp_path / "half", sparsity=0.5, push="someone/half")  # again, of what is finished
    assert hub.files["someone/half"] == pushed


def test_iterations_that_a_search_keeps_stay_here(folder, tmp_path, hub):
    search_run(folder, tmp_path / "mop", path="LG", remove=0.3, depth_rule="third-last", keep="1", push="someone/mop")
    assert not any("/" in name for name in hub.files["someone/mop"])
    assert "model.safetensors.index.json" in hub.files["someone/mop"]


def test_all_templates_of_a_chat_arrive_and_load(folder, tmp_path, hub):
    make_model(tmp_path / "chat", "llama-3.1")
    tokenizer = words_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(tmp_path / "chat")
    folders = tmp_path / "chat" / "additional_chat_templates"
    (folders / "notes.txt").write_text("no template")
    for push, made in (
        ("someone/half", lambda **fields: run(folder, tmp_path / "half", tmp_path / "chat", sparsity=0.5, **fields)),
        ("someone/mop", lambda **fields: search_run(folder, tmp_path / "mop", tmp_path / "chat", path="L", **fields)),
    ):
        made(push=push)
        pushed, place = hub.files[push], tmp_path / "pulled" / push
        assert {name for name in pushed if "/" in name} == {
            f"additional_chat_templates/{name}.jinja" for name in ("rag", "tool_use")
        }
        for name, content in pushed.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        loaded = AutoTokenizer.from_pretrained(place)
        assert loaded.chat_template == tokenizer.chat_template
        said = [{"role": "user", "content": "one"}]
        assert loaded.apply_chat_template(said, tools=[], chat_template="tool_use", tokenize=False) == "[]"


def test_what_cannot_work_is_said_before_any_work(folder, tmp_path, hub, monkeypatch):
    def refused(reason, out=tmp_path / "half", **fields):
        with pytest.raises(InputError, match=reason):
            run(folder, out, sparsity=0.5, **fields)
        assert not (tmp_path / "half").exists()
        assert not hub.files

    refused("push: 'half' is no name of a hub repository", push="half")
    refused("push: 'someone/half' needs a local output", out="memory://half", push="someone/half")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("push: 'someone/half': the hub does not take the token: ", push="someone/half")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused("push: 'someone/half' needs a token", push="someone/half")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("push: 'someone/half' cannot be reached: HF_HUB_OFFLINE is set", push="someone/half")


def test_an_output_that_the_hub_refuses_is_whole_and_pushed_again(folder, tmp_path, hub):
    hub.away = True
    with pytest.raises(StorageError, match=r"half is whole, and cannot be pushed to 'someone/half': .*tries again"):
        run(folder, tmp_path / "half", sparsity=0.5, push="someone/half")
    before = snapshot(tmp_path / "half")
    assert "result.json" in before
    hub.away = False
    run(folder, tmp_path / "half", sparsity=0.5, push="someone/half")
    assert snapshot(tmp_path / "half") == before
    assert hub.files["someone/half"]["README.md"] == before["README.md"]

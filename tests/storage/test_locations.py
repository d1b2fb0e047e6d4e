"""Locations that are refused before their storage is asked."""

import pytest

from shardprune.cli import main
from shardprune.errors import InputError
from shardprune.storage.folder import output_folder
from shardprune.storage.locations import file_system
from shardprune.storage.whole_files import read_file

# Keys with all that a password may hold: botocore would say the first part of each as the name of a bucket.
WITH_KEYS = ("key:pa/ss@w@host", "AKIA:secret@bucket", "AKIA:se?cret@bucket", "AKIA:se cret@bucket", "AKIA@bucket")


@pytest.mark.parametrize("protocol", ["s3", "s3a", "gs", "gcs", "hf"])
@pytest.mark.parametrize("keys", WITH_KEYS)
def test_keys_before_a_bucket_are_refused_unsaid(protocol, keys):
    with pytest.raises(InputError) as caught:
        file_system(f"{protocol}://{keys}/x", "model")
    bucket = keys.rpartition("@")[2]
    assert str(caught.value) == (
        f"model: '{protocol}://{bucket}/x' has a key before it, which {protocol}:// does not take; see docs/storage.md"
    )


COMMANDS = {
    "status": ["status", "{}"],
    "report": ["report", "{}"],
    "check": ["check", "{}"],
    "export": ["export", "{}", "--to", "o"],
    "export, restored": ["export", "{}", "--restore", "--to", "o"],
    "plan": ["plan", "{}", "--hardware", "cpu"],
    "prune, the model": ["prune", "{}", "--out", "o", "--sparsity", "0.5"],
    "prune, a recipe": ["prune", "--recipe", "{}"],
    "evaluate": ["evaluate", "{}", "--perplexity", "stdlib"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_says_them(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([word.replace("{}", "s3://key:pa/ss@w@host/x") for word in COMMANDS[name]])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'s3://host/x' has a key before it, which s3:// does not take" in line


def test_what_looks_like_a_key_and_is_none():
    assert file_system("s3://bucket/a@b:c/d", "model")[1] == "bucket/a@b:c/d"
    assert file_system("s3://bucket/x?versionId=3", "model")[1].startswith("bucket/x")
    assert file_system("hf://group/name@main", "model")[1].startswith("group/name@main")


@pytest.mark.parametrize("url", ["data:,x", "data:text/plain;base64,eA=="])
def test_a_url_that_is_its_own_data_is_no_place(url, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["status", url])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: out: {url!r} is data itself; give where files lie\n"


def test_a_path_may_hold_what_joins_file_systems_in_a_url(tmp_path):
    assert file_system(f"{tmp_path}/run::2026-01-01", "out")[1] == f"{tmp_path}/run::2026-01-01"
    folder = output_folder(f"{tmp_path}/a::b")
    folder.write_text("x.txt", "x")
    assert (tmp_path / "a::b" / "x.txt").read_text() == "x"
    assert read_file(f"{tmp_path}/a::b/x.txt", "eval") == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["a::b"]


@pytest.mark.parametrize(("url", "link"), [("s3://bucket/run::1", "1"), ("run::s3://bucket", "run")])
def test_a_url_is_joined_by_file_systems_alone(url, link):
    with pytest.raises(InputError, match=f"^out: '{url}' holds '::', which joins file systems, beside '{link}'"):
        file_system(url, "out")
    fs, place = file_system(f"simplecache::memory://{link}", "out")
    assert place == f"/{link}"
    assert "simplecache" in fs.protocol

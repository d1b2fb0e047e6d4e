"""JSON that another library reads: bounded in depth, and without rows that are null."""

import pytest

from shardprune.errors import InputError
from shardprune.storage.data_files import DEPTH, check_data_files
from shardprune.storage.malformed import Malformed
from shardprune.storage.sources import HubSplit, load_hub

DEEP = '{"a": ' + "[" * DEPTH + "]" * DEPTH + "}"
FLAT = '{"a": [1, {"b": "[[[[[\\"{{{{{"}]}\n'


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", FLAT * 300, None),
        ("a.json", "[\n" + FLAT * 300 + "]", None),
        ("a.jsonl", FLAT * 3 + DEEP, 4),
        ("a.json", "[\n" * (DEPTH + 1), DEPTH + 1),
        ("a.txt", DEEP, 1),
        ("a.parquet", None, None),
    ],
)
def test_depth_is_counted_outside_of_strings(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(b"[" * 1000 if content is None else content.encode())
    builder = "parquet" if content is None else "json"
    for given in (str(tmp_path / name), {"test": [str(tmp_path / "a.*")]}):
        if line is None:
            check_data_files(builder, given)
        else:
            with pytest.raises(
                Malformed, match=f"names '.*{name}', which is nested deeper than {DEPTH} at line {line}$"
            ):
                check_data_files(builder, given)


@pytest.mark.parametrize(("name", "line"), [("a.jsonl", 3), ("a.json", 3), ("b.json", None)])
def test_null_is_a_value_but_no_row(tmp_path, name, line):
    (tmp_path / name).write_text('{"a": null}\n{"null": [null, "null"]}\n' + (" null\n" if line else ""))
    if line:
        with pytest.raises(Malformed, match=f"names '.*{name}', which has null for a row at line 3$"):
            check_data_files("json", str(tmp_path / name))
    else:
        check_data_files("json", str(tmp_path / name))


def test_directories_and_files_that_are_elsewhere(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "train.jsonl").write_text(DEEP)
    check_data_files("org/name", "https://example.org/a.json", {"train": None}, None)
    with pytest.raises(Malformed, match="train.jsonl"):
        check_data_files(str(tmp_path))
    with pytest.raises(InputError, match="data: 'hf:x' names .*train.jsonl"):
        load_hub("data", "hf:x", HubSplit(name=str(tmp_path), config=None, split="train", field="a"), ["a"])

"""The benchmark of a GPU: its steps at small sizes on a CPU, and what becomes of one that fails."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.results import Row, Rows, read_rows, write_results
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import SECONDS, STEPS, Step

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
# Of each step: a row that it must have.
FOUND = {
    "facts": "torch",
    "numerics": "sparsegpt 2:4, masks agree with the CPU's",
    "suite": "exit code of pytest",
    "rates": "add_product, distance from float64",
    "layer": "SparseGPT 2:4: all",
    "variants": "sweep of 512 x 512, 2:4, recursion: masks agree",
    "profile": "solve o_proj: all kernels",
    "whole_run": "layers streamed: the same to the bit",
    "improving": "trained, again: the same to the bit",
    "memory": "planned / measured",
    "masked_update": "products, bfloat16: distance from float64",
    "recovery": "loss of the last step",
    "semi_structured": "without a GPU",
}


def test_every_step_is_tried_and_explained():
    table = PAGE.read_text().partition("## Everything on one GPU")[2].partition("\n## ")[0]
    assert list(FOUND) == list(STEPS) == re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sum(step.limit for step in STEPS.values()) < SECONDS == 540


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.long
def test_a_step_runs_and_finds_no_fault(name, tmp_path):
    file = tmp_path / "rows"
    with file.open("w") as lines:
        STEPS[name].run(Setting("cpu", small=True), Rows(name, lines))
    rows = {row.name: row for row in read_rows(file)}
    assert FOUND[name] in rows
    assert [row for row in rows.values() if row.ok is False] == []


def test_a_run_goes_on_after_a_step_that_fails_and_says_so_at_the_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(STEPS, "facts", Step("facts", 0))
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--out", str(tmp_path), "--only", "facts", "rates"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert rows[0] == {"step": "facts", "name": "the step", "value": "killed after 0 s", "unit": "", "ok": False}
    assert rows[-1]["step"] == "rates"
    assert rows[-1]["ok"] is True
    table = (tmp_path / "gpu.md").read_text()
    assert "| facts | the step | killed after 0 s  | **FAILED** |" in table
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "limit", "end"),
    [(["--device", "nowhere"], 60, "exit code 2: "), (["--device", "cpu"], 0.05, "killed after 0.05 s")],
    ids=["fails", "takes too long"],
)
def test_a_step_that_fails_is_a_row_that_says_so(words, limit, end, tmp_path):
    with (tmp_path / "log").open("w") as log:
        row = command.carry_out("rates", limit, words, log)[-1]
    assert row.ok is False
    assert str(row.value).startswith(end)
    if "exit" in end:
        assert "invalid choice: 'nowhere'" in str(row.value)


def test_rows_before_a_line_that_was_cut_off_are_kept(tmp_path):
    file = tmp_path / "rows"
    with file.open("w") as lines:
        Rows("rates", lines).add("a | b", 0.123456, "s")
        lines.write('{"step": "rates", "na')
    assert read_rows(file) == [Row("rates", "a | b", 0.123456, "s")]
    write_results(tmp_path, read_rows(file))
    assert "| rates | a \\| b | 0.1235 s |  |" in (tmp_path / "gpu.md").read_text()

import io
import time

from rich.console import Console

from shardprune.report import progress
from shardprune.report.console import PlainConsole
from shardprune.report.progress import Reporter


def test_plain_lines_without_a_terminal(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    with Reporter(Console(file=text)).step("prune", 4) as step:
        for layer in range(4):
            now[0] += 4
            step.describe(f"layer {layer + 1}/4")
            step.advance()
    lines = text.getvalue().splitlines()
    assert lines == [
        "prune  layer 2/4  1/4  25%  0:08, 0:24 left",
        "prune  layer 4/4  3/4  75%  0:16, 0:05 left",
        "prune  layer 4/4  4/4  100%  0:16",
    ]


def test_a_bar_on_a_terminal():
    text = io.StringIO()
    with Reporter(Console(file=text, force_terminal=True, width=100)).step("observe", 3) as step:
        for _ in range(3):
            step.advance()
    assert "observe" in text.getvalue()
    assert "3/3" in text.getvalue()
    assert "\x1b[" in text.getvalue()


def test_quiet_says_nothing(capsys):
    reporter = Reporter(quiet=True)
    reporter.say("hello")
    with reporter.step("prune", 2) as step:
        step.advance(2)
    assert capsys.readouterr() == ("", "")


def test_a_part_that_takes_long_gives_signs_of_life(monkeypatch):
    monkeypatch.setattr(progress, "SIGN_SECONDS", 0.01)
    text = io.StringIO()
    with Reporter(PlainConsole(file=text, width=200)).step("prune", 4) as step:
        step.describe("layer 2/4, 3 of 7 projections solved")
        while text.getvalue().count("\n") < 2:  # nothing advances
            time.sleep(0.01)
    assert text.getvalue().startswith("prune  layer 2/4, 3 of 7 projections solved  0/4  0%  0:00\n")

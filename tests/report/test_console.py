"""Printed text is text, whoever wrote it."""

import io

from rich.console import Console
from rich.table import Table

from shardprune.report.console import PlainConsole
from shardprune.report.progress import Reporter

HOSTILE = "[red]a\x1b[2J\u202eb\n:smile:[/red]"
SHOWN = r"[red]a\x1b[2J\u202eb :smile:[/red]"


def test_no_text_has_markup_or_escapes():
    said = io.StringIO()
    console = PlainConsole(file=said, width=200, force_terminal=True, color_system=None)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE)
    console.print(table)
    assert said.getvalue().count(SHOWN) == 4
    assert "\u202e" not in said.getvalue()
    assert "\x1b" not in said.getvalue()


def test_steps_and_messages_are_text():
    for terminal in (False, True):
        said = io.StringIO()
        console = Console(file=said, width=200, force_terminal=terminal, color_system=None)
        reporter = Reporter(console)
        with reporter.step(HOSTILE, 1) as step:
            step.describe(HOSTILE)
            step.advance()
        reporter.say(f"{HOSTILE} at s3://key:se/cret@bucket")
        assert f"{SHOWN} at s3://bucket" in said.getvalue()
        assert f"{SHOWN}  {SHOWN}" in said.getvalue()
        assert "\x1b[2J" not in said.getvalue()

"""The tables of plans that pages have from programs are what those print today."""

from pathlib import Path

import pytest

from docs import make_mixture_plans, make_training_plans

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.long
@pytest.mark.parametrize(("made", "page"), [(make_mixture_plans, "planning.md"), (make_training_plans, "recovery.md")])
def test_a_table_of_plans_is_the_printed_one(made, page):
    printed = made.HEAD + made.rows()
    assert printed in (DOCS / page).read_text(), f"python -m {made.__name__} prints another table than {page} has"

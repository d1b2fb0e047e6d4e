"""docs/families.md is what the classes of transformers say."""

from pathlib import Path

import pytest

from docs.make_families import page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


@pytest.mark.long
def test_the_page_is_what_the_models_say():
    found = page()
    assert PAGE.read_text() == found, "run `make docs`"
    assert "| differs |" not in found

"""Every command and every block of code in README, docs and the headers of ray_configs, in the order of its page."""

import pytest

from tests.docs.blocks import ROOT, Page
from tests.docs.walking import walk

OF_THEIR_OWN = {ROOT / "docs" / "extending.md"}  # changes the package: test_extending.py runs it on a copy
PAGES = sorted({ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("ray_configs/*.yaml")} - OF_THEIR_OWN)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_page_runs(path, shell):
    problems = walk(Page.read(path), shell)
    assert not problems, "\n".join(map(str, problems))

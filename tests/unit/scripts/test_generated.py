"""Committed files are what their generators write."""

from pathlib import Path

import pytest

from scripts.generate import GENERATED


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: Path(path).name)
def test_the_committed_file_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == GENERATED[path](), "run `make generate`"

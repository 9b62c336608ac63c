"""Ranks are asked for in distributed.py and files are synchronized in files.py, and nowhere else."""

import re
from pathlib import Path

import pytest

import nemodiff_train

PACKAGE = Path(nemodiff_train.__file__).parent
EXPORTED = PACKAGE / "conversion" / "automodel"  # runs without this package


@pytest.mark.parametrize(
    ("home", "pattern"),
    [
        ("distributed.py", r"\bget_rank\(|\bget_world_size\(|environ\S*[\[(]\"(?:RANK|WORLD_SIZE)\""),
        ("files.py", r"\bfsync\(|\bos\.replace\("),
    ],
)
def test_one_home(home: str, pattern: str) -> None:
    files = [file for file in PACKAGE.rglob("*.py") if not file.is_relative_to(EXPORTED)]
    found = {str(file.relative_to(PACKAGE)) for file in files if re.search(pattern, file.read_text())}
    assert found == {home}

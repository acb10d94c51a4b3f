"""The table of README.md is whole, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENTRIES = [
    *(f"A{n}" for n in range(1, 10)),
    *(f"B{n}" for n in range(10, 18)),
    *(f"C{n}" for n in range(18, 25)),
    *(f"D{n}" for n in range(25, 31)),
]


def rows() -> dict[str, list[str]]:
    """Entry to the tests of its row."""
    found: dict[str, list[str]] = {}
    for line in (HERE / "README.md").read_text().splitlines():
        if row := re.match(r"\| ([A-D]\d+) \| [^|]+ \| ([^|]+) \| [^|]+ \|$", line):
            assert row[1] not in found, f"{row[1]} has two rows"
            found[row[1]] = re.findall(r"`([^`]+)`", row[2])
    return found


def test_every_entry_has_a_row_with_tests() -> None:
    assert list(rows()) == ENTRIES
    assert all(rows().values())


def test_every_test_exists() -> None:
    missing = []
    for entry, tests in rows().items():
        for test in tests:
            name, _, function = test.partition("::")
            path = HERE / name
            tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
            names = {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
            if function not in names:
                missing.append(f"{entry}: {test}")
    assert not missing

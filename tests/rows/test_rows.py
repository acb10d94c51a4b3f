"""The table of what the reference systems do is whole, and the tests that it names exist."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
ROOT = TESTS.parent
IDS = dict(line.split() for line in (HERE / "ids.txt").read_text("utf-8").splitlines())  # id -> tier
TABLE: dict[str, dict[str, Any]] = tomllib.loads((HERE / "table.toml").read_text("utf-8"))
KEYS = {"tier", "what", "tests", "doc", "open"}


@cache
def collected(file: str) -> frozenset[str]:
    """What pytest would collect there, methods as Class::test."""
    path = TESTS / file
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body if path.is_file() else ():
        of_class = isinstance(node, ast.ClassDef) and node.name.startswith("Test")
        for each in node.body if of_class else [node]:  # type: ignore[attr-defined]
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) and each.name.startswith("test_"):
                found.add(f"{node.name}::{each.name}" if of_class else each.name)  # type: ignore[attr-defined]
    return frozenset(found)


def faults(table: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with a table."""
    told = [f"{key}: has no row" for key in IDS if key not in table]
    for key, row in table.items():
        if IDS.get(key) != row.get("tier"):
            told.append(f"{key}: its tier is {IDS.get(key)}")
        if set(row) - KEYS or not row.get("what"):
            told.append(f"{key}: a row has {', '.join(sorted(KEYS))}")
        proof = bool(row["tests"]) or "open" in row or (row["tier"] == "X" and "doc" in row)
        if not proof:
            told.append(f"{key}: no test proves it")
        for test in row["tests"]:
            file, _, name = test.partition("::")
            if name not in collected(file):
                told.append(f"{key}: there is no {test}")
        if "doc" in row:
            file, _, words = row["doc"].partition(": ")
            if not (ROOT / file).is_file() or words not in " ".join((ROOT / file).read_text("utf-8").split()):
                told.append(f"{key}: {file} does not say {words!r}")
    return told


def test_the_ids_are_those_of_five_systems() -> None:
    by_system: dict[str, list[int]] = {}
    for key in IDS:
        system, _, number = key.partition("-")
        by_system.setdefault(system, []).append(int(number))
    counts = {"MD": 23, "EI": 34, "SP": 23, "IC": 19, "MK": 29}
    assert by_system == {system: list(range(1, count + 1)) for system, count in counts.items()}
    assert {tier: list(IDS.values()).count(tier) for tier in "MSCX"} == {"M": 62, "S": 38, "C": 21, "X": 7}


def test_every_id_has_a_row_and_every_test_that_it_names_exists() -> None:
    assert faults(TABLE) == []


@pytest.mark.xfail(strict=True, reason="rows whose features are being built: take the mark away with the last `open`")
def test_no_row_is_open() -> None:
    assert [key for key, row in TABLE.items() if "open" in row] == []


@pytest.mark.parametrize(
    ("key", "change", "fault"),
    [
        ("EI-07", None, "EI-07: has no row"),
        ("EI-07", {"tier": "C"}, "EI-07: its tier is M"),
        ("EI-07", {"tests": []}, "EI-07: no test proves it"),
        ("EI-07", {"tests": ["rows/test_gone.py::test_x"]}, "EI-07: there is no rows/test_gone.py::test_x"),
        ("EI-07", {"tests": ["rows/test_rows.py::faults"]}, "EI-07: there is no rows/test_rows.py::faults"),
        ("IC-19", {"doc": "README.md: no such words"}, "IC-19: README.md does not say 'no such words'"),
        ("IC-19", {"doc": "GONE.md: x"}, "IC-19: GONE.md does not say 'x'"),
    ],
)
def test_what_is_wrong_with_a_table_is_found(key: str, change: dict[str, Any] | None, fault: str) -> None:
    changed = {each: row for each, row in TABLE.items() if each != key or change is not None}
    if change is not None:
        changed[key] = TABLE[key] | change
    assert set(faults(changed)) - set(faults(TABLE)) == {fault}

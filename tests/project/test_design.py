"""DESIGN.md names what is there: each file, each symbol, and no module is missing from its map."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "src" / "fastkin"
PAGE = (ROOT / "DESIGN.md").read_text("utf-8")
SUFFIXES = {".py", ".pyi", ".pyx", ".pxd", ".pxi", ".h"}

PLACE = re.compile(r"`([\w/]+\.(?:py|pyi|pyx|pxd|pxi|h))(?:: ([\w.]+))?`")
PLANTED = re.compile(r"`([\w-]+\.patch)`")
MARKS = re.compile(r"[Mm]arks? ((?:\"[^\"]+\"(?:,\s+)?)+)")
# one row of the map: file, symbols, job
ROW = re.compile(r"^\| `([\w.]+)` \| ((?:`\w+`(?:, )?)*) ?\| .+ \|$", re.MULTILINE)


def part(number: int) -> str:
    """A section of the page, without its heading."""
    return re.split(r"^## \d+\. .*$", PAGE, flags=re.MULTILINE)[number]


@cache
def source(path: Path) -> str:
    return path.read_text("utf-8")


def defines(path: Path, symbol: str) -> bool:
    """Is each part of `Class.member` made in this file? A member of a base class that lies elsewhere is not."""
    text = source(path)
    return all(made_in(text, name) for name in symbol.split("."))


def made_in(text: str, name: str) -> bool:
    return bool(
        re.search(
            rf"^\s*(?:async def|def|class|cdef class|cdef struct)\s+{name}\b"  # a function, a class
            rf"|^\s*cdef\s[^=#\n]*\b{name}(?:\(|$|,|\s+#)"  # a compiled function or field
            rf"|^\s*(?:self\.)?{name}\b\s*(?:=|:[^:])"  # a name that is given a value or a type
            rf"|^static\s[^(;]*\b{name}\(",  # C
            text,
            re.MULTILINE,
        )
    )


def places() -> list[tuple[str, str]]:
    """Files with a symbol, or without one, outside of the map: paths from src/fastkin or from the root."""
    found = dict.fromkeys((path, symbol) for path, symbol in PLACE.findall(PAGE) if "/" in path or symbol)
    return [each for each in found if not each[0].startswith("tests/")]


MEMBER = re.compile(r"`(_?[A-Z]\w+\.\w+)`")


@pytest.mark.parametrize("symbol", sorted(set(MEMBER.findall(PAGE))))
def test_a_member_without_its_file_is_there_too(symbol: str) -> None:
    """A step names the file once, and further members of a class without it."""
    files = [path for path in PACKAGE.rglob("*") if path.suffix in SUFFIXES - {".pyi"}]
    assert any(defines(path, symbol) for path in files)


def file_of(path: str) -> Path:
    return found if (found := PACKAGE / path.lstrip("/")).exists() else ROOT / path


@pytest.mark.parametrize(("path", "symbol"), places())
def test_what_the_page_names_is_there(path: str, symbol: str) -> None:
    assert file_of(path).is_file()
    assert not symbol or defines(file_of(path), symbol)


def rooms() -> dict[str, list[tuple[str, str]]]:
    """Folder to (file, symbols) of its table."""
    found = {}
    for chunk in part(6).split("\n### ")[1:]:
        title, _, table = chunk.partition("\n")
        folder = title.strip("`/") if title.endswith("/`") else ""
        found[folder] = ROW.findall(table)
    return found


@pytest.mark.parametrize("folder", sorted({path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.p*")
                                           if path.suffix in SUFFIXES}))  # fmt: skip
def test_the_map_has_each_module(folder: str) -> None:
    """A package's `__init__` may be left out: most of them only say what the room is for."""
    there = {path.name for path in (PACKAGE / folder).iterdir() if path.suffix in SUFFIXES} - {"__init__.py"}
    told = {file_of(f"{folder}/{file}").name for file, _ in rooms()[folder.strip(".")]} - {"__init__.py"}
    assert told == there


@pytest.mark.parametrize(
    ("folder", "file", "symbol"),
    [
        (folder, file, symbol)
        for folder, rows in rooms().items()
        for file, symbols in rows
        for symbol in re.findall(r"\w+", symbols)
    ],
)
def test_the_symbols_of_the_map_are_there(folder: str, file: str, symbol: str) -> None:
    assert defines(file_of(f"{folder}/{file}"), symbol)


def test_what_is_planted_is_there() -> None:
    named = set(PLANTED.findall(PAGE))
    assert named == {path.name for path in (ROOT / "tests/simulation/planted").glob("*.patch")}


def test_the_marks_are_those_of_the_simulation() -> None:
    named = set(re.findall(r'"([^"]+)"', " ".join(MARKS.findall(PAGE))))
    marks = source(ROOT / "tests/simulation/marks.py")
    assert named
    assert {" ".join(mark.split()) for mark in named if f'"{" ".join(mark.split())}"' not in marks} == set()


def test_each_of_the_ten_questions_has_an_answer() -> None:
    rows = re.findall(r"^\| (?!question|---)(.+?) \| (.+?) \| (.+) \|$", part(8), re.MULTILINE)
    assert len(rows) == 10


@pytest.mark.parametrize(
    ("text", "symbol", "there"),
    [
        ("class A:\n    def b(self) -> None: ...\n", "A.b", True),
        ("class A:\n    def b(self) -> None: ...\n", "A.c", False),
        ("    cdef inline int begin(self) except -1:\n", "begin", True),
        ("    cdef readonly Py_ssize_t repeated\n", "repeated", True),
        ("# begin( is only spoken of\nx = begin(1)\n", "begin", False),
        ("        self.disk_full = False\n", "disk_full", True),
    ],
)
def test_what_defines_a_symbol(tmp_path: Path, text: str, symbol: str, there: bool) -> None:
    path = tmp_path / "module.py"
    path.write_text(text)
    assert defines(path, symbol) is there

"""Every test and every file of tests/ that a document, a script or a comment names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("ci", "deploy", "docs", "examples", "benches", "src", "tests")
TEXT = {"", ".md", ".py", ".pyi", ".pyx", ".pxi", ".pxd", ".h", ".yml"}
FROM_ROOT = re.compile(r"(?<![\w/.-])(tests/[\w/]+\.(?:py|md|toml))\b(?:::(\w+))?")
# a README of tests/ names what lies beside it
FROM_HERE = re.compile(r"`((?:\.\./[\w/]+/)?test_\w+\.py)(?:::(\w+))?`")


def documents() -> list[Path]:
    found = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.py")]
    for folder in FOLDERS:
        found += [each for each in (ROOT / folder).rglob("*") if each.suffix in TEXT and each.is_file()]
    return sorted(each for each in found if not {"__pycache__", "node_modules"} & set(each.parts))


def lost(document: Path) -> list[str]:
    """What it names and nobody finds."""
    text = document.read_text("utf-8")
    named = [(ROOT, *each) for each in FROM_ROOT.findall(text)]
    if document.suffix == ".md" and ROOT / "tests" in document.parents:
        named += [(document.parent, *each) for each in FROM_HERE.findall(text)]
    wanting = []
    for folder, file, function in named:
        path = folder / file
        if not path.is_file():
            wanting.append(file)
        elif function and not re.search(rf"^ *(async )?def {function}\(", path.read_text("utf-8"), re.MULTILINE):
            wanting.append(f"{file}::{function}")
    return wanting


@pytest.mark.parametrize(
    "name",
    [
        "CONTRIBUTING.md", "DESIGN.md", "README.md", "ci/package", "deploy/prometheus/alerts.yml",
        "docs/threat-model.md", "tests/fuzz/fuzz_targets.py",
    ],
)  # fmt: skip
def test_documents_that_name_tests_are_read(name: str) -> None:
    assert ROOT / name in documents()
    assert FROM_ROOT.search((ROOT / name).read_text("utf-8"))


def test_everything_that_is_named_is_there() -> None:
    assert {each.relative_to(ROOT).as_posix(): names for each in documents() if (names := lost(each))} == {}


PLACE = "tests/" + Path(__file__).parent.name  # not written out: this file is one of the documents


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"see `{PLACE}/test_documents.py`", []),
        (f"python -m pytest {PLACE}/test_gone.py -k one", [f"{PLACE}/test_gone.py"]),
        (f"{PLACE}/test_documents.py::lost", []),
        (f"{PLACE}/test_documents.py::gone", [f"{PLACE}/test_documents.py::gone"]),
    ],
)
def test_what_is_gone_is_found(text: str, names: list[str], tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(text)
    assert lost(document) == names

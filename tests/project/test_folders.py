"""Tests lie where their subject lies: a folder of tests is named after one of fastkin, or after a kind of test."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
PACKAGE = TESTS.parent / "src" / "fastkin"
KINDS = {  # CONTRIBUTING.md says what each is
    "faults", "fuzz", "long", "outsiders", "project", "rows", "security", "simulation", "system",
}  # fmt: skip


def test_no_test_lies_beside_the_folders() -> None:
    assert not list(TESTS.glob("test_*.py"))


def test_a_folder_of_tests_is_named_after_its_subject() -> None:
    subjects = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert folders - subjects == KINDS


def test_every_kind_is_told() -> None:
    page = (TESTS.parent / "CONTRIBUTING.md").read_text("utf-8")
    assert [kind for kind in sorted(KINDS) if f"`{kind}/`" not in page] == []

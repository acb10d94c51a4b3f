"""What a file of records is called (IC-10: prefix with strftime keys, extension)."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from fastkin.files import naming

if TYPE_CHECKING:
    from pathlib import Path

WHEN = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


@pytest.mark.parametrize(
    ("prefix", "made"),
    [
        ("", ""),
        ("prod/data/", "prod/data/"),
        ("prod/%Y/%m/%d/%H/", "prod/2026/03/04/05/"),
        ("day=%j-%M-", "day=063-06-"),
        ("100%%/", "100%/"),
        ("%%Y/", "%Y/"),
    ],
)
def test_a_prefix_has_the_time_in_it(prefix: str, made: str) -> None:
    assert naming.wrong(prefix) is None
    assert naming.expanded(prefix, WHEN) == made


@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        ("/data/", "without a name"),
        ("a//b/", "without a name"),
        ("../up/", "begins with a dot"),
        ("a/./b", "begins with a dot"),
        (".open/", "begins with a dot"),
        ("a/.upload/", "begins with a dot"),
        (".hidden", "begins with a dot"),
        ("%S/", "%S"),
        ("half%", "% in it"),
        ("line\n/", "does not print"),
        ("x" * 513, "longer than 512 bytes"),
        ("%Y/" * 110, "longer than 512 bytes"),
        ("x" * 256 + "/", "has a folder in it whose name is longer than 255 bytes"),
        ("a/" + "%Y" * 64 + "/", "has a folder in it whose name is longer than 255 bytes"),
        ("a/" + "\N{SNOWMAN}" * 86 + "/b", "has a folder in it whose name is longer than 255 bytes"),
        ("a/" + "x" * 200, "bytes behind its last slash"),
    ],
)
def test_a_prefix_leads_to_a_place_below_the_directory(prefix: str, why: str) -> None:
    assert why in (naming.wrong(prefix) or "")


def test_a_name_tells_pipeline_and_time_and_comes_once() -> None:
    """IC-15: two files of one moment have two names."""
    one, other = (naming.path_of("a/%Y/", "line 3/x", ".csv", WHEN, gzip=True) for _ in range(2))
    assert re.fullmatch(r"a/2026/line-3-x-20260304T050607-[0-9a-f]{32}\.csv\.gz", one)
    assert one != other
    assert naming.path_of("", "p", ".csv.gz", WHEN, gzip=True).endswith(".csv.gz")
    assert not naming.path_of("", "p", ".csv.gz", WHEN, gzip=True).endswith(".gz.gz")
    assert naming.path_of("", "p", ".jsonl", WHEN, gzip=False).endswith(".jsonl")


def test_the_longest_name_that_is_allowed_can_be_made(tmp_path: Path) -> None:
    owner, extension = "p" * 64, ".abc" * 4
    most = next(n for n in range(255, 0, -1) if naming.wrong("x" * n, owner, extension) is None)
    assert most == 255 - 64 - 1 - 16 - 32 - 16 - len(".gz.part.new")
    longest = naming.path_of("y" * 255 + "/" + "x" * most, owner, extension, WHEN, gzip=True)
    (tmp_path / longest).parent.mkdir()
    path = tmp_path / (longest + ".part.new")
    path.write_bytes(b"")
    assert len(path.name) == 255

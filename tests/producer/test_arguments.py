"""`Producer` is held to the rows of config.py, and says what is wrong with an argument and what to give instead."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from fastkin import Producer
from fastkin.errors import ConfigError, LibraryError
from fastkin.setting_row import Row
from fastkin.settings import tables
from fastkin.settings.arguments import check_arguments
from fastkin.settings.values import Value, parse

ARGUMENTS = list(tables.ARGUMENTS.values())
NUMBERS = [each for each in ARGUMENTS if each.kind in {"int", "number"}]
DEFAULTS = {each.key: each.default for each in ARGUMENTS}
IN_RANGE = "give a number in this range, or leave it out for"


def name(value: object) -> str | None:
    return value.key if isinstance(value, Row) else None


def below(least: float, kind: str) -> float:
    return least - 1 if kind == "int" else math.nextafter(least, -math.inf)


def above(most: float, kind: str) -> float:
    return most + 1 if kind == "int" else math.nextafter(most, math.inf)


def test_every_argument_of_the_producer_has_a_row_with_its_default() -> None:
    signature = {key: each.default for key, each in inspect.signature(Producer).parameters.items()}
    assert signature == DEFAULTS


def test_the_choices_of_an_argument_are_those_of_its_row() -> None:
    hints = get_type_hints(Producer.__init__, localns={"Path": Path})
    for each in ARGUMENTS:
        if each.choices:
            assert get_args(hints[each.key]) == each.choices


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("max_records", 5000, "5000 is not 1 to 500: one PutRecords call takes 500"),
        ("max_records", 0, "0 is not 1 to 500: one PutRecords call takes 500"),
        ("max_records", 500.0, "500.0 is not a whole number: give 1 to 500, or leave it out for 500"),
        ("max_connections", 0, f"0 is not 1 to 256: {IN_RANGE} 16"),
        ("linger_ms", -1, f"-1 is not 0 to 60000 ms: {IN_RANGE} 50.0"),
        ("linger_ms", math.inf, f"inf is not 0 to 60000 ms: {IN_RANGE} 50.0"),
        ("linger_ms", math.nan, "nan is not a number: give 0 to 60000 ms, or leave it out for 50.0"),
        ("linger_ms", "50", "'50' is not a number: give 0 to 60000 ms, or leave it out for 50.0"),
        ("linger_ms", True, "True is not a number: give 0 to 60000 ms, or leave it out for 50.0"),
        ("linger_ms", None, "None is not a number: give 0 to 60000 ms, or leave it out for 50.0"),
        ("budget_bytes", 0, f"0 is not 1 to 1099511627776 bytes: {IN_RANGE} 67108864"),
        ("spool_after_s", -1, f"-1 is not 0.1 to 3600 s: {IN_RANGE} 5.0"),
        ("request_timeout_s", 0, f"0 is not 0.1 to 600 s: {IN_RANGE} 30.0"),
        ("transport", "nativ", "'nativ' is none of auto, native, sdk: did you mean 'native'?"),
        ("transport", "boto", "'boto' is none of auto, native, sdk: give one of them, or leave it out for 'auto'"),
        ("on_full", "spol", "'spol' is none of pause, spool, drop_oldest, drop_newest: did you mean 'spool'?"),
        ("shard_map", "no", "'no' is not True or False: give True or False, or leave it out for True"),
        ("region", 5, "5 is not a str: give a str, or leave it out"),
        ("region", "", "is empty: fill it, or leave it out"),
        ("region", "EU", "'EU' is not a region: for example eu-west-1"),
        ("spool", 5, "5 is not a str or a Path: give a str or a Path, or leave it out"),
        ("stream", "a b", "'a b' is not a stream name: 1 to 128 letters, digits and _ . -"),
        ("profile", "a\x1b[1m", "has a control character in it: remove it"),
        # no secret is shown, nor what may hold one; nor more of a value than a line has room for
        ("secret_key", b"secretword", "what is given is not a str: give a str, or leave it out"),
        ("endpoint_url", "http://u:secretword@h", "is not an endpoint: for example http://localhost:4567"),
        ("endpoint_url", b"http://u:secretword@h", "what is given is not a str: give a str, or leave it out"),
        ("profile", b"1" * 500, f"b'{'1' * 98}... (503 characters) is not a str: give a str, or leave it out"),
    ],
)
def test_a_wrong_argument_is_told_with_its_cure(argument: str, value: object, says: str) -> None:
    given: dict[str, Any] = {"stream": "s", argument: value}
    with pytest.raises(LibraryError) as caught:
        Producer(**given)
    assert str(caught.value) == f"{argument}: {says}"


@pytest.mark.parametrize("each", NUMBERS, ids=name)
def test_an_argument_is_held_to_the_range_of_its_row(each: Row) -> None:
    least = each.argument_least if each.argument_least is not None else each.least
    assert least is not None
    assert each.most is not None
    for end in (least, each.most):
        check_arguments(DEFAULTS | {each.key: end})
    for beyond in (below(least, each.kind), above(each.most, each.kind), math.inf, -math.inf):
        if each.kind == "number" or math.isfinite(beyond):
            with pytest.raises(LibraryError) as caught:
                check_arguments(DEFAULTS | {each.key: beyond})
            assert str(caught.value).startswith(f"{each.key}: {beyond!r} is not {least} to {each.most}")


@pytest.mark.parametrize("each", NUMBERS, ids=name)
@pytest.mark.parametrize("value", ["7", True, None, [7], math.nan])
def test_an_argument_that_is_a_number_is_one(each: Row, value: object) -> None:
    if value is None and each.default is None:
        check_arguments(DEFAULTS | {each.key: value})  # left out
        return
    wanted = "a whole number" if each.kind == "int" else "a number"
    with pytest.raises(LibraryError) as caught:
        check_arguments(DEFAULTS | {each.key: value})
    assert str(caught.value).startswith(f"{each.key}: {value!r} is not {wanted}: give ")


@pytest.mark.parametrize("each", [each for each in ARGUMENTS if each.kind == "text"], ids=name)
@pytest.mark.parametrize("value", [5, b"x", "", "a\nb", True])
def test_an_argument_that_is_a_text_is_one_of_one_line(each: Row, value: object) -> None:
    with pytest.raises(LibraryError) as caught:
        check_arguments(DEFAULTS | {each.key: value})
    assert str(caught.value).startswith(f"{each.key}: ")
    assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_and_paths_are_arguments_too() -> None:
    check_arguments(DEFAULTS | {"linger_ms": Fraction(1, 2), "spool": Path("welders.db"), "max_connections": 3})


def test_a_program_may_go_below_what_a_file_may() -> None:
    """It knows its records: a budget of one byte is one record at a time."""
    Producer("s", region="eu-west-1", budget_bytes=1, max_record_bytes=1000)
    with pytest.raises(ConfigError, match="1 is out of range; use 65536 to 1099511627776"):
        parse(tables.PIPELINE_KEYS["budget_bytes"], Value(1, "here"))


@pytest.mark.process
def test_the_producer_needs_no_reader_of_files() -> None:
    readers = {"fastkin.settings.sources", "fastkin.settings.checks", "tomllib"}
    code = f"import sys, fastkin.producer; print(*sorted({readers!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"

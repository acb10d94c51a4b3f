"""Checks what a program says, by the same rows as what a file says: see config.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fastkin.errors import LibraryError, printable
from fastkin.setting_row import Fault, close, fault
from fastkin.settings.tables import ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastkin.setting_row import Row

_KINDS = {
    "text": "a str",
    "int": "a whole number",
    "number": "a number",
    "flag": "True or False",
    "list": "a list of str",
}
_MOST_SHOWN = 100


def check_arguments(given: Mapping[str, object]) -> None:
    """LibraryError names the first argument that is wrong, what was given, what it may be and the cure.

    given: each argument by its name, and maybe more, so that `locals()` at the head of the call will do. Rows of what
        the call does not take are passed over.
    """
    for name, row in ARGUMENTS.items():
        if name not in given:
            continue
        value = given[name]
        if row.default is None and value is None:
            continue  # left out
        if row.file and isinstance(value, os.PathLike):
            value = os.fspath(value)
        least = row.least if row.argument_least is None else row.argument_least
        wrong = fault(row, value, least)
        if wrong is not None:
            problem, cure = _told(row, value, wrong, least)
            raise LibraryError(f"{name}: {problem}: {cure}")


def check_keys(access_key: str | None, secret_key: str | None) -> None:
    """LibraryError: one of them without the other."""
    if (access_key is None) != (secret_key is None):
        missing = "access_key" if access_key is None else "secret_key"
        raise LibraryError(f"Non empty argument required: {missing}; give both keys, or neither")


def _told(row: Row, value: object, wrong: Fault, least: float | None) -> tuple[str, str]:
    """Problem and cure."""
    # The text goes into an exception, and that into somebody's log.
    shown = "what is given" if row.hides(value) else printable(repr(value), _MOST_SHOWN)
    otherwise = "leave it out" if row.default is None else f"leave it out for {row.default!r}"
    kind = "a str or a Path" if row.file else _KINDS[row.kind]
    allowed = kind if row.most is None else f"{least} to {row.most} {row.unit}".rstrip()
    match wrong:
        case Fault.CHOICE | Fault.KIND if row.choices:
            near = close(str(value), row.shown_choices)
            cure = f"did you mean {near!r}?" if near else f"give one of them, or {otherwise}"
            return f"{shown} is none of {', '.join(row.shown_choices)}", cure
        case Fault.RANGE:
            return f"{shown} is not {allowed}", row.why or f"give a number in this range, or {otherwise}"
        case Fault.EMPTY:
            return "is empty", f"fill it, or {otherwise}"
        case Fault.CONTROL:
            return "has a control character in it", "remove it"
        case Fault.SHAPE if row.shape is not None:
            return f"{shown} {row.shape.problem}" if row.shape.shown else row.shape.problem, row.shape.cure
    return f"{shown} is not {kind}", f"give {allowed}, or {otherwise}"

"""One value at a time: text or TOML to what its row in config.py says, or a problem that names place and cure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence  # noqa: TC003 - who reads our annotations needs it
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkin.errors import ConfigError
from fastkin.setting_row import Fault, close, fault

if TYPE_CHECKING:
    from fastkin.setting_row import Row


class SettingsError(ConfigError):
    """Everything that is wrong with the settings: `problems`, one line each in str()."""

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        first = problems[0]
        super().__init__(first.place, first.problem, first.cure)
        self.problems: tuple[ConfigError, ...] = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class Report:
    """What is wrong, and what is only worth saying."""

    def __init__(self) -> None:
        self.problems: list[ConfigError] = []
        self.warnings: list[str] = []

    def problem(self, place: str, problem: str, cure: str = "") -> None:
        self.add(ConfigError(place, problem, cure))

    def add(self, error: ConfigError) -> None:
        # what stands in [kinesis] is looked at for every pipeline, and told once
        if str(error) not in map(str, self.problems):
            self.problems.append(error)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


class Value(NamedTuple):
    raw: object
    place: str  # file and table and key, or the variable: how every message begins
    text: bool = False  # from the environment, where everything is text


Raw = dict[str, Value]


# Values that are wrong count as not said, so that one mistake does not bring others after it.
class Given:
    """What was said in one table and is right by itself; the rest is in the report. The rules go on from here."""

    def __init__(self, rows: Mapping[str, Row], raw: Raw, report: Report) -> None:
        self.rows = rows
        self.raw = raw
        self.report = report
        self.values: dict[str, Any] = {}
        for key, value in raw.items():
            self.take(key, value)

    def take(self, key: str, value: Value) -> None:
        """One value more, or a problem."""
        try:
            self.values[key] = parse(self.rows[key], value)
        except ConfigError as error:
            self.report.add(error)

    def __contains__(self, key: str) -> bool:
        """Was it said, and rightly?"""
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        """What was said, else the default."""
        return self.values.get(key, self.rows[key].default)

    def is_wrong(self, key: str) -> bool:
        """Was it said, and wrongly? Then that was told, and nothing more is to say about it."""
        return key in self.raw and key not in self.values

    def place(self, *keys: str) -> str:
        """Where the first of them that was said stands: how a message begins."""
        return next(self.raw[key].place for key in keys if key in self.raw)

    def problem(self, key: str, problem: str, cure: str) -> None:
        """That one of these values does not fit to something else."""
        self.report.problem(self.raw[key].place, problem, cure)


def nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = close(name, known)
    if near is not None:
        return f"did you mean {near}?"
    return f"known are {', '.join(known)}" if len(known) < 8 else "see the settings table of the README"


HIDDEN = "***"  # printed in place of a secret; never taken for one

_TRUE = frozenset({"true", "1", "yes", "on", "t", "y"})
_FALSE = frozenset({"false", "0", "no", "off", "f", "n"})


def parse(row: Row, value: Value) -> Any:
    """What was said, as the row wants it. ConfigError: it is not that."""
    said: Any = _from_text(row, str(value.raw)) if value.text else value.raw
    if row.kind == "list" and isinstance(said, str):
        said = [said]
    if row.secret and said == HIDDEN:
        raise ConfigError(
            value.place,
            f'is "{HIDDEN}", which stands for a secret that `fastkin check` did not show',
            "write the secret itself, or remove the key and give the secret in the environment",
        )
    wrong = fault(row, said)
    if wrong is not None:
        raise ConfigError(value.place, *_told(row, value, said, wrong))
    match row.kind:
        case "number":
            return float(said)
        case "list":
            return tuple(said)
    return said


def _from_text(row: Row, text: str) -> Any:
    """From the environment, where everything is text. What cannot be read stays as it is: a value of the wrong kind."""
    match row.kind:
        case "int" | "number":
            try:
                return int(text, 10) if row.kind == "int" else float(text)
            except ValueError:
                return text
        case "flag":
            word = text.strip().casefold()
            return True if word in _TRUE else False if word in _FALSE else text
        case "list":
            return [item.strip() for item in text.split(",") if item.strip()]
        case "text" if text in row.shown_choices:
            # no file of variables can hold a line feed
            return json.loads(f'"{text}"')
    return text


_KINDS = {
    "text": ("text in quotes", 'write "..."'),
    "int": ("a whole number", "write a number without quotes and point"),
    "number": ("a number", "write a number without quotes"),
    "flag": ("true or false", "write true or false, without quotes"),
    "list": ("a list of texts", 'write ["...", "..."]'),
}


def _told(row: Row, value: Value, said: Any, wrong: Fault) -> tuple[str, str]:
    """Problem and cure."""
    shown = "what is given" if row.hides(value.raw) else repr(value.raw)
    allowed = "" if row.most is None else f"use {row.least} to {row.most}"
    match wrong:
        case Fault.RANGE:
            return f"{said} is out of range", f"{allowed}: {row.why}" if row.why else allowed
        case Fault.CHOICE:
            near = close(said, row.shown_choices)
            return f"{shown} is no value of {row.key}", (
                f"did you mean {near}?" if near else f"use {', '.join(row.shown_choices)}"
            )
        case Fault.EMPTY:
            return ("has an empty text in it", "remove it") if said else ("is empty", "leave it out or fill it")
        case Fault.CONTROL:
            return "has a control character in it", "remove it"
        case Fault.SHAPE if row.shape is not None:
            return f"{shown} {row.shape.problem}" if row.shape.shown else row.shape.problem, row.shape.cure
    wanted, cure = _KINDS[row.kind]
    return f"{shown} is not {wanted}", allowed or cure

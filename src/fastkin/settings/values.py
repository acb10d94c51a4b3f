"""One value at a time: text or TOML to what the tables say, or a problem that names place and cure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from fastkin.settings.tables import Key


class SettingsError(ConfigError):
    """Everything that is wrong with the settings: `problems`, one line each in str()."""

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        first = problems[0]
        super().__init__(first.place, first.problem, first.cure)
        self.problems = tuple(problems)

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


def parse_table(keys: Mapping[str, Key], raw: Raw, report: Report) -> dict[str, Any]:
    """The values of one table, those that are right; the others are problems."""
    good: dict[str, Any] = {}
    for name, value in raw.items():
        try:
            good[name] = parse(keys[name], value)
        except ConfigError as error:
            report.add(error)
    return good


def parse(key: Key, value: Value) -> Any:
    return _PARSERS[key.kind](key, value)


def close(name: str, known: Iterable[str]) -> str | None:
    import difflib

    folded = {each.casefold().replace("_", ""): each for each in known}
    near = difflib.get_close_matches(name.casefold().replace("_", ""), folded, 1, 0.7)
    return folded[near[0]] if near else None


def nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = close(name, known)
    if near is not None:
        return f"{near} is meant?"
    return f"known are {', '.join(known)}" if len(known) < 8 else "see the settings table of the README"


HIDDEN = "***"  # printed in place of a secret; never taken for one

_TRUE = frozenset({"true", "1", "yes", "on", "t", "y"})
_FALSE = frozenset({"false", "0", "no", "off", "f", "n"})


def _shown(key: Key, value: Value) -> str:
    return "what is given" if key.secret or key.name == "url" else repr(value.raw)


def _wrong(key: Key, value: Value, wanted: str) -> ConfigError:
    return ConfigError(value.place, f"{_shown(key, value)} is not {wanted}", _range(key))


_WRITE = {
    "text": 'write "..."',
    "int": "write a number without quotes and point",
    "number": "write a number without quotes",
    "flag": "write true or false, without quotes",
    "list": 'write ["...", "..."]',
}


def _range(key: Key) -> str:
    return _WRITE[key.kind] if key.low is None or key.high is None else f"use {key.low} to {key.high}"


def _parse_text(key: Key, value: Value) -> str:
    text = value.raw
    if not isinstance(text, str):
        raise _wrong(key, value, "text in quotes")
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ConfigError(value.place, "has a control character in it", "remove it")
    if key.secret and text == HIDDEN:
        raise ConfigError(
            value.place,
            f'is "{HIDDEN}", which stands for a secret that `fastkin check` did not show',
            "write the secret itself, or remove the key and give the secret in the environment",
        )
    if key.choices and text not in key.choices:
        near = close(text, key.choices)
        cure = f"{near} is meant?" if near else f"use {', '.join(key.choices)}"
        raise ConfigError(value.place, f"{text!r} is not a {key.name}", cure)
    if not text and key.name not in {"client_id", "description"}:
        raise ConfigError(value.place, "is empty", "leave it out or fill it")
    return text


def _parse_int(key: Key, value: Value) -> int:
    number = value.raw
    if value.text:
        try:
            number = int(str(number), 10)
        except ValueError:
            raise _wrong(key, value, "a whole number") from None
    if not isinstance(number, int) or isinstance(number, bool):
        raise _wrong(key, value, "a whole number")
    return int(_in_range(key, value, number))


def _parse_number(key: Key, value: Value) -> float:
    number = value.raw
    if value.text:
        try:
            number = float(str(number))
        except ValueError:
            raise _wrong(key, value, "a number") from None
    if not isinstance(number, int | float) or isinstance(number, bool) or number != number:
        raise _wrong(key, value, "a number")
    return float(_in_range(key, value, number))


def _in_range(key: Key, value: Value, number: float) -> float:
    if key.low is not None and key.high is not None and not key.low <= number <= key.high:
        raise ConfigError(value.place, f"{number} is out of range", _range(key))
    return number


def _parse_flag(key: Key, value: Value) -> bool:
    flag = value.raw
    if value.text:
        word = str(flag).strip().casefold()
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
    elif isinstance(flag, bool):
        return flag
    raise _wrong(key, value, "true or false")


def _parse_list(key: Key, value: Value) -> tuple[str, ...]:
    items = value.raw
    if value.text:
        items = [item.strip() for item in str(items).split(",") if item.strip()]
    if isinstance(items, str):
        items = [items]
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise _wrong(key, value, "a list of texts")
    if any(not item for item in items):
        raise ConfigError(value.place, "has an empty text in it", "remove it")
    return tuple(items)


_PARSERS: dict[str, Callable[[Key, Value], Any]] = {
    "text": _parse_text,
    "int": _parse_int,
    "number": _parse_number,
    "flag": _parse_flag,
    "list": _parse_list,
}

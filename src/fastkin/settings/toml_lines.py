"""Finds the line of a table or key in the text of a TOML file, which tomllib does not tell.

The text is known to be TOML when this looks at it, so it may be simple: headers and keys are where a line begins,
unless the line is inside of a text or array that goes over several lines.
"""

from __future__ import annotations

import re

Path = tuple[str | int, ...]  # ("pipeline", 2, "qos"): elements of an array of tables count from 1

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_NAME = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER = re.compile(rf"[ \t]*(\[\[?)[ \t]*({_NAME})[ \t]*\]")
_KEY = re.compile(rf"[ \t]*({_NAME})[ \t]*=")
_ONE = re.compile(_PART)
# what can hide a bracket, a hash or a line break in a value
_TOKEN = re.compile(
    "|".join(
        (
            r'"""(?:[^\\]|\\.)*?"{3,5}',
            r"'''.*?'{3,5}",
            r'"(?:[^"\\\n]|\\.)*"',
            r"'[^'\n]*'",
            r"\#[^\n]*",
            r"[\[\]{}\n]",
        )
    ),
    re.DOTALL,
)


def lines(text: str) -> dict[Path, int]:
    """Line numbers, from 1, by path."""
    found: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    at, line = 0, 1
    while at < len(text):
        if header := _HEADER.match(text, at):
            # The order matters: `[[pipeline]]` is counted before its own keys are, so that they stand under its
            # number.
            table = _real(_split(header[2]), counts)
            if len(header[1]) == 2:
                counts[table] = counts.get(table, 0) + 1
                found.setdefault(table, line)
                table = (*table, counts[table])
            found.setdefault(table, line)
            end = _end_of_line(text, header.end())
        elif key := _KEY.match(text, at):
            parts = _split(key[1])
            for size in range(1, len(parts) + 1):
                # a.b = 1 also makes the table a: an error about that table finds this line.
                found.setdefault((*table, *parts[:size]), line)
            end = _end_of_value(text, key.end())
        else:
            end = _end_of_line(text, at)
        line += text.count("\n", at, end)
        at = end
    return found


def nearest(found: dict[Path, int], path: Path) -> int | None:
    """The line of `path`, or of what it is written in."""
    for size in range(len(path), 0, -1):
        if path[:size] in found:
            return found[path[:size]]
    return None


def _real(parts: tuple[str, ...], counts: dict[Path, int]) -> Path:
    """[pipeline.x] is in the last [[pipeline]]."""
    path: Path = ()
    for number, part in enumerate(parts, 1):
        path = (*path, part)
        if number < len(parts) and path in counts:
            path = (*path, counts[path])
    return path


def _split(name: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _ONE.findall(name))


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end + 1


def _end_of_value(text: str, at: int) -> int:
    depth = 0
    for token in _TOKEN.finditer(text, at):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        # Within brackets a line break does not end a value. Within a text it is part of the text's token and never
        # comes here.
        elif token[0] == "\n" and depth <= 0:
            return token.end()
    return len(text)

"""Reads a .env file: KEY=VALUE lines, strictly, so that a slip is an error and not a wrong setting.

A line is empty, a comment (#), or `[export ]KEY=VALUE`. VALUE is bare, in 'single quotes' (taken as it stands)
or in "double quotes" (with \\n \\r \\t \\\\ \\" and \\$). A bare value ends where white space and a # follow: a # that
follows anything else belongs to it, also as its first character (`TOPIC=#`, `PASS=#secret`), as python-dotenv and
godotenv have it. There is no `$NAME` or `${NAME}` expansion, and a value cannot go on over the end of its line.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fastkin.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ESCAPE = re.compile(r"\\(.)")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "$": "$"}


def read(path: Path) -> dict[str, tuple[str, int]]:
    """Names to (value, line number). A name that comes twice is an error: which one was meant?"""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(str(path), "there is no such env file", "check --env-file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"is not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    found: dict[str, tuple[str, int]] = {}
    # not splitlines(): U+2028 and the like end no line here, and may stand in a password
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        place = f"{path} line {number}"
        pair = _line(line.strip(), place)
        if pair is None:
            continue
        name, value = pair
        if name in found:
            raise ConfigError(place, f"{name} is set again, first in line {found[name][1]}", "keep one of them")
        found[name] = (value, number)
    return found


def _line(line: str, place: str) -> tuple[str, str] | None:
    if not line or line.startswith("#"):
        return None
    if line.startswith(("export ", "export\t")):
        line = line[7:].lstrip()
    name, equals, rest = line.partition("=")
    name = name.rstrip()
    # the line itself is never shown: it may hold a secret
    if not equals:
        raise ConfigError(place, "is not KEY=VALUE", "write KEY=VALUE, or # before a comment")
    if not _NAME.fullmatch(name):
        raise ConfigError(place, f"{name[:40]!r} is not a name", "names are letters, digits and _, no digit first")
    return name, _value(rest, place, name)


def _value(rest: str, place: str, name: str) -> str:
    text = rest.strip()
    quote = text[:1]
    if quote not in ("'", '"') or not quote:
        return re.split(r"\s#", rest, maxsplit=1)[0].strip()
    # Single quotes know no escapes, as in a shell. In double ones a backslash must mean something, so a slip is an
    # error.
    pattern = r"'([^']*)'(.*)" if quote == "'" else r'"((?:[^"\\]|\\.)*)"(.*)'
    match = re.fullmatch(pattern, text)
    if match is None:
        raise ConfigError(place, f"the quotes of {name} are not closed", f"end the line with {quote}")
    value, after = match.groups()
    if after.strip() and not after.lstrip().startswith("#"):
        raise ConfigError(place, f"there is text after the closing quote of {name}", "quote the whole value")
    if quote == "'":
        return str(value)

    def escape(found: re.Match[str]) -> str:
        char = found.group(1)
        if char not in _ESCAPES:
            raise ConfigError(
                place,
                f"\\{char} in the value of {name} means nothing",
                "write \\\\ for a backslash, or use single quotes",
            )
        return _ESCAPES[char]

    return _ESCAPE.sub(escape, value)

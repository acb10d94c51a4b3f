"""What one setting is: a row of the tables in config.py, which are dataclasses.

    max_records: int = row(500, "records per call", least=1, most=500, argument=True)

The field says name, type, choices (`Literal[...]`) and default; its row says the rest. All who must know the settings
read them from there: the reader of TOML and environment, `Producer`, `fastkin check`, the tables of the README. With
lists of their own a new setting would be missing in one of them, or have another range or default there.

A row judges one value by itself. What takes a second look cannot be a row: whether the value fits to another one, to a
file or to a broker. Such rules are in settings/rules_*.py.
"""

from __future__ import annotations

import enum
import json
import numbers
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

T = TypeVar("T")
Kind = Literal["text", "int", "number", "flag", "list"]

_ROW = "row"  # its place in the metadata of a field
_UNITS = frozenset({"bytes", "ms", "s"})  # how the name of a number ends


class Shape(NamedTuple):
    """What a text must look like."""

    fits: str | Callable[[str], bool]  # a pattern for the whole of it (ASCII), or a function
    problem: str  # "is not a stream name"
    cure: str  # what to write instead
    shown: bool = True  # False: not with the problem, for it may hold a secret or be very long
    hidden_with: str = ""  # a text with this in it is never shown

    def holds(self, text: str) -> bool:
        if isinstance(self.fits, str):
            return re.fullmatch(self.fits, text, re.ASCII) is not None
        return self.fits(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting. What is in the first part is written down in config.py, the second part is read from the field."""

    doc: str  # one line: what it does; shown in the README
    least: float | None = None  # of a number: both or none
    most: float | None = None
    why: str = ""  # whose limit that is, told to who passes it
    shape: Shape | None = None
    secret: bool = False  # never shown
    argument: bool = False  # `Producer` has an argument of this name
    argument_least: float | None = None  # for who knows his records: a program may ask for less than a file
    choices: tuple[str, ...] = ()  # read from a `Literal[...]`; said where a table has them
    file: bool = False  # a path: as an argument it may be a pathlib.Path
    own: bool = False  # one pipeline's: a FASTKIN_PIPELINE_ name cannot mean it when there are several
    aliases: tuple[str, ...] = ()  # other names for it in the file
    aws: tuple[str, ...] = ()  # what the AWS SDK calls it in the environment; the first that is set counts
    microservice: str = ""  # what the MQTT-to-Kinesis microservice calls it in the environment

    section: str = ""  # the table of the file: "broker.tls"
    key: str = ""
    kind: Kind = "text"
    default: Any = None

    @property
    def unit(self) -> str:
        """Of a number: "bytes", "ms" or "s", for a name ends with its unit; "" for what is counted."""
        end = self.key.rpartition("_")[2]
        return end if self.kind in {"int", "number"} and end in _UNITS else ""

    @property
    def shown_choices(self) -> tuple[str, ...]:
        r"""The choices as a person writes them: a line feed is \n. The empty one means "left out"."""
        return tuple(json.dumps(each)[1:-1] for each in self.choices if each)

    def hides(self, value: object) -> bool:
        """May this value not be shown?"""
        mark = self.shape.hidden_with if self.shape is not None else ""
        return self.secret or (mark != "" and mark in str(value))

    @property
    def variable(self) -> str:
        """Its name in the environment: FASTKIN_BROKER_TLS_CA."""
        return f"FASTKIN_{self.section}_{self.key}".replace(".", "_").upper()


def row(
    default: T,
    doc: str,
    *,
    least: float | None = None,
    most: float | None = None,
    why: str = "",
    shape: Shape | None = None,
    secret: bool = False,
    argument: bool = False,
    argument_least: float | None = None,
    choices: tuple[str, ...] = (),
    file: bool = False,
    own: bool = False,
    aliases: tuple[str, ...] = (),
    aws: tuple[str, ...] = (),
    microservice: str = "",
) -> T:
    """A dataclass field with its row. The arguments are those of `Row`."""
    made = Row(
        doc=doc, least=least, most=most, why=why, shape=shape, secret=secret, argument=argument,
        argument_least=argument_least, choices=choices, file=file, own=own, aliases=aliases, aws=aws,
        microservice=microservice,
    )  # fmt: skip
    # for type checkers it is the default, as with dataclasses.field
    return field(default=default, repr=not secret, metadata=meta(made))


def meta(made: Row) -> dict[str, Row]:
    """For a field without a default: `field(metadata=meta(Row(...)))`. Behind row() type checkers would see one."""
    return {_ROW: made}


def rows_of(table: type, section: str) -> Mapping[str, Row]:
    """The rows of a dataclass by key, in their order. Fields without a row are no settings."""
    # Annotations are texts in this package: only this makes types of them.
    hints = get_type_hints(table)
    found = {}
    for each in fields(table):
        written = each.metadata.get(_ROW)
        if written is not None:
            kind, choices = _kind(hints[each.name])
            default = None if each.default is MISSING else each.default
            found[each.name] = replace(
                written, section=section, key=each.name, kind=kind, choices=choices or written.choices, default=default
            )
    return found


_KINDS: dict[object, Kind] = {str: "text", int: "int", float: "number", bool: "flag", tuple[str, ...]: "list"}


def _kind(hint: object) -> tuple[Kind, tuple[str, ...]]:
    if isinstance(hint, UnionType):  # str | None
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is Literal:
        return "text", get_args(hint)
    return _KINDS[hint], ()


class Fault(enum.Enum):
    """What can be wrong with one value by itself. Who asked has the words for it."""

    KIND = enum.auto()  # a text where a number belongs, a bool, NaN
    RANGE = enum.auto()
    CHOICE = enum.auto()
    EMPTY = enum.auto()
    CONTROL = enum.auto()  # a control character: it would break log lines and headers
    SHAPE = enum.auto()


def fault(row: Row, value: object, least: float | None = None) -> Fault | None:
    """What is wrong with a value that was said; None: nothing. `least`: instead of the row's."""
    match row.kind:
        case "text":
            return _fault_of_text(row, value) if isinstance(value, str) else Fault.KIND
        case "flag":
            return None if isinstance(value, bool) else Fault.KIND
        case "list":
            if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
                return Fault.KIND
            return None if all(value) else Fault.EMPTY
    return _fault_of_number(row, value, row.least if least is None else least)


def _fault_of_number(row: Row, number: Any, least: float | None) -> Fault | None:
    # numbers of other libraries may be given as arguments; a bool is an int for Python, and here a slip, as NaN is
    wanted = numbers.Integral if row.kind == "int" else numbers.Real
    if not isinstance(number, wanted) or isinstance(number, bool) or number != number:
        return Fault.KIND
    value: Any = number  # the abstract kinds of numbers do not say that they can be compared
    if least is None or row.most is None or least <= value <= row.most:
        return None
    return Fault.RANGE


def _fault_of_text(row: Row, text: str) -> Fault | None:
    if text in row.choices:
        return None  # a separator may be a control character
    # Whatever else the text is for: names go into log lines, topics and keys into packets and headers, and none of
    # them can have a control character.
    if re.search(r"[\x00-\x1f\x7f]", text):
        return Fault.CONTROL
    if row.choices:
        return Fault.CHOICE
    if not text:
        return None if row.default == "" else Fault.EMPTY
    return Fault.SHAPE if row.shape is not None and not row.shape.holds(text) else None


def close(name: str, known: Iterable[str]) -> str | None:
    """The name that was probably meant, whatever its case and underscores; None: nothing is near."""
    import difflib  # only who made a mistake pays for it

    # People write clientId, CLIENT-ID and client_id, and mean the same.
    folded = {each.casefold().replace("_", ""): each for each in known}
    near = difflib.get_close_matches(name.casefold().replace("_", ""), folded, 1, 0.7)
    return folded[near[0]] if near else None

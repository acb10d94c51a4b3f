"""The `partition_key` setting: a spec string to the arguments of `_codec.KeyPlan`.

uuid                a fresh UUID for every record: even spread, duplicates can be recognised
content             a UUID made from topic and payload: what comes again after a crash has the same key
topic               the whole topic
topic:N             level N of the topic, from 0: topic:1 of plant/welder7/data is welder7
field:a.b           a field of the JSON payload; records without it get a UUID
client              the MQTT client id that fastkin uses
static:X            always X
template:...        text with {hostname} {client} {topic} {topic[N]} {field:a.b}; {{ is a brace
none                no key: only for streams that choose shards themselves
"""

from __future__ import annotations

import re
import socket
from typing import Any, Literal, NamedTuple

MAX_KEY_CHARS = 256  # of Kinesis: 1 to 256 Unicode characters

Part = tuple[Literal["text", "topic", "level", "field"], Any]


class KeySpec(NamedTuple):
    """`KeyPlan(*spec)` makes the plan."""

    kind: Literal["uuid", "content", "none", "parts"]
    parts: tuple[Part, ...] = ()


class KeySpecError(ValueError):
    """`problem` says what is wrong with the spec, `cure` what to write."""

    def __init__(self, problem: str, cure: str) -> None:
        self.problem = problem
        self.cure = cure
        super().__init__(f"{problem}; {cure}")


_FORMS = "use uuid, content, topic, topic:N, field:a.b, client, static:X, template:... or none"
_HOLE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_LEVEL = re.compile(r"topic\[(\d{1,5})\]")


def key_plan(spec: str, *, client_id: str = "", hostname: str | None = None) -> KeySpec:
    """Raises KeySpecError."""
    # Only the first colon counts: what is behind it may hold others, as a static key or a template may.
    word, colon, rest = spec.partition(":")
    match word:
        case "uuid" | "content" | "none" | "topic" | "client" if not colon:
            if word == "uuid":
                return KeySpec("uuid")
            if word == "content":
                return KeySpec("content")
            if word == "none":
                return KeySpec("none")
            part: Part = ("topic", None) if word == "topic" else ("text", _client(client_id))
            return KeySpec("parts", (part,))
        case "topic" | "topic_level" if colon:
            if not re.fullmatch(r"\d{1,5}", rest):
                raise KeySpecError(
                    f"{spec!r}: {rest!r} is not a level of the topic",
                    "levels count from 0: topic:1",
                )
            return KeySpec("parts", (("level", int(rest)),))
        case "field" if colon:
            return KeySpec("parts", (_field(rest),))
        case "static" if colon:
            if not 1 <= len(rest) <= MAX_KEY_CHARS:
                raise KeySpecError(
                    f"the static key has {len(rest)} characters",
                    f"Kinesis takes 1 to {MAX_KEY_CHARS}",
                )
            return KeySpec("parts", (("text", rest),))
        case "template" if colon:
            return _template(rest, client_id, hostname)
        case _:
            raise KeySpecError(f"{spec!r} is not a partition key", _FORMS)


def _client(client_id: str) -> str:
    if not client_id:
        raise KeySpecError("the client id is random", "set client_id in [broker] to use it as key")
    if len(client_id) > MAX_KEY_CHARS:
        raise KeySpecError(f"the client id has {len(client_id)} characters", f"Kinesis takes 1 to {MAX_KEY_CHARS}")
    return client_id


def _field(path: str) -> Part:
    # A name with a dot in it cannot be reached. There is no way to write it, and nobody has asked for one.
    names = tuple(path.split("."))
    if not all(names):
        raise KeySpecError(f"{path!r} is not a path of field names", "write field:a or field:a.b")
    return ("field", names)


def _template(text: str, client_id: str, hostname: str | None) -> KeySpec:
    parts: list[Part] = []

    def add_text(more: str) -> None:
        # Neighbours are joined: the codec copies each part for each record, and one copy is cheaper than two.
        if parts and parts[-1][0] == "text":
            parts[-1] = ("text", parts[-1][1] + more)
        elif more:
            parts.append(("text", more))

    at = 0
    for hole in _HOLE.finditer(text):
        add_text(text[at : hole.start()])
        at = hole.end()
        name = hole.group(1)
        if name is None:
            if len(hole.group()) == 1:
                raise KeySpecError(f"the template has a lone {hole.group()}", "write {{ or }} for a brace")
            add_text(hole.group()[0])
        elif name == "hostname":
            add_text(hostname if hostname is not None else socket.gethostname())
        elif name == "client":
            add_text(_client(client_id))
        elif name == "topic":
            parts.append(("topic", None))
        elif level := _LEVEL.fullmatch(name):
            parts.append(("level", int(level.group(1))))
        elif name.startswith("field:"):
            parts.append(_field(name[6:]))
        else:
            raise KeySpecError(
                f"{{{name}}} in the template means nothing",
                "use {hostname}, {client}, {topic}, {topic[N]} or {field:a.b}",
            )
    add_text(text[at:])
    if not parts:
        raise KeySpecError("the template is empty", "for example template:{hostname}/{topic[1]}")
    # What comes from the payload is known later. What is fixed is too long for every record, and is told now.
    fixed = sum(len(value) for kind, value in parts if kind == "text")
    if fixed > MAX_KEY_CHARS:
        raise KeySpecError(f"the template has {fixed} fixed characters", f"Kinesis takes 1 to {MAX_KEY_CHARS}")
    return KeySpec("parts", tuple(parts))

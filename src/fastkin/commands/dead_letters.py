"""`fastkin dead-letters`: what was set aside, one letter in full, and once more to the stream.

A letter is what Kinesis refused (it has a key: it goes again as it is), one record of a frame or a payload that was
too large or whose key was bad (it goes as a record, with a key made anew), or a frame that could not be read (it goes
through the format again).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastkin._codec import KeyPlan, Shape
from fastkin.config import Kinesis
from fastkin.deadletter.destination import PREFIX
from fastkin.deadletter.reader import Damaged, Letter, LetterFiles, Stored, since
from fastkin.deadletter.stream import Post
from fastkin.errors import Action, DataFormatError, FastkinError, KinesisError, LibraryError, RecordError, escaped
from fastkin.formats.partition_key import key_plan
from fastkin.formats.table import DEFAULT, FORMATS, format_named
from fastkin.limits import MIB, RECORD_BYTES
from fastkin.mqtt._core import CountSink, Router, matches
from fastkin.service.shapes import format_of, shape_of, ways

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from fastkin._codec import PayloadFormat, Receipt
    from fastkin.config import Pipeline, Settings
    from fastkin.deadletter.reader import LetterFile
    from fastkin.results import PutResult

    Part = Letter | tuple[Letter, Receipt[PutResult]]  # what is left of a letter, or what was sent of it

# Sent and not yet marked as replayed: what a crash may send twice.
GROUP_LETTERS = 500
GROUP_BYTES = 4 * MIB
_SHOWN_BYTES = 64 * 1024  # of a payload, by `show` without --raw
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which letters are meant; None: any."""

    pipeline: str | None = None
    reason: str | None = None
    topic: str | None = None
    since: float | None = None

    def __call__(self, letter: Letter) -> bool:
        if self.pipeline is not None and letter.pipeline != self.pipeline:
            return False
        if self.reason is not None and self.reason.casefold() not in letter.reason.casefold():
            return False
        if self.topic is not None and (letter.topic is None or not _takes(self.topic, letter.topic)):
            return False
        return self.since is None or since(letter.time) >= self.since


def _takes(topic_filter: str, topic: str) -> bool:
    """By MQTT's rules. A letter may hold what is no topic, and a filter can only mean that literally."""
    if topic_filter == topic:
        return True
    try:
        return matches(topic_filter, topic)
    except LibraryError:
        return False


def parse_since(text: str) -> float:
    """`2h`, `30m`, or an RFC 3339 time. ValueError when neither."""
    if match := _AGO.fullmatch(text.strip()):
        return time.time() - float(match[1]) * _SECONDS[match[2]]
    try:
        return since(text.strip())
    except ValueError:
        raise ValueError(f"{text!r} is neither 90s, 30m, 2h, 7d nor a time such as 2026-11-21T04:00:00Z") from None


def paths_of(files: Sequence[str], settings: Settings | None) -> list[Path]:
    """The files that were named, or else those of the settings."""
    if files:
        return [Path(file) for file in files]
    if settings is None:
        raise click.UsageError("name a FILE of dead letters, or give --config CONFIG.toml")
    found: dict[str, None] = {}
    for pipeline in settings.pipelines:
        place = pipeline.dead_letter
        if place not in (None, "none") and not place.startswith(PREFIX):
            found[place] = None
    if not found:
        raise click.UsageError("no pipeline of these settings has a file as its dead_letter: name a FILE")
    # A pipeline that never had a dead letter has no file. Only when none is there at all is that worth an error.
    there = [Path(name) for name in found if _there(Path(name))]
    return there or [Path(name) for name in found]


def _there(path: Path) -> bool:
    from fastkin.deadletter.file import rotated

    return path.exists() or bool(rotated(path))


# --- list and show ---


def list_letters(paths: Sequence[Path], wanted: Filter, *, as_json: bool) -> int:
    with LetterFiles(paths) as files:
        found = ((n, one) for n, one in numbered_letters(files) if wanted(one))
        # A table is for eyes; what is piped is for programs.
        if as_json or not sys.stdout.isatty():
            for n, one in found:
                click.echo(json.dumps({"n": n, "file": str(one.file.path), "line": one.line} | one.fields()))
        else:
            _table(found)
    return 0


def numbered_letters(files: LetterFiles) -> Iterator[tuple[int, Letter]]:
    """From 1 for the oldest. Damaged lines are told on stderr and have no number."""
    n = 0
    for one in files.letters():
        if isinstance(one, Damaged):
            _say_damaged(one)
        else:
            n += 1
            yield n, one


def _say_damaged(one: Damaged) -> None:
    click.echo(f"damaged: {escaped(str(one.file.path))}:{one.line}: {one.problem}; the line is kept", err=True)


def _table(found: Iterable[tuple[int, Letter]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for name in ("N", "time", "pipeline", "topic", "reason", "bytes"):
        table.add_column(name, justify="right" if name in ("N", "bytes") else "left", overflow="fold")
    count = 0
    for n, one in found:
        count += 1
        cells = (str(n), one.time, one.pipeline, one.topic or "-", one.reason, f"{len(one.payload):,}")
        table.add_row(*(Text(escaped(cell)) for cell in cells))
    console = Console(highlight=False)
    if count:
        console.print(table)
    console.print(f"{count:,} dead letters")


def show(paths: Sequence[Path], number: int, *, raw: bool) -> int:
    """One letter in full, escaped so that it cannot steer a terminal."""
    if raw and sys.stdout.isatty():
        raise click.UsageError("--raw writes the bytes as they are: not to a terminal; send it into a file or a pipe")
    with LetterFiles(paths) as files:
        one = next((letter for n, letter in numbered_letters(files) if n == number), None)
        if one is None:
            raise FastkinError(f"there is no dead letter {number}: see fastkin dead-letters list")
        return _show(one, raw=raw)


def _show(one: Letter, *, raw: bool) -> int:
    if raw:
        for piece in one.payload.pieces() if isinstance(one.payload, Stored) else (one.payload,):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return 0
    click.echo(f"file: {escaped(str(one.file.path))}:{one.line}")
    for name, value in one.fields().items():
        if name != "payload" and value is not None:
            click.echo(f"{name}: {escaped(str(value))}")
    click.echo(f"payload: {len(one.payload):,} bytes")
    begin = next(one.payload.pieces(_SHOWN_BYTES)) if isinstance(one.payload, Stored) else one.payload[:_SHOWN_BYTES]
    for line in _payload(begin, whole=len(begin) == len(one.payload)):
        click.echo(line)
    if len(begin) < len(one.payload):
        click.echo(f"  and {len(one.payload) - len(begin):,} bytes more: --raw writes all of them")
    return 0


def _payload(data: bytes, *, whole: bool) -> Iterator[str]:
    text = None
    # what was cut off may end within a character
    for end in range(len(data), len(data) - (1 if whole else 4), -1):
        with contextlib.suppress(UnicodeDecodeError):
            text = data[:end].decode("utf-8")
            break
    if text is not None and not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text):
        for line in text.split("\n"):
            yield "  " + escaped(line)
        return
    for at in range(0, len(data), 16):
        piece = data[at : at + 16]
        seen = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in piece)
        yield f"  {at:08x}  {piece.hex(' '):<47}  {seen}"


# --- replay ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where the letters of a pipeline go."""

    kinesis: Kinesis
    # of a topic's payloads: how they are read and what their records become. None: not known, frames cannot be read
    # again
    way: Callable[[str | None], tuple[PayloadFormat, Shape | None] | None]
    key: KeyPlan
    drawn: bool  # the batcher draws the keys; else they are made of topic and payload
    max_record_bytes: int | None  # None: what the stream takes


def route_of(pipeline: Pipeline, client_id: str, form: str | None) -> Route:
    kind, parts = key_plan(pipeline.partition_key, client_id=client_id, hostname=socket.gethostname())
    return Route(
        kinesis=pipeline.kinesis,
        way=way_of(pipeline, form),
        key=KeyPlan(kind, parts),
        drawn=kind in {"uuid", "none"},
        max_record_bytes=pipeline.max_record_bytes,
    )


def way_of(pipeline: Pipeline, form: str | None) -> Callable[[str | None], tuple[PayloadFormat, Shape | None] | None]:
    """As the intake tells it from the topic, when the broker does not say by which filter a message came."""
    made = {way: (format_of(pipeline, form or way.format), shape_of(pipeline, way)) for _, way in ways(pipeline)}
    if len(made) == 1:
        (only,) = made.values()
        return lambda _: only
    router = Router()
    sinks = {way: CountSink() for way in made}
    for topic_filter, way in ways(pipeline):
        router.add(topic_filter, sinks[way])
    router.otherwise = CountSink()

    def find(topic: str | None) -> tuple[PayloadFormat, Shape | None] | None:
        try:
            taken = router.match(topic or "")
        except LibraryError:
            taken = []
        found = next((made[way] for way, sink in sinks.items() if sink in taken), None)
        return found or ((format_named(form), None) if form else None)

    return find


@dataclass(slots=True)
class Tally:
    found: int = 0
    replayed: int = 0
    failed: int = 0
    damaged: int = 0
    unknown: int = 0


def replay(
    paths: Sequence[Path], wanted: Filter, *, settings: Settings | None, stream: Kinesis | None, form: str | None
) -> int:
    """0: all replayed; 1: some failed again or were damaged. They are kept."""
    if settings is None and stream is None:
        raise click.UsageError("where to? give --config CONFIG.toml, or --stream")
    tally = Tally()
    with LetterFiles(paths, change=True) as files:
        try:
            asyncio.run(_replay(files, wanted, settings, stream, form, tally))
        finally:
            # also after Ctrl-C: what was replayed is marked by then, and leaves the file
            files.tidy()
            _last_line(tally)
    return 1 if tally.failed or tally.damaged or tally.unknown else 0


async def _replay(
    files: LetterFiles,
    wanted: Filter,
    settings: Settings | None,
    stream: Kinesis | None,
    form: str | None,
    tally: Tally,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        posts: dict[str, Again | None] = {}

        async def again_for(pipeline: str) -> Again | None:
            name = "" if stream is not None else pipeline
            if name not in posts:
                posts[name] = await _open(stack, name, settings, stream, form)
            return posts[name]

        # One group after the other: a crash can send no more than one group twice.
        for letters in _groups(files, wanted, tally):
            await _replay_group(letters, again_for, tally)
            _progress(tally)


def _groups(files: LetterFiles, wanted: Filter, tally: Tally) -> Iterator[list[Letter]]:
    """Letters of one file each: they are marked together."""
    group: list[Letter] = []
    size = 0
    for one in files.letters():
        if isinstance(one, Damaged):
            tally.damaged += 1
            _say_damaged(one)
            continue
        if not wanted(one):
            continue
        if group and (
            one.file is not group[0].file or len(group) >= GROUP_LETTERS or size + len(one.payload) > GROUP_BYTES
        ):
            yield group
            group, size = [], 0
        tally.found += 1
        if reason := _never(one):
            tally.failed += 1
            _say_kept(one, reason)
            continue
        group.append(one)
        size += len(one.payload)
    if group:
        yield group


def _never(one: Letter) -> str | None:
    """Why it is not sent again, whatever the stream takes."""
    if one.truncated:
        return f"its payload is only the beginning of {one.payload_bytes or 'more'} bytes"
    if one.packet:
        return "its payload is an ill-formed MQTT packet and no record"
    return None


def _say_kept(one: Letter, reason: str) -> None:
    click.echo(f"kept: {escaped(str(one.file.path))}:{one.line}: {reason}", err=True)


async def _replay_group(
    letters: list[Letter], again_for: Callable[[str], Awaitable[Again | None]], tally: Tally
) -> None:
    file: LetterFile = letters[0].file
    sent: list[tuple[Letter, list[Part]]] = []
    used: dict[int, Again] = {}
    try:
        for letter in letters:
            again = await again_for(letter.pipeline)
            if again is None:
                tally.unknown += 1
            else:
                sent.append((letter, await again.put(letter)))
                used[id(again)] = again
        for again in used.values():
            await again.post.flush()
    finally:
        # Also when it is broken off: what is stored by now must not go again.
        _settle(file, sent, tally)


def _settle(file: LetterFile, sent: list[tuple[Letter, list[Part]]], tally: Tally) -> None:
    """Mark what ended. It blocks, so that nothing comes between a letter and what takes its place."""
    done: list[Letter] = []
    instead: list[Letter] = []
    for letter, parts in sent:
        if parts and all(isinstance(part, tuple) and not part[1].done() for part in parts):
            continue  # not tried, as far as we know
        left = [failed for part in parts if (failed := _left(part)) is not None]
        if len(left) == 1 and (left[0] is letter or left[0].fields() == letter.fields()):
            tally.failed += 1  # for the same reason: it stands there already
            continue
        instead += left
        done.append(letter)
        if left:
            tally.failed += 1
        else:
            tally.replayed += 1
    # What takes the place of a letter is durable before the letter is marked.
    if instead:
        file.add(instead)
    file.mark(done)


def _left(part: Part) -> Letter | None:
    """What stays of one record: the letter with its new reason, or nothing."""
    if isinstance(part, Letter):
        return part
    letter, receipt = part
    if not receipt.done():
        return letter.again(letter.reason or "not known to be stored: the replay was broken off")
    error = receipt.exception()
    return None if error is None else letter.again(_reason(error))


def _reason(error: BaseException) -> str:
    if isinstance(error, KinesisError):
        return f"{error.code}: {error.message}"
    return str(error)


class Again:
    """One destination, open."""

    def __init__(self, route: Route, post: Post, largest: int) -> None:
        self.route = route
        self.post = post
        self.largest = largest  # record

    async def put(self, letter: Letter) -> list[Part]:
        """Its records, each with its receipt, or as the letter that stays when it cannot even be put.

        Of a frame larger than a group, those that are stored when this returns are left out. Broken off before that,
        all of it goes again.
        """
        # It was a record by itself, or one of a frame: what Kinesis refused, or what was too large.
        if letter.offset is None or letter.index is not None:
            return [self._put(letter)]
        way = self.route.way(letter.topic)
        if way is None:
            return [letter.again(f"its format is not known: give --config, or --format {' or '.join(FORMATS)}")]
        row, shape = way
        if row.name == DEFAULT and shape is None:
            return [self._put(letter)]
        try:
            content, topic = letter.content(), (letter.topic or "").encode()
            records = (shape or Shape()).records(topic, row, content)
        except DataFormatError as error:
            if isinstance(letter.payload, Stored):  # not written once more for another reason
                _say_kept(letter, f"byte {error.offset}: {error.reason}")
                return [letter]
            return [letter.again(error.reason, offset=error.offset)]
        # each alone: when some fail again, the others must not be sent once more
        parts: list[Part] = []
        nbytes = 0
        for n, data in enumerate(records):
            parts.append(self._put(letter.again("", index=n, payload=data)))
            nbytes += len(data)
            if nbytes >= GROUP_BYTES:
                nbytes = 0
                await self.post.flush()
                # A frame may be larger than memory should hold: what is stored by now is let go, before more of it is
                # put.
                parts = [part for part in parts if _left(part) is not None]
        return parts

    def _put(self, letter: Letter) -> Part:
        # Told from its length: to read hundreds of MiB only to be refused would fill memory for nothing.
        if isinstance(letter.payload, Stored) and len(letter.payload) > self.largest:
            _say_kept(
                letter, f"a record of {len(letter.payload)} bytes; the largest that may be sent has {self.largest}"
            )
            return letter
        payload = letter.content()
        try:
            # A record that Kinesis refused keeps its key, so that a duplicate can be recognised.
            key = letter.partition_key
            if key is None and not self.route.drawn:
                key = self.route.key.render((letter.topic or "").encode(), payload)
            return letter, self.post.put(payload, key)
        except (RecordError, ValueError) as error:
            return letter.again(str(error))


async def _open(
    stack: contextlib.AsyncExitStack,
    pipeline: str,
    settings: Settings | None,
    stream: Kinesis | None,
    form: str | None,
) -> Again | None:
    if stream is not None:
        plain = (format_named(form), None) if form else None
        route = Route(kinesis=stream, way=lambda _: plain, key=KeyPlan("uuid"), drawn=True, max_record_bytes=None)
    else:
        assert settings is not None
        named = [each for each in settings.pipelines if each.id == pipeline]
        if not named:
            known = ", ".join(each.id for each in settings.pipelines)
            click.echo(
                f"kept: the settings have no pipeline {escaped(pipeline)!r} (known: {known}); give --stream", err=True
            )
            return None
        route = route_of(named[0], settings.broker.client_id, form)
    # Trusted: a letter that is refused stays in its file, so nothing is lost by believing the refusal at once.
    post = Post(pipeline or "-", route.kinesis, max_calls=min(4, route.kinesis.max_connections), trusted=True)
    stack.push_async_callback(post.close)
    await post.client.start()
    largest = await _largest(post)
    await post.start(key=route.key, max_record_bytes=route.max_record_bytes or largest)
    return Again(route, post, route.max_record_bytes or largest)


async def _largest(post: Post) -> int:
    """The largest record the stream takes. KinesisError when there is no such stream: nothing was sent then."""
    try:
        return (await post.client.describe()).max_record_bytes
    except KinesisError as error:
        if error.action is Action.OPERATOR and "AccessDenied" in error.code:
            return RECORD_BYTES  # to put is enough
        raise


def _progress(tally: Tally) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{tally.replayed:,} replayed, {tally.failed:,} failed again ", err=True, nl=False)


def _last_line(tally: Tally) -> None:
    if sys.stderr.isatty():
        click.echo("\r", err=True, nl=False)
    kept = tally.failed + tally.unknown
    rest = tally.found - tally.replayed - kept
    text = f"{tally.replayed:,} replayed"
    if kept:
        text += f", {kept:,} failed again and are kept"
    if rest:
        text += f", {rest:,} not tried"
    if tally.damaged:
        text += f", {tally.damaged:,} damaged lines are kept"
    click.echo(text, err=True)


def stream_of(name: str, region: str | None, endpoint_url: str | None, profile: str | None) -> Kinesis:
    """The destination of --stream, reached as `fastkin tail` reaches it."""
    endpoint_url = endpoint_url or next(
        filter(None, map(os.environ.get, ("AWS_ENDPOINT_URL_KINESIS", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))), None
    )
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if name.startswith("arn:"):
        from fastkin.aws.endpoint import parse_arn

        arn = parse_arn(name)
        return Kinesis(
            stream=name.rpartition("/")[2], stream_arn=name, region=arn.region, endpoint_url=endpoint_url,
            profile=profile,
        )  # fmt: skip
    return Kinesis(stream=name, region=region, endpoint_url=endpoint_url, profile=profile)

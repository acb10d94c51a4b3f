"""Log lines: fields, repeats, and that no topic, payload, server or broker can forge one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from delivery import test_sender as scripted
from fastkin._codec import DRAIN, DROPPED, Batcher, Budget, KeyPlan
from fastkin.aws.error_table import error_from
from fastkin.aws.http_answer import Reply
from fastkin.deadletter.handler import DeadLetterHandler
from fastkin.errors import Action, KinesisError, printable
from fastkin.mqtt.words import explain
from fastkin.status import logs
from support import fake_broker, mqtt_wire
from support.fake_broker import FakeBroker, Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FORGED = "2026-01-01T00:00:00.000Z ERROR   p decode forged"
HOSTILE = {
    "line feed": f"a\n{FORGED}",
    "carriage return": f"a\r{FORGED}",
    "both": f"a\r\n{FORGED}",
    "vertical tab": f"a\v{FORGED}",
    "form feed": f"a\f{FORGED}",
    "file separator": f"a\x1c{FORGED}",
    "next line": f"a\x85{FORGED}",
    "line separator": f"a\u2028{FORGED}",
    "paragraph separator": f"a\u2029{FORGED}",
    "escape": "a\x1b[2K\x1b[1;31mred\x1b[0m",
    "csi": "a\x9b31m",
    "bell, backspace": "a\x07\x08\x08",
    "nul": "a\x00b",
    "del": "a\x7f",
    "turned direction": "a\u202eKO\u202c",
    "isolates": "a\u2066b\u2069",
    "marks": "a\u200f\u061c\u200e",
    "no width": "a\u200b\u200d\ufeff",
    "tags": "a\U000e0041",
    "lone surrogate": "a\ud800b",
    "percent": "%s %d %(name)s",
    "quotes": "'\" topic='x' \\",
    "fields": "pipeline=other stage=send forged",
    "braces": '{"level":"ERROR"}',
    "long": "x" * 30_000,
}
hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


@pytest.fixture
def written() -> Iterator[Callable[[bool], Callable[[], list[str]]]]:
    """written(json_lines) sets the logs up as the commands do and returns what gives the lines so far."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.getLogger("fastkin").level

    def start(json_lines: bool) -> Callable[[], list[str]]:
        out = io.StringIO()
        logs.setup(json_lines=json_lines, stream=out, level=logging.DEBUG)
        return lambda: out.getvalue().split("\n")[:-1]

    yield start
    root.handlers[:], level, own = before
    root.setLevel(level)
    logging.getLogger("fastkin").setLevel(own)
    logging.captureWarnings(False)


def fit(line: str) -> bool:
    return line.isprintable() and len(line) < 40_000


def sane(lines: list[str], json_lines: bool, stage: str, pipeline: str = "p") -> list[str]:
    """Each is one line of that pipeline and stage; the messages."""
    messages = []
    for line in lines:
        assert fit(line), line
        if json_lines:
            told = json.loads(line)
            assert (told["pipeline"], told["stage"]) == (pipeline, stage)
            assert set(told) <= {"time", "level", "pipeline", "stage", "topic", "message"}
            messages.append(told["message"])
        else:
            found = re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z (ERROR|WARNING|INFO|DEBUG) +(\S+) (\w+) (.*)", line)
            assert found is not None and (found[2], found[3]) == (pipeline, stage), line
            messages.append(found[4])
    return messages


both = pytest.mark.parametrize("json_lines", [False, True], ids=["text", "json"])


# --- what strangers choose ---


@hostile
def test_printable(text: str) -> None:
    assert fit(printable(text))
    assert len(printable(text)) < 1200
    if text.isprintable() and len(text) < 1000:
        assert printable(text) == text


@both
@hostile
def test_any_message(text: str, json_lines: bool, written: Any) -> None:
    lines = written(json_lines)
    logging.getLogger("fastkin.x").warning("pipeline=p stage=send it said %s", text)
    logging.getLogger("fastkin.x").warning("pipeline=p stage=send %s", text)
    assert len(sane(lines(), json_lines, "send")) == 2


@both
@hostile
def test_another_librarys_message(text: str, json_lines: bool, written: Any) -> None:
    """Only our own loggers name pipeline and stage in the message."""
    lines = written(json_lines)
    logging.getLogger("botocore.x").warning(text)
    (line,) = lines()
    assert fit(line)
    if json_lines:
        assert json.loads(line)["pipeline"] == "-"
    else:
        assert line.split()[2] == "-"


@both
@hostile
async def test_the_topic_and_payload_of_a_bad_frame(text: str, json_lines: bool, written: Any) -> None:
    topic = text.encode("utf-8", "surrogatepass")
    lines = written(json_lines)
    batcher = Batcher(
        settler=None,
        budget=Budget(1 << 20, 1000),
        frame="bulk",
        key=KeyPlan("uuid"),
        target=b'"StreamName":"s"',
    )
    tasks = []

    def spawn(coroutine: Any, name: str) -> Any:
        tasks.append(asyncio.create_task(coroutine, name=name))
        return tasks[-1]

    aside = DeadLetterHandler("p", batcher, None, topics=("a/#",), spawn=spawn, on_settled=lambda: None)
    batcher.offer(topic, topic[:1000], 1)
    rejects = batcher.take_rejects()
    for reject in rejects:
        aside.rejected(reject)
    await asyncio.gather(*tasks)
    assert len(rejects) == 1
    (message,) = sane(lines(), json_lines, "decode")
    assert re.search(r"byte \d+: .* \(\d+ bytes, first [0-9a-f]+\)$", message)
    if json_lines:
        assert json.loads(lines()[0])["topic"] == topic.decode("utf-8", "replace")[:1024]
    else:
        assert message.startswith("topic=")


async def test_a_flood_of_bad_frames_is_ten_lines_a_second_and_a_count(written: Any) -> None:
    lines = written(False)
    budget = Budget(1 << 20, 1000)
    batcher = Batcher(settler=None, budget=budget, frame="bulk", key=KeyPlan("uuid"), target=b'"StreamName":"s"')
    tasks: list[Any] = []

    def spawn(coroutine: Any, name: str) -> Any:
        tasks.append(asyncio.create_task(coroutine, name=name))
        return tasks[-1]

    aside = DeadLetterHandler("p", batcher, None, topics=("a/#",), spawn=spawn, on_settled=lambda: None)
    for n in range(300):
        batcher.offer(b"a/b", b"junk" if n % 3 else b"", 1)
    for reject in batcher.take_rejects():
        aside.rejected(reject)
    await asyncio.gather(*tasks)
    await aside.close()
    said = lines()
    assert len(said) == 22
    assert sorted(int(more) for more in re.findall(r"\((\d+) more like this\)", "\n".join(said))) == [89, 189]
    assert sum(aside.format_errors.values()) == batcher.dropped == 300
    assert budget.bytes == 0


@both
@hostile
async def test_what_kinesis_says_of_a_call_and_a_record(text: str, json_lines: bool, written: Any) -> None:
    error = error_from(Reply(400, {"x-amzn-requestid": text}, orjson.dumps({"__type": "x", "message": "?"})), 0.0)
    plain = KinesisError(text, text, http_status=400, request_id=text)
    for each in (error, plain):
        assert fit(str(each)) and fit(each.code) and fit(each.message)
    lines = written(json_lines)
    logging.getLogger("fastkin.send").warning("pipeline=p stage=send call failed: %s", plain)
    assert len(sane(lines(), json_lines, "send")) == 1


@hostile
async def test_what_the_sender_quotes(text: str, written: Any) -> None:
    """An entry that fails, one that is refused for good, a call that fails."""
    verdicts: list[Any] = [
        [(text or "x", text), ("InternalFailure", text), (scripted.THROTTLED, text)],
        KinesisError(text, text, http_status=503, request_id=text),
        KinesisError("AccessDeniedException", text, action=Action.OPERATOR),
    ]

    def script(call: int, records: list[dict[str, str]]) -> Any:
        return verdicts[call - 1] if call <= len(verdicts) else scripted.all_stored(call, records)

    lines = written(False)
    rig = scripted.Rig(scripted.Scripted(script))
    for record in (b"a", b"b", b"c"):
        rig.batcher.add(record)
    rig.batcher.close_batch(DRAIN)
    rig.sender.pump()
    async with asyncio.timeout(20):
        while rig.sender.counters.calls < 3 or rig.sender.in_flight:
            await asyncio.sleep(0.01)
    await rig.sender.close()
    for batch in rig.sender.unsent():
        batch.finish(DROPPED)
    assert len(sane(lines(), False, "send", "test")) >= 3
    counters = rig.sender.counters
    for tally in (counters.retried_by_code, counters.calls_failed_by_code, counters.throttled):
        assert all(fit(name) and len(name) <= 64 for name in tally)


@hostile
async def test_what_a_broker_says(text: str, written: Any) -> None:
    """In a CONNACK that refuses, in one that accepts, in a DISCONNECT; and where it sends us."""
    said = text.encode("utf-8", "surrogatepass")
    sized = len(said).to_bytes(2, "big") + said

    def packet(first: int, head: bytes, properties: bytes) -> bytes:
        body = head + mqtt_wire.varint(len(properties)) + properties
        return bytes([first]) + mqtt_wire.varint(len(body)) + body

    async def script(peer: Peer) -> None:
        if peer.number == 1:
            await peer.connect(packet(0x20, b"\x00\x87", b"\x1f" + sized + b"\x1c" + sized))
        else:
            await peer.connect(packet(0x20, b"\x00\x00", b"\x12" + sized))
            await peer.subscribe()
            peer.send(packet(0xE0, b"\x8b", b"\x1f" + sized + b"\x1c" + sized))
        await peer.until_closed()

    lines = written(False)
    async with FakeBroker(script) as broker:
        rig = fake_broker.Rig(broker, protocol="5", reconnect_min_s=0.01, reconnect_max_s=0.02)
        rig.start()
        await fake_broker.until(lambda: broker.connections >= 3)
        await rig.crash()
    messages = sane(lines(), False, "intake", "-")
    assert any("cannot connect" in message for message in messages)
    assert len(messages) >= 3


@hostile
def test_why_there_is_no_connection(text: str) -> None:
    assert fit(explain(OSError(text)))
    assert fit(explain(ValueError(text)))


# --- fields ---


def test_a_topic_is_a_field_in_json(written: Any) -> None:
    lines = written(True)
    log = logging.getLogger("fastkin.pipeline")
    for topic in ("plant/a", "it's", 'a"b', "a\nb", "ü\u2028", "back\\", "' stage=x"):
        log.error("pipeline=%s stage=decode topic=%s byte %d", "p", ascii(topic), 3)
        told = json.loads(lines()[-1])
        assert (told["topic"], told["message"]) == (topic, "byte 3")
    log.error("pipeline=p stage=decode no topic='here' then")
    assert "topic" not in json.loads(lines()[-1])


# --- repeats ---


class Clock:
    """Stands for a loop: call_later() and time that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Any, Any]] = []

    def later(self, delay: float, call: Any, kind: str) -> Any:
        timer = (self.now + delay, call, kind)
        self.timers.append(timer)
        clock = self

        class Handle:
            def cancel(self) -> None:
                with contextlib.suppress(ValueError):
                    clock.timers.remove(timer)

        return Handle()

    def pass_(self, seconds: float) -> None:
        end = self.now + seconds
        while due := sorted((t for t in self.timers if t[0] <= end), key=lambda t: t[0]):
            self.now = due[0][0]
            self.timers.remove(due[0])
            due[0][1](due[0][2])
        self.now = end


def repeats(caplog: pytest.LogCaptureFixture, most: int = 3, per_s: float = 1.0) -> tuple[logs.Repeats, Clock]:
    caplog.set_level(logging.INFO, "fastkin")
    clock = Clock()
    return logs.Repeats(logging.getLogger("fastkin.x"), clock.later, most=most, per_s=per_s), clock


def test_what_is_more_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    lines, clock = repeats(caplog)
    for n in range(10):
        lines.say(logging.WARNING, "a", "line %d", n)
    assert caplog.messages == ["line 0", "line 1", "line 2"]
    clock.pass_(1.0)
    assert caplog.messages[3:] == ["line 9 (6 more like this)"]
    clock.pass_(5.0)
    assert not clock.timers  # nothing goes on for ever
    lines.say(logging.WARNING, "a", "again")
    assert caplog.messages[4:] == ["again"]


def test_a_flood_stays_bounded_and_nothing_is_left_out_of_the_count(caplog: pytest.LogCaptureFixture) -> None:
    lines, clock = repeats(caplog, most=10)
    for _ in range(200):
        for _ in range(500):
            lines.say(logging.WARNING, "a", "line")
        clock.pass_(0.1)
    lines.close()
    assert len(caplog.messages) <= 21 * 11
    more = [re.search(r"\((\d+) more", message) for message in caplog.messages]
    assert sum(1 + int(each[1]) if each else 1 for each in more) == 200 * 500


def test_kinds_do_not_hide_each_other_and_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    lines, clock = repeats(caplog, most=1)
    lines.say(logging.WARNING, "a", "a")
    lines.say(logging.WARNING, "a", "a")
    lines.say(logging.ERROR, "b", "b")
    assert caplog.messages == ["a", "b"]
    for n in range(10_000):
        lines.say(logging.ERROR, f"kind {n}", "x")
    assert len(clock.timers) < 100 and len(caplog.messages) < 100


def test_one_held_line_is_said_as_it_is_and_close_says_it(caplog: pytest.LogCaptureFixture) -> None:
    lines, clock = repeats(caplog, most=1)
    lines.say(logging.INFO, "a", "%s", "first")
    lines.say(logging.WARNING, "a", "100%% %s", "second")
    lines.close()
    assert caplog.messages == ["first", "100% second"]
    assert caplog.records[-1].levelno == logging.WARNING
    assert not clock.timers
    lines.say(logging.INFO, "a", "after")
    assert caplog.messages[-1] == "after"

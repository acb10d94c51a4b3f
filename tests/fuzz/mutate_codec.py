"""Random mutations of frames, payloads and answers into the codec: a result or its own error, nothing else.

    python tests/fuzz/mutate_codec.py [--count N] [--seed N] [--keep FILE]

Meant for the sanitizer build, where a read past the end stops the process; --keep leaves the last input in
FILE for that case. Each input is exactly as long as its memory, so that one byte too far is noticed. A run is
repeatable: batch by batch from (seed, batch).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import random
import sys
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

from fastkin._codec import (
    DEAD,
    DRAIN,
    DROPPED,
    Batch,
    Batcher,
    Budget,
    CallbackSettler,
    KeyPlan,
    ShardTable,
    decode_frame,
    encode_frame,
)  # fmt: skip
from fastkin.errors import DataFormatError, RecordError, UnexpectedResponse

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 2000
FRAME_EDGES = bytes.fromhex("00010203 1f207f80 909192a0 a3bfc0c1 c4c5c6c7 d9dadbdc dddefeff")
TEXT_EDGES = b'{}[]",:\\u0d8Dcntfe19-+. \n\t/' + bytes((0, 0x1F, 0x7F, 0x80, 0xC0, 0xE2, 0xED, 0xF4, 0xFF))

CORPUS = Path(__file__).resolve().parent.parent / "corpus"
FRAMES = [path.read_bytes() for path in sorted(CORPUS.glob("frame-*.bin"))]
JSONS = [
    b'{"a":{"b":"welder-7"},"t":1}',
    b'{"z":[1,2,{"a":null}],"a":{"c":"\\u00fc\\ud83d\\ude00","b":-1.5e-3}}',
    b'{"a":{"\\u0062":"' + b"k" * 260 + b'"}}',
    b'{"a":{"b":"\xe2\x82\xac\\n\\"\\\\"},"x":"\\\\\\""}',
    b'{"deep":' + b"[" * 50 + b"]" * 50 + b',"a":{"b":true}}',
]
_KINESIS = (
    b'{"FailedRecordCount":1,"Records":[{"SequenceNumber":"4964","ShardId":"shardId-000000000000"},'
    b'{"ErrorCode":"ProvisionedThroughputExceededException","ErrorMessage":"Rate exceeded for shard \\u00fc"},'
    b'{"SequenceNumber":"4965","ShardId":"shardId-000000000001"}],"EncryptionType":"KMS"}'
)
_MOCK = (
    b'{"EncryptionType":"NONE","FailedRecordCount":0,"Records":[{"ErrorCode":null,"ErrorMessage":null,'
    b'"SequenceNumber":"1","ShardId":"s"},{"ShardId":"s","SequenceNumber":"2"},'
    b'{"ErrorCode":null,"SequenceNumber":"3","ShardId":"s"}]}'
)
_FAILED = {"Records": [{"ErrorCode": "A", "ErrorMessage": None, "x": [1, {"y": []}]}] * 3, "FailedRecordCount": 3}
BODIES = [
    b'{"Records":[{"Data":"AAAA","PartitionKey":"k"},{"Data":"","PartitionKey":"l\\u00fc\\n\\""},{"Data":"QQ=="}],"S":"s"}',
    b'{"Records":[{"Data":"QUI=","PartitionKey":"a","ExplicitHashKey":"340282366920938463463374607431768211455"}],"S":"s"}',
]
COUNTS = [b"", b"\x01\x00\x00\x00", b"\x02\x00\x00\x00" * 3, b"\x00" * 12, b"\x01"]
ANSWERS = [_KINESIS, _MOCK, json.dumps(_FAILED, indent=1).encode()]


def mutate(seed: bytes, draw: Callable[[], float], edges: bytes, others: list[bytes]) -> bytes:
    """One to four changes: flip, overwrite, cut, insert, repeat, splice."""
    data = bytearray(seed)
    for _ in range(1 + int(draw() * draw() * 4)):
        size = len(data)
        if not size:
            return b""
        at = int(draw() * size)
        kind = int(draw() * 9)
        if kind < 2:
            data[at] ^= 1 << int(draw() * 8)
        elif kind < 5:
            data[at] = edges[int(draw() * len(edges))]
        elif kind == 5:
            del data[at : at + 1 + int(draw() * 8)]
        elif kind == 6:
            where = int(draw() * len(edges))
            data[at:at] = edges[where : where + 1 + int(draw() * 4)]
        elif kind == 7:
            del data[at:]
        else:
            other = others[int(draw() * len(others))]
            data[at:] = other[int(draw() * len(other)) :]
    return bytes(data)


def exact(data: bytes) -> array[int]:
    """The same bytes in memory that ends with them; bytes objects have a NUL behind."""
    return array("B", data)


class Target:
    """Batchers that take what comes, and the books that must balance after it."""

    def __init__(self) -> None:
        self.budget = Budget(1 << 20, 1 << 16)
        self.told = 0
        settler = CallbackSettler(self._told)
        field = KeyPlan("parts", [("level", 0), ("text", "\u00fc"), ("field", ("a", "b"))])
        table = ShardTable([2**126, 2**127, 2**128 - 1])
        self.batchers: list[Batcher] = []
        for frame, plan, aggregate in (
            ("bulk", KeyPlan("uuid"), 0),
            ("bulk", field, 0),
            ("raw", field, 0),
            ("bulk", field, 200),
        ):
            batcher = Batcher(
                settler=settler,
                budget=self.budget,
                frame=frame,  # type: ignore[arg-type]
                key=plan,
                target=b'"StreamName":"s"',
                max_records=50,
                max_batch_bytes=6000,
                max_record_bytes=500,
                aggregate_bytes=aggregate,
            )
            batcher.shards = table
            self.batchers.append(batcher)
        self.three = Batcher(
            settler=settler, budget=self.budget, frame="raw", key=KeyPlan("none"), target=b"", max_records=3
        )
        self.replay = Budget(1 << 20, 1 << 16)
        self.back = Batcher(
            settler=None, budget=self.budget, frame="raw", key=KeyPlan("uuid"), target=b'"StreamName":"s"',
            replay=self.replay,
        )  # fmt: skip
        self.back.shards = table
        self.expected = 0
        self._calls = 0

    def _told(self, token: int, count: int, outcome: int, answer: object, at: int) -> None:
        self.told += count

    def decode(self, data: bytes) -> None:
        try:
            records = decode_frame(exact(data))
        except DataFormatError as error:
            if not 0 <= error.offset <= len(data):
                raise AssertionError(f"offset {error.offset} of {len(data)} bytes") from error
        else:
            assert sum(map(len, records)) < len(data)

    def offer(self, data: bytes, which: int, topic: bytes) -> None:
        batcher = self.batchers[which]
        taken = batcher.offer(topic, exact(data), 1)
        if taken < 0:
            self.drain()
            taken = batcher.offer(topic, exact(data), 1)
            assert taken >= 0
        self.expected += taken
        self._calls += 1
        if self._calls % 64 == 0:
            self.drain()

    def put_frame(self, data: bytes) -> None:
        with contextlib.suppress(DataFormatError, RecordError):
            self.batchers[1].put_frame(exact(data))

    def settle(self, reply: bytes) -> None:
        batcher = self.three
        receipts = [batcher.put(b"1"), batcher.put(b"2")]
        batcher.add(b"3", 1)
        self.expected += 1
        batch = batcher.take()
        assert batch is not None
        try:
            failures = batch.settle(reply)
        except UnexpectedResponse:
            batch.finish(DROPPED)
        else:
            for one in failures:
                assert one.code
                one.batch.finish(DROPPED)
        for receipt in receipts:
            assert receipt.done()
            if receipt.exception() is None:
                receipt.result()

    def restore(self, body: bytes, counts: bytes) -> None:
        batcher = self.back
        batcher.adopt_spooled(1 << 32)
        try:
            batch = batcher.restore(exact(body), counts, 1)
        except DataFormatError as error:
            if not 0 <= error.offset <= len(body):
                raise AssertionError(f"offset {error.offset} of {len(body)} bytes") from error
        else:
            assert len(json.loads(bytes(batch))["Records"]) == len(batch) == len(batch.entries())
            part, others = batch.split([0])
            for one in (part, others):
                if one is not None:
                    one.finish(DROPPED)
        batcher.settle_spooled(batcher.spooled, DEAD)
        assert batcher.in_flight == self.replay.bytes == 0

    def drain(self) -> None:
        for batcher in self.batchers:
            for reject in batcher.take_rejects():
                assert reject.reason
                batcher.settle_reject(reject, DEAD)
            batcher.close_batch(DRAIN)
            batches: list[Batch] = []
            while (batch := batcher.take()) is not None:
                part, others = batch.split([0, -1])
                batches += [one for one in (part, others) if one is not None]
            for one in Batch.gather(batches):
                body = json.loads(bytes(one))
                assert len(body["Records"]) == len(one)
                one.finish(DROPPED)
            assert batcher.in_flight == 0
        assert self.budget.bytes == self.budget.records == 0
        assert self.told == self.expected, (self.told, self.expected)


def run(count: int, seed: int, keep: Path | None = None, *, quiet: bool = False) -> int:
    """Returns how many mutations were run."""
    target = Target()
    kept = None
    if keep is not None:
        keep.write_bytes(bytes(1 << 16))
        with keep.open("r+b") as file:
            kept = mmap.mmap(file.fileno(), 1 << 16)
    wide = FRAMES + [encode_frame([text] * 2) for text in JSONS]
    topics = [b"plant/7", b"\xff", b"", b"a" * 300]
    done = 0
    started = time.monotonic()
    while done < count:
        random_ = random.Random(f"{seed}/{done}")
        draw = random_.random
        for _ in range(min(BATCH, count - done)):
            kind = int(draw() * 9)
            if kind < 5:
                data = mutate(wide[int(draw() * len(wide))], draw, FRAME_EDGES if draw() < 0.8 else TEXT_EDGES, wide)
            elif kind == 5:
                data = mutate(JSONS[int(draw() * len(JSONS))], draw, TEXT_EDGES, JSONS)
            elif kind == 8:
                data = mutate(BODIES[int(draw() * len(BODIES))], draw, TEXT_EDGES, BODIES)
            else:
                data = mutate(ANSWERS[int(draw() * len(ANSWERS))], draw, TEXT_EDGES, ANSWERS)
            if kept is not None:
                kept.seek(0)
                kept.write(b"%d %d %d\n" % (seed, kind, len(data)) + data[:65_000])
            if kind < 2:
                target.decode(data)
            elif kind == 2:
                target.offer(data, 0, b"t")
            elif kind == 3:
                target.offer(data, 1 if draw() < 0.5 else 3, topics[int(draw() * 4)])
            elif kind == 4:
                target.put_frame(data)
            elif kind == 5:
                target.offer(data, 2, topics[int(draw() * 4)])
            elif kind == 8:
                target.restore(data, COUNTS[int(draw() * len(COUNTS))] if draw() < 0.5 else b"")
            else:
                target.settle(data)
        done += min(BATCH, count - done)
        if not quiet and done % (BATCH * 100) == 0:
            rate = done / (time.monotonic() - started)
            print(f"{done} mutations, {rate:.0f}/s", file=sys.stderr, flush=True)
    target.drain()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    started = time.monotonic()
    done = run(given.count, given.seed, given.keep)
    spent = time.monotonic() - started
    print(f"codec: {done} mutations, seed {given.seed}: a result or its own error each time ({done / spent:.0f}/s)")


if __name__ == "__main__":
    main()

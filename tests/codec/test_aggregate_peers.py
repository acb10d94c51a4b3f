"""Aggregates in the KPL's format beside AWS's module for Node; codec/test_aggregate.py has the one for Python."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from fastkin import encode_frame
from support import servers
from support.codec_rig import Rig, payloads

pytestmark = pytest.mark.process

MAGIC = b"\xf3\x89\x9a\xc2"

DEAGGREGATE = """\
const {deaggregateSync} = require(process.argv[1]);
const entries = JSON.parse(require("fs").readFileSync(0));
process.stdout.write(JSON.stringify(entries.map((entry) => {
  let found;
  deaggregateSync(entry, true, (error, records) => {
    if (error) throw error;
    found = records;
  });
  return found;
})));
"""


def test_awss_module_for_node_takes_every_record_out_again() -> None:
    """Key, hash key and data of each, its checksum verified."""
    rig = Rig(aggregate_bytes=1_000_000)
    told: list[tuple[str | None, str | None, bytes]] = []

    def add(data: bytes, key: str | None = None, hash_key: str | None = None) -> None:
        rig.batcher.add(data, 1, key, hash_key)
        told.append((key, hash_key, data))

    for data in payloads(4000, 700):  # more than fits into one
        add(data)
    for n, length in enumerate([0, 1, 119, 120, 127, 128, 16_383, 16_384]):  # where a length takes a byte more
        add(b"\x00\xff" * (length // 2) + b"x" * (length % 2), f"length {n // 4}")
    for key in ("welder-1", "ü" * 256, "🔥" * 128, '"\\\n', " ", *(f"key {n}" for n in range(200))):
        for data in (b"first", b"", b"\xf3\x89\x9a\xc2 like an aggregate"):
            add(data, key)
    for hash_key in ("0", "7", str(2**127), str(2**128 - 1)):  # these go alone, between aggregates
        add(b"before", "here")
        add(b"before too", "here")
        add(b"there", "here", hash_key)
    frame = payloads(300)
    rig.batcher.put_frame(encode_frame(frame))
    told += [(None, None, data) for data in frame]

    entries: list[dict[str, Any]] = [
        {
            "data": base64.b64encode(data).decode(), "partitionKey": key, "explicitPartitionKey": hash_key,
            "sequenceNumber": str(n),
        }
        for n, (data, key, hash_key) in enumerate(one for call in rig.store() for one in call)
    ]  # fmt: skip
    sizes = [len(base64.b64decode(entry["data"])) for entry in entries]
    assert max(sizes) > 999_000
    assert sum(entry["data"].startswith(base64.b64encode(MAGIC)[:5].decode()) for entry in entries) > 200

    answer = servers.run_node(DEAGGREGATE, "aws-kinesis-agg", entries)
    found = []
    for entry, records in zip(entries, answer, strict=True):
        for n, record in enumerate(records):
            assert record["sequenceNumber"] == entry["sequenceNumber"]
            assert record.get("subSequenceNumber", 0) == n
            assert record["partitionKey"] == entry["partitionKey"]
            # an aggregate has none inside: it would have to lie in the shard of all the others
            assert record.get("explicitPartitionKey") == entry["explicitPartitionKey"]
            found.append((record["partitionKey"], record.get("explicitPartitionKey"), base64.b64decode(record["data"])))
    assert len(found) == len(told)
    for (key, hash_key, data), got in zip(told, found, strict=True):
        assert got == (key or got[0], hash_key, data)
    rig.settled()

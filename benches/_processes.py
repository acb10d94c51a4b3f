"""Processes of the benches that measure whole programs: a counting Kinesis, a load source, the programs measured."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3

if TYPE_CHECKING:
    from collections.abc import Iterator

BRIDGES = Path(__file__).resolve().parent / "bridges"
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BRIDGES.parent.parent / "src"), str(BRIDGES)])}
ENV.pop("PYTHONDONTWRITEBYTECODE", None)  # or each run would compile its modules, and count that as work
SCALE = float(os.environ.get("FASTKIN_BENCH_SCALE", "1"))


def scaled(count: int) -> int:
    return max(2_000, int(count * SCALE))


@contextlib.contextmanager
def server(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and the first line it prints."""
    child = subprocess.Popen([sys.executable, *command], env=ENV, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield child, child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def counting_kinesis(*options: str) -> contextlib.AbstractContextManager[tuple[subprocess.Popen[str], str]]:
    """Its second member is the address."""
    return server(str(BRIDGES / "counting_kinesis.py"), *options)


def measured(script: str, *arguments: str) -> dict[str, Any]:
    """Run one program to its end; the report it printed."""
    run = subprocess.run(
        [sys.executable, str(BRIDGES / script), *arguments],
        env=ENV, stdout=subprocess.PIPE, text=True, timeout=300, check=True,
    )  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def read_back(url: str) -> list[bytes]:
    """Every record in the stream of `counting_kinesis("keep")`, sorted."""
    kinesis = boto3.client(
        "kinesis", region_name="us-east-1", endpoint_url=url, aws_access_key_id="AK", aws_secret_access_key="SK"
    )
    found: list[bytes] = []
    with contextlib.closing(kinesis):
        for shard in kinesis.list_shards(StreamName="bench")["Shards"]:
            answer = kinesis.get_shard_iterator(
                StreamName="bench", ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
            )
            iterator = answer["ShardIterator"]
            while (answer := kinesis.get_records(ShardIterator=iterator))["Records"]:
                found += [record["Data"] for record in answer["Records"]]
                iterator = answer["NextShardIterator"]
    return sorted(found)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]

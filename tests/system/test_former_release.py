"""Files that an earlier build left behind: its spools drain, its dead letters are read.

`former/` holds what commit 9884dc3 left when it was killed in an outage: 40 records of the pipeline `raw` (their key
is the topic, one of which has a quotation mark and a backslash), 10 frames of three records of the pipeline `bulk`,
and two dead letters. A spool is written by one version and sent by the next, so its rows are a format of their own.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fastkin.commands.dead_letters import numbered_letters
from fastkin.deadletter.reader import LetterFiles
from fastkin.emulator import Emulator
from support.running import service, wait_until
from support.servers import mosquitto

if TYPE_CHECKING:
    from support.servers import Server

FORMER = Path(__file__).resolve().parent / "former"
SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "former"

[kinesis]
endpoint_url = "{url}"
region = "us-east-1"

[[pipeline]]
id = "raw"
stream = "welders"
topics = ["plant/+"]
partition_key = "topic"
on_full = "spool"
spool = "{folder}/spool.db"
dead_letter = "{folder}/dead.jsonl"

[[pipeline]]
id = "bulk"
stream = "bulky"
format = "bulk"
topics = ["bulk/+"]
on_full = "spool"
spool = "{folder}/bulk.db"
dead_letter = "{folder}/dead.jsonl"
"""


@pytest.mark.process
async def test_a_spool_and_dead_letters_of_a_former_release(tmp_path: Path) -> None:
    for name in ("spool.db", "bulk.db"):
        shutil.copy(FORMER / name, tmp_path)
    shutil.copy(FORMER / "dead_letters", tmp_path / "dead.jsonl")

    def drain(broker: Server, emulator: Emulator) -> str:
        toml = SETTINGS.format(port=broker.port, url=emulator.url, folder=tmp_path)
        with service(tmp_path, toml) as run:
            wait_until(
                lambda: (emulator.stored_count("welders"), emulator.stored_count("bulky")) == (40, 30), 30, "it drains"
            )
            assert run.terminate() == 0
            return run.log()

    async with Emulator({"welders": 2, "bulky": 2}) as emulator:
        with mosquitto() as broker:
            log = await asyncio.to_thread(drain, broker, emulator)
        assert log.count("of a former run: they go first") == 2
        stored = emulator.stored("welders")
        found = sorted((json.loads(record.data)["n"], record.partition_key) for record in stored)
        keys = {0: 'plant/w"e\\ld'} | {n: f"plant/ü{n % 3}" for n in range(40) if n % 4}
        assert found == [(n, keys.get(n, keys[0])) for n in range(40)]
        assert {record.data for record in stored} >= {'{"n": 7, "t": "é"}'.encode()}
        assert sorted(record.data for record in emulator.stored("bulky")) == sorted(b"bulk %d" % n for n in range(30))

    # what was there stays, nothing was added, and it is read
    assert (tmp_path / "dead.jsonl").read_bytes() == (FORMER / "dead_letters").read_bytes()
    with LetterFiles([tmp_path / "dead.jsonl"]) as files:
        letters = [letter.fields() for _, letter in numbered_letters(files)]
    assert [(letter["topic"], letter["payload"], letter["offset"]) for letter in letters] == [
        ("bulk/a", base64.b64encode(b"no frame").decode(), 0),
        ("bulk/b", base64.b64encode(b"\xa31.0\x11").decode(), 4),
    ]

"""CONTRIBUTING.md is walked: in a copy of the tree its steps are done for toys, and the toys work.

A toy is a `Toy`: the edits that a section of CONTRIBUTING.md asks for, each at a line of the file, and a program that
shows that it works. Two files of src/ at most. All toys of pure Python are put into one copy, which takes the compiled
modules of this tree; all that change compiled code into another one, which is built once.

To add a toy: an entry in TOYS.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parent.parent.parent
SRC_MOST = 2  # files of src/ that one more of anything may change


@dataclass(frozen=True)
class Edit:
    """Text that is put before or behind `at`, which is in the file once. No `at`: the file is new."""

    file: str
    text: str
    at: str = ""
    before: bool = False

    def do(self, tree: Path) -> None:
        path = tree / self.file
        if not self.at:
            assert not path.exists(), f"{self.file} is there already"
            path.write_text(self.text)
            return
        text = path.read_text()
        assert text.count(self.at) == 1, f"{self.file} has {self.at!r} {text.count(self.at)} times: choose another line"
        path.write_text(text.replace(self.at, self.text + self.at if self.before else self.at + self.text))


@dataclass(frozen=True)
class Toy:
    title: str  # the section of CONTRIBUTING.md
    edits: tuple[Edit, ...]
    shows: str  # a program that fails when the toy does not work
    tests: tuple[str, ...] = ()  # that the section names
    compiled: bool = False


METRIC = Toy(
    title="Add a metric",
    edits=(
        Edit(
            "src/fastkin/delivery/delivery.py",
            "        self.toy_rounds = 0\n",
            at="        self.opened: bool = False\n",
        ),
        Edit("src/fastkin/delivery/delivery.py", "        self.toy_rounds += 1\n", at="        self.make_room()\n"),
        Edit(
            "src/fastkin/status/registry.py",
            '    _counter("toy_rounds", "fastkin_toy_rounds_total", "calls", "Times that something ended",\n'
            "             lambda run: run.delivery.toy_rounds),\n",
            at="    # settle\n",
        ),
        Edit(
            "deploy/grafana/fastkin.json",
            """{
          "refId": "T",
          "datasource": {"type": "prometheus", "uid": "${datasource}"},
          "expr": "sum by (pipeline) (rate(fastkin_toy_rounds_total{pipeline=~\\"$pipeline\\", """
            """instance=~\\"$instance\\"}[$__rate_interval]))",
          "legendFormat": "{{pipeline}}"
        },
        """,
            at="""{
          "refId": "A",
          "datasource": {
            "type": "prometheus",
            "uid": "${datasource}"
          },
          "expr": "sum by (pipeline) (rate(fastkin_calls_total""",
            before=True,
        ),
    ),
    shows="""
from fastkin.bench.source import Source
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.emulator import Emulator
from fastkin.service.engine import Engine
from prometheus_client import CollectorRegistry, generate_latest

async def main():
    async with Emulator({"s": 1}) as emulator, Source(50) as source:
        to = Kinesis(stream="s", region="us-east-1", endpoint_url=emulator.url, access_key="a", secret_key="b")
        broker = Broker(host="127.0.0.1", port=source.port, client_id="c")
        pipeline = Pipeline(id="p", topics=("plant/#",), kinesis=to, dead_letter="none", linger_ms=1.0)
        async with Engine(Settings(broker=broker, pipelines=(pipeline,))) as engine:
            await asyncio.wait_for(source.done.wait(), 30)
            registry = CollectorRegistry()
            registry.register(engine.metrics())
            count = engine.stats()["p"]["toy_rounds"]
            assert count > 0
            page = generate_latest(registry).decode()
            assert f'fastkin_toy_rounds_total{{pipeline="p"}} {count}.0' in page.splitlines()
            assert "# HELP fastkin_toy_rounds_total Times that something ended" in page

asyncio.run(main())
""",
    tests=(
        "tests/status/test_registry.py", "tests/status/test_metrics.py::test_dashboard_and_alerts_ask_for_what_is_told",
        "tests/project/test_readme.py",
    ),
)  # fmt: skip


SETTING = Toy(
    title="Add a setting",
    edits=(
        Edit(
            "src/fastkin/config.py",
            '    dead_letter_more: int = row(0, "rotated files to keep besides", least=0, most=9)\n',
            at="    shutdown_timeout_s: float = row(",
            before=True,
        ),
        Edit(
            "src/fastkin/deadletter/handler.py", " + pipeline.dead_letter_more", at="keep=pipeline.dead_letter_keep"
        ),
        Edit("tests/settings/test_config.py", "        dead_letter_more = 3\n", at="        dead_letter_keep = 2\n"),
    ),
    shows="""
from fastkin.deadletter.handler import make_store
from fastkin.settings import SettingsError, load

place = folder / "dead.jsonl"
TEXT = f'''
[broker]
url = "mqtt://localhost"
client_id = "c"
[[pipeline]]
id = "a"
topics = ["t"]
stream = "s"
region = "eu-west-1"
dead_letter = "{place}"
dead_letter_max_bytes = 1
dead_letter_keep = 1
dead_letter_more = '''

def read(value):
    (folder / "x.toml").write_text(TEXT + value)
    return load(folder / "x.toml", env={}).pipelines[0]

async def main():
    store = make_store(read("2"))
    await store.open()
    for number in range(8):
        await store.store([{"pipeline": "a", "topic": "t", "reason": str(number), "payload": b"x", "time": 0.0}])
    await store.close()
    assert len(list(folder.glob("dead.jsonl.[0-9]"))) == 3

asyncio.run(main())
assert load(env={"BROKER": "h", "TOPIC": "t", "KIN_STREAM_NAME": "s", "FASTKIN_PIPELINE_DEAD_LETTER_MORE": "4",
                 "FASTKIN_PIPELINE_DEAD_LETTER": "none"}).pipelines[0].dead_letter_more == 4
for wrong, says in (("10", "use 0 to 9"), ("-1", "use 0 to 9"), ("'x'", "dead_letter_more")):
    try:
        read(wrong)
    except SettingsError as error:
        assert says in str(error), str(error)
    else:
        raise AssertionError(f"{wrong} is taken")
""",
    tests=(
        "tests/settings/test_config.py::test_every_key_of_every_table_is_read", "tests/settings/test_setting_row.py",
        "tests/project/test_readme.py",
    ),
)  # fmt: skip


FAULT = Toy(
    title="Add a fault of the emulator",
    edits=(
        Edit("src/fastkin/emulator/faults.py", ', "half"', at='"early", "garbage"'),
        Edit("src/fastkin/emulator/faults.py", '    "half": Plan.halve,\n', at='    "garbage": Plan.replace,\n'),
        Edit(
            "src/fastkin/emulator/faults.py",
            "    def halve(self, fault: Fault) -> None:\n"
            "        self.rewrite = self.rewrite or (lambda body: body[: len(body) // 2])\n\n",
            at="    def replace(self, fault: Fault) -> None:\n",
            before=True,
        ),
        Edit("README.md", ", `half`", at="`count`, `html`, `early`"),
    ),
    shows="""
import json
import urllib.request

import fastkin
from fastkin.emulator import Emulator

def put(url):
    body = {"StreamName": "s", "Records": [{"Data": "eA==", "PartitionKey": "k"}]}
    head = {"X-Amz-Target": "Kinesis_20131202.PutRecords", "Content-Type": "application/x-amz-json-1.1"}
    request = urllib.request.Request(url, json.dumps(body).encode(), head)
    with urllib.request.urlopen(request) as answer:
        return answer.read()

async def main():
    async with Emulator({"s": 1}) as emulator:
        whole = await asyncio.to_thread(put, emulator.url)
        (folder / "faults.jsonl").write_text('{"kind": "half", "times": 2}')
        emulator.faults.load(folder / "faults.jsonl")
        half = await asyncio.to_thread(put, emulator.url)
        assert whole.startswith(b'{') and len(half) == len(whole) // 2, (whole, half)
        # the second strike: the record is stored, its answer cannot be read, and it goes again
        async with fastkin.Producer("s", region="us-east-1", endpoint_url=emulator.url, access_key="a",
                                    secret_key="b", shard_map=False, linger_ms=1.0) as producer:
            await (await producer.put(b"twice"))
        assert [record.data for record in emulator.stored("s")].count(b"twice") == 2

asyncio.run(main())
""",
    tests=("tests/project/test_readme.py",),
)

FORMAT_SHOWS = """
import json

from fastkin.bench.source import Source
from fastkin.emulator import Emulator
from fastkin.service.engine import Engine
from fastkin.settings import SettingsError, load

async def main():
    payloads = [b"one\\ntwo", b"", b"three\\nfour"]
    async with Emulator({"s": 1}) as emulator, Source(3, payloads=payloads) as source:
        text = f'''
[broker]
url = "mqtt://127.0.0.1:{source.port}"
client_id = "c"
[[pipeline]]
id = "p"
topics = ["plant/#"]
format = "FORM"
stream = "s"
region = "us-east-1"
endpoint_url = "{emulator.url}"
access_key = "a"
secret_key = "b"
linger_ms = 1
dead_letter = "{folder / "dead.jsonl"}"
'''
        (folder / "x.toml").write_text(text.replace("FORM", "toy"))
        async with Engine(load(folder / "x.toml", env={})):
            await asyncio.wait_for(source.done.wait(), 30)
        assert sorted(record.data for record in emulator.stored("s")) == [b"four", b"one", b"three", b"two"]
    (letter,) = (folder / "dead.jsonl").read_text().splitlines()
    assert "nothing is in it" in json.loads(letter)["reason"], letter
    (folder / "x.toml").write_text(text.replace("FORM", "toys"))
    try:
        load(folder / "x.toml", env={})
    except SettingsError as error:
        assert "did you mean toy?" in str(error), str(error)
    else:
        raise AssertionError("toys is taken")

asyncio.run(main())
"""

# its number is held, so that a row moved up or down is seen
FORMAT_NUMBER = Edit("tests/codec/test_formats.py", ', "toy": 99', at='{"raw": 1, "bulk": 2')

FORMAT = Toy(
    title="Add a payload format",
    edits=(
        Edit(
            "src/fastkin/formats/toy.py",
            """from fastkin.errors import DataFormatError


def records(payload: bytes) -> list[bytes]:
    if not payload:
        raise DataFormatError(0, "nothing is in it")
    return payload.split(b"\\n")
""",
        ),
        Edit(
            "src/fastkin/formats/table.py",
            "from fastkin.formats import toy\n",
            at="from fastkin._codec import COMPILED_FORMATS, PayloadFormat\n",
        ),
        Edit(
            "src/fastkin/formats/table.py",
            '    PayloadFormat("toy", 99, "each line is a record", toy.records),\n',
            at="    *COMPILED_FORMATS,\n",
        ),
        FORMAT_NUMBER,
    ),
    shows=FORMAT_SHOWS,
    tests=("tests/codec/test_formats.py", "tests/project/test_readme.py"),
)

COMPILED_FORMAT = Toy(
    title="Add a payload format",
    edits=(
        Edit(
            "src/fastkin/codec/format_toy.pxi",
            """cdef bint toy_scan(Payload* payload) noexcept nogil:
    cdef size_t at
    cdef size_t line = 0
    payload.first = 0
    payload.count = 1
    payload.longest = 0
    payload.at = 0
    for at in range(payload.length):
        if payload.data[at] == c"\\n":
            payload.longest = max(payload.longest, at - line)
            payload.count += 1
            line = at + 1
    payload.longest = max(payload.longest, payload.length - line)
    payload.data_bytes = payload.length - (payload.count - 1)
    return payload.length > 0


cdef size_t toy_next(const Payload* payload, size_t* at, size_t* length) noexcept nogil:
    cdef size_t begin = at[0]
    cdef size_t end = begin
    while end < payload.length and payload.data[end] != c"\\n":
        end += 1
    at[0] = end + 1
    length[0] = end - begin
    return begin


cdef tuple toy_reason(const Payload* payload):
    return "empty", "nothing is in it"
""",
        ),
        Edit("src/fastkin/codec/formats.pxi", 'include "format_toy.pxi"\n', at='include "format_bulk.pxi"\n'),
        Edit(
            "src/fastkin/codec/formats.pxi",
            '    compiled_format("toy", 99, "each line is a record", toy_scan, toy_next, toy_reason),\n',
            at='    compiled_format("bulk", 2, "a frame of records", bulk_scan, bulk_next, bulk_reason),\n',
        ),
        FORMAT_NUMBER,
    ),
    shows=FORMAT_SHOWS,
    tests=("tests/codec/test_formats.py", "tests/project/test_readme.py"),
    compiled=True,
)

DESTINATION = Toy(
    title="Add a destination",
    edits=(
        Edit("src/fastkin/aws/destinations.py", ", AnswerNames", at="from fastkin._codec import PUT_RECORDS_ANSWER"),
        Edit(
            "src/fastkin/aws/destinations.py",
            """

TOY = Destination(
    service="firehose",
    api="Firehose_20150804",
    put="PutRecordBatch",
    name_member="DeliveryStreamName",
    arn_member=None,
    answer=AnswerNames("RequestResponses", "FailedPutCount", "RecordId"),
    keyed=False,
    shards=False,
    dry_run=False,
    account_hosts=False,
    control=frozenset(),
    call_records=500,
    call_bytes=4 << 20,
    record_bytes=1000 << 10,
)
""",
            at="    record_bytes=LARGE_RECORD_BYTES,\n)\n",
        ),
    ),
    shows="""
from fastkin._codec import KeyPlan
from fastkin.aws.destinations import TOY
from fastkin.aws.transports import make_client
from fastkin.config import Kinesis
from fastkin.delivery.delivery import Delivery, Options
from fastkin.emulator import Emulator
from fastkin.runtime.deadline import Deadline

async def main():
    async with Emulator(firehose=["s"]) as emulator:
        kinesis = Kinesis(stream="s", region="us-east-1", endpoint_url=emulator.url, access_key="a", secret_key="b")
        for transport in ("native", "sdk"):
            client = make_client(dataclasses.replace(kinesis, transport=transport), "p", TOY)
            await client.start()
            options = Options(budget_bytes=1 << 26, budget_records=100_000, max_batch_bytes=10 << 20)
            delivery = Delivery(client, options, name="p", stream="s", key=KeyPlan("uuid"))
            delivery.open()
            receipts = [delivery.batcher.put(b"%d" % n) for n in range(1200)]
            await delivery.flush()
            assert {(await receipt).shard_id for receipt in receipts} == {None}
            await delivery.close(Deadline(5.0, "p"), spool_limit=Deadline(5.0, "p"))
            await client.close()
            assert client.calls == 3  # 500 records each at most
        stored = sorted(int(record.data) for record in emulator.stored("s"))
        assert stored == sorted([*range(1200), *range(1200)])

asyncio.run(main())
""",
    tests=("tests/aws/test_destinations.py",),
)

TOYS = {
    "metric": METRIC,
    "setting": SETTING,
    "fault": FAULT,
    "format": FORMAT,
    "compiled format": COMPILED_FORMAT,
    "destination": DESTINATION,
}

BEGIN = """
import asyncio
import dataclasses
import sys
from pathlib import Path

import fastkin

tree, folder = map(Path, sys.argv[1:])
assert Path(fastkin.__file__).is_relative_to(tree), fastkin.__file__
"""


def run(tree: Path, *arguments: str | Path) -> str:
    """This interpreter in the copy; what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=tree, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, arguments))[:200]}\n{done.stdout[-5000:]}{done.stderr[-5000:]}"
    return done.stdout


def copy_into(tree: Path, *, built: bool) -> None:
    """What git knows of, and the compiled modules when they are not built anew."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    if built:
        names += [str(path.relative_to(ROOT)) for path in (ROOT / "src").rglob("*.so")]
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)


def tree_of(toys: list[Toy], tree: Path) -> None:
    """The copy with all these toys in it."""
    compiled = any(toy.compiled for toy in toys)
    copy_into(tree, built=not compiled)
    for toy in toys:
        for edit in toy.edits:
            edit.do(tree)
    if compiled:
        run(tree, "setup.py", "-q", "build_ext", "--inplace")
    run(tree, "tests/project/test_readme.py")  # writes the tables of the README


@pytest.fixture
def section(request: pytest.FixtureRequest) -> str:
    """What CONTRIBUTING.md says about the toy."""
    title = TOYS[request.node.callspec.params["name"]].title
    found = re.search(
        rf"^## {title}\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"CONTRIBUTING.md has no section {title!r}"
    return found[1]


@pytest.mark.parametrize("name", TOYS)
def test_the_steps_change_two_files_at_most(name: str, section: str) -> None:
    """And CONTRIBUTING.md names one of them, and the tests that are run here."""
    toy = TOYS[name]
    changed = {edit.file for edit in toy.edits if edit.file.startswith("src/")}
    assert 1 <= len(changed) <= SRC_MOST
    assert any(file.removeprefix("src/fastkin/") in section for file in changed)
    assert [test for test in toy.tests if test.partition("::")[0] not in section] == []


@pytest.mark.parametrize("compiled", sorted({toy.compiled for toy in TOYS.values()}))
def test_toys_work(compiled: bool, tmp_path: Path) -> None:
    """One test for all toys of a copy: where tests run in several processes, each would build a copy for itself."""
    toys = [toy for toy in TOYS.values() if toy.compiled == compiled]
    tree = tmp_path / "fastkin"
    tree_of(toys, tree)
    for toy in toys:
        folder = tmp_path / toy.title.replace(" ", "-")
        folder.mkdir()
        run(tree, "-W", "error", "-c", BEGIN + toy.shows, tree, folder)
    tests = list(dict.fromkeys(test for toy in toys for test in toy.tests))
    told = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests)
    assert re.search(r"^\d+ passed", told, re.MULTILINE), told[-2000:]

"""The command line: exit codes, one clear line for what is wrong, and what each command does."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pytest

from fastkin import __version__
from fastkin._codec import read_records
from fastkin.bench.plant import welder_payload
from fastkin.commands import cli
from fastkin.commands import run as run_command
from fastkin.commands import tail as tailing
from fastkin.commands.demo import balance
from fastkin.commands.printing import Printer
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.consumer import Position
from fastkin.emulator import Emulator
from fastkin.errors import MqttError
from fastkin.status import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support import servers

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = ["run", "check", "emulator", "demo", "tail"]
GOOD = """
[broker]
client_id = "c"
user = "u"
password = "brokersecret"
[[pipeline]]
id = "a"
topics = ["t/#"]
stream = "s"
region = "us-east-1"
dead_letter = "none"
"""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No AWS settings of this machine, and the logs as they were."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "FASTKIN_", "KIN_")) or name in {"BROKER", "TOPIC"}:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    root, ours = logging.getLogger(), logging.getLogger("fastkin")
    before = (root.handlers[:], root.level, ours.level)
    environ = dict(os.environ)
    yield
    # what `--env-file` put there; monkeypatch takes its own back afterwards
    os.environ.clear()
    os.environ.update(environ)
    root.handlers[:], root.level = before[0], before[1]
    ours.setLevel(before[2])
    logging.captureWarnings(False)


def fastkin(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastkin", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        **more,
    )


def invoke(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


# --- usage ---


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = invoke(capsys)
    assert (code, err) == (0, "")
    assert all(f"  {name}  " in out for name in COMMANDS)
    assert "fastkin demo" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_version(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = invoke(capsys, command, "--help")
    assert code == 0
    for option in ("--help", "--version", "--verbose", "--quiet"):
        assert option in out
    code, out, _ = invoke(capsys, command, "--version")
    assert (code, out) == (0, f"fastkin {__version__}\n")


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["nope"], "nope"),
        (["--nope"], "--nope"),
        (["run", "--nope"], "--nope"),
        (["run", "a", "b"], "unexpected extra argument"),
        (["run", "--log-format", "xml"], "xml"),
        (["run", "-v", "-q"], "-v and -q"),
        (["tail"], "STREAM"),
        (["tail", "s", "--from", "yesterday"], "neither trim_horizon nor latest"),
        (["tail", "s", "--json", "--raw"], "--json and --raw"),
        (["tail", "s", "--limit", "0"], "--limit"),
        (["emulator", "--port", "70000"], "--port"),
        (["emulator", "--limits", "maybe"], "--limits"),
        (["emulator", "--stream", "x:y"], "NAME:SHARDS"),
        (["emulator", "--faults", "/nope"], "/nope"),
        (["demo", "--seconds", "0"], "--seconds"),
        (["run", "/nope.toml"], "there is no such settings file"),
        (["check", "--env-file", "/nope.env"], "no such env file"),
    ],
)
def test_a_wrong_use_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], args: list[str], wanted: str
) -> None:
    code, out, err = invoke(capsys, *args)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert wanted in err
    assert err.startswith("fastkin")


def test_a_wrong_fault_file_is_a_wrong_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    path.write_text('{"kind": "recrod"}\n')
    code, _, err = invoke(capsys, "emulator", "--port", "0", "--faults", str(path))
    assert code == 2
    assert err.count("\n") == 1
    assert "recrod" in err


@pytest.mark.process
def test_settings_errors_of_run_are_exit_code_2_and_hide_secrets(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(GOOD.replace('"t/#"', '"t/#/x"') + "qos = 9\n")
    done = fastkin("run", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(re.match(rf"fastkin: {path}:\d+: \[\[pipeline\]\] 1 \('a'\) key ", line) for line in lines)
    assert "secret" not in done.stderr


# --- check ---


def test_check_prints_what_is_in_effect(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.toml"
    path.write_text(GOOD.replace('client_id = "c"', 'host = "b.example"'))
    monkeypatch.setenv("FASTKIN_PIPELINE_QOS", "2")
    code, out, err = invoke(capsys, "check", str(path))
    assert code == 0
    assert 'password = "***"' in out
    assert "qos = 2" in out
    assert "brokersecret" not in out + err
    assert "warning: client_id is not set" in err
    code, out, _ = invoke(capsys, "check", "--quiet", str(path))
    assert (code, out) == (0, "")


def test_without_a_region_nothing_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(GOOD.replace('region = "us-east-1"\n', 'access_key = "AK"\nsecret_key = "keysecret"\n'))
    for command in ("check", "run"):
        code, _, err = invoke(capsys, command, str(path))
        assert code == 2
        assert err.splitlines()[-1] == "fastkin: kinesis.region: is missing; set it, or AWS_REGION"
    code, _, err = invoke(capsys, "tail", "s")
    assert (code, err) == (2, "fastkin: region: is missing; give --region, or set AWS_REGION\n")
    config = tmp_path / "none"  # where AWS_CONFIG_FILE leads
    config.write_text("[default]\nregion = eu-north-1\n")
    assert invoke(capsys, "check", str(path))[0] == 0


def test_check_reads_an_env_file_and_passes_it_on_to_the_sdk(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".env"
    path.write_text("BROKER=b.example\nTOPIC=t\nKIN_STREAM_NAME=s\nAWS_PROFILE=p\nAWS_REGION=r-1\n")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    code, out, _ = invoke(capsys, "check", "--env-file", str(path))
    assert code == 0
    assert 'host = "b.example"' in out
    assert 'region = "eu-west-1"' in out
    assert os.environ["AWS_PROFILE"] == "p"
    assert os.environ["AWS_REGION"] == "eu-west-1"


# --- run ---


class FakeEngine:
    """Stands in for the engine: ends, fails or drains as told."""

    stats_now: ClassVar[dict[str, dict[str, int]]] = {}
    at_start: Any = None
    unsettled = 0
    drain_s = 0.0
    made: ClassVar[list[FakeEngine]] = []

    def __init__(self, settings: Settings, *, on_message: Any = None) -> None:
        self.settings = settings
        self.on_message = on_message
        self.failure: asyncio.Future[None]
        FakeEngine.made.append(self)

    async def __aenter__(self) -> Self:
        self.failure = asyncio.get_running_loop().create_future()
        if self.at_start is not None:
            type(self).at_start(self)
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def wait(self) -> None:
        await self.failure

    async def stop(self) -> int:
        await asyncio.sleep(self.drain_s)
        return self.unsettled

    def stats(self) -> dict[str, dict[str, int]]:
        volatile = self.settings.broker.clean_session or self.settings.pipelines[0].qos == 0
        return {k: {**v, "volatile": v.get("in_flight", 0) if volatile else 0} for k, v in self.stats_now.items()}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    module: Any = type(sys)("fastkin.service.engine")
    module.Engine = FakeEngine
    monkeypatch.setitem(sys.modules, "fastkin.service.engine", module)
    monkeypatch.setattr(FakeEngine, "made", [])
    monkeypatch.setattr(FakeEngine, "stats_now", {"a": {"received": 5, "stored": 5}})
    monkeypatch.setattr(FakeEngine, "unsettled", 0)
    monkeypatch.setattr(FakeEngine, "drain_s", 0.0)

    def terminate(self: FakeEngine) -> None:
        asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FakeEngine, "at_start", terminate)
    return FakeEngine


def made_settings(*, qos: int = 1, clean: bool = False, stdout: bool = False) -> Settings:
    kinesis = Kinesis(stream="s")
    pipeline = Pipeline(id="a", kinesis=kinesis, topics=("t",), qos=qos, stdout=stdout)
    return Settings(broker=Broker(clean_session=clean), pipelines=(pipeline,), warnings=("careful",))


def test_run_drains_at_sigterm(engine: type[FakeEngine], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert run_command.run(made_settings()) == 0
    assert "careful" in caplog.messages
    assert any("SIGTERM: takes no more" in message for message in caplog.messages)
    assert "received 5, stored 5" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("nothing is left")


@pytest.mark.parametrize(
    ("qos", "clean", "code", "says"),
    [
        (1, False, 0, "7 records are not settled: the broker"),
        (2, False, 0, "7 records are not settled: the broker"),
        (0, False, 1, "7 records are lost"),
        (1, True, 1, "7 records are lost"),
    ],
)
def test_run_exits_with_1_only_for_what_is_lost(
    engine: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    qos: int,
    clean: bool,
    code: int,
    says: str,
) -> None:
    monkeypatch.setattr(engine, "stats_now", {"a": {"received": 9, "stored": 2, "in_flight": 7}})
    monkeypatch.setattr(engine, "unsettled", 7)
    assert run_command.run(made_settings(qos=qos, clean=clean)) == code
    assert says in caplog.messages[-1]


def test_run_fails_when_the_engine_fails(
    engine: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(self: FakeEngine) -> None:
        self.failure.set_exception(MqttError("a stage is dead"))

    monkeypatch.setattr(engine, "at_start", fail)
    path = tmp_path / "x.toml"
    path.write_text(GOOD)
    code, _, err = invoke(capsys, "run", str(path))
    assert code == 1
    assert err.splitlines()[-1] == "fastkin: a stage is dead"


SECOND_SIGNAL = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from commands import test_cli
from fastkin.commands.run import run
def twice(self):
    loop = asyncio.get_running_loop()
    loop.call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
    loop.call_later(0.3, os.kill, os.getpid(), signal.SIGINT)
module = type(sys)("fastkin.service.engine")
module.Engine = test_cli.FakeEngine
sys.modules["fastkin.service.engine"] = module
test_cli.FakeEngine.at_start = twice
test_cli.FakeEngine.drain_s = 60
test_cli.FakeEngine.stats_now = {{"a": {{"in_flight": 3}}}}
from fastkin.status import logs
logs.setup()
sys.exit(run(test_cli.made_settings(qos={qos})))
"""


@pytest.mark.parametrize(("qos", "code"), [(1, 0), (0, 1)])
@pytest.mark.process
def test_a_second_signal_stops_at_once(qos: int, code: int) -> None:
    begin = time.monotonic()
    script = SECOND_SIGNAL.format(tests=str(ROOT / "tests"), qos=qos)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, env=env)
    assert done.returncode == code, done.stderr
    assert time.monotonic() - begin < 20
    assert "SIGINT: stops at once" in done.stderr
    assert "3 records" in done.stderr.splitlines()[-1]


def test_run_prints_messages_when_asked(engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command.run(made_settings()) == 0
    assert engine.made[-1].on_message is None
    out = io.BytesIO()
    monkeypatch.setattr("fastkin.commands.printing.sys.stdout", io.TextIOWrapper(out))

    terminate = engine.at_start

    def two_messages(self: FakeEngine) -> None:
        self.on_message("a", b"t", b"1")
        self.on_message("other", b"t", b"2")
        terminate(self)

    monkeypatch.setattr(engine, "at_start", two_messages)
    assert run_command.run(made_settings(stdout=True)) == 0
    assert out.getvalue() == b"key: t\nvalue: 1\n", "what is gathered is printed before the end"


@pytest.mark.process
def test_run_stays_small() -> None:
    """What `fastkin run` loads before it connects: neither SDK nor terminal library, and nothing of the benches."""
    script = (
        "import sys, fastkin.commands.cli, fastkin.settings, fastkin.commands.run, fastkin.service.engine;"
        "heavy = {'botocore', 'aiobotocore', 'aiohttp', 'rich', 'pydantic', 'boto3', 'tomllib', 'fastkin.bench'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout == "[]\n", done.stderr


# --- logs and printing ---


def logged(json_lines: bool, *calls: tuple[Any, ...], **more: Any) -> list[str]:
    out = io.StringIO()
    logs.setup(json_lines=json_lines, stream=out)
    log = logging.getLogger("fastkin.delivery.sender")
    for call in calls:
        log.warning(*call, **more)
    return out.getvalue().splitlines()


def test_text_lines_have_time_level_pipeline_stage_message() -> None:
    first, second = logged(
        False, ("pipeline=%s stage=send %d records", "welders", 3), ("topic %s", "a\nb\x1b[31m\u2028")
    )
    stamp, *rest = first.split()
    assert datetime.fromisoformat(stamp).tzinfo == UTC
    assert rest == ["WARNING", "welders", "send", "3", "records"]
    assert second.split()[1:4] == ["WARNING", "-", "sender"]
    assert second.endswith(r"topic a\nb\x1b[31m\u2028")


def test_json_lines_have_the_same() -> None:
    (line,) = logged(True, ("pipeline=%s stage=send %s", "welders", 'a "b"\n'))
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "WARNING",
        "pipeline": "welders",
        "stage": "send",
        "message": 'a "b"\n',
    }


def test_traces_cannot_pass_for_log_lines() -> None:
    try:
        raise ValueError("x\n2026-01-01T00:00:00.000Z ERROR - forged")
    except ValueError:
        lines = logged(False, ("oh",), exc_info=True)
        (line,) = logged(True, ("oh",), exc_info=True)
    assert all(each.startswith("  | ") for each in lines[1:])
    assert "forged" in json.loads(line)["trace"]


def test_only_fastkin_may_log_below_warning() -> None:
    out = io.StringIO()
    logs.setup(level=logging.DEBUG, stream=out)
    logging.getLogger("botocore.endpoint").debug("Authorization: secret")
    logging.getLogger("fastkin.subscriber").debug("seen")
    assert "secret" not in out.getvalue()
    assert "seen" in out.getvalue()


def test_the_printer_gathers_and_flushes() -> None:
    class Counting(io.BytesIO):
        writes = 0

        def write(self, data: Any) -> int:
            self.writes += 1
            return super().write(data)

    async def run() -> Counting:
        out = Counting()
        printer = Printer(out)
        for n in range(1000):
            printer(b"t/%d" % n, b"payload\xff")
        assert out.writes == 0
        await asyncio.sleep(0.3)
        return out

    out = asyncio.run(run())
    assert out.writes == 1
    assert out.getvalue().startswith(b"key: t/0\nvalue: payload\xff\nkey: t/1\n")
    assert out.getvalue().count(b"key: ") == 1000


def test_a_reader_that_goes_away_does_not_hurt() -> None:
    class Closed(io.BytesIO):
        def write(self, data: Any) -> int:
            raise BrokenPipeError

    async def run() -> None:
        printer = Printer(Closed())
        printer(b"t", b"x" * 70_000)
        printer(b"t", b"x")

    asyncio.run(run())


# --- tail ---


async def fill(emulator: Emulator, stream: str, payloads: list[bytes]) -> None:
    async with client(emulator) as kinesis:
        for at in range(0, len(payloads), 500):
            await kinesis.put_records(
                StreamName=stream,
                Records=[{"Data": data, "PartitionKey": f"k{n}"} for n, data in enumerate(payloads[at : at + 500])],
            )


def client(emulator: Emulator) -> Any:
    from aiobotocore.session import AioSession

    return AioSession().create_client(
        "kinesis",
        region_name="us-east-1",
        endpoint_url=emulator.url,
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )


async def read(emulator: Emulator, stream: str = "s", start: str = "trim_horizon", **more: Any) -> list[bytes]:
    taken: list[bytes] = []
    options = {"limit": None, "region": None, "profile": None, "as_stored": False, **more}
    await tailing._tail(
        stream,
        Position.parse(start),
        endpoint_url=emulator.url,
        take=lambda record: taken.append(record.raw),
        **options,
    )
    return taken


async def test_tail_reads_every_shard() -> None:
    payloads = [welder_payload(n) for n in range(700)]
    async with Emulator({"s": 4}) as emulator:
        await fill(emulator, "s", payloads)
        assert sorted(await read(emulator, limit=700)) == sorted(payloads)
        assert len(await read(emulator, limit=10)) == 10


async def test_tail_names_the_cure() -> None:
    async with Emulator({"s": 1}) as emulator:
        with pytest.raises(tailing.TailError, match="check stream name, region and account"):
            await read(emulator, "nope", limit=1)
        emulator.faults.call("AccessDeniedException", times=1, operation="ListShards")
        with pytest.raises(tailing.TailError, match="allow kinesis:ListShards"):
            await read(emulator, limit=1)


@pytest.mark.parametrize(
    ("text", "kind", "timestamp"),
    [
        ("trim_horizon", "TRIM_HORIZON", None),
        ("TRIM-HORIZON", "TRIM_HORIZON", None),
        ("latest", "LATEST", None),
        ("1764000000.5", "AT_TIMESTAMP", 1_764_000_000.5),
        ("2025-11-24T16:00:00Z", "AT_TIMESTAMP", 1_764_000_000),
        ("2025-11-24T17:00:00+01:00", "AT_TIMESTAMP", 1_764_000_000),
        ("2025-11-24 16:00", "AT_TIMESTAMP", 1_764_000_000),
    ],
)
def test_where_to_begin(text: str, kind: str, timestamp: float | None) -> None:
    start = Position.parse(text)
    assert (start.kind, start.timestamp) == (kind, timestamp)


@pytest.mark.parametrize(
    ("data", "text", "fields"),
    [
        (b'{"a":1}', '{"a":1}', {"data": '{"a":1}'}),
        (b"\x1b[31m\n", r"\x1b[31m\n", {"data": "\x1b[31m\n"}),
        (b"\xff\x00", "base64:/wA=", {"data_base64": "/wA="}),
        (b"", "", {"data": ""}),
    ],
)
def test_lines_of_tail(data: bytes, text: str, fields: dict[str, str]) -> None:
    shard = "shardId-000000000010"
    told = {
        "Data": base64.b64encode(data).decode(),
        "PartitionKey": "k\x1b",
        "SequenceNumber": "7",
        "ApproximateArrivalTimestamp": 1_764_000_000.5,
    }
    [record] = read_records([told], shard, True, False)
    line = tailing.render(record, "text").decode()
    assert line == f"2025-11-24T16:00:00.500Z 10 k\\x1b {text}\n"
    assert tailing.render(record, "raw") == data + b"\n"
    shown = json.loads(tailing.render(record, "json"))
    assert shown == {
        "arrival": "2025-11-24T16:00:00.500Z",
        "shard_id": shard,
        "sequence_number": "7",
        "partition_key": "k\x1b",
        **fields,
    }


# --- emulator and tail as commands ---


@contextlib.contextmanager
def emulator_process(*args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastkin", "emulator", "--port", "0", *args],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    try:
        assert process.stderr is not None
        url = process.stderr.readline().split(" at ")[1].split(": ")[0]
        yield process, url
    finally:
        process.kill()
        process.communicate()


@pytest.mark.process
def test_emulator_and_tail_as_commands() -> None:
    with emulator_process("--stream", "a:2", "--stream", "b:1", "--limits", "off") as (process, url):

        class Somewhere:
            def __init__(self) -> None:
                self.url = url

        asyncio.run(fill(Somewhere(), "a", [b"x", b"y", b"z"]))  # type: ignore[arg-type]
        done = fastkin("tail", "a", "--from", "trim_horizon", "--limit", "3", "--raw", "--endpoint-url", url)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == ["x", "y", "z"]
        done = fastkin("tail", "nope", "--endpoint-url", url)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "check stream name" in done.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.process
def test_an_emulator_on_a_port_in_use_says_so() -> None:
    with emulator_process() as (_, url):
        done = fastkin("emulator", "--port", url.rpartition(":")[2])
        assert done.returncode == 1
        assert "cannot listen on 127.0.0.1" in done.stderr.splitlines()[-1]


# --- demo ---


def test_the_balance_counts_what_is_there_twice_and_missing() -> None:
    stored = [welder_payload(n) for n in range(10)]
    ledger = balance(10, [b"bad"], [*stored, stored[3], stored[3]], [b"bad"], 11)
    assert (ledger.stored, ledger.duplicates, ledger.dead_lettered) == (12, 2, 1)
    assert (ledger.lost, ledger.foreign, ledger.good) == (0, 0, True)
    ledger = balance(10, [], [*stored[:-2], stored[0]], [], None)
    assert (ledger.duplicates, ledger.lost, ledger.good) == (1, 2, False)
    ledger = balance(10, [b"bad"], stored, [], 10)
    assert (ledger.lost, ledger.good) == (1, False)
    ledger = balance(10, [b"bad"], stored, [b"other"], 10)
    assert (ledger.lost, ledger.good) == (1, False)
    ledger = balance(9, [], stored, [], 10)
    assert (ledger.foreign, ledger.good) == (1, False)
    assert ("corrupt", "1", "stored, but never published") in ledger.rows()


def ledger_of(text: str) -> dict[str, str]:
    rows = text.partition("\nledger\n")[2].splitlines()
    return {row.split()[0]: row.split()[1].replace(",", "") for row in rows if row.strip()}


@pytest.mark.parametrize("kill", [[], ["--kill"]])
@pytest.mark.process
def test_the_demo_loses_nothing(tmp_path: Path, kill: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "fastkin", "demo", "--seconds", "4", "--rate", "1000", *kill],
        capture_output=True,
        text=True,
        timeout=90,
        env=env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ledger = ledger_of(done.stdout)
    assert int(ledger["published"]) > 2000
    assert (ledger["lost"], ledger["malformed"], ledger["dead-lettered"]) == ("0", "1", "1")
    assert int(ledger["stored"]) == int(ledger["published"]) + int(ledger["duplicates"])
    assert "throttled to a fifth" in done.stdout
    assert list(tmp_path.iterdir()) == []


def demo_on_amqtt(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys\n"
        "from fastkin.commands.cli import main\n"
        "from fastkin.commands import demo\n"
        "demo.find_mosquitto = lambda: None\n"
        "main(['demo', *sys.argv[1:]])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(tmp_path)}
    return subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=90, env=env)


@pytest.mark.process
def test_the_demo_loses_nothing_without_mosquitto(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = demo_on_amqtt(tmp_path, "--seconds", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    # amqtt does not answer MQTT 5.0: who begins with that waits 10 s for the first message
    assert time.monotonic() - begin < 3 + 9
    assert "mosquitto is not installed: amqtt, at 300 records/s" in done.stdout
    ledger = ledger_of(done.stdout)
    assert int(ledger["published"]) > 500
    assert (ledger["lost"], ledger["malformed"], ledger["dead-lettered"]) == ("0", "1", "1")
    assert int(ledger["stored"]) == int(ledger["published"]) + int(ledger["duplicates"])
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_the_demo_does_not_kill_on_a_broker_that_loses(tmp_path: Path) -> None:
    done = demo_on_amqtt(tmp_path, "--kill")
    assert done.returncode == 1
    assert done.stderr == "fastkin: --kill needs mosquitto, which delivers again: apt-get install mosquitto\n"
    assert list(tmp_path.iterdir()) == []


# --- check --connect ---


async def test_check_connect_goes_the_way_that_run_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a proxy, or with transport = "sdk", that is the SDK."""
    from fastkin.aws.native import KinesisClient
    from fastkin.commands import check
    from fastkin.config import Kinesis

    async with Emulator({"s": 2}) as emulator:
        kinesis = Kinesis(
            stream="s", region="us-east-1", endpoint_url=emulator.url, access_key="AK", secret_key="SK", transport="sdk"
        )
        monkeypatch.setattr(KinesisClient, "call", None)
        assert await check.stream_says(kinesis) == "ACTIVE, 2 shards, PROVISIONED"


def test_check_connect_tries_broker_and_stream(broker: servers.Server, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with emulator_process("--stream", "s:3") as (_, url):
        text = GOOD.replace('password = "brokersecret"\n', "").replace('user = "u"\n', "")
        address = f'url = "mqtt://{broker.host}:{broker.port}"\nclient_id'
        keys = f'endpoint_url = "{url}"\naccess_key = "AK"\nsecret_key = "secretkey"\n'
        path.write_text(text.replace("client_id", address) + keys)
        done = fastkin("check", "--quiet", "--connect", str(path))
        assert done.returncode == 0, done.stderr
        first, *filters, last = done.stdout.splitlines()
        assert first.startswith(f"ok: broker mqtt://{broker.host}:{broker.port}: connected as fastkin-check-")
        assert filters
        assert all(": granted with QoS 1 (code 0x01) to fastkin-check-" in line for line in filters)
        assert last.startswith("ok: stream s: ACTIVE, 3 shards")
        path.write_text(path.read_text().replace('stream = "s"', 'stream = "nope"'))
        done = fastkin("check", "--quiet", "--connect", str(path))
        assert done.returncode == 1
        assert done.stderr.startswith("failed: stream nope: ResourceNotFoundException")
        assert done.stderr.count("\n") == 1
        text = (
            path.read_text().replace('"nope"', '"s"').replace('dead_letter = "none"', 'dead_letter = "stream:nowhere"')
        )
        path.write_text(text)
        done = fastkin("check", "--quiet", "--connect", str(path))
        assert done.returncode == 1
        assert done.stderr.startswith("failed: stream nowhere: ResourceNotFoundException")
        assert done.stderr.count("\n") == 1
        broker.stop()
        done = fastkin("check", "--quiet", "--connect", str(path))
        assert done.returncode == 1
        assert "failed: broker" in done.stderr
        assert "secretkey" not in done.stdout + done.stderr

"""`fastkin selftest`: one line for each step, with what is wrong, where, and the cure."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from fastkin.commands import selftest as module
from fastkin.commands.selftest import READ_CURE, Wanted, selftest
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.errors import ConfigError
from fastkin.testing import ThreadEmulator
from support.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.servers import Server

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def kinesis() -> Iterator[ThreadEmulator]:
    with ThreadEmulator({"welders": 2}, environ=False) as running:
        yield running


def wanted(**changes: Any) -> Wanted:
    return Wanted(**({"messages": 10, "timeout_s": 60.0, "topic": None, "read": True} | changes))


def settings(port: int, kinesis: ThreadEmulator, *streams: str) -> Settings:
    pipelines = tuple(
        Pipeline(
            id=f"p{n}",
            topics=("plant/#",),
            dead_letter="none",
            kinesis=Kinesis(
                stream=stream, region="us-east-1", endpoint_url=kinesis.url, access_key="a", secret_key="b",
                transport="native",
            ),
        )
        for n, stream in enumerate(streams or ("welders",))
    )  # fmt: skip
    return Settings(broker=Broker(host="127.0.0.1", port=port, client_id="service"), pipelines=pipelines)


def steps(text: str) -> list[str]:
    """Which lines there are, without what they say in detail."""
    return [":".join(line.split(": ")[:2]) for line in text.splitlines()]


LOOPBACK = [
    "ok:install", "ok:loopback", "ok:stream selftest for reading", "ok:pipeline", "ok:publish", "ok:store",
    "ok:read back",
]  # fmt: skip


@pytest.mark.process
def test_without_settings_all_of_it_is_on_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what this machine is set to must not lead elsewhere
    monkeypatch.setenv("AWS_PROFILE", "of-the-machine")
    monkeypatch.setenv("AWS_ENDPOINT_URL_KINESIS", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert selftest(None, wanted()) == 0
    out, err = capsys.readouterr()
    assert steps(out) == LOOPBACK
    assert "mosquitto on port" in out
    assert out.endswith(
        "ok: store: 10 of 10 records confirmed by Kinesis\nok: read back: 10 of 10 messages, byte for byte\n"
    )
    assert err == ""


def test_a_machine_without_mosquitto_has_a_stand_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_mosquitto", lambda: None)
    assert selftest(None, wanted(messages=300)) == 0
    out, err = capsys.readouterr()
    assert steps(out) == LOOPBACK
    assert "a stand-in for a broker (mosquitto is not installed) on port" in out
    assert "300 of 300 messages, byte for byte" in out
    assert err == ""


@pytest.mark.process
def test_with_settings_it_is_tried_with_the_users_broker_and_stream(
    broker: Server, kinesis: ThreadEmulator, tmp_path: Path
) -> None:
    """IC-18: N messages are published, N are read back, the exit code is 0."""
    path = tmp_path / "fastkin.toml"
    path.write_text(
        f'[broker]\nurl = "{broker.url}"\nclient_id = "service"\n'
        f'[kinesis]\nregion = "us-east-1"\nendpoint_url = "{kinesis.url}"\naccess_key = "a"\nsecret_key = "b"\n'
        '[[pipeline]]\nid = "p"\nstream = "welders"\ntopics = ["plant/#"]\ndead_letter = "none"\n'
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FASTKIN_", "AWS_"))}
    command = [sys.executable, "-m", "fastkin", "selftest", str(path), "--messages", "7", "--topic", "try/this"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.stderr == ""
    assert done.returncode == 0
    assert steps(done.stdout) == [
        "ok:install", f"ok:broker {broker.url}", "ok:stream welders", "ok:stream welders for reading", "ok:pipeline",
        "ok:publish", "ok:store", "ok:read back",
    ]  # fmt: skip
    assert "7 messages with QoS 1 on topic try/this, all acknowledged by the broker" in done.stdout
    stored = sorted(kinesis.stored_json("welders"), key=lambda value: value["n"])
    assert [(value["message"], value["n"]) for value in stored] == [("Hello, world!", n) for n in range(7)]
    assert "plant/#" not in broker.log()  # of the service's filters nothing is taken
    assert " service " not in broker.log()


def test_a_broker_that_is_not_there_is_told_with_its_place(
    kinesis: ThreadEmulator, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    assert selftest(settings(port, kinesis), wanted()) == 1
    out, err = capsys.readouterr()
    assert steps(out) == ["ok:install", "ok:stream welders"]
    assert steps(err) == [f"failed:broker mqtt://127.0.0.1:{port}"]
    assert "refused" in err
    assert "start it, or correct [broker]" in err
    assert kinesis.stored("welders") == []


@pytest.mark.process
def test_a_stream_that_is_not_there_is_told_with_its_place(
    broker: Server, kinesis: ThreadEmulator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest(settings(broker.port, kinesis, "nobodys"), wanted()) == 1
    out, err = capsys.readouterr()
    assert steps(out) == ["ok:install", f"ok:broker {broker.url}"]
    assert steps(err) == ["failed:stream nobodys"]
    assert "ResourceNotFoundException" in err
    assert "correct stream, region or credentials of pipeline p0" in err


@pytest.mark.process
def test_who_may_not_read_may_still_store(
    broker: Server, kinesis: ThreadEmulator, capsys: pytest.CaptureFixture[str]
) -> None:
    kinesis.fail_calls("AccessDeniedException", operation="GetShardIterator")
    assert selftest(settings(broker.port, kinesis), wanted()) == 1
    out, err = capsys.readouterr()
    assert steps(err) == ["failed:stream welders for reading"]
    assert READ_CURE in err
    assert steps(out)[-1] == "ok:store"
    assert selftest(settings(broker.port, kinesis), wanted(read=False)) == 0
    assert len(kinesis.stored("welders")) == 20


@pytest.mark.process
def test_what_is_not_stored_in_time_is_told(
    broker: Server, kinesis: ThreadEmulator, capsys: pytest.CaptureFixture[str]
) -> None:
    kinesis.fail_entries("InternalFailure")
    assert selftest(settings(broker.port, kinesis), wanted(timeout_s=3.0)) == 1
    out, err = capsys.readouterr()
    assert steps(out)[-1] == "ok:publish"
    (line,) = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: store: 0 of 10 records stored within 3 s, 10 were received from the broker")


@pytest.mark.process
def test_a_stream_of_several_pipelines_is_tried_once(
    broker: Server, kinesis: ThreadEmulator, capsys: pytest.CaptureFixture[str]
) -> None:
    kinesis.create_stream("others")
    several = settings(broker.port, kinesis, "welders", "welders", "others")
    assert selftest(several, wanted(messages=1)) == 0
    assert [len(kinesis.stored(name)) for name in ("welders", "others")] == [1, 1]
    assert selftest(several, wanted(messages=1), only="p2") == 0
    assert [len(kinesis.stored(name)) for name in ("welders", "others")] == [1, 2]
    with pytest.raises(ConfigError, match="no enabled pipeline is called 'p3'; use one of p0, p1, p2"):
        selftest(several, wanted(), only="p3")


def test_what_is_asked_is_what_a_person_can_read(kinesis: ThreadEmulator) -> None:
    topic, payloads = module._messages(wanted(messages=2), "0a1b")
    assert topic == "fastkin/selftest/0a1b"
    assert [orjson.loads(payload) for payload in payloads] == [
        {"message": "Hello, world!", "selftest": "0a1b", "n": n} for n in range(2)
    ]

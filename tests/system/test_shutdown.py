"""`fastkin run` and its signals, as a process: drain, deadline, second signal, reload, and what the last line says."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from fastkin.config import Broker
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from fastkin.service.systemd import notify
from support.fake_broker import until
from support.running import Service, service
from support.servers import free_port, mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.servers import Server

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{port}"
client_id = "{client}"
clean_session = {clean}
reconnect_max_s = 0.5

[kinesis]
stream = "welders"
endpoint_url = "{url}"
region = "us-east-1"

[[pipeline]]
id = "a"
topics = ["a/#"]
qos = {qos}
dead_letter = "none"
linger_ms = {linger}
shutdown_timeout_s = {limit}
"""
MORE = """
[[pipeline]]
id = "b"
topics = ["b/#"]
dead_letter = "none"
"""


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto() as running:
        yield running


def text(server: Server | None, emulator: Emulator, client: str, **more: Any) -> str:
    port = server.port if server is not None else free_port()
    values = {"clean": "false", "qos": 1, "linger": 5, "limit": 0.5, "port": port, "url": emulator.url}
    return SETTINGS.format(**values | more, client=client)


async def said(run: Service, *words: str, times: int = 1) -> None:
    """Wait until the log has a line with all of `words`, so many times."""

    def found() -> bool:
        assert run.process is not None
        count = sum(all(word in line for word in words) for line in run.log().splitlines())
        assert count >= times or run.process.poll() is None, run.log()
        return count >= times

    try:
        await until(found, 30)
    except TimeoutError:
        raise AssertionError(f"never said {words}:\n{run.log()}") from None


def send(run: Service, number: signal.Signals) -> None:
    assert run.process is not None
    run.process.send_signal(number)


async def ended(run: Service) -> int:
    assert run.process is not None
    return await asyncio.to_thread(run.process.wait, 30)


def last(run: Service) -> str:
    return run.log().splitlines()[-1]


async def publish(server: Server, topic: str, count: int = 5, qos: int = 1) -> None:
    async with Publisher(Broker(host=server.host, port=server.port)) as publisher:
        for number in range(count):
            await publisher.publish(topic, b"%d" % number, qos)
        await publisher.drain()


@pytest.mark.parametrize(
    ("qos", "clean", "code", "says"),
    [(1, "false", 0, "5 records are not settled"), (0, "false", 1, "5 records are lost"), (1, "true", 1, "are lost")],
)
async def test_the_deadline_with_kinesis_dead(
    server: Server, tmp_path: Path, qos: int, clean: str, code: int, says: str
) -> None:
    """Exit code 1 only when the broker does not keep what is left."""
    async with Emulator({"welders": 1}) as emulator:
        emulator.faults.call("InternalFailureException", operation="PutRecords")
        with service(tmp_path, text(server, emulator, f"dead-{qos}-{clean}", qos=qos, clean=clean)) as run:
            await said(run, "subscribed")
            await publish(server, "a/1", qos=qos)
            await said(run, "call failed")
            began = time.monotonic()
            send(run, signal.SIGTERM)
            assert await ended(run) == code
            assert time.monotonic() - began < 20
            assert "received 5, stored 0" in last(run)
            assert says in last(run)


async def test_a_drain_ends_with_nothing_left(server: Server, tmp_path: Path) -> None:
    async with Emulator({"welders": 1}) as emulator:
        with service(tmp_path, text(server, emulator, "drain", linger=60_000, limit=20)) as run:
            await said(run, "subscribed")
            await publish(server, "a/1")
            send(run, signal.SIGTERM)
            assert await ended(run) == 0
            assert "nothing is left" in last(run)
            stored = int(re.findall(r"stored (\d+)", last(run))[0])
            assert stored == len(emulator.stored("welders"))


async def test_a_second_signal_does_not_wait_for_kinesis(server: Server, tmp_path: Path) -> None:
    async with Emulator({"welders": 1}) as emulator:
        emulator.faults.call("InternalFailureException", operation="PutRecords")
        with service(tmp_path, text(server, emulator, "second", limit=600)) as run:
            await said(run, "subscribed")
            await publish(server, "a/1")
            await said(run, "call failed")
            send(run, signal.SIGTERM)
            await said(run, "takes no more")
            send(run, signal.SIGHUP)
            await said(run, "SIGHUP", "we are stopping")
            send(run, signal.SIGINT)
            assert await ended(run) == 0
            assert "SIGINT: stops at once" in run.log()
            assert "5 records are not settled" in last(run)


async def test_sigterm_before_there_is_a_broker_or_a_stream(tmp_path: Path) -> None:
    async with Emulator({"other": 1}) as emulator:
        with service(tmp_path, text(None, emulator, "before", limit=600)) as run:
            await said(run, "cannot connect")
            send(run, signal.SIGTERM)
            assert await ended(run) == 0
            assert "received 0" in last(run)
            assert "nothing is left" in last(run)


async def test_sighup_takes_up_the_file_again(server: Server, tmp_path: Path) -> None:
    async with Emulator({"welders": 2}) as emulator:
        first = text(server, emulator, "hup")
        with service(tmp_path, first) as run:
            path = tmp_path / "fastkin.toml"
            await said(run, "subscribed")
            path.write_text(first + MORE)
            send(run, signal.SIGHUP)
            await said(run, "settings taken up: started b; unchanged a")
            await said(run, "subscribed", times=2)
            await publish(server, "a/1", 3)
            await publish(server, "b/1", 4)
            await until(lambda: len(emulator.stored("welders")) == 7, 20)

            path.write_text(first.replace("qos = 1", "qos = 7\nlingerms = 3") + MORE)
            send(run, signal.SIGHUP)
            await said(run, "WARNING", "going on with the former ones")
            wrong = [line for line in run.log().splitlines() if " ERROR " in line]
            assert len(wrong) == 2
            number = path.read_text().splitlines().index("qos = 7") + 1
            begin = f"{path}:{number}: [[pipeline]] 1 ('a') key 'qos'"
            assert any(f"{begin}: 7 is out of range; use 0 to 2" in line for line in wrong)
            assert any("key 'lingerms': is not a key of this table; did you mean linger_ms?" in line for line in wrong)

            path.write_text(first.replace('id = "a"', 'id = "a"\nenabled = false') + MORE)
            send(run, signal.SIGHUP)
            await said(run, "stopped a; unchanged b")
            await said(run, "WARNING", "the broker keeps the session of client 'hup'")
            await publish(server, "b/1", 1)
            await until(lambda: len(emulator.stored("welders")) == 8, 20)
            send(run, signal.SIGTERM)
            assert await ended(run) == 0
            assert "received 8, stored 8" in last(run)
            assert run.log().count(" connected (MQTT") == 2, "an unchanged pipeline does not notice"


async def test_many_sighups_and_sigterm_during_a_reload(server: Server, tmp_path: Path) -> None:
    async with Emulator({"welders": 1}) as emulator:
        emulator.faults.call("InternalFailureException", operation="PutRecords")
        first = text(server, emulator, "during", limit=2)
        with service(tmp_path, first) as run:
            await said(run, "subscribed")
            await publish(server, "a/1")
            await said(run, "call failed")
            for _ in range(20):
                send(run, signal.SIGHUP)
            await said(run, "settings taken up: unchanged a")
            (tmp_path / "fastkin.toml").write_text(first.replace("linger_ms = 5", "linger_ms = 6"))
            send(run, signal.SIGHUP)
            await asyncio.sleep(0.5)  # the old run drains for two seconds
            send(run, signal.SIGTERM)
            assert await ended(run) == 0
            assert "5 records are not settled" in last(run)
            assert "Traceback" not in run.log()
            assert "restarted" not in run.log()


async def test_a_changed_env_file_is_read_anew(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the env file said first must not pass for the real environment when it is read again."""
    from fastkin.settings.reload import Reader

    path = tmp_path / ".env"
    path.write_text("BROKER=h\nTOPIC=t\nKIN_STREAM_NAME=s\nCLIENTID=c\nAWS_PROFILE=one\nAWS_REGION=eu-west-1\n")
    environ = {"AWS_REGION": "us-east-1"}
    reader = Reader(None, str(path), environ)
    assert reader.read().pipelines[0].topics == ("t",)
    assert (environ["AWS_PROFILE"], environ["AWS_REGION"]) == ("one", "us-east-1")
    assert reader.read_again()[1] is False
    path.write_text("BROKER=h\nTOPIC=u\nKIN_STREAM_NAME=s\nCLIENTID=c\nAWS_PROFILE=two\n")
    made, sdk = reader.read_again()
    assert made.pipelines[0].topics == ("u",)
    assert sdk is True
    assert environ["AWS_PROFILE"] == "two"
    path.write_text("BROKER=h\nTOPIC=u\nKIN_STREAM_NAME=s\nCLIENTID=c\n")
    assert reader.read_again()[1] is True
    assert "AWS_PROFILE" not in environ
    path.write_text("BROKER=\n")
    with pytest.raises(Exception, match="settings"):
        reader.read_again()
    assert environ["AWS_REGION"] == "us-east-1"


async def test_systemd_is_told(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(place)
        ear.setblocking(False)
        heard: list[str] = []

        def hears(word: str) -> bool:
            while True:
                try:
                    heard.append(ear.recv(4096).decode())
                except BlockingIOError:
                    return any(word in each for each in heard)

        monkeypatch.setenv("NOTIFY_SOCKET", place)
        async with Emulator({"welders": 1}) as emulator:
            with service(tmp_path, text(server, emulator, "notify")) as run:
                await until(lambda: hears("READY=1"), 30)
                heard.clear()
                send(run, signal.SIGHUP)
                await until(lambda: hears("READY=1"), 30)
                assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", heard[0])
                send(run, signal.SIGTERM)
                assert await ended(run) == 0
                assert hears("STOPPING=1\nEXTEND_TIMEOUT_USEC=10500000")


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("", "/nowhere/at/all", "@fastkin-nobody"):
        monkeypatch.setenv("NOTIFY_SOCKET", place)
        notify("READY=1")


def test_a_terminal_that_is_closed_ends_the_service(server: Server, tmp_path: Path) -> None:
    """SIGHUP of a terminal that goes away is no wish for a reload."""
    import pty

    (tmp_path / "fastkin.toml").write_text(
        '[broker]\nurl = "mqtt://127.0.0.1:1"\nclient_id = "tty"\n[[pipeline]]\nid = "a"\ntopics = ["t"]\n'
        'stream = "s"\nregion = "us-east-1"\nendpoint_url = "http://127.0.0.1:1"\naccess_key = "a"\nsecret_key = "b"\n'
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FASTKIN_"))}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "fastkin", "run", str(tmp_path / "fastkin.toml")], env)
    try:
        heard = b""
        while b"running: " not in heard:
            heard += os.read(terminal, 4096)
    finally:
        os.close(terminal)  # the kernel sends SIGHUP
    deadline = time.monotonic() + 30
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    if done == (0, 0):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert done[0] == pid
    assert os.waitstatus_to_exitcode(done[1]) == 0


# what goes before `fastkin`: a signal comes when something is about to be done for the first time
EARLY = """
import os, signal
from {module} import {name}
do = {name}.{method}
def and_be_told(*args):
    {name}.{method} = do
    os.kill(os.getpid(), signal.{signal})
    return do(*args)
{name}.{method} = and_be_told
from fastkin.commands.cli import main
main()
"""


class Early(Service):
    signal: str
    at: tuple[str, str, str]

    def command(self) -> list[str]:
        module, name, method = self.at
        return [sys.executable, "-c", EARLY.format(signal=self.signal, module=module, name=name, method=method)]


READING = ("fastkin.settings.reload", "Reader", "read")
LOADING = ("fastkin.commands.run", "_Service", "__init__")


@pytest.mark.parametrize("at", [READING, LOADING], ids=["reading", "loading"])
async def test_a_sighup_before_the_loop_runs_is_a_reload(
    server: Server, tmp_path: Path, at: tuple[str, str, str]
) -> None:
    """It would end a process that has no handler yet, and one that only a handler saw would be lost."""
    async with Emulator({"welders": 1}) as emulator:
        run = Early(tmp_path, text(server, emulator, f"early-{at[2]}"))
        run.signal, run.at = "SIGHUP", at
        run.start()
        try:
            await said(run, "settings taken up: unchanged a")
            send(run, signal.SIGTERM)
            assert await ended(run) == 0
        finally:
            run.kill()


async def test_a_sigterm_before_the_loop_runs_stops_in_order(server: Server, tmp_path: Path) -> None:
    async with Emulator({"welders": 1}) as emulator:
        run = Early(tmp_path, text(server, emulator, "early-term"))
        run.signal, run.at = "SIGTERM", LOADING
        run.start()
        try:
            assert await ended(run) == 0
            assert "nothing is left" in last(run)
        finally:
            run.kill()

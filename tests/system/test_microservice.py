"""`fastkin run` in the place of the MQTT-to-Kinesis microservice: its .env file, a WebSocket, a password, QoS 2."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import paho.mqtt.publish as paho
import pytest

from support.readback import read_stream
from support.running import ROOT, wait_until
from support.servers import emulator_process, free_port, mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSWORD = "brokersecret-1"
SECRETS = ("awssecret-2", "sessionsecret-3", PASSWORD)
ENV_FILE = """
BROKER=127.0.0.1
WEBSOCKET={websocket}
USER=welder
PASS=brokersecret-1
CLIENTID=client-123
TOPIC=homeassistant/sensor/#,plant/+/welder
QOS=2
BACKLOG_COUNT=2000
KIN_STREAM_NAME=welders
KIN_MAXCONN=10
KIN_SESSION_NAME=
KIN_PARTITION_KEY=sensor-data
AWS_ACCESS_KEY_ID=AKEXAMPLE
AWS_SECRET_ACCESS_KEY=awssecret-2
AWS_SESSION_TOKEN=sessionsecret-3
AWS_REGION=us-east-1
AWS_ENDPOINT={endpoint}
STDOUT=true
DOCKERLOG=/dev/stdout
"""


@contextlib.contextmanager
def run(directory: Path, tag: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    # USER as every login shell has it: not the broker's
    env = {"PATH": os.environ["PATH"], "USER": pwd.getpwuid(os.getuid()).pw_name, "PYTHONPATH": str(ROOT / "src")}
    with (directory / f"{tag}.out").open("wb") as out, (directory / f"{tag}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastkin", "run", "--env-file", ".env", *options],
            cwd=directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def steer(url: str, method: str, body: bytes | None = None) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url}/_emulator/faults", method=method, data=body), timeout=5)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_its_env_file_runs_unchanged(tmp_path: Path, log_format: str) -> None:
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "welder", PASSWORD], check=True)
    port = free_port()
    conf = f"allow_anonymous false\npassword_file {passwords}\nlistener {port}\nprotocol websockets\n"
    options = ("-v", "--log-format", log_format)

    def log(tag: str) -> str:
        return (tmp_path / f"{tag}.log").read_text()

    with mosquitto(conf) as broker, emulator_process({"welders": 4}) as kinesis:

        def publish(*messages: tuple[str, bytes, int]) -> None:
            made: list[Any] = [{"topic": topic, "payload": payload, "qos": qos} for topic, payload, qos in messages]
            auth: Any = {"username": "welder", "password": PASSWORD}
            paho.multiple(made, hostname=broker.host, port=broker.port, auth=auth)

        def stored() -> list[tuple[str | None, bytes]]:
            return sorted((key, data) for key, data, _ in asyncio.run(read_stream(kinesis.url, "welders")))

        (tmp_path / ".env").write_text(ENV_FILE.format(websocket=port, endpoint=kinesis.url))
        sent = [("plant/h1/welder", b'{"qos":%d}' % qos, qos) for qos in (0, 1, 2)]
        sent += [("homeassistant/sensor", "température".encode(), 1), ("homeassistant/sensor/a/b", b"", 2)]
        expected = sorted(("sensor-data", payload) for _, payload, _ in sent)

        with run(tmp_path, "first", *options) as process:
            wait_until(lambda: "subscribed" in log("first"), 20, "subscribed")
            publish(*sent, ("elsewhere", b"not ours", 1))
            wait_until(lambda: stored() == expected, 10, "all stored, under the static key")
            # Kinesis is away now: one signal waits for it, another one does not
            steer(kinesis.url, "POST", b'{"kind": "call", "code": "ServiceUnavailable"}')
            publish(("plant/h2/welder", b"late", 2))
            wait_until(lambda: "ServiceUnavailable" in log("first"), 10, "the call failed")
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: "SIGTERM" in log("first"), 5, "it is stopping")
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0, "the broker keeps the message: nothing is lost"
        printed = (tmp_path / "first.out").read_bytes()
        # QoS 2 takes the broker one step more: the others may overtake it
        assert sorted(printed.split(b"key: ")[1:]) == sorted(
            b"%s\nvalue: %s\n" % (topic.encode(), payload)
            for topic, payload, _ in [*sent, ("plant/h2/welder", b"late", 2)]
        )
        assert f"ws://127.0.0.1:{port}/mqtt" in log("first")
        assert "DOCKERLOG is ignored" in log("first")
        assert "one static partition key on 4 shards" in log("first")
        assert "1 records are not settled" in log("first")

        steer(kinesis.url, "DELETE")
        with run(tmp_path, "second", *options) as process:
            wait_until(lambda: stored() == sorted([*expected, ("sensor-data", b"late")]), 10, "sent again")
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        assert (tmp_path / "second.out").read_bytes() == b"key: plant/h2/welder\nvalue: late\n"
        assert "nothing is left" in log("second")
    for tag in ("first", "second"):
        for secret in SECRETS:
            assert secret not in log(tag)

"""The servers the other tests lean on: they start, answer, restart, and end without a trace."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from support import servers

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_mosquitto_starts_restarts_on_its_port_and_ends() -> None:
    with servers.mosquitto("max_inflight_messages 7\n", persistence=True) as broker:
        first, port = broker.pid, broker.port
        assert servers.accepts(port)
        broker.restart()
        assert (broker.port, broker.pid != first) == (port, True)
        assert not alive(first)
        broker.kill()
        assert not servers.accepts(port)
        broker.start()
        last = broker.pid
        until = time.monotonic() + 10  # it may listen before it says so
        while broker.log().count("running") < 3 and time.monotonic() < until:
            time.sleep(0.05)
        assert broker.log().count("running") == 3
    assert not alive(last)
    assert not broker.directory.exists()


def test_a_broken_configuration_fails_with_what_the_server_printed() -> None:
    broken = servers.mosquitto("no_such_setting 1\n")
    with pytest.raises(servers.ServerError, match="Unknown configuration variable"):
        broken.__enter__()


def test_two_brokers_live_side_by_side() -> None:
    with servers.mosquitto() as one, servers.mosquitto() as two:
        assert one.port != two.port
        one.signal(signal.SIGKILL)
        assert two.running


def test_kinesalite_answers() -> None:
    with servers.kinesalite() as server:
        server.create_stream("s", 3)
        answer = server.call("ListShards", {"StreamName": "s"})
        assert len(answer["Shards"]) == 3
        put = server.call("PutRecord", {"StreamName": "s", "PartitionKey": "k", "Data": "aGk="})
        assert put["ShardId"].startswith("shardId-00000000000")
        with pytest.raises(servers.ServerError, match="ResourceNotFoundException"):
            server.call("DescribeStreamSummary", {"StreamName": "absent"})


def test_kinesis_mock_answers() -> None:
    with servers.kinesis_mock() as server:
        server.create_stream("s", 2)
        put = server.call("PutRecord", {"StreamName": "s", "PartitionKey": "k", "Data": "aGk="})
        assert put["ShardId"].startswith("shardId-00000000000")


def test_the_emulator_runs_as_a_process() -> None:
    with servers.emulator_process({"s": 2}, limits=False, keep="count") as server:
        put = server.call("PutRecord", {"StreamName": "s", "PartitionKey": "k", "Data": "aGk="})
        assert put["ShardId"].startswith("shardId-00000000000")
        assert len(server.call("ListShards", {"StreamName": "s"})["Shards"]) == 2


def test_a_missing_server_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTKIN_SERVERS", str(tmp_path))
    absent = servers.kinesalite()
    with pytest.raises(servers.ServerError, match=r"kinesalite is not installed .*ci/setup test"):
        absent.__enter__()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("start", [servers.nats, servers.aedes, servers.rabbitmq, servers.amqtt])
def test_other_brokers_start_restart_and_end(start: Callable[[], AbstractContextManager[servers.Server]]) -> None:
    with start() as broker:
        first = broker.pid
        broker.restart()
        assert servers.accepts(broker.port)
        last = broker.pid
    assert not alive(first)
    assert not alive(last)
    assert not servers.accepts(broker.port)
    assert not broker.directory.exists()

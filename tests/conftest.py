"""Fixtures for every test; `async def test_...` runs under pytest-asyncio in a loop of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import servers

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def broker() -> Iterator[servers.Server]:
    """A fresh mosquitto for this test."""
    with servers.mosquitto() as server:
        yield server


@pytest.fixture(scope="session")
def kinesalite_server() -> Iterator[servers.KinesisServer]:
    """One kinesalite for the whole run: use a stream name of your own."""
    with servers.kinesalite() as server:
        yield server


@pytest.fixture(scope="session")
def kinesis_mock_server() -> Iterator[servers.KinesisServer]:
    """One kinesis-mock for the whole run: use a stream name of your own."""
    with servers.kinesis_mock() as server:
        yield server

"""A producer for an emulated stream, for the tests of who waits for room and who looks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastkin import Producer
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from fastkin.emulator import Emulator


def producer(emulator: Emulator, **options: Any) -> Producer:
    """Of the stream `welders`; not opened yet."""
    return Producer(
        "welders", region="us-east-1", endpoint_url=emulator.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY,
        **options,
    )  # fmt: skip

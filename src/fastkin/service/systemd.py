"""Tells systemd how we are (sd_notify): one datagram to the socket that it names. Without systemd: nothing."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """For example READY=1, several lines at once. Never raises: nothing depends on being heard."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address[0] == "@":
        address = "\0" + address[1:]  # the abstract namespace
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.setblocking(False)
        out.sendto(state.encode(), address)

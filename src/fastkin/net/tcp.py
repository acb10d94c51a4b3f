"""TCP's own signs of life: probes on an idle connection, an end to one that the peer no longer answers.

A peer that vanishes without a word (a cable, a NAT that forgets, a host without power) leaves a connection that
looks open for ever to who only reads from it. The kernel finds out within a minute or so, whatever is spoken above.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

IDLE_S = 30  # nothing came for so long: probe
EVERY_S = 10
PROBES = 3
DEAD_S = IDLE_S + EVERY_S * PROBES  # nothing was acknowledged for so long: the peer is gone

_SINCE_DATA = slice(52, 56)  # struct tcp_info of Linux: tcpi_last_data_recv, ms


def keep_alive() -> list[tuple[int, int, int]]:
    """Level, option, value for setsockopt(), of what this system has."""
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"  # the latter on macOS
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (
            (idle, IDLE_S),
            ("TCP_KEEPINTVL", EVERY_S),
            ("TCP_KEEPCNT", PROBES),
            ("TCP_USER_TIMEOUT", DEAD_S * 1000),  # also for what we have sent
        )
        if hasattr(socket, name)
    ]


def silence(sock: Any) -> float:
    """Seconds since the kernel last took data from the peer; infinite where it does not say."""
    option = getattr(socket, "TCP_INFO", None)
    if sock is None or option is None:
        return float("inf")
    try:
        # The beginning of the structure is enough, and its layout never changes: the kernel only adds to its end.
        info = sock.getsockopt(socket.IPPROTO_TCP, option, _SINCE_DATA.stop)
    except OSError:
        return float("inf")
    if not isinstance(info, bytes) or len(info) < _SINCE_DATA.stop:
        return float("inf")
    return int.from_bytes(info[_SINCE_DATA], sys.byteorder) / 1000

"""A Kinesis that behaves: shard limits, partial failures, faults on demand, a ledger.

No public mock throttles, enforces request sizes or fails records one by one, so fastkin brings its
own: for tests and benches in the same process (`Emulator`), or as a command (`fastkin emulator`).

What it costs, as a process of its own on uvloop: user + system CPU per record, calls of 500 records
on 4 connections, measured beside each other on a 2-core x86-64 server (Zen 4, Python 3.11):

                                            200 B      2 KB
    keep="count", JSON, limits on         1.23 us   5.00 us
    keep="count", JSON, limits off        1.28 us   5.10 us
    keep="all",   JSON                    1.50 us   5.70 us
    keep="count", CBOR                    2.60 us
    count_only,   JSON                    0.18 us   3.50 us
    kinesalite 3.3.3                      42.5 us
    kinesis-mock 0.6.2                     330 us     (and more with every stored record)
"""

from .connection import Put
from .faults import Fault, Faults
from .rules import ApiError
from .server import Counters, Emulator, serve
from .signature import Secret
from .state import StreamSpec
from .streams import StoredRecord
from .sts import AssumedRole

__all__ = [
    "ApiError",
    "AssumedRole",
    "Counters",
    "Emulator",
    "Fault",
    "Faults",
    "Put",
    "Secret",
    "StoredRecord",
    "StreamSpec",
    "serve",
]

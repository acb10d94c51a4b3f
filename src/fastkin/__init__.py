"""fastkin: MQTT in, Kinesis out; a message is acknowledged only when Kinesis has its records.

`Engine` is the service, from a broker to a stream; `Producer` writes to a stream, and `SyncProducer` does so without an
event loop; `Consumer` reads one. `encode_frame` and `decode_frame` are the bulk format of payloads.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    from fastkin._codec import Receipt, decode_frame, encode_frame
except ImportError as _error:
    raise ImportError(
        f"fastkin's compiled part cannot be loaded ({_error}): install the package (pip install fastkin),"
        " or in a checkout run `python setup.py build_ext --inplace`"
    ) from _error

from fastkin.errors import (
    BudgetFull,
    CheckpointError,
    ClosedError,
    ConfigError,
    DataFormatError,
    DeliveryTimeout,
    ErrorType,
    FastkinError,
    KinesisError,
    LibraryError,
    RecordDropped,
    RecordError,
    RecordFailed,
    RecordsLost,
    RequestFailed,
    SpoolError,
    TransportError,
    UnexpectedResponse,
)
from fastkin.results import EncryptionType, FrameResult, PutRecordsResult, PutResult

if TYPE_CHECKING:
    from fastkin._codec import ConsumerRecord, content_key, decode_json
    from fastkin.config import Settings
    from fastkin.consumer import Batch, Consumer, FileCheckpoints, MemoryCheckpoints, Position, ShardIteratorType
    from fastkin.producer import Producer
    from fastkin.record import Record
    from fastkin.service.engine import Engine
    from fastkin.service.reload import Changes
    from fastkin.settings import load_settings
    from fastkin.sync_producer import SyncProducer

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BudgetFull",
    "Changes",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "Consumer",
    "ConsumerRecord",
    "DataFormatError",
    "DeliveryTimeout",
    "EncryptionType",
    "Engine",
    "ErrorType",
    "FastkinError",
    "FileCheckpoints",
    "FrameResult",
    "KinesisError",
    "LibraryError",
    "MemoryCheckpoints",
    "Position",
    "Producer",
    "PutRecordsResult",
    "PutResult",
    "Receipt",
    "Record",
    "RecordDropped",
    "RecordError",
    "RecordFailed",
    "RecordsLost",
    "RequestFailed",
    "Settings",
    "ShardIteratorType",
    "SpoolError",
    "SyncProducer",
    "TransportError",
    "UnexpectedResponse",
    "content_key",
    "decode_frame",
    "decode_json",
    "encode_frame",
    "load_settings",
]

# Loaded on first use: a service that only needs the frame codec pays for nothing else.
_LAZY = {
    "Batch": "fastkin.consumer",
    "Changes": "fastkin.service.reload",
    "Consumer": "fastkin.consumer",
    "ConsumerRecord": "fastkin._codec",
    "Engine": "fastkin.service.engine",
    "FileCheckpoints": "fastkin.consumer",
    "MemoryCheckpoints": "fastkin.consumer",
    "Position": "fastkin.consumer",
    "Producer": "fastkin.producer",
    "Record": "fastkin.record",
    "Settings": "fastkin.config",
    "SyncProducer": "fastkin.sync_producer",
    "ShardIteratorType": "fastkin.consumer",
    "content_key": "fastkin._codec",
    "decode_json": "fastkin._codec",
    "load_settings": "fastkin.settings",
}


# Type checkers must not see this: for them a module with a __getattr__ has every name, misspelt ones too.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        module = _LAZY.get(name)
        if module is None:
            raise AttributeError(f"module 'fastkin' has no attribute {name!r}")
        return getattr(import_module(module), name)


def __dir__() -> list[str]:
    """What help() and completion show: names that were not loaded yet too."""
    return sorted({*globals(), *__all__})

"""What Kinesis takes, and what a call takes unless the settings say otherwise: each number once.

https://docs.aws.amazon.com/streams/latest/dev/service-sizes-and-limits.html
The emulator has numbers of its own: a wrong one here must not pass there.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

CALL_RECORDS = 500  # of one PutRecords call
CALL_BYTES = 10 * MIB  # of one PutRecords call: data and keys
RECORD_BYTES = 1 * MIB  # data and key of a record, where the stream was not set to take larger ones
LARGE_RECORD_BYTES = 10 * MIB  # the most that a stream can be set to take
DEFAULT_CALL_BYTES = 5 * MIB  # of a call, where the settings do not say: CALL_BYTES before there were large records

# The table of compiled payload formats. One more is a file that defines scan, next and reason (payload.pxi says what
# they owe), its include here, and a row. Formats written in Python are rows of formats/table.py.

include "format_raw.pxi"
include "format_bulk.pxi"

# Name, number, what it does, functions. The number is the format's Subscription Identifier: brokers keep it in sessions
# and beside queued messages, so it is never given to another format.
COMPILED_FORMATS = (
    compiled_format("raw", 1, "a payload is a record", raw_scan, raw_next, raw_reason),
    compiled_format("bulk", 2, "a frame of records", bulk_scan, bulk_next, bulk_reason),
)

cdef PayloadFormat RAW = COMPILED_FORMATS[0]
cdef PayloadFormat BULK = COMPILED_FORMATS[1]


cdef PayloadFormat format_of(object given):
    """A row, or the name of a compiled one."""
    if isinstance(given, PayloadFormat):
        return given
    for row in COMPILED_FORMATS:
        if (<PayloadFormat> row).name == given:
            return row
    names = ", ".join([(<PayloadFormat> row).name for row in COMPILED_FORMATS])
    raise LibraryError(f"{given!r} is no payload format: give one of {names}, or a PayloadFormat")


def decode_frame(payload) -> list[bytes]:
    """The records of a bulk frame, or DataFormatError: all or nothing."""
    return BULK.decoded(payload, "a frame")

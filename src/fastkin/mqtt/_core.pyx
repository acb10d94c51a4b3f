# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Per-packet work, compiled, sans-io: MQTT 3.1.1 and 5.0 to subscribe, and a little to publish.

One module in parts, small ones first; the last one is where a packet comes in, and calls the others:
  mqtt/packets.pxi   leaf functions on pointers: UTF-8, lengths, properties, matching, PUBLISH
  mqtt/encode.pxi    what we send, and the texts of reason codes
  mqtt/events.pxi    control packets as objects
  mqtt/acks.pxi      which PUBLISH still waits for which records; acknowledgements in order; what comes again
  mqtt/router.pxi    which sink a message goes to
  mqtt/large.pxi     messages that can never be a record: too large, ill-formed
  mqtt/sinks.pxi     sinks for taps, tests and benches
  mqtt/receive.pxi   the memory that a connection receives into
  mqtt/control.pxi   what a broker may send besides messages
  mqtt/session.pxi   one connection: walk, stall and resume

Rules: a length from the wire is unsigned and compared with what is left, never added to a pointer
first; no Python object is made per PUBLISH; while a sink runs, the session is whole and refuses
re-entrance. `nogil` on a function says that it touches no Python object; the GIL is never given away.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove, memset

import hashlib
import os

from fastkin._codec cimport OFFER_STALLED, OUT_FAILED, OUT_STORED, Settler, Sink

from fastkin.errors import LibraryError, ProtocolError

cdef enum:
    FLAG_EVENTS = 1
    FLAG_STALLED = 2
    FLAG_OUTPUT = 4
    FLAG_APART = 8

# bits of what feed() and resume() return
EVENTS = FLAG_EVENTS    # control packets wait in take_events()
STALLED = FLAG_STALLED  # there is no room, in a sink or for unacknowledged messages: stop reading, resume() later
OUTPUT = FLAG_OUTPUT    # take_output() has something to write
APART = FLAG_APART      # a piece of what is to be set aside waits in take_piece(): stop reading

include "packets.pxi"
include "encode.pxi"
include "events.pxi"
include "acks.pxi"
include "router.pxi"
include "large.pxi"
include "sinks.pxi"
include "receive.pxi"
include "control.pxi"
include "session.pxi"

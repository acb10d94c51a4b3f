# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Per-record work, compiled: frames, keys, size accounting, batches, request bodies, answers.

One module in parts, because parts of one module call each other without a Python call between them. They are listed as
they are included, small ones first; a few name what stands below, and a record passes them in another order, which
DESIGN.md walks.
  codec/payload.pxi   what a payload format is
  codec/formats.pxi   the table of them, each a file: format_raw.pxi, format_bulk.pxi
  codec/json.pxi      a JSON reader for bytes nobody vouches for: key fields and answers
  codec/keys.pxi      partition keys: drawn, fixed, made of topic and payload; hash key to shard
  codec/receipt.pxi   one outcome somebody may await
  codec/answer.pxi    one PutRecords answer, entry by entry
  codec/entry.pxi     the text of an entry, for PutRecords and for the disk
  codec/batch.pxi     the budget, and one PutRecords body with what it must settle
  codec/restore.pxi   a body that comes back from the disk, read as if a stranger had written it
  codec/aggregate.pxi several records in one Kinesis record, as the KPL does it
  codec/lines.pxi     the same, as lines of JSON
  codec/shape.pxi     what is made of each record before it is stored
  codec/batcher.pxi   payloads in, closed batches out
  codec/sinks.pxi     more ways into one batcher, for payloads of other formats
  codec/reading.pxi   records as a consumer gets them

Rules: an untrusted length is unsigned and compared with what is left, never added to a pointer first (the sum may wrap,
and a pointer behind the end would pass);
a frame is read whole before a byte of it is taken; while we call out, our objects are whole.
`nogil` on a function says only that it touches no Python object, which the compiler then checks. The GIL is given away
in one place, `with nogil` in codec/entry.pxi, which reads a body that is held by its buffer; all else runs with it, and
nothing claims to be thread-safe without it.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_CheckExact,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from cpython.exc cimport PyErr_SetObject, PyErr_WriteUnraisable
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from cpython.unicode cimport (
    PyUnicode_AsUTF8AndSize,
    PyUnicode_DecodeUTF8,
    PyUnicode_GET_LENGTH,
)
from libc.stdint cimport UINT32_MAX, int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcmp, memcpy, memset

import asyncio
import base64
import json
from binascii import a2b_base64
from collections import deque
from types import GenericAlias

from fastkin import limits
from fastkin.errors import DataFormatError, LibraryError, RecordError, UnexpectedResponse
from fastkin.results import EncryptionType, FrameResult, PutResult

cdef object NO_ENCRYPTION = EncryptionType.NONE  # what an answer that names none says


cdef object encryption_type(str told):
    """A member of EncryptionType, or the text as it stands when nobody documented it."""
    return EncryptionType.__members__.get(told, told)


cdef extern from "Python.h":
    int PyGC_Disable()
    int PyGC_Enable()
    unsigned long PyThread_get_thread_ident() noexcept

cdef extern from "codec/base64.h" nogil:
    enum:
        FK_B64_SLACK
    size_t fk_b64_length(size_t n) noexcept
    void (*fk_b64_encode)(const uint8_t* src, size_t n, char* dst) noexcept
    int fk_b64_init() noexcept
    int fk_b64_use(int kernel) noexcept

cdef extern from "codec/pattern.h" nogil:
    ctypedef struct fk_pattern:
        size_t length  # 0: there is none
    bint fk_pattern_set(fk_pattern* pattern, const uint8_t* text, size_t length) noexcept
    void fk_pattern_open(fk_pattern* pattern, size_t start, size_t length) noexcept
    bint fk_pattern_is(const fk_pattern* pattern, const uint8_t* text, size_t left) noexcept

cdef extern from "codec/random.h" nogil:
    enum:
        FK_UUID_LENGTH
    int fk_random_init() noexcept
    int fk_random_ready() noexcept
    void fk_random_fix(uint64_t seed) noexcept
    void fk_random_forget() noexcept
    uint64_t fk_random() noexcept
    void fk_uuid4(char* out) noexcept

cdef extern from "codec/content.h" nogil:
    void fk_content_init() noexcept
    void fk_content(const uint8_t* topic, size_t topic_length, const uint8_t* payload, size_t payload_length,
                    uint64_t* out) noexcept
    void fk_uuid8(const uint64_t* digest, uint64_t index, char* out) noexcept

cdef extern from "codec/md5.h" nogil:
    void fk_md5(const uint8_t* data, size_t n, uint8_t* out) noexcept

STORED = OUT_STORED
DEAD = OUT_DEAD
FILTERED = OUT_FILTERED
DROPPED = OUT_DROPPED
FAILED = OUT_FAILED
SPOOLED = OUT_SPOOLED

cdef enum:
    FLUSH_FULL_COUNT = 0
    FLUSH_FULL_BYTES = 1
    FLUSH_LINGER = 2
    FLUSH_WINDOW = 3
    FLUSH_IDLE = 4
    FLUSH_DRAIN = 5
    FLUSH_REASONS = 6

FULL_COUNT = FLUSH_FULL_COUNT
FULL_BYTES = FLUSH_FULL_BYTES
LINGER = FLUSH_LINGER
WINDOW = FLUSH_WINDOW
IDLE = FLUSH_IDLE
DRAIN = FLUSH_DRAIN

cdef int _kernel = fk_b64_init()


cdef struct Buf:
    # bytes that grow
    char* p
    size_t length
    size_t room


cdef inline int buf_reserve(Buf* buf, size_t more) noexcept nogil:
    """Room for `more` bytes behind what is there: 0, or -1 without memory."""
    if more <= buf.room - buf.length:
        return 0
    return buf_grow(buf, more)


cdef int buf_grow(Buf* buf, size_t more) noexcept nogil:
    cdef size_t room = buf.room + buf.room // 2
    cdef char* p
    if room < buf.length + more:
        room = buf.length + more
    if room < 256:
        room = 256
    p = <char*> realloc(buf.p, room)
    if p == NULL:
        return -1
    buf.p = p
    buf.room = room
    return 0


cdef inline int buf_need(Buf* buf, size_t more) except -1:
    if more <= buf.room - buf.length and buf.p != NULL:
        return 0
    return check_memory(buf_grow(buf, more))


cdef inline int check_memory(int status) except -1:
    """For what leaf functions return: -1 is no memory."""
    if status < 0:
        raise MemoryError
    return 0


cdef inline void* take_memory(void* before, size_t n) except NULL:
    """malloc, or realloc of what was there before."""
    cdef void* p = realloc(before, n if n else 1)
    check_memory(-1 if p == NULL else 0)
    return p


cdef inline void buf_free(Buf* buf) noexcept nogil:
    free(buf.p)
    buf.p = NULL
    buf.length = 0
    buf.room = 0


cdef class Settler:
    """Is told how records ended."""

    cdef int settle(self, uint64_t token, uint32_t count, int outcome, object answer,
                    Py_ssize_t at) except -1:
        raise NotImplementedError("a Settler must say how it settles")


@cython.final
cdef class CallbackSettler(Settler):
    """Tells a callable how records ended: fn(token, count, outcome, answer, at). See _codec.pxd."""

    cdef object callback

    def __cinit__(self, callback):
        if not callable(callback):
            raise TypeError(f"a callback is called, {type(callback).__name__} cannot be")
        self.callback = callback

    cdef int settle(self, uint64_t token, uint32_t count, int outcome, object answer,
                    Py_ssize_t at) except -1:
        self.callback(token, count, outcome, answer, at)
        return 0


cdef class Sink:
    """Takes payloads."""

    cdef Py_ssize_t offer_c(self, const uint8_t* topic, size_t topic_len, const uint8_t* data,
                            size_t length, uint64_t token) except -2:
        raise NotImplementedError("a Sink must say how it takes a payload")


cdef struct Bytes:
    # the bytes of an argument, for as long as `view` is held
    const uint8_t* p
    size_t length
    bint held
    Py_buffer view


cdef inline int bytes_open(object source, Bytes* out, str what) except -1:
    """Take bytes, bytearray or a contiguous memoryview. LibraryError for anything else."""
    out.held = False
    if PyBytes_CheckExact(source):
        out.p = <const uint8_t*> PyBytes_AS_STRING(source)
        out.length = <size_t> PyBytes_GET_SIZE(source)
        return 0
    return bytes_view(source, out, what)


cdef int bytes_view(object source, Bytes* out, str what) except -1:
    try:
        PyObject_GetBuffer(source, &out.view, PyBUF_SIMPLE)
    except (TypeError, BufferError, ValueError) as error:
        raise LibraryError(f"{what} must be contiguous bytes, not {type(source).__name__}: {error}") from None
    out.held = True
    out.length = <size_t> out.view.len
    # a pointer to nothing may be NULL: never hand that on
    out.p = <const uint8_t*> out.view.buf if out.length else <const uint8_t*> b""
    return 0


cdef inline void bytes_close(Bytes* out) noexcept:
    if out.held:
        PyBuffer_Release(&out.view)


check_memory(-fk_random_init())  # a positive errno
fk_content_init()

include "codec/payload.pxi"
include "codec/formats.pxi"
include "codec/json.pxi"
include "codec/keys.pxi"
include "codec/receipt.pxi"
include "codec/answer.pxi"
include "codec/entry.pxi"
include "codec/batch.pxi"
include "codec/restore.pxi"
include "codec/aggregate.pxi"
include "codec/lines.pxi"
include "codec/shape.pxi"
include "codec/batcher.pxi"
include "codec/sinks.pxi"
include "codec/reading.pxi"


def simd() -> str:
    """The base64 kernel in use: scalar, avx2 or vbmi."""
    return ("scalar", "avx2", "vbmi")[_kernel]


def _use_simd(str name) -> bool:
    """For tests: encode with this kernel from now on; False when the CPU has it not."""
    global _kernel
    cdef int kernel = ("scalar", "avx2", "vbmi").index(name)
    if not fk_b64_use(kernel):
        return False
    _kernel = kernel
    return True


def _base64(data) -> bytes:
    """For tests: the kernel in use on its own, and the bytes behind its output left alone."""
    cdef Bytes source
    cdef char* out
    cdef size_t length
    bytes_open(data, &source, "data")
    try:
        length = fk_b64_length(source.length)
        out = <char*> take_memory(NULL, length + FK_B64_SLACK)
        fk_b64_encode(source.p, source.length, out)
        result = PyBytes_FromStringAndSize(out, <Py_ssize_t> length)
        free(out)
        return result
    finally:
        bytes_close(&source)


def _md5(data) -> bytes:
    """For tests."""
    cdef Bytes source
    cdef uint8_t digest[16]
    bytes_open(data, &source, "data")
    fk_md5(source.p, source.length, digest)
    bytes_close(&source)
    return PyBytes_FromStringAndSize(<char*> digest, 16)

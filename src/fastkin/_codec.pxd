# The C face between the compiled modules: sources hand payloads to a Sink, answers come back to a Settler.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    # Sink.offer_c: nothing was taken because the budget has no room; offer the same payload again later
    OFFER_STALLED = -1

cdef enum:
    # how a record ended; the order is part of the Python face (_codec.STORED ...)
    OUT_STORED = 0
    OUT_DEAD = 1
    OUT_FILTERED = 2
    OUT_DROPPED = 3
    OUT_FAILED = 4
    OUT_SPOOLED = 5  # durable on disk: who waits is told, but the record has not ended yet


cdef class Settler:
    # `count` records that carry `token` have ended. For OUT_STORED `answer` is the answer's body (bytes) and
    # `at` the offset of the record's entry in it (of the first one for a run), else None and -1; for
    # OUT_FAILED `answer` is the exception. Token 0 means nobody waits and is never passed here.
    cdef int settle(self, uint64_t token, uint32_t count, int outcome, object answer,
                    Py_ssize_t at) except -1


cdef class Sink:
    # Takes one payload. Returns how many settlements `token` will see (records taken plus rejects set aside;
    # 0 for an empty frame), or OFFER_STALLED. Never raises for bad data: what is bad is set aside as a
    # reject and settled later. Copies what it keeps. -2 with an exception set: a bug or no memory.
    cdef Py_ssize_t offer_c(self, const uint8_t* topic, size_t topic_len, const uint8_t* data,
                            size_t length, uint64_t token) except -2

# Sinks that are no batcher: what a payload can go to besides the codec.
#
# CallbackSink costs Python per message, so it is for taps and tests. CountSink is for benches: it shows what an intake
# costs when nobody does anything with a message.

@cython.final
cdef class CallbackSink(Sink):
    """A sink in Python: callback(topic, payload, token) says how many settlements will come.

    Topic and payload are bytes. -1 says that there is no room: the same payload is offered again by
    Session.resume(). The callback must not feed or resume the session that calls it.
    """
    cdef object _callback

    def __cinit__(self, callback):
        if not callable(callback):
            raise TypeError("CallbackSink needs a callable")
        self._callback = callback

    cdef Py_ssize_t offer_c(
        self, const uint8_t* topic, size_t topic_len, const uint8_t* data, size_t length,
        uint64_t token
    ) except -2:
        cdef Py_ssize_t count = self._callback(
            PyBytes_FromStringAndSize(<const char*> topic, <Py_ssize_t> topic_len),
            PyBytes_FromStringAndSize(<const char*> data, <Py_ssize_t> length),
            token,
        )
        if count < OFFER_STALLED:
            raise ValueError(f"the callback of a CallbackSink returned {count}")
        return count


@cython.final
cdef class CountSink(Sink):
    """Counts and lets go: measures an intake alone. With an AckTracker, messages wait for release()."""
    cdef readonly Py_ssize_t messages
    cdef readonly Py_ssize_t nbytes
    cdef AckTracker _acks
    cdef uint64_t* _tokens
    cdef size_t _count
    cdef size_t _room

    def __cinit__(self, AckTracker acks=None):
        self._acks = acks

    def __dealloc__(self):
        free(self._tokens)

    cdef Py_ssize_t offer_c(
        self, const uint8_t* topic, size_t topic_len, const uint8_t* data, size_t length,
        uint64_t token
    ) except -2:
        self.messages += 1
        self.nbytes += <Py_ssize_t> length
        if token == 0 or self._acks is None:
            return 0
        if self._count == self._room:
            self._more()
        self._tokens[self._count] = token
        self._count += 1
        return 1

    cdef int _more(self) except -1:
        cdef size_t room = self._room * 2 + 64
        cdef uint64_t* tokens = <uint64_t*> realloc(self._tokens, room * sizeof(uint64_t))
        if tokens == NULL:
            raise MemoryError
        self._tokens = tokens
        self._room = room
        return 0

    def release(self) -> None:
        """Settles every message taken since the last time, one by one and in order."""
        cdef size_t i
        for i in range(self._count):
            self._acks.settle(self._tokens[i], 1, OUT_STORED, None, -1)
        self._count = 0

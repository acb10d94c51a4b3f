# More ways into one batcher than its own. FormatSink takes payloads of another format. StraySink takes payloads whose
# format nobody knows, and sets them aside. So a pipeline with several formats still has one batch and one budget.

cdef enum:
    STRAY_BYTES = 256  # of a topic told in a reason


@cython.final
cdef class FormatSink(Sink):
    """The way into a batcher for payloads of one format, whatever the batcher's own is; `shape`: what their records
    become."""

    cdef Batcher batcher
    cdef PayloadFormat format
    cdef Shape shape

    def __cinit__(self, Batcher batcher not None, frame, Shape shape=None):
        self.batcher = batcher
        self.shape = shape
        self.format = format_of(frame)

    cdef Py_ssize_t offer_c(self, const uint8_t* topic, size_t topic_len, const uint8_t* data,
                            size_t length, uint64_t token) except -2:
        return self.batcher.offer_as(self.format, self.shape, topic, topic_len, data, length, token)

    def offer(self, bytes topic not None, payload, unsigned long long token) -> int:
        """As the C sink: how many settlements the token will see, -1 when there is no room."""
        return offer_bytes(self, topic, payload, token)


@cython.final
cdef class ExcludedSink(Sink):
    """Takes messages that are not wanted, whatever is in them: each counts as one record that was filtered."""

    cdef Batcher batcher

    def __cinit__(self, Batcher batcher not None):
        self.batcher = batcher

    cdef Py_ssize_t offer_c(self, const uint8_t* topic, size_t topic_len, const uint8_t* data,
                            size_t length, uint64_t token) except -2:
        self.batcher.accounting.received += 1
        self.batcher.accounting.ended[OUT_FILTERED] += 1
        return 0

    def offer(self, bytes topic not None, payload, unsigned long long token) -> int:
        """As the C sink."""
        return offer_bytes(self, topic, payload, token)


@cython.final
cdef class StraySink(Sink):
    """Sets payloads aside whose format nobody knows: each becomes a reject of the batcher."""

    cdef Batcher batcher
    cdef str filters

    def __cinit__(self, Batcher batcher not None, str filters not None):
        self.batcher = batcher
        self.filters = filters

    cdef Py_ssize_t offer_c(self, const uint8_t* topic, size_t topic_len, const uint8_t* data,
                            size_t length, uint64_t token) except -2:
        cdef size_t shown = topic_len if topic_len < STRAY_BYTES else STRAY_BYTES
        name = PyUnicode_DecodeUTF8(<const char*> topic, <Py_ssize_t> shown, "replace")
        reason = f"the topic {name!a} matches none of the filters {self.filters}: its format is not known"
        return self.batcher.refuse_whole(topic, topic_len, data, length, "topic", reason, 0, token)

    def offer(self, bytes topic not None, payload, unsigned long long token) -> int:
        """As the C sink."""
        return offer_bytes(self, topic, payload, token)


cdef Py_ssize_t offer_bytes(Sink sink, bytes topic, object payload, uint64_t token) except -2:
    cdef Bytes source
    bytes_open(payload, &source, "a payload")
    try:
        return sink.offer_c(<const uint8_t*> PyBytes_AS_STRING(topic), <size_t> PyBytes_GET_SIZE(topic),
                            source.p, source.length, token)
    finally:
        bytes_close(&source)

# Topic aliases of MQTT 5.0: numbers that stand for topics on one connection.
#
# The broker chooses them, so their topics have a bound in bytes: without one, 65,535 aliases of 64 KiB would be 4 GiB.

cdef enum:
    ALIAS_MOST = 1048576  # bytes of topics that aliases stand for

cdef struct Alias:
    uint8_t* topic
    size_t length


@cython.final
@cython.internal
cdef class Aliases:
    """Of one connection."""

    cdef int _maximum
    cdef Alias* _table  # by number; 0 is never used
    cdef size_t _bytes  # of all topics

    def __cinit__(self, int maximum):
        self._maximum = maximum
        self._table = <Alias*> calloc(<size_t> maximum + 1, sizeof(Alias))
        if self._table == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef int i
        if self._table != NULL:
            for i in range(self._maximum + 1):
                free(self._table[i].topic)
            free(self._table)

    cdef int resolve(self, Publish* message, size_t head, Fault* fault) noexcept:
        """The topic that an alias stands for."""
        cdef Alias* alias
        if message.alias > self._maximum:
            return fail(fault, "topic alias above what we allow", head, CODE_TOPIC_ALIAS)
        alias = &self._table[message.alias]
        if alias.topic == NULL:
            return fail(fault, "topic alias that was never set", head, CODE_TOPIC_ALIAS)
        message.topic = alias.topic
        message.topic_len = alias.length
        return 0

    cdef int keep(self, Publish* message, size_t head, Fault* fault) except -2:
        """Keeps the topic of an alias and clears message.alias."""
        cdef Alias* alias
        cdef uint8_t* copy
        if message.alias > self._maximum:
            return fail(fault, "topic alias above what we allow", head, CODE_TOPIC_ALIAS)
        alias = &self._table[message.alias]
        if message.topic_len > alias.length:
            if message.topic_len - alias.length > ALIAS_MOST - self._bytes:
                return fail(fault, "the topics of all aliases are more than 1 MiB", head,
                            CODE_QUOTA)
        copy = <uint8_t*> realloc(alias.topic, message.topic_len)
        if copy == NULL:
            raise MemoryError
        memcpy(copy, message.topic, message.topic_len)
        self._bytes += message.topic_len - alias.length
        alias.topic = copy
        alias.length = message.topic_len
        message.alias = 0
        return 0

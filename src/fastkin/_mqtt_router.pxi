# Topic filters to sinks.
#
# Topics come from outside and may be any number: what is remembered of them sits in a table of
# fixed width, four ways to a set, replaced in turn, so that neither count nor search nor bytes can
# be driven up.

cdef enum:
    WAYS = 4
    TOPIC_MOST = 1024           # a longer topic is matched anew each time
    CACHE_BYTES_PER_TOPIC = 128  # over the whole table, on the average

cdef struct Route:
    uint64_t hash
    size_t topic_len
    size_t count
    # then `count` pointers to sinks, then the topic

cdef struct Pattern:
    const uint8_t* at
    size_t length
    size_t sink


cdef inline PyObject** route_sinks(Route* route) noexcept nogil:
    return <PyObject**> (route + 1)


cdef inline uint8_t* route_topic(Route* route) noexcept nogil:
    return <uint8_t*> (route_sinks(route) + route.count)


cdef inline size_t route_size(size_t count, size_t topic_len) noexcept nogil:
    return sizeof(Route) + count * sizeof(PyObject*) + topic_len


cdef inline uint64_t topic_hash(const uint8_t* p, size_t n) noexcept nogil:
    """Quality is enough for a table whose sets cannot grow; eight bytes a step."""
    cdef uint64_t prime = <uint64_t> 0x9E3779B97F4A7C15
    cdef uint64_t h = n * prime
    while n >= 8:
        h = (h ^ load8(p)) * prime
        h ^= h >> 29
        p += 8
        n -= 8
    while n > 0:
        h = (h ^ p[0]) * prime
        p += 1
        n -= 1
    return h ^ (h >> 32)


@cython.final
@cython.no_gc_clear  # routes point at sinks that _sinks keeps alive
cdef class Router:
    """Which sinks take a topic. Every sink whose filter matches gets the message, each once."""

    cdef list _filters            # bytes, kept for the pointers in _patterns
    cdef list _sinks              # distinct, in the order they came
    cdef Pattern* _patterns
    cdef size_t _pattern_count
    cdef PyObject** _scratch      # as many as there are sinks
    cdef uint8_t* _taken          # the same
    cdef size_t _sink_count
    cdef Route** _table           # sets of WAYS
    cdef uint8_t* _turn           # per set: which way goes next
    cdef uint64_t _set_mask
    cdef size_t _cached_most
    cdef PyObject* _all           # the only sink there is, and one of its filters is "#"
    # messages that no filter took
    cdef readonly Py_ssize_t unrouted
    # topics remembered, and the bytes that takes
    cdef readonly Py_ssize_t cached
    cdef readonly size_t cached_bytes

    def __cinit__(self, int max_topics=8192):
        cdef size_t sets = 1
        if max_topics < 0:
            raise LibraryError(f"max_topics {max_topics} is negative")
        self._filters = []
        self._sinks = []
        while sets * WAYS * 2 <= <size_t> max_topics and sets < (1 << 20):
            sets *= 2
        self._set_mask = sets - 1
        self._cached_most = sets * WAYS * CACHE_BYTES_PER_TOPIC if max_topics >= WAYS else 0
        self._table = <Route**> calloc(sets * WAYS, sizeof(Route*))
        self._turn = <uint8_t*> calloc(sets, 1)
        if self._table == NULL or self._turn == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self._table != NULL:
            self._forget()
        free(self._table)
        free(self._turn)
        free(self._patterns)
        free(self._scratch)
        free(self._taken)

    def add(self, str topic_filter not None, Sink sink not None) -> None:
        """Messages whose topic the filter takes go to the sink too; `$share/group/` is left out."""
        cdef bytes encoded = checked_filter(topic_filter)
        cdef Pattern* patterns
        cdef PyObject** scratch
        cdef uint8_t* taken
        cdef size_t index = 0
        cdef size_t sinks = self._sink_count
        while index < sinks and (<Sink> self._sinks[index]) is not sink:
            index += 1
        patterns = <Pattern*> realloc(self._patterns, (self._pattern_count + 1) * sizeof(Pattern))
        if patterns == NULL:
            raise MemoryError
        self._patterns = patterns
        if index == sinks:
            scratch = <PyObject**> realloc(self._scratch, (sinks + 1) * sizeof(PyObject*))
            if scratch == NULL:
                raise MemoryError
            self._scratch = scratch
            taken = <uint8_t*> realloc(self._taken, sinks + 1)
            if taken == NULL:
                raise MemoryError
            self._taken = taken
            self._sinks.append(sink)
            self._sink_count = sinks + 1
        self._filters.append(encoded)
        patterns[self._pattern_count].at = <const uint8_t*> PyBytes_AS_STRING(encoded)
        patterns[self._pattern_count].length = <size_t> len(encoded)
        patterns[self._pattern_count].sink = index
        self._pattern_count += 1
        self._all = NULL
        if self._sink_count == 1 and b"#" in self._filters:
            self._all = <PyObject*> sink
        self._forget()

    def match(self, str topic not None) -> list[Sink]:
        """The sinks of a topic."""
        cdef bytes name = checked_topic(topic)
        cdef size_t count = self._match(<const uint8_t*> PyBytes_AS_STRING(name),
                                        <size_t> len(name))
        cdef list sinks = []
        cdef size_t i
        for i in range(count):
            sinks.append(<object> self._scratch[i])
        return sinks

    cdef size_t _match(self, const uint8_t* topic, size_t n) noexcept:
        """Writes the sinks of a valid topic to _scratch, in the order the sinks were added."""
        cdef size_t i
        cdef size_t count = 0
        cdef Pattern* pattern
        if self._sink_count == 0:
            return 0
        memset(self._taken, 0, self._sink_count)
        for i in range(self._pattern_count):
            pattern = &self._patterns[i]
            if not self._taken[pattern.sink]:
                if filter_matches(pattern.at, pattern.length, topic, n):
                    self._taken[pattern.sink] = 1
        for i in range(self._sink_count):
            if self._taken[i]:
                self._scratch[count] = <PyObject*> self._sinks[i]
                count += 1
        return count

    cdef inline Py_ssize_t find(self, const uint8_t* topic, size_t n, PyObject*** sinks) noexcept:
        """How many sinks the topic has, and where they are until the next call; or -1 - TEXT_..."""
        cdef uint64_t h
        cdef Route** ways
        cdef Route* route
        cdef size_t way
        cdef int status
        if self._all != NULL:
            status = check_text(topic, n, True)
            if status != TEXT_OK:
                return -1 - status
            sinks[0] = &self._all
            return 0 if n and topic[0] == 0x24 else 1
        h = topic_hash(topic, n)
        ways = self._table + (h & self._set_mask) * WAYS
        for way in range(<size_t> WAYS):
            route = ways[way]
            if route != NULL and route.hash == h and route.topic_len == n:
                if memcmp(route_topic(route), topic, n) == 0:
                    sinks[0] = route_sinks(route)
                    return <Py_ssize_t> route.count
        return self._find_anew(topic, n, h, sinks)

    cdef Py_ssize_t _find_anew(
        self, const uint8_t* topic, size_t n, uint64_t h, PyObject*** sinks
    ) noexcept:
        cdef int status = check_text(topic, n, True)
        cdef size_t count
        if status != TEXT_OK:
            return -1 - status
        count = self._match(topic, n)
        sinks[0] = self._scratch
        if n <= TOPIC_MOST:
            self._remember(topic, n, h, count)
        return <Py_ssize_t> count

    cdef void _remember(self, const uint8_t* topic, size_t n, uint64_t h, size_t count) noexcept:
        cdef size_t size = route_size(count, n)
        cdef Route* route
        cdef Route** place
        if size > self._cached_most:
            return
        if self.cached_bytes + size > self._cached_most:
            self._forget()
        route = <Route*> malloc(size)
        if route == NULL:
            return
        route.hash = h
        route.topic_len = n
        route.count = count
        if count:
            memcpy(route_sinks(route), self._scratch, count * sizeof(PyObject*))
        memcpy(route_topic(route), topic, n)
        place = self._table + (h & self._set_mask) * WAYS + self._turn[h & self._set_mask]
        self._turn[h & self._set_mask] = (self._turn[h & self._set_mask] + 1) % WAYS
        self._drop(place)
        place[0] = route
        self.cached_bytes += size
        self.cached += 1

    cdef inline void _drop(self, Route** place) noexcept:
        cdef Route* route = place[0]
        if route != NULL:
            self.cached_bytes -= route_size(route.count, route.topic_len)
            self.cached -= 1
            free(route)
            place[0] = NULL

    cdef void _forget(self) noexcept:
        cdef size_t i
        if self.cached_bytes == 0:
            return
        for i in range((self._set_mask + 1) * WAYS):
            self._drop(self._table + i)

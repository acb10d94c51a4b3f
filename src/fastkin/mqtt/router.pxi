# Which sink a message goes to.
#
# What a broker delivers on a connection is that pipeline's. The broker has matched it by rules of its own: it may
# rewrite topics, take "#" for $SYS, or give a prefix like $queue/ a meaning. So with one sink everything goes there,
# and no topic is looked at. With several sinks the Subscription Identifier says which one; without an identifier the
# first filter that matches does. A message that neither of them explains goes to the sink `otherwise`. A message is
# discarded in one case only: it matches nothing but a filter that was removed, in a session that the broker kept.
#
# Topics come from outside, and there may be any number of them. What is remembered of them sits in a table of fixed
# width, four ways to a set, replaced in turn. So no stranger can make it grow, or a search in it slow.

cdef enum:
    WAYS = 4
    TOPIC_MOST = 1024           # a longer topic is matched anew each time
    CACHE_BYTES_PER_TOPIC = 128  # over the whole table, on the average
    UNROUTED_MOST = 256         # bytes kept of a topic that is told in the log

cdef enum:
    # what matching says besides a sink's index
    MATCH_NONE = -1
    MATCH_FORMER = -2

cdef enum:
    # patterns are tried in this order
    RANK_PLAIN = 0   # the filter, and what it is without a prefix that many brokers know
    RANK_PREFIX = 1  # without one or two levels of a prefix `$...` that some broker may know
    RANK_FORMER = 2
    RANKS = 3

cdef struct Route:
    uint64_t hash
    size_t topic_len
    Py_ssize_t found
    # then the topic

cdef struct Pattern:
    const uint8_t* at
    size_t length
    Py_ssize_t found
    int rank

cdef struct Identified:
    uint32_t number
    Py_ssize_t found


cdef inline uint8_t* route_topic(Route* route) noexcept nogil:
    return <uint8_t*> (route + 1)


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


# Brokers strip prefixes of their own before they deliver: a message that came by `$queue/a` has the topic `a`.
cdef list filter_forms(bytes encoded):
    """(rank, pattern) of what a filter may stand for; `$share/group/` is off."""
    cdef list forms = [(RANK_PLAIN, encoded)]
    cdef bytes rest = encoded
    for prefix in (b"$queue/", b"$exclusive/"):
        if encoded.startswith(prefix) and len(encoded) > len(prefix):
            forms.append((RANK_PLAIN, encoded[len(prefix):]))
    if encoded.startswith(b"$"):
        for _ in range(2):
            rest = rest.partition(b"/")[2]
            if rest:
                forms.append((RANK_PREFIX, rest))
    return forms


@cython.final
@cython.no_gc_clear  # a session points at a sink while it is offered
cdef class Router:
    """Which sink takes a message."""

    cdef list _kept               # bytes, for the pointers in _patterns
    cdef list _sinks              # distinct, in the order they came
    cdef PyObject* _one           # the only sink there is
    cdef PyObject* _otherwise
    cdef Pattern* _patterns
    cdef size_t _pattern_count
    cdef Identified* _identified
    cdef size_t _identified_count
    cdef list _former             # filters that were removed
    cdef Route** _table           # sets of WAYS
    cdef uint8_t* _turn           # per set: which way goes next
    cdef uint64_t _set_mask
    cdef size_t _cached_most
    cdef uint8_t[UNROUTED_MOST] _stray
    cdef size_t _stray_len
    # messages that nobody took
    cdef readonly Py_ssize_t unrouted
    # topics remembered, and the bytes that takes
    cdef readonly Py_ssize_t cached
    cdef readonly size_t cached_bytes

    def __cinit__(self, int max_topics=8192):
        cdef size_t sets = 1
        if max_topics < 0:
            raise LibraryError(f"max_topics {max_topics} is negative")
        self._kept = []
        self._sinks = []
        self._former = []
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
        free(self._identified)

    # -- what is set up

    cdef Py_ssize_t _index(self, Sink sink) except -1:
        cdef Py_ssize_t index
        for index in range(len(self._sinks)):
            if (<Sink> self._sinks[index]) is sink:
                return index
        self._sinks.append(sink)
        self._one = <PyObject*> sink if len(self._sinks) == 1 else NULL
        return len(self._sinks) - 1

    cdef int _pattern(self, bytes encoded, Py_ssize_t found, int rank) except -1:
        cdef Pattern* patterns = <Pattern*> realloc(
            self._patterns, (self._pattern_count + 1) * sizeof(Pattern))
        if patterns == NULL:
            raise MemoryError
        self._patterns = patterns
        self._kept.append(encoded)
        patterns[self._pattern_count].at = <const uint8_t*> PyBytes_AS_STRING(encoded)
        patterns[self._pattern_count].length = <size_t> len(encoded)
        patterns[self._pattern_count].found = found
        patterns[self._pattern_count].rank = rank
        self._pattern_count += 1
        return 0

    def add(self, str topic_filter not None, Sink sink not None, uint32_t identifier=0) -> None:
        """A filter of a sink. With several sinks the first filter that matches decides, unless the broker
        says the Subscription Identifier: `identifier`, when not 0, is the sink's."""
        cdef bytes encoded = checked_filter(topic_filter)
        cdef Identified* identified
        cdef Py_ssize_t index
        if identifier > MAX_REMAINING:
            raise LibraryError(f"subscription identifier {identifier} is not in 1..{MAX_REMAINING}")
        index = self._index(sink)
        for rank, form in filter_forms(encoded):
            self._pattern(form, index, rank)
        if identifier:
            identified = <Identified*> realloc(
                self._identified, (self._identified_count + 1) * sizeof(Identified))
            if identified == NULL:
                raise MemoryError
            self._identified = identified
            identified[self._identified_count].number = identifier
            identified[self._identified_count].found = index
            self._identified_count += 1
        self._forget()

    def remove(self, str topic_filter not None) -> None:
        """A filter that a kept session may still have, and that nobody wants: in such a session what
        matches it, and no filter of a sink, is discarded."""
        cdef bytes encoded = checked_filter(topic_filter)
        self._former.append(topic_filter)
        for rank, form in filter_forms(encoded):
            if rank == RANK_PLAIN:
                self._pattern(form, MATCH_FORMER, RANK_FORMER)
        self._forget()

    @property
    def otherwise(self) -> Sink | None:
        """Takes what no identifier and no filter tells; None: the first sink does."""
        return None if self._otherwise == NULL else <object> self._otherwise

    @otherwise.setter
    def otherwise(self, Sink sink):
        self._otherwise = <PyObject*> sink if sink is not None else NULL
        self._kept.append(sink)

    @property
    def former(self) -> list[str]:
        """The filters that were removed."""
        return list(self._former)

    @property
    def stray(self) -> bytes:
        """The topic of the last message that nobody took, cut."""
        return self._stray[:self._stray_len]

    def match(self, str topic not None, identifiers=(), bint resumed=False) -> list[Sink]:
        """The sink of a message, as Session finds it, or none. `identifiers`: the Subscription Identifiers
        it carries; `resumed`: the broker kept the session."""
        cdef bytes name = checked_topic(topic)
        cdef uint32_t number = 0
        cdef PyObject* sink
        if len(identifiers) == 1:
            number = identifiers[0]
        sink = self.find(<const uint8_t*> PyBytes_AS_STRING(name), <size_t> len(name), number, resumed)
        return [] if sink == NULL else [<object> sink]

    # -- what a session asks

    cdef inline bint wants_identifiers(self) noexcept:
        return self._one == NULL and self._identified_count > 0

    cdef inline PyObject* find(
        self, const uint8_t* topic, size_t n, uint32_t identifier, bint resumed
    ) noexcept:
        """The sink of a message with a valid topic; `identifier`: the only one it has, else 0."""
        # The plain case, and the fast one: one sink takes all, and no topic is looked at.
        if self._one != NULL and not (resumed and self._former):
            return self._one
        return self._find_among(topic, n, identifier, resumed)

    cdef PyObject* _find_among(
        self, const uint8_t* topic, size_t n, uint32_t identifier, bint resumed
    ) noexcept:
        cdef Py_ssize_t found = MATCH_NONE
        cdef size_t i
        if not self._sinks:
            return NULL
        if resumed and self._former:
            found = self._recall(topic, n)
            if found == MATCH_FORMER:
                return NULL
        if self._one != NULL:
            return self._one
        if identifier:
            # A pipeline has a handful of formats: a table would cost more than the loop.
            for i in range(self._identified_count):
                if self._identified[i].number == identifier:
                    return <PyObject*> self._sinks[self._identified[i].found]
        if found == MATCH_NONE:
            found = self._recall(topic, n)
        if found >= 0:
            return <PyObject*> self._sinks[found]
        return self._otherwise if self._otherwise != NULL else <PyObject*> self._sinks[0]

    cdef void nobody(self, const uint8_t* topic, size_t n) noexcept:
        """A message that nobody takes."""
        self.unrouted += 1
        self._stray_len = n if n < UNROUTED_MOST else UNROUTED_MOST
        memcpy(self._stray, topic, self._stray_len)

    cdef Py_ssize_t _match(self, const uint8_t* topic, size_t n) noexcept nogil:
        """The index of a sink, MATCH_FORMER or MATCH_NONE."""
        cdef size_t i
        cdef int rank
        cdef Pattern* pattern
        for rank in range(RANKS):
            for i in range(self._pattern_count):
                pattern = &self._patterns[i]
                if pattern.rank == rank:
                    if filter_matches(pattern.at, pattern.length, topic, n):
                        return pattern.found
        return MATCH_NONE

    # Brokers send the same few topics again and again. To match each message against every filter would cost more
    # than to take its records.
    cdef Py_ssize_t _recall(self, const uint8_t* topic, size_t n) noexcept:
        cdef uint64_t h = topic_hash(topic, n)
        cdef Route** ways = self._table + (h & self._set_mask) * WAYS
        cdef Route* route
        cdef size_t way
        cdef Py_ssize_t found
        for way in range(<size_t> WAYS):
            route = ways[way]
            if route != NULL and route.hash == h and route.topic_len == n:
                if memcmp(route_topic(route), topic, n) == 0:
                    return route.found
        found = self._match(topic, n)
        if n <= TOPIC_MOST:
            self._remember(topic, n, h, found)
        return found

    cdef void _remember(self, const uint8_t* topic, size_t n, uint64_t h, Py_ssize_t found) noexcept:
        cdef size_t size = sizeof(Route) + n
        cdef Route* route
        cdef Route** place
        if size > self._cached_most:
            return
        # All at once: no order has to be kept for the sake of a table that is full once in a long while.
        if self.cached_bytes + size > self._cached_most:
            self._forget()
        route = <Route*> malloc(size)
        if route == NULL:
            return
        route.hash = h
        route.topic_len = n
        route.found = found
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
            self.cached_bytes -= sizeof(Route) + route.topic_len
            self.cached -= 1
            free(route)
            place[0] = NULL

    cdef void _forget(self) noexcept:
        cdef size_t i
        if self.cached_bytes == 0:
            return
        for i in range((self._set_mask + 1) * WAYS):
            self._drop(self._table + i)

# Which PUBLISH still waits for which records, and whether a PUBLISH that comes is one that we know already.
#
# A message has a slot in a pool. Its token is a serial number, never given twice, with the slot's index in the low
# bits. A slot may be freed, or hold another message by now: the serial tells, and settling the old token does nothing.
# The order of this connection is a ring of indexes: first..done-1 have ended and wait for take(), done..next-1 wait
# for records.
#
# Packet identifiers are the broker's, and may be used again for another message: after a broken PUBREL, by a broker
# restored from an older save, by one that has more under way than there are identifiers. So an identifier alone says
# nothing. A message is known here only if it says DUP, the identifier's newest holder has the same digest of topic
# and payload, the same QoS and the same kind, and the session is the same. All else is new.
#
# Without DUP the broker says that it sends a message for the first time. The same bytes are then another message (a
# switch says "on" again), and its record would be missing if we took it for the old one. To take it as new may store
# twice, and never loses.
#
# Over a reconnect a message stays known when its acknowledgement was never written: the broker cannot have given its
# identifier to another meanwhile. A PUBACK that was written may have come, and the identifier may be another message's
# by now. So what comes then is taken as new.

cdef enum:
    SLOT_OPEN = 1      # the sink is still being asked: settlements may come before hold()
    SLOT_FAILED = 2    # a record failed for good: never acknowledged, and nothing after it
    SLOT_ORDERED = 4   # in the ring: of this connection, not acknowledged
    SLOT_RECEIVED = 8  # QoS 2: PUBREC was given out, its PUBREL has not come
    SLOT_RELEASED = 16  # QoS 2: PUBREL came before our PUBREC, which must not mark the identifier
    SLOT_APART = 32    # no record: set aside as it came
    SLOT_PART = 64     # its digest is of its beginning and its length only
    SLOT_KIND = SLOT_APART | SLOT_PART

cdef enum:
    POOL_START = 256
    INDEX_BITS = 17
    # Reading pauses at this many unacknowledged messages: fewer than there are packet identifiers, with a
    # margin for what QoS 2 has under way. With them the pool holds one per identifier at most: 17 bits.
    HELD_MOST = 60000
    POOL_CALM = 64  # takes in a row that would do with a quarter before ring and pool shrink
    NOWHERE = 0xFFFFFFFF  # the end of the list of free slots

cdef enum:
    BEGUN_KNOWN = 0  # it came before and is here: answered when its turn comes
    BEGUN_NEW = 1

cdef extern from "mqtt/digest.h" nogil:
    int fk_digest_init() noexcept
    void fk_digest(const uint8_t* topic, size_t topic_length, const uint8_t* payload,
                   size_t payload_length, uint64_t* out) noexcept

# One message that is not acknowledged, or that may come again. 56 bytes: 60,000 of them are 3.4 MB.
cdef struct Slot:
    uint64_t token    # 0: free
    int64_t pending   # signed: a sink may settle before it says how many there are
    double taken_at
    uint64_t[2] digest
    uint32_t free_next
    uint16_t packet_id
    uint8_t qos
    uint8_t flags


if fk_digest_init() != 0:
    raise OSError("the system gives no random bytes")


@cython.final
cdef class AckTracker(Settler):
    """Acknowledges a message when every record made from it has ended, in PUBLISH order only."""

    cdef Slot* _pool
    cdef uint32_t _size
    cdef uint32_t _free
    cdef uint32_t _live
    cdef uint64_t _serial
    # 1 + the slot of an identifier's newest holder
    cdef uint32_t* _newest
    cdef uint32_t* _ring
    cdef uint64_t _mask
    cdef uint64_t _first
    cdef uint64_t _done
    cdef uint64_t _next
    cdef uint32_t _peak  # most slots in use since the last shrink
    cdef int _calm
    cdef bint _moved_on  # a message without DUP came: the broker has sent again what it would
    # records of messages that came with the DUP flag and were not known, ever: earlier copies of
    # them may be stored
    cdef readonly Py_ssize_t repeated
    # messages of this connection with a record that failed for good
    cdef readonly Py_ssize_t failed

    def __cinit__(self):
        self._newest = <uint32_t*> calloc(65536, sizeof(uint32_t))
        self._ring = <uint32_t*> malloc(POOL_START * sizeof(uint32_t))
        if self._newest == NULL or self._ring == NULL:
            raise MemoryError
        self._mask = POOL_START - 1
        self._free = NOWHERE
        self._grow(POOL_START)

    def __dealloc__(self):
        free(self._pool)
        free(self._newest)
        free(self._ring)

    # -- the pool and the ring

    cdef int _grow(self, uint32_t size) except -1:
        cdef Slot* pool = <Slot*> realloc(self._pool, size * sizeof(Slot))
        cdef uint32_t before = self._size
        if pool == NULL:
            raise MemoryError
        memset(pool + before, 0, (size - before) * sizeof(Slot))
        self._pool = pool
        self._size = size
        self._list_free()
        return 0

    cdef void _list_free(self) noexcept:
        """The free slots in order, the lowest first: what is high falls out of use."""
        cdef uint32_t index = self._size
        self._free = NOWHERE
        while index > 0:
            index -= 1
            if self._pool[index].token == 0:
                self._pool[index].free_next = self._free
                self._free = index

    cdef inline void _let_go(self, uint32_t index) noexcept:
        cdef Slot* slot = &self._pool[index]
        if self._newest[slot.packet_id] == index + 1:
            self._newest[slot.packet_id] = 0
        slot.token = 0
        slot.free_next = self._free
        self._free = index
        self._live -= 1

    cdef bint _resize_ring(self, uint64_t size) noexcept:
        cdef uint32_t* ring = <uint32_t*> malloc(<size_t> size * sizeof(uint32_t))
        cdef uint64_t at
        if ring == NULL:
            return False
        for at in range(self._first, self._next):
            ring[at & (size - 1)] = self._ring[at & self._mask]
        free(self._ring)
        self._ring = ring
        self._mask = size - 1
        return True

    cdef inline int _enter(self, uint32_t index) except -1:
        """The last place in this connection's order."""
        if self._next - self._first > self._mask and not self._resize_ring((self._mask + 1) * 2):
            raise MemoryError
        self._ring[self._next & self._mask] = index
        self._next += 1
        self._pool[index].flags |= SLOT_ORDERED
        return 0

    # This is what makes a late settlement harmless: the index finds the slot in one step, the serial proves whose it
    # is.
    cdef inline Slot* _slot(self, uint64_t token) noexcept:
        """NULL for a token whose message is acknowledged, or was given up."""
        cdef uint64_t index = token & ((1 << INDEX_BITS) - 1)
        if index >= self._size or self._pool[index].token != token:
            return NULL
        return &self._pool[index]

    # -- what the session calls

    cdef inline bint full(self) noexcept:
        return self._next - self._first >= HELD_MOST

    cdef inline int begin(
        self, const Publish* message, bint again, double taken_at, uint64_t* token
    ) except -1:
        """BEGUN_NEW with a token for a message to be offered, or BEGUN_KNOWN. Ask full() first."""
        cdef uint64_t[2] digest
        fk_digest(message.topic, message.topic_len, message.payload, message.payload_len, digest)
        return self._begin(digest, message.packet_id, message.qos, again, taken_at, 0, token)

    cdef int begin_apart(
        self, const uint8_t* body, size_t have, size_t rest, uint16_t packet_id, int qos, bint again,
        double taken_at, uint64_t* token
    ) except -1:
        """The same for what can never be a record: the digest is of `have` of its `rest` bytes.

        When that is not all, it tells it from others on this connection only.
        """
        cdef uint64_t[2] digest
        cdef uint8_t flags = SLOT_APART
        fk_digest(body, have, <const uint8_t*> &rest, sizeof(size_t), digest)
        if have < rest:
            flags |= SLOT_PART
        return self._begin(digest, packet_id, <uint8_t> qos, again, taken_at, flags, token)

    cdef inline int _begin(
        self, const uint64_t* digest, uint16_t packet_id, uint8_t qos, bint again, double taken_at,
        uint8_t kind, uint64_t* token
    ) except -1:
        cdef uint32_t index = self._newest[packet_id]
        cdef Slot* slot
        if index != 0:
            slot = &self._pool[index - 1]
            if (again and slot.digest[0] == digest[0] and slot.digest[1] == digest[1]
                    and slot.qos == qos and slot.flags & SLOT_KIND == kind):
                self._comes_again(index - 1)
                return BEGUN_KNOWN
            if slot.flags & SLOT_ORDERED == 0:
                self._let_go(index - 1)
        if self._free == NOWHERE:
            self._grow(self._size * 2)
        index = self._free
        self._enter(index)
        slot = &self._pool[index]
        self._free = slot.free_next
        self._live += 1
        self._serial += 1
        slot.token = token[0] = self._serial << INDEX_BITS | index
        slot.pending = 0
        slot.taken_at = taken_at
        slot.digest[0] = digest[0]
        slot.digest[1] = digest[1]
        slot.packet_id = packet_id
        slot.qos = qos
        slot.flags = kind | SLOT_OPEN | SLOT_ORDERED
        self._newest[packet_id] = index + 1
        if not again:
            self._moved_on = True
        return BEGUN_NEW

    cdef int _comes_again(self, uint32_t index) except -1:
        """On this connection: the acknowledgement that is to come answers this one too, for a second would
        answer what has the identifier by then. [MQTT-4.3.2-2] Else it takes its place in the new order."""
        if self._pool[index].flags & SLOT_ORDERED == 0:
            self._enter(index)
            self._advance()
        return 0

    cdef inline void hold(self, uint64_t token, int64_t count) noexcept:
        """The sink took the message as `count` records, of which some may have ended already; 0: none."""
        cdef Slot* slot = self._slot(token)
        if slot == NULL:
            return
        slot.pending += count
        slot.flags &= ~<uint8_t> SLOT_OPEN
        if slot.pending == 0:
            self._advance()

    # PUBLISH order is kept here. The standard wants PUBACK and PUBREC in the order in which the PUBLISHes came
    # [MQTT-4.6.0-2, MQTT-4.6.0-3], and Kinesis finishes in any order. So the first slot that waits holds back all
    # behind it, also those whose records are stored already. A slot that failed holds them back until the connection
    # ends and the broker sends it again.
    cdef inline void _advance(self) noexcept:
        cdef Slot* slot
        while self._done < self._next:
            slot = &self._pool[self._ring[self._done & self._mask]]
            if slot.pending != 0 or slot.flags & (SLOT_OPEN | SLOT_FAILED):
                return
            self._done += 1

    cdef bint release(self, uint16_t packet_id) noexcept:
        """PUBREL: forget the identifier. False when it was not known."""
        cdef uint32_t index = self._newest[packet_id]
        cdef Slot* slot
        if index == 0 or self._pool[index - 1].qos != 2:
            return False
        slot = &self._pool[index - 1]
        if slot.flags & SLOT_ORDERED:  # before our PUBREC, or while a repetition waits for another
            slot.flags |= SLOT_RELEASED
            self._newest[packet_id] = 0
        elif slot.flags & SLOT_RECEIVED:
            self._let_go(index - 1)
            return True
        return slot.flags & SLOT_RECEIVED != 0

    # Runs behind reset(): no slot is in the order of the connection, so every one of them goes.
    cdef void forget_session(self) noexcept:
        """The broker has no session: it will use the identifiers anew."""
        cdef uint32_t index
        for index in range(self._size):
            if self._pool[index].token != 0 and self._pool[index].flags & SLOT_ORDERED == 0:
                self._let_go(index)

    # -- what the record side calls

    cdef int settle(
        self, uint64_t token, uint32_t count, int outcome, object answer, Py_ssize_t at
    ) except -1:
        cdef Slot* slot = self._slot(token)
        if slot == NULL:
            # An old token is expected: its message was given up. One that was never given out is a bug, and must
            # show.
            if token >> INDEX_BITS > self._serial:
                raise RuntimeError(f"token {token} was never given out")
            return 0
        slot.pending -= count
        if slot.pending < 0 and slot.flags & SLOT_OPEN == 0:
            slot.pending += count
            raise RuntimeError(f"token {token} is settled more often than it was held")
        if outcome == OUT_FAILED:
            if slot.flags & SLOT_ORDERED == 0:
                self._let_go(<uint32_t> (slot - self._pool))  # taken anew when it comes again
            elif slot.flags & SLOT_FAILED == 0:
                slot.flags |= SLOT_FAILED
                self.failed += 1
        elif slot.pending == 0:
            self._advance()
        return 0

    # -- Python face

    def settled(self, uint64_t token, uint32_t count=1, int outcome=OUT_STORED) -> None:
        """Says from Python that `count` records of `token` have ended: for a CallbackSink."""
        if token and count:
            self.settle(token, count, outcome, None, -1)

    @property
    def unacked(self) -> int:
        """QoS 1 and 2 messages received on this connection and not acknowledged."""
        return self._next - self._first

    @property
    def ready(self) -> int:
        """How many of these take() would acknowledge now."""
        return self._done - self._first

    @property
    def known(self) -> int:
        """Messages remembered: unacknowledged, of a former connection, or waiting for their PUBREL."""
        return self._live

    def oldest(self) -> float:
        """Session.now of when the oldest unacknowledged message came; 0.0 when there is none."""
        if self._first == self._next:
            return 0.0
        return self._pool[self._ring[self._first & self._mask]].taken_at

    def take(self) -> bytes:
        """PUBACK and PUBREC of the completed prefix, one run of packets of 4 bytes."""
        cdef uint64_t count = self._done - self._first
        cdef uint64_t at
        cdef uint32_t index
        cdef Slot* slot
        cdef bytes out
        cdef uint8_t* p
        if count == 0:
            return b""
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> (4 * count))
        p = <uint8_t*> PyBytes_AS_STRING(out)
        # Here and not in begin(): once per run of acknowledgements is often enough, and costs no message anything.
        self._settle_size()
        for at in range(self._first, self._done):
            index = self._ring[at & self._mask]
            slot = &self._pool[index]
            p[0] = 0x40
            p[1] = 2
            p[2] = <uint8_t> (slot.packet_id >> 8)
            p[3] = <uint8_t> (slot.packet_id & 0xFF)
            if slot.qos == 2:
                p[0] = 0x50
            if slot.qos == 2 and self._newest[slot.packet_id] == index + 1:
                slot.flags = SLOT_RECEIVED | (slot.flags & SLOT_KIND)
            else:
                self._let_go(index)
            p += 4
        self._first = self._done
        return out

    cdef void _settle_size(self) noexcept:
        """Remembers the peak, and shrinks ring and pool when they have long been far too large."""
        if self._live > self._peak:
            self._peak = self._live
        self._calm += 1
        if self._calm < POOL_CALM:
            return
        if self._mask >= POOL_START and <uint64_t> self._peak * 4 <= self._mask + 1:
            self._resize_ring((self._mask + 1) // 2)
        if self._size > POOL_START and self._peak * 4 <= self._size:
            self._shrink_pool()
        self._calm = 0
        self._peak = 0

    cdef void _shrink_pool(self) noexcept:
        cdef uint32_t half = self._size // 2
        cdef uint32_t index
        cdef Slot* pool
        for index in range(half, self._size):
            if self._pool[index].token != 0:  # its token has the index: it cannot move
                self._list_free()
                return
        pool = <Slot*> realloc(self._pool, half * sizeof(Slot))
        if pool != NULL:
            self._pool = pool
            self._size = half
        self._list_free()

    # Called before the new connection exists, so that no acknowledgement can be given out between the two.
    def reset(self, bint keep_session) -> None:
        """A new connection: nothing of before is acknowledged until the broker sends it again.

        With keep_session what was not acknowledged stays known, to be recognised when it comes again; a
        Session forgets it when the CONNACK says that the broker has no session.
        """
        cdef uint32_t index
        cdef uint32_t drop
        cdef Slot* slot
        for index in range(self._size):
            slot = &self._pool[index]
            if slot.token == 0:
                continue
            if slot.flags & SLOT_ORDERED:
                # what is open no sink has taken; what has failed is to be taken anew
                drop = slot.flags & (SLOT_OPEN | SLOT_FAILED | SLOT_RELEASED | SLOT_PART)
                if self._newest[slot.packet_id] != index + 1:
                    drop = 1
            else:
                # a broker sends again what it has before what is new: this it has no more
                drop = self._moved_on and slot.flags & SLOT_RECEIVED == 0
                drop |= slot.flags & SLOT_PART
            slot.flags &= ~<uint8_t> SLOT_ORDERED
            if drop or not keep_session:
                self._let_go(index)
        self._first = self._done = self._next
        self._moved_on = False
        self.failed = 0

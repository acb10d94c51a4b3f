# Which PUBLISH still waits for which records.
#
# Tokens are a sequence that never restarts. The ring holds the tokens first..next-1 at token &
# mask; first..done-1 have ended and wait for take(). A token below `first` is stale: its message is
# acknowledged, or belongs to a former connection; settling it does nothing.

cdef enum:
    SLOT_OPEN = 1    # sinks are still being asked: settlements may come before hold()
    SLOT_FAILED = 2  # a record failed for good: never acknowledged, and nothing after it
    SLOT_ANSWER = 4  # a repeated QoS 2 PUBLISH whose records are stored: only answered

cdef enum:
    RING_START = 256
    # as many as there are packet identifiers: only a broken broker has more unacknowledged
    RING_MOST = 65536
    RING_CALM = 64  # takes in a row that would do with a quarter before the ring shrinks

cdef struct Slot:
    int64_t pending  # signed: a sink may settle before it says how many there are
    double born
    uint16_t packet_id
    uint8_t qos
    uint8_t flags


@cython.final
cdef class Ledger(Settler):
    """Acknowledges a message when every record made from it has ended, in PUBLISH order only."""

    cdef Slot* _ring
    cdef uint64_t _mask
    cdef uint64_t _first
    cdef uint64_t _done
    cdef uint64_t _next
    cdef uint64_t _peak  # most slots in use since the last shrink
    cdef int _calm
    # QoS 1, a bit per packet identifier: in the ring
    cdef uint8_t* _qos1
    # QoS 2, two bits per packet identifier, made when first needed (16 KiB):
    # in the ring waiting for its PUBREC / PUBREC given out, waiting for PUBREL
    cdef uint8_t* _qos2
    # records of messages that came with the DUP flag, ever: earlier copies of them may be stored
    cdef readonly Py_ssize_t repeated
    # messages of this connection with a record that failed for good
    cdef readonly Py_ssize_t failed

    def __cinit__(self):
        self._ring = <Slot*> malloc(RING_START * sizeof(Slot))
        self._qos1 = <uint8_t*> calloc(1, 8192)
        if self._ring == NULL or self._qos1 == NULL:
            raise MemoryError
        self._mask = RING_START - 1
        self._first = self._done = self._next = 1

    def __dealloc__(self):
        free(self._ring)
        free(self._qos1)
        free(self._qos2)

    # -- what the session calls

    cdef bint _resize(self, uint64_t size) noexcept:
        cdef Slot* ring = <Slot*> malloc(<size_t> size * sizeof(Slot))
        cdef uint64_t token
        if ring == NULL:
            return False
        for token in range(self._first, self._next):
            ring[token & (size - 1)] = self._ring[token & self._mask]
        free(self._ring)
        self._ring = ring
        self._mask = size - 1
        return True

    cdef inline bint full(self) noexcept:
        return self._next - self._first >= RING_MOST

    cdef uint64_t begin(self, uint16_t packet_id, int qos, double born) except 0:
        """A token for a message that is about to be offered. Ask full() first."""
        cdef uint64_t token = self._next
        cdef Slot* slot
        if token - self._first > self._mask and not self._resize((self._mask + 1) * 2):
            raise MemoryError
        slot = &self._ring[token & self._mask]
        slot.pending = 0
        slot.born = born
        slot.packet_id = packet_id
        slot.qos = <uint8_t> qos
        slot.flags = SLOT_OPEN
        self._next = token + 1
        return token

    cdef inline void hold(self, uint64_t token, int64_t count) noexcept:
        if token >= self._first:
            self._ring[token & self._mask].pending += count

    cdef inline void close(self, uint64_t token) noexcept:
        """Every sink has been asked."""
        cdef Slot* slot
        if token < self._first:
            return
        slot = &self._ring[token & self._mask]
        slot.flags &= ~<uint8_t> SLOT_OPEN
        if token == self._done and slot.pending == 0 and slot.flags & SLOT_FAILED == 0:
            self._advance()

    cdef inline void _advance(self) noexcept:
        cdef Slot* slot
        while self._done < self._next:
            slot = &self._ring[self._done & self._mask]
            if slot.pending != 0 or slot.flags & (SLOT_OPEN | SLOT_FAILED):
                return
            self._done += 1

    cdef inline int begin_qos1(
        self, uint16_t packet_id, bint again, double born, uint64_t* token
    ) except -1:
        """1 with a token when the message is new; 0 for one sent again although it waits here.

        Brokers that wait for an acknowledgement send it again, EMQX each 30 s. The PUBACK that is to come answers
        that one too: a second would answer whatever has the identifier by then. [MQTT-4.3.2-2]
        """
        cdef uint8_t mark = <uint8_t> (1 << (packet_id & 7))
        if again and self._qos1[packet_id >> 3] & mark:
            return 0
        token[0] = self.begin(packet_id, 1, born)
        self._qos1[packet_id >> 3] |= mark
        return 1

    # -- QoS 2: the first 65536 bits say "in the ring", the second "PUBREC given out"

    cdef int _need_qos2(self) except -1:
        if self._qos2 == NULL:
            self._qos2 = <uint8_t*> calloc(2, 8192)
            if self._qos2 == NULL:
                raise MemoryError
        return 0

    cdef inline bint _in_ring(self, uint16_t packet_id) noexcept:
        return self._qos2[packet_id >> 3] >> (packet_id & 7) & 1

    cdef inline bint _received(self, uint16_t packet_id) noexcept:
        return self._qos2[8192 + (packet_id >> 3)] >> (packet_id & 7) & 1

    cdef int begin_qos2(self, uint16_t packet_id, double born, uint64_t* token) except -1:
        """1 with a token when the message is new; 0 for a repetition, which is seen to here."""
        cdef uint8_t mark = <uint8_t> (1 << (packet_id & 7))
        self._need_qos2()
        if self._in_ring(packet_id):
            return 0  # the PUBREC that is to come answers this one too
        token[0] = self.begin(packet_id, 2, born)
        self._qos2[packet_id >> 3] |= mark
        if self._received(packet_id):
            self._ring[token[0] & self._mask].flags |= SLOT_ANSWER
            self.close(token[0])
            return 0
        return 1

    cdef bint release(self, uint16_t packet_id) noexcept:
        """PUBREL: forget the identifier. False when it was not known."""
        cdef uint8_t mark = <uint8_t> (1 << (packet_id & 7))
        cdef bint known
        if self._qos2 == NULL:
            return False
        known = self._received(packet_id)
        # if it comes before our PUBREC: the slot must not mark the identifier later, it is free
        self._qos2[packet_id >> 3] &= ~mark
        self._qos2[8192 + (packet_id >> 3)] &= ~mark
        return known

    cdef void forget_received(self) noexcept:
        """The broker has no session: it will use the identifiers anew."""
        if self._qos2 != NULL:
            memset(self._qos2 + 8192, 0, 8192)

    # -- what the record side calls

    cdef int settle(
        self, uint64_t token, uint32_t count, int outcome, object answer, Py_ssize_t at
    ) except -1:
        cdef Slot* slot
        if token < self._first:
            return 0
        if token >= self._next:
            raise RuntimeError(f"token {token} was never given out")
        slot = &self._ring[token & self._mask]
        slot.pending -= count
        if slot.pending < 0 and slot.flags & SLOT_OPEN == 0:
            slot.pending += count
            raise RuntimeError(f"token {token} is settled more often than it was held")
        if outcome == OUT_FAILED:
            if slot.flags & SLOT_FAILED == 0:
                slot.flags |= SLOT_FAILED
                self.failed += 1
        elif token == self._done and slot.pending == 0:
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

    def oldest(self) -> float:
        """Session.now of when the oldest unacknowledged message came; 0.0 when there is none."""
        if self._first == self._next:
            return 0.0
        return self._ring[self._first & self._mask].born

    def take(self) -> bytes:
        """PUBACK and PUBREC of the completed prefix, one run of packets of 4 bytes."""
        cdef uint64_t count = self._done - self._first
        cdef uint64_t token
        cdef Slot* slot
        cdef bytes out
        cdef uint8_t* p
        cdef uint8_t mark
        cdef uint16_t packet_id
        if count == 0:
            return b""
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> (4 * count))
        p = <uint8_t*> PyBytes_AS_STRING(out)
        for token in range(self._first, self._done):
            slot = &self._ring[token & self._mask]
            packet_id = slot.packet_id
            p[0] = 0x40
            p[1] = 2
            p[2] = <uint8_t> (packet_id >> 8)
            p[3] = <uint8_t> (packet_id & 0xFF)
            if slot.qos == 2:
                p[0] = 0x50
                if self._in_ring(packet_id):
                    mark = <uint8_t> (1 << (packet_id & 7))
                    self._qos2[packet_id >> 3] &= ~mark
                    if slot.flags & SLOT_ANSWER == 0:
                        self._qos2[8192 + (packet_id >> 3)] |= mark
            else:
                self._qos1[packet_id >> 3] &= ~<uint8_t> (1 << (packet_id & 7))
            p += 4
        self._settle_size()
        self._first = self._done
        return out

    cdef void _settle_size(self) noexcept:
        """Remembers the peak, and shrinks the ring when it has long been far too large."""
        cdef uint64_t used = self._next - self._first
        if used > self._peak:
            self._peak = used
        self._calm += 1
        if self._calm >= RING_CALM:
            if self._mask >= RING_START and self._peak * 4 <= self._mask + 1:
                self._resize((self._mask + 1) // 2)
            self._calm = 0
            self._peak = 0

    def reset(self, bint keep_session) -> None:
        """A new connection: every token of before is stale, nothing of before is acknowledged.

        With keep_session the identifiers of QoS 2 messages that were answered with PUBREC stay
        known; a Session forgets them itself when the CONNACK says that the broker has no session.
        """
        self._first = self._done = self._next
        self.failed = 0
        memset(self._qos1, 0, 8192)
        if self._qos2 != NULL:
            memset(self._qos2, 0, 8192)
            if not keep_session:
                self.forget_received()

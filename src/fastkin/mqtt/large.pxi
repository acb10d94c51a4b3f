# What can never be a record, and must not hold up the session for it. A PUBLISH above the limit is handed out in
# pieces. An ill-formed PUBLISH is set aside when it comes again.
#
# The standard wants the connection closed for an ill-formed packet [MQTT-4.13.1-1]. But the broker sends the same one
# again on the next connection, before everything that waits behind it: the session would never get on. Therefore a
# packet closes the connection once, and all of them together only so often (`Unfit`).
#
# An ill-formed packet with QoS 0 does not come again. So it is set aside when its connection ends. When it is above the
# limit too, and not here whole, it closes nothing: what is still to come of it would be lost with the connection.
#
# What is set aside is acknowledged in PUBLISH order like any other message, if it has an identifier.

cdef enum:
    # why the walk stands: values of Session._is_held
    HELD_OFFER = 1  # a sink has no room
    HELD_PIECE = 2  # a piece of the message in hand waits to be taken
    HELD_BYTES = 3  # nothing stands: more bytes of the message in hand are to come
    HELD_CROWD = 4  # as many messages are unacknowledged as there may be: the next is not begun

cdef enum:
    PIECE_LEAST = 131072   # a piece is at least so much, or the rest
    PIECE_MOST = 262144
    HEAD_MOST = 131072     # bytes from the topic to the end of the properties, above max_packet_bytes
    MARK_BYTES = 4096      # of an ill-formed packet that tell it from others
    MARKS_MOST = 1024      # ill-formed packets that are remembered
    CLOSES_MOST = 3        # connections ended in a row for ill-formed packets
    CLOSES_PER_S = 60      # one more after so many seconds


cdef inline size_t least(size_t one, size_t other) noexcept nogil:
    return one if one < other else other


# A packet above the limit is never there whole. Its head must be, up to the last property, before it can be judged.
cdef size_t publish_head(
    const uint8_t* body, size_t have, size_t rest, uint8_t first, bint v5
) noexcept nogil:
    """How many of the `rest` bytes parse_publish() reads, as far as the `have` that are there tell.

    Never more than rest: what says more is a fault, which parse_publish() finds in what is there.
    """
    cdef size_t need = 2
    cdef uint32_t length = 0
    cdef int n
    if have < need or rest < need:
        return least(need, rest)
    need += load_two(body)
    if first & 0x06:
        need += 2
    if not v5 or need >= rest:
        return least(need, rest)
    if have <= need:
        return need + 1
    n = read_varint(body + need, have - need, True, &length)
    if n == VARINT_SHORT:
        return least(have + 1, rest)
    if n == VARINT_BAD or length > rest - need - <size_t> n:
        return have
    return need + <size_t> n + length


@cython.final
cdef class Unfit:
    """Which ill-formed packets ended a connection already; kept over connections, within a bound.

    Only what is ill-formed is looked up here: two packets with one digest cost nothing but a close.
    """
    cdef dict _seen  # digests in the order they came
    cdef bytes _key
    cdef double _closes
    cdef double _at

    def __cinit__(self):
        self._seen = {}
        self._key = os.urandom(16)
        self._closes = CLOSES_MOST

    cdef bint closes(self, bytes mark, double now) except -1:
        """Whether the connection is to be closed for this packet."""
        # With a key of this process: nobody outside can make two packets that look alike to us.
        cdef bytes digest = hashlib.blake2b(mark, digest_size=16, key=self._key).digest()
        if digest in self._seen:
            # it is a current one
            del self._seen[digest]
            self._seen[digest] = None
            return False
        if now > self._at:
            self._closes = min(<double> CLOSES_MOST, self._closes + (now - self._at) / CLOSES_PER_S)
            self._at = now
        if self._closes < 1:
            return False
        self._closes -= 1
        if len(self._seen) >= MARKS_MOST:
            del self._seen[next(iter(self._seen))]
        self._seen[digest] = None
        return True


@cython.final
cdef class Apart:
    """One message that is no record: what it says of itself. Its bytes come through take_piece()."""
    # as it came: it need be no UTF-8. None: the packet says none, or one that runs over its end
    cdef readonly bytes topic
    # how many bytes take_piece() gives in all: the payload, or of an ill-formed packet all that follows its
    # fixed header
    cdef readonly size_t nbytes
    # what is wrong, None when it is too large only; and where among those bytes
    cdef readonly str reason
    cdef readonly size_t offset
    # of the AckTracker; 0: no acknowledgement
    cdef readonly uint64_t token
    # the DUP flag
    cdef readonly bint again

    def __repr__(self) -> str:
        return f"<Apart {self.nbytes} bytes of {self.topic!r}: {self.reason or 'too large'}>"

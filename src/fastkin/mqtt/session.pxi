# One connection: bytes in, payloads to sinks, control packets to events, acknowledgements out.
#
# A packet is parsed where it was received (receive.pxi), once it is there whole; what is too long or
# of a wrong type is refused from its fixed header. When its sink has no room, or as many messages are
# unacknowledged as there may be, the walk stops at that message (`_held`): `_read` stays at the packet,
# offsets into it are kept, and resume() goes on there. Nothing points into the buffer between two calls.
# Control packets are judged in control.pxi. What can never be a record leaves by another door: see
# mqtt/large.pxi.
#
# Large because a message passes all of it in one go: walk, topic and alias, offer, and what is set aside
# share the packet in hand. Parts held as objects would cost a pointer for each, aliases as an object of
# their own cost 3 % of the instructions of a PUBLISH. Its bases are parts that cost nothing.

cdef enum:
    SMALLEST_LIMIT = 64   # of max_packet_bytes: less would refuse the CONNACK of some brokers
    ALIAS_MOST = 1048576  # bytes of topics that aliases stand for: 65,535 of 64 KiB would be 4 GiB
    CONTROL_MOST = 131072  # bytes of a packet that is no PUBLISH: a reason of 64 KiB, and as much again

cdef struct Held:
    # the PUBLISH whose offer is not finished; offsets from the start of its packet
    PyObject* sink
    size_t topic_at
    size_t topic_len
    size_t payload_at
    size_t payload_len
    size_t total
    uint64_t token
    uint16_t alias  # the topic is in the alias table
    bint again      # with the DUP flag

cdef struct Alias:
    # a number that stands for a topic on this connection
    uint8_t* topic
    size_t length


@cython.final
@cython.no_gc_clear  # _held points at a sink that the router keeps alive
cdef class Session(ControlPackets):
    """One connection: get_buffer() and feed() take bytes, take_output() gives what to write."""

    cdef readonly int version
    cdef Router _router
    cdef int _receive_maximum
    cdef int _alias_maximum
    cdef size_t _max_packet

    # the caller sets it before feed(): stamped on messages
    cdef public double now
    # PUBLISH packets taken so far, repeated ones included
    cdef readonly Py_ssize_t messages
    # messages that came again while they were known here, and were not offered again
    cdef readonly Py_ssize_t duplicates
    # messages above our Receive Maximum: tolerated
    cdef readonly Py_ssize_t overruns

    cdef bint _walking
    cdef int _is_held        # HELD_...: why the walk stands; 0: it does not
    cdef Held _held
    cdef Alias* _aliases     # by number; 0 is never used; NULL: the broker may use none
    cdef size_t _alias_bytes

    cdef bint _broken        # _fault has ended the connection

    cdef Apart _apart        # the message in hand that is set aside; None with HELD_BYTES: it is skipped
    cdef size_t _apart_left  # bytes of it that are not handed out
    cdef Unfit _unfit

    def __cinit__(
        self, *, int version, AckTracker acks not None, Router router not None,
        int receive_maximum=65535, Py_ssize_t max_packet_bytes=8388608, int topic_alias_maximum=0,
        Unfit unfit=None
    ):
        check_version(version)
        if not 1 <= receive_maximum <= 65535:
            raise LibraryError(f"receive_maximum {receive_maximum} is not in 1..65535")
        if not SMALLEST_LIMIT <= max_packet_bytes <= MAX_REMAINING + 5:
            raise LibraryError(f"max_packet_bytes {max_packet_bytes} is not in"
                               f" {SMALLEST_LIMIT}..{MAX_REMAINING + 5}")
        if not 0 <= topic_alias_maximum <= 65535:
            raise LibraryError(f"topic_alias_maximum {topic_alias_maximum} is not in 0..65535")
        self.version = version
        self._v5 = version == 5
        self._acks = acks
        self._router = router
        self._unfit = Unfit() if unfit is None else unfit
        self._receive_maximum = receive_maximum
        self._max_packet = <size_t> max_packet_bytes
        self._alias_maximum = topic_alias_maximum if version == 5 else 0
        if self._alias_maximum:
            self._aliases = <Alias*> calloc(<size_t> self._alias_maximum + 1, sizeof(Alias))
            if self._aliases == NULL:
                raise MemoryError

    def __dealloc__(self):
        cdef int i
        if self._aliases != NULL:
            for i in range(self._alias_maximum + 1):
                free(self._aliases[i].topic)
            free(self._aliases)

    def get_buffer(self, Py_ssize_t sizehint) -> memoryview:
        """Room to receive into; valid until the next call. Then say with feed() how much came."""
        if self._walking:
            raise RuntimeError("get_buffer() is called from within feed()")
        if self._stands() and self._written - self._read > self._max_packet + READ_LARGE:
            raise BufferError("reading goes on although the session is stalled")
        self._make_room(READ_LEAST if self._stands() else 0)
        self._chunk.offset = self._written
        self._offered = self._chunk.size - self._written
        return PyMemoryView_FromObject(self._chunk)

    def feed(self, Py_ssize_t nbytes) -> int:
        """Takes nbytes put where get_buffer() said. Returns EVENTS, STALLED, OUTPUT bits."""
        if self._walking:
            raise RuntimeError("feed() is called from within feed()")
        if nbytes < 0 or <size_t> nbytes > self._chunk.size - self._written:
            raise ValueError(f"feed({nbytes}): get_buffer() gave room for"
                             f" {self._chunk.size - self._written} bytes")
        self._adapt(<size_t> nbytes)
        self._offered = 0
        self._written += <size_t> nbytes
        return self._go()

    def feed_data(self, data) -> int:
        """Copies data in and takes it: for WebSocket frames and tests."""
        cdef Py_buffer view
        cdef const uint8_t* p
        cdef size_t left, part
        cdef int flags
        if self._walking:
            raise RuntimeError("feed_data() is called from within feed()")
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            p = <const uint8_t*> view.buf
            left = <size_t> view.len
            while True:
                # a stalled session keeps the rest whole: the caller has no other place for it
                self._make_room(left if self._stands() else 0)
                part = self._chunk.size - self._written
                if part > left:
                    part = left
                if part:
                    memcpy(self._chunk.data + self._written, p, part)
                self._written += part
                p += part
                left -= part
                flags = self._go()
                if left == 0:
                    return flags
        finally:
            PyBuffer_Release(&view)

    def resume(self) -> int:
        """Offers again what was refused for want of room, and walks on."""
        if self._walking:
            raise RuntimeError("resume() is called from within feed()")
        return self._go()

    @property
    def stalled(self) -> bool:
        """A message waits: its sink has no room, or too many are unacknowledged."""
        return self._is_held == HELD_OFFER or self._is_held == HELD_CROWD

    @property
    def crowded(self) -> bool:
        """A message waits because as many are unacknowledged as there may be: acknowledgements that leave
        make room."""
        return self._is_held == HELD_CROWD

    # -- the walk

    cdef int _go(self) except -1:
        if self._broken:
            raise ProtocolError(self._fault.reason.decode(), self._fault.offset, self._fault.code)
        self._walking = True
        try:
            if self._walk() < 0:
                self._broken = True
                raise ProtocolError(self._fault.reason.decode(), self._fault.offset,
                                    self._fault.code)
        finally:
            fastkin_unfence(self._chunk.data, self._chunk.size)
            self._walking = False
        return ((FLAG_EVENTS if self._events else 0)
                | (FLAG_STALLED if self.stalled else 0)
                | (FLAG_APART if self._is_held == HELD_PIECE else 0)
                | (FLAG_OUTPUT if self._output or self._acks._done != self._acks._first else 0))

    cdef int _walk(self) except -2:
        """0: all that is whole is taken, or a sink has stalled. -1: malformed, see _fault."""
        cdef const uint8_t* p
        cdef size_t left, head
        cdef uint32_t rest = 0
        cdef int n
        if self._is_held:
            if self._is_held == HELD_CROWD:
                self._is_held = 0  # begun anew
            else:
                n = self._offer_held() if self._is_held == HELD_OFFER else self._carry_on()
                if n <= 0:
                    return n
        while True:
            fastkin_unfence(self._chunk.data, self._chunk.size)
            left = self._written - self._read
            p = self._chunk.data + self._read
            fastkin_fence(p + left, self._chunk.size - self._written)
            self._need = 0
            if left == 0:
                return 0
            n = read_varint(p + 1, left - 1, self._v5, &rest)
            # the type is judged at once, the length as soon as it is there: nothing is buffered in
            # vain
            if p[0] & 0xF0 != TYPE_PUBLISH:
                if self._check_type(p[0]) < 0:
                    return -1
            elif not self._connected:
                return fail(&self._fault, "PUBLISH before CONNACK", 0, CODE_PROTOCOL)
            elif p[0] & 0x06 and self._acks.full():
                self._is_held = HELD_CROWD
                return 0
            if n < 0:
                if n == VARINT_BAD:
                    return fail(&self._fault, "the remaining length is not valid", 1,
                                CODE_MALFORMED)
                return 0
            head = 1 + <size_t> n
            if rest > self._max_packet - head:
                if p[0] & 0xF0 != TYPE_PUBLISH:
                    return fail(&self._fault, "a control packet larger than max_packet_bytes", 1,
                                CODE_TOO_LARGE)
                n = self._take_large(p, left, head, rest)
                if n <= 0:
                    return n
                continue
            if rest > CONTROL_MOST and p[0] & 0xF0 != TYPE_PUBLISH:
                return fail(&self._fault, "a control packet of more than 131072 bytes", 1,
                            CODE_TOO_LARGE)
            if rest > left - head:
                self._need = head + rest
                return 0
            fastkin_fence(p + head + rest, left - head - rest)
            if p[0] & 0xF0 == TYPE_PUBLISH:
                n = self._take_publish(p, head, rest)
                if n < 0:
                    n = self._refuse(p, rest, head, rest)
                    if n > 0:
                        continue
            else:
                n = self._take_control(p, head, rest)
            if n <= 0:
                return n
            self._read += head + rest

    cdef int _take_publish(self, const uint8_t* p, size_t head, size_t rest) except -2:
        """1: taken; 0: held, there is no room; -1: malformed."""
        cdef Publish message
        cdef PyObject* sink
        cdef uint32_t identifier = 0
        cdef uint64_t token = 0
        cdef bint again = p[0] & 0x08 != 0
        cdef AckTracker acks = self._acks
        cdef Router router = self._router
        if parse_publish(p + head, rest, head, p[0], self._v5, &message, &self._fault) < 0:
            return -1
        if self._find_topic(&message, head) < 0:
            return -1
        if message.qos:
            if <int64_t> (acks._next - acks._first) >= self._receive_maximum:
                self.overruns += 1
            if acks.begin(&message, again, self.now, &token) == BEGUN_KNOWN:
                self.messages += 1
                self.duplicates += 1
                return 1
        if message.properties_len and router.wants_identifiers():
            identifier = only_identifier(message.properties, message.properties_len)
        sink = router.find(message.topic, message.topic_len, identifier, self._resumed)
        if sink == NULL:
            router.nobody(message.topic, message.topic_len)
            if token:
                acks.hold(token, 0)
            self.messages += 1
            return 1
        self._held.sink = sink
        self._held.token = token
        self._held.alias = message.alias
        self._held.again = token != 0 and again
        self._held.topic_at = 0 if message.alias else <size_t> (message.topic - p)
        self._held.topic_len = message.topic_len
        self._held.payload_at = <size_t> (message.payload - p)
        self._held.payload_len = message.payload_len
        self._held.total = head + rest
        self._is_held = HELD_OFFER
        return self._offer(message.topic, message.payload)

    cdef inline int _offer(self, const uint8_t* topic, const uint8_t* payload) except -2:
        """Offers the message in hand to its sink. 1: taken; 0: it has no room."""
        cdef uint64_t token = self._held.token
        cdef Py_ssize_t count = (<Sink> self._held.sink).offer_c(
            topic, self._held.topic_len, payload, self._held.payload_len, token)
        if count < 0:
            return 0
        if token:
            self._acks.hold(token, count)
            if self._held.again:
                self._acks.repeated += count
        self._is_held = 0
        self.messages += 1
        return 1

    cdef int _offer_held(self) except -2:
        cdef const uint8_t* p = self._chunk.data + self._read
        cdef const uint8_t* topic = p + self._held.topic_at
        if self._held.alias:
            topic = self._aliases[self._held.alias].topic
        if self._offer(topic, p + self._held.payload_at) == 0:
            return 0
        self._read += self._held.total
        return 1

    cdef inline int _find_topic(self, Publish* message, size_t head) except -2:
        """Checks the topic, or gives the one that an alias stands for. -1: there is none, see _fault."""
        cdef int status
        if message.alias and message.topic_len == 0:
            return self._resolve_alias(message, head)
        if not fk_text_plain(message.topic, message.topic_len):
            status = check_text(message.topic, message.topic_len, True)
            if status != TEXT_OK:
                return topic_fault(status, head + 2, &self._fault)
        return self._set_alias(message, head) if message.alias else 0

    cdef int _resolve_alias(self, Publish* message, size_t head) noexcept:
        """The topic that an alias stands for."""
        cdef Alias* alias
        if message.alias > self._alias_maximum:
            return fail(&self._fault, "topic alias above what we allow", head, CODE_TOPIC_ALIAS)
        alias = &self._aliases[message.alias]
        if alias.topic == NULL:
            return fail(&self._fault, "topic alias that was never set", head, CODE_TOPIC_ALIAS)
        message.topic = alias.topic
        message.topic_len = alias.length
        return 0

    cdef int _set_alias(self, Publish* message, size_t head) except -2:
        """Keeps the topic of an alias and clears message.alias."""
        cdef Alias* alias
        cdef uint8_t* copy
        if message.alias > self._alias_maximum:
            return fail(&self._fault, "topic alias above what we allow", head, CODE_TOPIC_ALIAS)
        alias = &self._aliases[message.alias]
        if message.topic_len > alias.length:
            if message.topic_len - alias.length > ALIAS_MOST - self._alias_bytes:
                return fail(&self._fault, "the topics of all aliases are more than 1 MiB", head,
                            CODE_QUOTA)
        copy = <uint8_t*> realloc(alias.topic, message.topic_len)
        if copy == NULL:
            raise MemoryError
        memcpy(copy, message.topic, message.topic_len)
        self._alias_bytes += message.topic_len - alias.length
        alias.topic = copy
        alias.length = message.topic_len
        message.alias = 0
        return 0

    # -- what can never be a record

    cdef inline bint _stands(self) noexcept:
        """Nothing is walked until somebody calls resume()."""
        return self._is_held != 0 and self._is_held != HELD_BYTES

    cdef int _take_large(self, const uint8_t* p, size_t left, size_t head, size_t rest) except -2:
        """A PUBLISH above the limit. 1: it is behind us; 0: not yet; -1: malformed."""
        cdef const uint8_t* body = p + head
        cdef size_t have = least(left - head, rest)
        cdef size_t need = least(rest, MARK_BYTES)
        cdef Publish message
        cdef PyObject* sink
        cdef uint64_t token = 0
        cdef int new = BEGUN_NEW
        if have >= need:
            need = publish_head(body, have, rest, p[0], self._v5)
        if need > HEAD_MOST:
            fail(&self._fault, "the properties of a PUBLISH above max_packet_bytes have more than 131072 bytes",
                 head, CODE_TOO_LARGE)
            return self._refuse(p, have, head, rest)
        if need > have:
            self._need = head + need
            return 0
        if parse_publish(body, rest, head, p[0], self._v5, &message, &self._fault) < 0:
            return self._refuse(p, have, head, rest)
        if self._find_topic(&message, head) < 0:
            return self._refuse(p, have, head, rest)
        if message.qos:
            new = self._token_of(body, least(rest, MARK_BYTES), rest, message.packet_id, message.qos,
                                 p[0] & 0x08 != 0, &token)
        sink = self._router.find(message.topic, message.topic_len, 0, self._resumed)
        if sink == NULL:
            self._router.nobody(message.topic, message.topic_len)
        self._apart = None
        if new == BEGUN_NEW and sink != NULL:
            self._apart = Apart.__new__(Apart)
            self._apart.topic = message.topic[:message.topic_len]
            self._apart.nbytes = message.payload_len
            self._apart.again = p[0] & 0x08 != 0
            self._apart.token = token
        elif token:
            self._acks.hold(token, 0)
        self._apart_left = message.payload_len
        self._read += head + (rest - message.payload_len)
        return self._carry_on()

    cdef int _token_of(
        self, const uint8_t* body, size_t part, size_t rest, uint16_t packet_id, int qos, bint again,
        uint64_t* token
    ) except -1:
        """BEGUN_NEW, or BEGUN_KNOWN for one that is known here, and seen to.

        It is known by `part` of its `rest` bytes: of a packet above the limit by what is sure to be here
        however it is cut.
        """
        cdef AckTracker acks = self._acks
        if <int64_t> (acks._next - acks._first) >= self._receive_maximum:
            self.overruns += 1
        if acks.begin_apart(body, part, rest, packet_id, qos, again, self.now, token) == BEGUN_KNOWN:
            self.duplicates += 1
            return BEGUN_KNOWN
        return BEGUN_NEW

    cdef int _refuse(self, const uint8_t* p, size_t have, size_t head, size_t rest) except -2:
        """A PUBLISH with _fault, of which `have` bytes after its fixed header are there.

        1: it is behind us; 0: it is being set aside; -1: the connection ends.
        """
        cdef const uint8_t* body = p + head
        cdef size_t topic_len = 0
        cdef bint has_topic
        cdef bint ends = False
        cdef int qos = (p[0] >> 1) & 3
        cdef uint16_t packet_id = 0
        cdef uint64_t token = 0
        cdef int new = BEGUN_NEW
        cdef bint whole = rest <= self._max_packet - head  # not above the limit: all of it is here
        cdef bytearray mark
        if have >= 2:
            topic_len = load_two(body)
        has_topic = have >= 2 and topic_len <= have - 2
        # what tells it from others: all but what changes when it comes again
        mark = bytearray(body[:least(have, MARK_BYTES)])
        if has_topic and qos and have - 2 - topic_len >= 2:
            if qos != 3:
                packet_id = <uint16_t> load_two(body + 2 + topic_len)
            del mark[2 + topic_len:4 + topic_len]
        mark += b"%d %d" % (p[0] & 0xF7, rest)
        if qos or have >= rest:
            ends = self._unfit.closes(bytes(mark), self.now)
        if ends and qos:
            return -1  # the broker sends it again
        if packet_id:
            new = self._token_of(body, rest if whole else least(rest, MARK_BYTES), rest, packet_id, qos,
                                 p[0] & 0x08 != 0, &token)
        self._apart = None
        if new == BEGUN_NEW:
            self._apart = Apart.__new__(Apart)
            if has_topic:
                self._apart.topic = body[2:2 + topic_len]
            self._apart.nbytes = rest
            self._apart.reason = self._fault.reason.decode()
            self._apart.offset = self._fault.offset - head if self._fault.offset > head else 0
            self._apart.again = p[0] & 0x08 != 0
            self._apart.token = token
        self._apart_left = rest
        self._read += head
        new = self._carry_on()
        return -1 if ends else new

    cdef int _carry_on(self) except -2:
        """The message in hand. 1: it is behind us; 0: not yet."""
        cdef size_t have = self._written - self._read
        if self._apart is None:
            if have < self._apart_left:
                self._apart_left -= have
                self._read = self._written
                self._is_held = HELD_BYTES
                return 0
            self._read += self._apart_left
            self._apart_left = 0
            self._is_held = 0
            self.messages += 1
            return 1
        if have >= least(self._apart_left, PIECE_LEAST):
            self._need = 0
            self._is_held = HELD_PIECE
        else:
            self._need = least(self._apart_left, PIECE_LEAST)
            self._is_held = HELD_BYTES
        return 0

    @property
    def apart(self) -> Apart | None:
        """The message that is being set aside: take_piece() gives its bytes as they come."""
        return self._apart

    @property
    def apart_left(self) -> int:
        """How many of its bytes take_piece() has not given yet."""
        return self._apart_left

    def take_piece(self) -> bytes:
        """Bytes of `apart`: after APART, or after a ProtocolError, when all of them are there.

        Then resume(), until apart_left is 0, and then finish_apart().
        """
        cdef size_t size
        cdef bytes piece
        if self._is_held != HELD_PIECE:
            raise RuntimeError("there is no piece to take")
        size = least(least(self._written - self._read, self._apart_left), PIECE_MOST)
        piece = (self._chunk.data + self._read)[:size]
        self._read += size
        self._apart_left -= size
        return piece

    def finish_apart(self) -> None:
        """Its token waits for one settlement from here on; then resume()."""
        cdef uint64_t token
        if self._apart is None or self._apart_left or self._is_held != HELD_PIECE:
            raise RuntimeError("there is no message that was wholly taken")
        token = self._apart.token
        if token:
            self._acks.hold(token, 1)
            if self._apart.again:
                self._acks.repeated += 1
        self.messages += 1
        self._apart = None
        self._is_held = 0

    # -- what comes out

    def take_events(self) -> list[object]:
        """Control packets since the last call, in the order they came."""
        events = self._events
        self._events = []
        return events

    def take_output(self) -> bytes:
        """What is to be written now: acknowledgements that are ready, PUBCOMPs."""
        acks = self._acks.take()
        if not self._output:
            return acks
        output = bytes(self._output)
        self._output.clear()
        return acks + output if acks else output

    # -- what is sent

    def connect(
        self, *, str client_id not None, str user=None, bytes password=None, bint clean_start=True,
        int keep_alive=60, int64_t session_expiry=0
    ) -> bytes:
        """CONNECT. Receive Maximum is announced in 5.0.

        The largest packet that we take is not: a broker would discard what is larger, and say nothing.
        """
        return encode_connect(self.version, client_id, user, password, clean_start, keep_alive,
                              session_expiry, self._receive_maximum, self._alias_maximum)

    def subscribe(
        self, int packet_id, filters, int retain_handling=0, uint32_t identifier=0
    ) -> bytes:
        """SUBSCRIBE to (filter, QoS) pairs.

        5.0 only: retained messages come with each SUBSCRIBE (retain_handling 0), a new one (1), never (2);
        messages carry the Subscription Identifier, when it is not 0.
        """
        check_packet_id(packet_id)
        return encode_subscribe(self.version, packet_id, filters, retain_handling, identifier)

    def unsubscribe(self, int packet_id, filters) -> bytes:
        """UNSUBSCRIBE from filters."""
        check_packet_id(packet_id)
        return encode_unsubscribe(self.version, packet_id, filters)

    def pingreq(self) -> bytes:
        """PINGREQ."""
        return b"\xc0\x00"

    def disconnect(self, int code=0) -> bytes:
        """DISCONNECT; 3.1.1 cannot say why."""
        if not 0 <= code <= 255:
            raise LibraryError(f"reason code {code} is not in 0..255")
        if code == 0 or not self._v5:
            return b"\xe0\x00"
        return bytes((0xE0, 1, code))

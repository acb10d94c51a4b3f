# Control packets: what a broker may send besides messages, judged and made into events.
#
# A packet that is not allowed ends the connection with a reason. What is allowed becomes an object in a
# list that Python takes once per read. Runs of PUBACK and of PINGRESP share one object, so that a broker
# cannot fill memory with them.

cdef enum:
    # packet types, with their flags
    TYPE_CONNACK = 0x20
    TYPE_PUBLISH = 0x30
    TYPE_PUBACK = 0x40
    TYPE_PUBREC = 0x50
    TYPE_PUBREL = 0x62
    TYPE_PUBCOMP = 0x70
    TYPE_SUBACK = 0x90
    TYPE_UNSUBACK = 0xB0
    TYPE_PINGRESP = 0xD0
    TYPE_DISCONNECT = 0xE0
    TYPE_AUTH = 0xF0

cdef enum:
    EVENTS_MOST = 1024    # control packets in one read; runs of PUBACK and of PINGRESP count once
    OUTPUT_MOST = 1048576  # bytes of PUBCOMPs that nobody has taken


@cython.internal
cdef class ControlPackets(ReceiveBuffer):
    """What a session knows of its connection from control packets. A base of Session, as ReceiveBuffer is."""

    cdef bint _v5
    cdef AckTracker _acks
    cdef bint _connected     # CONNACK has come
    cdef bint _resumed       # and it says that the broker kept the session
    cdef list _events
    cdef bytearray _output   # PUBCOMPs
    cdef Fault _fault        # the last one; the packet in hand writes it

    def __cinit__(self):
        self._events = []
        self._output = bytearray()

    @cython.final
    cdef int _check_type(self, uint8_t first) noexcept:
        """Whether a broker may send a packet that begins like this, now."""
        cdef uint8_t kind = first & 0xF0
        if kind == 0 or kind == 0x10 or kind == 0x80 or kind == 0xA0 or kind == 0xC0:
            return fail(&self._fault, "a packet that only clients send, or none at all", 0,
                        CODE_PROTOCOL)
        if first != kind and not (kind == 0x60 and first == TYPE_PUBREL):
            return fail(&self._fault, "reserved flags are set", 0, CODE_MALFORMED)  # [MQTT-2.1.3-1]
        if kind == 0x60 and first != TYPE_PUBREL:
            return fail(&self._fault, "PUBREL without its flags", 0, CODE_MALFORMED)
        if kind == TYPE_PUBREC or kind == TYPE_PUBCOMP:
            return fail(&self._fault, "an answer to a QoS 2 message that was never sent", 0,
                        CODE_PROTOCOL)
        if kind == TYPE_AUTH:
            return fail(&self._fault, "AUTH although no such method was asked for", 0,
                        CODE_PROTOCOL)
        if kind == TYPE_DISCONNECT and not self._v5:
            return fail(&self._fault, "DISCONNECT from a 3.1.1 broker", 0, CODE_PROTOCOL)
        if kind == TYPE_CONNACK:
            if self._connected:
                return fail(&self._fault, "a second CONNACK", 0, CODE_PROTOCOL)
        elif not self._connected and kind != TYPE_DISCONNECT:
            return fail(&self._fault, "the first packet is not CONNACK", 0, CODE_PROTOCOL)
        return 0

    @cython.final
    cdef int _take_control(self, const uint8_t* p, size_t head, size_t rest) except -2:
        """1: taken; -1: malformed."""
        cdef uint8_t kind = p[0] & 0xF0
        cdef const uint8_t* body = p + head
        if <size_t> len(self._events) >= EVENTS_MOST:
            return fail(&self._fault, "more than 1024 control packets at once", 0, CODE_RATE)
        if kind == TYPE_PUBACK:
            return self._take_puback(body, rest, head)
        if kind == 0x60:
            return self._take_pubrel(body, rest, head)
        if kind == TYPE_CONNACK:
            return self._take_connack(body, rest, head)
        if kind == TYPE_SUBACK or kind == TYPE_UNSUBACK:
            return self._take_suback(kind, body, rest, head)
        if kind == TYPE_DISCONNECT:
            return self._take_disconnect(body, rest, head)
        if rest != 0:
            return fail(&self._fault, "PINGRESP with a body", head, CODE_MALFORMED)
        if not self._events or type(self._events[len(self._events) - 1]) is not Pingresp:
            self._events.append(Pingresp.__new__(Pingresp))
        return 1

    @cython.final
    cdef int _take_connack(self, const uint8_t* body, size_t rest, size_t offset) except -2:
        cdef Connack event
        cdef size_t head = 0
        cdef size_t length = 0
        if rest < 2 or (not self._v5 and rest != 2):
            return fail(&self._fault, "CONNACK has a wrong length", offset, CODE_MALFORMED)
        if body[0] > 1:  # [MQTT-3.2.2-1]
            return fail(&self._fault, "CONNACK has reserved flags set", offset, CODE_MALFORMED)
        if body[0] and body[1]:  # [MQTT-3.2.2-6]
            return fail(&self._fault, "CONNACK refuses but says a session is present", offset,
                        CODE_PROTOCOL)
        # a 3.1.1 broker refuses a 5.0 client with its own two bytes
        if self._v5 and not (rest == 2 and body[1] != 0):
            if last_properties(body + 2, rest - 2, offset + 2, allowed_in_connack(), &head, &length,
                               &self._fault) < 0:
                return -1
        event = Connack.__new__(Connack)
        event.session_present = body[0] == 1
        event.code = body[1]
        event.properties = properties_dict(body + 2 + head, length)
        if body[1] == 0:
            self._connected = True
            self._resumed = body[0] == 1
            if not self._resumed:
                self._acks.forget_session()
        self._events.append(event)
        return 1

    @cython.final
    cdef int _ack_head(
        self, const uint8_t* body, size_t rest, size_t offset, int* code, const char* length_fault
    ) noexcept:
        """PUBACK and PUBREL: an identifier; in 5.0 a reason and properties when there is more."""
        cdef size_t head = 0
        cdef size_t length = 0
        code[0] = 0
        if rest < 2 or (rest > 2 and not self._v5):
            return fail(&self._fault, length_fault, offset, CODE_MALFORMED)
        if body[0] == 0 and body[1] == 0:
            return fail(&self._fault, "packet identifier 0", offset, CODE_PROTOCOL)
        if rest > 2:
            code[0] = body[2]
        if rest > 3:
            if last_properties(body + 3, rest - 3, offset + 3, allowed_in_ack(), &head, &length,
                               &self._fault) < 0:
                return -1
        return 0

    @cython.final
    cdef int _take_puback(self, const uint8_t* body, size_t rest, size_t offset) except -2:
        cdef Puback event = None
        cdef int code = 0
        if self._ack_head(body, rest, offset, &code, "PUBACK has a wrong length") < 0:
            return -1
        cdef Py_ssize_t last = len(self._events) - 1
        if last >= 0 and type(self._events[last]) is Puback:
            event = <Puback> self._events[last]
            if len(event.packet_ids) >= PACKET_IDS:
                return fail(&self._fault, "more PUBACKs than there are packet identifiers", offset,
                            CODE_RATE)
        else:
            event = Puback.__new__(Puback)
            event.packet_ids = []
            event.refused = {}
            self._events.append(event)
        packet_id = load_two(body)
        event.packet_ids.append(packet_id)
        if code >= 0x80:
            event.refused[packet_id] = code
        return 1

    @cython.final
    cdef int _take_pubrel(self, const uint8_t* body, size_t rest, size_t offset) except -2:
        cdef int code = 0
        cdef bint known
        if self._ack_head(body, rest, offset, &code, "PUBREL has a wrong length") < 0:
            return -1
        if <size_t> len(self._output) > OUTPUT_MOST:
            return fail(&self._fault, "PUBRELs without end", offset, CODE_RATE)
        known = self._acks.release(<uint16_t> load_two(body))
        if known or not self._v5:
            self._output += b"\x70\x02" + body[:2]
        else:
            self._output += b"\x70\x03" + body[:2] + b"\x92"  # packet identifier not found
        return 1

    @cython.final
    cdef int _take_suback(
        self, uint8_t kind, const uint8_t* body, size_t rest, size_t offset
    ) except -2:
        cdef Suback suback
        cdef Unsuback unsuback
        cdef size_t head = 0
        cdef size_t length = 0
        cdef size_t i
        cdef uint16_t alias = 0
        cdef uint32_t packet_id
        if rest < 2:
            return fail(&self._fault, "SUBACK or UNSUBACK without its packet identifier", offset,
                        CODE_MALFORMED)
        packet_id = load_two(body)
        if packet_id == 0:
            return fail(&self._fault, "packet identifier 0", offset, CODE_PROTOCOL)
        body += 2
        rest -= 2
        offset += 2
        if self._v5:
            if enter_properties(body, rest, offset, &head, &length, &self._fault) < 0:
                return -1
            if check_properties(body + head, length, offset + head, allowed_in_ack(), False,
                                &alias, &self._fault) < 0:
                return -1
            body += head + length
            rest -= head + length
            offset += head + length
        if kind == TYPE_UNSUBACK and not self._v5:
            if rest != 0:
                return fail(&self._fault, "UNSUBACK has a wrong length", offset, CODE_MALFORMED)
        elif rest == 0:
            return fail(&self._fault, "SUBACK or UNSUBACK without a reason code", offset,
                        CODE_MALFORMED)
        for i in range(rest):
            # granted QoS, or "no subscription existed"; from 0x80 on a refusal
            if body[i] < 0x80 and (body[i] > 2 if kind == TYPE_SUBACK
                                   else body[i] != 0 and body[i] != 0x11):
                return fail(&self._fault, "a reason code that does not exist", offset + i,
                            CODE_MALFORMED)
        codes = list(body[:rest])
        if kind == TYPE_SUBACK:
            suback = Suback.__new__(Suback)
            suback.packet_id = <int> packet_id
            suback.codes = codes
            self._events.append(suback)
        else:
            unsuback = Unsuback.__new__(Unsuback)
            unsuback.packet_id = <int> packet_id
            unsuback.codes = codes
            self._events.append(unsuback)
        return 1

    @cython.final
    cdef int _take_disconnect(self, const uint8_t* body, size_t rest, size_t offset) except -2:
        cdef Disconnect event
        cdef size_t head = 0
        cdef size_t length = 0
        if rest > 1:
            if last_properties(body + 1, rest - 1, offset + 1, allowed_in_disconnect(), &head, &length,
                               &self._fault) < 0:
                return -1
        event = Disconnect.__new__(Disconnect)
        event.code = body[0] if rest else 0
        event.properties = properties_dict(body + 1 + head, length) if rest else {}
        self._events.append(event)
        return 1

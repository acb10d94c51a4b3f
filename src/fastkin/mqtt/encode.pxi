# Packets that we send, and the texts of reason codes for an operator. Nothing here is done per message but publish().

cdef enum:
    MAX_REMAINING = 268435455  # four bytes of seven bits

# One table for both versions. The codes of 3.1.1 are below 6, and 5.0 begins its errors at 0x80, so they do not meet.
cdef dict REASONS = {
    # 3.1.1 CONNACK return codes, table 3.1
    0x00: "success",
    0x01: "the broker does not speak this MQTT version",
    0x02: "the broker rejects the client identifier",
    0x03: "the broker is unavailable",
    0x04: "bad user name or password",
    0x05: "not authorised",
    # 5.0 reason codes, section 2.4
    0x10: "no matching subscribers",
    0x11: "no subscription existed",
    0x18: "continue authentication",
    0x19: "re-authenticate",
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation specific error",
    0x84: "the broker does not speak this MQTT version",
    0x85: "client identifier not valid",
    0x86: "bad user name or password",
    0x87: "not authorised",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8A: "banned",
    0x8B: "server shutting down",
    0x8C: "bad authentication method",
    0x8D: "keep alive timeout",
    0x8E: "session taken over: another client uses the same client identifier",
    0x8F: "topic filter not valid",
    0x90: "topic name not valid",
    0x91: "packet identifier in use",
    0x92: "packet identifier not found",
    0x93: "receive maximum exceeded",
    0x94: "topic alias not valid",
    0x95: "packet too large",
    0x96: "message rate too high",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x99: "payload format not valid",
    0x9A: "retain not supported",
    0x9B: "QoS not supported",
    0x9C: "use another server",
    0x9D: "server moved",
    0x9E: "shared subscriptions not supported",
    0x9F: "connection rate exceeded",
    0xA0: "maximum connect time",
    0xA1: "subscription identifiers not supported",
    0xA2: "wildcard subscriptions not supported",
}


def reason_text(code: int) -> str:
    """What a reason code means, for people. 1 to 5 are read as 3.1.1 CONNACK codes."""
    text = REASONS.get(code)
    if text is None:
        return f"unknown reason code 0x{code:02x}"
    return f"{text} (code 0x{code:02x})" if code else text


# Every text of MQTT: two bytes of length, UTF-8, no NUL [MQTT-1.5.4-2]. What breaks this rule is told here, for a
# broker would only close the connection.
cdef bytes utf8(str text, str what):
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise LibraryError(f"{what} has a character that UTF-8 cannot carry") from None
    if len(encoded) > 65535:
        raise LibraryError(f"{what} has {len(encoded)} bytes, at most 65535 are allowed")
    if b"\0" in encoded:
        raise LibraryError(f"{what} has a NUL character")
    return encoded


# Seven bits a byte, the lowest first; the top bit says that another byte follows. Lengths and identifiers are so.
cdef bytes varint(size_t value):
    cdef uint8_t[4] out
    cdef Py_ssize_t n = 0
    if value > MAX_REMAINING:
        raise LibraryError(f"a packet of {value} bytes is more than MQTT allows")
    while True:
        out[n] = value & 0x7F
        value >>= 7
        n += 1
        if value == 0:
            return PyBytes_FromStringAndSize(<char*> out, n)
        out[n - 1] |= 0x80


cdef bytes two(unsigned int value):
    cdef uint8_t[2] out
    out[0] = <uint8_t> (value >> 8)
    out[1] = <uint8_t> value
    return PyBytes_FromStringAndSize(<char*> out, 2)


cdef bytes four(uint32_t value):
    return two(value >> 16) + two(value & 0xFFFF)


cdef bytes counted(bytes data):
    return two(<unsigned int> len(data)) + data


cdef bytes packet(int first, bytes body):
    return bytes((first,)) + varint(len(body)) + body


cdef int check_packet_id(object packet_id) except -1:
    if not 1 <= packet_id <= 65535:
        raise LibraryError(f"packet identifier {packet_id} is not in 1..65535")
    return 0


cdef int check_version(int version) except -1:
    if version != 4 and version != 5:
        raise LibraryError(f"MQTT version {version} is unknown: 4 is 3.1.1, 5 is 5.0")
    return 0


cdef int check_qos(int qos) except -1:
    if not 0 <= qos <= 2:
        raise LibraryError(f"QoS {qos} is not 0, 1 or 2")
    return 0


# Filters come from settings: what is wrong is told in words, once, and not found out by the broker's refusal.
cdef tuple read_filter(str topic_filter):
    """(None, the filter's bytes without `$share/group/`), or (what is wrong, None)."""
    cdef str group, rest, level
    cdef list levels
    cdef Py_ssize_t i
    try:
        utf8(topic_filter, "the topic filter")
    except LibraryError as error:
        return str(error), None
    if not topic_filter:
        return "a topic filter must have at least one character", None
    rest = topic_filter
    if topic_filter == "$share" or topic_filter.startswith("$share/"):
        group, _, rest = topic_filter[7:].partition("/")
        if not group or not rest:
            return "a shared subscription is $share/GROUP/FILTER", None
        if "+" in group or "#" in group:
            return "a shared subscription's group name must not have + or #", None
    levels = rest.split("/")
    for i, level in enumerate(levels):
        if "#" in level:
            if level != "#":
                return f"# must stand alone in its level, not as {level!r}", None
            if i != len(levels) - 1:
                return "# must be the last level", None
        elif "+" in level and level != "+":
            return f"+ must stand alone in its level, not as {level!r}", None
    return None, rest.encode()


def valid_filter(str topic_filter not None) -> str | None:
    """None when the filter (`$share/group/` allowed) is valid, else what is wrong."""
    return read_filter(topic_filter)[0]


cdef bytes checked_filter(str topic_filter):
    """The filter's bytes without `$share/group/`."""
    fault, encoded = read_filter(topic_filter)
    if fault is not None:
        raise LibraryError(f"topic filter {topic_filter!r}: {fault}")
    return encoded


cdef bytes checked_topic(str topic):
    cdef bytes encoded = utf8(topic, "the topic")
    if not encoded:
        raise LibraryError("a topic must have at least one character")
    if b"+" in encoded or b"#" in encoded:
        raise LibraryError("a topic must not have the wildcards + and #")
    return encoded


def matches(str topic_filter not None, str topic not None) -> bool:
    """Whether the filter takes the topic, by MQTT's rules."""
    cdef bytes pattern = checked_filter(topic_filter)
    cdef bytes name = checked_topic(topic)
    return filter_matches(<const uint8_t*> PyBytes_AS_STRING(pattern), <size_t> len(pattern),
                          <const uint8_t*> PyBytes_AS_STRING(name), <size_t> len(name))


def publish(
    str topic not None, payload, *, int qos=0, int packet_id=0, int version=4,
    bint retain=False, bint dup=False
) -> bytes:
    """One PUBLISH packet."""
    cdef bytes name = checked_topic(topic)
    cdef Py_buffer view
    cdef size_t name_len = <size_t> len(name)
    cdef size_t rest, head, value
    cdef bytes out
    cdef uint8_t* p
    check_version(version)
    check_qos(qos)
    if qos:
        check_packet_id(packet_id)
    PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
    try:
        rest = 2 + name_len + (2 if qos else 0) + (1 if version == 5 else 0) + <size_t> view.len
        if rest > MAX_REMAINING:
            raise LibraryError(f"a payload of {view.len} bytes is more than MQTT allows")
        head = 2 if rest < 128 else 3 if rest < 16384 else 4 if rest < 2097152 else 5
        # Sized first and filled before anybody else can see it: a payload is copied once.
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> (head + rest))
        p = <uint8_t*> PyBytes_AS_STRING(out)
        p[0] = <uint8_t> (0x30 | (0x08 if dup else 0) | (qos << 1) | (1 if retain else 0))
        p += 1
        value = rest
        while value >= 128:
            p[0] = <uint8_t> (value & 0x7F) | 0x80
            p += 1
            value >>= 7
        p[0] = <uint8_t> value
        p[1] = <uint8_t> (name_len >> 8)
        p[2] = <uint8_t> (name_len & 0xFF)
        memcpy(p + 3, PyBytes_AS_STRING(name), name_len)
        p += 3 + name_len
        if qos:
            p[0] = <uint8_t> (packet_id >> 8)
            p[1] = <uint8_t> (packet_id & 0xFF)
            p += 2
        if version == 5:
            p[0] = 0
            p += 1
        if view.len:
            memcpy(p, view.buf, <size_t> view.len)
        return out
    finally:
        PyBuffer_Release(&view)


# CONNECT, section 3.1: fixed header, "MQTT" with its length, version (4 or 5), flags, keep-alive; in 5.0 the
# properties; then client id, user and password, each with two bytes of length, and the last two only when their flag
# is set.
cdef bytes encode_connect(
    int version, str client_id, str user, bytes password, bint clean_start, int keep_alive,
    int64_t session_expiry, int receive_maximum, int topic_alias_maximum
):
    cdef int flags = 0x02 if clean_start else 0
    cdef bytes properties = b""
    cdef bytes tail = counted(utf8(client_id, "the client identifier"))
    if not 0 <= keep_alive <= 65535:
        raise LibraryError(f"keep alive {keep_alive} s is not in 0..65535")
    if not 0 <= session_expiry <= 0xFFFFFFFF:
        raise LibraryError(f"session expiry {session_expiry} s is not in 0..4294967295")
    if version == 4 and not client_id and not clean_start:
        raise LibraryError("MQTT 3.1.1 needs a client identifier to keep a session")
    if user is not None:
        flags |= 0x80
        tail += counted(utf8(user, "the user name"))
    if password is not None:
        if version == 4 and user is None:
            raise LibraryError("MQTT 3.1.1 takes a password only with a user name")
        if len(password) > 65535:
            raise LibraryError("the password has more than 65535 bytes")
        flags |= 0x40
        tail += counted(password)
    if version == 5:
        if session_expiry:
            properties += b"\x11" + four(<uint32_t> session_expiry)
        # always said: mosquitto, whose own window is 20, grants what is asked for
        properties += b"\x21" + two(<unsigned int> receive_maximum)
        if topic_alias_maximum:
            properties += b"\x22" + two(<unsigned int> topic_alias_maximum)
        properties = varint(len(properties)) + properties
    return packet(0x10, b"\0\x04MQTT" + bytes((version, flags)) + two(<unsigned int> keep_alive)
                  + properties + tail)


# SUBSCRIBE, section 3.8: packet identifier; in 5.0 the properties; then each filter with its length and a byte of
# options.
cdef bytes encode_subscribe(
    int version, int packet_id, object filters, int retain_handling, uint32_t identifier
):
    cdef bytes properties = b"\x0b" + varint(identifier) if identifier else b""
    cdef bytes body = two(<unsigned int> packet_id)
    cdef bint some = False
    if version == 5:
        body += varint(<size_t> len(properties)) + properties
    if not 0 <= retain_handling <= 2:
        raise LibraryError(f"retain handling {retain_handling} is not 0, 1 or 2")
    for topic_filter, qos in filters:
        checked_filter(topic_filter)
        check_qos(qos)
        # 5.0 options: No Local 0, Retain As Published 0; 3.1.1 has the QoS alone
        options = qos | retain_handling << 4 if version == 5 else qos
        body += counted(utf8(topic_filter, "the topic filter")) + bytes((options,))
        some = True
    if not some:
        raise LibraryError("a subscription needs at least one topic filter")
    return packet(0x82, body)


cdef bytes encode_unsubscribe(int version, int packet_id, object filters):
    cdef bytes body = two(<unsigned int> packet_id) + (b"\0" if version == 5 else b"")
    cdef bint some = False
    for topic_filter in filters:
        checked_filter(topic_filter)
        body += counted(utf8(topic_filter, "the topic filter"))
        some = True
    if not some:
        raise LibraryError("an unsubscription needs at least one topic filter")
    return packet(0xA2, body)

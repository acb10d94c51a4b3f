# Leaf functions on untrusted bytes: noexcept nogil, a status for an answer, pointer and what is
# left of the input move together. Statement numbers are those of the OASIS MQTT 5.0 text.

cdef enum:
    # reason codes we answer with
    CODE_MALFORMED = 0x81
    CODE_PROTOCOL = 0x82
    CODE_TOPIC_NAME = 0x90
    CODE_TOPIC_ALIAS = 0x94
    CODE_TOO_LARGE = 0x95
    CODE_RATE = 0x96
    CODE_QUOTA = 0x97

cdef enum:
    PACKET_IDS = 65535  # how many there are

cdef enum:
    TEXT_OK = 0
    TEXT_NOT_UTF8 = 1
    TEXT_NUL = 2
    TEXT_WILDCARD = 3

cdef enum:
    # how a property's value is laid out; 0 = no such property
    KIND_FLAG = 1  # a byte that may only be 0 or 1
    KIND_TWO = 2
    KIND_FOUR = 3
    KIND_VARINT = 4
    KIND_TEXT = 5
    KIND_BINARY = 6
    KIND_PAIR = 7

cdef enum:
    PROP_SUBSCRIPTION_ID = 0x0B
    PROP_RESPONSE_TOPIC = 0x08
    PROP_RECEIVE_MAXIMUM = 0x21
    PROP_TOPIC_ALIAS = 0x23
    PROP_USER = 0x26
    PROP_MAXIMUM_PACKET_SIZE = 0x27

cdef enum:
    VARINT_SHORT = -1  # the next byte is not there yet
    VARINT_BAD = -2    # more than four bytes

# What is wrong with a packet, without a Python object: a constant text, the place in the packet, the reason code for
# the broker.
cdef struct Fault:
    const char* reason
    size_t offset
    int code

# All pointers lead into the packet where it was received: nothing is copied before the sink takes it.
cdef struct Publish:
    const uint8_t* topic
    size_t topic_len
    const uint8_t* payload
    size_t payload_len
    const uint8_t* properties  # checked
    size_t properties_len
    uint16_t packet_id
    uint16_t alias
    uint8_t qos


# Every malformed packet ends here. The reason is a constant: no byte of a peer is ever part of it.
cdef inline int fail(Fault* fault, const char* reason, size_t offset, int code) noexcept nogil:
    fault.reason = reason
    fault.offset = offset
    fault.code = code
    return -1


cdef inline uint64_t load8(const uint8_t* p) noexcept nogil:
    cdef uint64_t value = 0
    memcpy(&value, p, 8)
    return value


cdef inline uint32_t load_two(const uint8_t* p) noexcept nogil:
    return (<uint32_t> p[0] << 8) | p[1]


cdef inline uint32_t load_four(const uint8_t* p) noexcept nogil:
    return (<uint32_t> p[0] << 24) | (<uint32_t> p[1] << 16) | (<uint32_t> p[2] << 8) | p[3]


cdef inline int read_varint(
    const uint8_t* p, size_t left, bint minimal, uint32_t* value
) noexcept nogil:
    """Bytes used (1 to 4), or VARINT_SHORT, or VARINT_BAD (too long, or not `minimal`)."""
    cdef uint32_t result = 0
    cdef int i
    for i in range(4):
        if left == 0:
            return VARINT_SHORT
        result |= <uint32_t> (p[i] & 0x7F) << (7 * i)
        if p[i] < 0x80:
            if minimal and i > 0 and p[i] == 0:  # [MQTT-1.5.5-1]
                return VARINT_BAD
            value[0] = result
            return i + 1
        left -= 1
    return VARINT_BAD


cdef extern from "mqtt/text.h" nogil:
    bint fk_text_plain(const uint8_t* p, size_t n) noexcept


cdef int check_text(const uint8_t* p, size_t n, bint is_topic) noexcept nogil:
    """UTF-8 without NUL and surrogates [MQTT-1.5.4-1, -2]; in a topic name no wildcard either."""
    cdef uint64_t ones = <uint64_t> 0x0101010101010101
    cdef uint64_t high = ones << 7
    cdef uint64_t word, wild
    cdef uint8_t c, d
    cdef const uint8_t* start = p
    while n > 0:
        while n > 0:
            if n >= 8:
                # Eight bytes at a time while they are plain ASCII without NUL and wildcards, which topics nearly
                # always are. What stops this is looked at byte by byte below.
                word = load8(p)
            elif <size_t> (p - start) >= 8 - n:
                word = load8(p + n - 8)  # the rest, and some of what was looked at before
            else:
                break
            # '#' and '+' differ in bit 3 alone: one comparison finds both
            wild = (word | ones * 0x08) ^ (ones * 0x2B)
            if (word | ((word - ones) & ~word) | ((wild - ones) & ~wild)) & high:
                break
            if n < 8:
                return TEXT_OK
            p += 8
            n -= 8
        if n == 0:
            break
        c = p[0]
        if c < 0x80:
            if c == 0:
                return TEXT_NUL
            if is_topic and (c == 0x23 or c == 0x2B):
                return TEXT_WILDCARD
            p += 1
            n -= 1
            continue
        if c < 0xC2 or c > 0xF4:
            return TEXT_NOT_UTF8
        if n < 2:
            return TEXT_NOT_UTF8
        d = p[1]
        if d & 0xC0 != 0x80:
            return TEXT_NOT_UTF8
        if c < 0xE0:
            p += 2
            n -= 2
            continue
        if c < 0xF0:
            # shortest form; U+D800 to U+DFFF are surrogates
            if (c == 0xE0 and d < 0xA0) or (c == 0xED and d > 0x9F):
                return TEXT_NOT_UTF8
            if n < 3 or p[2] & 0xC0 != 0x80:
                return TEXT_NOT_UTF8
            p += 3
            n -= 3
            continue
        # shortest form; nothing above U+10FFFF
        if (c == 0xF0 and d < 0x90) or (c == 0xF4 and d > 0x8F):
            return TEXT_NOT_UTF8
        if n < 4 or p[2] & 0xC0 != 0x80 or p[3] & 0xC0 != 0x80:
            return TEXT_NOT_UTF8
        p += 4
        n -= 4
    return TEXT_OK


cdef inline int property_kind(uint32_t ident) noexcept nogil:
    if ident == 0x01 or ident == 0x24 or ident == 0x25 or ident == 0x28 or ident == 0x29 \
            or ident == 0x2A:
        return KIND_FLAG
    if ident == 0x13 or ident == PROP_RECEIVE_MAXIMUM or ident == 0x22 \
            or ident == PROP_TOPIC_ALIAS:
        return KIND_TWO
    if ident == 0x02 or ident == 0x11 or ident == PROP_MAXIMUM_PACKET_SIZE:
        return KIND_FOUR
    if ident == PROP_SUBSCRIPTION_ID:
        return KIND_VARINT
    if ident == 0x03 or ident == PROP_RESPONSE_TOPIC or ident == 0x12 or ident == 0x15 \
            or ident == 0x1A or ident == 0x1C or ident == 0x1F:
        return KIND_TEXT
    if ident == 0x09 or ident == 0x16:
        return KIND_BINARY
    if ident == PROP_USER:
        return KIND_PAIR
    return 0


cdef inline uint64_t bit(uint32_t ident) noexcept nogil:
    return (<uint64_t> 1) << ident


# which properties a packet from the broker may carry
cdef inline uint64_t allowed_in_publish() noexcept nogil:
    return (bit(0x01) | bit(0x02) | bit(0x03) | bit(PROP_RESPONSE_TOPIC) | bit(0x09)
            | bit(PROP_SUBSCRIPTION_ID) | bit(PROP_TOPIC_ALIAS) | bit(PROP_USER))


cdef inline uint64_t allowed_in_connack() noexcept nogil:
    return (bit(0x11) | bit(0x12) | bit(0x13) | bit(0x15) | bit(0x16) | bit(0x1A) | bit(0x1C)
            | bit(0x1F) | bit(PROP_RECEIVE_MAXIMUM) | bit(0x22) | bit(0x24) | bit(0x25)
            | bit(PROP_USER) | bit(PROP_MAXIMUM_PACKET_SIZE) | bit(0x28) | bit(0x29) | bit(0x2A))


cdef inline uint64_t allowed_in_ack() noexcept nogil:
    return bit(0x1F) | bit(PROP_USER)


cdef inline uint64_t allowed_in_disconnect() noexcept nogil:
    return bit(0x1C) | bit(0x1F) | bit(PROP_USER)


cdef int check_string(
    const uint8_t* p, size_t left, size_t offset, bint text, bint is_topic, size_t* used,
    Fault* fault
) noexcept nogil:
    """A two-byte length and that many bytes at p. `used` is the whole of it."""
    cdef size_t length
    cdef int status
    if left < 2:
        return fail(fault, "a property runs over its end", offset, CODE_MALFORMED)
    length = load_two(p)
    if length > left - 2:
        return fail(fault, "a property runs over its end", offset, CODE_MALFORMED)
    if text:
        status = check_text(p + 2, length, is_topic)
        if status == TEXT_WILDCARD:
            return fail(fault, "a response topic has a wildcard", offset, CODE_PROTOCOL)
        if status != TEXT_OK:
            return fail(fault, "a text property is not valid UTF-8", offset, CODE_MALFORMED)
    used[0] = length + 2
    return 0


# A property is its identifier and a value whose layout the identifier decides (property_kind). There is no length
# that would lead past one that is not known, so an unknown one ends the packet.
cdef int check_properties(
    const uint8_t* p, size_t left, size_t offset, uint64_t allowed, bint repeat_ids,
    uint16_t* alias, Fault* fault
) noexcept nogil:
    """Checks every property in p[:left]; p stands at `offset`. Only the topic alias is taken."""
    cdef uint64_t seen = 0
    cdef uint32_t ident, value
    cdef size_t used
    cdef int kind, n
    while left > 0:
        ident = p[0]  # a varint on the wire, but every identifier there is fits one byte
        kind = property_kind(ident)
        if kind == 0:
            return fail(fault, "unknown property", offset, CODE_MALFORMED)
        if not allowed & bit(ident):
            return fail(fault, "property not allowed in this packet", offset, CODE_PROTOCOL)
        if seen & bit(ident) and ident != PROP_USER:
            if not (repeat_ids and ident == PROP_SUBSCRIPTION_ID):
                return fail(fault, "property given twice", offset, CODE_PROTOCOL)
        seen |= bit(ident)
        p += 1
        left -= 1
        offset += 1
        used = 0
        # Any value but 0: what may not be 0 is tested behind the branches, in one place for all kinds.
        value = 1
        if kind == KIND_FLAG:
            used = 1
            if left >= 1:
                value = p[0]
                if value > 1:
                    return fail(fault, "property value is neither 0 nor 1", offset, CODE_PROTOCOL)
        elif kind == KIND_TWO:
            used = 2
            if left >= 2:
                value = load_two(p)
        elif kind == KIND_FOUR:
            used = 4
            if left >= 4:
                value = load_four(p)
        elif kind == KIND_VARINT:
            n = read_varint(p, left, True, &value)
            if n == VARINT_BAD:
                return fail(fault, "a property's length is not valid", offset, CODE_MALFORMED)
            # Longer than what is left: the test below calls it a property that runs over its end.
            used = left + 1 if n == VARINT_SHORT else <size_t> n
        else:
            if check_string(p, left, offset, kind != KIND_BINARY, ident == PROP_RESPONSE_TOPIC,
                            &used, fault) < 0:
                return -1
            if kind == KIND_PAIR:
                p += used
                left -= used
                offset += used
                if check_string(p, left, offset, True, False, &used, fault) < 0:
                    return -1
        if used > left:
            return fail(fault, "a property runs over its end", offset, CODE_MALFORMED)
        if value == 0:
            if ident == PROP_TOPIC_ALIAS:
                return fail(fault, "topic alias 0", offset, CODE_TOPIC_ALIAS)
            if ident == PROP_SUBSCRIPTION_ID:
                return fail(fault, "subscription identifier 0", offset, CODE_PROTOCOL)
            if ident == PROP_RECEIVE_MAXIMUM:
                return fail(fault, "Receive Maximum 0", offset, CODE_PROTOCOL)
            if ident == PROP_MAXIMUM_PACKET_SIZE:
                return fail(fault, "Maximum Packet Size 0", offset, CODE_PROTOCOL)
        if ident == PROP_TOPIC_ALIAS:
            alias[0] = <uint16_t> value
        p += used
        left -= used
        offset += used
    return 0


cdef uint32_t only_identifier(const uint8_t* p, size_t left) noexcept nogil:
    """The Subscription Identifier among properties that were checked; 0 for none, and for several."""
    cdef uint32_t found = 0
    cdef uint32_t value = 0
    cdef size_t used
    cdef int kind
    while left > 0:
        kind = property_kind(p[0])
        if p[0] == PROP_SUBSCRIPTION_ID:
            used = 1 + <size_t> read_varint(p + 1, left - 1, True, &value)
            # Two subscriptions with different numbers: the packet says that both matched, and not which is meant.
            if found and found != value:
                return 0
            found = value
        elif kind == KIND_FLAG:
            used = 2
        elif kind == KIND_TWO:
            used = 3
        elif kind == KIND_FOUR:
            used = 5
        else:
            used = 3 + load_two(p + 1)
            if kind == KIND_PAIR:
                used += 2 + load_two(p + used)
        p += used
        left -= used
    return found


cdef int enter_properties(
    const uint8_t* p, size_t left, size_t offset, size_t* head, size_t* length, Fault* fault
) noexcept nogil:
    """Reads the property length at p: `head` bytes say it, `length` bytes follow and are there."""
    cdef uint32_t value = 0
    cdef int n = read_varint(p, left, True, &value)
    if n == VARINT_SHORT:
        return fail(fault, "the packet ends before its properties", offset, CODE_MALFORMED)
    if n == VARINT_BAD:
        return fail(fault, "the property length is not valid", offset, CODE_MALFORMED)
    if value > left - <size_t> n:
        return fail(fault, "the properties run over the packet", offset, CODE_MALFORMED)
    head[0] = <size_t> n
    length[0] = value
    return 0


cdef int last_properties(
    const uint8_t* p, size_t left, size_t offset, uint64_t allowed, size_t* head, size_t* length, Fault* fault
) noexcept nogil:
    """Reads the property length at p and checks the properties, which must fill the rest of the packet."""
    cdef uint16_t alias = 0
    if enter_properties(p, left, offset, head, length, fault) < 0:
        return -1
    if check_properties(p + head[0], length[0], offset + head[0], allowed, False, &alias, fault) < 0:
        return -1
    if length[0] != left - head[0]:
        return fail(fault, "bytes after the properties", offset + head[0] + length[0], CODE_MALFORMED)
    return 0


# PUBLISH, section 3.3, behind its fixed header: topic with two bytes of length; packet identifier when QoS is not 0;
# in 5.0 the property length and the properties; what is left is the payload. Its length is nowhere but in the fixed
# header.
cdef inline int parse_publish(
    const uint8_t* body, size_t left, size_t offset, uint8_t first, bint v5, Publish* out,
    Fault* fault
) noexcept nogil:
    """A PUBLISH, there to the end of its properties: its first byte, and what follows its fixed header."""
    cdef size_t head = 0
    cdef size_t length = 0
    out.qos = (first >> 1) & 3
    out.alias = 0
    out.packet_id = 0
    out.properties_len = 0
    if out.qos == 3:
        return fail(fault, "PUBLISH with QoS 3", 0, CODE_MALFORMED)  # [MQTT-3.3.1-4]
    if first & 0x0E == 0x08 and v5:
        # 3.1.1 forbids it too, but nothing follows from it there and a broker may have sent it on
        return fail(fault, "DUP set on a QoS 0 PUBLISH", 0, CODE_MALFORMED)  # [MQTT-3.3.1-2]
    if left < 2:
        return fail(fault, "PUBLISH ends before its topic", offset, CODE_MALFORMED)
    out.topic_len = load_two(body)
    left -= 2
    if out.topic_len > left:
        return fail(fault, "the topic runs over the packet", offset, CODE_MALFORMED)
    out.topic = body + 2
    body = out.topic + out.topic_len
    left -= out.topic_len
    offset += 2 + out.topic_len
    if out.qos:
        if left < 2:
            return fail(fault, "PUBLISH ends before its packet identifier", offset, CODE_MALFORMED)
        out.packet_id = <uint16_t> load_two(body)
        if out.packet_id == 0:
            return fail(fault, "packet identifier 0", offset, CODE_PROTOCOL)  # [MQTT-2.2.1-3]
        body += 2
        left -= 2
        offset += 2
    if v5:
        # No properties, as nearly always: one comparison instead of two calls.
        if left > 0 and body[0] == 0:
            body += 1
            left -= 1
        else:
            if enter_properties(body, left, offset, &head, &length, fault) < 0:
                return -1
            body += head
            left -= head
            if check_properties(body, length, offset + head, allowed_in_publish(), True,
                                &out.alias, fault) < 0:
                return -1
            out.properties = body
            out.properties_len = length
            body += length
            left -= length
    if out.topic_len == 0 and out.alias == 0:
        return fail(fault, "PUBLISH with neither topic nor alias", offset, CODE_PROTOCOL)
    out.payload = body
    out.payload_len = left
    return 0


cdef int topic_fault(int status, size_t offset, Fault* fault) noexcept nogil:
    if status == TEXT_WILDCARD:  # [MQTT-3.3.2-2]
        return fail(fault, "the topic has a wildcard", offset, CODE_TOPIC_NAME)
    if status == TEXT_NUL:
        return fail(fault, "the topic has a NUL character", offset, CODE_MALFORMED)
    return fail(fault, "the topic is not valid UTF-8", offset, CODE_MALFORMED)


cdef bint filter_matches(
    const uint8_t* pattern, size_t pattern_len, const uint8_t* topic, size_t topic_len
) noexcept nogil:
    """Whether a valid filter, its `$share` prefix off, takes a valid topic name (section 4.7)."""
    cdef const uint8_t* slash
    cdef size_t level, topic_level
    # a leading wildcard does not take topics that begin with $ [MQTT-4.7.2-1]
    if topic_len and topic[0] == 0x24 and pattern_len:
        if pattern[0] == 0x23 or pattern[0] == 0x2B:
            return False
    while True:
        slash = <const uint8_t*> memchr(pattern, 0x2F, pattern_len) if pattern_len else NULL
        level = <size_t> (slash - pattern) if slash != NULL else pattern_len
        if level == 1 and pattern[0] == 0x23:
            return True
        slash = <const uint8_t*> memchr(topic, 0x2F, topic_len) if topic_len else NULL
        topic_level = <size_t> (slash - topic) if slash != NULL else topic_len
        if not (level == 1 and pattern[0] == 0x2B):
            if level != topic_level or memcmp(pattern, topic, level) != 0:
                return False
        if topic_level == topic_len:
            if level == pattern_len:
                return True
            # "a/#" takes "a": the parent level [4.7.1.2]
            return pattern_len - level == 2 and pattern[level + 1] == 0x23
        if level == pattern_len:
            return False
        pattern += level + 1
        pattern_len -= level + 1
        topic += topic_level + 1
        topic_len -= topic_level + 1

# What is made of each record of a payload after its format was read and before it is stored: events of other types are
# left out, the topic is spliced into a JSON object, an envelope goes around it and a separator behind it. A pipeline
# without such settings has no Shape, and pays nothing.
#
# The shaped records lie one behind the other in a buffer, each behind its length. That is a payload again, with a
# `next` of its own: keys, sizes and budget are asked about what is stored, by the code that asks about all else.

cdef enum TopicClash:
    CLASH_REPLACE = 0  # the object has a member of that name: the topic takes its place
    CLASH_KEEP
    CLASH_REJECT

cdef enum TopicOthers:
    OTHERS_PASS = 0  # what is no JSON object goes as it is
    OTHERS_WRAP
    OTHERS_REJECT

cdef enum:
    WRAP_BYTES = 16  # {,"payload":""}
    SHAPE_KEEP = 1 << 20  # a larger buffer is let go after its payload


cdef size_t shaped_next(const Payload* payload, size_t* at, size_t* length) noexcept nogil:
    cdef size_t begin = at[0] + sizeof(size_t)
    memcpy(length, payload.data + at[0], sizeof(size_t))
    at[0] = begin + length[0]
    return begin


# Only its `next` is used: whoever has shaped records has scanned them.
cdef PayloadFormat SHAPED = compiled_format("shaped", 0, "records in another shape", raw_scan, shaped_next, raw_reason)


@cython.final
cdef class Shape:
    """What a pipeline makes of each of its records.

    topic_field: the member that gets the topic, first in the object ("": none).
    topic_clash: "replace", "keep" or "reject" where the object has a member of that name.
    topic_others: "pass", "wrap" or "reject" for a record that is no JSON object.
    separator: what follows each record; it counts into its size.
    envelope: the host in {"type":"record","host":HOST,"data":RECORD}; None: no envelope. The record is JSON then.
    events: the types of events that are wanted; the others are left out. Empty: every record is.
    """

    cdef bytes name  # topic_field as it is compared
    cdef bytes member  # as it is written, with its colon
    cdef TopicClash clash
    cdef TopicOthers others
    cdef bytes envelope  # up to the record; empty: none
    cdef bytes separator
    cdef tuple events  # as UTF-8
    # "topic":"..." for the last topic
    cdef Buf head
    cdef Buf topic
    cdef bint known
    cdef Buf out
    # what is wrong after shape() was False
    cdef str kind
    cdef str reason
    cdef size_t at

    def __cinit__(self, *, str topic_field not None="", str topic_clash not None="replace",
                  str topic_others not None="pass", str separator not None="", str envelope=None, events=()):
        clashes = {"replace": CLASH_REPLACE, "keep": CLASH_KEEP, "reject": CLASH_REJECT}
        others = {"pass": OTHERS_PASS, "wrap": OTHERS_WRAP, "reject": OTHERS_REJECT}
        if topic_clash not in clashes:
            raise LibraryError(f"topic_clash is one of {', '.join(clashes)}, not {topic_clash!r}")
        if topic_others not in others:
            raise LibraryError(f"topic_others is one of {', '.join(others)}, not {topic_others!r}")
        self.clash = clashes[topic_clash]
        self.others = others[topic_others]
        self.name = topic_field.encode()
        if len(self.name) > NAME_ROOM:
            raise LibraryError(f"topic_field has {len(self.name)} bytes, at most {NAME_ROOM}")
        self.member = json.dumps(topic_field, ensure_ascii=False).encode() + b":" if topic_field else b""
        self.separator = separator.encode()
        self.envelope = b""
        if envelope is not None:
            host = json.dumps(envelope, ensure_ascii=False).encode()
            self.envelope = b'{"type":"record","host":' + host + b',"data":'
        self.events = tuple([event.encode() for event in events])

    def __dealloc__(self):
        buf_free(&self.head)
        buf_free(&self.topic)
        buf_free(&self.out)

    cdef int set_topic(self, const uint8_t* topic, size_t length) except -1:
        """The member with the topic: topics repeat, so the last one is kept."""
        cdef size_t member = <size_t> PyBytes_GET_SIZE(self.member)
        cdef size_t escaped
        if member == 0 or (self.known and length == self.topic.length
                           and (length == 0 or memcmp(topic, self.topic.p, length) == 0)):
            return 0
        self.known = False
        self.topic.length = self.head.length = 0
        buf_need(&self.topic, length + 1)
        if length:
            memcpy(self.topic.p, topic, length)
        escaped = key_escaped(<uint8_t*> self.topic.p, length)
        buf_need(&self.head, member + escaped + 2)
        memcpy(self.head.p, PyBytes_AS_STRING(self.member), member)
        self.head.p[member] = c'"'
        key_escape(<uint8_t*> self.topic.p, length, self.head.p + member + 1)
        self.head.p[member + 1 + escaped] = c'"'
        self.head.length = member + escaped + 2
        self.topic.length = length
        self.known = True
        return 0

    cdef size_t grows(self) noexcept:
        """By how many bytes a record becomes larger at most, besides the base64 of what is wrapped."""
        return (self.head.length + WRAP_BYTES + <size_t> PyBytes_GET_SIZE(self.envelope) + 1
                + <size_t> PyBytes_GET_SIZE(self.separator) + sizeof(size_t))

    cdef inline int put(self, const void* p, size_t n) except -1:
        buf_need(&self.out, n)
        memcpy(self.out.p + self.out.length, p, n)
        self.out.length += n
        return 0

    cdef bint bad(self, str kind, str reason, size_t at):
        self.kind = kind
        self.reason = reason
        self.at = at
        return False

    cdef bint shape(self, const uint8_t* topic, size_t topic_length, PayloadFormat format, const Payload* payload,
                    Payload* made) except -1:
        """The records of a payload that was scanned, into `made`; they live until the next call. False: one of them
        cannot be shaped, and `kind`, `reason` and `at` say why."""
        cdef size_t at = payload.first
        cdef size_t begin
        cdef size_t length = 0
        cdef size_t start
        cdef int wanted
        cdef size_t separator = <size_t> PyBytes_GET_SIZE(self.separator)
        cdef size_t envelope = <size_t> PyBytes_GET_SIZE(self.envelope)
        self.set_topic(topic, topic_length)
        self.out.length = 0
        made.first = made.count = made.data_bytes = made.longest = 0
        for _ in range(payload.count):
            begin = format.next(payload, &at, &length)
            if self.events:
                wanted = self.wants(payload.data + begin, length)
                if wanted < 0:
                    return self.bad("event", 'events: a record is no JSON object with a text "eventType"',
                                    begin if payload.data == payload.whole else 0)
                if wanted == 0:
                    continue
            start = self.out.length
            buf_need(&self.out, sizeof(size_t) + length + self.grows())
            self.out.length += sizeof(size_t)
            if envelope:
                if not json_whole(payload.data + begin, length):
                    return self.bad("envelope", "envelope: a record is no JSON",
                                    begin if payload.data == payload.whole else 0)
                self.put(PyBytes_AS_STRING(self.envelope), envelope)
            if self.head.length == 0:
                self.put(payload.data + begin, length)
            elif not self.splice(payload.data + begin, length, begin if payload.data == payload.whole else 0):
                return False
            if envelope:
                self.put(b"}", 1)
            if separator:
                self.put(PyBytes_AS_STRING(self.separator), separator)
            length = self.out.length - start - sizeof(size_t)
            memcpy(self.out.p + start, &length, sizeof(size_t))
            made.count += 1
            made.data_bytes += length
            if length > made.longest:
                made.longest = length
        made.data = <const uint8_t*> self.out.p if self.out.length else <const uint8_t*> b""
        made.length = self.out.length
        made.whole = payload.whole
        made.whole_length = payload.whole_length
        return True

    cdef int wants(self, const uint8_t* data, size_t length) except -2:
        """Is this event of a type that is wanted? -1: it has none. No more of it is read than up to its type."""
        cdef Cursor c
        cdef Text type_
        c.p = data
        c.end = data + length
        if json_member(&c, "eventType", 9) < 0 or json_blank(&c) != c'"' or json_string(&c, &type_) < 0:
            return -1
        for event in self.events:
            if json_named(&type_, PyBytes_AS_STRING(<bytes> event), <size_t> PyBytes_GET_SIZE(<bytes> event)):
                return 1
        return 0

    cdef bint splice(self, const uint8_t* data, size_t length, size_t where) except -1:
        """The record with the topic in it; `where` it stands in its payload."""
        cdef Cursor c
        cdef Text name
        cdef size_t inside  # behind the brace that opens
        cdef size_t clashes = 0
        cdef bint empty
        cdef int byte
        c.p = data
        c.end = data + length
        if json_blank(&c) != c"{":
            return self.no_object(data, length, where)
        c.p += 1
        inside = <size_t> (c.p - data)
        empty = json_blank(&c) == c"}"
        while not empty:
            if json_name(&c, &name) < 0:
                return self.no_object(data, length, where)
            if json_named(&name, PyBytes_AS_STRING(self.name), <size_t> PyBytes_GET_SIZE(self.name)):
                clashes += 1
            if json_skip(&c) < 0:
                return self.no_object(data, length, where)
            byte = json_blank(&c)
            if byte == c"}":
                break
            if byte != c",":
                return self.no_object(data, length, where)
            c.p += 1
        c.p += 1
        if json_blank(&c) >= 0:
            return self.no_object(data, length, where)
        if clashes:
            if self.clash == CLASH_REJECT:
                shown = f"{self.name.decode()!a}"
                return self.bad("topic_field", f"topic_field: the record has a member {shown} of its own", where)
            if self.clash == CLASH_KEEP:
                self.put(data, length)
                return True
            return self.replace(data, length, inside)
        self.put(data, inside)
        self.put(self.head.p, self.head.length)
        if not empty:
            self.put(b",", 1)
        self.put(data + inside, length - inside)
        return True

    cdef bint replace(self, const uint8_t* data, size_t length, size_t inside) except -1:
        """The object, which was read before, without its members of that name. All of them go: of two with one name
        some readers take the first and others the last."""
        cdef Cursor c
        cdef Text name
        cdef const uint8_t* begin
        cdef bint ends = False
        c.p = data + inside
        c.end = data + length
        self.put(data, inside)
        self.put(self.head.p, self.head.length)
        while not ends:
            begin = c.p
            json_name(&c, &name)
            json_skip(&c)
            ends = json_blank(&c) == c"}"
            if not json_named(&name, PyBytes_AS_STRING(self.name), <size_t> PyBytes_GET_SIZE(self.name)):
                self.put(b",", 1)
                self.put(begin, <size_t> (c.p - begin))
            if not ends:
                c.p += 1
        self.put(c.p, <size_t> (c.end - c.p))
        return True

    cdef bint no_object(self, const uint8_t* data, size_t length, size_t where) except -1:
        if self.others == OTHERS_REJECT:
            return self.bad("topic_field", "topic_field: a record is no JSON object", where)
        if self.others == OTHERS_PASS:
            self.put(data, length)
            return True
        self.put(b"{", 1)
        self.put(self.head.p, self.head.length)
        self.put(b',"payload":"', 12)
        buf_need(&self.out, fk_b64_length(length) + FK_B64_SLACK)
        fk_b64_encode(data, length, self.out.p + self.out.length)
        self.out.length += fk_b64_length(length)
        self.put(b'"}', 2)
        return True

    cdef void trim(self) noexcept:
        """A large payload must not leave its buffer behind."""
        if self.out.room > SHAPE_KEEP:
            buf_free(&self.out)

    def records(self, bytes topic not None, PayloadFormat frame not None, payload) -> list[bytes]:
        """What is stored of a payload of this format. DataFormatError: it is none, or a record cannot be shaped."""
        cdef Bytes source
        cdef Payload read
        cdef Payload made
        bytes_open(payload, &source, "a payload")
        try:
            scanned = records_made(frame, <const uint8_t*> PyBytes_AS_STRING(topic), <size_t> PyBytes_GET_SIZE(topic),
                                   source.p, source.length)
            frame.read(&read, source.p, source.length, scanned)
            if not self.shape(<const uint8_t*> PyBytes_AS_STRING(topic), <size_t> PyBytes_GET_SIZE(topic), frame,
                              &read, &made):
                raise DataFormatError(<Py_ssize_t> self.at, self.reason)
            records = SHAPED.copies(&made)
            self.trim()
            return records
        finally:
            bytes_close(&source)

# Partition keys. A plan (KeyPlan) says how they are made; a Key is one key, ready to be written. `raw` is the key as
# UTF-8, which is what Kinesis counts and hashes; `body` is the same as it stands in JSON.
#
# A key is checked here, before batching, for Kinesis refuses a whole call for one bad key.

cdef enum Verdict:
    KEY_TEXT = 0
    KEY_UUID  # drawn when it is written
    KEY_NONE
    KEY_MISSING  # a part is absent: a UUID stands in
    KEY_CONTENT  # made when it is written, from the digest of a message and the number of the record in it
    # from here on the record cannot be sent
    BAD_SIZE
    BAD_EMPTY
    BAD_LONG
    BAD_UTF8

cdef enum:
    KEY_CHARS = 256  # of Kinesis, in Unicode code points
    KEY_BYTES = 1024  # what 256 code points can take
    HASH_DIGITS = 39  # of 2^128 - 1
    DRAWS_MOST = 16  # of one key: where next to no shard has room the last one has to do

cdef struct Key:
    Verdict verdict
    const char* raw
    size_t raw_length
    const char* body
    size_t body_length
    int32_t shard
    # of KEY_CONTENT
    uint64_t[2] digest
    uint64_t index

cdef struct Part:
    int kind
    size_t at  # text: into the plan's bytes; level: which; field: its first name
    size_t length  # text: bytes; field: how many names

cdef enum:
    PART_TEXT
    PART_TOPIC
    PART_LEVEL
    PART_FIELD

cdef struct Name:
    size_t at
    size_t length


cdef Verdict key_check(const uint8_t* p, size_t length) noexcept nogil:
    """A key of at most KEY_BYTES: 1 to 256 code points of valid UTF-8 (RFC 3629: no surrogates, nothing overlong)?"""
    cdef size_t chars = 0
    cdef size_t i = 0
    cdef size_t more
    cdef uint32_t point
    cdef uint8_t byte
    if length == 0:
        return BAD_EMPTY
    while i < length:
        byte = p[i]
        i += 1
        chars += 1
        if byte < 0x80:
            continue
        if 0xC2 <= byte < 0xE0:
            more = 1
            point = byte & 31
        elif 0xE0 <= byte < 0xF0:
            more = 2
            point = byte & 15
        elif 0xF0 <= byte < 0xF5:
            more = 3
            point = byte & 7
        else:
            return BAD_UTF8
        if more > length - i:
            return BAD_UTF8
        for _ in range(more):
            if p[i] & 0xC0 != 0x80:
                return BAD_UTF8
            point = point << 6 | (p[i] & 63)
            i += 1
        if more == 2 and (point < 0x800 or 0xD800 <= point < 0xE000):
            return BAD_UTF8
        if more == 3 and not 0x10000 <= point < 0x110000:
            return BAD_UTF8
    return BAD_LONG if chars > KEY_CHARS else KEY_TEXT


cdef size_t key_escaped(const uint8_t* p, size_t length) noexcept nogil:
    """How long the key is inside a JSON string."""
    cdef size_t n = length
    cdef size_t i
    for i in range(length):
        if p[i] < 0x20:
            n += 5
        elif p[i] == c'"' or p[i] == c"\\":
            n += 1
    return n


cdef void key_escape(const uint8_t* p, size_t length, char* out) noexcept nogil:
    cdef size_t i
    for i in range(length):
        if p[i] < 0x20:
            memcpy(out, "\\u00", 4)
            out[4] = c"0" + (p[i] >> 4)
            out[5] = "0123456789abcdef"[p[i] & 15]
            out += 6
        else:
            if p[i] == c'"' or p[i] == c"\\":
                out[0] = c"\\"
                out += 1
            out[0] = <char> p[i]
            out += 1


cdef int key_store(Buf* buf, const uint8_t* raw, size_t length, Key* key) noexcept nogil:
    """Keep a checked key in `buf`, which is emptied first. 0, or -1 without memory."""
    cdef size_t escaped = key_escaped(raw, length)
    buf.length = 0
    if buf_reserve(buf, length + escaped) < 0:
        return -1
    memcpy(buf.p, raw, length)
    key.raw = buf.p
    key.raw_length = length
    if escaped == length:
        key.body = buf.p
    else:
        key_escape(raw, length, buf.p + length)
        key.body = buf.p + length
    key.body_length = escaped
    buf.length = length + escaped
    return 0


cdef bint hash_key_valid(const uint8_t* p, size_t length) noexcept nogil:
    """A decimal below 2^128 without leading zeros?"""
    cdef size_t i
    if length == 0 or length > HASH_DIGITS:
        return False
    for i in range(length):
        if not c"0" <= p[i] <= c"9":
            return False
    if p[0] == c"0":
        return length == 1
    return length < HASH_DIGITS or memcmp(p, b"340282366920938463463374607431768211455", HASH_DIGITS) <= 0


def uuid_key() -> str:
    """A UUID of version 4 as text, as `str(uuid.uuid4())`."""
    cdef char text[FK_UUID_LENGTH]
    random_ready()
    fk_uuid4(text)
    return PyUnicode_DecodeUTF8(text, FK_UUID_LENGTH, NULL)


def content_key(data, topic="", index=0) -> str:
    """The key that `partition_key = "content"` gives to record `index` of a message: a UUID of version 8 as text.

    data: the whole payload as it was received. topic: of the message; "" for what a program puts. index: the place of
    the record in a frame, from 0. LibraryError: data is not contiguous bytes, or index is no 64-bit number.
    """
    cdef Bytes source
    cdef Key key
    cdef char text[FK_UUID_LENGTH]
    if not isinstance(topic, str):
        raise LibraryError(f"a topic is text, not {type(topic).__name__}")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 1 << 64:
        raise LibraryError("the index of a record is a whole number from 0 to 2^64-1")
    try:
        name = topic.encode()
    except UnicodeEncodeError:
        raise LibraryError("a topic with a lone surrogate cannot be one") from None
    bytes_open(data, &source, "data")
    key_digest(&key, <const uint8_t*> PyBytes_AS_STRING(name), <size_t> PyBytes_GET_SIZE(name), source.p, source.length)
    bytes_close(&source)
    fk_uuid8(key.digest, index, text)
    return PyUnicode_DecodeUTF8(text, FK_UUID_LENGTH, NULL)


cdef inline void key_digest(Key* key, const uint8_t* topic, size_t topic_length, const uint8_t* payload,
                            size_t length) noexcept nogil:
    """Of a KEY_CONTENT: the whole message as it came, whatever its records become, so that a clock or the name of a
    host in what is stored changes no key."""
    fk_content(topic, topic_length, payload, length, key.digest)
    key.index = 0


def _seed_keys(seed) -> None:
    """For tests: keys drawn from a number, the same in every run; None: from the system again."""
    if seed is None:
        fk_random_forget()
    else:
        fk_random_fix(seed & 0xFFFFFFFFFFFFFFFF)


cdef inline int random_ready() except -1:
    if fk_random_ready() != 0:
        raise OSError("the system gives no random numbers (getentropy)")
    return 0


cdef str verdict_reason(Verdict verdict, size_t size, size_t limit):
    if verdict == BAD_SIZE:
        return f"the record has {size} bytes with its partition key, the limit is {limit}"
    if verdict == BAD_EMPTY:
        return "the partition key is empty"
    if verdict == BAD_LONG:
        return f"the partition key has more than {KEY_CHARS} characters"
    return "the partition key is not valid UTF-8"


@cython.final
cdef class KeyPlan:
    """How a record's partition key is made."""

    cdef bint uuid
    cdef bint none
    cdef bint content
    cdef bint fixed  # text alone
    cdef bint reads_data  # a field of the payload
    cdef Part* parts
    cdef size_t part_count
    cdef Name* names
    cdef Buf text

    def __cinit__(self, str kind, parts=()):
        cdef size_t names = 0
        cdef Part* part
        items = list(parts)
        if kind in ("uuid", "none", "content"):
            if items:
                raise LibraryError(f"a key plan of kind {kind!r} has no parts")
            self.uuid = kind == "uuid"
            self.none = kind == "none"
            self.content = kind == "content"
            return
        if kind != "parts":
            raise LibraryError(f"a key plan is uuid, content, none or parts, not {kind!r}")
        if not items:
            raise LibraryError("a key plan of kind 'parts' needs at least one part")
        for name, value in items:
            if name == "field":
                names += len(value)
        self.parts = <Part*> take_memory(NULL, len(items) * sizeof(Part))
        self.names = <Name*> take_memory(NULL, names * sizeof(Name))
        self.fixed = True
        names = 0
        for name, value in items:
            part = &self.parts[self.part_count]
            if name == "text":
                part.kind = PART_TEXT
                part.at = self.text.length
                part.length = self._keep(value)
            elif name == "topic":
                part.kind = PART_TOPIC
                self.fixed = False
            elif name == "level":
                part.kind = PART_LEVEL
                part.at = value
                self.fixed = False
            elif name == "field":
                if isinstance(value, str) or not value:
                    raise LibraryError(f"a field is a sequence of names, not {value!r}")
                part.kind = PART_FIELD
                part.at = names
                part.length = len(value)
                self.fixed = False
                self.reads_data = True
                for step in value:
                    self.names[names].at = self.text.length
                    self.names[names].length = self._keep(step)
                    if self.names[names].length > NAME_ROOM:
                        raise LibraryError(f"a field name is longer than {NAME_ROOM} bytes")
                    names += 1
            else:
                raise LibraryError(f"a part of a key is text, topic, level or field, not {name!r}")
            self.part_count += 1

    cdef size_t _keep(self, str text) except? 0:
        data = text.encode()
        cdef size_t length = <size_t> len(data)
        buf_need(&self.text, length + 1)
        memcpy(self.text.p + self.text.length, PyBytes_AS_STRING(data), length)
        self.text.length += length
        return length

    def __dealloc__(self):
        free(self.parts)
        free(self.names)
        buf_free(&self.text)

    cdef Verdict build(self, const uint8_t* topic, size_t topic_length, const uint8_t* data, size_t length,
                       uint8_t* out, size_t* out_length) noexcept nogil:
        """The raw key into out[0..KEY_BYTES)."""
        cdef size_t n = 0
        cdef size_t i
        cdef size_t piece_length = 0
        cdef Py_ssize_t got
        cdef Part* part
        cdef const uint8_t* piece
        for i in range(self.part_count):
            part = &self.parts[i]
            if topic_length == 0 and (part.kind == PART_TOPIC or part.kind == PART_LEVEL):
                return KEY_MISSING  # a record that came from no topic
            if part.kind == PART_TEXT:
                piece = <const uint8_t*> self.text.p + part.at
                piece_length = part.length
            elif part.kind == PART_TOPIC:
                piece = topic
                piece_length = topic_length
            elif part.kind == PART_LEVEL:
                piece = topic_level(topic, topic_length, part.at, &piece_length)
                if piece == NULL:
                    return KEY_MISSING
            else:
                got = self.field(part, data, length, out + n, KEY_BYTES - n)
                if got == FIELD_ABSENT:
                    return KEY_MISSING
                if got == FIELD_BAD:
                    return BAD_UTF8
                if got == FIELD_LONG:
                    return BAD_LONG
                n += <size_t> got
                continue
            if piece_length > KEY_BYTES - n:
                return BAD_LONG
            if piece_length:
                memcpy(out + n, piece, piece_length)
            n += piece_length
        out_length[0] = n
        return key_check(out, n)

    cdef Py_ssize_t field(self, Part* part, const uint8_t* data, size_t length, uint8_t* out,
                          size_t room) noexcept nogil:
        """A field of a JSON payload as text: how many bytes, or FIELD_*. The first member of a name
        counts, and what comes behind the field is not looked at."""
        cdef Cursor c
        cdef Text text
        cdef Name* name
        cdef size_t i
        cdef int byte
        cdef const uint8_t* start
        c.p = data
        c.end = data + length
        for i in range(part.length):
            name = &self.names[part.at + i]
            if json_member(&c, self.text.p + name.at, name.length) < 0:
                return FIELD_ABSENT
        byte = json_blank(&c)
        if byte < 0 or byte == c"{" or byte == c"[" or byte == c"n":
            return FIELD_ABSENT
        start = c.p
        if byte == c'"':
            if json_string(&c, &text) < 0:
                return FIELD_ABSENT
        else:
            if json_scalar(&c, byte) < 0:
                return FIELD_ABSENT
            text.p = start
            text.length = <size_t> (c.p - start)
            text.escaped = False
        cdef Py_ssize_t got = json_decode(&text, out, room)
        if got == -1:
            return FIELD_BAD
        return FIELD_LONG if got < 0 else got

    def render(self, bytes topic, data) -> str:
        """The key of one record, as a batcher would write it. RecordError when it cannot be one."""
        cdef Bytes source
        cdef uint8_t raw[KEY_BYTES]
        cdef size_t length = 0
        cdef Verdict verdict = KEY_MISSING
        if self.none:
            return ""
        if self.content:
            return content_key(data, topic.decode("utf-8"))
        if not self.uuid:
            bytes_open(data, &source, "a payload")
            verdict = self.build(
                <const uint8_t*> PyBytes_AS_STRING(topic), <size_t> PyBytes_GET_SIZE(topic),
                source.p, source.length, raw, &length,
            )
            bytes_close(&source)
        if verdict >= BAD_SIZE:
            raise RecordError(verdict_reason(verdict, 0, 0))
        if verdict != KEY_TEXT:
            return uuid_key()
        return PyUnicode_DecodeUTF8(<char*> raw, <Py_ssize_t> length, NULL)


cdef enum:
    FIELD_ABSENT = -1
    FIELD_BAD = -2
    FIELD_LONG = -3


cdef const uint8_t* topic_level(const uint8_t* topic, size_t length, size_t level, size_t* out) noexcept nogil:
    """Level `level` of a topic, from 0; NULL when it has fewer."""
    cdef const uint8_t* p = topic
    cdef const uint8_t* end = topic + length
    cdef const uint8_t* slash
    while True:
        slash = <const uint8_t*> memchr(p, c"/", <size_t> (end - p)) if p < end else NULL
        if level == 0:
            out[0] = <size_t> ((slash if slash != NULL else end) - p)
            return p
        if slash == NULL:
            return NULL
        p = slash + 1
        level -= 1


cdef struct Wide:
    uint64_t high
    uint64_t low


cdef inline Wide wide_md5(const char* raw, size_t length) noexcept nogil:
    cdef uint8_t digest[16]
    cdef Wide out
    cdef int i
    fk_md5(<const uint8_t*> raw, length, digest)
    out.high = out.low = 0
    for i in range(8):
        out.high = out.high << 8 | digest[i]
        out.low = out.low << 8 | digest[i + 8]
    return out


cdef Wide wide_decimal(const char* digits, size_t length) noexcept nogil:
    """A checked hash key as a number: 32 bits at a time, times ten."""
    cdef uint64_t limb[4]
    cdef uint64_t carry
    cdef size_t i
    cdef int k
    cdef Wide out
    limb[0] = limb[1] = limb[2] = limb[3] = 0
    for i in range(length):
        carry = <uint64_t> (digits[i] - c"0")
        for k in range(4):
            carry += limb[k] * 10
            limb[k] = carry & UINT32_MAX
            carry >>= 32
    out.high = limb[3] << 32 | limb[2]
    out.low = limb[1] << 32 | limb[0]
    return out


@cython.final
cdef class ShardTable:
    """Hash key to shard index. `ends` are the inclusive end hash keys of the shards, ascending."""

    cdef Wide* ends
    cdef size_t count
    cdef uint8_t* odds  # of 255, that a key drawn for this shard is kept; NULL: any key will do

    def __cinit__(self, ends):
        items = list(ends)
        before = -1
        self.ends = <Wide*> take_memory(NULL, len(items) * sizeof(Wide))
        for end in items:
            if not before < end < 1 << 128:
                raise LibraryError("shard ends must ascend and stay below 2^128")
            before = end
            self.ends[self.count].high = end >> 64
            self.ends[self.count].low = end & 0xFFFFFFFFFFFFFFFF
            self.count += 1

    def __dealloc__(self):
        free(self.ends)
        free(self.odds)

    def __len__(self) -> int:
        return <Py_ssize_t> self.count

    def set_odds(self, odds) -> None:
        """For each shard, 0.0 to 1.0, how likely a key that falls into it is kept when keys are drawn; one at least has
        1.0. None: any key is kept, and nobody looks where it falls."""
        cdef size_t i
        cdef uint8_t* room
        if odds is None:
            free(self.odds)
            self.odds = NULL
            return
        items = list(odds)
        if <size_t> len(items) != self.count or min(items) < 0.0 or max(items) != 1.0:
            raise LibraryError("odds are 0.0 to 1.0, one for each shard, one of them 1.0")
        room = <uint8_t*> take_memory(self.odds, self.count)
        self.odds = room
        for i in range(self.count):
            room[i] = <uint8_t> max(1, int(items[i] * 255.0))

    cdef int32_t draw(self, char* p) noexcept nogil:
        """Keys at `p`, one after the other, until one falls where there is room: the shard of that one."""
        cdef int32_t shard
        cdef int left = DRAWS_MOST
        while True:
            fk_uuid4(p)
            shard = self.locate(wide_md5(p, FK_UUID_LENGTH))
            left -= 1
            if left == 0 or self.kept(shard):
                return shard

    cdef inline bint kept(self, int32_t shard) noexcept nogil:
        return shard < 0 or self.odds == NULL or self.odds[shard] == 255 or (fk_random() >> 56) < self.odds[shard]

    cdef int32_t locate(self, Wide at) noexcept nogil:
        """The first shard that ends at or behind `at`; -1 behind the last."""
        cdef size_t low = 0
        cdef size_t high = self.count
        cdef size_t middle
        cdef Wide* end
        while low < high:
            middle = (low + high) // 2
            end = &self.ends[middle]
            if end.high < at.high or (end.high == at.high and end.low < at.low):
                low = middle + 1
            else:
                high = middle
        return -1 if low == self.count else <int32_t> low

    def find(self, str key, str hash_key=None) -> int:
        """The shard that takes a record with this key; -1 when the table has none for it."""
        data = key.encode() if hash_key is None else hash_key.encode()
        cdef const char* p = PyBytes_AS_STRING(data)
        cdef size_t length = <size_t> PyBytes_GET_SIZE(data)
        if hash_key is None:
            return self.locate(wide_md5(p, length))
        if not hash_key_valid(<const uint8_t*> p, length):
            raise LibraryError(f"{hash_key!r} is not an explicit hash key: a decimal below 2^128")
        return self.locate(wide_decimal(p, length))

# The text of an entry and of the list that it stands in: what PutRecords has as JSON, and what the spool keeps on disk.
# Nothing else writes or reads it. Another encoding of a call is another file like this one.

cdef enum:
    ENTRY_OPEN = 9  # {"Data":"
    ENTRY_KEY = 18  # ","PartitionKey":"
    ENTRY_HASH = 21  # ","ExplicitHashKey":"
    ENTRY_CLOSE = 2  # "}
    LIST_OPEN = 12  # {"Records":[
    LIST_CLOSE = 3  # ],} and the member that names the stream between the last two
    ENTRY_USUAL = 128  # what an entry has besides its data, when its key is no longer than some 60 bytes

cdef enum RestoreStatus:
    RESTORE_OK = 0
    RESTORE_HEAD
    RESTORE_ENTRY
    RESTORE_BASE64
    RESTORE_KEY
    RESTORE_HASH
    RESTORE_TAIL
    RESTORE_MANY
    RESTORE_LARGE
    RESTORE_COUNTS

cdef struct Restored:
    # one entry: where it ends, and what of it must be known
    size_t at
    size_t length
    size_t data_length  # before base64
    Text key  # p NULL: none
    Text hash


# -- writing

cdef inline size_t key_counts(const Key* key) noexcept nogil:
    """The bytes of the key that Kinesis counts."""
    if key.verdict == KEY_TEXT:
        return key.raw_length
    return 0 if key.verdict == KEY_NONE else FK_UUID_LENGTH


cdef inline size_t entry_frame(const Key* key, size_t hash_length) noexcept nogil:
    """Everything of an entry but its base64."""
    cdef size_t n = ENTRY_OPEN + ENTRY_CLOSE
    if key.verdict == KEY_TEXT:
        n += ENTRY_KEY + key.body_length
    elif key.verdict != KEY_NONE:
        n += ENTRY_KEY + FK_UUID_LENGTH
    if hash_length:
        n += ENTRY_HASH + hash_length
    return n


cdef inline uint64_t entry_overhead(const Key* key) noexcept nogil:
    """What an entry costs besides its data: its text, its comma, its struct."""
    return entry_frame(key, 0) + 1 + sizeof(Entry)


cdef inline uint64_t entry_cost_most(uint64_t nbytes) noexcept nogil:
    """What one record of so many bytes, data and key, costs the budget at most: a key of control characters takes six
    bytes each."""
    return (entry_data_most(nbytes, 1) + ENTRY_OPEN + ENTRY_KEY + 6 * KEY_CHARS + ENTRY_HASH + HASH_DIGITS + ENTRY_CLOSE
            + 1 + sizeof(Entry) + RECEIPT_BYTES)


cdef inline uint64_t entry_data_most(uint64_t data_bytes, uint64_t count) noexcept nogil:
    """The text of so many bytes of data in so many entries at most: each may leave a group of three unfilled. Exact
    for one."""
    return (data_bytes + 2 * count) // 3 * 4


cdef inline size_t entry_most(size_t length, const Key* key, size_t hash_length) noexcept nogil:
    """Room that entry_write needs: the base64 kernels write whole vectors."""
    return fk_b64_length(length) + entry_frame(key, hash_length) + FK_B64_SLACK


cdef inline char* entry_write(char* p, const uint8_t* data, size_t length, const Key* key, const char* hash_key,
                              size_t hash_length) noexcept nogil:
    """One entry at `p`; a key that is to be drawn, or made, is made here. Returns where it ends."""
    memcpy(p, b'{"Data":"', ENTRY_OPEN)
    p += ENTRY_OPEN
    fk_b64_encode(data, length, p)
    p += fk_b64_length(length)
    if key.verdict == KEY_TEXT:
        memcpy(p, b'","PartitionKey":"', ENTRY_KEY)
        p += ENTRY_KEY
        memcpy(p, key.body, key.body_length)
        p += key.body_length
    elif key.verdict != KEY_NONE:
        memcpy(p, b'","PartitionKey":"', ENTRY_KEY)
        if key.verdict == KEY_CONTENT:
            fk_uuid8(key.digest, key.index, p + ENTRY_KEY)
        else:
            fk_uuid4(p + ENTRY_KEY)
        p += ENTRY_KEY + FK_UUID_LENGTH
    if hash_length:
        memcpy(p, b'","ExplicitHashKey":"', ENTRY_HASH)
        p += ENTRY_HASH
        memcpy(p, hash_key, hash_length)
        p += hash_length
    memcpy(p, b'"}', ENTRY_CLOSE)
    return p + ENTRY_CLOSE


cdef inline char* entry_drawn_key(char* end) noexcept nogil:
    """The key of an entry that ends at `end`, when it was drawn: the last thing in it."""
    return end - ENTRY_CLOSE - FK_UUID_LENGTH


cdef inline char* entry_write_other(char* p, const char* former, size_t former_length, size_t former_data,
                                    const uint8_t* data, size_t length) noexcept nogil:
    """A former entry, whose data was `former_data` bytes long, with other data. Returns where it ends."""
    cdef size_t rest = ENTRY_OPEN + fk_b64_length(former_data)  # key and all that follows the data
    memcpy(p, former, ENTRY_OPEN)
    p += ENTRY_OPEN
    fk_b64_encode(data, length, p)
    p += fk_b64_length(length)
    memcpy(p, former + rest, former_length - rest)
    return p + (former_length - rest)


cdef inline char* entry_list_open(char* p) noexcept nogil:
    """LIST_OPEN bytes."""
    memcpy(p, b'{"Records":[', LIST_OPEN)
    return p + LIST_OPEN


cdef inline char* entry_list_next(char* p) noexcept nogil:
    """One byte, between two entries."""
    p[0] = c","
    return p + 1


cdef inline char* entry_list_close(char* p, const char* stream, size_t length) noexcept nogil:
    """LIST_CLOSE bytes, and `stream`: the member that names the stream."""
    memcpy(p, b"],", 2)
    memcpy(p + 2, stream, length)
    p[length + 2] = c"}"
    return p + length + LIST_CLOSE


# -- reading back

cdef uint8_t[256] base64_digit


cdef int base64_digits() noexcept nogil:
    cdef const char* all_ = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    cdef int i
    for i in range(256):
        base64_digit[i] = 0
    for i in range(64):
        base64_digit[<uint8_t> all_[i]] = 1
    return 0


base64_digits()


cdef bint base64_valid(const uint8_t* p, size_t length) noexcept nogil:
    """Whole groups of four, padding at the end only?"""
    cdef size_t i
    cdef uint8_t good = 1
    if length & 3:
        return False
    if length and p[length - 1] == c"=":
        length -= 1
        if p[length - 1] == c"=":
            length -= 1
    for i in range(length):
        good &= base64_digit[p[i]]
    return good == 1


cdef inline bint restore_word(Cursor* c, const char* word, size_t length) noexcept nogil:
    """Move past `word`; False when something else is there."""
    if length > <size_t> (c.end - c.p) or memcmp(c.p, word, length) != 0:
        return False
    c.p += length
    return True


cdef inline bint restore_text(Cursor* c, Text* out) noexcept nogil:
    """The rest of a string whose quote was read, up to its closing quote."""
    c.p -= 1
    return json_string(c, out) == 0


cdef RestoreStatus entry_read(Cursor* c, const uint8_t* start, Restored* out) noexcept nogil:
    """One entry as entry_write writes it; c.p stays at what is wrong."""
    cdef Text data
    cdef const uint8_t* before
    out.at = <size_t> (c.p - start)
    out.key.p = out.hash.p = NULL
    if not restore_word(c, b'{"Data":"', ENTRY_OPEN):
        return RESTORE_ENTRY
    before = c.p
    if not restore_text(c, &data):
        return RESTORE_ENTRY
    if not base64_valid(data.p, data.length):
        c.p = before
        return RESTORE_BASE64
    out.data_length = data.length // 4 * 3
    if data.length and data.p[data.length - 1] == c"=":
        out.data_length -= 2 if data.p[data.length - 2] == c"=" else 1
    if restore_word(c, b',"PartitionKey":"', ENTRY_KEY - 1):
        before = c.p
        if not restore_text(c, &out.key):
            c.p = before
            return RESTORE_KEY
    if restore_word(c, b',"ExplicitHashKey":"', ENTRY_HASH - 1):
        before = c.p
        if not restore_text(c, &out.hash) or not hash_key_valid(out.hash.p, out.hash.length):
            c.p = before
            return RESTORE_HASH
    if not restore_word(c, b"}", 1):
        return RESTORE_ENTRY
    out.length = <size_t> (c.p - start) - out.at
    return RESTORE_OK


cdef inline bint entry_list_opens(Cursor* c) noexcept nogil:
    return restore_word(c, b'{"Records":[', LIST_OPEN)


cdef inline bint entry_list_goes_on(Cursor* c) noexcept nogil:
    return restore_word(c, b",", 1)


cdef inline bint entry_list_ends(Cursor* c) noexcept nogil:
    """Whatever stream it names."""
    return restore_word(c, b"],", 2) and c.p < c.end and (c.end - 1)[0] == c"}"


cdef bytes entry_data(const char* p, size_t length):
    """The data of an entry that we wrote."""
    cdef const char* end = <const char*> memchr(p + ENTRY_OPEN, c'"', length - ENTRY_OPEN)
    return base64.b64decode((p + ENTRY_OPEN)[:end - p - ENTRY_OPEN])


cdef tuple entry_fields(const char* p, size_t length):
    """(data, partition key, explicit hash key)"""
    entry = json.loads(p[:length])
    return base64.b64decode(entry["Data"]), entry.get("PartitionKey"), entry.get("ExplicitHashKey")


cdef uint8_t[256] base64_value


cdef int base64_values() noexcept nogil:
    cdef const char* all_ = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    cdef uint8_t i
    memset(base64_value, 0, 256)
    for i in range(64):
        base64_value[<uint8_t> all_[i]] = i
    return 0


base64_values()


cdef void base64_decode(const uint8_t* p, size_t length, uint8_t* out) noexcept nogil:
    """What base64_valid() has passed. Writes three bytes for each group, also where the last one has less."""
    cdef const uint8_t* end = p + length
    cdef uint32_t group
    while p < end:
        group = (<uint32_t> base64_value[p[0]] << 18 | <uint32_t> base64_value[p[1]] << 12
                 | <uint32_t> base64_value[p[2]] << 6 | base64_value[p[3]])
        out[0] = <uint8_t> (group >> 16)
        out[1] = <uint8_t> (group >> 8)
        out[2] = <uint8_t> group
        p += 4
        out += 3


def joined_data(body) -> tuple:
    """Of a call's body: how many records, and their data one behind the other. LibraryError: it is no body of ours."""
    cdef Bytes source
    cdef Cursor c
    cdef Restored one
    cdef RestoreStatus status = RESTORE_HEAD
    cdef size_t count = 0
    cdef size_t length = 0
    cdef uint8_t* out
    bytes_open(body, &source, "a body")
    try:
        joined = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> (source.length // 4 * 3 + 3))
        out = <uint8_t*> PyBytes_AS_STRING(joined)
        c.p = source.p
        c.end = source.p + source.length
        with nogil:
            if entry_list_opens(&c):
                while True:
                    status = entry_read(&c, source.p, &one)
                    if status != RESTORE_OK:
                        break
                    base64_decode(source.p + one.at + ENTRY_OPEN, (one.data_length + 2) // 3 * 4, out + length)
                    length += one.data_length
                    count += 1
                    if not entry_list_goes_on(&c):
                        if not entry_list_ends(&c):
                            status = RESTORE_TAIL
                        break
        if status != RESTORE_OK:
            raise LibraryError(restore_reason(status))
        return count, joined[:length]
    finally:
        bytes_close(&source)

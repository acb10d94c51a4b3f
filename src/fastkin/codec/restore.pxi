# A body that comes back from the disk. We wrote it, but a disk may hand back anything, so it is read as if a
# stranger had written it: exactly the bytes that Lane.append writes pass, and all is read before a batch is made.

cdef enum:
    ENTRY_OPEN_WORD = 9  # {"Data":"
    ENTRY_KEY_WORD = 17  # ,"PartitionKey":"
    ENTRY_HASH_WORD = 20  # ,"ExplicitHashKey":"

cdef struct Restored:
    # one entry: where it ends, and what of it must be known
    size_t at
    size_t length
    size_t data_length  # before base64
    Text key  # p NULL: none
    Text hash

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


cdef RestoreStatus restore_entry(Cursor* c, const uint8_t* start, Restored* out) noexcept nogil:
    """One entry as Lane.append writes it; c.p stays at what is wrong."""
    cdef Text data
    cdef const uint8_t* before
    out.at = <size_t> (c.p - start)
    out.key.p = out.hash.p = NULL
    if not restore_word(c, b'{"Data":"', ENTRY_OPEN_WORD):
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
    if restore_word(c, b',"PartitionKey":"', ENTRY_KEY_WORD):
        before = c.p
        if not restore_text(c, &out.key):
            c.p = before
            return RESTORE_KEY
    if restore_word(c, b',"ExplicitHashKey":"', ENTRY_HASH_WORD):
        before = c.p
        if not restore_text(c, &out.hash) or not hash_key_valid(out.hash.p, out.hash.length):
            c.p = before
            return RESTORE_HASH
    if not restore_word(c, b"}", 1):
        return RESTORE_ENTRY
    out.length = <size_t> (c.p - start) - out.at
    return RESTORE_OK


cdef Py_ssize_t restore_key(const Text* text, uint8_t* raw) noexcept nogil:
    """The key as UTF-8 into KEY_BYTES of room: its length, or -1 when it is none."""
    cdef Py_ssize_t n
    cdef size_t i
    for i in range(text.length):
        if text.p[i] < 0x20:
            return -1
    n = json_decode(text, raw, KEY_BYTES)
    if n < 0 or key_check(raw, <size_t> n) != KEY_TEXT:
        return -1
    return n


cdef bint drawn(const uint8_t* raw, size_t length) noexcept nogil:
    """Does this key look as if fk_uuid4 had drawn it?"""
    return (length == FK_UUID_LENGTH and raw[8] == c"-" and raw[13] == c"-" and raw[14] == c"4"
            and raw[18] == c"-" and raw[23] == c"-")


cdef str restore_reason(RestoreStatus status):
    return {
        RESTORE_HEAD: "the body does not begin with its records",
        RESTORE_ENTRY: "an entry is cut short or not as it was written",
        RESTORE_BASE64: "an entry's data is no base64",
        RESTORE_KEY: "an entry's partition key cannot be one",
        RESTORE_HASH: "an entry's explicit hash key cannot be one",
        RESTORE_TAIL: "the body does not end as one",
        RESTORE_MANY: f"the body has more than {ENTRIES_MOST} entries",
        RESTORE_LARGE: "the body is too large",
        RESTORE_COUNTS: "the counts of user records do not belong to this body",
    }[status]


cdef Batch restore_batch(_Books books, const uint8_t* data, size_t length, bytes counts, uint64_t token,
                         ShardTable table, bint uuid):
    """A finished batch that owns nothing yet: the caller charges it and sets `live`. DataFormatError."""
    cdef uint8_t raw[KEY_BYTES]
    cdef Cursor c
    cdef Restored one
    cdef RestoreStatus status
    cdef Entry* entry
    cdef Py_ssize_t key_length
    cdef const uint8_t* count = <const uint8_t*> PyBytes_AS_STRING(counts)
    cdef size_t count_left = <size_t> PyBytes_GET_SIZE(counts)
    cdef bint counted = count_left > 0
    cdef uint64_t records = 0
    cdef Batch batch
    if length > BODY_MOST:
        raise DataFormatError(0, restore_reason(RESTORE_LARGE))
    c.p = data
    c.end = data + length
    if not restore_word(&c, HEAD, HEAD_LENGTH):
        raise DataFormatError(0, restore_reason(RESTORE_HEAD))
    batch = Batch.new(books, length + 64, ENTRIES_START)
    batch.live = False  # until its entries are charged: freeing it must end nothing
    while True:
        status = restore_entry(&c, data, &one)
        if status == RESTORE_OK and batch.count == ENTRIES_MOST:
            status = RESTORE_MANY
        if status != RESTORE_OK:
            raise DataFormatError(<Py_ssize_t> (c.p - data), restore_reason(status))
        entry = batch.next_entry()
        entry.token = token
        entry.kind = ENTRY_ROW
        entry.at = <uint32_t> one.at
        entry.length = <uint32_t> one.length
        entry.size = <uint32_t> one.data_length
        entry.shard = -1
        entry.records = 1
        if one.key.p != NULL:
            key_length = restore_key(&one.key, raw)
            if key_length < 0:
                raise DataFormatError(<Py_ssize_t> (one.key.p - data), restore_reason(RESTORE_KEY))
            entry.size += <uint32_t> key_length
            if table is not None and one.hash.p == NULL and not (uuid and drawn(raw, <size_t> key_length)):
                entry.shard = table.locate(wide_md5(<const char*> raw, <size_t> key_length))
        if table is not None and one.hash.p != NULL:
            entry.shard = table.locate(wide_decimal(<const char*> one.hash.p, one.hash.length))
        if counted:
            if count_left >= 4:
                entry.records = count[0] | count[1] << 8 | count[2] << 16 | <uint32_t> count[3] << 24
            if count_left < 4 or entry.records == 0:
                raise DataFormatError(<Py_ssize_t> one.at, restore_reason(RESTORE_COUNTS))
            count += 4
            count_left -= 4
        records += entry.records
        batch.close_entry(entry)
        if restore_word(&c, b",", 1):
            continue
        break
    if not restore_word(&c, b"],", 2) or c.p >= c.end or (c.end - 1)[0] != c"}":
        raise DataFormatError(<Py_ssize_t> (c.p - data), restore_reason(RESTORE_TAIL))
    if count_left or records > UINT32_MAX:
        raise DataFormatError(<Py_ssize_t> length, restore_reason(RESTORE_COUNTS))
    memcpy(batch.body.p, data, one.at + one.length)
    batch.body.length = one.at + one.length
    batch.restored = True
    # the stream may have another name by now
    batch.finish_body(FLUSH_DRAIN, None)
    return batch


cdef uint64_t restored_cost(Batch batch) noexcept nogil:
    cdef uint64_t cost = 0
    cdef size_t i
    for i in range(batch.count):
        cost += entry_cost(&batch.items[i])
    return cost

# A body that comes back from the disk. We wrote it, but a disk may hand back anything, so it is read as if a
# stranger had written it: exactly the bytes that Batcher.append writes pass, and all is read before a batch is made.

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
    """Does this key look as if fk_uuid4 had drawn it, or fk_uuid8 made it?"""
    return (length == FK_UUID_LENGTH and raw[8] == c"-" and raw[13] == c"-" and (raw[14] == c"4" or raw[14] == c"8")
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


cdef Batch restore_batch(_Accounting accounting, const uint8_t* data, size_t length, bytes counts, uint64_t token,
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
    if not entry_list_opens(&c):
        raise DataFormatError(0, restore_reason(RESTORE_HEAD))
    batch = Batch.new(accounting, length + 64, ENTRIES_START)
    batch.live = False  # until its entries are charged: freeing it must end nothing
    while True:
        status = entry_read(&c, data, &one)
        if status == RESTORE_OK and batch.count == ENTRIES_MOST:
            status = RESTORE_MANY
        if status != RESTORE_OK:
            raise DataFormatError(<Py_ssize_t> (c.p - data), restore_reason(status))
        entry = batch.next_entry()
        entry.token = token
        entry.kind = ENTRY_ROW
        entry.drawn = False  # it may have been stored before it came to the disk
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
        if not entry_list_goes_on(&c):
            break
    if not entry_list_ends(&c):
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

# Several records in one Kinesis record, in the format of the Kinesis Producer Library: a magic number, a
# protobuf message, the MD5 of the message.
#
# Every record of an aggregate has the same key, the aggregate's own: consumers drop a whole aggregate when one record
# in it hashes outside the shard they read it from. So a record with another key closes the open aggregate. Keys that
# are drawn are no other key: one is drawn for the whole aggregate. Keys made from content are those of one message: its
# first record in the aggregate gives the key, and the places in it tell the others. With other messages beside it, one
# that came again would stand among others, and nobody could know it again.
#
# A record that does not fit into an aggregate, because it is larger than `aggregate_bytes` or than Kinesis takes with
# what goes around it, goes out plain. So does a record that stayed alone. To wrap one record saves nothing: it makes
# the record larger, and its consumer would have to unwrap it.
#
# An aggregate is never split before it is sent. Only when Kinesis has refused it is it taken apart (Batch.halves).

cdef enum:
    AGGREGATE_MAGIC = 4  # F3 89 9A C2
    AGGREGATE_DIGEST = 16

cdef struct Aggregate:
    Buf bytes
    Buf runs  # of Run
    Buf text  # the key
    Key key
    bint drawn  # the key is a UUID of ours
    bint held  # receipts are among the runs
    uint32_t records
    uint32_t run_count
    # the first record's own bytes: alone it goes out plain
    size_t first
    size_t first_length
    uint64_t charged  # to the budget, until the entry is charged


cdef inline size_t varint_length(size_t value) noexcept nogil:
    cdef size_t n = 1
    while value >= 128:
        value >>= 7
        n += 1
    return n


cdef inline void varint(Buf* buf, size_t value) noexcept nogil:
    while value >= 128:
        buf.p[buf.length] = <char> (value | 128)
        buf.length += 1
        value >>= 7
    buf.p[buf.length] = <char> value
    buf.length += 1


cdef inline size_t aggregate_inner(size_t length) noexcept nogil:
    """Record { partition_key_index = 0, data }"""
    return 3 + varint_length(length) + length


cdef bint aggregate_fits(const Aggregate* group, size_t length, size_t most, size_t most_record) noexcept nogil:
    """Is there room for one more record, the key outside counted too?"""
    cdef size_t inner = aggregate_inner(length)
    cdef size_t whole = group.bytes.length + 1 + varint_length(inner) + inner + AGGREGATE_DIGEST
    return whole <= most and whole + group.key.raw_length <= most_record


cdef bint aggregate_key_is(const Aggregate* group, const Key* key, uint64_t token) noexcept nogil:
    """Is it the aggregate's key? The aggregate has records."""
    if key.verdict == KEY_CONTENT:
        return (group.key.digest[0] == key.digest[0] and group.key.digest[1] == key.digest[1]
                and (<const Run*> group.runs.p)[group.run_count - 1].token == token)
    if key.verdict != KEY_TEXT:
        return group.drawn
    return (not group.drawn and key.raw_length == group.key.raw_length
            and memcmp(key.raw, group.key.raw, key.raw_length) == 0)


cdef inline uint64_t aggregate_cost(size_t length, uint32_t kind) noexcept nogil:
    """What a record costs until its aggregate is closed."""
    return (fk_b64_length(length + 8) + sizeof(Run)) + (RECEIPT_BYTES if kind == ENTRY_RECEIPT else 0)


cdef int aggregate_open(Aggregate* group, const Key* key) noexcept nogil:
    """Empty, with its key."""
    cdef char uuid[FK_UUID_LENGTH]
    group.run_count = 0
    group.runs.length = group.bytes.length = 0
    group.held = False
    group.drawn = key.verdict != KEY_TEXT and key.verdict != KEY_CONTENT
    group.key.verdict = KEY_TEXT
    group.key.shard = key.shard
    if key.verdict == KEY_NONE:  # of lines only: consumers drop a KPL aggregate without a key
        group.key = key[0]
        group.key.raw_length = group.key.body_length = 0
    elif key.verdict != KEY_TEXT:
        if key.verdict == KEY_CONTENT:
            group.key.digest[0] = key.digest[0]
            group.key.digest[1] = key.digest[1]
            fk_uuid8(key.digest, key.index, uuid)
        else:
            fk_uuid4(uuid)
        if key_store(&group.text, <uint8_t*> uuid, FK_UUID_LENGTH, &group.key) < 0:
            return -1
    elif key_store(&group.text, <const uint8_t*> key.raw, key.raw_length, &group.key) < 0:
        return -1
    return 0


cdef int aggregate_start(Aggregate* group, const Key* key) noexcept nogil:
    if aggregate_open(group, key) < 0:
        return -1
    if buf_reserve(&group.bytes, AGGREGATE_MAGIC + 11 + group.key.raw_length) < 0:
        return -1
    memcpy(group.bytes.p, b"\xf3\x89\x9a\xc2\x0a", AGGREGATE_MAGIC + 1)
    group.bytes.length = AGGREGATE_MAGIC + 1
    varint(&group.bytes, group.key.raw_length)
    memcpy(group.bytes.p + group.bytes.length, group.key.raw, group.key.raw_length)
    group.bytes.length += group.key.raw_length
    return 0


cdef int aggregate_run(Aggregate* group, uint64_t token, uint32_t kind) noexcept nogil:
    """One record more that this token waits for."""
    cdef Run* run = NULL
    if group.run_count and kind != ENTRY_RECEIPT:
        run = &(<Run*> group.runs.p)[group.run_count - 1]
    if run != NULL and run.token == token and run.kind == kind:
        run.count += 1
    else:
        if buf_reserve(&group.runs, sizeof(Run)) < 0:
            return -1
        run = <Run*> (group.runs.p + group.runs.length)
        run.token = token
        run.count = 1
        run.kind = kind
        group.runs.length += sizeof(Run)
        group.run_count += 1
    if kind == ENTRY_RECEIPT:
        group.held = True
    return 0


cdef int aggregate_add(Aggregate* group, const uint8_t* data, size_t length, uint64_t token,
                       uint32_t kind) noexcept nogil:
    cdef size_t inner = aggregate_inner(length)
    if aggregate_run(group, token, kind) < 0 or buf_reserve(&group.bytes, inner + 24 + AGGREGATE_DIGEST) < 0:
        return -1
    group.bytes.p[group.bytes.length] = <char> 0x1A
    group.bytes.length += 1
    varint(&group.bytes, inner)
    memcpy(group.bytes.p + group.bytes.length, b"\x08\x00\x1a", 3)
    group.bytes.length += 3
    varint(&group.bytes, length)
    if group.records == 0:
        group.first = group.bytes.length
        group.first_length = length
    memcpy(group.bytes.p + group.bytes.length, data, length)
    group.bytes.length += length
    group.records += 1
    return 0


cdef int aggregate_finish(Aggregate* group) noexcept nogil:
    if buf_reserve(&group.bytes, AGGREGATE_DIGEST) < 0:
        return -1
    fk_md5(<const uint8_t*> group.bytes.p + AGGREGATE_MAGIC, group.bytes.length - AGGREGATE_MAGIC,
           <uint8_t*> group.bytes.p + group.bytes.length)
    group.bytes.length += AGGREGATE_DIGEST
    return 0


cdef size_t varint_read(const uint8_t* p, size_t left, size_t* value) noexcept nogil:
    """How many bytes it takes; 0 when it is cut off or larger than any length here."""
    cdef size_t n = 0
    value[0] = 0
    while n < left and n < 5:
        value[0] |= <size_t> (p[n] & 127) << 7 * n
        n += 1
        if p[n - 1] < 128:
            return n
    return 0


cdef list aggregate_records(bytes data):
    """(begin, begin of its data, end) of each record as aggregate_add writes it; None: this is no such aggregate.

    What comes back from a disk may be anything, so nothing is taken on trust.
    """
    cdef const uint8_t* p = <const uint8_t*> PyBytes_AS_STRING(data)
    cdef size_t end = <size_t> PyBytes_GET_SIZE(data)
    cdef size_t at = AGGREGATE_MAGIC + 1
    cdef size_t begin
    cdef size_t n
    cdef size_t length = 0
    cdef size_t inner = 0
    if end < AGGREGATE_MAGIC + 2 + AGGREGATE_DIGEST or memcmp(p, b"\xf3\x89\x9a\xc2\x0a", AGGREGATE_MAGIC + 1) != 0:
        return None
    end -= AGGREGATE_DIGEST
    n = varint_read(p + at, end - at, &length)
    at += n
    if n == 0 or length > end - at:
        return None
    at += length
    records = []
    while at < end:
        begin = at
        if p[at] != 0x1A:
            return None
        at += 1
        n = varint_read(p + at, end - at, &inner)
        at += n
        if n == 0 or inner > end - at or inner < 4 or memcmp(p + at, b"\x08\x00\x1a", 3) != 0:
            return None
        n = varint_read(p + at + 3, inner - 3, &length)
        if n == 0 or length != inner - 3 - n:
            return None
        at += inner
        records.append((begin, at - length, at))
    return records


cdef bytes aggregate_of(bytes data, Py_ssize_t head, list records):
    """Some records of `data`, whose records begin at `head`, with the same key; one alone is plain."""
    cdef uint8_t digest[AGGREGATE_DIGEST]
    cdef bytes message
    if len(records) == 1 or head == 0:  # lines begin with the first one
        return data[records[0][1]:records[len(records) - 1][2]]
    message = data[AGGREGATE_MAGIC:head] + data[records[0][0]:records[len(records) - 1][2]]
    fk_md5(<const uint8_t*> PyBytes_AS_STRING(message), <size_t> PyBytes_GET_SIZE(message), digest)
    return data[:AGGREGATE_MAGIC] + message + digest[:AGGREGATE_DIGEST]


cdef void aggregate_free(Aggregate* group) noexcept nogil:
    buf_free(&group.bytes)
    buf_free(&group.runs)
    buf_free(&group.text)

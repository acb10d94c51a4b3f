# Several JSON records in one Kinesis record, a line each, for consumers that split lines. It shares the struct of KPL
# aggregates (aggregate.pxi), with the lines themselves as its bytes and nothing before or behind them.


cdef bint line_possible(const uint8_t* data, size_t length) noexcept nogil:
    """Is it JSON, whose line ends stand between its tokens and not within a text? Then a space is as good."""
    cdef size_t i = 0
    cdef bint text = False
    if not json_whole(data, length):
        return False
    if memchr(data, c"\n", length) == NULL and memchr(data, c"\r", length) == NULL:
        return True
    while i < length:
        if data[i] == c'"':
            text = not text
        elif text:
            if data[i] == c"\\":
                i += 1
            if data[i] == c"\n" or data[i] == c"\r":  # no JSON, though the reader let it pass
                return False
        i += 1
    return True


cdef bint line_fits(const Aggregate* group, size_t length, size_t most, size_t most_record) noexcept nogil:
    """Is there room for one more line, the key counted too?"""
    cdef size_t whole = group.bytes.length + 1 + length
    return whole <= most and whole + group.key.raw_length <= most_record


cdef int line_add(Aggregate* group, const uint8_t* data, size_t length, uint64_t token, uint32_t kind) noexcept nogil:
    cdef char* p
    cdef size_t i
    if aggregate_run(group, token, kind) < 0 or buf_reserve(&group.bytes, length + 1) < 0:
        return -1
    if group.records:
        group.bytes.p[group.bytes.length] = c"\n"
        group.bytes.length += 1
    p = group.bytes.p + group.bytes.length
    memcpy(p, data, length)
    if memchr(p, c"\n", length) != NULL or memchr(p, c"\r", length) != NULL:
        for i in range(length):
            if p[i] == c"\n" or p[i] == c"\r":
                p[i] = c" "
    if group.records == 0:
        group.first = 0
        group.first_length = length
    group.bytes.length += length
    group.records += 1
    return 0


cdef list line_records(bytes data):
    """(begin, begin of its data, end) of each line."""
    cdef Py_ssize_t at = 0
    records = []
    for line in data.split(b"\n"):
        records.append((at, at, at + len(line)))
        at += len(line) + 1
    return records

# One PutRecords answer. Real Kinesis, kinesalite and kinesis-mock differ in key order, blanks and in
# "ErrorCode":null on success; a hostile endpoint may send anything. The whole answer is read before a
# record is settled by it; FailedRecordCount must be there and is not believed.

cdef struct Outcome:
    # of one entry
    Text code  # p NULL: stored
    Text message
    size_t at  # offset of the entry

cdef struct Answer:
    size_t failed
    Py_ssize_t encryption  # offset of the EncryptionType string, or -1

cdef enum AnswerStatus:
    ANSWER_OK = 0
    ANSWER_NOT_JSON
    ANSWER_NOT_OBJECT
    ANSWER_NO_RECORDS
    ANSWER_NO_COUNT
    ANSWER_RECORDS_TYPE
    ANSWER_TOO_MANY
    ANSWER_TOO_FEW
    ANSWER_ENTRY_TYPE
    ANSWER_CODE_TYPE
    ANSWER_NO_PLACE
    ANSWER_TWICE


cdef inline bint text_is(const Text* text, const char* word, size_t length) noexcept nogil:
    return text.length == length and memcmp(text.p, word, length) == 0


cdef inline bint outcome_alike(const Outcome* a, const Outcome* b) noexcept nogil:
    return (a.code.length == b.code.length and a.message.length == b.message.length
            and memcmp(a.code.p, b.code.p, a.code.length) == 0
            and (a.message.length == 0 or memcmp(a.message.p, b.message.p, a.message.length) == 0))


cdef inline int answer_string(Cursor* c, Text* out) noexcept nogil:
    """A string or null (p NULL): 0; -1: malformed; 1: something else, skipped."""
    cdef int byte = json_blank(c)
    if byte == c'"':
        return json_string(c, out)
    out.p = NULL
    out.length = 0
    if byte == c"n":
        return json_word(c, "null", 4)
    return -1 if json_skip(c) < 0 else 1


cdef AnswerStatus answer_entry(Cursor* c, Outcome* out) noexcept nogil:
    """One entry of Records; c.p is at its brace."""
    cdef Text name
    cdef Text place
    cdef bint shard = False
    cdef bint sequence = False
    cdef int status
    cdef int byte
    out.code.p = NULL
    out.message.p = NULL
    out.message.length = 0
    c.p += 1
    if json_blank(c) == c"}":
        c.p += 1
        return ANSWER_NO_PLACE
    while True:
        if json_name(c, &name) < 0:
            return ANSWER_NOT_JSON
        if text_is(&name, "SequenceNumber", 14):
            status = answer_string(c, &place)
            sequence = status == 0 and place.p != NULL and place.length > 0
        elif text_is(&name, "ShardId", 7):
            status = answer_string(c, &place)
            shard = status == 0 and place.p != NULL and place.length > 0
        elif text_is(&name, "ErrorCode", 9):
            status = answer_string(c, &out.code)
            if status == 1:
                return ANSWER_CODE_TYPE
            if out.code.length == 0:
                out.code.p = NULL
        elif text_is(&name, "ErrorMessage", 12):
            status = answer_string(c, &out.message)
        else:
            status = json_skip(c)
        if status < 0:
            return ANSWER_NOT_JSON
        byte = json_blank(c)
        if byte == c",":
            c.p += 1
        elif byte == c"}":
            c.p += 1
            break
        else:
            return ANSWER_NOT_JSON
    if out.code.p == NULL and not (shard and sequence):
        return ANSWER_NO_PLACE
    return ANSWER_OK


cdef AnswerStatus answer_records(Cursor* c, const uint8_t* data, size_t count, Outcome* outcomes,
                                 size_t* seen, size_t* failed) noexcept nogil:
    cdef AnswerStatus status
    cdef int byte
    if json_blank(c) != c"[":
        return ANSWER_RECORDS_TYPE
    c.p += 1
    if json_blank(c) == c"]":
        c.p += 1
        return ANSWER_TOO_FEW if count else ANSWER_OK
    while True:
        if json_blank(c) != c"{":
            return ANSWER_ENTRY_TYPE
        if seen[0] == count:
            return ANSWER_TOO_MANY
        outcomes[seen[0]].at = <size_t> (c.p - data)
        status = answer_entry(c, &outcomes[seen[0]])
        if status != ANSWER_OK:
            return status
        if outcomes[seen[0]].code.p != NULL:
            failed[0] += 1
        seen[0] += 1
        byte = json_blank(c)
        if byte == c",":
            c.p += 1
        elif byte == c"]":
            c.p += 1
            return ANSWER_OK if seen[0] == count else ANSWER_TOO_FEW
        else:
            return ANSWER_NOT_JSON


cdef AnswerStatus answer_read(const uint8_t* data, size_t length, size_t count, Outcome* outcomes,
                              Answer* answer, size_t* seen, size_t* at) noexcept nogil:
    """The whole answer; outcomes has room for `count`. On error `at` says where."""
    cdef Cursor c
    cdef Text name
    cdef Text text
    cdef AnswerStatus status = ANSWER_NOT_JSON
    cdef bint records = False
    cdef bint counted = False
    cdef int byte
    answer.failed = 0
    answer.encryption = -1
    seen[0] = 0
    c.p = data
    c.end = data + length
    if json_blank(&c) != c"{":
        at[0] = <size_t> (c.p - data)
        return ANSWER_NOT_OBJECT
    c.p += 1
    if json_blank(&c) == c"}":
        at[0] = <size_t> (c.p - data)
        return ANSWER_NO_RECORDS
    while True:
        status = ANSWER_NOT_JSON
        if json_name(&c, &name) < 0:
            break
        if text_is(&name, "Records", 7):
            if records:
                status = ANSWER_TWICE
                break
            records = True
            status = answer_records(&c, data, count, outcomes, seen, &answer.failed)
            if status != ANSWER_OK:
                break
            status = ANSWER_NOT_JSON
        elif text_is(&name, "FailedRecordCount", 17):
            byte = json_blank(&c)
            if (byte != c"-" and not c"0" <= byte <= c"9") or json_number(&c) < 0:
                status = ANSWER_NO_COUNT
                break
            counted = True
        elif text_is(&name, "EncryptionType", 14):
            if json_blank(&c) == c'"':
                answer.encryption = c.p - data
                if json_string(&c, &text) < 0:
                    break
            elif json_skip(&c) < 0:
                break
        elif json_skip(&c) < 0:
            break
        byte = json_blank(&c)
        if byte == c",":
            c.p += 1
            continue
        if byte != c"}":
            break
        c.p += 1
        if json_blank(&c) >= 0:
            break
        status = ANSWER_OK if records and counted else ANSWER_NO_COUNT if records else ANSWER_NO_RECORDS
        break
    at[0] = <size_t> (c.p - data)
    return status


cdef int answer_scan(bytes data, size_t count, Outcome* outcomes, Answer* answer) except -1:
    cdef size_t seen = 0
    cdef size_t at = 0
    cdef AnswerStatus status = answer_read(
        <const uint8_t*> PyBytes_AS_STRING(data), <size_t> PyBytes_GET_SIZE(data), count, outcomes, answer,
        &seen, &at,
    )
    if status == ANSWER_OK:
        return 0
    why = {
        ANSWER_NOT_OBJECT: "it is no JSON object",
        ANSWER_NO_RECORDS: "Records is missing",
        ANSWER_NO_COUNT: "FailedRecordCount is missing or no number",
        ANSWER_RECORDS_TYPE: "Records is no array",
        ANSWER_TOO_MANY: f"it has more entries than the {count} records sent",
        ANSWER_TOO_FEW: f"it has {seen} entries for {count} records sent",
        ANSWER_ENTRY_TYPE: "an entry is no object",
        ANSWER_CODE_TYPE: "an ErrorCode is no string",
        ANSWER_NO_PLACE: "an entry has neither an ErrorCode nor both ShardId and SequenceNumber",
        ANSWER_TWICE: "Records is there twice",
    }.get(status, "it is not JSON")
    raise UnexpectedResponse("UnexpectedResponse", f"the answer cannot be used: {why} (byte {at})")


cdef object answer_result(bytes data, Py_ssize_t at, Py_ssize_t encryption):
    """PutResult of the entry at that offset of an answer that was read before."""
    cdef Cursor c
    cdef Text name
    cdef Text shard
    cdef Text sequence
    cdef Text kind
    cdef const uint8_t* start = <const uint8_t*> PyBytes_AS_STRING(data)
    shard.p = sequence.p = kind.p = NULL
    c.p = start + at + 1
    c.end = start + PyBytes_GET_SIZE(data)
    while json_name(&c, &name) == 0:
        if text_is(&name, "ShardId", 7):
            answer_string(&c, &shard)
        elif text_is(&name, "SequenceNumber", 14):
            answer_string(&c, &sequence)
        elif json_skip(&c) < 0:
            break
        if json_blank(&c) != c",":
            break
        c.p += 1
    if encryption >= 0:
        c.p = start + encryption
        json_string(&c, &kind)
    return PutResult(json_text(&shard), json_text(&sequence), json_text(&kind) if kind.p != NULL else None)

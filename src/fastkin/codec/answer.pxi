# The answer to one call, entry by entry; nothing else reads one. Real Kinesis, kinesalite and kinesis-mock differ in
# key order, blanks and in "ErrorCode":null on success; a hostile endpoint may send anything. The whole answer is read
# before a record is settled by it; the count of failures (FailedRecordCount) must be there and is not believed.

cdef struct Outcome:
    # of one entry
    Text code  # p NULL: stored
    Text message
    size_t at  # offset of the entry

cdef struct Answer:
    size_t failed
    Py_ssize_t encryption  # offset of the EncryptionType string, or -1

cdef struct Word:
    # A name as an answer has it; the AnswerNames that it belongs to keeps the bytes. Two of them are compared for each
    # record, and a call of memcmp for bytes whose number is not known beforehand costs more than all else of it: so
    # names of 4 to 16 bytes are compared by their first and last 8 (or 4) bytes, which overlap.
    const char* p
    size_t length
    size_t piece  # 8, 4, or 0: by memcmp
    uint64_t head
    uint64_t tail


@cython.final
cdef class AnswerNames:
    """What one operation calls the members of its answer: the list of entries, the count of failed ones, and in an
    entry that is stored, one or two that say where. ErrorCode and ErrorMessage are the same everywhere."""

    cdef tuple names
    cdef Word entries
    cdef Word failed
    cdef Word[2] place  # the second one may be empty

    def __cinit__(self, str entries not None, str failed not None, *places):
        if not 1 <= len(places) <= 2:
            raise LibraryError("one or two members of an entry tell where it is stored")
        self.names = tuple([name.encode() for name in (entries, failed, *places)])
        self.entries = word_of(self.names[0])
        self.failed = word_of(self.names[1])
        self.place[0] = word_of(self.names[2])
        self.place[1] = word_of(self.names[3] if len(places) == 2 else b"")

    def __repr__(self) -> str:
        return f"AnswerNames{tuple([name.decode() for name in self.names])}"


cdef Word word_of(bytes name):
    cdef Word word
    word.p = PyBytes_AS_STRING(name)
    word.length = <size_t> PyBytes_GET_SIZE(name)
    word.piece = 8 if 8 <= word.length <= 16 else 4 if 4 <= word.length < 8 else 0
    word.head = word.tail = 0
    if word.piece:
        memcpy(&word.head, word.p, word.piece)
        memcpy(&word.tail, word.p + word.length - word.piece, word.piece)
    return word


cdef AnswerNames _PUT_RECORDS = AnswerNames("Records", "FailedRecordCount", "SequenceNumber", "ShardId")
PUT_RECORDS_ANSWER = _PUT_RECORDS


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


cdef enum:
    PATTERNS = 8  # at most that many in one answer


cdef inline void outcome_clear(Outcome* out) noexcept nogil:
    out.code.p = NULL
    out.message.p = NULL
    out.message.length = 0


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


cdef inline bint word_is(const Text* text, const Word* word) noexcept nogil:
    cdef uint64_t head = 0
    cdef uint64_t tail = 0
    if text.length != word.length:
        return False
    if word.piece == 8:
        memcpy(&head, text.p, 8)
        memcpy(&tail, text.p + text.length - 8, 8)
    elif word.piece == 4:
        memcpy(&head, text.p, 4)
        memcpy(&tail, text.p + text.length - 4, 4)
    else:
        return memcmp(text.p, word.p, word.length) == 0
    return head == word.head and tail == word.tail


cdef AnswerStatus answer_entry(Cursor* c, const Word* place_names, Outcome* out, Text* places) noexcept nogil:
    """One entry of the list; c.p is at its brace. `places`: what the members named in `place_names` say, two Texts."""
    cdef Text name
    cdef bint first = False
    cdef bint second = place_names[1].length == 0
    cdef int status
    cdef int byte
    outcome_clear(out)
    places[0].p = places[1].p = NULL
    c.p += 1
    if json_blank(c) == c"}":
        c.p += 1
        return ANSWER_NO_PLACE
    while True:
        if json_name(c, &name) < 0:
            return ANSWER_NOT_JSON
        if word_is(&name, &place_names[0]):
            status = answer_string(c, &places[0])
            first = status == 0 and places[0].p != NULL and places[0].length > 0
        elif place_names[1].length and word_is(&name, &place_names[1]):
            status = answer_string(c, &places[1])
            second = status == 0 and places[1].p != NULL and places[1].length > 0
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
    if out.code.p == NULL and not (first and second):
        return ANSWER_NO_PLACE
    return ANSWER_OK


cdef void answer_learn(fk_pattern* pattern, const uint8_t* entry, size_t length, const Text* places) noexcept nogil:
    """The next entries are likely to be as this stored one, but for what `places` say."""
    cdef int i
    if not fk_pattern_set(pattern, entry, length):
        return
    for i in range(2):
        if places[i].p != NULL and not places[i].escaped:
            fk_pattern_open(pattern, <size_t> (places[i].p - entry), places[i].length)


cdef AnswerStatus answer_records(Cursor* c, const Word* place_names, const uint8_t* data, size_t count,
                                 Outcome* outcomes, size_t* seen, size_t* failed) noexcept nogil:
    cdef AnswerStatus status
    cdef int byte
    cdef fk_pattern pattern
    cdef int learned = 0
    cdef Text[2] places
    cdef Outcome* out
    cdef const uint8_t* entry
    pattern.length = 0
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
        entry = c.p
        out = &outcomes[seen[0]]
        out.at = <size_t> (entry - data)
        if fk_pattern_is(&pattern, entry, <size_t> (c.end - entry)):
            outcome_clear(out)
            c.p += pattern.length
        else:
            status = answer_entry(c, place_names, out, places)
            if status != ANSWER_OK:
                return status
            if out.code.p != NULL:
                failed[0] += 1
            elif learned < PATTERNS:  # where no two are alike, learning would be for nothing each time
                learned += 1
                answer_learn(&pattern, entry, <size_t> (c.p - entry), places)
        seen[0] += 1
        byte = json_blank(c)
        if byte == c",":
            c.p += 1
        elif byte == c"]":
            c.p += 1
            return ANSWER_OK if seen[0] == count else ANSWER_TOO_FEW
        else:
            return ANSWER_NOT_JSON


cdef AnswerStatus answer_read(AnswerNames names, const uint8_t* data, size_t length, size_t count, Outcome* outcomes,
                              Answer* answer, size_t* seen, size_t* at) noexcept:
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
        if word_is(&name, &names.entries):
            if records:
                status = ANSWER_TWICE
                break
            records = True
            status = answer_records(&c, names.place, data, count, outcomes, seen, &answer.failed)
            if status != ANSWER_OK:
                break
            status = ANSWER_NOT_JSON
        elif word_is(&name, &names.failed):
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


cdef int answer_scan(AnswerNames names, bytes data, size_t count, Outcome* outcomes, Answer* answer) except -1:
    cdef size_t seen = 0
    cdef size_t at = 0
    cdef AnswerStatus status = answer_read(
        names, <const uint8_t*> PyBytes_AS_STRING(data), <size_t> PyBytes_GET_SIZE(data), count, outcomes, answer,
        &seen, &at,
    )
    if status == ANSWER_OK:
        return 0
    entries, failed, *places = [name.decode() for name in names.names]
    place = f"both {places[1]} and {places[0]}" if len(places) == 2 else places[0]
    why = {
        ANSWER_NOT_OBJECT: "it is no JSON object",
        ANSWER_NO_RECORDS: f"{entries} is missing",
        ANSWER_NO_COUNT: f"{failed} is missing or no number",
        ANSWER_RECORDS_TYPE: f"{entries} is no array",
        ANSWER_TOO_MANY: f"it has more entries than the {count} records sent",
        ANSWER_TOO_FEW: f"it has {seen} entries for {count} records sent",
        ANSWER_ENTRY_TYPE: "an entry is no object",
        ANSWER_CODE_TYPE: "an ErrorCode is no string",
        ANSWER_NO_PLACE: f"an entry has neither an ErrorCode nor {place}",
        ANSWER_TWICE: f"{entries} is there twice",
    }.get(status, "it is not JSON")
    raise UnexpectedResponse("UnexpectedResponse", f"the answer cannot be used: {why} (byte {at})")


cdef object answer_result(bytes data, Py_ssize_t at, Py_ssize_t encryption):
    """PutResult of the entry at that offset of an answer that was read before. A RecordId, which other operations than
    PutRecords tell, is a sequence number for who put the record."""
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
        elif text_is(&name, "SequenceNumber", 14) or text_is(&name, "RecordId", 8):
            answer_string(&c, &sequence)
        elif json_skip(&c) < 0:
            break
        if json_blank(&c) != c",":
            break
        c.p += 1
    if encryption >= 0:
        c.p = start + encryption
        json_string(&c, &kind)
    return PutResult(json_text(&shard) if shard.p != NULL else None, json_text(&sequence),
                     encryption_type(json_text(&kind)) if kind.p != NULL else NO_ENCRYPTION)

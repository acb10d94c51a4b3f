# Payloads in, closed batches out. A record gets its key, its size is checked, and it is written into the open batch,
# which is the body of a call. It is copied once, from where it was received straight into that body, as base64.
#
# Limits are checked before a record is written, for Kinesis refuses a whole call for one bad record. The budget is
# asked before anything of a message is taken: a message that does not fit is refused whole, and offered again later.

cdef enum:
    # What a reject costs besides its payload and topic: the object, its reason, and until it is stored a letter,
    # its closures and a place in a queue.
    REJECT_BYTES = 1536
    REJECT_TOPIC = 5  # the topic as bytes, and as text of up to four bytes a character
    OVERHEAD_LEAST = 4194304  # bytes the records of one frame may cost besides their data, in any budget

cdef struct Slot:
    # of one record in a payload whose records differ: its verdict, and its key in the arena
    Verdict verdict
    int32_t shard
    size_t raw
    size_t raw_length
    size_t body
    size_t body_length


@cython.final
@cython.no_gc_clear
cdef class Batcher(Sink):
    """Builds batches for one destination. Records are encoded once, straight into the open body."""

    cdef _Accounting accounting
    cdef readonly Budget budget
    cdef KeyPlan plan
    cdef ShardTable table
    cdef Batch open
    cdef object closed
    cdef list rejects
    cdef public bint dirty
    cdef unsigned long owner  # the thread that may put if there is room
    cdef object is_running  # of that thread's loop
    cdef object attend  # told of news by put_if_room(); None: nobody may put so
    cdef int wanted  # why the open batch may be taken as it is; -1: not yet
    cdef readonly unsigned long long opened  # open batches there were: tells one from the next
    cdef PayloadFormat format  # of what is offered to the batcher itself
    cdef size_t max_record_bytes
    cdef size_t group_most  # bytes of an aggregate; 0: every record is an entry of its own
    cdef size_t line_most  # bytes of a Kinesis record of lines; 0: none are made
    cdef Aggregate group
    # how large the last batch became: where the next one starts
    cdef size_t body_hint
    cdef size_t count_hint
    cdef uint64_t missing
    cdef uint64_t flushed[6]
    # the key of the last topic
    cdef bint known
    cdef Key known_key
    cdef Buf known_topic
    cdef Buf known_text
    # the key of a put that needs escapes
    cdef Buf put_text
    # keys of a payload's records, when they differ
    cdef Slot* slots
    cdef size_t slot_room
    cdef Buf arena

    def __cinit__(self, *, Settler settler, Budget budget not None, frame, KeyPlan key not None,
                  bytes target not None, size_t max_records=limits.CALL_RECORDS,
                  size_t max_batch_bytes=limits.DEFAULT_CALL_BYTES,
                  size_t max_record_bytes=limits.RECORD_BYTES, size_t aggregate_bytes=0, size_t line_bytes=0,
                  Settler rows=None,
                  Budget replay=None, AnswerNames answer=None):
        self.format = format_of(frame)
        if not 1 <= max_records <= ENTRIES_MOST:
            raise LibraryError(f"max_records is 1 to {ENTRIES_MOST}, not {max_records}")
        if not 1 <= max_batch_bytes <= BODY_MOST or max_record_bytes < 1:
            raise LibraryError(f"max_batch_bytes is 1 to {BODY_MOST}, max_record_bytes at least 1")
        self.accounting = _Accounting.__new__(_Accounting)
        self.accounting.settler = settler
        self.accounting.budget = self.budget = budget
        self.accounting.target = target
        self.accounting.answer = _PUT_RECORDS if answer is None else answer
        self.accounting.rows = rows
        self.accounting.replay = budget if replay is None else replay
        self.accounting.max_records = max_records
        self.accounting.max_batch_bytes = max_batch_bytes
        self.max_record_bytes = min(max_record_bytes, max_batch_bytes)
        self.plan = key
        self.set_aggregate_bytes(aggregate_bytes)
        if line_bytes and aggregate_bytes:
            raise LibraryError("aggregate_bytes and line_bytes are two ways to do the same: choose one")
        self.line_most = min(line_bytes, self.max_record_bytes)
        self.closed = deque()
        self.wanted = -1
        self.rejects = []
        self.body_hint = BODY_START
        self.count_hint = ENTRIES_START

    def __dealloc__(self):
        if self.group.records:
            self.close_group()
        aggregate_free(&self.group)
        buf_free(&self.known_topic)
        buf_free(&self.known_text)
        buf_free(&self.put_text)
        buf_free(&self.arena)
        free(self.slots)

    cdef int set_aggregate_bytes(self, size_t aggregate_bytes) except -1:
        if aggregate_bytes and self.plan.none:
            raise LibraryError("records without a key cannot be aggregated: consumers would drop them")
        self.group_most = min(aggregate_bytes, self.max_record_bytes)
        return 0

    # -- keys

    cdef int locate(self, Key* key) except -1:
        """The shard of a text key."""
        key.shard = -1
        if self.table is not None and key.verdict == KEY_TEXT:
            key.shard = self.table.locate(wide_md5(key.raw, key.raw_length))
        return 0

    cdef int topic_key(self, const uint8_t* topic, size_t length, Key* key) except -1:
        """The key that all records of a payload share."""
        cdef uint8_t raw[KEY_BYTES]
        cdef size_t n = 0
        key.shard = -1
        if self.plan.uuid:
            key.verdict = KEY_UUID
            return 0
        if self.plan.content:
            key.verdict = KEY_CONTENT  # its digest is made when the payload is taken
            return 0
        if self.plan.none:
            key.verdict = KEY_NONE
            return 0
        if self.known and (self.plan.fixed or (
                length == self.known_topic.length
                and (length == 0 or memcmp(topic, self.known_topic.p, length) == 0))):
            key[0] = self.known_key
            return 0
        self.known = False
        self.known_topic.length = 0
        buf_need(&self.known_topic, length + 1)
        if length:
            memcpy(self.known_topic.p, topic, length)
        self.known_topic.length = length
        key.verdict = self.plan.build(topic, length, NULL, 0, raw, &n)
        if key.verdict == KEY_TEXT:
            check_memory(key_store(&self.known_text, raw, n, key))
        self.locate(key)
        self.known_key = key[0]
        self.known = True
        return 0

    cdef int slot_key(self, Slot* slot, const uint8_t* topic, size_t topic_length, const uint8_t* data,
                      size_t length) except -1:
        """A key that depends on the record, into the arena."""
        cdef uint8_t raw[KEY_BYTES]
        cdef size_t n = 0
        cdef size_t escaped
        slot.verdict = self.plan.build(topic, topic_length, data, length, raw, &n)
        slot.shard = -1
        if slot.verdict != KEY_TEXT:
            return 0
        escaped = key_escaped(raw, n)
        buf_need(&self.arena, n + escaped)
        slot.raw = slot.body = self.arena.length
        slot.raw_length = n
        slot.body_length = escaped
        memcpy(self.arena.p + slot.raw, raw, n)
        self.arena.length += n
        if escaped != n:
            slot.body = self.arena.length
            key_escape(raw, n, self.arena.p + slot.body)
            self.arena.length += escaped
        if self.table is not None:
            slot.shard = self.table.locate(wide_md5(self.arena.p + slot.raw, n))
        return 0

    cdef inline void key_of(self, const Slot* slot, Key* key) noexcept:
        key.verdict = slot.verdict
        key.shard = slot.shard
        if slot.verdict != KEY_TEXT:
            return
        key.raw = self.arena.p + slot.raw
        key.raw_length = slot.raw_length
        key.body = self.arena.p + slot.body
        key.body_length = slot.body_length

    # -- the open batch

    cdef Batch start(self):
        self.open = Batch.new(self.accounting, self.body_hint, self.count_hint)
        self.dirty = True
        self.opened += 1
        return self.open

    cdef int close(self, int why) except -1:
        cdef Batch batch = self.open
        self.body_hint = batch.body.length + batch.body.length // 16 + 256
        self.count_hint = max(batch.count, <size_t> ENTRIES_START)
        batch.finish_body(why, None)
        self.open = None
        self.wanted = -1
        self.closed.append(batch)
        self.flushed[why] += 1
        self.dirty = True
        return 0

    cdef int append(self, const uint8_t* data, size_t length, const Key* key, const char* hash_key,
                    size_t hash_length, uint64_t token, uint32_t kind, uint32_t records) except -1:
        """One entry into the open body; the record was checked. Charges the budget."""
        cdef size_t size = length + key_counts(key)
        cdef Batch batch = self.open
        cdef Entry* entry
        cdef Run* run
        cdef char* p
        cdef size_t i
        if batch is not None and batch.total + size > self.accounting.max_batch_bytes:
            self.close(FLUSH_FULL_BYTES)
            batch = None
        if batch is None:
            batch = self.start()
        entry = batch.next_entry()
        buf_need(&batch.body, entry_most(length, key, hash_length) + 1)
        p = batch.body.p + batch.body.length
        if batch.count:
            p[0] = c","
            p += 1
        entry.at = <uint32_t> (p - batch.body.p)
        p = entry_write(p, data, length, key, hash_key, hash_length)
        if kind >= ENTRY_RUNS:
            token = <uint64_t> batch.run_count << 32 | self.group.run_count
            for i in range(self.group.run_count):
                run = &(<Run*> self.group.runs.p)[i]
                batch.add_run(run.token, run.count, run.kind)
        entry.token = token
        entry.length = <uint32_t> (p - batch.body.p) - entry.at
        entry.size = <uint32_t> size
        entry.shard = key.shard
        # With a hash key of its own it is stored there, whatever its key is.
        entry.drawn = (key.verdict == KEY_UUID or key.verdict == KEY_MISSING) and hash_length == 0
        if entry.drawn and self.table is not None and self.table.odds != NULL:
            if batch.placed_by is not self.table:
                batch.place(self.table)
            entry.shard = self.table.draw(entry_drawn_key(p))
        entry.records = records
        entry.kind = kind
        batch.body.length = <size_t> (p - batch.body.p)
        batch.close_entry(entry)
        self.budget.charge(entry_cost(entry), records)
        if batch.count == self.accounting.max_records:
            self.close(FLUSH_FULL_COUNT)
        return 0

    cdef inline int store(self, const uint8_t* data, size_t length, const Key* key, uint64_t token,
                          uint32_t kind) except -1:
        """One checked record, aggregated or not."""
        if self.line_most:
            return self.line_record(data, length, key, token, kind)
        if self.group_most:
            return self.group_record(data, length, key, token, kind)
        return self.append(data, length, key, NULL, 0, token, kind, 1)

    cdef int group_record(self, const uint8_t* data, size_t length, const Key* key, uint64_t token,
                          uint32_t kind) except -1:
        cdef Aggregate* group = &self.group
        if group.records and not (aggregate_key_is(group, key, token)
                                  and aggregate_fits(group, length, self.group_most, self.max_record_bytes)):
            self.close_group()
        if group.records == 0:
            check_memory(aggregate_start(group, key))
            if not aggregate_fits(group, length, self.group_most, self.max_record_bytes):
                return self.append(data, length, key, NULL, 0, token, kind, 1)
            if self.open is None:
                self.dirty = True
                self.opened += 1
        check_memory(aggregate_add(group, data, length, token, kind))
        self.budget.charge(aggregate_cost(length, kind), 1)
        group.charged += aggregate_cost(length, kind)
        return 0

    cdef int line_record(self, const uint8_t* data, size_t length, const Key* key, uint64_t token,
                         uint32_t kind) except -1:
        cdef Aggregate* group = &self.group
        cdef bint possible = line_possible(data, length)
        if group.records and not (possible and aggregate_key_is(group, key, token)
                                  and line_fits(group, length, self.line_most, self.max_record_bytes)):
            self.close_group()
        if not possible:
            return self.append(data, length, key, NULL, 0, token, kind, 1)
        if group.records == 0:
            check_memory(aggregate_open(group, key))
            if self.open is None:
                self.dirty = True
                self.opened += 1
        # also one that is larger than all lines may be together: its line ends must go
        check_memory(line_add(group, data, length, token, kind))
        self.budget.charge(aggregate_cost(length, kind), 1)
        group.charged += aggregate_cost(length, kind)
        return 0

    cdef int close_group(self) except -1:
        """The open aggregate becomes an entry; a single record goes out plain."""
        cdef Aggregate* group = &self.group
        cdef uint32_t records = group.records
        cdef Run* run = <Run*> group.runs.p
        if not self.line_most:
            check_memory(aggregate_finish(group))
        self.budget.release(group.charged, records)
        group.charged = 0
        group.records = 0
        if records == 1:
            self.append(<const uint8_t*> group.bytes.p + group.first, group.first_length, &group.key, NULL, 0,
                        run.token, run.kind, 1)
        else:
            self.append(<const uint8_t*> group.bytes.p, group.bytes.length, &group.key, NULL, 0, 0,
                        ENTRY_RUNS_HELD if group.held else ENTRY_RUNS, records)
        return 0

    # -- payloads

    cdef int reject(self, const uint8_t* topic, size_t topic_length, const uint8_t* data, size_t length,
                    str kind, str reason, size_t offset, object index, uint64_t token) except -1:
        cdef int collecting = PyGC_Disable()  # see Batch.new
        cdef Reject reject = Reject.__new__(Reject)
        if collecting:
            PyGC_Enable()
        reject.topic = PyBytes_FromStringAndSize(<const char*> topic, <Py_ssize_t> topic_length)
        reject.payload = PyBytes_FromStringAndSize(<const char*> data, <Py_ssize_t> length)
        reject.kind = kind
        reject.reason = reason
        reject.offset = <Py_ssize_t> offset
        reject.index = index
        reject.token = token
        reject.cost = length + REJECT_TOPIC * topic_length + REJECT_BYTES
        reject.accounting = self.accounting
        self.budget.charge(reject.cost, 1)
        self.rejects.append(reject)
        self.dirty = True
        return 0

    cdef inline bint no_room(self, uint64_t cost, uint64_t records) noexcept:
        if self.budget.fits(cost, records):
            return False
        self.budget.stalled = True
        return True

    cdef inline bint too_many(self, const Payload* payload, uint64_t overhead) noexcept:
        """Would what records cost besides their data fill the budget on its own? A frame of millions of empty
        records is a few MiB on the wire, and would be a hundred times that here. What is larger than a small
        budget is taken all the same when nothing is held, within reason."""
        return (payload.count > max(self.budget.max_records, <uint64_t> ENTRIES_MOST)
                or overhead > max(self.budget.max_bytes, <uint64_t> OVERHEAD_LEAST))

    cdef Py_ssize_t refuse_frame(self, const uint8_t* topic, size_t topic_length, const Payload* payload,
                                 uint64_t token) except -2:
        return self.refuse_whole(topic, topic_length, payload.whole, payload.whole_length, "records",
                                 f"{payload.count} records in one frame: more than the budget can hold", 0, token)

    cdef Py_ssize_t refuse_whole(self, const uint8_t* topic, size_t topic_len, const uint8_t* data,
                                 size_t length, str kind, str reason, size_t offset, uint64_t token) except -2:
        """A whole payload that is set aside, none of its records taken."""
        if self.no_room(length + REJECT_TOPIC * topic_len + REJECT_BYTES, 1):
            return OFFER_STALLED
        self.accounting.received += 1
        self.reject(topic, topic_len, data if length else <const uint8_t*> b"", length, kind,
                    reason, offset, None, token)
        return 1

    cdef Py_ssize_t offer_c(self, const uint8_t* topic, size_t topic_len, const uint8_t* data,
                            size_t length, uint64_t token) except -2:
        return self.offer_as(self.format, None, topic, topic_len, data, length, token)

    cdef Py_ssize_t offer_as(self, PayloadFormat format, Shape shape, const uint8_t* topic, size_t topic_len,
                             const uint8_t* data, size_t length, uint64_t token) except -2:
        """A payload of this format, which need not be the batcher's own; `shape`: what its records become."""
        cdef Payload payload
        if length == 0:
            data = <const uint8_t*> b""  # a pointer to nothing may be NULL: never hand that on
        if format.records is not None:
            return self.offer_made(format, shape, topic, topic_len, data, length, token)
        payload.data = payload.whole = data
        payload.length = payload.whole_length = length
        if format.scan(&payload):
            if shape is not None:
                return self.take_shaped(shape, topic, topic_len, format, &payload, token)
            return self.take_records(topic, topic_len, format, &payload, token, ENTRY_TOKEN, False)
        return self.refuse_scanned(format, topic, topic_len, &payload, token)

    cdef Py_ssize_t refuse_scanned(self, PayloadFormat format, const uint8_t* topic, size_t topic_len,
                                   const Payload* payload, uint64_t token) except -2:
        kind, reason = format.reason(payload)
        return self.refuse_whole(topic, topic_len, payload.data, payload.length, kind, reason, payload.at, token)

    cdef Py_ssize_t offer_made(self, PayloadFormat format, Shape shape, const uint8_t* topic, size_t topic_len,
                               const uint8_t* data, size_t length, uint64_t token) except -2:
        """The same for a format in Python."""
        cdef Payload payload
        try:
            made = records_made(format, topic, topic_len, data, length)
            format.read(&payload, data, length, made)
        except DataFormatError as error:
            # a wrong offset is a bug of the format: it must not become an error of the connection
            at = error.offset if type(error.offset) is int and 0 <= error.offset <= length else 0
            return self.refuse_whole(topic, topic_len, data, length, "format", str(error.reason), at, token)
        if shape is not None:
            return self.take_shaped(shape, topic, topic_len, format, &payload, token)
        return self.take_records(topic, topic_len, format, &payload, token, ENTRY_TOKEN, False)

    cdef Py_ssize_t take_shaped(self, Shape shape, const uint8_t* topic, size_t topic_length, PayloadFormat format,
                                const Payload* payload, uint64_t token) except -2:
        """As take_records, when records become others first."""
        cdef Payload made
        cdef Py_ssize_t taken
        shape.set_topic(topic, topic_length)
        # A topic may have 64 KiB, and a frame millions of records: asked before anything is made of them.
        if payload.count > 1 and self.too_many(payload, payload.count * (shape.grows() + sizeof(Entry))):
            return self.refuse_frame(topic, topic_length, payload, token)
        if not shape.shape(topic, topic_length, format, payload, &made):
            return self.refuse_whole(topic, topic_length, payload.whole, payload.whole_length, shape.kind, shape.reason,
                                     shape.at, token)
        taken = self.take_records(topic, topic_length, SHAPED, &made, token, ENTRY_TOKEN, False)
        if taken != OFFER_STALLED:  # else they come again
            self.accounting.received += payload.count - made.count
            self.accounting.ended[OUT_FILTERED] += payload.count - made.count
        shape.trim()
        return taken

    cdef Py_ssize_t take_records(self, const uint8_t* topic, size_t topic_length, PayloadFormat format,
                                 const Payload* payload, uint64_t token, uint32_t kind, bint strict) except -2:
        """The records of a payload that was scanned. `strict`: raise for a bad one and take nothing,
        never stall; else set it aside."""
        cdef Key key
        cdef PayloadNext next_ = format.next
        cdef size_t at = payload.first
        cdef size_t begin
        cdef size_t length = 0
        cdef uint64_t cost
        if payload.count == 0:
            return 0
        random_ready()
        if self.plan.reads_data:
            return self.take_mixed(topic, topic_length, format, payload, token, kind, strict, NULL)
        self.topic_key(topic, topic_length, &key)
        if key.verdict >= BAD_SIZE or payload.longest + key_counts(&key) > self.max_record_bytes:
            return self.take_mixed(topic, topic_length, format, payload, token, kind, strict, &key)
        if not strict:
            cost = payload.count * entry_overhead(&key)
            if payload.count > 1 and self.too_many(payload, cost):
                return self.refuse_frame(topic, topic_length, payload, token)
            if self.no_room(cost + entry_data_most(payload.data_bytes, payload.count), payload.count):
                return OFFER_STALLED
        self.accounting.received += payload.count
        if key.verdict == KEY_MISSING:
            self.missing += payload.count
        if key.verdict == KEY_CONTENT:
            key_digest(&key, topic, topic_length, payload.whole, payload.whole_length)
        for _ in range(payload.count):
            begin = next_(payload, &at, &length)
            self.store(payload.data + begin, length, &key, token, kind)
            key.index += 1
        return <Py_ssize_t> payload.count

    cdef Py_ssize_t take_mixed(self, const uint8_t* topic, size_t topic_length, PayloadFormat format,
                               const Payload* payload, uint64_t token, uint32_t kind, bint strict,
                               const Key* shared) except -2:
        """As take_records, when each record has a verdict of its own (`shared`: the key all have)."""
        cdef Key key
        cdef Key common
        cdef Slot* slot
        cdef Slot* slots
        cdef PayloadNext next_ = format.next
        cdef const uint8_t* data
        cdef size_t at = payload.first
        cdef size_t begin
        cdef size_t length = 0
        cdef size_t i
        cdef uint64_t cost = 0  # of all
        cdef uint64_t overhead = 0  # of that, what is not data
        # before the tables are made, what every record costs at least; then with what keys they have
        if not strict and self.too_many(payload, payload.count * (sizeof(Slot) + sizeof(Entry))):
            return self.refuse_frame(topic, topic_length, payload, token)
        if payload.count > self.slot_room:
            slots = <Slot*> take_memory(self.slots, payload.count * sizeof(Slot))
            self.slots = slots
            self.slot_room = payload.count
        self.arena.length = 0
        for i in range(payload.count):
            begin = next_(payload, &at, &length)
            slot = &self.slots[i]
            if shared == NULL:
                self.slot_key(slot, topic, topic_length, payload.data + begin, length)
                self.key_of(slot, &key)
            else:
                key = shared[0]
                slot.verdict = key.verdict
            if slot.verdict < BAD_SIZE and length + key_counts(&key) > self.max_record_bytes:
                slot.verdict = BAD_SIZE
            if slot.verdict >= BAD_SIZE:
                if strict:
                    which = f"record {i} of the frame: " if self.index_of(payload, i, length) is not None else ""
                    raise RecordError(which + self.why_bad(slot.verdict, &key, length))
                cost += length
                overhead += REJECT_TOPIC * topic_length + REJECT_BYTES
            else:
                cost += entry_data_most(length, 1)
                overhead += entry_overhead(&key)
            if not strict and self.too_many(payload, overhead):
                self.trim_slots()
                return self.refuse_frame(topic, topic_length, payload, token)
        if not strict and self.no_room(cost + overhead, payload.count):
            self.trim_slots()
            return OFFER_STALLED
        self.accounting.received += payload.count
        if shared != NULL:
            common = shared[0]
            if common.verdict == KEY_CONTENT:
                key_digest(&common, topic, topic_length, payload.whole, payload.whole_length)
        at = payload.first
        for i in range(payload.count):
            begin = next_(payload, &at, &length)
            data = payload.data + begin
            slot = &self.slots[i]
            if shared == NULL:
                self.key_of(slot, &key)
            else:
                key = common
                key.index = i
            if slot.verdict >= BAD_SIZE:
                self.reject(topic, topic_length, data, length,
                            "oversize" if slot.verdict == BAD_SIZE else "partition_key",
                            self.why_bad(slot.verdict, &key, length),
                            begin if payload.data == payload.whole else 0, self.index_of(payload, i, length), token)
            else:
                if slot.verdict == KEY_MISSING:
                    self.missing += 1
                self.store(data, length, &key, token, kind)
        self.trim_slots()
        return <Py_ssize_t> payload.count

    cdef object index_of(self, const Payload* payload, size_t i, size_t length):
        """The number of a record in its payload; None: it is the whole of it."""
        return None if payload.data == payload.whole and payload.length == length else i

    cdef str why_bad(self, Verdict verdict, Key* key, size_t length):
        cdef size_t counted = 0
        if verdict == BAD_SIZE:
            counted = length + (key_counts(key) if key.verdict < BAD_SIZE else 0)
        return verdict_reason(verdict, counted, self.max_record_bytes)

    cdef void trim_slots(self) noexcept:
        """A frame of a million empty records must not leave its tables behind."""
        if self.slot_room > ENTRIES_MOST:
            free(self.slots)
            self.slots = NULL
            self.slot_room = 0
        if self.arena.room > 1 << 20:
            buf_free(&self.arena)

    def offer(self, bytes topic not None, payload, unsigned long long token) -> int:
        """As the C sink: how many settlements the token will see, -1 when there is no room."""
        return offer_bytes(self, topic, payload, token)

    # -- one record, with its own key perhaps

    cdef int add_record(self, object data, object key_text, object hash_text, uint64_t token,
                        uint32_t kind) except -1:
        cdef Bytes source
        cdef Key key
        cdef Slot slot
        cdef const char* hash_key = NULL
        cdef Py_ssize_t hash_length = 0
        bytes_open(data, &source, "a record")
        try:
            random_ready()
            if key_text is not None:
                self.given_key(key_text, &key)
            elif self.plan.reads_data:
                self.arena.length = 0
                self.slot_key(&slot, NULL, 0, source.p, source.length)
                self.key_of(&slot, &key)
            else:
                self.topic_key(NULL, 0, &key)
                if key.verdict == KEY_CONTENT:
                    key_digest(&key, <const uint8_t*> b"", 0, source.p, source.length)
            if hash_text is not None:
                hash_key = self.given_hash(hash_text, &hash_length)
                key.shard = -1
                if self.table is not None:
                    key.shard = self.table.locate(wide_decimal(hash_key, <size_t> hash_length))
            if key.verdict >= BAD_SIZE:
                raise RecordError(verdict_reason(key.verdict, 0, 0))
            if source.length > self.max_record_bytes or (
                    source.length + key_counts(&key) > self.max_record_bytes):
                raise RecordError(self.why_bad(BAD_SIZE, &key, source.length))
            self.accounting.received += 1
            if key.verdict == KEY_MISSING:
                self.missing += 1
            if hash_key == NULL:
                self.store(source.p, source.length, &key, token, kind)
            else:
                # a consumer checks each record of an aggregate by its own key: this one goes alone
                if self.group.records:
                    self.close_group()
                self.append(source.p, source.length, &key, hash_key, <size_t> hash_length, token, kind, 1)
        finally:
            bytes_close(&source)
        return 0

    cdef int given_key(self, object text, Key* key) except -1:
        """A caller's key. It stays valid while `text` lives and no other key is made."""
        cdef Py_ssize_t length = 0
        cdef const char* p
        cdef size_t escaped
        if not isinstance(text, str):
            raise LibraryError(f"a partition key is text, not {type(text).__name__}")
        try:
            p = PyUnicode_AsUTF8AndSize(text, &length)
        except UnicodeEncodeError:
            raise RecordError("the partition key holds a lone surrogate") from None
        if not 1 <= PyUnicode_GET_LENGTH(text) <= KEY_CHARS:
            raise RecordError(verdict_reason(BAD_LONG if length else BAD_EMPTY, 0, 0))
        key.verdict = KEY_TEXT
        escaped = key_escaped(<const uint8_t*> p, <size_t> length)
        if escaped == <size_t> length:
            key.raw = key.body = p
            key.raw_length = key.body_length = escaped
        else:
            check_memory(key_store(&self.put_text, <const uint8_t*> p, <size_t> length, key))
        return self.locate(key)

    cdef const char* given_hash(self, object text, Py_ssize_t* length) except NULL:
        cdef const char* p
        if not isinstance(text, str):
            raise LibraryError(f"an explicit hash key is text, not {type(text).__name__}")
        try:
            p = PyUnicode_AsUTF8AndSize(text, length)
        except UnicodeEncodeError:
            p = NULL
        if p == NULL or not hash_key_valid(<const uint8_t*> p, <size_t> length[0]):
            raise RecordError(f"{text!r} is not an explicit hash key: a decimal below 2^128, no leading zeros")
        return p

    def add(self, data, unsigned long long token=0, key=None, hash_key=None) -> None:
        """One record for the settler's token. RecordError: it can never be sent."""
        self.add_record(data, key, hash_key, token, ENTRY_TOKEN)

    cdef inline Receipt put_one(self, object data, object key, object hash_key):
        cdef Receipt receipt = Receipt.new(1, False)
        self.add_record(data, key, hash_key, <uint64_t> <size_t> <PyObject*> receipt, ENTRY_RECEIPT)
        Py_INCREF(receipt)
        return receipt

    def put(self, data, key=None, hash_key=None) -> Receipt:
        """One record for whoever holds the receipt. RecordError: it can never be sent."""
        return self.put_one(data, key, hash_key)

    def belong(self, is_running, attend) -> None:
        """To this thread, and to a loop in it: put_if_room() gives nothing to others. It calls `attend()` when the
        batcher needs attention."""
        self.owner = PyThread_get_thread_ident()
        self.is_running = is_running
        self.attend = attend

    def leave(self) -> None:
        """put_if_room() gives nothing to anybody."""
        self.attend = None

    def put_if_room(self, data, key, hash_key):
        """The same, or None: the batcher belongs to nobody or to somebody else, the budget is full, or somebody waits
        for room already. The caller finds out which.

        For who puts one by one: each of these questions asked in Python would add a fiftieth to the put, and to ask
        asyncio for the running loop would double it, for that asks the system for the process id.
        """
        if not self.has_room() or not self.called_by_owner():
            return None
        cdef Receipt receipt = self.put_one(data, key, hash_key)
        if self.dirty:
            self.attend()
        return receipt

    def put_while_room(self, records, list receipts not None, end):
        """put_if_room() for each of an iterator, with no key of its own: its receipt is added to `receipts`. Returns
        the first that was not taken, which is also any that is not bytes, or `end` after the last.

        For who has many at hand: nearly half of what a put costs is the call and the await.
        """
        # Once for all: this thread is in here until the end, and its loop runs.
        cdef bint ours = self.attend is not None and self.called_by_owner()
        for each in records:
            # Room each time, for an iterator may do what it likes, also close who owns us.
            if not ours or not isinstance(each, bytes) or not self.has_room():
                return each
            receipts.append(self.put_one(each, None, None))
            # Behind it, for what was taken has a receipt whatever this raises.
            if self.dirty:
                self.attend()
        return end

    cdef inline bint has_room(self) noexcept:
        return self.attend is not None and not self.budget.stalled and not self.budget.waiting

    cdef inline bint called_by_owner(self) except -1:
        # Two loops in one thread: the one that does not run is not the one we are called from.
        return PyThread_get_thread_ident() == self.owner and self.is_running()

    def put_frame(self, payload) -> Receipt:
        """All records of a bulk frame, or none: DataFormatError, RecordError."""
        cdef Bytes source
        cdef Payload frame
        cdef Receipt receipt
        bytes_open(payload, &source, "a frame")
        try:
            BULK.read(&frame, source.p, source.length, None)
            receipt = Receipt.new(<uint32_t> frame.count, True)
            if frame.count == 0:
                receipt.value = FrameResult(0)
                receipt.state = RECEIPT_RESULT
                return receipt
            # the records own one reference together; it goes with the last of them
            Py_INCREF(receipt)
            try:
                self.take_records(NULL, 0, BULK, &frame, <uint64_t> <size_t> <PyObject*> receipt,
                                  ENTRY_FRAME, True)
            except RecordError:
                Py_DECREF(receipt)
                raise
            return receipt
        finally:
            bytes_close(&source)

    # -- what the sender takes

    def close_batch(self, int reason) -> bool:
        """Close the open batch. True when something waits to be taken: also what was closed before, for the
        open aggregate may have filled the batch, and then it is closed already."""
        if not 0 <= reason < FLUSH_REASONS:
            raise LibraryError(f"{reason} is no reason to close a batch")
        if self.group.records:
            self.close_group()
        if self.open is not None:
            self.close(reason)
        return len(self.closed) > 0

    def offer_open(self, int reason) -> bool:
        """Whoever can send may take the open batch as it is; until then it grows. False: there is none."""
        if not 0 <= reason < FLUSH_REASONS:
            raise LibraryError(f"{reason} is no reason to close a batch")
        if self.open is None and self.group.records == 0:
            return False
        self.wanted = reason
        return True

    def take(self) -> Batch | None:
        """The oldest closed batch; without one the open batch, if it is offered."""
        if not self.closed:
            if self.wanted < 0:
                return None
            self.close_batch(self.wanted)
        cdef Batch batch = self.closed.popleft()
        batch.batcher = self
        return batch

    def take_rejects(self) -> list[Reject]:
        """What was set aside since the last call. Settle each with settle_reject."""
        rejects = self.rejects
        self.rejects = []
        return rejects

    def refuse(self, bytes topic not None, bytes payload not None, str kind not None, str reason not None,
               Py_ssize_t offset, unsigned long long token) -> Reject:
        """Something that was never offered, for it can be no record: received and set aside, whatever room there
        is. Settle it with settle_reject."""
        self.accounting.received += 1
        self.reject(<const uint8_t*> PyBytes_AS_STRING(topic), <size_t> PyBytes_GET_SIZE(topic),
                    <const uint8_t*> PyBytes_AS_STRING(payload), <size_t> PyBytes_GET_SIZE(payload),
                    kind, reason, <size_t> offset, None, token)
        return self.rejects.pop()

    def settle_reject(self, Reject reject not None, int outcome) -> None:
        check_outcome(outcome)
        if outcome == OUT_SPOOLED:
            raise LibraryError("a reject is no record: it cannot be spooled")
        if reject.accounting is not None and reject.accounting is not self.accounting:
            raise LibraryError("this reject belongs to another batcher")
        reject.settle(outcome)

    def adopt_spooled(self, unsigned long long records) -> None:
        """A former run left so many on the disk: they count as received and as spooled."""
        self.accounting.received += records
        self.accounting.ended[OUT_SPOOLED] += records

    def settle_spooled(self, unsigned long long records, int outcome) -> None:
        """So many of what is spooled ended on the disk and will not come back."""
        check_outcome(outcome)
        if outcome == OUT_STORED or outcome == OUT_SPOOLED:
            raise LibraryError("what is on the disk can be given up only: restore it to send it")
        if records > self.accounting.ended[OUT_SPOOLED]:
            spooled = self.accounting.ended[OUT_SPOOLED]
            raise LibraryError(f"{records} records are more than the {spooled} that are spooled")
        self.accounting.ended[OUT_SPOOLED] -= records
        self.accounting.ended[outcome_slot(outcome)] += records

    def restore(self, body, bytes counts not None, unsigned long long token) -> Batch:
        """A batch from the body of one that was finished as SPOOLED, and its `counts`. Its records are in
        flight again; how they end is told to `rows` with this token. DataFormatError: not such a body."""
        cdef Bytes source
        cdef Batch batch
        bytes_open(body, &source, "a body")
        try:
            batch = restore_batch(self.accounting, source.p, source.length, counts, token, self.table,
                                  self.plan.uuid or self.plan.content)
        finally:
            bytes_close(&source)
        if batch.records > self.accounting.ended[OUT_SPOOLED]:
            raise LibraryError(f"{batch.records} records are more than the {self.accounting.ended[OUT_SPOOLED]}"
                               " that are spooled")
        self.accounting.ended[OUT_SPOOLED] -= batch.records
        self.accounting.replay.charge(restored_cost(batch), batch.records)
        batch.batcher = self
        batch.live = True
        return batch

    def abandon(self, error) -> int:
        """The open and the closed batches end as failed; how many records that was."""
        cdef uint64_t records = 0
        cdef Batch batch
        if self.group.records:
            self.close_group()
        batches = list(self.closed)
        self.closed.clear()
        self.wanted = -1
        if self.open is not None:
            batches.append(self.open)
            self.open = None
        for item in batches:
            batch = item
            records += batch.records
            batch.end(NULL, OUT_FAILED, error, -1)
        return records

    @property
    def shards(self) -> ShardTable | None:
        """Where keys go: entries made from now on know their shard."""
        return self.table

    @shards.setter
    def shards(self, ShardTable table):
        self.table = table
        self.known = False

    @property
    def aggregate_bytes(self) -> int:
        """How large an aggregate becomes; 0: records are not aggregated. May change at any time."""
        return self.group_most

    @aggregate_bytes.setter
    def aggregate_bytes(self, size_t aggregate_bytes):
        if self.group.records:
            self.close_group()
            self.dirty = True
        self.set_aggregate_bytes(aggregate_bytes)

    @property
    def open_records(self) -> int:
        return self.group.records + (0 if self.open is None else self.open.records)

    @property
    def open_bytes(self) -> int:
        return self.group.bytes.length + (0 if self.open is None else self.open.total)

    @property
    def ready(self) -> int:
        """Batches that take() would give."""
        return len(self.closed) + (1 if self.wanted >= 0 else 0)

    @property
    def offered(self) -> bool:
        """The open batch waits for somebody who can send it."""
        return self.wanted >= 0

    @property
    def received(self) -> int:
        return self.accounting.received

    @property
    def stored(self) -> int:
        return self.accounting.ended[OUT_STORED]

    @property
    def dead_lettered(self) -> int:
        return self.accounting.ended[OUT_DEAD]

    @property
    def filtered(self) -> int:
        return self.accounting.ended[OUT_FILTERED]

    @property
    def dropped(self) -> int:
        """Dropped, or failed for good."""
        return self.accounting.ended[OUT_DROPPED]

    @property
    def spooled(self) -> int:
        """On the disk and not in memory: acknowledged, not ended."""
        return self.accounting.ended[OUT_SPOOLED]

    @property
    def in_flight(self) -> int:
        """Received, not ended, not spooled."""
        return (self.accounting.received - self.accounting.ended[OUT_STORED] - self.accounting.ended[OUT_DEAD]
                - self.accounting.ended[OUT_FILTERED] - self.accounting.ended[OUT_DROPPED]
                - self.accounting.ended[OUT_SPOOLED])

    @property
    def keys_missing(self) -> int:
        """Records without the field or level their key is made of: a UUID was used."""
        return self.missing

    @property
    def flushes(self) -> tuple[int, ...]:
        """How many batches were closed, by reason."""
        return tuple([self.flushed[i] for i in range(FLUSH_REASONS)])

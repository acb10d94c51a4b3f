# One PutRecords body with what it must settle, and the budget that pays for it.
#
# A body is built once. Each record is a self-contained entry in it, {"Data":"..","PartitionKey":".."},
# so that splitting, bisecting, gathering and sending again what failed are copies of entries.

cdef enum EntryKind:
    ENTRY_TOKEN = 0  # token is the settler's; 0: nobody waits
    ENTRY_RECEIPT  # token is a Receipt that the entry owns
    ENTRY_FRAME  # token is a Receipt that all records of a frame own together
    ENTRY_RUNS  # an aggregate: token is first run << 32 | number of runs
    ENTRY_RUNS_HELD  # the same, with receipts among its runs
    ENTRY_ROW  # came back from the disk: token is the row, told to the books' other settler

cdef struct Entry:
    uint64_t token
    uint32_t at  # into the body
    uint32_t length
    uint32_t size  # data before base64 and UTF-8 bytes of the key: what Kinesis counts
    int32_t shard  # -1: unknown
    uint32_t records  # that the user gave: more than one in an aggregate
    uint16_t kind
    uint16_t drawn  # its key was drawn here: any other would do as well

cdef struct Run:
    # of an aggregate's records: `count` that one token waits for
    uint64_t token
    uint32_t count
    uint32_t kind

cdef enum:
    BODY_START = 2048  # a quiet batcher's first buffer; busy ones start at what they last needed
    BODY_MOST = 1 << 30  # offsets are 32 bits wide, base64 and escapes included
    ENTRIES_START = 16
    # of an entry's error: what is longer is no code of AWS, and goes to counters and logs
    CODE_MOST = 128
    MESSAGE_MOST = 1024
    ENTRIES_MOST = 10000
    # A batch besides its entries: the object, the head and end of its body, two or three pieces of the allocator, and
    # whoever has it: a queue, a task, a group of dead letters with its closures.
    BATCH_BYTES = 1024

cdef inline bint entry_has_runs(const Entry* entry) noexcept nogil:
    return entry.kind == ENTRY_RUNS or entry.kind == ENTRY_RUNS_HELD


cdef inline uint64_t entry_cost(const Entry* entry) noexcept nogil:
    """What an entry takes from the budget: its bytes, its comma, its struct, what waits for it."""
    cdef uint64_t cost = <uint64_t> entry.length + 1 + sizeof(Entry)
    if entry.kind == ENTRY_RECEIPT:
        cost += RECEIPT_BYTES
    elif entry.kind == ENTRY_RUNS:
        cost += (entry.token & UINT32_MAX) * sizeof(Run)
    elif entry.kind == ENTRY_RUNS_HELD:
        cost += (entry.token & UINT32_MAX) * (sizeof(Run) + RECEIPT_BYTES)
    return cost


def record_cost(nbytes) -> int:
    """What one record of nbytes (data and key) costs a budget at most. What its batch costs is besides."""
    return entry_cost_most(nbytes)


@cython.final
cdef class Budget:
    """What may be held, in bytes and records: buffered plus in flight. Several batchers may share one."""

    cdef public unsigned long long max_bytes
    cdef public unsigned long long max_records
    cdef uint64_t held_bytes
    cdef uint64_t held_records
    cdef uint64_t most_bytes
    cdef public size_t waiting  # who stand in line for room: who comes now has to stand behind them
    cdef bint stalled  # since the high mark, or a payload that found no room, until the low mark
    cdef uint64_t doubted
    cdef object _on_room
    cdef bint _tells  # _on_room is set: asked without the GIL

    def __cinit__(self, unsigned long long max_bytes, unsigned long long max_records):
        if max_bytes == 0 or max_records == 0:
            raise LibraryError("a budget holds at least one byte and one record")
        self.max_bytes = max_bytes
        self.max_records = max_records

    cdef inline bint fits(self, uint64_t nbytes, uint64_t records) noexcept nogil:
        if (self.held_records == 0 and self.held_bytes == 0) or self._only_doubted():
            return True
        return (self.held_bytes <= self.max_bytes and nbytes <= self.max_bytes - self.held_bytes
                and self.held_records <= self.max_records
                and records <= self.max_records - self.held_records)

    cdef inline void charge(self, uint64_t nbytes, uint64_t records) noexcept nogil:
        self.held_bytes += nbytes
        self.held_records += records
        if self.held_bytes > self.most_bytes:
            self.most_bytes = self.held_bytes
        if self.held_bytes >= self.max_bytes or self.held_records >= self.max_records:
            self.stalled = True

    cdef inline void release(self, uint64_t nbytes, uint64_t records) noexcept nogil:
        self.held_bytes -= nbytes
        self.held_records -= records
        if self.stalled and self._low():
            self._end_stall()

    cdef inline bint _low(self) noexcept nogil:
        return (self.held_bytes < self.max_bytes - self.max_bytes // 4
                and self.held_records < self.max_records - self.max_records // 4)

    cdef inline bint _only_doubted(self) noexcept nogil:
        return self.doubted > 0 and self.held_records <= self.doubted and self.held_bytes <= self.max_bytes

    cdef inline void _end_stall(self) noexcept nogil:
        self.stalled = False
        if self._tells:
            self._tell()

    cdef void _tell(self) noexcept with gil:
        try:
            self._on_room()
        except BaseException as error:
            unraisable(error, self)

    def doubt(self, uint64_t records) -> None:
        """So many of the records held were refused one by one, nobody knows for whose fault.

        When nothing else is held, what comes next is taken as by an empty budget, though no more than one payload
        beyond max_bytes: if it is stored the fault was theirs. Else they would hold up for ever what tells.
        """
        self.doubted = records
        if self.stalled and self._only_doubted():
            self._end_stall()

    @property
    def on_room(self) -> object:
        """Called each time `full` has ended, from within whatever ended it: it must not take or end records."""
        return self._on_room

    @on_room.setter
    def on_room(self, on_room):
        self._on_room = on_room
        self._tells = on_room is not None

    @property
    def bytes(self) -> int:
        return self.held_bytes

    @property
    def records(self) -> int:
        return self.held_records

    @property
    def peak_bytes(self) -> int:
        return self.most_bytes

    @property
    def full(self) -> bool:
        """The high mark was reached, or a payload found no room, and the low mark not since."""
        return self.stalled

    @property
    def low(self) -> bool:
        """Under three quarters of both, or nothing held but what doubt() names: reading may resume."""
        return self._low() or self._only_doubted()

    def room(self, size_t nbytes) -> bool:
        """Would one record of nbytes (data and key) fit now? True when nothing is held."""
        return self.fits(entry_data_most(nbytes, 1) + ENTRY_USUAL + sizeof(Entry) + RECEIPT_BYTES, 1)


# What a batcher shares with its batches: where settlements go, and how many there were. Batches hold this
# and not the batcher, so that a batcher and what waits in it make no cycle. Never cleared by the collector:
# a batch that is freed unsettled still needs it.
@cython.final
@cython.no_gc_clear
cdef class _Accounting:
    cdef Settler settler
    cdef Budget budget
    cdef bytes target
    cdef AnswerNames answer  # what the operation calls the members of its answer
    cdef size_t max_records
    cdef size_t max_batch_bytes
    cdef uint64_t received
    # by outcome; OUT_SPOOLED goes down again when a batch comes back
    cdef uint64_t ended[6]
    # of what came back from the disk: who is told, what pays
    cdef Settler rows
    cdef Budget replay

    cdef int notify(self, uint64_t token, uint32_t count, int outcome, object answer, Py_ssize_t at) except -1:
        if self.settler is not None and token != 0:
            self.settler.settle(token, count, outcome, answer, at)
        return 0

    cdef int notify_row(self, uint64_t token, uint32_t count, int outcome) except -1:
        if self.rows is not None and token != 0:
            self.rows.settle(token, count, outcome, None, -1)
        return 0


@cython.final
@cython.no_gc_clear
cdef class Reject:
    """A payload, or one record of it (index not None), that is set aside."""

    cdef readonly bytes topic
    cdef readonly bytes payload
    # for a counter: "empty", "version", "element", "truncated", "trailing", "oversize", "partition_key",
    # "records"
    cdef readonly str kind
    cdef readonly str reason
    cdef readonly Py_ssize_t offset
    cdef readonly object index
    cdef readonly unsigned long long token
    cdef _Accounting accounting  # None once it is settled
    cdef uint64_t cost

    cdef int settle(self, int outcome) except -1:
        cdef _Accounting accounting = self.accounting
        if accounting is None:
            raise LibraryError("this reject is settled already")
        self.accounting = None
        accounting.budget.release(self.cost, 1)
        accounting.ended[outcome_slot(outcome)] += 1
        error = None
        if outcome == OUT_FAILED:
            error = DataFormatError(self.offset, self.reason)
        return accounting.notify(self.token, 1, outcome, error, -1)

    def __dealloc__(self):
        if self.accounting is not None:
            try:
                self.settle(OUT_FAILED)
            except BaseException as error:
                unraisable(error, None)


cdef inline int outcome_slot(int outcome) noexcept:
    """Failed and dropped are one counter."""
    return OUT_DROPPED if outcome == OUT_FAILED else outcome


cdef int check_outcome(int outcome) except -1:
    if not OUT_STORED <= outcome <= OUT_SPOOLED:
        raise LibraryError(f"{outcome} is no outcome")
    return 0


cdef class Batch


@cython.final
cdef class Failure:
    """Entries of one call that failed alike, as a batch of their own (same bytes, same keys)."""

    cdef readonly str code
    cdef readonly str message
    cdef readonly Batch batch

    def __repr__(self) -> str:
        return f"<Failure {self.code} of {len(self.batch)} records: {self.message!r}>"


@cython.final
@cython.no_gc_clear
cdef class Batch:
    """One PutRecords body, finished. Exports the body through the buffer protocol, read-only."""

    cdef Buf body
    cdef Entry* items
    cdef Run* runs
    cdef _Accounting accounting
    cdef readonly object batcher
    cdef size_t count
    cdef size_t room
    cdef size_t run_count
    cdef size_t run_room
    cdef size_t total  # of entry sizes
    cdef uint64_t records
    cdef readonly bint restored  # some of its entries came back from the disk
    cdef int why
    cdef bint finished  # the body is complete
    cdef bint live  # it owns entries: they neither went elsewhere nor ended
    cdef readonly unsigned long long overhead  # charged besides the entries, from its end to when it is spent
    cdef Budget payer
    cdef Py_ssize_t exports
    cdef public Py_ssize_t attempts
    cdef public Py_ssize_t uncertain  # calls with it whose outcome nobody knows
    cdef public double taken_at
    cdef public Py_ssize_t flush_generation
    cdef ShardTable placed_by  # whose shards its drawn keys have; None: they have none
    cdef public object digest  # free for the client: the body's SHA-256, so that sending again costs no second one

    @staticmethod
    cdef Batch new(_Accounting accounting, size_t body, size_t count):
        """An open batch with room for so many bytes and entries."""
        # A collection may run anybody's code, which may put into the batcher that is calling us.
        cdef int collecting = PyGC_Disable()
        cdef Batch self = Batch.__new__(Batch)
        if collecting:
            PyGC_Enable()
        self.accounting = accounting
        self.why = FLUSH_DRAIN
        self.items = <Entry*> take_memory(NULL, count * sizeof(Entry))
        self.room = count
        buf_need(&self.body, body + LIST_OPEN)
        entry_list_open(self.body.p)
        self.body.length = LIST_OPEN
        self.live = True
        return self

    cdef inline Entry* next_entry(self) except NULL:
        """A fresh entry; not counted before close_entry."""
        cdef Entry* items
        cdef size_t room
        if self.count == self.room:
            room = self.room * 2
            items = <Entry*> take_memory(self.items, room * sizeof(Entry))
            self.items = items
            self.room = room
        return &self.items[self.count]

    cdef inline void close_entry(self, Entry* entry) noexcept:
        self.count += 1
        self.total += entry.size
        self.records += entry.records

    cdef int add_run(self, uint64_t token, uint32_t count, uint32_t kind) except -1:
        cdef Run* runs
        cdef Run* last
        cdef size_t room
        if self.run_count == self.run_room:
            room = self.run_room * 2 if self.run_room else 64
            runs = <Run*> take_memory(self.runs, room * sizeof(Run))
            self.runs = runs
            self.run_room = room
        last = &self.runs[self.run_count]
        last.token = token
        last.count = count
        last.kind = kind
        self.run_count += 1
        return 0

    cdef int copy(self, Batch source, size_t i) except -1:
        """Append entry i of another batch; its owner is this batch once the other is spent."""
        cdef Entry* from_ = &source.items[i]
        cdef Entry* entry = self.next_entry()
        cdef size_t first
        cdef size_t k
        cdef size_t n
        entry[0] = from_[0]
        buf_need(&self.body, <size_t> from_.length + 1)
        if self.count:
            entry_list_next(self.body.p + self.body.length)
            self.body.length += 1
        entry.at = <uint32_t> self.body.length
        memcpy(self.body.p + self.body.length, source.body.p + from_.at, from_.length)
        self.body.length += from_.length
        if entry_has_runs(entry):
            first = self.run_count
            n = from_.token & UINT32_MAX
            for k in range(n):
                self.add_run(source.runs[(from_.token >> 32) + k].token, source.runs[(from_.token >> 32) + k].count,
                             source.runs[(from_.token >> 32) + k].kind)
            entry.token = <uint64_t> first << 32 | n
        if entry.kind == ENTRY_ROW:
            self.restored = True
        self.close_entry(entry)
        return 0

    cdef int finish_body(self, int why, object batcher) except -1:
        """Complete the body and give back what it did not need."""
        cdef size_t length = <size_t> PyBytes_GET_SIZE(self.accounting.target)
        cdef char* p
        cdef Entry* items
        buf_need(&self.body, length + LIST_CLOSE)
        entry_list_close(self.body.p + self.body.length, PyBytes_AS_STRING(self.accounting.target), length)
        self.body.length += length + LIST_CLOSE
        if self.body.room - self.body.length > 1024 + self.body.length // 8:
            p = <char*> realloc(self.body.p, self.body.length)
            if p != NULL:
                self.body.p = p
                self.body.room = self.body.length
        if self.room > self.count + self.count // 8:
            items = <Entry*> realloc(self.items, max(self.count, <size_t> 1) * sizeof(Entry))
            if items != NULL:
                self.items = items
                self.room = max(self.count, <size_t> 1)
        self.why = why
        self.batcher = batcher
        self.finished = True
        self.pay()
        return 0

    cdef inline void pay(self) noexcept:
        """Charge what it costs besides its entries: a batch of one record is more than the record."""
        self.payer = self.accounting.replay if self.restored else self.accounting.budget
        self.overhead = (BATCH_BYTES + (self.body.room - self.body.length) + (self.room - self.count) * sizeof(Entry)
                         + (self.run_room - self.run_count) * sizeof(Run))
        self.payer.charge(self.overhead, 0)

    cdef inline void refund(self) noexcept:
        if self.overhead:
            self.payer.release(self.overhead, 0)
            self.overhead = 0

    cdef Batch fresh(self, size_t body, size_t count):
        """A batch to copy entries of this one into."""
        cdef Batch other = Batch.new(self.accounting, body, count)
        other.attempts = self.attempts
        other.uncertain = self.uncertain
        other.taken_at = self.taken_at
        other.flush_generation = self.flush_generation
        other.placed_by = self.placed_by
        # until its owner is spent, freeing it must end nothing
        other.live = False
        return other

    cdef inline void consume(self) noexcept:
        """The entries are somebody else's now. The body goes with the last view of it."""
        self.live = False
        self.refund()
        if self.exports == 0:
            buf_free(&self.body)
        free(self.items)
        free(self.runs)
        self.items = NULL
        self.runs = NULL

    cdef int whole(self) except -1:
        if not self.live:
            raise LibraryError("this batch is spent: its records are settled or in other batches")
        return 0

    cdef int end(self, const Outcome* outcomes, int outcome, object answer, Py_ssize_t encryption) except -1:
        """Every entry that `outcomes` does not call failed (all when NULL) ends with `outcome`. The
        batch is spent first, so whoever is told may call us; all are told even if one of them raises,
        the first exception is raised at the end."""
        cdef Entry* items = self.items
        cdef Run* runs = self.runs
        cdef size_t count = self.count
        cdef _Accounting accounting = self.accounting
        cdef uint64_t cost = 0
        cdef uint64_t records = 0
        cdef uint64_t row_cost = 0
        cdef uint64_t row_records = 0
        cdef size_t i
        cdef size_t k
        cdef uint32_t together
        cdef Entry* entry
        cdef Run* run
        cdef Py_ssize_t at
        self.items = NULL
        self.runs = NULL
        self.consume()
        for i in range(count):
            if outcomes == NULL or outcomes[i].code.p == NULL:
                if items[i].kind == ENTRY_ROW:
                    row_cost += entry_cost(&items[i])
                    row_records += items[i].records
                else:
                    cost += entry_cost(&items[i])
                    records += items[i].records
        accounting.budget.release(cost, records)
        if row_records:
            accounting.replay.release(row_cost, row_records)
        accounting.ended[outcome_slot(outcome)] += records + row_records
        bug = None
        i = 0
        while i < count:
            if outcomes != NULL and outcomes[i].code.p != NULL:
                i += 1
                continue
            entry = &items[i]
            at = -1 if outcomes == NULL else <Py_ssize_t> outcomes[i].at
            together = entry.records
            i += 1
            if entry_has_runs(entry):
                for k in range(entry.token & UINT32_MAX):
                    run = &runs[(entry.token >> 32) + k]
                    try:
                        if run.kind == ENTRY_TOKEN:
                            accounting.notify(run.token, run.count, outcome, answer, at)
                        else:
                            (<Receipt> <PyObject*> <size_t> run.token).ended(
                                run.count, outcome, answer, at, encryption)
                    except BaseException as error:
                        bug = bug or error
                continue
            if entry.kind != ENTRY_RECEIPT:
                while (i < count and items[i].token == entry.token and items[i].kind == entry.kind
                       and (outcomes == NULL or outcomes[i].code.p == NULL)):
                    together += items[i].records
                    i += 1
            if entry.kind == ENTRY_TOKEN or entry.kind == ENTRY_ROW:
                try:
                    if entry.kind == ENTRY_ROW:
                        accounting.notify_row(entry.token, together, outcome)
                    else:
                        accounting.notify(entry.token, together, outcome, answer, at)
                except BaseException as error:
                    bug = bug or error
            else:
                (<Receipt> <PyObject*> <size_t> entry.token).ended(together, outcome, answer, at, encryption)
        free(items)
        free(runs)
        if bug is not None:
            raise bug
        return 0

    def __dealloc__(self):
        if self.live and self.count:
            try:
                self.end(NULL, OUT_FAILED, LibraryError("the batch was dropped before it was sent"), -1)
            except BaseException as error:
                unraisable(error, None)
        self.refund()
        free(self.items)
        free(self.runs)
        buf_free(&self.body)

    def __buffer__(self, int flags, /) -> memoryview:
        return PyMemoryView_FromObject(self)

    def __getbuffer__(self, Py_buffer* view, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("a batch's body is read-only")
        if self.body.p == NULL:
            raise BufferError("this batch is spent: its body is gone")
        PyBuffer_FillInfo(view, self, self.body.p, <Py_ssize_t> self.body.length, 1, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1
        if self.exports == 0 and not self.live:
            buf_free(&self.body)

    def __len__(self) -> int:
        return <Py_ssize_t> self.count

    @property
    def nbytes(self) -> int:
        """Of the body; 0 once it is gone."""
        return self.body.length

    @property
    def size(self) -> int:
        """Data before base64 and key bytes: what Kinesis counts."""
        return self.total

    @property
    def user_records(self) -> int:
        """Records as they were given: more than len() when they were aggregated."""
        return self.records

    @property
    def single(self) -> bool:
        """It cannot be halved: one record, or a Kinesis record that is no aggregate of ours."""
        self.whole()
        return self.count == 1 and self._aggregated() is None

    @property
    def reason(self) -> int:
        """Why it was closed."""
        return self.why

    @property
    def counts(self) -> bytes:
        """User records of each entry, 32 bits each, low byte first; empty when each is one. For Batcher.restore."""
        self.whole()
        cdef size_t i
        cdef uint32_t records
        cdef bytes out
        cdef uint8_t* p
        if self.records == self.count:
            return b""
        out = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> (4 * self.count))
        p = <uint8_t*> PyBytes_AS_STRING(out)
        for i in range(self.count):
            records = self.items[i].records
            p[0] = <uint8_t> (records & 255)
            p[1] = <uint8_t> (records >> 8 & 255)
            p[2] = <uint8_t> (records >> 16 & 255)
            p[3] = <uint8_t> (records >> 24)
            p += 4
        return out

    def rows(self) -> dict[int, int]:
        """Of what came back from the disk: row -> user records of it in this batch."""
        self.whole()
        cdef size_t i
        out = {}
        for i in range(self.count):
            if self.items[i].kind == ENTRY_ROW:
                out[self.items[i].token] = out.get(self.items[i].token, 0) + self.items[i].records
        return out

    def shard_load(self) -> dict[int, tuple[int, int]]:
        """Shard index (-1: unknown) -> (records, bytes), as Kinesis counts them."""
        self.whole()
        cdef size_t i = 0
        cdef int32_t shard
        cdef size_t records
        cdef size_t nbytes
        load = {}
        while i < self.count:
            shard = self.items[i].shard
            records = nbytes = 0
            while i < self.count and self.items[i].shard == shard:
                records += 1
                nbytes += self.items[i].size
                i += 1
            if shard in load:
                records_before, nbytes_before = load[shard]
                load[shard] = (records_before + records, nbytes_before + nbytes)
            else:
                load[shard] = (records, nbytes)
        return load

    cdef tuple _part(self, const uint8_t* mine):
        """Two batches: the entries whose mark is set, the others. Spends self. One of them may be
        empty: then the other is self."""
        cdef size_t i
        cdef size_t n = 0
        cdef size_t nbytes = 0
        for i in range(self.count):
            if mine[i]:
                n += 1
                nbytes += self.items[i].length + 1
        if n == 0:
            return None, self
        if n == self.count:
            return self, None
        cdef Batch left = self.fresh(nbytes + 64, n)
        cdef Batch right = self.fresh(self.body.length - nbytes + 64, self.count - n)
        for i in range(self.count):
            (left if mine[i] else right).copy(self, i)
        left.finish_body(self.why, self.batcher)
        right.finish_body(self.why, self.batcher)
        self.consume()
        left.live = right.live = True
        return left, right

    @property
    def drawn(self) -> bool:
        """It has keys that were drawn: any others would do as well."""
        self.whole()
        cdef size_t i
        for i in range(self.count):
            if self.items[i].drawn:
                return True
        return False

    def place(self, ShardTable table, bint again=False) -> None:
        """Find the shards of keys that were drawn before anybody asked where they fall; `again`: of all that were
        drawn. A key of a shard without room is drawn anew, but not of a record that may be stored already: who reads it
        twice should know it again. None: nobody asks any more, they count as spread evenly. What another table said is
        forgotten, for its shards are others."""
        self.whole()
        cdef size_t i
        cdef Entry* entry
        cdef char* key
        cdef bint fixed = self.uncertain > 0 or self.exports > 0
        if self.placed_by is not table:
            self.forget_places()
            self.placed_by = table
        if table is None:
            return
        for i in range(self.count):
            entry = &self.items[i]
            if not entry.drawn or (entry.shard >= 0 and not again):
                continue
            key = entry_drawn_key(self.body.p + entry.at + entry.length)
            entry.shard = table.locate(wide_md5(key, FK_UUID_LENGTH))
            if not fixed and not table.kept(entry.shard):
                random_ready()
                entry.shard = table.draw(key)
                self.digest = None

    cdef void forget_places(self) noexcept:
        """Nobody knows any more where drawn keys fall. Also of a batch that is in the making, and not whole yet."""
        cdef size_t i
        self.placed_by = None
        for i in range(self.count):
            if self.items[i].drawn:
                self.items[i].shard = -1

    def split(self, shards) -> tuple[Batch | None, Batch | None]:
        """(entries of these shards, the others). Self is spent, or is the one that has everything."""
        self.whole()
        wanted = frozenset(shards)
        cdef size_t i
        cdef uint8_t* mine = <uint8_t*> take_memory(NULL, self.count + 1)
        try:
            for i in range(self.count):
                if i and self.items[i].shard == self.items[i - 1].shard:
                    mine[i] = mine[i - 1]
                else:
                    mine[i] = self.items[i].shard in wanted
            return self._part(mine)
        finally:
            free(mine)

    cdef list _aggregated(self):
        """Of a batch of one entry: its records, see aggregate_records; None when it is none that can be taken apart."""
        cdef list records
        if self.items[0].records < 2:
            return None
        data = self._data()
        records = aggregate_records(data)
        if records is None:
            records = line_records(data)
        if len(records) != self.items[0].records:
            return None
        return records

    cdef bytes _data(self):
        """The first entry's data."""
        return entry_data(self.body.p + self.items[0].at, self.items[0].length)

    cdef tuple _halve_aggregate(self, list records):
        cdef Entry* entry = &self.items[0]
        cdef bytes data = self._data()
        cdef size_t whole = <size_t> len(data)
        cdef uint32_t middle = entry.records // 2
        cdef Batch left = self.fresh(entry.length + 64, 1)
        cdef Batch right = self.fresh(entry.length + 64, 1)
        head = records[0][0]
        left._take_records(self, aggregate_of(data, head, records[:middle]), whole, 0, middle)
        right._take_records(self, aggregate_of(data, head, records[middle:]), whole, middle, entry.records - middle)
        left.finish_body(self.why, self.batcher)
        right.finish_body(self.why, self.batcher)
        cdef Budget payer = self.accounting.replay if self.restored else self.accounting.budget
        payer.charge(entry_cost(&left.items[0]) + entry_cost(&right.items[0]), 0)
        payer.release(entry_cost(entry), 0)
        self.consume()
        left.live = right.live = True
        return left, right

    cdef int _take_records(self, Batch source, bytes data, size_t whole, uint32_t first, uint32_t count) except -1:
        """The one entry: `count` records from the `first` on of an aggregate of `whole` bytes, as `data`."""
        cdef const Entry* from_ = &source.items[0]
        cdef Entry* entry = self.next_entry()
        cdef size_t length = <size_t> len(data)
        cdef char* p
        cdef Run* run
        cdef size_t k
        cdef uint32_t before = 0
        cdef uint32_t mine
        buf_need(&self.body, fk_b64_length(length) + from_.length + FK_B64_SLACK)
        p = self.body.p + self.body.length
        entry[0] = from_[0]
        entry.at = <uint32_t> self.body.length
        entry.length = <uint32_t> (entry_write_other(
            p, source.body.p + from_.at, from_.length, whole, <const uint8_t*> PyBytes_AS_STRING(data), length) - p)
        entry.size = <uint32_t> (from_.size - whole + length)
        entry.records = count
        self.body.length += entry.length
        if entry.kind == ENTRY_ROW:
            self.restored = True
        else:
            held = False
            for k in range(from_.token & UINT32_MAX):
                run = &source.runs[(from_.token >> 32) + k]
                if before < first + count and before + run.count > first:
                    mine = min(before + run.count, first + count) - max(before, first)
                    self.add_run(run.token, mine, run.kind)
                    held = held or run.kind == ENTRY_RECEIPT
                before += run.count
            entry.token = self.run_count
            entry.kind = ENTRY_RUNS_HELD if held else ENTRY_RUNS
            if count == 1:
                entry.token = self.runs[0].token
                entry.kind = self.runs[0].kind
                self.run_count = 0
        self.close_entry(entry)
        return 0

    def halves(self) -> tuple[Batch, Batch]:
        """Bisect, an aggregate that stands alone by its records. Self is spent. LibraryError when it is `single`."""
        self.whole()
        if self.count == 1:
            records = self._aggregated()
            if records is None:
                raise LibraryError("one record cannot be halved")
            return self._halve_aggregate(records)
        cdef size_t i
        cdef uint8_t* mine = <uint8_t*> take_memory(NULL, self.count)
        try:
            for i in range(self.count):
                mine[i] = i < self.count // 2
            return self._part(mine)
        finally:
            free(mine)

    @staticmethod
    def gather(batches) -> list[Batch]:
        """As few batches as the limits allow, order kept. The inputs are spent."""
        cdef Batch batch
        cdef Batch out = None
        cdef _Accounting accounting = None
        cdef size_t i
        cdef size_t nbytes
        items = list(batches)
        for item in items:
            if not isinstance(item, Batch):
                raise TypeError(f"only batches can be gathered, not {type(item).__name__}")
            batch = item
            batch.whole()
            if accounting is None:
                accounting = batch.accounting
            if batch.accounting is not accounting:
                raise LibraryError("batches of different batchers cannot share a call")
        if len({id(item) for item in items}) != len(items):
            raise LibraryError("a batch was given twice")
        if len(items) < 2:
            return items
        outs = []
        nbytes = sum([(<Batch> item).body.length for item in items])
        for item in items:
            batch = item
            for i in range(batch.count):
                if (out is None or out.count == accounting.max_records
                        or out.total + batch.items[i].size > accounting.max_batch_bytes):
                    out = batch.fresh(min(nbytes, accounting.max_batch_bytes // 2 * 3) + 64, batch.count)
                    outs.append(out)
                elif i == 0:
                    out.attempts = max(out.attempts, batch.attempts)
                    out.uncertain = max(out.uncertain, batch.uncertain)
                    out.taken_at = min(out.taken_at, batch.taken_at)
                    out.flush_generation = min(out.flush_generation, batch.flush_generation)
                    if batch.placed_by is not out.placed_by:
                        out.forget_places()
                        batch.forget_places()
                out.copy(batch, i)
        for item in outs:
            (<Batch> item).finish_body((<Batch> items[0]).why, (<Batch> items[0]).batcher)
        for item in items:
            (<Batch> item).consume()
        for item in outs:
            (<Batch> item).live = True
        return outs

    def settle(self, answer) -> list[Failure]:
        """Scan the answer, settle what is stored; what failed comes back, grouped by code and message.
        Self is spent (or is the one failure that has everything). UnexpectedResponse leaves it whole."""
        self.whole()
        cdef bytes data = answer if PyBytes_CheckExact(answer) else bytes(answer)
        cdef Outcome* outcomes
        cdef Answer scan
        outcomes = <Outcome*> take_memory(NULL, self.count * sizeof(Outcome))
        try:
            answer_scan(self.accounting.answer, data, self.count, outcomes, &scan)
            if scan.failed == 0:
                self.end(outcomes, OUT_STORED, data, scan.encryption)
                return []
            failures = self._failures(outcomes)
            if len(failures) == 1 and (<Failure> failures[0]).batch is self:
                return failures
            for item in failures:
                (<Failure> item).batch.live = True
            self.end(outcomes, OUT_STORED, data, scan.encryption)
            return failures
        finally:
            free(outcomes)

    cdef list _failures(self, const Outcome* outcomes):
        """The failed entries, as batches that own nothing yet."""
        cdef size_t i
        cdef size_t last = self.count
        cdef const Outcome* o
        cdef Failure failure = None
        failures = []
        groups = {}
        for i in range(self.count):
            o = &outcomes[i]
            if o.code.p == NULL:
                continue
            if last == self.count or not outcome_alike(o, &outcomes[last]):
                key = (
                    o.code.p[:o.code.length],
                    b"" if o.message.p == NULL else o.message.p[:o.message.length],
                )
                failure = groups.get(key)
                if failure is None:
                    failure = Failure.__new__(Failure)
                    failure.code = json_text(&o.code)[:CODE_MOST]
                    failure.message = json_text(&o.message)[:MESSAGE_MOST]
                    failure.batch = self.fresh(BODY_START, ENTRIES_START)
                    groups[key] = failure
                    failures.append(failure)
            last = i
            failure.batch.copy(self, i)
        if len(failures) == 1 and failure.batch.count == self.count:
            failure.batch = self
            return failures
        for item in failures:
            (<Failure> item).batch.finish_body(self.why, self.batcher)
        return failures

    def finish(self, int outcome, error=None) -> None:
        """Every entry ends alike. Self is spent."""
        self.whole()
        check_outcome(outcome)
        if outcome == OUT_STORED:
            raise LibraryError("only an answer says that records are stored: use settle")
        self.end(NULL, outcome, error, -1)

    def expire(self, error) -> None:
        """Receipts of its entries raise `error` from now on. The entries go on, and end as they would have."""
        cdef size_t i
        cdef size_t k
        cdef size_t count
        cdef Entry* entry
        cdef Run* run
        self.whole()
        # Who is told may call us, and may end this batch: so what is told is collected first.
        receipts = []
        for i in range(self.count):
            entry = &self.items[i]
            if entry_has_runs(entry):
                count = entry.token & UINT32_MAX
                for k in range(count):
                    run = &self.runs[(entry.token >> 32) + k]
                    if run.kind != ENTRY_TOKEN:
                        receipts.append(<Receipt> <PyObject*> <size_t> run.token)
            elif entry.kind != ENTRY_TOKEN and entry.kind != ENTRY_ROW:
                receipts.append(<Receipt> <PyObject*> <size_t> entry.token)
        for receipt in receipts:
            (<Receipt> receipt).expire(error)

    def entries(self) -> list[tuple[bytes, str | None, str | None]]:
        """(data, partition key, explicit hash key) of each record, decoded back."""
        self.whole()
        cdef size_t i
        out = []
        for i in range(self.count):
            out.append(entry_fields(self.body.p + self.items[i].at, self.items[i].length))
        return out

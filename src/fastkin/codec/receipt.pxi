# One outcome that somebody may await. It is no future: it belongs to no loop, and most are never
# looked at. What it costs until then is one small object and a reference to the answer.

cdef enum ReceiptState:
    RECEIPT_PENDING = 0
    RECEIPT_STORED  # `value` is the answer, `at` the offset of the entry
    RECEIPT_RESULT  # `value` is the result
    RECEIPT_ERROR  # `value` is the exception

cdef enum:
    RECEIPT_BYTES = 96  # what one costs in memory, charged to the budget with its entry


cdef object fresh_error(object error):
    """A copy to raise: one error is shared by every record of a call, and a raised exception collects
    tracebacks, which hold frames, which hold receipts."""
    cls = type(error)
    try:
        copy = cls.__new__(cls, *error.args)
        copy.__dict__.update(error.__dict__)
        copy.__cause__ = error.__cause__ or error
        copy.__suppress_context__ = True
    except Exception:
        return error
    return copy


# Safe without the cycle collector: callbacks and futures, the only way back to a receipt, are dropped
# when it ends, and an exception is never raised from the object it holds.
@cython.final
@cython.no_gc
@cython.freelist(1024)
cdef class Receipt:
    """Resolves to PutResult (or FrameResult for a frame), or raises. Costs next to nothing until awaited.

    `await receipt`, asyncio.wait, wait_for, gather and as_completed take it as it is; a TaskGroup takes receipt.wait().
    It cannot be cancelled: the record is on its way.
    """

    cdef object value
    cdef object waiters  # None, or a list of futures and callables
    # entry offset in the answer; once the answer is read: nothing
    cdef Py_ssize_t at
    cdef Py_ssize_t encryption  # offset of the answer's EncryptionType value, -1 without
    cdef uint32_t pending  # records that have not ended
    cdef uint32_t records  # of a frame
    cdef uint8_t state
    cdef bint frame
    cdef bint expired  # it was told that it is too late; its records have not ended yet
    cdef bint spooled  # some of it is on the disk and not in the stream yet

    @staticmethod
    cdef Receipt new(uint32_t records, bint frame):
        cdef Receipt self = Receipt.__new__(Receipt)
        self.pending = self.records = records
        self.frame = frame
        return self

    cdef void ended(self, uint32_t count, int outcome, object answer, Py_ssize_t at,
                    Py_ssize_t encryption) noexcept:
        """`count` of its records have ended. The batch's reference goes with the last."""
        self.pending -= count
        if self.expired:
            if not self.pending:
                Py_DECREF(self)
            return
        if outcome == OUT_STORED:
            if not self.frame:
                self.value = answer
                self.at = at
                self.encryption = encryption
                self.state = RECEIPT_STORED
        elif outcome == OUT_SPOOLED:
            self.spooled = True
            if not self.frame:
                self.value = PutResult(None, None, None, True)
                self.state = RECEIPT_RESULT
        elif self.state != RECEIPT_ERROR:
            self.value = answer if answer is not None else outcome_error(outcome)
            self.state = RECEIPT_ERROR
        if self.pending:
            return
        if self.state == RECEIPT_PENDING:
            self.value = FrameResult(self.records, self.spooled)
            self.state = RECEIPT_RESULT
        if self.waiters is not None:
            self._wake()
        Py_DECREF(self)

    cdef void expire(self, object error) noexcept:
        """Tell who waits that it is too late, whatever becomes of its records."""
        if self.expired or not self.pending:
            return
        self.expired = True
        self.value = error
        self.state = RECEIPT_ERROR
        if self.waiters is not None:
            self._wake()

    cdef void _wake(self) noexcept:
        waiters = self.waiters
        self.waiters = None
        for waiter in waiters:
            try:
                if isinstance(waiter, asyncio.Future):
                    if not waiter.done() and not waiter.get_loop().is_closed():
                        waiter.set_result(None)
                else:
                    waiter(self)
            except BaseException as error:
                unraisable(error, "a receipt's callback")

    cdef inline bint _done(self) noexcept:
        return self.pending == 0 or self.expired

    @classmethod
    def __class_getitem__(cls, item, /):
        return GenericAlias(cls, item)

    def __repr__(self) -> str:
        if not self._done():
            if not self.frame:
                return "<Receipt pending>"
            return f"<Receipt pending: {self.pending} of {self.records} records>"
        if self.state == RECEIPT_ERROR:
            return f"<Receipt failed: {type(self.value).__name__}: {self.value}>"
        return f"<Receipt {self._read()!r}>"

    def done(self) -> bool:
        """The outcome is known."""
        return self._done()

    def cancelled(self) -> bool:
        """Never. asyncio.wait asks this of what it is given."""
        return False

    cdef object _read(self):
        """The result, once it is there."""
        if self.state == RECEIPT_STORED:
            self.value = answer_result(self.value, self.at, self.encryption)
            self.state = RECEIPT_RESULT
        if self.state == RECEIPT_ERROR:
            raise fresh_error(self.value)
        return self.value

    def result(self) -> PutResult | FrameResult:
        """The outcome; asyncio.InvalidStateError before it is known."""
        if not self._done():
            raise asyncio.InvalidStateError("the record is not stored yet: await the receipt")
        return self._read()

    def exception(self) -> BaseException | None:
        """Why it failed, None when it did not; asyncio.InvalidStateError before it is known."""
        if not self._done():
            raise asyncio.InvalidStateError("the record is not stored yet: await the receipt")
        return self.value if self.state == RECEIPT_ERROR else None

    def add_done_callback(self, fn, /) -> None:
        """Call fn(receipt) when the outcome is known: at once when it is. Runs where answers are
        settled, so it should be short; what it raises goes to sys.unraisablehook."""
        if not callable(fn):
            raise TypeError(f"a callback is called, {type(fn).__name__} cannot be")
        if self._done():
            fn(self)
        elif self.waiters is None:
            self.waiters = [fn]
        else:
            self.waiters.append(fn)

    def remove_done_callback(self, fn, /) -> int:
        """Forget fn; returns how often it was there."""
        cdef object kept
        if self.waiters is None:
            return 0
        kept = [waiter for waiter in self.waiters if waiter != fn]
        count = len(self.waiters) - len(kept)
        self.waiters = kept
        return count

    async def wait(self):
        """The same as `await receipt`, as a coroutine: for asyncio.TaskGroup.create_task, which takes nothing else."""
        return await self

    def __await__(self):
        if not self._done():
            future = asyncio.get_running_loop().create_future()
            if self.waiters is None:
                self.waiters = [future]
            else:
                self.waiters.append(future)
            try:
                yield from future
            except BaseException:
                # Cancelled, by a timeout perhaps. Who asks again and again would else leave a future each time.
                self.remove_done_callback(future)
                raise
        return self._read()


cdef object outcome_error(int outcome):
    word = {OUT_DEAD: "dead-lettered", OUT_FILTERED: "filtered", OUT_DROPPED: "dropped"}.get(outcome, "failed")
    return RecordError(f"the record was {word}")


cdef void unraisable(object error, object place) noexcept:
    """Hand an exception that nobody can catch to sys.unraisablehook."""
    PyErr_SetObject(type(error), error)
    PyErr_WriteUnraisable(place)

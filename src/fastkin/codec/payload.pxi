# What a payload format is to the batcher, whatever its bytes look like. A format is a file of its own (format_raw.pxi
# is the shortest one) and a row of the table in formats.pxi; nothing else knows it.
#
# A payload is read whole before a record of it is taken, and a payload with a fault in its form is set aside whole.
# Behind a bad element nobody can say where the next record begins, and what lies before it may be a record by chance
# only. A dead letter holds the whole payload: records that had been stored would be stored again when it is replayed.
#
# A record that is too large, or has a bad key, is another case. It is no fault of the form: where each record begins
# and ends is known by then. So the batcher sets that record aside alone, and its neighbours are stored. Only a Producer
# refuses the whole frame for it (`strict`): its caller still has the frame, and hears which record it was.

cdef struct Payload:
    # one payload as its format has read it; whoever calls `scan` sets the first two
    const uint8_t* data
    size_t length
    # what the scan found: where `next` begins, and the sums that say whether there is room
    size_t first
    size_t count  # records
    size_t data_bytes  # of all records together
    size_t longest  # record
    # what is wrong, for `reason`: a number of the format's own, the offset, and two sizes for its words
    int wrong
    size_t at
    size_t needed
    size_t left
    # what is set aside when the whole is: the same bytes, or those that a format in Python made `data` from
    const uint8_t* whole
    size_t whole_length


# Reads the whole payload and takes nothing: True when it is one. Lengths in it are a stranger's: each is compared with
# what is left before it is added to anything.
ctypedef bint (*PayloadScan)(Payload* payload) noexcept nogil
# The next record of a payload that was scanned: offset and length. `at` is where the search goes on, `first` to begin
# with; how far it moves is the format's own affair. Called exactly `count` times.
ctypedef size_t (*PayloadNext)(const Payload* payload, size_t* at, size_t* length) noexcept nogil
# (kind for a counter, reason for a person) after a scan that was False; `at` says where.
ctypedef tuple (*PayloadReason)(const Payload* payload)


@cython.final
cdef class PayloadFormat:
    """A row of the table of payload formats: compiled functions, or `records(payload)`, which gives the records.

    What is made by a call is a format in Python. Its `records` raises DataFormatError with the offset of what is wrong,
    and is called with bytes nobody vouches for. With `topic` it is `records(payload, topic)`.
    """

    cdef readonly str name
    cdef readonly int number  # its Subscription Identifier
    cdef readonly str doc
    cdef PayloadScan scan
    cdef PayloadNext next
    cdef PayloadReason reason
    cdef object records  # None: it is compiled
    cdef bint topic  # it is called with the topic, too

    def __cinit__(self, *_args, **_kwargs):
        # What a format in Python gives becomes a bulk frame; and an object that was never initialised has no wild
        # pointers.
        self.scan = bulk_scan
        self.next = bulk_next
        self.reason = bulk_reason

    def __init__(self, str name not None, int number, str doc not None, records not None, *, bint topic=False):
        if not callable(records):
            raise LibraryError(f"the format {name!r} must have a function that gives the records of a payload")
        self.name = name
        self.number = number
        self.doc = doc
        self.records = records
        self.topic = topic

    def __repr__(self) -> str:
        return f"<PayloadFormat {self.name}>"

    def decode(self, payload) -> list[bytes]:
        """The records of a payload, or DataFormatError: all or nothing."""
        return self.decoded(payload, "a payload")

    cdef list decoded(self, object given, str what):
        cdef Bytes source
        cdef Payload payload
        bytes_open(given, &source, what)
        try:
            made = records_made(self, NULL, 0, source.p, source.length)
            self.read(&payload, source.p, source.length, made)
            records = self.copies(&payload)
            return records
        finally:
            bytes_close(&source)

    cdef int read(self, Payload* payload, const uint8_t* data, size_t length, bytes made) except -1:
        """Scan what came, or what records_made() has made of it. DataFormatError."""
        payload.data = payload.whole = data
        payload.length = payload.whole_length = length
        if made is not None:
            payload.data = <const uint8_t*> PyBytes_AS_STRING(made)
            payload.length = <size_t> PyBytes_GET_SIZE(made)
        if not self.scan(payload):
            raise DataFormatError(payload.at, self.reason(payload)[1])
        return 0

    cdef list copies(self, const Payload* payload):
        cdef size_t at = payload.first
        cdef size_t begin
        cdef size_t length = 0
        records = []
        for _ in range(payload.count):
            begin = self.next(payload, &at, &length)
            records.append(PyBytes_FromStringAndSize(<const char*> payload.data + begin, <Py_ssize_t> length))
        return records


cdef PayloadFormat compiled_format(str name, int number, str doc, PayloadScan scan, PayloadNext next_,
                                   PayloadReason reason):
    """A row with compiled functions."""
    cdef PayloadFormat made = PayloadFormat.__new__(PayloadFormat)
    made.name = name
    made.number = number
    made.doc = doc
    made.scan = scan
    made.next = next_
    made.reason = reason
    return made


cdef bytes records_made(PayloadFormat format, const uint8_t* topic, size_t topic_length, const uint8_t* data,
                        size_t length):
    """What a format in Python makes of a payload, as a bulk frame, which the compiled path then takes. DataFormatError.
    None: the format is compiled.

    Whatever else it raises is a bug in it that this payload brings out: the payload is refused, and the next one is
    read. One that came again and again would else end the connection again and again.
    """
    if format.records is None:
        return None
    payload = PyBytes_FromStringAndSize(<const char*> data, <Py_ssize_t> length)
    try:
        if format.topic:
            name = "" if topic_length == 0 else PyUnicode_DecodeUTF8(<const char*> topic, <Py_ssize_t> topic_length,
                                                                     "replace")
            return encode_frame(format.records(payload, name))
        return encode_frame(format.records(payload))
    except (DataFormatError, MemoryError):
        raise
    except Exception as error:
        raise DataFormatError(0, f"the format {format.name} failed: {type(error).__name__}: {error}") from None

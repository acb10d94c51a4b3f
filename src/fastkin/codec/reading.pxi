# Records as a reader gets them: what GetRecords answers becomes objects, aggregates of the KPL are taken apart, JSON is
# decoded, and what was seen before is known again. Data comes from strangers: lengths are compared with what is left.

cdef extern from "mqtt/digest.h" nogil:
    int fk_digest_init() noexcept
    void fk_digest(const uint8_t* topic, size_t topic_length, const uint8_t* payload,
                   size_t payload_length, uint64_t* out) noexcept

if fk_digest_init() != 0:
    raise OSError("the system gives no random numbers")


cdef struct ProtoField:
    uint64_t number  # 0 for one that no message of ours can have
    bint text  # bytes, else a number
    bint large  # the number does not fit into `value`
    uint64_t value
    const uint8_t* p
    size_t length


cdef bint proto_varint(const uint8_t** at, const uint8_t* end, uint64_t* value, bint* large) noexcept nogil:
    """A number of at most ten bytes; `large` when it has more than 64 bits."""
    cdef int shift = 0
    cdef uint8_t byte
    value[0] = 0
    large[0] = False
    while shift <= 63:
        if at[0] == end:
            return False
        byte = at[0][0]
        at[0] += 1
        if shift == 63 and byte & 0x7E:
            large[0] = True
        value[0] |= <uint64_t> (byte & 0x7F) << shift
        if byte < 0x80:
            return True
        shift += 7
    return False


cdef bint proto_field(const uint8_t** at, const uint8_t* end, ProtoField* field) noexcept nogil:
    """The next field, when the message is not at its end yet. False: it is cut short, or of a type not known here."""
    cdef uint64_t tag = 0
    cdef bint large = False
    if not proto_varint(at, end, &tag, &large):
        return False
    field.number = 0 if large else tag >> 3
    field.text = tag & 7 == 2
    if tag & 7 != 0 and not field.text:
        return False
    if not proto_varint(at, end, &field.value, &field.large):
        return False
    if field.text:
        if field.large or field.value > <uint64_t> (end - at[0]):
            return False
        field.p = at[0]
        field.length = <size_t> field.value
        at[0] += field.length
    return True


cdef bint aggregate_inside(const uint8_t* p, size_t length, uint64_t* index, const uint8_t** data,
                           size_t* size) noexcept nogil:
    """One record of an aggregate: which key is its, and where its data is. Of a field told twice the last counts."""
    cdef const uint8_t* end = p + length
    cdef ProtoField field
    cdef bint have_index = False
    cdef bint have_data = False
    while p < end:
        if not proto_field(&p, end, &field):
            return False
        if field.number == 1:
            have_index = not field.text and not field.large
            index[0] = field.value
        elif field.number == 3:
            have_data = field.text
            data[0] = field.p
            size[0] = field.length
    return have_index and have_data


cdef list aggregate_keys(const uint8_t* data, size_t length):
    """The keys of an aggregate as KCL knows one: magic, message, MD5, all its records sound. None for anything else."""
    cdef const uint8_t* p
    cdef const uint8_t* end
    cdef uint8_t digest[16]
    cdef ProtoField field
    cdef uint64_t index = 0
    cdef const uint8_t* inner = NULL
    cdef size_t size = 0
    cdef bint found = False
    cdef list keys = []
    if length <= AGGREGATE_MAGIC + AGGREGATE_DIGEST or memcmp(data, b"\xf3\x89\x9a\xc2", AGGREGATE_MAGIC) != 0:
        return None
    end = data + length - AGGREGATE_DIGEST
    # Magic alone is not enough: plain records may begin with these four bytes, and must come through unchanged.
    fk_md5(data + AGGREGATE_MAGIC, length - AGGREGATE_MAGIC - AGGREGATE_DIGEST, digest)
    if memcmp(digest, end, AGGREGATE_DIGEST) != 0:
        return None
    # Keys may stand behind the records that name them, so they are read first, and with them the whole message.
    p = data + AGGREGATE_MAGIC
    while p < end:
        if not proto_field(&p, end, &field):
            return None
        if field.number == 1 and field.text:
            try:
                keys.append(PyUnicode_DecodeUTF8(<const char*> field.p, <Py_ssize_t> field.length, NULL))
            except UnicodeDecodeError:
                return None
    p = data + AGGREGATE_MAGIC
    while p < end:
        proto_field(&p, end, &field)
        if field.number == 3 and field.text:
            if not aggregate_inside(field.p, field.length, &index, &inner, &size) or index >= <uint64_t> len(keys):
                return None
            found = True
    return keys if found else None


cdef bint aggregate_next(const uint8_t** at, const uint8_t* end, uint64_t* index, const uint8_t** data,
                         size_t* size) noexcept nogil:
    """The next record of an aggregate that aggregate_keys has found sound. False: there is none."""
    cdef ProtoField field
    while at[0] < end:
        proto_field(at, end, &field)
        if field.number == 3 and field.text:
            aggregate_inside(field.p, field.length, index, data, size)
            return True
    return False


def deaggregate(bytes data not None) -> list:
    """Keys and data of a KPL aggregate; what is none stays one record, whose key is None."""
    cdef const uint8_t* p = <const uint8_t*> PyBytes_AS_STRING(data)
    cdef size_t length = <size_t> PyBytes_GET_SIZE(data)
    cdef uint64_t index = 0
    cdef const uint8_t* inner = NULL
    cdef size_t size = 0
    cdef list found = []
    cdef list keys = aggregate_keys(p, length)
    if keys is None:
        return [(None, data)]
    cdef const uint8_t* end = p + length - AGGREGATE_DIGEST
    p += AGGREGATE_MAGIC
    while aggregate_next(&p, end, &index, &inner, &size):
        found.append((keys[<Py_ssize_t> index], PyBytes_FromStringAndSize(<const char*> inner, <Py_ssize_t> size)))
    return found


cdef object json_loads = None


cdef int find_json_loads() except -1:
    global json_loads
    if json_loads is None:
        # who only writes needs no orjson
        from orjson import loads as json_loads
    return 0


def decode_json(bytes data not None) -> object:
    """The value of a record that is JSON, as orjson reads it. DataFormatError says at which byte it is none."""
    find_json_loads()
    try:
        return json_loads(data)
    except ValueError as error:
        offset = getattr(error, "pos", 0)  # it counts characters
        reason = str(getattr(error, "msg", error))
    text = data.decode("utf-8", "replace")
    raise DataFormatError(len(text[:offset].encode("utf-8")), f"no JSON: {reason}")


@cython.final
cdef class ConsumerRecord:
    """One record of a stream as it was put there; see the stub for its members."""

    cdef readonly object data
    cdef readonly bytes raw
    cdef bint wrong
    cdef object problem  # what `error` is, when somebody has asked
    cdef readonly object partition_key
    cdef readonly object shard_id
    cdef readonly str sequence_number
    cdef readonly object subsequence_number
    cdef readonly object timestamp
    cdef readonly object encryption_type

    def __init__(self):
        raise TypeError("records are made by a Consumer")

    @property
    def error(self):
        # Made for who asks: a stranger can put more records that are wrong into an answer than there is memory for
        # errors with text and traceback.
        if self.wrong and self.problem is None:
            try:
                decode_json(self.raw)
            except DataFormatError as error:
                self.problem = error.with_traceback(None)
        return self.problem

    @property
    def timestamp_ms(self):
        return None if self.timestamp is None else round(self.timestamp * 1000)

    def __repr__(self):
        place = "" if self.subsequence_number is None else f", subsequence_number={self.subsequence_number}"
        wrong = "" if not self.wrong else f", error={self.error!r}"
        return (f"ConsumerRecord(shard_id={self.shard_id!r}, sequence_number={self.sequence_number!r}{place}, "
                f"partition_key={self.partition_key!r}, {len(self.raw)} bytes{wrong})")


cdef ConsumerRecord consumer_record(bytes raw, object key, object place, dict told, object shard_id, bint plain):
    cdef ConsumerRecord record = ConsumerRecord.__new__(ConsumerRecord)
    record.raw = raw
    record.partition_key = key
    record.shard_id = shard_id
    record.sequence_number = told["SequenceNumber"]
    record.subsequence_number = place
    record.timestamp = told.get("ApproximateArrivalTimestamp")
    record.encryption_type = told.get("EncryptionType")
    if plain:
        record.data = raw
    else:
        try:
            record.data = json_loads(raw)
        except ValueError:
            record.wrong = True
    return record


@cython.final
cdef class Reading:
    """The records of an answer to GetRecords, made as they are taken: a few bytes of an aggregate are a record each."""

    cdef list told
    cdef list datas  # of the Kinesis records; None of those that are taken
    cdef object shard_id
    cdef bint raw
    cdef bint as_stored
    cdef Py_ssize_t at  # the Kinesis record whose turn it is
    cdef list keys  # of the aggregate that is being taken apart, else None
    cdef bytes data
    cdef size_t offset
    cdef Py_ssize_t place
    cdef readonly Py_ssize_t wrong  # how many of those taken are no JSON
    cdef readonly ConsumerRecord first_wrong

    def __init__(self, list told not None, shard_id, bint raw, bint as_stored):
        """UnexpectedResponse when one is not as the API promises: it is looked at before any is taken.

        raw: data stays bytes, else it is decoded as JSON; as_stored: aggregates are not taken apart.
        """
        cdef list datas = []
        for one in told:
            try:
                sequence, key = one["SequenceNumber"], one.get("PartitionKey")
                stamp = one.get("ApproximateArrivalTimestamp")
                data = a2b_base64(one["Data"], strict_mode=True)
                if not (isinstance(one, dict) and isinstance(sequence, str) and isinstance(key, (str, type(None)))
                        and isinstance(stamp, (int, float, type(None)))):
                    raise TypeError("a member of another type")
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise UnexpectedResponse(
                    "UnexpectedResponse", f"a record of GetRecords: {type(error).__name__} {error}"
                ) from None
            datas.append(data)
        if not raw:
            find_json_loads()
        self.told = told
        self.datas = datas
        self.shard_id = shard_id
        self.raw = raw
        self.as_stored = as_stored

    @property
    def more(self):
        """May more be taken? The last portion may be empty."""
        return self.at < len(self.datas)

    def take(self, Py_ssize_t most) -> list:
        """The next records, at most so many."""
        cdef list records = []
        cdef bytes data
        cdef dict one
        while self.at < len(self.datas) and len(records) < most:
            if self.keys is not None:
                self.take_inside(records, most)
                continue
            data = self.datas[self.at]
            if not self.as_stored:
                self.keys = aggregate_keys(<const uint8_t*> PyBytes_AS_STRING(data), <size_t> PyBytes_GET_SIZE(data))
            if self.keys is not None:
                self.data = data
                self.offset = AGGREGATE_MAGIC
                self.place = 0
                continue
            one = self.told[self.at]
            self.add(records, data, one.get("PartitionKey"), None, one)
            self.datas[self.at] = None
            self.at += 1
        return records

    cdef int take_inside(self, list records, Py_ssize_t most) except -1:
        """Records of the aggregate that was begun."""
        cdef const uint8_t* data = <const uint8_t*> PyBytes_AS_STRING(self.data)
        cdef const uint8_t* p = data + self.offset
        cdef const uint8_t* end = data + PyBytes_GET_SIZE(self.data) - AGGREGATE_DIGEST
        cdef uint64_t index = 0
        cdef const uint8_t* inner = NULL
        cdef size_t size = 0
        cdef dict one = self.told[self.at]
        while len(records) < most:
            if not aggregate_next(&p, end, &index, &inner, &size):
                self.keys = self.data = self.datas[self.at] = None
                self.at += 1
                return 0
            self.add(records, PyBytes_FromStringAndSize(<const char*> inner, <Py_ssize_t> size),
                     self.keys[<Py_ssize_t> index], self.place, one)
            self.place += 1
        self.offset = <size_t> (p - data)
        return 0

    cdef int add(self, list records, bytes data, object key, object place, dict one) except -1:
        cdef ConsumerRecord record = consumer_record(data, key, place, one, self.shard_id, self.raw)
        records.append(record)
        if record.wrong:
            self.wrong += 1
            if self.first_wrong is None:
                self.first_wrong = record
        return 0


def read_records(list told not None, shard_id, bint raw, bint as_stored) -> list:
    """All records of an answer at once. What a stranger may have filled is taken from a Reading in portions."""
    cdef Reading reading = Reading(told, shard_id, raw, as_stored)
    cdef list records = []
    while reading.more:
        records += reading.take(10_000)
    return records


cdef struct SeenOne:
    uint64_t[2] digest
    uint64_t place  # 0 for a plain record, else its index in the aggregate and 1


cdef inline bint is_uuid(const char* text, Py_ssize_t length) noexcept nogil:
    """Is a key of the form that drawn keys, and those made from content, have?"""
    cdef Py_ssize_t i
    cdef char c
    if length != FK_UUID_LENGTH:
        return False
    for i in range(length):
        c = text[i]
        if i == 8 or i == 13 or i == 18 or i == 23:
            if c != b"-":
                return False
        elif not (b"0" <= c <= b"9" or b"a" <= c <= b"f" or b"A" <= c <= b"F"):
            return False
    return True


@cython.final
cdef class Seen:
    """The last so many records, known by key, data and place in the aggregate.

    A ring of digests, and a table with open addressing that finds them: 32 to 40 bytes a record, whatever its data.
    """

    cdef SeenOne* ring
    cdef uint32_t* table  # 1 and the index in the ring; 0: free
    cdef size_t most
    cdef size_t count
    cdef size_t next
    cdef size_t mask
    cdef readonly unsigned long long duplicates
    cdef readonly unsigned long long unknown  # their key is no UUID: they are never taken for a duplicate

    def __cinit__(self, size_t most):
        cdef size_t room = 2
        if not 1 <= most <= 1 << 30:
            raise LibraryError(f"{most} is not 1 to {1 << 30} records to remember")
        while room < 2 * most:
            room *= 2
        self.ring = <SeenOne*> take_memory(NULL, most * sizeof(SeenOne))
        self.table = <uint32_t*> take_memory(NULL, room * sizeof(uint32_t))
        memset(self.table, 0, room * sizeof(uint32_t))
        self.most = most
        self.mask = room - 1

    def __dealloc__(self):
        free(self.ring)
        free(self.table)

    def __len__(self):
        return <Py_ssize_t> self.count

    cdef inline size_t home(self, const SeenOne* one) noexcept nogil:
        # the digest is random already: its keys are of this process
        return <size_t> (one.digest[0] ^ one.place * <uint64_t> 0x9E3779B97F4A7C15) & self.mask

    cdef size_t find(self, const SeenOne* one) noexcept nogil:
        """Where it stands in the table, or where it would stand."""
        cdef size_t at = self.home(one)
        cdef SeenOne* other
        while self.table[at]:
            other = &self.ring[self.table[at] - 1]
            if (other.digest[0] == one.digest[0] and other.digest[1] == one.digest[1]
                    and other.place == one.place):
                break
            at = (at + 1) & self.mask
        return at

    cdef void forget(self, const SeenOne* one) noexcept nogil:
        """Take it out of the table. What stands behind it moves up, so that no search ends at a hole."""
        cdef size_t hole = self.find(one)
        cdef size_t at = hole
        cdef size_t home
        while True:
            at = (at + 1) & self.mask
            if not self.table[at]:
                break
            home = self.home(&self.ring[self.table[at] - 1])
            # it may move when its home does not lie between the hole and where it stands
            if (at - home) & self.mask >= (at - hole) & self.mask:
                self.table[hole] = self.table[at]
                hole = at
        self.table[hole] = 0

    def is_new(self, ConsumerRecord record not None) -> bool:
        """Was no such record among the last ones? It is one of them from now on."""
        cdef SeenOne one
        cdef const char* key = NULL
        cdef Py_ssize_t length = 0
        cdef size_t at
        # A key that says nothing about the one record would make equal readings of a machine one reading.
        if record.partition_key is not None:
            key = PyUnicode_AsUTF8AndSize(record.partition_key, &length)
        if length == 0 or not is_uuid(key, length):
            self.unknown += 1
            return True
        fk_digest(<const uint8_t*> key, <size_t> length, <const uint8_t*> PyBytes_AS_STRING(record.raw),
                  <size_t> PyBytes_GET_SIZE(record.raw), one.digest)
        one.place = 0 if record.subsequence_number is None else <uint64_t> record.subsequence_number + 1
        if self.table[self.find(&one)]:
            self.duplicates += 1
            return False
        if self.count == self.most:
            self.forget(&self.ring[self.next])
        else:
            self.count += 1
        self.ring[self.next] = one
        at = self.find(&one)
        self.table[at] = <uint32_t> (self.next + 1)
        self.next = self.next + 1 if self.next + 1 < self.most else 0
        return True

# The bulk frame. Go's encoder writes MessagePack values one after another: the str "1.0", then one bin
# per record. Accepted besides: the version in any str width; the bins as one array behind the version;
# one array that holds version and bins; and a str of any width for a record, whose bytes are then the record,
# valid UTF-8 or not. MessagePack before 2013 had no bin: its raw family has the codes that str has now, but for
# str8; and who packs text gets a str. Every other type is refused.

cdef enum FrameStatus:
    FRAME_OK = 0
    FRAME_EMPTY
    FRAME_NO_VERSION  # the first value is no str
    FRAME_WRONG_VERSION
    FRAME_CUT_HEADER
    FRAME_CUT_VALUE
    FRAME_NOT_BYTES
    FRAME_NO_ELEMENTS  # an array without even the version
    FRAME_FEW  # an array ends early
    FRAME_TRAILING


cdef inline FrameStatus frame_value(const uint8_t* p, size_t left, bint first, size_t* head,
                                    size_t* body) noexcept nogil:
    """The header of one value at p: a str when `first`, else bytes. `left` is at least 1."""
    cdef uint8_t code = p[0]
    cdef size_t width
    if code == 0xC4 or code == 0xC5 or code == 0xC6:
        if first:
            return FRAME_NO_VERSION
        width = <size_t> 1 << (code - 0xC4)
    elif 0xA0 <= code <= 0xBF:
        head[0] = 1
        body[0] = code & 31
        return FRAME_OK
    elif code == 0xDA or code == 0xDB:
        width = <size_t> 2 << (code - 0xDA)
    elif code == 0xD9:
        width = 1
    else:
        return FRAME_NO_VERSION if first else FRAME_NOT_BYTES
    head[0] = 1 + width
    if 1 + width > left:
        return FRAME_CUT_HEADER
    if width == 1:
        body[0] = p[1]
    elif width == 2:
        body[0] = <size_t> p[1] << 8 | p[2]
    else:
        body[0] = <size_t> p[1] << 24 | <size_t> p[2] << 16 | <size_t> p[3] << 8 | p[4]
    return FRAME_OK


cdef inline bint frame_array(const uint8_t* p, size_t left, size_t* head, size_t* count) noexcept nogil:
    """Is there an array header at p (`left` may be 0)? A cut one has head > left."""
    if left == 0:
        return False
    if p[0] & 0xF0 == 0x90:
        head[0] = 1
        count[0] = p[0] & 15
    elif p[0] == 0xDC:
        head[0] = 3
        if left >= 3:
            count[0] = <size_t> p[1] << 8 | p[2]
    elif p[0] == 0xDD:
        head[0] = 5
        if left >= 5:
            count[0] = <size_t> p[1] << 24 | <size_t> p[2] << 16 | <size_t> p[3] << 8 | p[4]
    else:
        return False
    return True


cdef inline bint frame_bad(Payload* frame, FrameStatus status, size_t at, size_t needed, size_t left) noexcept nogil:
    frame.wrong = status
    frame.at = at
    frame.needed = needed
    frame.left = left
    return False


cdef bint bulk_scan(Payload* frame) noexcept nogil:
    cdef const uint8_t* data = frame.data
    cdef size_t length = frame.length
    cdef size_t at = 0
    cdef size_t head = 0
    cdef size_t body = 0
    cdef size_t left
    cdef size_t elements = 0
    cdef bint counted = False  # inside one array
    cdef FrameStatus status
    frame.count = frame.data_bytes = frame.longest = 0
    if length == 0:
        return frame_bad(frame, FRAME_EMPTY, 0, 0, 0)
    if frame_array(data, length, &head, &elements):
        if head > length:
            return frame_bad(frame, FRAME_CUT_HEADER, 0, head, length)
        if elements == 0:
            return frame_bad(frame, FRAME_NO_ELEMENTS, 0, 0, 0)
        if head == length:
            return frame_bad(frame, FRAME_FEW, head, elements, 0)
        counted = True
        elements -= 1
        at = head
    status = frame_value(data + at, length - at, True, &head, &body)
    if status != FRAME_OK:
        return frame_bad(frame, status, at, head, length - at)
    if body != 3:
        if body > length - at - head:
            return frame_bad(frame, FRAME_CUT_VALUE, at, body, length - at - head)
        return frame_bad(frame, FRAME_WRONG_VERSION, at, body, 0)
    if length - at - head < 3:
        return frame_bad(frame, FRAME_CUT_VALUE, at, 3, length - at - head)
    if data[at + head] != c"1" or data[at + head + 1] != c"." or data[at + head + 2] != c"0":
        return frame_bad(frame, FRAME_WRONG_VERSION, at, 3, 0)
    at += head + 3
    if not counted and frame_array(data + at, length - at, &head, &elements):
        if head > length - at:
            return frame_bad(frame, FRAME_CUT_HEADER, at, head, length - at)
        counted = True
        at += head
    frame.first = at
    while at < length:
        if counted and frame.count == elements:
            return frame_bad(frame, FRAME_TRAILING, at, 0, length - at)
        left = length - at
        status = frame_value(data + at, left, False, &head, &body)
        if status != FRAME_OK:
            return frame_bad(frame, status, at, head, left)
        left -= head
        if body > left:
            return frame_bad(frame, FRAME_CUT_VALUE, at, body, left)
        at += head + body
        frame.count += 1
        frame.data_bytes += body
        if body > frame.longest:
            frame.longest = body
    if counted and frame.count < elements:
        return frame_bad(frame, FRAME_FEW, at, elements, frame.count)
    return True


cdef size_t bulk_next(const Payload* frame, size_t* at, size_t* length) noexcept nogil:
    cdef const uint8_t* p = frame.data + at[0]
    cdef uint8_t code = p[0]
    cdef size_t begin = at[0]
    if code == 0xC4 or code == 0xD9:
        length[0] = p[1]
        begin += 2
    elif 0xA0 <= code <= 0xBF:
        length[0] = code & 31
        begin += 1
    elif code == 0xC5 or code == 0xDA:
        length[0] = <size_t> p[1] << 8 | p[2]
        begin += 3
    else:
        length[0] = <size_t> p[1] << 24 | <size_t> p[2] << 16 | <size_t> p[3] << 8 | p[4]
        begin += 5
    at[0] = begin + length[0]
    return begin


cdef tuple _CODES = (
    "nil", "reserved", "false", "true", "bin8", "bin16", "bin32", "ext8", "ext16", "ext32", "float32",
    "float64", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "fixext1",
    "fixext2", "fixext4", "fixext8", "fixext16", "str8", "str16", "str32", "array16", "array32", "map16",
    "map32",
)


cdef str frame_type(uint8_t code):
    if code < 0x80:
        name = "positive fixint"
    elif code < 0x90:
        name = "fixmap"
    elif code < 0xA0:
        name = "fixarray"
    elif code < 0xC0:
        name = "fixstr"
    elif code < 0xE0:
        name = _CODES[code - 0xC0]
    else:
        name = "negative fixint"
    return f"{name} 0x{code:02x}"


cdef str frame_kind(FrameStatus status):
    """What is wrong, for a counter."""
    if status == FRAME_EMPTY or status == FRAME_NO_ELEMENTS:
        return "empty"
    if status == FRAME_NO_VERSION or status == FRAME_WRONG_VERSION:
        return "version"
    if status == FRAME_TRAILING:
        return "trailing"
    if status == FRAME_FEW or status == FRAME_CUT_HEADER or status == FRAME_CUT_VALUE:
        return "truncated"
    return "element"


cdef tuple bulk_reason(const Payload* frame):
    return frame_kind(<FrameStatus> frame.wrong), frame_reason(frame)


cdef str frame_reason(const Payload* frame):
    """What is wrong, for a person. `frame.at` is where."""
    cdef FrameStatus status = <FrameStatus> frame.wrong
    if status == FRAME_EMPTY:
        return 'empty payload: the version string "1.0" is missing'
    if status == FRAME_NO_ELEMENTS:
        return 'empty array: the version string "1.0" is missing'
    if status == FRAME_FEW:
        return f"truncated: the array announces {frame.needed} elements, it has {frame.left}"
    if status == FRAME_TRAILING:
        return f"{frame.left} bytes behind the end of the array"
    what = frame_type(frame.data[frame.at])
    if status == FRAME_NO_VERSION:
        return f'the first value is {what}, not the version string "1.0"'
    if status == FRAME_WRONG_VERSION:
        return f'the version is not "1.0" ({what} of {frame.needed} bytes)'
    if status == FRAME_CUT_HEADER:
        return f"truncated: the header of {what} needs {frame.needed} bytes, {frame.left} are left"
    if status == FRAME_CUT_VALUE:
        return f"truncated: {what} of {frame.needed} bytes, {frame.left} are left"
    return f"a record is {what}, not bytes"


def encode_frame(records) -> bytes:
    """A bulk frame as Go's encoder writes it: the str "1.0", then each record as the smallest bin."""
    cdef Buf out
    cdef Bytes source
    cdef char* p
    out.p = NULL
    out.length = out.room = 0
    try:
        buf_need(&out, 256)
        memcpy(out.p, b"\xa31.0", 4)
        out.length = 4
        for record in records:
            bytes_open(record, &source, "a record")
            try:
                if source.length > UINT32_MAX:
                    raise LibraryError(f"a record of {source.length} bytes does not fit a bin32")
                buf_need(&out, source.length + 5)
                p = out.p + out.length
                if source.length < 0x100:
                    p[0] = <char> 0xC4
                    p += 1
                elif source.length < 0x10000:
                    p[0] = <char> 0xC5
                    p[1] = <char> (source.length >> 8)
                    p += 2
                else:
                    p[0] = <char> 0xC6
                    p[1] = <char> (source.length >> 24)
                    p[2] = <char> (source.length >> 16)
                    p[3] = <char> (source.length >> 8)
                    p += 4
                p[0] = <char> source.length
                memcpy(p + 1, source.p, source.length)
                out.length = <size_t> (p + 1 - out.p) + source.length
            finally:
                bytes_close(&source)
        return PyBytes_FromStringAndSize(out.p, <Py_ssize_t> out.length)
    finally:
        buf_free(&out)

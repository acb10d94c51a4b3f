# JSON from bytes nobody vouches for. A cursor walks between p and end; nothing recurses: how deep a
# value nests is counted in the bits of one word. Strict in structure (RFC 8259), except that control
# characters inside strings pass and the UTF-8 of strings that are skipped is not looked at.

cdef struct Cursor:
    const uint8_t* p
    const uint8_t* end

cdef struct Text:
    # the inside of a JSON string, escapes not decoded; p NULL: none
    const uint8_t* p
    size_t length
    bint escaped

cdef enum:
    JSON_DEPTH = 60  # the nesting of a value we skip; json.loads stops near 1000


cdef inline int json_blank(Cursor* c) noexcept nogil:
    """Skip white space; the byte that comes, or -1 at the end."""
    while c.p < c.end:
        if c.p[0] != c" " and c.p[0] != c"\n" and c.p[0] != c"\r" and c.p[0] != c"\t":
            return c.p[0]
        c.p += 1
    return -1


cdef int json_string(Cursor* c, Text* out) noexcept nogil:
    """A string; c.p is at its opening quote. 0, or -1 when it does not end."""
    cdef const uint8_t* p = c.p + 1
    cdef const uint8_t* quote = p
    cdef const uint8_t* scan
    out.p = p
    out.escaped = False
    quote = <const uint8_t*> memchr(p, c'"', <size_t> (c.end - p))
    if quote == NULL:
        return -1
    scan = <const uint8_t*> memchr(p, c"\\", <size_t> (quote - p))
    if scan != NULL:
        out.escaped = True
        while True:
            if scan == c.end:
                return -1
            if scan[0] == c'"':
                quote = scan
                break
            if scan[0] == c"\\":
                scan += 1
                if scan == c.end:
                    return -1
            scan += 1
    out.length = <size_t> (quote - p)
    c.p = quote + 1
    return 0


cdef inline bint json_digits(Cursor* c) noexcept nogil:
    cdef const uint8_t* start = c.p
    while c.p < c.end and c"0" <= c.p[0] <= c"9":
        c.p += 1
    return c.p > start


cdef int json_number(Cursor* c) noexcept nogil:
    """A number at c.p: 0, or -1."""
    if c.p < c.end and c.p[0] == c"-":
        c.p += 1
    if c.p < c.end and c.p[0] == c"0":
        c.p += 1
    elif not json_digits(c):
        return -1
    if c.p < c.end and c.p[0] == c".":
        c.p += 1
        if not json_digits(c):
            return -1
    if c.p < c.end and (c.p[0] == c"e" or c.p[0] == c"E"):
        c.p += 1
        if c.p < c.end and (c.p[0] == c"+" or c.p[0] == c"-"):
            c.p += 1
        if not json_digits(c):
            return -1
    return 0


cdef int json_word(Cursor* c, const char* word, size_t length) noexcept nogil:
    if length > <size_t> (c.end - c.p) or memcmp(c.p, word, length) != 0:
        return -1
    c.p += length
    return 0


cdef int json_scalar(Cursor* c, int byte) noexcept nogil:
    """A value that is no object and no array, `byte` is its first. 0, or -1."""
    cdef Text text
    if byte == c'"':
        return json_string(c, &text)
    if byte == c"t":
        return json_word(c, "true", 4)
    if byte == c"f":
        return json_word(c, "false", 5)
    if byte == c"n":
        return json_word(c, "null", 4)
    return json_number(c)


cdef int json_name(Cursor* c, Text* name) noexcept nogil:
    """A member's name and its colon; white space may come first. 0, or -1."""
    if json_blank(c) != c'"' or json_string(c, name) < 0 or json_blank(c) != c":":
        return -1
    c.p += 1
    return 0


cdef int json_skip(Cursor* c) noexcept nogil:
    """Any value; white space may come first. 0, or -1 when it is malformed or nests too deep."""
    cdef uint64_t objects = 0  # bit n: at depth n we are in an object
    cdef int depth = 0
    cdef int byte
    cdef Text name
    while True:
        # a value begins
        byte = json_blank(c)
        if byte < 0:
            return -1
        if byte == c"{" or byte == c"[":
            if depth == JSON_DEPTH:
                return -1
            c.p += 1
            depth += 1
            objects = objects << 1 | (byte == c"{")
            byte = json_blank(c)
            if byte == (c"}" if objects & 1 else c"]"):
                c.p += 1
                depth -= 1
                objects >>= 1
            else:
                if objects & 1 and json_name(c, &name) < 0:
                    return -1
                continue
        elif json_scalar(c, byte) < 0:
            return -1
        # a value has ended: close what ends with it
        while True:
            if depth == 0:
                return 0
            byte = json_blank(c)
            if byte == c",":
                c.p += 1
                if objects & 1 and json_name(c, &name) < 0:
                    return -1
                break
            if byte != (c"}" if objects & 1 else c"]"):
                return -1
            c.p += 1
            depth -= 1
            objects >>= 1


cdef bint json_whole(const uint8_t* data, size_t length) noexcept nogil:
    """Is it one value and nothing else?"""
    cdef Cursor c
    c.p = data
    c.end = data + length
    return json_skip(&c) == 0 and json_blank(&c) < 0


cdef inline int json_hex(const uint8_t* p, size_t left) noexcept nogil:
    """The four hex digits of \\u, or -1."""
    cdef int value = 0
    cdef int i
    cdef uint8_t byte
    if left < 4:
        return -1
    for i in range(4):
        byte = p[i]
        if c"0" <= byte <= c"9":
            byte -= c"0"
        elif c"a" <= byte <= c"f":
            byte -= c"a" - 10
        elif c"A" <= byte <= c"F":
            byte -= c"A" - 10
        else:
            return -1
        value = value << 4 | byte
    return value


cdef Py_ssize_t json_decode(const Text* text, uint8_t* out, size_t room) noexcept nogil:
    """The string's UTF-8 with escapes decoded, never longer than text.length. How many bytes; -1: a bad
    escape or a lone surrogate; -2: more than `room`."""
    cdef const uint8_t* p = text.p
    cdef size_t left = text.length
    cdef size_t n = 0
    cdef size_t width
    cdef int point
    cdef int low
    if not text.escaped:
        if left > room:
            return -2
        memcpy(out, p, left)
        return <Py_ssize_t> left
    while left > 0:
        point = p[0]
        p += 1
        left -= 1
        if point != c"\\":
            if n == room:
                return -2
            out[n] = <uint8_t> point
            n += 1
            continue
        if left == 0:
            return -1
        point = p[0]
        p += 1
        left -= 1
        if point == c"n":
            point = c"\n"
        elif point == c"t":
            point = c"\t"
        elif point == c"r":
            point = c"\r"
        elif point == c"b":
            point = 8
        elif point == c"f":
            point = 12
        elif point == c"u":
            point = json_hex(p, left)
            if point < 0:
                return -1
            p += 4
            left -= 4
            if 0xD800 <= point < 0xE000:
                if point >= 0xDC00 or left < 6 or p[0] != c"\\" or p[1] != c"u":
                    return -1
                low = json_hex(p + 2, left - 2)
                if not 0xDC00 <= low < 0xE000:
                    return -1
                p += 6
                left -= 6
                point = 0x10000 + ((point - 0xD800) << 10 | (low - 0xDC00))
        elif point != c'"' and point != c"\\" and point != c"/":
            return -1
        width = 1 if point < 0x80 else 2 if point < 0x800 else 3 if point < 0x10000 else 4
        if room - n < width:
            return -2
        if width == 1:
            out[n] = <uint8_t> point
        elif width == 2:
            out[n] = <uint8_t> (0xC0 | point >> 6)
            out[n + 1] = <uint8_t> (0x80 | point & 63)
        elif width == 3:
            out[n] = <uint8_t> (0xE0 | point >> 12)
            out[n + 1] = <uint8_t> (0x80 | point >> 6 & 63)
            out[n + 2] = <uint8_t> (0x80 | point & 63)
        else:
            out[n] = <uint8_t> (0xF0 | point >> 18)
            out[n + 1] = <uint8_t> (0x80 | point >> 12 & 63)
            out[n + 2] = <uint8_t> (0x80 | point >> 6 & 63)
            out[n + 3] = <uint8_t> (0x80 | point & 63)
        n += width
    return <Py_ssize_t> n


cdef enum:
    NAME_ROOM = 1024


cdef bint json_named(const Text* name, const char* wanted, size_t length) noexcept nogil:
    """Is the member's name, escapes decoded, `wanted`?"""
    cdef uint8_t decoded[NAME_ROOM]
    cdef Py_ssize_t n
    if not name.escaped:
        return name.length == length and memcmp(name.p, wanted, length) == 0
    n = json_decode(name, decoded, NAME_ROOM)
    return n == <Py_ssize_t> length and memcmp(decoded, wanted, length) == 0


cdef int json_member(Cursor* c, const char* wanted, size_t length) noexcept nogil:
    """Move to the value of the first member of that name; c.p is at or before the object. 0, or -1
    when there is none before the object ends or goes wrong."""
    cdef Text name
    if json_blank(c) != c"{":
        return -1
    c.p += 1
    while json_name(c, &name) == 0:
        if json_named(&name, wanted, length):
            return 0
        if json_skip(c) < 0 or json_blank(c) != c",":
            return -1
        c.p += 1
    return -1


cdef str json_text(const Text* text):
    """The string as str; what cannot be decoded is replaced. For messages."""
    cdef Py_ssize_t n
    cdef uint8_t* out
    if text.p == NULL:
        return ""
    out = <uint8_t*> take_memory(NULL, text.length + 1)
    try:
        n = json_decode(text, out, text.length)
        if n < 0:
            return PyUnicode_DecodeUTF8(<const char*> text.p, <Py_ssize_t> text.length, "replace")
        return PyUnicode_DecodeUTF8(<const char*> out, n, "replace")
    finally:
        free(out)

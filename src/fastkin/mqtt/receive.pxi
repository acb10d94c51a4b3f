# The memory that a connection receives into, and how large it is.
#
# One buffer serves the socket and the parser: a packet is parsed where it was received, so its bytes are
# not copied. The buffer holds [read, written). It grows for a packet that does not fit and for a broker
# that fills whole reads, and shrinks again: else each connection would keep for ever what a burst took.

cdef extern from *:
    # In the sanitizer build whatever follows the packet in hand is out of bounds: without this a
    # read past its end stays inside the receive buffer and is not seen. Nothing in other builds.
    """
    #ifdef FASTKIN_SANITIZE
    #include <sanitizer/asan_interface.h>
    #define fastkin_fence(p, n) __asan_poison_memory_region((p), (n))
    #define fastkin_unfence(p, n) __asan_unpoison_memory_region((p), (n))
    #else
    #define fastkin_fence(p, n) ((void) 0)
    #define fastkin_unfence(p, n) ((void) 0)
    #endif
    """
    void fastkin_fence(const void* p, size_t n) noexcept nogil
    void fastkin_unfence(const void* p, size_t n) noexcept nogil

cdef enum:
    READ_SMALL = 65536    # what a connection starts with: about 300 welder messages a read
    READ_LARGE = 262144   # what it gets when it fills whole reads; more would leave the cache
    READ_LEAST = 16384    # with less room than this the rest is moved to the front first
    READ_CALM = 64        # reads in a row that would do with less before the buffer shrinks


@cython.final
@cython.internal
cdef class Chunk:
    """Memory of a receive buffer: an object, so that a memoryview outlives a change of buffer."""
    cdef uint8_t* data
    cdef size_t size
    cdef size_t offset  # where the next memoryview begins

    def __cinit__(self, size_t size):
        self.data = <uint8_t*> malloc(size)
        if self.data == NULL:
            raise MemoryError
        self.size = size

    def __dealloc__(self):
        free(self.data)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.data + self.offset,
                          <Py_ssize_t> (self.size - self.offset), False, flags)


@cython.internal
cdef class ReceiveBuffer:
    """A base of Session and not a member of it: the walk reads these fields for each packet.

    Its methods are final: a call to one is a plain call of C.
    """

    cdef Chunk _chunk
    cdef size_t _read        # where the first packet that is not taken begins
    cdef size_t _written     # where the bytes end that have come
    cdef size_t _need        # bytes of the packet in hand with its header; 0: not known yet
    cdef size_t _offered     # how much room the last get_buffer() gave
    cdef size_t _read_size   # how much room a read gets
    cdef int _calm           # reads in a row that would do with less
    cdef int _spare          # calls in a row that found the buffer larger than wanted

    def __cinit__(self):
        self._read_size = READ_SMALL
        self._chunk = Chunk(READ_SMALL)

    @cython.final
    cdef int _rebuild(self, size_t size) except -1:
        """The unread bytes at the front of a new buffer."""
        cdef Chunk chunk = Chunk(size)
        cdef size_t unread = self._written - self._read
        memcpy(chunk.data, self._chunk.data + self._read, unread)
        self._chunk = chunk
        self._read = 0
        self._written = unread
        return 0

    @cython.final
    cdef int _make_room(self, size_t least) except -1:
        """Makes place for `least` more bytes (at least one) and for the packet in hand."""
        cdef size_t unread = self._written - self._read
        cdef size_t target = self._read_size
        if unread == 0:
            self._read = self._written = 0
        if least == 0:
            least = 1
        if self._need > READ_LEAST and self._need > unread:
            # the packet, and the beginning of what follows it
            if self._need + READ_LEAST > target:
                target = self._need + READ_LEAST
        if least > target or unread > target - least:
            target = unread + least
        if self._chunk.size < target:
            return self._rebuild(target)
        if self._chunk.size > target:
            self._spare += 1
            # a large packet is behind us: give its memory back, but not between two of them
            if self._spare >= (2 if self._chunk.size > READ_LARGE * 4 else READ_CALM):
                self._spare = 0
                return self._rebuild(target)
        else:
            self._spare = 0
        if self._read > 0:
            if (self._chunk.size - self._written < READ_LEAST
                    or self._chunk.size - self._written < least
                    or self._chunk.size - self._read < self._need):
                memmove(self._chunk.data, self._chunk.data + self._read, unread)
                self._read = 0
                self._written = unread
        return 0

    @cython.final
    cdef void _adapt(self, size_t got) noexcept:
        """Larger reads when reads are filled, small ones again when they have long been small."""
        if got == self._offered and got >= READ_SMALL // 2:
            if self._read_size < READ_LARGE:
                self._read_size *= 2
            self._calm = 0
        elif self._read_size > READ_SMALL and got < READ_SMALL // 2:
            self._calm += 1
            if self._calm >= READ_CALM:
                self._read_size = READ_SMALL
                self._calm = 0

    @property
    def buffer_bytes(self) -> int:
        """The size of the receive buffer now."""
        return self._chunk.size

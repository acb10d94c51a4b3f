# A payload is one record, whatever is in it.


cdef bint raw_scan(Payload* payload) noexcept nogil:
    payload.first = 0
    payload.count = 1
    payload.data_bytes = payload.longest = payload.length
    return True


cdef size_t raw_next(const Payload* payload, size_t* at, size_t* length) noexcept nogil:
    length[0] = payload.length
    return 0


cdef tuple raw_reason(const Payload* payload):
    raise SystemError("every payload is a record")  # raw_scan refuses nothing

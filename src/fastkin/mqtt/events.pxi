# Control packets as objects: what take_events() gives. They are few, so they may be objects. A PUBLISH never is one.

cdef dict PROPERTY_NAMES = {
    0x11: "session_expiry_interval",
    0x12: "assigned_client_identifier",
    0x13: "server_keep_alive",
    0x15: "authentication_method",
    0x16: "authentication_data",
    0x1A: "response_information",
    0x1C: "server_reference",
    0x1F: "reason_string",
    0x21: "receive_maximum",
    0x22: "topic_alias_maximum",
    0x24: "maximum_qos",
    0x25: "retain_available",
    0x26: "user_property",
    0x27: "maximum_packet_size",
    0x28: "wildcard_subscription_available",
    0x29: "subscription_identifiers_available",
    0x2A: "shared_subscription_available",
}


cdef enum:
    USERS_KEPT = 32  # user properties of one packet; the others are checked and let go


# Control packets are few, so they may be objects. PUBLISH never comes this way.
cdef dict properties_dict(const uint8_t* p, size_t left):
    """Properties that check_properties() has passed."""
    cdef dict out = {}
    cdef size_t n
    cdef uint32_t ident
    cdef int kind
    while left > 0:
        ident = p[0]
        kind = property_kind(ident)
        p += 1
        left -= 1
        name = PROPERTY_NAMES[ident]
        if kind == KIND_FLAG:
            # maximum_qos is a number, the others say whether something is available
            value = int(p[0]) if ident == 0x24 else p[0] == 1
            n = 1
        elif kind == KIND_TWO:
            value = load_two(p)
            n = 2
        elif kind == KIND_FOUR:
            value = load_four(p)
            n = 4
        else:
            n = load_two(p)
            value = p[2:2 + n]
            if kind != KIND_BINARY:
                value = (<bytes> value).decode()
            n += 2
        if kind == KIND_PAIR:
            p += n
            left -= n
            n = load_two(p)
            pairs = out.setdefault(name, [])
            if len(pairs) < USERS_KEPT:
                pairs.append((value, (<bytes> p[2:2 + n]).decode()))
            n += 2
        else:
            out[name] = value
        p += n
        left -= n
    return out


@cython.final
cdef class Connack:
    """The broker's answer to CONNECT."""
    cdef readonly bint session_present
    cdef readonly int code
    cdef readonly dict properties

    def __repr__(self) -> str:
        return (f"Connack(session_present={self.session_present}, code={self.code},"
                f" properties={self.properties})")


@cython.final
cdef class Suback:
    """One code per filter of the SUBSCRIBE: the granted QoS, or 0x80 and above for a refusal."""
    cdef readonly int packet_id
    cdef readonly list codes

    def __repr__(self) -> str:
        return f"Suback(packet_id={self.packet_id}, codes={self.codes})"


@cython.final
cdef class Unsuback:
    """One code per filter of the UNSUBSCRIBE; none at all in 3.1.1."""
    cdef readonly int packet_id
    cdef readonly list codes

    def __repr__(self) -> str:
        return f"Unsuback(packet_id={self.packet_id}, codes={self.codes})"


@cython.final
cdef class Puback:
    """Acknowledgements that came in a row; `refused`: the codes of those not taken."""
    cdef readonly list packet_ids
    cdef readonly dict refused

    def __repr__(self) -> str:
        return f"Puback(packet_ids={self.packet_ids}, refused={self.refused})"


@cython.final
cdef class Pingresp:
    """The answer to pingreq()."""

    def __repr__(self) -> str:
        return "Pingresp()"


@cython.final
cdef class Disconnect:
    """The broker ends the connection (5.0 only) and says why."""
    cdef readonly int code
    cdef readonly dict properties

    def __repr__(self) -> str:
        return f"Disconnect(code={self.code}, properties={self.properties})"

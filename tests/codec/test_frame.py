"""The bulk frame: read as the oracle reads it, written as Go's encoder writes it."""

from __future__ import annotations

import gc
import struct
import sys
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkin import decode_frame, encode_frame
from fastkin.errors import DataFormatError, LibraryError
from support import oracle

CORPUS = sorted((Path(__file__).parent.parent / "corpus").glob("frame-*.bin"))
VERSIONS = [b"\xa31.0", b"\xd9\x031.0", b"\xda\x00\x031.0", b"\xdb\x00\x00\x00\x031.0"]


def element(data: bytes, family: str) -> bytes:
    """One record in a given coding, when it fits."""
    size = len(data)
    match family:
        case "bin8" if size < 1 << 8:
            return b"\xc4" + struct.pack(">B", size) + data
        case "bin16":
            return b"\xc5" + struct.pack(">H", size) + data
        case "fixraw" if size < 32:
            return bytes([0xA0 | size]) + data
        case "str8" if size < 1 << 8:
            return b"\xd9" + struct.pack(">B", size) + data
        case "raw16":
            return b"\xda" + struct.pack(">H", size) + data
        case "raw32":
            return b"\xdb" + struct.pack(">I", size) + data
    return b"\xc6" + struct.pack(">I", size) + data


def array(count: int, family: int) -> bytes:
    if family == 0 and count < 16:
        return bytes([0x90 | count])
    return b"\xdc" + struct.pack(">H", count) if family < 2 else b"\xdd" + struct.pack(">I", count)


@st.composite
def frames(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    records = draw(st.lists(st.one_of(st.binary(max_size=40), st.binary(min_size=250, max_size=300)), max_size=20))
    version = draw(st.sampled_from(VERSIONS))
    kinds = st.sampled_from(["bin8", "bin16", "bin32", "fixraw", "str8", "raw16", "raw32"])
    elements = b"".join(element(record, draw(kinds)) for record in records)
    family = draw(st.integers(0, 2))
    match draw(st.sampled_from(["stream", "array behind", "one array"])):
        case "stream":
            return version + elements, records
        case "array behind":
            return version + array(len(records), family) + elements, records
    return array(len(records) + 1, family) + version + elements, records


def outcome(payload: bytes) -> object:
    try:
        return decode_frame(payload)
    except DataFormatError as error:
        offset, reason = error.offset, error.reason
    assert 0 <= offset <= len(payload)
    assert reason
    return offset


def expected(payload: bytes) -> object:
    try:
        return oracle.decode_frame(payload)
    except oracle.BadFrameError as error:
        return error.offset


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("elements", "records"),
    [
        ("", []),
        ("c40161", [b"a"]),
        ("c400", [b""]),
        ("c50001 61", [b"a"]),
        ("c600000001 61", [b"a"]),
        ("c40161 c400 c4026263", [b"a", b"", b"bc"]),
    ],
)
def test_the_smallest_frames(version: bytes, elements: str, records: list[bytes]) -> None:
    """MD-16, MD-18: each width of the version and of a record, no record at all, an empty one among others."""
    assert decode_frame(version + bytes.fromhex(elements)) == records
    assert encode_frame([b"a"]).hex() == "a3312e30c40161"


@given(frames())
def test_reads_every_form(frame: tuple[bytes, list[bytes]]) -> None:
    payload, records = frame
    assert decode_frame(payload) == records == oracle.decode_frame(payload)
    assert decode_frame(bytearray(payload)) == records
    assert decode_frame(memoryview(b"x" + payload + b"x")[1:-1]) == records


@given(frames(), st.data())
@settings(max_examples=300)
def test_what_is_cut_or_changed_is_judged_as_the_oracle_does(
    frame: tuple[bytes, list[bytes]], data: st.DataObject
) -> None:
    payload = bytearray(frame[0])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload)))
        match data.draw(st.integers(0, 3)):
            case 0:
                del payload[at:]
            case 1 if at < len(payload):
                payload[at] = data.draw(st.integers(0, 255))
            case 2:
                payload[at:at] = data.draw(st.binary(max_size=3))
            case _:
                del payload[at : at + 2]
    assert outcome(bytes(payload)) == expected(bytes(payload))


@given(st.binary(max_size=60))
def test_garbage(payload: bytes) -> None:
    assert outcome(payload) == expected(payload)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_corpus_cut_at_every_byte(path: Path) -> None:
    payload = path.read_bytes()
    assert isinstance(decode_frame(payload), list)
    for end in range(len(payload)):
        assert outcome(payload[:end]) == expected(payload[:end])


def test_corpus_is_there() -> None:
    assert len(CORPUS) >= 8


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_written_as_msgpack_and_go_write_it(records: list[bytes]) -> None:
    frame = encode_frame(records)
    assert frame == oracle.encode_frame(records)
    assert frame == msgpack.packb("1.0") + b"".join(msgpack.packb(record, use_bin_type=True) for record in records)
    assert list(msgpack.Unpacker(iter_of(frame), raw=False)) == ["1.0", *records]
    assert decode_frame(frame) == records


def iter_of(frame: bytes) -> object:
    import io

    return io.BytesIO(frame)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65535, 65536, 65537])
def test_widths(size: int) -> None:
    record = b"r" * size
    frame = encode_frame([record, bytearray(record), memoryview(record)])
    assert frame == oracle.encode_frame([record] * 3)
    assert decode_frame(frame) == [record] * 3


def test_go_bytes() -> None:
    assert encode_frame([b"ab", b""]) == bytes.fromhex("a3312e30c4026162c400")
    assert encode_frame(iter([b"ab"])) == encode_frame((b"ab",))
    assert encode_frame([]) == b"\xa31.0"
    assert decode_frame(b"\xa31.0") == []


@pytest.mark.parametrize("size", [0, 1, 31, 32, 255, 256, 65535, 65536])
def test_a_str_of_any_width_is_a_record_of_its_bytes(size: int) -> None:
    """MD-19: one rule for text among the records."""
    text = "ä" * (size // 2) + "x" * (size % 2)
    frame = b"\xa31.0" + msgpack.packb(text) + msgpack.packb(b"b")
    assert decode_frame(frame) == [text.encode(), b"b"] == oracle.decode_frame(frame)


def test_the_bytes_of_a_str_need_not_be_text() -> None:
    """MD-19: the raw family of MessagePack before 2013 has the codes of str, and held anything."""
    assert decode_frame(b"\xa31.0\xa2\xff\xfe\xd9\x01\xff\xda\x00\x01\x80\xdb\0\0\0\x01\xc0") == [
        b"\xff\xfe", b"\xff", b"\x80", b"\xc0"
    ]  # fmt: skip


NAMES = {
    0x05: "positive fixint", 0x81: "fixmap", 0xC0: "nil", 0xC1: "reserved", 0xC2: "false", 0xC3: "true",
    0xC7: "ext8", 0xC8: "ext16", 0xC9: "ext32", 0xCA: "float32", 0xCB: "float64", 0xCC: "uint8", 0xCD: "uint16",
    0xCE: "uint32", 0xCF: "uint64", 0xD0: "int8", 0xD1: "int16", 0xD2: "int32", 0xD3: "int64", 0xD4: "fixext1",
    0xD5: "fixext2", 0xD6: "fixext4", 0xD7: "fixext8", 0xD8: "fixext16", 0xDC: "array16",
    0xDD: "array32", 0xDE: "map16", 0xDF: "map32", 0xE0: "negative fixint", 0xFF: "negative fixint", 0x93: "fixarray",
}  # fmt: skip


@pytest.mark.parametrize("code", sorted(NAMES))
def test_a_record_of_another_type_is_named(code: int) -> None:
    head = b"\xa31.0\xc4\x01x"
    with pytest.raises(DataFormatError) as caught:
        decode_frame(head + bytes([code]) + b"\0" * 8)
    assert caught.value.offset == len(head)
    assert caught.value.reason == f"a record is {NAMES[code]} 0x{code:02x}, not bytes"


@pytest.mark.parametrize(
    ("payload", "offset", "reason"),
    [
        (b"", 0, "empty payload"),
        (b"\x90", 0, "empty array"),
        (b"\x92", 1, "announces 2 elements, it has 0"),
        (b"\xdc\x00", 0, "header of array16 0xdc needs 3 bytes, 2 are left"),
        (b"\xdd\x00\x00\x00", 0, "header of array32 0xdd needs 5 bytes, 4 are left"),
        (b"\xa31.0\xdd\x00", 4, "header of array32 0xdd needs 5 bytes, 2 are left"),
        (b"\xc0", 0, "the first value is nil 0xc0"),
        (b"\xc4\x031.0", 0, "the first value is bin8 0xc4"),
        (b"\x92\x01\xc4\x00", 1, "the first value is positive fixint"),
        (b"\xa31.1", 0, 'the version is not "1.0"'),
        (b"\xa32.0", 0, 'the version is not "1.0"'),
        (b"\xa31-0", 0, 'the version is not "1.0"'),
        (b"\xa41.00", 0, "fixstr 0xa4 of 4 bytes"),
        (b"\xa0", 0, "fixstr 0xa0 of 0 bytes"),
        (b"\xa31.", 0, "fixstr 0xa3 of 3 bytes, 2 are left"),
        (b"\xd9", 0, "header of str8 0xd9 needs 2 bytes, 1 are left"),
        (b"\xdb\xff\xff\xff\xff", 0, "str32 0xdb of 4294967295 bytes, 0 are left"),
        (b"\xa31.0\xc6\xff\xff\xff\xffabc", 4, "bin32 0xc6 of 4294967295 bytes, 3 are left"),
        (b"\xa31.0\xc5\x01", 4, "header of bin16 0xc5 needs 3 bytes, 2 are left"),
        (b"\xa31.0\x91\xc4\x01a\xc4\x01b", 8, "3 bytes behind the end of the array"),
        (b"\xa31.0\x92\xc4\x01a", 8, "announces 2 elements, it has 1"),
        (b"\xdd\xff\xff\xff\xff\xa31.0", 9, "announces 4294967294 elements, it has 0"),
        (b"\xa31.0\xc4\x01a\x91", 7, "a record is fixarray 0x91, not bytes"),
    ],
)
def test_what_is_wrong_is_said(payload: bytes, offset: int, reason: str) -> None:
    with pytest.raises(DataFormatError) as caught:
        decode_frame(payload)
    assert reason in caught.value.reason
    assert caught.value.offset == offset == expected(payload)
    assert f"byte {offset}" in str(caught.value)


def test_arguments() -> None:
    with pytest.raises(LibraryError, match="a frame must be contiguous bytes, not str"):
        decode_frame("1.0")  # type: ignore[arg-type]
    with pytest.raises(LibraryError, match="a frame must be contiguous bytes, not memoryview"):
        decode_frame(memoryview(b"abcdef")[::2])
    with pytest.raises(LibraryError, match="a record must be contiguous bytes, not NoneType"):
        encode_frame([b"a", None])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        encode_frame(5)  # type: ignore[arg-type]


def test_a_released_view() -> None:
    view = memoryview(b"\xa31.0")
    view.release()
    with pytest.raises(LibraryError):
        decode_frame(view)


def test_nothing_leaks() -> None:
    records = [b"x" * 100] * 50
    frame = bytearray(encode_frame(records))

    def work() -> None:
        for _ in range(50):
            decode_frame(frame)
            for bad in (frame[:-1], b"\xa31.0\xc0", memoryview(frame)[:70]):
                with pytest.raises(DataFormatError):
                    decode_frame(bad)
            encode_frame(records)
            with pytest.raises(LibraryError):
                encode_frame([b"x", 1])  # type: ignore[list-item]

    work()
    gc.collect()
    before = sys.getallocatedblocks()
    work()
    gc.collect()
    assert sys.getallocatedblocks() - before < 50
    frame.append(1)  # no view of it is left

"""The data of a call's body, one record behind the other: what goes into a file."""

from __future__ import annotations

import base64
import json
import random

import pytest

from fastkin._codec import joined_data
from fastkin.errors import LibraryError
from support.codec_rig import Rig


def test_the_data_of_a_body_is_what_was_put() -> None:
    rig = Rig()
    records = [random.Random(n).randbytes(n) for n in range(200)]
    for record in records:
        rig.batcher.put(record)
    for batch in rig.drain():
        assert joined_data(batch) == (200, b"".join(records))


@pytest.mark.parametrize("key", ['","PartitionKey":"k"}', '","PartitionKey":"k","ExplicitHashKey":"1"}', '"}'])
def test_keys_are_passed_over(key: str) -> None:
    entry = '{"Data":"' + base64.b64encode(b"ab\xff").decode() + key
    assert joined_data(f'{{"Records":[{entry},{entry}],"StreamName":"s"}}'.encode()) == (2, b"ab\xffab\xff")


def test_a_body_cut_at_each_byte_is_refused() -> None:
    body = json.dumps({"Records": [{"Data": "YWI="}, {"Data": ""}], "Directory": "/d"}, separators=(",", ":")).encode()
    assert joined_data(memoryview(body)) == (2, b"ab")
    for cut in range(len(body)):
        with pytest.raises(LibraryError):
            joined_data(body[:cut])


@pytest.mark.parametrize("data", ["YWI", "Y=I=", "YWI*", "YWI=YWI="])
def test_what_is_no_base64_is_refused(data: str) -> None:
    with pytest.raises(LibraryError, match="base64"):
        joined_data(f'{{"Records":[{{"Data":"{data}"}}],"S":""}}'.encode())

"""The packets that a source plays are those of a publisher, one by one, whatever is cut from them."""

from __future__ import annotations

import pytest

from fastkin.bench.forms import FORMS, Forms
from fastkin.bench.tape import CYCLE, PlantTape
from fastkin.mqtt import _core


def packet(forms: Forms, n: int, first: int, qos: int, version: int) -> bytes:
    packet_id = n % CYCLE + 1 if qos else 0
    return _core.publish(
        forms.topic(first + n), forms.payload(first + n), qos=qos, packet_id=packet_id, version=version
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("version", [4, 5])
def test_what_is_cut_is_what_a_publisher_would_write(form: str, qos: int, version: int) -> None:
    forms = Forms(form, samples=5)
    first = 3 * forms.block
    tape = PlantTape(forms, qos=qos, version=version, first=first)
    # identifiers go around behind 65,535, in the middle of a block
    for begin in (0, 1, forms.block - 2, CYCLE - 1, CYCLE, 5):
        data, count = tape.cut(begin, 2)
        assert 1 <= count <= 2
        assert bytes(data) == b"".join(packet(forms, begin + at, first, qos, version) for at in range(count))


def test_what_was_cut_stays_as_it_is() -> None:
    """It may wait in a socket's buffer while later blocks are made."""
    forms = Forms("welder")
    tape = PlantTape(forms, qos=1, version=4)
    data, _ = tape.cut(0, 3)
    before = bytes(data)
    tape.cut(forms.block, 3)
    tape.cut(7 * forms.block, 3)
    assert bytes(data) == before


def test_a_write_is_a_quarter_of_a_megabyte_at_most() -> None:
    forms = Forms("bulk", samples=1000)
    data, count = PlantTape(forms, qos=0, version=4).cut(0, 100)
    assert count < 100
    assert len(data) <= 256 * 1024


def test_a_tape_begins_with_a_block() -> None:
    with pytest.raises(ValueError, match="does not begin a block"):
        PlantTape(Forms("welder"), qos=1, version=4, first=5)

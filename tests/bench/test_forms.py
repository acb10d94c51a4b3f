"""What the simulated machines say: seeded, of one length, each with a number that is read back."""

from __future__ import annotations

import json

import msgpack
import orjson
import pytest

from fastkin.bench.forms import FORMS, Block, Forms

NUMBERS = [0, 1, 99, 100, 999, 1000, 1001, 65_534, 65_535, 65_536, 1_234_567]


@pytest.mark.parametrize("form", FORMS)
def test_a_seed_gives_the_same_bytes_and_another_seed_others(form: str) -> None:
    first, again, other = Forms(form, seed=7), Forms(form, seed=7), Forms(form, seed=8)
    assert [first.payload(n) for n in NUMBERS] == [again.payload(n) for n in NUMBERS]
    assert first.payload(5) != other.payload(5)


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_each_record_is_read_back(form: str) -> None:
    forms = Forms(form, samples=20)
    for n in NUMBERS:
        records = forms.records(forms.payload(n))
        assert [forms.number(record) for record in records] == [n * forms.samples + at for at in range(forms.samples)]


@pytest.mark.parametrize("form", FORMS)
def test_messages_have_one_length_and_never_come_twice(form: str) -> None:
    forms = Forms(form, samples=10)
    payloads = [payload for block in (0, 1, 2, 77) for payload in forms.payloads(block)]
    assert {len(payload) for payload in payloads} == {forms.payload_bytes}
    assert len(set(payloads)) == 4 * forms.block


def test_all_records_are_those_of_the_messages_in_order() -> None:
    forms = Forms("bulk", samples=3)
    want = [record for n in range(98, 203) for record in forms.records(forms.payload(n))]
    assert list(forms.all_records(98, 105)) == want


def test_a_welder_says_the_nine_fields_of_the_microservice() -> None:
    forms = Forms("welder")
    record = json.loads(forms.payload(1_002_003))
    assert list(record) == ["name", "model", "status", *(f"sensor_{n}" for n in range(1, 7))]
    assert (forms.payload_bytes, record["name"], record["model"]) == (152, "device003", "welder")
    assert forms.topic(1_002_003) == "plant/device003/welder"


def test_a_wide_record_is_json_of_some_forty_fields() -> None:
    record = json.loads(Forms("wide").payload(12_345))
    assert (record["id"], record["machine"]) == ("0000012345", "device345")
    assert len(record) >= 40
    assert {"current", "voltage", "wire_feed", "gas_flow", "arc", "arc_event"} <= set(record)


def test_a_bulk_frame_has_its_samples_at_the_rate_they_were_taken() -> None:
    forms = Forms("bulk", samples=4, sample_hz=20_000)
    frame = forms.payload(205)
    assert frame.startswith(b"\xa31.0")
    records = [json.loads(record) for record in forms.records(frame)]
    assert [record["t"] for record in records] == [0.0, 0.00005, 0.0001, 0.00015]
    assert records[2]["id"] == "0000000205-0002"
    assert forms.topic(205) == "/devices/device005/bulkData/telemetry"


def test_a_messagepack_map_is_stored_as_the_pipeline_stores_it() -> None:
    from fastkin.formats import msgpack as product

    forms = Forms("msgpack")
    payload = forms.payload(4711)
    assert msgpack.unpackb(payload)["id"] == "0000004711"
    assert forms.records(payload) == product.records(payload) == [orjson.dumps(msgpack.unpackb(payload))]


def test_welders_weld_and_rest() -> None:
    """Current, voltage, wire and gas follow from whether the arc burns, and each change is an event."""
    records = [json.loads(record) for record in Forms("bulk", samples=40).all_records(0, 20)]
    burning = [record for record in records if record["arc"]]
    resting = [record for record in records if not record["arc"]]
    assert all(100 <= record["current"] < 500 and 15 <= record["voltage"] <= 40 for record in burning)
    assert all(record["gas_flow"] > 11 for record in burning)
    assert {(record["current"], record["voltage"], record["wire_feed"]) for record in resting} == {(0.0, 0.0, 0.0)}
    assert {record["arc_event"] for record in burning} == {0, 1}
    assert {record["arc_event"] for record in resting} == {0, 2}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"form": "xml"}, "there is welder, wide, bulk, msgpack"),
        ({"form": "bulk", "samples": 0}, "1 to 10,000"),
        ({"form": "bulk", "samples": 10_001}, "1 to 10,000"),
        ({"form": "bulk", "sample_hz": 0.5}, "1 to 1,000,000"),
    ],
)
def test_a_form_that_cannot_be_is_refused(options: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Forms(**options)  # type: ignore[arg-type]


def test_messages_of_a_block_must_have_one_length() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Block([b"a", b"bb"], [], lambda _: b"")

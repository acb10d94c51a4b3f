"""The ledger finds what is missing, what came twice, and what nobody published."""

from __future__ import annotations

import base64
from array import array

import pytest
from aws_kinesis_agg.aggregator import RecordAggregator

from fastkin.bench.endpoint import canonical
from fastkin.bench.forms import Forms
from fastkin.bench.ledger import Balance, Ledger


def taken(ledger: Ledger, records: list[bytes], at: float = 1.0) -> None:
    ledger.take([base64.b64encode(each) for each in records] if ledger.encoded else records, at)


@pytest.mark.parametrize("encoded", [False, True])
def test_all_is_there(encoded: bool) -> None:
    forms = Forms("welder")
    ledger = Ledger(forms, encoded=encoded)
    records = list(forms.all_records(0, 1500))
    taken(ledger, records[700:])
    taken(ledger, records[:700])
    balance = ledger.balance([(0, 1500)])
    assert balance == Balance(published=1500, stored=1500)
    assert balance.good


@pytest.mark.parametrize("encoded", [False, True])
def test_what_is_missing_twice_or_foreign_is_counted(encoded: bool) -> None:
    forms = Forms("welder")
    ledger = Ledger(forms, encoded=encoded)
    records = list(forms.all_records(0, 20))
    taken(ledger, records[:17])
    taken(ledger, [records[3], records[3], records[4], b"never published"])
    balance = ledger.balance([(0, 20)])
    assert (balance.published, balance.stored) == (20, 21)
    assert (balance.lost, balance.duplicates, balance.foreign) == (3, 3, 1)
    assert not balance.good


def test_a_changed_byte_is_a_loss_and_a_foreign_record() -> None:
    forms = Forms("wide")
    records = list(forms.all_records(0, 3))
    ledger = Ledger(forms)
    ledger.take([records[0], records[1].replace(b'"alarm":"none"', b'"alarm":"nonE"'), records[2]], 1.0)
    balance = ledger.balance([(0, 3)])
    assert (balance.lost, balance.foreign, balance.duplicates) == (1, 1, 0)


def test_runs_of_several_pipelines_are_one_ledger() -> None:
    forms = Forms("bulk", samples=4)
    ledger = Ledger(forms)
    ledger.take(list(forms.all_records(0, 30)), 1.0)
    ledger.take(list(forms.all_records(100, 29)), 1.0)
    balance = ledger.balance([(0, 30), (100, 30)])
    assert (balance.published, balance.stored, balance.lost) == (240, 236, 4)


def test_the_latency_is_from_publishing_to_the_first_storing() -> None:
    forms = Forms("welder")
    records = list(forms.all_records(0, 4))
    published = memoryview(array("d", [10.0, 10.5, 11.0, 0.0]))
    ledger = Ledger(forms)
    ledger.take(records[:2], 11.0)
    ledger.take([records[0], *records[2:]], 12.5)  # the first comes again; nobody knows when the last was published
    waits = ledger.balance([(0, 4)], published).latency_ms
    assert waits == {"p50": 1000.0, "p99": 1500.0, "p99.9": 1500.0, "max": 1500.0}


def test_what_was_never_published_is_not_lost() -> None:
    forms = Forms("welder")
    ledger = Ledger(forms)
    ledger.take(list(forms.all_records(0, 2)), 11.0)
    balance = ledger.balance([(0, 4)], memoryview(array("d", [10.0, 10.0, 10.0, 0.0])))
    assert (balance.published, balance.stored, balance.lost) == (3, 2, 1)


@pytest.mark.parametrize("encoded", [False, True])
def test_aggregates_are_taken_apart(encoded: bool) -> None:
    forms = Forms("welder")
    records = list(forms.all_records(0, 9))
    aggregator = RecordAggregator()
    for record in records[:6]:
        aggregator.add_user_record("key", record)
    whole = aggregator.clear_and_get().get_contents()[2]
    ledger = Ledger(forms, encoded=encoded, expand="kpl")
    datas = [whole, *records[6:]]
    ledger.take([base64.b64encode(data) for data in datas] if encoded else datas, 1.0)
    assert ledger.stored == 9
    assert ledger.balance([(0, 9)]) == Balance(published=9, stored=9)


def test_lines_are_taken_apart() -> None:
    forms = Forms("msgpack")
    records = list(forms.all_records(0, 5))
    ledger = Ledger(forms, expand="lines")
    ledger.take([b"\n".join(records[:3]) + b"\n", *records[3:]], 1.0)
    assert ledger.balance([(0, 5)]) == Balance(published=5, stored=5)


def test_the_same_value_in_other_words_is_the_same_record() -> None:
    forms = Forms("welder")
    (record,) = forms.all_records(7, 1)
    other = record.replace(b"{", b'{"topic":"plant/7", ').replace(b'"sensor_1":10.0', b'"sensor_1":1e1')
    ledger = Ledger(forms, canonical=canonical)
    ledger.take([other], 1.0)
    assert ledger.balance([(7, 1)]) == Balance(published=1, stored=1)
    assert canonical(b"no JSON") == b"no JSON"

"""What a plant costs: the arithmetic of AWS's price page, on sizes that the codec has made."""

from __future__ import annotations

import json
import math

import pytest

from bench.test_commands import invoke
from fastkin.bench.cost import MONTH_H, Prices, costs
from fastkin.bench.forms import Forms

SECONDS = MONTH_H * 3600


def test_a_thousand_small_messages_a_second() -> None:
    """152 bytes and a key of 36: one unit of 25 KB and one KB each, two shards at four fifths."""
    plain, lines, kpl = costs(Forms("welder"), rate=1000.0, linger_s=0.1, prices=Prices())
    assert [each.aggregation for each in (plain, lines, kpl)] == ["none", "lines", "kpl"]
    assert (plain.messages_per_record, plain.calls_per_s, plain.shards) == (1.0, 10.0, 2)
    assert plain.provisioned_month == pytest.approx(2 * MONTH_H * 0.015 + 1000 * SECONDS / 1e6 * 0.014)
    assert plain.on_demand_month == pytest.approx(MONTH_H * 0.04 + 1000 * 1024 * SECONDS / 2**30 * 0.08)
    assert plain.provisioned_million == pytest.approx(plain.provisioned_month / (1000 * SECONDS / 1e6))
    for packed in (lines, kpl):
        assert packed.messages_per_record == 100.0
        assert packed.shards == 1
        assert packed.wire_bytes < plain.wire_bytes
        assert packed.provisioned_month < plain.provisioned_month / 4
        assert packed.on_demand_million < plain.on_demand_million / 3


def test_shards_are_bought_for_bytes_too() -> None:
    """829 bytes: 2,400 a second are 2.4 shards by their number, 1.98 by their bytes; frames are many records."""
    wide = costs(Forms("wide"), rate=2400.0, linger_s=0.05, prices=Prices(), used=1.0)
    assert wide[0].shards == 3
    assert wide[1].shards == wide[2].shards == 2
    plain = costs(Forms("bulk", samples=100), rate=100.0, linger_s=0.05, prices=Prices(), used=0.5)[0]
    assert (plain.messages_per_record, plain.shards) == (0.01, 20)


def test_prices_are_the_callers() -> None:
    free = costs(Forms("welder"), rate=1.0, linger_s=0.0, prices=Prices(0.0, 0.0, 0.0, 0.0))
    assert all(each.provisioned_month == each.on_demand_month == 0.0 for each in free)
    dear = costs(Forms("welder"), rate=1.0, linger_s=0.0, prices=Prices(shard_hour=2.0, million_put_units=0.0))[0]
    assert math.isclose(dear.provisioned_month, 2.0 * MONTH_H)


def test_what_is_packed_to_find_out_is_bounded_in_records() -> None:
    """A million frames of 10,000 records a second would be ten thousand million to pack."""
    forms = Forms("bulk", samples=10_000)
    few, many = (costs(forms, rate=rate, linger_s=1.0, prices=Prices())[0] for rate in (1.0, 1e6))
    assert few.messages_per_record == many.messages_per_record == 0.0001
    assert few.wire_bytes == pytest.approx(many.wire_bytes, rel=0.01)
    assert many.shards == pytest.approx(few.shards * 1e6, rel=0.1)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = invoke(capsys, "cost", "--rate", "100", "--linger-ms", "1000")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["none", "lines", "kpl"]
    code, out, _ = invoke(capsys, "cost", "--form", "msgpack", "--gb-in", "0", "--stream-hour", "0", "--json")
    assert code == 0
    assert [each["on_demand_month"] for each in json.loads(out)] == [0.0] * 3
    code, _, err = invoke(capsys, "cost", "--used", "0")
    assert code == 2
    assert "--used" in err

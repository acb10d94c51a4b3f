"""Pacing is pure: the clock here is a number that the tests move."""

from __future__ import annotations

import math
from random import Random

import pytest

from fastkin.delivery.pacing import Backoff, CallSize, Concurrency, Pacer, Rate


def test_backoff_stays_within_base_and_cap_and_starts_again() -> None:
    backoff = Backoff(0.1, 2.0, Random(7))
    delays = [backoff.next() for _ in range(200)]
    assert all(0.1 <= delay <= 2.0 for delay in delays)
    assert max(delays) == 2.0
    assert delays[0] <= 0.3
    backoff.reset()
    assert backoff.next() <= 0.3


def test_backoff_of_two_senders_does_not_fall_in_step() -> None:
    one, two = Backoff(0.1, 5.0, Random(1)), Backoff(0.1, 5.0, Random(2))
    assert [one.next() for _ in range(5)] != [two.next() for _ in range(5)]


def test_concurrency_halves_on_failure_and_climbs_one_per_round() -> None:
    calls = Concurrency(16)
    assert calls.limit == 16
    calls.failed()
    calls.failed()
    assert calls.limit == 4
    for _ in range(5):
        calls.succeeded()
    assert calls.limit == 5
    for _ in range(20):
        calls.failed()
    assert calls.limit == 1
    for _ in range(1000):
        calls.succeeded()
    assert calls.limit == 16


def test_rate_lets_its_cap_through_and_no_more() -> None:
    rate = Rate(0.0, 1000.0, 2.0**20)
    now, sent = 0.0, 0
    while now < 10.0:
        wait = rate.wait(now, 100, 10_000)
        if wait:
            now += wait
            continue
        rate.take(100, 10_000)
        sent += 100
    assert 10_000 <= sent <= 10_000 + 600


def test_rate_is_bounded_in_bytes_too() -> None:
    rate = Rate(0.0, 1000.0, 2.0**20)
    now, sent = 0.0, 0
    while now < 10.0:
        wait = rate.wait(now, 10, 100_000)
        if wait:
            now += wait
            continue
        rate.take(10, 100_000)
        sent += 100_000
    assert sent == pytest.approx(10 * 2**20, rel=0.12)


def test_a_call_larger_than_the_bucket_goes_when_the_bucket_is_full() -> None:
    rate = Rate(0.0, 100.0, 2.0**20)
    assert rate.wait(0.0, 500, 5 * 2**20) == 0.0
    rate.take(500, 5 * 2**20)
    later = rate.wait(0.0, 500, 5 * 2**20)
    assert later == pytest.approx(5.0, rel=0.1)
    assert rate.wait(later + 0.01, 500, 5 * 2**20) == 0.0


def test_without_a_cap_nothing_waits_until_a_throttle_shows_the_limit() -> None:
    rate = Rate(0.0)
    for tick in range(100):
        assert rate.wait(tick / 100, 500, 10**6) == 0.0
        rate.take(500, 10**6)
        rate.stored(tick / 100, 20)
    rate.throttled(1.0)
    assert rate.limit == pytest.approx(2000, rel=0.1)
    assert rate.adapted
    assert rate.wait(1.0, 500, 10**6) > 0.05


def test_a_throttle_never_stops_a_rate_for_good() -> None:
    rate = Rate(0.0, 1000.0, 2.0**20)
    for tick in range(1000):
        rate.throttled(tick * 0.2)
    assert rate.limit >= 10.0
    assert math.isfinite(rate.wait(200.0, 500, 100))


def _shard(capacity: list[float], now: float, state: list[float], asked: float) -> float:
    """A shard with a one-second bucket of its own: how many of `asked` records it stores."""
    state[0] = min(capacity[0], state[0] + capacity[0] * (now - state[1]))
    state[1] = now
    stored = min(asked, state[0])
    state[0] -= stored
    return stored


@pytest.mark.parametrize("cap", [1000.0, math.inf], ids=["shard map", "no map"])
def test_follows_a_throttle_down_and_is_whole_again_within_two_seconds(cap: float) -> None:
    rate = Rate(0.0, cap, math.inf)
    capacity, state = [1000.0], [1000.0, 0.0]
    now, offered = 0.0, 0.0
    stored_by_second: dict[int, float] = {}
    refused_by_second: dict[int, float] = {}
    while now < 20.0:
        capacity[0] = 100.0 if 5.0 <= now < 15.0 else 1000.0
        offered = min(offered + 1000.0 * 0.005, 3000.0)
        call = min(offered, 100.0)
        if call >= 1.0 and rate.wait(now, call, 0) == 0.0:
            rate.take(call, 0)
            stored = _shard(capacity, now, state, call)
            rate.stored(now, stored)
            offered -= stored
            if stored < call:
                rate.throttled(now)
            second = int(now)
            stored_by_second[second] = stored_by_second.get(second, 0) + stored
            refused_by_second[second] = refused_by_second.get(second, 0) + call - stored
        now += 0.005
    throttled = [stored_by_second.get(s, 0) for s in range(7, 15)]
    refused = [refused_by_second.get(s, 0) for s in range(7, 15)]
    assert sum(throttled) > 0.85 * 100 * 8, "the shard's capacity was left unused"
    assert sum(refused) < sum(throttled), "more was refused than stored: a retry storm"
    assert stored_by_second[17] > 900, "not whole again two seconds after the throttle ended"


def test_a_hot_shard_waits_alone() -> None:
    pacer = Pacer(0.0)
    pacer.set_shards(0.0, [0.5, 0.5])
    load = {0: (500, 50_000), 1: (10, 1000)}
    assert pacer.wait(0.0, load) == 0.0
    pacer.sent(load)
    assert pacer.shard_wait(0.0, 1, 10, 1000) == 0.0
    assert pacer.wait(0.0, load) > 0.3
    assert pacer.shard_wait(0.0, 0, 500, 50_000) > 0.3


def test_evenly_spread_keys_are_paced_by_the_largest_shard() -> None:
    pacer = Pacer(0.0)
    pacer.set_shards(0.0, [0.5, 0.25, 0.25])
    assert pacer.even.cap_records == 2000.0
    assert pacer.even.cap_bytes == 2 * 2**20


def test_a_shard_of_a_former_map_counts_as_spread() -> None:
    pacer = Pacer(0.0)
    pacer.set_shards(0.0, [0.25] * 4)
    pacer.set_shards(0.0, [1.0])
    assert not pacer.knows(3)
    assert pacer.wait(0.0, {3: (500, 1000)}) == 0.0
    pacer.sent({3: (500, 1000)})
    assert pacer.wait(0.0, {-1: (500, 1000)}) > 0.3


def test_a_throttle_is_charged_where_it_belongs() -> None:
    pacer = Pacer(0.0)
    pacer.set_shards(0.0, [0.5, 0.5])
    pacer.throttled(1.0, 1, even=False)
    assert pacer.adapted
    assert not pacer.even.adapted
    pacer.throttled(1.0, 1, even=True)
    assert pacer.even.adapted
    pacer.clear_shards(2.0)
    assert not pacer.adapted


def test_a_large_call_passes_a_bucket_that_throttling_has_made_smaller() -> None:
    """Forty shards, throttled again and again: the bucket never grows back to hold a call of 8 MiB."""
    rate = Rate(0.0, 40_000.0, 40 * 2.0**20)
    now = 0.0
    rate.take(10_000, 10 * 2**20)
    rate.stored(0.3, 500)
    while now < 10.0:
        if not rate.wait(now, 500, 8 * 2**20):
            break
        now += 0.1
        rate.throttled(now)
    assert now < 10.0


def test_a_call_size_is_found_and_forgotten() -> None:
    size = CallSize()
    assert size.allows(1 << 40)
    size.taken(5_000_000)
    assert size.late(4_000_000)
    assert size.late(4_000_000)  # of a call that was open beside it
    assert size.allows(2_000_000)
    assert not size.allows(2_000_001)
    size.taken(1000)
    assert not size.allows(2_000_001), "a small call says nothing"
    calls = 0
    while not size.allows(3_000_000):
        size.taken(int(size.limit))
        calls += 1
    assert calls <= 3
    while size.allows(1 << 40) is False:
        size.taken(int(size.limit))
        calls += 1
    assert calls < 40
    while size.late(int(min(size.limit, 1e6))):
        pass
    assert size.limit == CallSize.FLOOR

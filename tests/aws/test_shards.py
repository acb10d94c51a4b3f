"""The shard map: coverage, ordinals, what a throttle's text tells."""

from __future__ import annotations

import pytest

from fastkin.aws.shards import HASH_SPACE, Shard, ShardMap, shard_in_message

HALF = HASH_SPACE // 2


def shard(n: int, start: int, end: int, *, closed: bool = False) -> Shard:
    return Shard(f"shardId-{n:012d}", start, end, None, closed)


def test_sorts_and_numbers_the_open_shards() -> None:
    found = ShardMap([shard(2, HALF, HASH_SPACE - 1), shard(0, 0, HASH_SPACE - 1, closed=True), shard(1, 0, HALF - 1)])
    assert [s.id for s in found.shards] == ["shardId-000000000001", "shardId-000000000002"]
    assert found.ends == [HALF - 1, HASH_SPACE - 1]
    assert found.ordinal("shardId-000000000002") == 1
    assert found.ordinal("shardId-000000000000") is None
    assert [s.share for s in found.shards] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        ([shard(0, 0, HALF - 2), shard(1, HALF, HASH_SPACE - 1)], "do not cover"),
        ([shard(0, 0, HALF), shard(1, HALF, HASH_SPACE - 1)], "do not cover"),
        ([shard(0, 0, HALF - 1)], "end at"),
        ([], "end at"),
    ],
    ids=["gap", "overlap", "short", "none"],
)
def test_a_map_that_does_not_cover_the_space_is_refused(shards: list[Shard], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ShardMap(shards)


def test_finds_the_shard_in_a_throttle_message() -> None:
    text = "Rate exceeded for shard shardId-000000000007 in stream s under account 123456789012."
    assert shard_in_message(text) == "shardId-000000000007"
    assert shard_in_message("Internal service failure.") is None

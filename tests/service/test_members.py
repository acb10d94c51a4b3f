"""What each worker is made from: names of its own for what belongs to one process, and filters that are shared."""

from __future__ import annotations

import pytest

from fastkin.config import Broker, Kinesis, Pipeline, Settings, Status, Workers, client_id_of
from fastkin.service.members import Member, member_name, member_of, members, settings_of, spool_of


def settings(**more: object) -> Settings:
    kinesis = Kinesis(stream="s")
    return Settings(
        broker=Broker(client_id="svc"),
        pipelines=(
            Pipeline(id="a", kinesis=kinesis, topics=("a/#", "$share/mine/b"), on_full="spool", spool="dir/spool.db"),
            Pipeline(id="x/b", kinesis=kinesis, topics=("a/#",), dead_letter="dead.jsonl"),
        ),
        warnings=("careful",),
        status=Status(port=9464),
        workers=Workers(count=2),
        **more,  # type: ignore[arg-type]
    )


def test_a_worker_has_client_ids_of_its_own() -> None:
    ids = [client_id_of(settings_of(settings(), number), name) for number in (0, 1) for name in ("a", "x/b")]
    assert ids == ["svc-w0", "svc-w0-x/b", "svc-w1", "svc-w1-x/b"]


def test_who_shares_with_nobody_has_the_client_id_and_the_filters_as_they_stand() -> None:
    made = settings_of(settings(), None)
    assert made.broker.client_id == "svc"
    assert made.pipelines == settings().pipelines


def test_a_client_id_that_was_drawn_stays_drawn() -> None:
    """Each process draws another one already."""
    broker = Broker(client_id="fastkin-1234", client_id_drawn=True, clean_session=True)
    alone = Settings(broker=broker, pipelines=settings().pipelines, workers=Workers(count=2, group="g"))
    assert settings_of(alone, 1).broker == broker


def test_pipelines_share_each_in_a_group_of_its_own() -> None:
    """In one group two pipelines with the same filter would take messages away from each other."""
    one, other = settings_of(settings(), 0).pipelines
    assert one.filters == ("$share/svc-a/a/#", "$share/mine/b")
    assert other.filters == ("$share/svc-x:b/a/#",)
    assert one.topics == ("a/#", "$share/mine/b")
    assert settings_of(settings(), 1).pipelines[0].filters == one.filters


def test_the_group_that_is_set_is_used() -> None:
    named = Settings(
        broker=Broker(client_id="a/b"), pipelines=settings().pipelines, workers=Workers(count=2, group="g")
    )
    assert settings_of(named, 0).pipelines[0].filters[0] == "$share/g-a/a/#"


def test_a_worker_has_spools_of_its_own_and_the_common_dead_letters() -> None:
    one, other = settings_of(settings(), 1).pipelines
    assert one.spool == "dir/spool-w1.db"
    assert other.dead_letter == "dead.jsonl"


@pytest.mark.parametrize(
    ("spool", "member", "expected"),
    [
        (None, 0, None),
        ("spool.db", None, "spool.db"),
        ("spool.db", 12, "spool-w12.db"),
        ("/var/lib/fastkin/spool", 0, "/var/lib/fastkin/spool-w0"),
        ("a.b/c.d.e", 3, "a.b/c.d-w3.e"),
    ],
)
def test_the_name_of_a_spool(spool: str | None, member: Member, expected: str | None) -> None:
    assert spool_of(spool, member) == expected


def test_what_belongs_to_the_process_above_is_not_the_workers() -> None:
    made = settings_of(settings(), 0)
    assert made.status == Status()
    assert made.workers == Workers()
    assert made.warnings == ()


def test_who_is_left_over_subscribes_nothing() -> None:
    assert all(each.left_over for each in settings_of(settings(), 0, left_over=True).pipelines)
    assert not any(each.left_over for each in settings_of(settings(), 0).pipelines)


def test_who_does_the_work() -> None:
    assert members(3) == (0, 1, 2)
    assert members(0) == (None,)
    assert [member_of(member_name(each)) for each in (None, 0, 17)] == [None, 0, 17]

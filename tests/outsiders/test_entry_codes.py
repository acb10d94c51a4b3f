"""A code means the same as that of one record and as that of a whole call: only what says that the record itself is
bad costs a record."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from delivery.test_sender import Rig, Scripted, Verdict, numbered
from fastkin import Producer
from fastkin.emulator import Emulator
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

# Of the service model of PutRecords, of AWS's common errors, and what proxies and services in front of it say.
PASSING = [
    "AccessDenied", "AccessDeniedException", "ResourceNotFoundException", "ServiceUnavailable",
    "InternalServerError", "ExpiredToken", "ExpiredTokenException",
    "UnrecognizedClientException", "RequestExpired", "KMSAccessDeniedException", "KMSDisabledException",
    "KMSInvalidStateException", "KMSNotFoundException", "KMSOptInRequired", "OptInRequired", "RequestTimeout",
]  # fmt: skip
OPERATOR = [code for code in PASSING if "Access" in code or "NotFound" in code or "KMS" in code or "OptIn" in code]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait is short, on any version: what counts is how often, and what becomes of the record."""
    for name in ("answers._ENTRY_CAP_S", "answers._STRANGE_CAP_S", "gate._OPERATOR_BASE_S", "gate._CREDENTIALS_BASE_S"):
        monkeypatch.setattr(f"fastkin.delivery.{name}", 0.01)
    for name in ("_OPERATOR_CAP_S", "_CREDENTIALS_CAP_S"):
        monkeypatch.setattr(f"fastkin.delivery.gate.{name}", 0.02)


def fails(code: str, times: int) -> Callable[[int, list[dict[str, str]]], list[Verdict]]:
    """Record 5 fails so often, the others are stored."""
    seen: Counter[str] = Counter()

    def script(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        out: list[Verdict] = []
        for record in records:
            seen[record["Data"]] += 1
            bad = base64.b64decode(record["Data"]) == b"5" and seen[record["Data"]] <= times
            out.append((code, "try later") if bad else None)
        return out

    return script


@pytest.mark.parametrize("code", PASSING)
async def test_a_code_that_passes_is_waited_out(code: str) -> None:
    rig = Rig(Scripted(fails(code, 25)))
    await rig.send(numbered(20))
    assert rig.aside == []
    assert Counter(data for data, _ in rig.client.stored) == Counter(numbered(20))


@pytest.mark.parametrize("code", ["ShardIsMigrating", "SomethingNewException"])
async def test_a_code_nobody_knows_is_not_final_after_seconds(code: str) -> None:
    rig = Rig(Scripted(fails(code, 25)))
    await rig.send(numbered(20))
    assert rig.aside == []
    assert len(rig.client.stored) == 20


@pytest.mark.parametrize("code", ["SerializationException", "RequestEntityTooLarge"])
async def test_what_says_that_the_record_is_bad_is_final_at_once(code: str) -> None:
    rig = Rig(Scripted(fails(code, 1_000_000)))
    await rig.send(numbered(20))
    assert [data for data, _ in rig.aside] == [b"5"]
    assert rig.client.calls == 1
    assert rig.sender.counters.retried == 0


@pytest.mark.parametrize("code", OPERATOR)
async def test_who_must_act_is_told_and_it_is_not_ready(code: str, caplog: pytest.LogCaptureFixture) -> None:
    script = fails(code, 10)
    operator_error: list[str | None] = []

    def watched(call: int, records: list[dict[str, str]]) -> list[Verdict]:
        operator_error.append(rig.sender.operator_error)
        return script(call, records)

    rig = Rig(Scripted(watched))
    await rig.send(numbered(20))
    assert operator_error[0] is None
    assert all(code in (why or "") for why in operator_error[1:]), "it looked well while a record was refused"
    assert rig.sender.operator_error is None
    assert [line for line in caplog.records if line.levelname == "ERROR" and code in line.getMessage()]


async def test_a_stream_that_refuses_every_record_is_asked_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the call is refused: what is new does not storm it meanwhile."""
    for name in ("_OPERATOR_BASE_S", "_OPERATOR_CAP_S"):
        monkeypatch.setattr(f"fastkin.delivery.gate.{name}", 0.2)
    allowed = False
    denied = ("AccessDeniedException", "no")
    rig = Rig(Scripted(lambda call, records: [None if allowed else denied] * len(records)))

    async def plant() -> None:
        for n in range(200):
            rig.batcher.add(b"%d" % n)
            rig.batcher.close_batch(5)
            rig.sender.pump()
            await asyncio.sleep(0.002)

    began = asyncio.get_running_loop().time()
    planting = asyncio.create_task(plant())
    async with asyncio.timeout(20):
        await planting
        # what is open before the first refusal comes, then one each 0.2 s, however long a busy machine takes for it
        took_s = asyncio.get_running_loop().time() - began
        assert rig.client.calls <= 20 + 1.2 * took_s / 0.2
        allowed = True
        await rig.sender.flush()
    assert rig.aside == []
    assert len(rig.client.stored) == 200
    rig.check()
    await rig.sender.close()


@pytest.mark.parametrize("code", ["AccessDeniedException", "KMSInvalidStateException", "ShardIsMigrating"])
async def test_a_receipt_waits_for_what_passes(code: str) -> None:
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.record(code, times=15)
        options: dict[str, Any] = {"region": "us-east-1", "access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        async with Producer("s", endpoint_url=emulator.url, **options) as producer:
            receipt = await producer.put(b"x")
            async with asyncio.timeout(20):
                assert (await receipt).sequence_number

"""The emulator's STS as the SDK sees it: whose keys these are, and keys for a role.

What is right and what is refused stands in docs.aws.amazon.com/STS/latest/APIReference (API_AssumeRole,
API_GetCallerIdentity, CommonErrors); the bounds in the service model of the SDK.
"""

from __future__ import annotations

import contextlib
import datetime
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError, ReadTimeoutError

from fastkin.emulator import Emulator, Secret
from support.readback import kinesis_client
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROLE = "arn:aws:iam::123456789012:role/plant/ingest"


@contextlib.asynccontextmanager
async def sts(emulator: Emulator, **options: Any) -> AsyncIterator[Any]:
    # its own check of arguments is switched off: the emulator's is what is tested
    config = {"parameter_validation": False}
    async with kinesis_client(emulator.url, service="sts", config=config, **options) as client:
        yield client


async def test_a_caller_is_a_user_of_the_account() -> None:
    async with Emulator(account="111122223333") as emulator, sts(emulator) as client:
        answer = await client.get_caller_identity()
    assert answer["Account"] == "111122223333"
    assert answer["Arn"] == f"arn:aws:iam::111122223333:user/{ACCESS_KEY}"
    assert answer["UserId"].startswith("AIDA")
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert answer["ResponseMetadata"]["RequestId"].endswith("1")
    assert emulator.counters.operations == {"GetCallerIdentity": 1}


async def test_a_role_has_keys_that_act_as_the_role() -> None:
    now = 1_800_000_000.75
    async with Emulator(wall=lambda: now) as emulator:
        async with sts(emulator) as client:
            asked = {"RoleArn": ROLE, "RoleSessionName": "line-3", "ExternalId": "tenant-7", "DurationSeconds": 900}
            answer = await client.assume_role(**asked)
        keys, user = answer["Credentials"], answer["AssumedRoleUser"]
        assert user["Arn"] == "arn:aws:sts::123456789012:assumed-role/ingest/line-3"
        assert user["AssumedRoleId"].startswith("AROA")
        assert user["AssumedRoleId"].endswith(":line-3")
        assert keys["AccessKeyId"].startswith("ASIA")
        assert len(keys["AccessKeyId"]) == 20
        assert keys["Expiration"] == datetime.datetime.fromtimestamp(1_800_000_900, datetime.UTC)
        (role,) = emulator.sts.assumed
        assert (role.role_arn, role.session_name, role.external_id) == (ROLE, "line-3", "tenant-7")
        assert (role.access_key, role.secret_key, role.token) == (
            keys["AccessKeyId"], keys["SecretAccessKey"], keys["SessionToken"],
        )  # fmt: skip
        assert role.secret_key not in repr(role)
        own = {"aws_access_key_id": role.access_key, "aws_secret_access_key": role.secret_key}
        async with sts(emulator, **own, aws_session_token=role.token) as client:
            answer = await client.get_caller_identity()
        assert (answer["Arn"], answer["UserId"]) == (user["Arn"], user["AssumedRoleId"])


async def test_keys_of_a_role_are_good_for_calls_until_they_expire() -> None:
    now = [0.0]
    async with Emulator(
        {"s": 1}, credentials={ACCESS_KEY: SECRET_KEY}, skew_s=None, wall=lambda: 1_800_000_000.0 + now[0]
    ) as emulator:
        async with sts(emulator) as client:
            keys = (await client.assume_role(RoleArn=ROLE, RoleSessionName="s1"))["Credentials"]
        async with kinesis_client(
            emulator.url,
            aws_access_key_id=keys["AccessKeyId"],
            aws_secret_access_key=keys["SecretAccessKey"],
            aws_session_token=keys["SessionToken"],
        ) as client:
            now[0] = 3599.0
            await client.put_record(StreamName="s", Data=b"x", PartitionKey="k")
            now[0] = 3600.0
            with pytest.raises(ClientError) as caught:
                await client.put_record(StreamName="s", Data=b"x", PartitionKey="k")
        assert caught.value.response["Error"]["Code"] == "ExpiredTokenException"
        assert len(emulator.stored("s")) == 1


@pytest.mark.parametrize("external_id", [None, "tenant-8"])
async def test_a_role_without_its_external_id_is_refused(external_id: str | None) -> None:
    async with Emulator(roles={ROLE: "tenant-7"}) as emulator, sts(emulator) as client:
        given = {} if external_id is None else {"ExternalId": external_id}
        with pytest.raises(ClientError) as caught:
            await client.assume_role(RoleArn=ROLE, RoleSessionName="s1", **given)
        await client.assume_role(RoleArn=ROLE, RoleSessionName="s1", ExternalId="tenant-7")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert caught.value.response["Error"] == {
        "Type": "Sender",
        "Code": "AccessDenied",
        "Message": f"User: arn:aws:iam::123456789012:user/{ACCESS_KEY} is not authorized to perform: sts:AssumeRole on"
        f" resource: {ROLE}",
    }
    assert len(emulator.sts.assumed) == 1
    assert emulator.counters.refused == 1


async def test_a_role_that_is_not_there_is_refused_as_one_that_may_not_be_assumed() -> None:
    async with Emulator(roles={ROLE: None}) as emulator, sts(emulator) as client:
        with pytest.raises(ClientError, match="AccessDenied"):
            await client.assume_role(RoleArn=ROLE + "-2", RoleSessionName="s1")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"RoleArn": "arn:aws:iam::1:role"}, "'roleArn' failed to satisfy constraint: Member must have length greater"),
        ({"RoleArn": "arn:aws:iam::123456789012:user/ingest"}, "arn:aws:iam::123456789012:user/ingest is invalid"),
        ({"RoleArn": None}, "Value null at 'roleArn'"),
        (
            {"RoleSessionName": "x"},
            "Value 'x' at 'roleSessionName' failed to satisfy constraint: Member must have length",
        ),
        ({"RoleSessionName": "a b"}, r"must satisfy regular expression pattern: [\w+=,.@-]*"),
        ({"RoleSessionName": "s" * 65}, "less than or equal to 64"),
        ({"ExternalId": "x"}, "'externalId' failed"),
        ({"DurationSeconds": 899}, "Member must have value greater than or equal to 900"),
        ({"DurationSeconds": 43_201}, "less than or equal to 43200"),
    ],
)
async def test_what_sts_refuses(change: dict[str, Any], text: str) -> None:
    asked = {"RoleArn": ROLE, "RoleSessionName": "s1"} | change
    async with Emulator() as emulator, sts(emulator) as client:
        with pytest.raises(ClientError) as caught:
            await client.assume_role(**{name: value for name, value in asked.items() if value is not None})
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    assert caught.value.response["Error"]["Code"] == "ValidationError"
    assert text in caught.value.response["Error"]["Message"]


async def test_another_operation_is_not_found() -> None:
    async with Emulator() as emulator, sts(emulator) as client:
        with pytest.raises(ClientError) as caught:
            await client.get_session_token()
    assert caught.value.response["Error"]["Code"] == "InvalidAction"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"aws_access_key_id": "STRANGER"}, "InvalidClientTokenId"),
        ({"aws_secret_access_key": "wrong"}, "SignatureDoesNotMatch"),
        ({"region_name": "eu-west-1"}, "SignatureDoesNotMatch"),
        ({"aws_access_key_id": "OLD", "aws_session_token": "t"}, "ExpiredToken"),
    ],
)
async def test_signatures_are_checked_in_the_words_of_sts(options: dict[str, str], code: str) -> None:
    known = {ACCESS_KEY: SECRET_KEY, "OLD": Secret(SECRET_KEY, "t", expired=True)}
    async with Emulator(credentials=known) as emulator:
        async with sts(emulator) as client:
            await client.get_caller_identity()
        async with sts(emulator, **options) as client:
            with pytest.raises(ClientError) as caught:
                await client.get_caller_identity()
    assert caught.value.response["Error"]["Code"] == code
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


async def test_faults_strike_sts_too() -> None:
    async with Emulator() as emulator:
        emulator.faults.call("RegionDisabledException", "not here", operation="AssumeRole", times=1)
        emulator.faults.silent(operation="GetCallerIdentity")
        async with sts(emulator, read_timeout=0.3) as client:
            with pytest.raises(ClientError) as caught:
                await client.assume_role(RoleArn=ROLE, RoleSessionName="s1")
            assert caught.value.response["Error"] == {
                "Type": "Sender", "Code": "RegionDisabledException", "Message": "not here",
            }  # fmt: skip
            assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
            await client.assume_role(RoleArn=ROLE, RoleSessionName="s1")
            with pytest.raises(ReadTimeoutError):
                await client.get_caller_identity()

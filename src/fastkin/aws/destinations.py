"""Where records can go: one row for each operation of AWS that takes a list of records.

The row says what the operation is called, how it is reached, what it takes and what its answer looks like. An entry is
written by codec/entry.pxi and the answer read by codec/answer.pxi, whatever the row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastkin._codec import PUT_RECORDS_ANSWER, AnswerNames
from fastkin.aws.error_table import OF_FIREHOSE
from fastkin.limits import CALL_BYTES, CALL_RECORDS, KIB, LARGE_RECORD_BYTES, MIB

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastkin.errors import Action

# Partitions of AWS whose hosts have one plain form: their regions, and how the hosts end.
_PARTITIONS = (
    (re.compile(r"((us|eu|ap|sa|ca|me|af|il|mx)-[a-z]+-\d+|us-gov-(east|west)-1)"), "amazonaws.com"),
    (re.compile(r"cn-[a-z]+-\d+"), "amazonaws.com.cn"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """One operation that takes records, with all that is its own."""

    service: str  # in a signature, in the host's name, in IAM, and for the SDK
    api: str  # before the operation in X-Amz-Target
    put: str  # the operation
    name_member: str  # of a request: the stream's name
    arn_member: str | None  # the same for its ARN; None: it is not taken
    answer: AnswerNames
    keyed: bool  # an entry has a partition key
    shards: (
        bool  # it is a stream of shards, which can be described and listed, and keys tell which one a record goes to
    )
    dry_run: bool  # it knows DryRun
    account_hosts: bool  # an account has hosts of its own, ACCOUNT.data-SERVICE and ACCOUNT.control-SERVICE
    control: frozenset[str]  # the operations that the second of them answers
    # What a call takes. Settings may say less, never more.
    call_records: int
    call_bytes: int  # data and keys
    record_bytes: int  # data and key of one record
    # What a code of its errors means here and nowhere else; all others mean what the error table says.
    codes: Mapping[str, Action] = field(default_factory=dict, hash=False)
    describe: str = "DescribeStreamSummary"  # the operation that tells whether it is there
    names_stream: bool = True  # the settings of the stream say where it is

    @property
    def permission(self) -> str:
        """What IAM calls the right to put."""
        return f"{self.service}:{self.put}"

    def stream_members(self, name: str | None, arn: str | None) -> dict[str, str | None]:
        """What names the stream in a request: its ARN, where there is one and it is taken."""
        if arn and self.arn_member is not None:
            return {self.arn_member: arn}
        return {self.name_member: name}

    @property
    def endpoint_variables(self) -> tuple[str, str]:
        """The names in the environment that give another endpoint, as the SDK knows them: the first counts."""
        return f"AWS_ENDPOINT_URL_{self.service.upper()}", "AWS_ENDPOINT_URL"

    def hosts(self, region: str, account: str | None) -> tuple[str, str] | None:
        """The hosts that take records and that answer questions. None: the region's have no plain form."""
        for regions, suffix in _PARTITIONS:
            if regions.fullmatch(region):
                end = f"{self.service}.{region}.{suffix}"
                if account is None or not self.account_hosts:
                    return end, end
                return f"{account}.data-{end}", f"{account}.control-{end}"
        return None


KINESIS = Destination(
    service="kinesis",
    api="Kinesis_20131202",
    put="PutRecords",
    name_member="StreamName",
    arn_member="StreamARN",
    answer=PUT_RECORDS_ANSWER,
    keyed=True,
    shards=True,
    dry_run=True,
    account_hosts=True,
    control=frozenset({"DescribeStreamSummary", "DescribeStream", "ListShards"}),
    call_records=CALL_RECORDS,
    call_bytes=CALL_BYTES,
    record_bytes=LARGE_RECORD_BYTES,
)

# Limits: https://docs.aws.amazon.com/firehose/latest/APIReference/API_PutRecordBatch.html. Its hosts have one form, and
# what is asked about a delivery stream goes to the host that takes records.
FIREHOSE = Destination(
    service="firehose",
    api="Firehose_20150804",
    put="PutRecordBatch",
    name_member="DeliveryStreamName",
    arn_member=None,
    answer=AnswerNames("RequestResponses", "FailedPutCount", "RecordId"),
    keyed=False,
    shards=False,
    dry_run=False,
    account_hosts=False,
    control=frozenset(),
    call_records=500,
    call_bytes=4 * MIB,
    record_bytes=1000 * KIB,
    codes=OF_FIREHOSE,
    describe="DescribeDeliveryStream",
)

# Files on this machine, written by files/client.py, which answers as Firehose does. `service` and operations are those
# of S3, where the files go then.
FILES = Destination(
    service="s3",
    api="",
    put="PutObject",
    name_member="Directory",
    arn_member=None,
    answer=FIREHOSE.answer,
    keyed=False,
    shards=False,
    dry_run=False,
    account_hosts=False,
    control=frozenset(),
    call_records=CALL_RECORDS,
    call_bytes=CALL_BYTES,
    record_bytes=LARGE_RECORD_BYTES,
    describe="ListBucket",
    names_stream=False,
)

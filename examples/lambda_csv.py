"""A Firehose transformation that writes its own CSV objects to S3, one per call.

Each record is answered for itself: Dropped when its row is in the object, ProcessingFailed when it is no JSON
object (Firehose keeps it under the error prefix). When S3 does not take the object, the function
fails as a whole and Firehose calls it again with the same records.
Environment: BUCKET, PREFIX (data/). Keys end in a random UUID: no two calls share an object.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import uuid
from datetime import UTC, datetime
from functools import cache
from typing import Any

from fastkin import lambdas

COLUMNS = ("topic", "message")


@cache
def s3() -> Any:
    import boto3  # Lambda's runtime has it

    return boto3.client("s3")


def handler(event: dict[str, Any], _context: object) -> lambdas.Transformed:
    text = io.StringIO()
    rows = csv.writer(text, delimiter=";", lineterminator="\n")
    rows.writerow(COLUMNS)
    head = text.tell()

    def row(record: lambdas.Record) -> None:
        fields = json.loads(record.data)
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")  # noqa: TRY004
        rows.writerow([fields.get(column, "") for column in COLUMNS])

    answer = lambdas.transform(event, row)
    if text.tell() > head:
        # before the answer: what is Dropped is forgotten by Firehose
        s3().put_object(Bucket=os.environ["BUCKET"], Key=object_key(), Body=gzip.compress(text.getvalue().encode()))
    return answer


def object_key() -> str:
    return f"{os.environ.get('PREFIX', 'data/')}{datetime.now(UTC):%Y/%m/%d}/{uuid.uuid4()}.csv.gz"

"""Tests of fastkin.aws: calls to Kinesis and STS, their connections, signatures, credentials."""

"""Tests of the whole: `fastkin run` as a process, real brokers, emulators of Kinesis."""

"""Tests of fastkin.delivery: batches, calls, pacing, what waits in memory and on disk."""

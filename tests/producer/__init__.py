"""Tests of fastkin.producer: records that are put from Python."""

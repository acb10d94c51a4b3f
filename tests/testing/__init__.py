"""Tests of fastkin.testing: what it does, and its pytest plugin as its user has it."""

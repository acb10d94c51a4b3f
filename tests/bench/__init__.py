"""Tests of fastkin.bench: the simulated plant."""

"""Tests of fastkin.lambdas and of the example functions."""

"""Tests of fastkin.deadletter: what is set aside, where it goes, how it comes back."""

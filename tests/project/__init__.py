"""Tests of the project itself: its layers, its documents, the limits of its tests."""

"""Tests of fastkin.settings and fastkin.config."""

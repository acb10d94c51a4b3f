"""Tests that docs/threat-model.md names and that belong to no single folder of fastkin."""

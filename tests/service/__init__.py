"""Tests of fastkin.service: pipelines, the engine, reloads."""

"""Tests of fastkin.status: metrics, health checks, logs."""

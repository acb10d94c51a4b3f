"""Tests of fastkin._codec, compiled from src/fastkin/codec: `ci/variant` runs them on its builds."""

"""Tests of fastkin.mqtt: packets, sessions, acknowledgements, the subscriber, the publisher."""

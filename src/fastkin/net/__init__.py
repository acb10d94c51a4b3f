"""Connections of any kind: names and addresses, TCP, TLS."""

"""Tests of fastkin.commands: the command line."""

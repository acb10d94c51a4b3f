"""Tests of fastkin.emulator, alone and beside other emulators."""

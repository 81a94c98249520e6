"""The move protocol: pure state machines. No I/O, no clock, no randomness; read ``machine.py`` first."""

"""The shared core of kvmove: the move protocol as pure state machines, and what a scenario file means."""

"""kvmove for real: processes, ZeroMQ, NIXL, their own memory. ``kvreal.run.run`` is its one door."""

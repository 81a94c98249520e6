"""Drives the machines of kvcore under simpy: simulated time, links, memories and faults."""

"""Engines store KV in a node's memory and use it."""

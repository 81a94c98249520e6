"""How an engine's paged KV lies, and how it becomes chunks in slots, one contiguous range each."""

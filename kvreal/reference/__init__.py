"""The reference (LMCache) beside us in one run: its own controller, and engines that its interpreter runs."""

"""``kvmove bench``: moves beside their limits, in one run. ``matrix`` says what, ``run`` does it, ``result`` is what
comes of it. kvmove/reports makes pages of that."""

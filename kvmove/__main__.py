"""``python -m kvmove`` is ``kvmove``."""

from __future__ import annotations

from kvmove.cli import main

if __name__ == "__main__":
    main()

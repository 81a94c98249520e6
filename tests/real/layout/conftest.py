"""Layouts need torch."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the real world is not installed: no torch")

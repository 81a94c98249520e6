"""Engines with real models need torch and transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the real world is not installed: no torch")
pytest.importorskip("transformers", reason="no engine with a real model: transformers is not installed")

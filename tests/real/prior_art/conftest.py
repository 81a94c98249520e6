"""Prior art's rows, as tests against real processes: they need the HTTP libraries as well."""

from __future__ import annotations

import pytest

for needed in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(needed, reason=f"the service is not installed: no {needed}")

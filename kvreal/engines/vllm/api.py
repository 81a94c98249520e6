"""Is the installed vLLM's connector API the one that this connector was written for? Asked before anything else."""

from __future__ import annotations

import inspect
from typing import Any, Dict, Final, Tuple

KNOWN_VERSIONS: Final = ("0.32.0",)
"""What the tests ran with."""

METHODS: Final[Dict[str, Tuple[str, ...]]] = {
    "__init__": ("vllm_config", "role", "kv_cache_config"),
    "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("scheduler_output",),
    "request_finished": ("request", "block_ids"),
    "on_new_request": ("request",),
    "update_connector_output": ("connector_output",),
    "set_xfer_handshake_metadata": ("metadata",),
    "get_external_cache_hit_sources": ("request", "num_external_tokens"),
    "register_kv_caches": ("kv_caches",),
    "get_handshake_metadata": (),
    "start_load_kv": ("forward_context", "kwargs"),
    "wait_for_layer_load": ("layer_name",),
    "save_kv_layer": ("layer_name", "kv_layer", "attn_metadata", "kwargs"),
    "wait_for_save": (),
    "get_finished": ("finished_req_ids",),
    "get_block_ids_with_load_errors": (),
    "handle_preemptions": ("kv_connector_metadata",),
    "get_kv_connector_stats": (),
    "shutdown": (),
}
"""What this connector implements, and what vLLM gives to each."""


class ApiError(ImportError):
    """The installed vLLM's connector API is another one; the message says how, and which versions are known to work."""


def check(base: Any, version: str) -> None:
    """``base``: vLLM's KVConnectorBase_V1. ApiError."""
    differences = []
    for name, parameters in METHODS.items():
        method = getattr(base, name, None)
        if method is None:
            differences.append(f"{name} is missing")
            continue
        found = tuple([one for one in inspect.signature(method).parameters if one != "self"])
        if found != parameters:
            differences.append(f"{name}({', '.join(found)}) instead of ({', '.join(parameters)})")
    more = sorted(frozenset(getattr(base, "__abstractmethods__", ())) - frozenset(METHODS))
    differences += [f"{name} is asked for, and unknown" for name in more]
    if differences:
        raise ApiError(
            f"vLLM {version} has another connector API than kvmove knows: {'; '.join(differences)}. "
            f"Known to work: {', '.join(KNOWN_VERSIONS)}"
        )

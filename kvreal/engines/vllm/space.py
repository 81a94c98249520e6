"""What must be equal for the KV of two vLLM engines to be interchangeable, from vLLM's own configuration."""

from __future__ import annotations

import hashlib
import json
import os
from functools import lru_cache
from typing import Any, Dict, Final, List, Optional

from kvcore.protocol.messages import Namespace
from kvreal.engines.vllm.blocks import Paged

WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLES: Final = 256
SAMPLE_BYTES: Final = 64 << 10
VOLATILE: Final = frozenset({"_name_or_path", "transformers_version", "_attn_implementation", "architectures_version"})
"""What a model's configuration says that does not change what it computes."""


class SpaceError(Exception):
    """This engine's KV cannot be exchanged, in one line."""


def check(config: Any, kv_cache_config: Any) -> None:
    """SpaceError: what this connector does not do, and what the engine has."""
    parallel = config.parallel_config
    groups = kv_cache_config.kv_cache_groups
    if parallel.pipeline_parallel_size > 1:
        raise SpaceError(f"pipeline parallel size {parallel.pipeline_parallel_size}, expected 1: ranks hold all layers")
    if parallel.data_parallel_size > 1:
        raise SpaceError(
            f"data parallel size {parallel.data_parallel_size}, expected 1: each engine is an instance with a name "
            "of its own; start them one by one"
        )
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise SpaceError(f"{name} is {getattr(parallel, name)}, expected 1")
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise SpaceError(f"the model has {len(groups)} groups of KV ({kinds}), expected one")
    spec = groups[0].kv_cache_spec
    for one in getattr(spec, "kv_cache_specs", {"": spec}).values():
        if "FullAttentionSpec" not in [kind.__name__ for kind in type(one).__mro__]:
            raise SpaceError(
                f"the model's KV is a {type(one).__name__}, expected that of full attention: vLLM lets go of "
                "a prompt's first blocks before its end is computed"
            )
    if config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32") and getattr(
        config.cache_config, "calculate_kv_scales", False
    ):
        raise SpaceError("KV scales are computed at run time: they differ from engine to engine")


def space_of(config: Any, kv_cache_config: Any, paged: Paged) -> Namespace:
    """The namespace of this engine; ``chunk_tokens`` is the instance file's to say, and ``weights`` if they cannot be
    read here ("")."""
    model = config.model_config
    block = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    if paged.block_bytes % block:
        raise SpaceError(f"a block of {block} tokens has {paged.block_bytes} bytes, expected a multiple")
    architectures = getattr(model.hf_config, "architectures", None) or [type(model.hf_config).__name__]
    weights = weights_of(model)
    return Namespace(
        model=str(architectures[0]),
        weights=f"{config_digest(model)}-{weights}" if weights else "",
        dtype=f"{kv_dtype(config, paged)}/{str(model.dtype).removeprefix('torch.')}/{model.quantization or 'plain'}",
        kv_layout=layout(config, paged, block),
        ranks=config.parallel_config.tensor_parallel_size,
        bytes_per_token=paged.block_bytes // block,
        block_tokens=block,
    )


def kv_dtype(config: Any, paged: Paged) -> str:
    """Small floats of several kinds lie in tensors of bytes: those have the name that vLLM's configuration gives."""
    return paged.dtype if "float" in paged.dtype else f"{paged.dtype}:{config.cache_config.cache_dtype}"


def layout(config: Any, paged: Paged, block: int) -> str:
    """How bytes lie within a block: vLLM's version and attention backend decide, on CPUs the instruction set too."""
    import vllm

    backend, isa = _backend(config)
    parts = ["vllm" + ".".join(vllm.__version__.split("+")[0].split(".")[:2]), backend, *([isa] if isa else [])]
    return ",".join([*parts, f"block={block}", f"layers={paged.layers}", f"shape={paged.form}"])


def _backend(config: Any) -> tuple[str, str]:
    """(attention backend, instruction set): from a layer of the model, as it runs."""
    for layer in config.compilation_config.static_forward_context.values():
        if hasattr(layer, "get_attn_backend"):
            name = str(layer.get_attn_backend().get_name())
            impl = getattr(layer, "impl", None)
            isa = getattr(impl, "isa", "") or getattr(layer, "isa", "")
            return name, str(isa or (_isa(config, layer) if "CPU" in name else ""))
    return "unknown", ""


def _isa(config: Any, layer: Any) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    cache = config.cache_config
    return str(_get_attn_isa(config.model_config.dtype, cache.block_size, layer.head_size, cache.cache_dtype))


def config_digest(model: Any) -> str:
    """Of the model's configuration as it is in force, overrides included."""
    plain = {name: value for name, value in model.hf_config.to_dict().items() if name not in VOLATILE}
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def weights_of(model: Any) -> str:
    """A digest of the weights, wherever they lie; "" if they are not to be found on this machine."""
    folder = folder_of(str(getattr(model, "model_weights", "") or model.model), getattr(model, "revision", None))
    return digest_of_folder(folder) if folder else ""


def folder_of(model: str, revision: Optional[str]) -> str:
    if os.path.isdir(model) or os.path.isfile(model):
        return model
    try:
        from huggingface_hub import snapshot_download

        return str(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception:  # whatever it cannot say
        return ""


@lru_cache(maxsize=256)
def digest_of_folder(folder: str) -> str:
    """Over every file of weights: its size, and 256 pieces of 64 KiB evenly spread over it. Two sets of weights that
    agree in all of these are taken to be the same. "" if there are none."""
    paths: List[str] = [folder] if os.path.isfile(folder) else []
    if os.path.isdir(folder):
        paths = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(WEIGHTS))
    if not paths:
        return ""
    digest = hashlib.blake2b(digest_size=12)
    for path in paths:
        size = os.path.getsize(path)
        digest.update(f"{os.path.basename(path)} {size}\n".encode())
        with open(path, "rb") as file:
            starts: Dict[int, None] = {i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1): None for i in range(SAMPLES)}
            for start in starts:
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()

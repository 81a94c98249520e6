"""vLLM's connector without vLLM: how its blocks are copied, and what its keys are made of."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvreal.engines.vllm import api
from kvreal.engines.vllm.link import Look, Prompt
from kvreal.engines.vllm.scheduler import prompt_of
from kvreal.engines.vllm.space import SpaceError, check, digest_of_folder, space_of

pytestmark = pytest.mark.real
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'kvmove[real]'")

from kvreal.engines.vllm.blocks import (  # noqa: E402
    DeviceCopier,
    HostCopier,
    LayoutError,
    Paged,
    Rows,
    Slots,
    lock_pages,
)

BLOCKS = 64


# ---- blocks
LAYOUTS: list[tuple[tuple[int, ...], Callable[[Any], Any]]] = [
    ((8, 2, 4, 16), lambda t: t),
    ((2, 8, 4, 2, 16), lambda t: t),
    ((3, 8, 4, 16), lambda t: t.transpose(0, 1)),
]


@pytest.mark.parametrize("kind", [HostCopier, DeviceCopier])
@pytest.mark.parametrize(("shape", "turn"), LAYOUTS)
def test_blocks_go_out_and_come_back(kind: Any, shape: tuple[int, ...], turn: Callable[[Any], Any]) -> None:
    caches = {f"layer {i}": turn(torch.rand(shape)) for i in range(3)}
    paged = Paged(caches, 8)
    memory = torch.zeros(8 * paged.block_bytes, dtype=torch.uint8)
    first, size = memory.data_ptr(), paged.block_bytes
    slots = SimpleNamespace(address=lambda location, slot: first + slot * size, bases=[], maps=[])
    copier = kind(paged, slots)
    before = {name: cache.clone() for name, cache in caches.items()}
    axis = paged.tensors[0][1]
    out, back = Rows(slots, paged.block_bytes, 1), Rows(slots, paged.block_bytes, 1)  # type: ignore[arg-type]
    for i, block in enumerate((5, 1, 6)):
        out.add(block, "here", i, 0)
        back.add((0, 7, 2)[i], "here", i, 0)
    copier.store(out, copier.mark())
    for cache in caches.values():
        cache.zero_()
    copier.load(back, copier.mark())
    assert back.done == 3
    for name, cache in caches.items():
        for source, target in zip((5, 1, 6), (0, 7, 2)):
            assert (cache.select(axis, target) == before[name].select(axis, source)).all()
        assert not cache.select(axis, 3).any()


def test_cuda_is_told_of_pages_before_they_are_unmapped() -> None:
    """With a stand-in for CUDA: what it is told, and that the pages can still be read then."""
    told: list[tuple[str, int]] = []

    class Runtime:
        def cudaHostRegister(self, base: int, size: int, flags: int) -> int:
            told.append(("lock", size))
            return 1 if size == 8192 else 0

        def cudaHostUnregister(self, base: int) -> int:
            told.append(("forget", ctypes.string_at(base, 1)[0]))
            return 0

    fds = []
    for size, byte in ((4096, 7), (8192, 8)):
        fds.append(os.memfd_create("slab"))
        os.write(fds[-1], bytes([byte]) * size)
    slots = Slots((), fds)
    lock_pages(Runtime(), slots)
    assert told == [("lock", 4096), ("lock", 8192)]
    rows = Rows(slots, 1, 1)  # a copy that is under way
    del slots
    assert len(told) == 2
    del rows
    assert told[2:] == [("forget", 7)]  # the other was not locked
    for fd in fds:
        os.close(fd)


def test_tensors_that_are_not_made_of_blocks() -> None:
    with pytest.raises(LayoutError, match="axis of 9 blocks"):
        Paged({"a": torch.zeros(8, 2, 4)}, 9)
    with pytest.raises(LayoutError, match="not contiguous"):
        Paged({"a": torch.zeros(8, 4, 6)[:, :, :2]}, 8)
    with pytest.raises(LayoutError, match="other layers"):
        Paged({"a": torch.zeros(8, 4), "b": torch.zeros(8, 6)}, 8)


# ---- what keys are made of
def test_salt_adapter_and_media_are_part_of_a_prompt() -> None:
    def prompt(**more: Any) -> Prompt:
        fields: dict[str, Any] = {"prompt_embeds": None, "lora_request": None, "mm_features": [], "cache_salt": None,
                                  "pooling_params": None, "prompt_token_ids": [1, 2], **more}  # fmt: skip
        found = prompt_of(SimpleNamespace(**fields))
        assert found is not None
        return found

    lora = SimpleNamespace(lora_name="x", lora_path="")
    image = SimpleNamespace(identifier="f00d", mm_position=SimpleNamespace(offset=0, length=2))
    other = SimpleNamespace(identifier="beef", mm_position=SimpleNamespace(offset=0, length=2))
    alike = [prompt(), prompt(cache_salt="s"), prompt(lora_request=lora), prompt(mm_features=[image]),
             prompt(mm_features=[other]), prompt(cache_salt=prompt(mm_features=[image]).adapter)]  # fmt: skip
    assert len({(one.adapter, one.salt) for one in alike}) == len(alike)
    assert (prompt().adapter, prompt().salt) == ("", "")
    for embedded in ({"prompt_embeds": object()}, {"prompt_token_ids": None}, {"pooling_params": object()}):
        fields = {"prompt_embeds": None, "prompt_token_ids": [1], "pooling_params": None, **embedded}
        assert prompt_of(SimpleNamespace(**fields)) is None


def test_weights_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        (tmp_path / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        raw = torch.randint(0, 255, (3 << 20,), dtype=torch.uint8, generator=generator).numpy().tobytes()
        (tmp_path / name / "model.safetensors").write_bytes(raw)
    a, b, c = (digest_of_folder(str(tmp_path / name)) for name in "abc")
    assert a == c != b
    assert digest_of_folder(str(tmp_path)) == ""


def test_what_tells_the_kv_of_two_engines_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(
        where: str = "a", seed: int = 1, kv: str = "auto", shape: tuple[int, ...] = (BLOCKS, 2, 4, 16),
        item: Any = torch.float32, block: int = 4, ranks: int = 1, version: str = "0.32.0", **more: Any,
    ) -> Any:  # fmt: skip
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
        folder = tmp_path / where
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(bytes([seed]) * 5000)
        values = {"architectures": ["Llama"], "_name_or_path": where, "rope_theta": 1e4, **more.pop("values", {})}
        hf = SimpleNamespace(architectures=["Llama"], to_dict=lambda: values)
        model = {"hf_config": hf, "dtype": "torch.bfloat16", "quantization": None, "model": str(folder), **more}
        config = SimpleNamespace(
            model_config=SimpleNamespace(**model), cache_config=SimpleNamespace(cache_dtype=kv),
            parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )  # fmt: skip
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=block))
        paged = Paged({"one": torch.zeros(shape, dtype=item)}, BLOCKS)
        return space_of(config, SimpleNamespace(kv_cache_groups=[group]), paged)

    bytes_ = {"item": torch.uint8, "shape": (BLOCKS, 2, 4, 16)}
    assert engine() == engine(where="b") == engine(kv="bfloat16", version="0.32.1+cpu")  # path and name are nothing
    others = [
        engine(where="c", seed=2), engine(values={"rope_theta": 2e4}), engine(dtype="torch.float16"),
        engine(quantization="awq"), engine(shape=(BLOCKS, 4, 4, 8)), engine(block=2), engine(ranks=2),
        engine(version="0.33.0"), engine(item=torch.float16), engine(kv="fp8_e4m3", **bytes_),
        engine(kv="fp8_e5m2", **bytes_),
    ]  # fmt: skip
    assert len({engine(), *others}) == 1 + len(others)


class FullAttentionSpec:
    """By its name, as vLLM's; so are these."""


class MLAAttentionSpec(FullAttentionSpec):
    pass


class SlidingWindowSpec:
    pass


class UniformTypeKVCacheSpecs:
    def __init__(self, *specs: Any) -> None:
        self.kv_cache_specs = dict(enumerate(specs))


def test_engines_whose_kv_cannot_be_exchanged_are_refused_by_name() -> None:
    def said(*specs: Any, dtype: str = "auto", scales: bool = False, **parallel: int) -> str:
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(**{"pipeline_parallel_size": 1, "data_parallel_size": 1, **parallel}),
            cache_config=SimpleNamespace(cache_dtype=dtype, calculate_kv_scales=scales),
        )
        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs or (FullAttentionSpec(),)]
        try:
            check(config, SimpleNamespace(kv_cache_groups=groups))
        except SpaceError as error:
            return str(error)
        return ""

    full, sliding = FullAttentionSpec(), SlidingWindowSpec()
    assert said() == said(MLAAttentionSpec()) == said(UniformTypeKVCacheSpecs(full, full)) == said(dtype="fp8") == ""
    assert "SlidingWindowSpec, expected that of full attention" in said(sliding)
    assert "SlidingWindowSpec" in said(UniformTypeKVCacheSpecs(sliding))
    assert "2 groups of KV (FullAttentionSpec, SlidingWindowSpec), expected one" in said(full, sliding)
    assert "pipeline parallel size 2, expected 1" in said(pipeline_parallel_size=2)
    assert "data parallel size 2, expected 1" in said(data_parallel_size=2)
    assert "decode_context_parallel_size is 2" in said(decode_context_parallel_size=2)
    assert "KV scales" in said(dtype="fp8", scales=True)


def test_an_unknown_connector_api_is_refused_by_name() -> None:
    class Base:
        pass

    for name, parameters in api.METHODS.items():
        lines = f"def {name}(self, {', '.join(p if p != 'kwargs' else '**kwargs' for p in parameters)}): ..."
        scope: dict[str, Any] = {}
        exec(lines, scope)
        setattr(Base, name, scope[name])
    api.check(Base, "9.9")
    Base.on_new_request = lambda self, request, more: None  # type: ignore[attr-defined]
    del Base.shutdown  # type: ignore[attr-defined]
    said = r"vLLM 9.9 .*on_new_request\(request, more\) instead.*shutdown is missing.*0.32"
    with pytest.raises(api.ApiError, match=said):
        api.check(Base, "9.9")


def test_a_look_is_small() -> None:
    """A long prompt's question is its tokens and little more."""
    prompt = Prompt(bytes(4 * 8000))
    assert len(msgspec.msgpack.encode(Look("r", prompt, 1.0))) < 4 * 8000 + 100

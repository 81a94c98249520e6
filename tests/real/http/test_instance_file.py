"""Instance files: the reference's keys, ours under kvmove:, and one line for each mistake."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("zmq")

from kvcore.scenario.loader import ScenarioError
from kvreal.instance_file import IGNORED, Keys, path_from, read
from kvreal.ucx import judge, respect

REFERENCE = """\
chunk_size: 256
local_cpu: True
max_local_cpu_size: 5

# cache controller configurations
enable_controller: True
lmcache_instance_id: "lmcache_instance_1"
controller_pull_url: "localhost:8300"
controller_reply_url: "localhost:8400"
lmcache_worker_ports: 8500

# P2P configurations
enable_p2p: True
p2p_host: "localhost"
p2p_init_ports: 8200
p2p_lookup_ports: 8201
transfer_channel: "nixl"
"""
LEAST = "enable_controller: true\nlmcache_instance_id: a\ncontroller_pull_url: localhost:8300\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "i.yaml"
    path.write_text(text)
    return path


def test_the_references_file_is_read(tmp_path: Path) -> None:
    file = read(write(tmp_path, REFERENCE))
    assert file.instance == "lmcache_instance_1"
    assert file.controller == ("localhost", 8300) and file.reply == ("localhost", 8400)
    assert file.worker_ports == (8500,) and file.host == "localhost" and file.transport == "nixl"
    # 5 GB, as the reference counts, in chunks of 256 tokens of 128 KiB
    assert file.locations == (("LocalCPUBackend", 5 * 1024**3 // (256 * 131072)),)
    assert file.namespace.chunk_tokens == 256 and file.namespace.ranks == 1
    assert file.namespace.bytes_per_token == 131072


def test_two_instances_of_one_model_have_one_namespace(tmp_path: Path) -> None:
    one = read(write(tmp_path, REFERENCE))
    other = read(write(tmp_path, REFERENCE.replace("instance_1", "instance_2").replace("8500", "8501")))
    assert one.namespace == other.namespace and one.instance != other.instance


def test_keys_that_mean_nothing_here_are_named_and_ignored(tmp_path: Path) -> None:
    file = read(write(tmp_path, LEAST + "use_layerwise: true\nremote_url: null\ncache_policy: LRU\n"))
    assert file.ignored == ("use_layerwise", "remote_url", "cache_policy")


def test_no_key_is_both_read_and_ignored() -> None:
    assert not IGNORED & set(Keys.__struct_encode_fields__)


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("chunk_sise: 3", ":4:1: chunk_sise:", "did you mean 'chunk_size'"),
        ("pd_rolle: sender", ":4:1: pd_rolle:", "did you mean 'pd_role'"),
        ("bytes_per_token: 3", ":4:1: bytes_per_token:", "belongs under kvmove:"),
        ("kvmove: {rank: 2}", ":4:10: kvmove.rank:", "did you mean 'ranks'"),
        ("chunk_size: 0", ":4:13: chunk_size:", "expected 1 to 65536"),
        ("chunk_size: many", ":4:13: chunk_size:", "expected a whole number"),
        ("local_cpu: maybe", ":4:12: local_cpu:", "expected true or false"),
        ("local_cpu: false", ":4:12: local_cpu:", "nothing to keep KV in"),
        ("max_local_cpu_size: 0.001", ":4:21: max_local_cpu_size:", "less than one chunk"),
        ("lmcache_worker_ports: [8500, 8500]", ":4:23: lmcache_worker_ports:", "given twice"),
        ("lmcache_worker_ports: 85000", ":4:23: lmcache_worker_ports:", "expected a port"),
        ("lmcache_worker_ports: [8500, 8501]\np2p_init_ports: 8200", ":5:17: p2p_init_ports:", "each of 2 ranks"),
        ("transfer_channel: pigeon", ":4:19: transfer_channel:", "expected one of arena, auto, mooncake"),
        ("store_location: nowhere", ":4:17: store_location:", "expected one of LocalCPUBackend"),
        ("kvmove: {model: other/one}", "kvmove.bytes_per_token:", "model other/one is not known"),
        ("kvmove: {ranks: 3}", ":4:17: kvmove.ranks:", "cannot share 131072 bytes"),
        ("kvmove: {constants: {lease: 1 ms}}", "lease", "must not be"),
        ("local_disk: /d\nkvmove: {locations: {LocalCPUBackend: 1 GiB}}", ":4:13: local_disk:", "names no disk"),
        ("max_local_disk_size: 5\nkvmove: {locations: {A: 1 GiB}}", ":4:22: max_local_disk_size:", "names no disk"),
        ("lmcache_instance_id: b", ":4:1: lmcache_instance_id:", "given twice"),
        ("kvmove: {locations: {A: 1 KiB}}", ":4:25: kvmove.locations.A:", "less than one chunk of 33554432"),
        ("kvmove: {locations: {A: {size: many}}}", ":4:32: kvmove.locations.A.size:", "expected a size"),
        ("kvmove: {locations: {A: many}}", ":4:25: kvmove.locations.A:", "expected a size"),
        ("kvmove: {locations: {A: {sise: 1 GiB}}}", ":4:26: kvmove.locations.A.sise:", "did you mean 'size'"),
        ("kvmove: {locations: {A: {size: 1 GiB, slot: 1 MiB}}}", ":4:45: kvmove.locations.A.slot:", "less than one"),
        ("kvmove: {locations: {A: {size: 1 GiB, slot: 2 GiB}}}", ":4:25: kvmove.locations.A:", "one slot of 2"),
        ("kvmove: {locations: {A: {size: 1 GiB, model: own/x}}}", "kvmove.locations.A:", "own/x is not known"),
        ("kvmove: {locations: {A: {size: 1 GiB, chunk_size: 0}}}", "4:51: kvmove.locations.A.chunk_size:", "1 to 6"),
        ("kvmove: {locations: {A: {size: 1 GiB, model: qwen3-8b}}}", ":4:21: kvmove.locations:", "for other models"),
        ("kvmove: {store_at: A, locations: {B: 1 GiB, A: {size: 1 GiB, model: qwen3-8b}}}", "store_at:", "one of B"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, text: str, where: str, says: str) -> None:
    with pytest.raises(Exception, match=".") as caught:
        read(write(tmp_path, LEAST + text + "\n"))
    line = str(caught.value)
    assert type(caught.value).__name__ in ("ScenarioError", "ConfigError")
    assert "\n" not in line and where in line and says in line


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("enable_controller", "without a controller"),
        ("lmcache_instance_id", "missing"),
        ("controller_pull_url", "8300"),
    ],
)
def test_what_must_be_said_is_asked_for(tmp_path: Path, missing: str, says: str) -> None:
    text = "\n".join(line for line in LEAST.splitlines() if not line.startswith(missing))
    with pytest.raises(ScenarioError, match=missing) as caught:
        read(write(tmp_path, text + "\n"))
    assert says in str(caught.value)


def test_a_rank_for_each_worker_port(tmp_path: Path) -> None:
    for ports in ("[8500, 8501]", '"8500, 8501"'):
        file = read(write(tmp_path, LEAST + f"lmcache_worker_ports: {ports}\n"))
        assert file.ranks == 2 and file.worker_ports == (8500, 8501)
        assert file.namespace.bytes_per_token == 65536
        # the size is of each rank, as in the reference
        assert file.locations == (("LocalCPUBackend", 320),)


def test_locations_have_slots_and_models_of_their_own(tmp_path: Path) -> None:
    own = """
kvmove:
  ranks: 2
  locations:
    LocalCPUBackend: 1 GiB
    DraftCPU: {size: 1 GiB, model: llama-3.2-1b, chunk_size: 128, weights: d}
    OtherCPU: {size: 32 MiB, model: own/x, bytes_per_token: 2 KiB, dtype: float16, layout: mla}
    LocalDiskBackend: {size: 1 GiB, slot: 32 MiB}
"""
    file = read(write(tmp_path, LEAST + own))
    cpu, draft, other, disk = file.places
    assert (cpu.slots, cpu.slot_bytes, cpu.namespace) == (64, 0, None)
    assert (disk.slots, disk.slot_bytes, disk.namespace) == (32, 32 << 20, None)
    assert draft.namespace is not None and other.namespace is not None
    assert (draft.namespace.model, draft.namespace.weights, draft.namespace.chunk_tokens) == ("llama-3.2-1b", "d", 128)
    assert draft.namespace.bytes_per_token == 16384 and draft.slots == (1 << 30) // (128 * 16384)
    assert other.namespace.bytes_per_token == 1024
    assert (other.namespace.dtype, other.namespace.kv_layout) == ("float16", "mla")
    assert {place.namespace.ranks for place in (draft, other) if place.namespace is not None} == {2}
    assert file.models == [file.namespace.model, "llama-3.2-1b", "own/x"]
    assert [place.name for place in file.searched()] == ["LocalCPUBackend", "LocalDiskBackend"]
    assert [place.name for place in file.searched("own/x")] == ["OtherCPU"]
    assert file.spec(1, "here", "there").space("DraftCPU") == draft.namespace


def test_a_disk_beside_the_memory(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    file = read(write(tmp_path, LEAST + f"local_disk: file://{disk}\nmax_local_disk_size: 1\n"))
    assert file.locations == (("LocalCPUBackend", 160), ("LocalDiskBackend", 32))
    assert file.disk_path == str(disk) and disk.is_dir() and file.store_at == "LocalCPUBackend"


def test_what_carries_bytes_to_a_disk_may_be_chosen(tmp_path: Path) -> None:
    assert read(write(tmp_path, LEAST)).disk_io == "calls"
    assert read(write(tmp_path, f"{LEAST}kvmove: {{disk_io: posix}}\n")).disk_io == "posix"
    with pytest.raises(ScenarioError, match=r"i.yaml:4:.*disk_io.*magic"):
        read(write(tmp_path, f"{LEAST}kvmove: {{disk_io: magic}}\n"))


def test_the_file_comes_from_the_option_else_the_environment() -> None:
    both = {"KVMOVE_CONFIG_FILE": "ours", "LMCACHE_CONFIG_FILE": "theirs"}
    assert path_from("given", both) == "given"
    assert path_from(None, both) == "ours"
    assert path_from(None, {"LMCACHE_CONFIG_FILE": "theirs"}) == "theirs"
    with pytest.raises(ScenarioError, match="--config FILE"):
        path_from(None, {})


def test_the_older_names_still_work(tmp_path: Path) -> None:
    text = LEAST.replace("controller_pull_url", "controller_url") + "lmcache_worker_port: 8500\n"
    file = read(write(tmp_path, text))
    assert file.controller == ("localhost", 8300) and file.worker_ports == (8500,)


# ---- UCX_TLS
@pytest.mark.parametrize("value", ["rc", "rc,self", "rc_mlx5,ud", "cuda_ipc", "pigeon"])
def test_ucx_tls_that_names_only_absent_hardware_is_set_aside_with_one_warning(value: str) -> None:
    environ = {"UCX_TLS": value}
    warning = respect(environ, frozenset())
    assert f"UCX_TLS={value}" in warning and "\n" not in warning and "UCX_TLS" not in environ
    assert respect(environ, frozenset()) == ""


@pytest.mark.parametrize("value", ["tcp", "all", "^tcp", "rc,tcp", "sm,self", ""])
def test_ucx_tls_that_can_carry_bytes_is_respected(value: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    environ = {"UCX_TLS": value}
    assert respect(environ, frozenset()) == "" and environ == {"UCX_TLS": value} and not caplog.records


def test_ucx_tls_with_the_hardware_there() -> None:
    environ = {"UCX_TLS": "rc"}
    assert respect(environ, frozenset({"rdma"})) == "" and environ == {"UCX_TLS": "rc"}
    assert judge("rc,cuda_copy,tcp", frozenset()) == (["tcp"], ["rc"])

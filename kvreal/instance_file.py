"""An instance's YAML file: the reference's keys, and our own settings under ``kvmove:``.

Keys that the reference knows and that mean nothing here are named once and ignored; a key that nobody knows is
refused with file, line and the nearest name, because a setting that is silently dropped is a lie.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Final, List, Literal, Mapping, Optional, Set, Tuple, Union

import msgspec

from kvcore.protocol.config import Config, WorkerSpec
from kvcore.protocol.links import Measured
from kvcore.protocol.messages import Location, Namespace
from kvcore.scenario.loader import ScenarioError, load_as
from kvcore.scenario.mistake import Mistake, nearest, shown
from kvcore.scenario.schema import MODELS, Constants, Kv, Scenario, config_of
from kvcore.scenario.topology import kind_of
from kvcore.scenario.units import Size
from kvreal.arena import ARENAS
from kvreal.transfer import NAMES, names

VARIABLES: Final = ("KVMOVE_CONFIG_FILE", "LMCACHE_CONFIG_FILE")
GB: Final = 1 << 30
"""What the reference means by a GB."""
CPU: Final = "LocalCPUBackend"
DISK: Final = "LocalDiskBackend"
DEFAULT_MODEL: Final = "meta-llama/Llama-3.1-8B-Instruct"

_IGNORED: Final = """
    local_cpu_use_hugepages reserve_local_cpu_size local_disk_path_sharding remote_url remote_serde use_layerwise
    save_decode_cache pre_caching_hash_algorithm enable_blending blend_recompute_ratios blend_thresholds
    blend_check_layers blend_min_tokens blend_special_str retrieve_locations p2p_lookup_ports mp_host
    mp_port lmcache_worker_ids lmcache_worker_heartbeat_delay_time lmcache_worker_heartbeat_time enable_pd pd_role
    pd_buffer_size pd_buffer_device pd_peer_host pd_peer_init_port pd_peer_alloc_port pd_peer_query_port pd_proxy_host
    pd_proxy_port pd_allocation_timeout_sec pd_shutdown_timeout_sec pd_condition_poll_interval_sec pd_max_prefill_len
    pd_backend_mode pd_skip_proxy_notification pd_bidirectional nixl_backends nixl_buffer_size nixl_buffer_device
    gds_path gds_path_sharding gds_buffer_size maru_path maru_pool_size use_gds gds_backend audit_actual_remote_url
    internal_api_server_host extra_config blocking_timeout_secs external_lookup_client py_enable_gc cache_policy
    numa_mode enable_async_loading internal_api_server_enabled internal_api_server_port_start priority_limit
    internal_api_server_include_index_list internal_api_server_socket_path_prefix runtime_plugin_locations
    storage_plugins remote_storage_plugins lookup_timeout_ms min_retrieve_tokens hit_miss_ratio
    lookup_server_worker_ids enable_scheduler_bypass_lookup script_allowed_imports run_script_api_enabled
    enable_lazy_memory_allocator lazy_memory_initial_ratio lazy_memory_expand_trigger_ratio lazy_memory_step_ratio
    lazy_memory_safe_size enable_chunk_statistics chunk_statistics_auto_start_statistics
    chunk_statistics_auto_exit_timeout_hours chunk_statistics_auto_exit_target_unique_chunks chunk_statistics_strategy
    enable_kv_events use_gpu_connector_v3 pin_timeout_sec pin_check_interval_sec remote_config_url app_id
    enable_hidden_state_cache max_hidden_state_cpu_size hidden_state_layers hidden_states_retrieve_mode
    enable_xpyd nixl_peer_host nixl_peer_init_port nixl_peer_alloc_port nixl_proxy_host nixl_proxy_port nixl_role
    nixl_peer_port nixl_receiver_port plugin_locations external_backends"""
IGNORED: Final = frozenset(_IGNORED.split())
"""What LMCache 0.5.6 knows besides; its older names included."""

OLD_NAMES: Final = {"controller_url": "controller_pull_url", "lmcache_worker_port": "lmcache_worker_ports"}

CHANNELS: Final = {name: name for name in NAMES} | {"py_socket": "socket"}
"""``transfer_channel`` -> our transport. ``py_socket`` is the reference's word for plain sockets."""

Ports = Union[int, str, Tuple[int, ...]]
"""``8500``, ``[8500, 8501]`` or ``8500,8501``: one a rank."""


class Room(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A location of a rank. ``slot``: bytes of its slots, if they are larger than a chunk. The others, for another
    model's KV, mean what they do for the whole instance; ``bytes_per_token`` is of all ranks together."""

    size: Size
    slot: Optional[Size] = None
    model: Optional[str] = None
    weights: Optional[str] = None
    dtype: Optional[str] = None
    layout: Optional[str] = None
    chunk_size: Optional[int] = None
    bytes_per_token: Optional[Size] = None


class Own(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What stands under ``kvmove:``."""

    model: str = DEFAULT_MODEL
    bytes_per_token: Optional[Size] = None
    """Of all ranks together. Known models need not say it."""
    weights: str = ""
    dtype: str = "bfloat16"
    layout: str = "layers-first"
    ranks: Optional[int] = None
    locations: Dict[str, Room] = {}
    """Of each rank. Instead of ``local_cpu`` and ``local_disk``."""
    store_at: str = ""
    """Where the engine stores; else the first location."""
    transport: str = ""
    profile: str = ""
    """What ``kvmove calibrate`` measured here: ``auto`` chooses by it."""
    arena: str = ""
    """A name, or a folder in memory: instances of this host that name the same hand slots over instead of copying."""
    arena_size: Optional[Size] = None
    """Of the whole arena; the CPU locations of all its instances must fit."""
    disk_io: Literal["calls", "posix"] = "calls"
    """What carries bytes into disk files and out of them: the kernel's calls, or NIXL's POSIX backend."""
    direction: Literal["auto", "read", "push"] = "auto"
    """Of what is moved to this instance; auto: as the controller has it, else as was measured."""
    checksums: Literal["off", "sample", "all"] = "sample"
    constants: Constants = Constants()
    host: str = "localhost"
    """Where workers listen; ``p2p_host`` wins."""
    tokenizer: str = ""
    """A ``tokenizer.json``; else the general one."""
    max_model_len: int = 131072
    keys: str = ""
    """A directory that ``kvmove keys`` made: messages are then encrypted, and only known peers are heard."""


class Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The reference's keys that mean something here, as they stand in the file."""

    chunk_size: int = 256
    local_cpu: bool = True
    max_local_cpu_size: float = 5.0
    local_disk: Union[str, bool, None] = None
    max_local_disk_size: float = 0.0
    store_location: Optional[str] = None
    enable_controller: bool = False
    lmcache_instance_id: Optional[str] = None
    controller_pull_url: Optional[str] = None
    controller_reply_url: Optional[str] = None
    lmcache_worker_ports: Optional[Ports] = None
    enable_p2p: bool = False
    p2p_host: Optional[str] = None
    p2p_init_ports: Optional[Ports] = None
    transfer_channel: Optional[str] = None
    save_unfull_chunk: bool = True
    """The reference's default is false, which moves nothing of a short prompt."""
    kvmove: Own = Own()


class InstanceFile(msgspec.Struct, frozen=True):
    """What an instance is, all of it said."""

    path: str
    instance: str
    namespace: Namespace
    places: Tuple[Location, ...]
    """Of each rank."""
    store_at: str
    controller: Tuple[str, int]
    reply: Optional[Tuple[str, int]]
    host: str
    worker_ports: Tuple[int, ...]
    """One a rank; empty: any free ones."""
    data_ports: Tuple[int, ...]
    transport: str
    arena: str
    """The folder of the arena; empty: none."""
    arena_bytes: int
    save_unfull_chunk: bool
    config: Config
    disk_path: str
    tokenizer: str
    max_model_len: int
    keys: str
    ignored: Tuple[str, ...]
    profile: str = ""
    disk_io: str = "calls"

    @property
    def ranks(self) -> int:
        return self.namespace.ranks

    @property
    def locations(self) -> Tuple[Tuple[str, int], ...]:
        """(name, slots) of each."""
        return tuple([(place.name, place.slots) for place in self.places])

    def searched(self, model: str = "") -> List[Location]:
        """Locations with a model's KV, in the order in which a prompt is looked for: where the engine stores comes
        first. Without a model: with what most of this instance's is, its own."""
        own = self.namespace.model
        found = [one for one in self.places if (one.namespace or self.namespace).model == (model or own)]
        return sorted(found, key=lambda one: one.name != self.store_at)

    @property
    def models(self) -> List[str]:
        """What this instance serves, its own first."""
        spaces = [self.namespace, *[one.namespace for one in self.places if one.namespace is not None]]
        return list({space.model: None for space in spaces})

    def spec(self, rank: int, address: str, controller: str, measured: Optional[Measured] = None) -> WorkerSpec:
        """What the rank's machine is made from. ``measured``: what was, of its transports."""
        name, space = self.instance, self.namespace
        return WorkerSpec(address, name, rank, controller, space, self.places, self.config, measured)


def path_from(option: Optional[str], environ: Mapping[str, str]) -> str:
    """``--config``, else ``KVMOVE_CONFIG_FILE``, else ``LMCACHE_CONFIG_FILE``. ScenarioError if none is given."""
    for path in (option, *[environ.get(name) for name in VARIABLES]):
        if path:
            return path
    raise ScenarioError("no instance file", 0, 0, "", f"give --config FILE, or set {VARIABLES[0]} or {VARIABLES[1]}")


def read(path: Union[str, Path], model: str = "", space: Optional[Namespace] = None) -> InstanceFile:
    """ScenarioError (one line: file, line, column, key) for whatever is wrong. ``model``: instead of the file's.
    ``space``: what an engine says of its own KV; the file then says no more than the chunk's size, and ``weights``."""
    ignored: List[str] = []
    added: Set[Tuple[Union[str, int], ...]] = set()

    def sift(data: Dict[str, Any]) -> Optional[Mistake]:
        for key in list(data):
            if key in IGNORED:
                ignored.append(key)
                del data[key]
            elif key in OLD_NAMES:
                data.setdefault(OLD_NAMES[key], data.pop(key))
            elif key not in Keys.__struct_encode_fields__:
                return Mistake((key,), _unknown(key), True)
            elif data[key] is None:
                del data[key]  # the reference's way to say: as usual
        own = data.get("kvmove")
        rooms = own.get("locations") if isinstance(own, dict) else None
        for name, room in list(rooms.items()) if isinstance(rooms, dict) else ():
            if rooms is not None and room is not None and not isinstance(room, (dict, list)):
                rooms[name] = {"size": room}
                added.add(("kvmove", "locations", name, "size"))
        return None

    return _meaning(str(path), load_as(path, Keys, sift, added), tuple(ignored), model, space)


def _unknown(key: str) -> str:
    near = nearest(key, [*Keys.__struct_encode_fields__, *sorted(IGNORED)])
    own = nearest(key, Own.__struct_encode_fields__)
    hint = f" (our own {shown(own)} belongs under kvmove:)" if own else ""
    return f"unknown key {shown(key)}" + (f" (did you mean {shown(near)}?)" if near else hint)


def _meaning(
    path: str, keys: Keys, ignored: Tuple[str, ...], model: str, space: Optional[Namespace]
) -> InstanceFile:
    own = keys.kvmove
    model = model or own.model

    def wrong(key: str, text: str) -> ScenarioError:
        return _at(path, key, text)

    if not keys.enable_controller:
        raise wrong("enable_controller", "is false, expected true: without a controller nothing moves")
    if not keys.lmcache_instance_id:
        raise wrong("lmcache_instance_id", "missing, expected the name that moves give this instance")
    if "/" in keys.lmcache_instance_id:
        raise wrong("lmcache_instance_id", f"found {shown(keys.lmcache_instance_id)}, expected a name without a slash")
    if not keys.controller_pull_url:
        raise wrong("controller_pull_url", "missing, expected host:port such as localhost:8300")
    if not 1 <= keys.chunk_size <= 65536:
        raise wrong("chunk_size", f"found {keys.chunk_size}, expected 1 to 65536 tokens")
    known = CHANNELS | {name: name for name in names()}
    if own.transport and own.transport not in known.values():
        raise wrong("kvmove.transport", f"found {shown(own.transport)}, expected one of {', '.join(names())}")
    channel = own.transport or known.get(keys.transfer_channel or "auto", "")
    if not channel:
        raise wrong(
            "transfer_channel", f"found {shown(keys.transfer_channel)}, expected one of {', '.join(sorted(known))}"
        )
    if bool(own.arena) != (own.arena_size is not None):
        lacking = "kvmove.arena_size" if own.arena else "kvmove.arena"
        raise wrong(lacking, "missing, expected an arena's name and its size together")
    if channel == "arena" and not own.arena:
        raise wrong("kvmove.arena", "missing, expected the name of the arena that transfer_channel asks for")
    worker_ports = _ports(path, "lmcache_worker_ports", keys.lmcache_worker_ports)
    data_ports = _ports(path, "p2p_init_ports", keys.p2p_init_ports)
    ranks = own.ranks if own.ranks is not None else space.ranks if space is not None else max(1, len(worker_ports))
    if space is not None and ranks != space.ranks:
        raise wrong("kvmove.ranks", f"found {ranks}, the engine has {space.ranks}")
    if not 1 <= ranks <= 64:
        raise wrong("kvmove.ranks", f"found {ranks}, expected 1 to 64")
    for key, ports in (("lmcache_worker_ports", worker_ports), ("p2p_init_ports", data_ports)):
        if ports and len(ports) != ranks:
            raise wrong(key, f"{len(ports)} given, expected one for each of {ranks} ranks")
    token_bytes = own.bytes_per_token.bytes if own.bytes_per_token is not None else _known(model)
    if space is not None:
        namespace = _engine_space(path, keys, space)
    elif not token_bytes:
        raise wrong("kvmove.bytes_per_token", f"missing, expected a size such as '128 KiB': model {model} is not known")
    elif token_bytes % ranks:
        raise wrong("kvmove.ranks", f"{ranks} ranks cannot share {token_bytes} bytes a token")
    else:
        namespace = Namespace(model, own.weights, own.dtype, own.layout, keys.chunk_size, ranks, token_bytes // ranks)
    places = _places(path, keys, namespace)
    ours = [place.name for place in places if place.namespace is None]
    if not ours:
        raise wrong("kvmove.locations", f"all are for other models, expected one for {namespace.model}")
    store_at = own.store_at or keys.store_location or ours[0]
    if store_at not in ours:
        key = "kvmove.store_at" if own.store_at else "store_location"
        raise wrong(key, f"found {shown(store_at)}, expected one of {', '.join(ours)}")
    reply = keys.controller_reply_url
    return InstanceFile(
        path=path,
        instance=keys.lmcache_instance_id,
        namespace=namespace,
        places=places,
        store_at=store_at,
        controller=_address(path, "controller_pull_url", keys.controller_pull_url),
        reply=_address(path, "controller_reply_url", reply) if reply else None,
        host=keys.p2p_host or own.host,
        worker_ports=worker_ports,
        data_ports=data_ports,
        transport=channel,
        arena=_arena(own),
        arena_bytes=own.arena_size.bytes if own.arena_size is not None else 0,
        save_unfull_chunk=keys.save_unfull_chunk,
        config=_config(own),
        disk_path=_disk_path(path, keys.local_disk),
        tokenizer=_beside(path, own.tokenizer),
        max_model_len=own.max_model_len,
        keys=_beside(path, own.keys),
        profile=_beside(path, own.profile),
        disk_io=own.disk_io,
        ignored=ignored,
    )


def _arena(own: Own) -> str:
    """The folder that an arena's name means: of this user, in memory."""
    if not own.arena or own.arena.startswith("/"):
        return own.arena
    return f"{ARENAS}/kvmove-{os.getuid()}-{own.arena}"


def _engine_space(path: str, keys: Keys, space: Namespace) -> Namespace:
    """``space`` with the file's chunk size, and its word for the weights where it has one."""
    own = keys.kvmove
    if keys.chunk_size % space.block_tokens:
        text = f"found {keys.chunk_size}, expected a multiple of the engine's block of {space.block_tokens} tokens"
        raise _at(path, "chunk_size", text)
    weights = own.weights or space.weights
    if not weights:
        text = "missing, and the engine's weights cannot be read here: expected any text, the same for equal weights"
        raise _at(path, "kvmove.weights", text)
    if own.bytes_per_token is not None and own.bytes_per_token.bytes != space.bytes_per_token * space.ranks:
        text = f"found {own.bytes_per_token.bytes}, the engine has {space.bytes_per_token * space.ranks}"
        raise _at(path, "kvmove.bytes_per_token", text)
    return msgspec.structs.replace(space, chunk_tokens=keys.chunk_size, weights=weights)


def _at(path: str, key: str, text: str) -> ScenarioError:
    """A mistake of meaning, at the line where its key stands; at the file where it is missing."""

    def find(data: Dict[str, Any]) -> Optional[Mistake]:
        return Mistake(tuple(key.split(".")), text)

    try:
        load_as(path, Keys, find)
    except ScenarioError as error:
        return error
    raise AssertionError("unreachable: find() always finds it")


def _places(path: str, keys: Keys, own: Namespace) -> Tuple[Location, ...]:
    sizes: Dict[str, Tuple[str, int]] = {}
    more: Dict[str, Room] = {}
    for name, room in keys.kvmove.locations.items():
        more[name] = room
        sizes[name] = (f"kvmove.locations.{name}", room.size.bytes)
    if sizes and (keys.local_disk or keys.max_local_disk_size) and "disk" not in {kind_of(name) for name in sizes}:
        key = "local_disk" if keys.local_disk else "max_local_disk_size"
        raise _at(path, key, f"kvmove.locations names no disk, expected {DISK} and its size there, or no {key}")
    if not sizes and keys.local_cpu:
        sizes[CPU] = ("max_local_cpu_size", int(keys.max_local_cpu_size * GB))
    if not keys.kvmove.locations and keys.local_disk:
        sizes[DISK] = ("max_local_disk_size", int(keys.max_local_disk_size * GB))
    if not sizes:
        raise _at(path, "local_cpu", "is false and there is no local_disk: nothing to keep KV in")
    places: List[Location] = []
    for name, (key, nbytes) in sizes.items():
        said = more.get(name)
        space = _space_of(path, name, said, own) if said is not None else own
        chunk = space.chunk_tokens * space.bytes_per_token
        slot = said.slot.bytes if said is not None and said.slot is not None else chunk
        if slot < chunk:
            raise _at(path, f"{key}.slot", f"{slot} bytes are less than one chunk of {chunk}")
        if nbytes < slot:
            what = f"one chunk of {chunk}" if slot == chunk else f"one slot of {slot}"
            raise _at(path, key, f"{nbytes} bytes are less than {what}")
        places.append(Location(name, nbytes // slot, slot if slot != chunk else 0, space if space != own else None))
    return tuple(places)


def _space_of(path: str, name: str, room: Room, own: Namespace) -> Namespace:
    """What KV is to lie in a location: that of the instance, but for what the location says."""
    key = f"kvmove.locations.{name}"
    said = (room.model, room.weights, room.dtype, room.layout, room.chunk_size, room.bytes_per_token)
    if all(one is None for one in said):
        return own
    model = room.model or own.model
    token_bytes = own.bytes_per_token * own.ranks
    if room.bytes_per_token is not None:
        token_bytes = room.bytes_per_token.bytes
    elif room.model is not None and not (token_bytes := _known(model)):
        raise _at(path, key, f"bytes_per_token is missing, expected a size such as '16 KiB': {model} is not known")
    if token_bytes < 1 or token_bytes % own.ranks:
        raise _at(path, key, f"{own.ranks} ranks cannot share {token_bytes} bytes a token")
    chunk = own.chunk_tokens if room.chunk_size is None else room.chunk_size
    if not 1 <= chunk <= 65536 or chunk % own.block_tokens:
        blocks = f", a multiple of {own.block_tokens}" if own.block_tokens > 1 else ""
        raise _at(path, f"{key}.chunk_size", f"found {chunk}, expected 1 to 65536 tokens{blocks}")
    weights = own.weights if room.weights is None and room.model is None else room.weights or ""
    changes: Dict[str, Any] = {"model": model, "weights": weights, "chunk_tokens": chunk}
    if room.dtype is not None:
        changes["dtype"] = room.dtype
    if room.layout is not None:
        changes["kv_layout"] = room.layout
    return msgspec.structs.replace(own, bytes_per_token=token_bytes // own.ranks, **changes)


def _ports(path: str, key: str, given: Optional[Ports]) -> Tuple[int, ...]:
    parts: Tuple[Any, ...] = ()
    if isinstance(given, str):
        parts = tuple([part.strip() for part in given.split(",")])
    elif given is not None:
        parts = (given,) if isinstance(given, int) else given
    ports: List[int] = []
    for part in parts:
        if not str(part).isdecimal() or not 1 <= int(part) <= 65535:
            raise _at(path, key, f"found {shown(part)}, expected a port (1 to 65535) for each rank")
        ports.append(int(part))
    if len(set(ports)) != len(ports):
        raise _at(path, key, "one port is given twice")
    return tuple(ports)


def _address(path: str, key: str, url: str) -> Tuple[str, int]:
    """``localhost:8300``; a scheme before it does no harm."""
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise _at(path, key, f"found {shown(url)}, expected host:port such as localhost:8300")
    return host.strip("[]"), int(port)


def _known(model: str) -> int:
    """Bytes a token of a known model, also under its full name: meta-llama/Llama-3.1-8B-Instruct; 0 if unknown."""
    name = model.lower().rpartition("/")[2]
    return next((count for known, count in MODELS.items() if name == known or name.startswith(f"{known}-")), 0)


def _config(own: Own) -> Config:
    kv = Kv(direction=own.direction, checksums=own.checksums)
    return config_of(Scenario(name="instance", instances={}, kv=kv, constants=own.constants))


def _disk_path(path: str, given: Union[str, bool, None]) -> str:
    """The directory of disk locations; the default one for temporary files if none is named."""
    if not isinstance(given, str) or not given:
        return ""
    folder = given.removeprefix("file://")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except FileExistsError:
        raise _at(path, "local_disk", f"{folder} is a file, expected a directory") from None
    except OSError as error:
        raise _at(path, "local_disk", f"{folder}: {error.strerror or error}") from None


def _beside(path: str, name: str) -> str:
    """A path in the file counts from the file's own directory."""
    return str(Path(path).parent / name) if name else ""

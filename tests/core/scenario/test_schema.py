"""The structs: what follows from a scenario's fields."""

from __future__ import annotations

import json

import msgspec
import pytest

from kvcore.protocol.config import Config, ConfigError
from kvcore.scenario.loader import json_schema
from kvcore.scenario.schema import (
    CONSTANT_OF,
    FAULT_KINDS,
    STEP_KINDS,
    Constants,
    CrashFault,
    Fault,
    Instance,
    Kv,
    LocationSpec,
    NamespaceFault,
    Scenario,
    Settle,
    Step,
    Store,
    Wait,
    When,
    config_of,
    step_names,
)
from kvcore.scenario.units import ChunkTokens, Duration, Size, Tokens, dec_hook

ONE = {"a": Instance(locations={"cpu": LocationSpec(size=Size.parse("1 GiB"))})}


def scenario(**fields: object) -> Scenario:
    return Scenario(**{"name": "s", "instances": ONE, **fields})  # type: ignore[arg-type]


def test_the_usual_constants() -> None:
    assert config_of(scenario()) == Config()


def test_scale_multiplies_what_is_not_given() -> None:
    config = config_of(scenario(constants=Constants(scale=0.05, dead=Duration.parse("1 s"), events_kept=7)))
    assert (config.retry_ns, config.lease_ns, config.dead_ns) == (10_000_000, 500_000_000, 1_000_000_000)
    assert config.events_kept == 7


def test_every_constant_can_be_given() -> None:
    for name in Config.__struct_fields__:
        if name.endswith("_ns"):
            field = CONSTANT_OF.get(name, name[:-3])
            assert field in Constants.__struct_fields__


@pytest.mark.parametrize(
    ("constants", "said"),
    [
        ({"renew": "9 s"}, "renew_ns"),
        ({"lease": "0 s"}, "lease_ns is 0"),
        ({"lease": "2 leases"}, "lease is 2 leases, expected a time"),
        ({"beat": "4 s", "dead": "5 s"}, "beat_ns = 8000000000 ns must not be above dead_ns"),
    ],
)
def test_contradicting_constants_are_refused_naming_both(constants: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(scenario(constants=msgspec.convert(constants, Constants, dec_hook=dec_hook)))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan"), 1e9])
def test_a_scale_must_be_a_positive_number(scale: float) -> None:
    with pytest.raises(ConfigError):
        config_of(scenario(constants=Constants(scale=scale)))


def test_direction_and_rules() -> None:
    config = config_of(scenario(kv=Kv(direction="push"), without=("h03", "h13c")))
    assert config.direction == "push"
    assert not config.rules.h03
    assert not config.rules.h13c
    assert config.rules.h02
    with pytest.raises(ConfigError, match="no rule 'h99'"):
        config_of(scenario(without=("h99",)))


def test_known_models_say_their_bytes() -> None:
    assert Kv().token_bytes == 131072  # Llama-3.1-8B: 128 KiB a token
    assert Kv(bytes_per_token=Size(7), model="mine").token_bytes == 7
    assert Kv(chunk=ChunkTokens(16)).chunk_tokens == 16


def test_steps_have_one_kind_and_a_name() -> None:
    steps = (
        Step(store=Store(at="a/cpu", prompt="p", tokens=Tokens(5))),
        Step(settle=Settle()),
        Step(wait=Wait(op="x", name="w")),
    )
    assert [step.kind for step in steps] == ["store", "settle", "wait"]
    assert step_names(steps) == ("store-1", "settle-2", "w")
    assert steps[2].wait is not None and steps[2].wait.ops == ("x",)
    assert Step().kind == ""


def test_faults_name_their_kinds() -> None:
    fault = Fault(when=When(sent="Pin"), drop="all", crash=CrashFault(node="a"))
    assert fault.kinds == ("drop", "crash")
    assert When(at=Duration.parse("0 s")).anchor == "at"
    assert When(received="Pin").anchor == "received"
    assert When().anchor == ""
    assert NamespaceFault(node="a", dtype="float16", ranks=2).changes() == {"dtype": "float16", "ranks": 2}


def test_structs_refuse_unknown_fields_and_changes() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": "x", "instances": {}, "extra": 1}, Scenario)
    with pytest.raises(AttributeError):
        scenario().name = "other"  # type: ignore[misc]


def test_the_json_schema_is_one_and_knows_the_names() -> None:
    schema = json_schema()
    json.dumps(schema)
    defs = schema["$defs"]
    assert set(defs["Step"]["anyOf"][0]["properties"]) == set(STEP_KINDS)
    assert set(FAULT_KINDS) <= set(defs["Fault"]["properties"])
    assert "Committed" in defs["When"]["properties"]["sent"]["enum"]
    assert "from" in defs["Move"]["properties"] and "from" in defs["Move"]["required"]
    assert {"name", "instances"} == set(defs["Scenario"]["required"])
    refs = [part.split('"')[0] for part in json.dumps(schema).split('"#/$defs/')[1:]]
    assert refs and set(refs) <= set(defs)
    # The short forms are allowed: LocalCPUBackend: 2 GiB
    locations = defs["Instance"]["properties"]["locations"]["additionalProperties"]
    assert {"string", "integer"} <= set(locations["anyOf"][1]["type"])

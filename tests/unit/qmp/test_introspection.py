"""query-qmp-schema says what is registered, and refers to nothing that is not there."""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from liveblockd.qapi import ROOT, Alternate, QapiModel, members, parse, to_qmp, type_of
from liveblockd.qmp import introspection, registry
from liveblockd.qmp.introspection import SchemaInfo, schema
from liveblockd.storage.registry import load_drivers


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Node(QapiModel):
    qapi_tag: ClassVar[str] = "driver"
    driver: str
    node_name: str | None = None

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        return {"leaf": Leaf, "filter": Filter}


class Leaf(Node):
    colour: Colour = Colour.RED


class Filter(Node):
    child: Annotated[str | Node | None, Alternate("NodeRefOrNull")] = None


class A(QapiModel):
    type: Literal["a"]
    data: Leaf


class B(QapiModel):
    type: Literal["b"]


class Arguments(QapiModel):
    nodes: list[Node]
    old: Annotated[int | None, Field(json_schema_extra={"features": ("deprecated",)})] = None
    actions: list[Annotated[A | B, Field(discriminator="type")]] | None = None


@pytest.fixture
def table() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_commands", {})

        @registry.command("x-do", args=Arguments, returns=list[Colour], features=("unstable",))
        async def do(context: Any, arguments: Any) -> None: ...

        schema.cache_clear()
        yield {entity["name"]: entity for entity in schema()}
    schema.cache_clear()


def test_a_command_by_its_structure(table: dict[str, Any]) -> None:
    command = table["x-do"]
    assert command["features"] == ["unstable"]
    array = table[command["ret-type"]]
    assert array["name"] == f"[{array['element-type']}]"
    assert table[array["element-type"]]["values"] == ["red", "blue"]
    nodes, old, actions = table[command["arg-type"]]["members"]
    assert (nodes["name"], "default" in nodes) == ("nodes", False)
    assert (old["default"], old["features"], old["type"]) == (None, ["deprecated"], "int")
    node = table[table[nodes["type"]]["element-type"]]
    assert [m["name"] for m in node["members"]] == ["driver", "node-name"]
    assert node["tag"] == "driver"
    assert table[node["members"][0]["type"]]["values"] == ["leaf", "filter"]
    variants = {v["case"]: table[v["type"]] for v in node["variants"]}
    assert [m["name"] for m in variants["leaf"]["members"]] == ["colour"]
    child = table[variants["filter"]["members"][0]["type"]]
    assert child["meta-type"] == "alternate"
    assert [m["type"] for m in child["members"]] == ["str", node["name"], "null"]
    action = table[table[actions["type"]]["element-type"]]
    assert [m["name"] for m in action["members"]] == ["type"]
    assert [len(table[v["type"]]["members"]) for v in action["variants"]] == [1, 0]


def test_events(table: dict[str, Any]) -> None:
    data = table[table["BLOCK_JOB_COMPLETED"]["arg-type"]]
    assert {m["name"]: "default" in m for m in data["members"]} == {
        "type": False,
        "device": False,
        "len": False,
        "offset": False,
        "speed": False,
        "error": True,
    }
    types = {m["name"]: table[m["type"]] for m in data["members"]}
    assert "stream" in types["type"]["values"]


def every() -> list[dict[str, Any]]:
    registry.load()
    schema.cache_clear()
    return schema()


def test_every_registered_command_can_be_described() -> None:
    entities = every()
    defined = [entity["name"] for entity in entities]
    assert len(set(defined)) == len(defined)
    wanted = set()
    for entity in entities:
        wanted |= {entity[k] for k in ("arg-type", "ret-type", "element-type") if k in entity}
        for key in ("members", "variants"):
            wanted |= {m["type"] for m in entity.get(key, ()) if "type" in m}
    assert wanted <= set(defined)
    described = {e["name"] for e in entities if e["meta-type"] == "command"}
    assert described == set(registry.commands())


def test_the_schema_fits_its_own_schema() -> None:
    for entity in every():
        parse(SchemaInfo, json.loads(json.dumps(entity)))
    kinds = {e["meta-type"] for e in every()}
    assert kinds <= set(introspection.SchemaMetaType)


def test_every_argument_default_is_of_its_type() -> None:
    """A default that the wire would refuse is a slip of the model."""
    registry.load()
    for command in registry.commands().values():
        if "qapi_tag" in vars(command.args):
            continue
        for member in members(command.args):
            default = command.args.model_fields[member.attribute].get_default(
                call_default_factory=True
            )
            if not member.required and default is not None:
                member.type.visit(to_qmp(default), ROOT)


def test_it_is_built_quickly() -> None:
    begin = time.process_time()
    every()
    assert time.process_time() - begin < 2.0  # 0.01 s where the machine is idle


def test_types_that_are_none() -> None:
    with pytest.raises(TypeError):
        type_of(bytes)


def test_clients_find_the_features_that_they_ask_for():
    """libvirt reads these before it sets auto-read-only, or opens overlays without their chain."""
    registry.load()
    load_drivers()
    schema.cache_clear()
    by_name = {entity["name"]: entity for entity in schema()}
    options = by_name[by_name["blockdev-add"]["arg-type"]]
    variants = {v["case"]: by_name[v["type"]] for v in options["variants"]}
    assert variants["file"]["features"] == ["dynamic-auto-read-only"]
    assert by_name["blockdev-snapshot"]["features"] == ["allow-write-only-overlay"]
    jobs = by_name[by_name[by_name["query-block-jobs"]["ret-type"]]["element-type"]]
    kinds = by_name[next(m["type"] for m in jobs["members"] if m["name"] == "type")]
    assert not any(value.startswith("x-") for value in kinds["values"])

"""What Docker Engine accepts in a request that creates a container: its API's specification, and its rules for devices.

In: the body of a request. Out: what Docker would refuse, or ignore in silence.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

SPECIFICATION = Path(__file__).with_name("docker-engine-1.45.json")


def problems(request: dict[str, Any]) -> list[str]:
    """Return a line for each field that the specification does not have, or that has another type."""
    found = _validator().iter_errors(_without_nulls(request))
    wrong = [f"{error.json_path}: {error.message}" for error in found]
    return wrong or [line for device in devices(request) for line in _device_problems(device)]


def devices(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The device requests, without the fields that have Go's zero value."""
    listed = request["HostConfig"].get("DeviceRequests") or []
    return [{name: value for name, value in device.items() if value not in (0, "", [], {}, None)} for device in listed]


def _device_problems(device: dict[str, Any]) -> list[str]:
    """As in daemon/devices.go, daemon/nvidia_linux.go and daemon/cdi.go of moby 26.1.5 and 29.0."""
    count, ids = device.get("Count"), device.get("DeviceIDs", [])
    if count and ids:
        return ["cannot set both Count and DeviceIDs on device request"]
    if device.get("Driver") != "cdi":
        gpu = device.get("Capabilities") == [["gpu"]] and not device.get("Driver") and (count == -1 or ids)
        return [] if gpu else [f"no device driver gets this request: {device}"]
    qualified = ids and all(name.count("=") == 1 and "/" in name for name in ids)
    return [] if qualified and not count else [f"not CDI's qualified names: {device}"]


@cache
def _validator() -> jsonschema.Draft202012Validator:
    specification = json.loads(SPECIFICATION.read_text(encoding="utf-8"))
    definitions = specification["definitions"]
    closed = {name: _closed(schema, definitions) for name, schema in definitions.items()}
    return jsonschema.Draft202012Validator({**_closed(specification, definitions), "definitions": closed})


def _closed(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with an error for unknown fields, which Docker ignores. The parts of `allOf` become one."""
    if not isinstance(schema, dict):
        return schema
    if "allOf" in schema:
        parts = [definitions.get(part.get("$ref", "").rpartition("/")[2], part) for part in schema["allOf"]]
        properties = {name: field for part in parts for name, field in part["properties"].items()}
        return _closed({"type": "object", "properties": properties}, definitions)
    closed = {name: _closed(part, definitions) for name, part in schema.items()}
    return {**closed, "additionalProperties": False} if "properties" in schema else closed


def _without_nulls(value: Any) -> Any:
    """Go reads null as a field that is absent."""
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(part) for name, part in value.items() if part is not None}

"""The table of features: the places at which each acts, and the module that acts there.

It is the only way to a feature. A module is imported when a run asks for it, and this module imports none of ours.

`declared` has options, keys, fields, and messages. Every start of the command line imports it, so it imports little.
`feature` acts in the parent (run/feature.py), and `consumer` in the worker (engine/consumer.py). `command` is a command
(cli/parser.py). `directory` recognizes the directories that
a feature made (features/publish). `records` has the type of its settings in the worker, and of what it adds to the
evidence (worker/encoding.py). `feed_service` reads a base for the worker (worker/parent_feed.py). `api` has a function
of the Python interface. `release` measures a finished model that cannot be compared bit for bit (features/verify).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

FEATURES: dict[str, dict[str, str]] = {
    "stream": {"declared": "declared", "feature": "feature", "feed_service": "feed_service"},
    "shards": {"declared": "declared", "feature": "feature", "command": "combine_command"},
    "publish": {
        "declared": "declared",
        "records": "calls",
        "consumer": "consumer",
        "directory": "manifest",
        "feature": "feature",
    },
    "cache": {"declared": "declared", "feature": "feature"},
    "ray": {"declared": "declared", "feature": "feature"},
    "verify": {"declared": "declared", "records": "comparison", "consumer": "consumer", "command": "verify_command"},
    "quantized": {
        "declared": "declared",
        "records": "measurement",
        "consumer": "consumer",
        "release": "release_flow",
    },
    "export": {
        "declared": "declared",
        "command": "export_command",
        "api": "export_flow",
        "directory": "export_record",
    },
}
"""Modules in the folder of each feature, by place, in the order in which features act."""
NEEDS = {"export": "publish", "quantized": "verify", "ray": "shards", "verify": "publish"}
"""The one other feature that a feature imports. Who takes that one away takes both."""


def module_name(feature: str, place: str) -> str:
    return f"merge_gate.features.{feature}.{FEATURES[feature][place]}"


def part(feature: str, place: str) -> Any:
    """Import the module of a feature that acts at a place."""
    return importlib.import_module(module_name(feature, place))


def parts(place: str) -> Iterator[tuple[str, Any]]:
    """Import the modules of all features that act at a place, with the features' names."""
    return ((feature, part(feature, place)) for feature, modules in FEATURES.items() if place in modules)


def declared(name: str) -> Iterator[Any]:
    """What features declare under a name."""
    return (vars(module)[name] for _, module in parts("declared") if name in vars(module))


class WordKey(NamedTuple):
    """A key whose value is a word, and which is an option, too: its words, its description, and the option's help."""

    words: type[StrEnum]
    description: str
    meaning: str


def declared_keys(name: str) -> dict[str, WordKey]:
    """The keys that features declare under a name."""
    return {key: row for keys in declared(name) for key, row in keys.items()}

"""The table of features: the places at which each acts, and the module that acts there.

It is the only way to a feature. A module is imported when a run asks for it, and this module imports none of ours.

`declared` has options, keys, fields, and messages. Every start of the command line imports it, so it imports little.
`feature` acts in the parent (run/feature.py), and `consumer` in the worker (engine/consumer.py). `command` is a command
(cli/parser.py), and `checks` a folder of checks (judging/checks/table.py). `directory` recognizes the directories that
a feature made (features/publish). `records` travel between the processes (worker/channel.py). `feed`
reads a base in the worker, by calls of `feed_service` in the parent (worker/call_service.py), and `load` loads a base
from a feed. `batches` are the adapters that `passes` merges together. `api` has a function of the Python interface.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

FEATURES: dict[str, dict[str, str]] = {
    "stream": {
        "declared": "merge_gate.features.stream.declared",
        "feature": "merge_gate.features.stream.feature",
        "feed": "merge_gate.features.stream.parent_feed",
        "feed_service": "merge_gate.features.stream.feed_service",
        "load": "merge_gate.features.stream.load_from_feed",
        "batches": "merge_gate.features.stream.batches",
        "passes": "merge_gate.features.stream.passes",
    },
    "shards": {
        "declared": "merge_gate.features.shards.declared",
        "feature": "merge_gate.features.shards.feature",
        "command": "merge_gate.features.shards.combine_command",
    },
    "publish": {
        "declared": "merge_gate.features.publish.declared",
        "consumer": "merge_gate.features.publish.consumer",
        "directory": "merge_gate.features.publish.manifest",
        "feature": "merge_gate.features.publish.feature",
    },
    "cache": {"declared": "merge_gate.features.cache.declared", "feature": "merge_gate.features.cache.feature"},
    "forward": {
        "declared": "merge_gate.features.forward.declared",
        "feature": "merge_gate.features.forward.feature",
        "consumer": "merge_gate.features.forward.consumer",
        "checks": "merge_gate.features.forward.checks",
    },
    "ray": {"declared": "merge_gate.features.ray.declared", "feature": "merge_gate.features.ray.feature"},
    "verify": {
        "declared": "merge_gate.features.verify.declared",
        "records": "merge_gate.features.verify.comparison",
        "consumer": "merge_gate.features.verify.consumer",
        "command": "merge_gate.features.verify.verify_command",
    },
    "attest": {
        "declared": "merge_gate.features.attest.declared",
        "command": "merge_gate.features.attest.attest_command",
    },
    "export": {
        "declared": "merge_gate.features.export.declared",
        "command": "merge_gate.features.export.export_command",
        "api": "merge_gate.features.export.export_flow",
        "directory": "merge_gate.features.export.export_record",
    },
}
"""Module names by feature and place, in the order in which features act."""
NEEDS = {"attest": "publish", "export": "publish", "ray": "shards", "verify": "publish"}
"""The one other feature that a feature imports. Who takes that one away takes both."""


def part(feature: str, place: str) -> Any:
    """Import the module of a feature that acts at a place."""
    return importlib.import_module(FEATURES[feature][place])


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

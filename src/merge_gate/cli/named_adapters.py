"""The options for adapters that are named on the command line, and the configuration that a command asks for.

A command with a configuration file refuses them. The file was reviewed, and the report has its digest.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from merge_gate.cli.arguments import given
from merge_gate.errors import UsageError
from merge_gate.records.terms import DTYPES, Quantization
from merge_gate.text import NUMBER, one_of

if TYPE_CHECKING:
    from merge_gate.records.config import Config

_OPTIONS = ("base", "dtype", "quantization", "revision", "set", "expect", "allow_pickle")


def add_named_options(command: argparse.ArgumentParser, *, merges: bool = True) -> None:
    """Add the options. A command that merges nothing has none for dtypes and quantization."""
    group = command.add_argument_group("options for adapters on the command line (a config has its own)")
    group.add_argument(
        "--base",
        type=given,
        metavar="BASE",
        help="the base: a directory or a Hub id (default: the base in adapter_config.json)",
    )
    if merges:
        dtypes = one_of(("auto", *DTYPES))
        group.add_argument("--dtype", type=given, metavar="LIST", help=f"{dtypes}, or several: bfloat16,float16")
        group.add_argument("--quantization", type=given, metavar="Q", help=one_of(Quantization))
    group.add_argument("--revision", type=given, metavar="REV", help="commit, tag or branch of adapters on the Hub")
    group.add_argument(
        "--set",
        action="append",
        type=_setting,
        metavar="CHECK=SEVERITY[:LIMIT]",
        help="set the severity of a check (error, warning, off or on), and its limit: `headroom=error:0.9`; repeatable",
    )
    group.add_argument(
        "--expect",
        action="append",
        type=_expectation,
        metavar="KEY=VALUE",
        help="fail an adapter if a value differs. KEY is peft_type, r, lora_alpha, base, "
        "sha256:FILE, or base-sha256, the digest that a report has of the base; repeatable",
    )
    group.add_argument(
        "--allow-pickle", action="store_true", help="load pickled adapter weights (.bin), with weights_only=True"
    )


def requested_config(arguments: argparse.Namespace) -> Config:
    """The configuration in the file, or that of the adapters named on the command line."""
    from merge_gate.config.from_arguments import config_of, names_a_file
    from merge_gate.config.load_config import load_config
    from merge_gate.judging.policies import POLICIES
    from merge_gate.verify.exchanged import refuse_exchanged_base

    output, policy = getattr(arguments, "output", None), getattr(arguments, "policy", None)
    values: dict[str, Any] = {name: getattr(arguments, name, None) for name in _OPTIONS}
    if names_a_file(arguments.names):
        for option in (f"--{name.replace('_', '-')}" for name, value in values.items() if value):
            variable = arguments.variables.get(option)
            source = f" (from the variable {variable})" if variable else ""
            raise UsageError(
                f"{option}{source} is for adapters named on the command line",
                hint=f"{arguments.names[0]} lists the adapters of this run: write it into that file instead",
            )
        config = load_config(arguments.names[0], output=output, policy=policy)
    else:
        if getattr(arguments, "container", False):
            raise UsageError("--container needs a config", hint="write one with: merge-gate init DIR")
        refuse_exchanged_base(arguments.command, values["base"], arguments.names)
        config = config_of(
            arguments.names,
            base=values["base"],
            dtypes=[word.strip() for word in (values["dtype"] or "").split(",") if word.strip()],
            quantization=values["quantization"],
            revision=values["revision"],
            checks=_unique("--set", values["set"]),
            expect=_expected(values["expect"]),
            allow_pickle=bool(values["allow_pickle"]),
            output=output,
            policy=policy,
        )
    if arguments.unknown_variables and POLICIES[config.policy].needs_known_variables:
        raise UsageError("; ".join(arguments.unknown_variables), hint=f"policy: {config.policy} allows no unknown ones")
    return config


def _setting(text: str) -> tuple[str, dict[str, object]]:
    check, equals, value = text.partition("=")
    severity, colon, limit = value.partition(":")
    if not check or not equals or not severity or (colon and not NUMBER.fullmatch(limit)):
        raise argparse.ArgumentTypeError(f"{text!r} is not CHECK=SEVERITY or CHECK=SEVERITY:LIMIT with a number")
    return check, {"severity": severity} | ({"limit": float(limit)} if colon else {})


def _expectation(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not key or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, _number(value) if key in {"r", "lora_alpha"} and NUMBER.fullmatch(value) else value


def _number(text: str) -> float:
    return int(text) if re.fullmatch(r"-?\d+", text, re.ASCII) else float(text)


def _expected(pairs: list[tuple[str, object]] | None) -> dict[str, object]:
    """The mapping that a file has under `expect`: digests are in a mapping of their own."""
    expect = _unique("--expect", pairs)
    digests = {key.partition(":")[2]: expect.pop(key) for key in list(expect) if key.startswith("sha256:")}
    return expect | ({"sha256": digests} if digests else {})


def _unique(option: str, pairs: list[tuple[str, Any]] | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs or ():
        if key in values:
            raise UsageError(f"{option} names {key} twice", hint="give each one once")
        values[key] = value
    return values

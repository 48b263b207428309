"""Every architecture of the installed transformers: the gate beside what a user of PEFT gets.

    python benchmarks/architectures.py [TYPE ...]     # all, twenty minutes on one core; goes on where it was
    python benchmarks/architectures.py --write        # docs/evidence/architectures.md from what is there

In: model types. Out: a line of JSON for each in the work directory, and the document. Each type has a process
of its own, with a limit of time and memory, forked from this one after the imports. In it (`trial`):

1. A small random model is built and saved; LoRA on all its linear layers is made and saved by PEFT.
2. A user loads both, by `from_pretrained`, and merges with `safe_merge=True`. What of the trained tensors is not in the
   loaded model was dropped by PEFT.
3. The gate judges the same directories, and again with one NaN in the file.

Right is the gate that passes the healthy adapter if PEFT dropped nothing and merged it, and fails it otherwise; that
fails the one with NaN; and whose merged tensors have PEFT's bits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from tests.support.engine import architectures
from tests.support.engine.architecture_trials import Outcome, trial

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "evidence/architectures.md"
LIMIT_S = 90
LIMIT_BYTES = 6 << 30


def run(model_types: list[str], results: Path) -> None:
    """Try each type that has no line yet."""
    done = {outcome.model_type for outcome in read(results)}
    for number, model_type in enumerate(model_types, start=1):
        if model_type in done:
            continue
        outcome = in_process(model_type)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(f"{number}/{len(model_types)} {model_type}: {say(outcome)}, {outcome.seconds} s", flush=True)


def in_process(model_type: str) -> Outcome:
    """The trial in a process of its own: one that hangs, or takes all memory, costs its own type."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(LIMIT_S):
            return receiver.recv()
        return Outcome(model_type=model_type, reason=f"not done in {LIMIT_S} s", seconds=LIMIT_S)
    except EOFError:
        process.join()
        return Outcome(model_type=model_type, reason=f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def child(model_type: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    with tempfile.TemporaryDirectory() as work:
        try:
            sender.send(trial(model_type, Path(work)))
        except Exception as error:  # noqa: BLE001 - a mistake of the trial, or of the gate: its type shows it
            text = f"the trial ended with {type(error).__name__}: {error}"[:300]
            sender.send(Outcome(model_type=model_type, built=True, wrong=(text,)))


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("transformers", "peft", "torch", "merge-gate")}


def opened(results: Path) -> Path:
    """The results, begun if they are not there: the first line says with which versions.

    Raises:
        SystemExit: they were begun with other versions.
    """
    if not results.exists():
        head = {"date": datetime.now(UTC).date().isoformat(), **versions()}
        results.write_text(json.dumps(head) + "\n", encoding="utf-8")
    begun = head_of(results)
    if {**begun, **versions()} != begun:
        raise SystemExit(f"{results} was begun with {begun}, not {versions()}: move it away to begin anew")
    return results


def head_of(results: Path) -> dict[str, str]:
    with results.open(encoding="utf-8") as file:
        return json.loads(file.readline())


def read(results: Path) -> list[Outcome]:
    """The last line of each type counts."""
    lines = (json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()[1:])
    outcomes = (Outcome(**{key: tuple(v) if isinstance(v, list) else v for key, v in line.items()}) for line in lines)
    return sorted({one.model_type: one for one in outcomes}.values(), key=lambda one: one.model_type)


def say(outcome: Outcome) -> str:
    if not outcome.built:
        return f"not built: {outcome.reason}"
    return f"WRONG: {'; '.join(outcome.wrong)}" if outcome.wrong else f"right: {outcome.healthy}"


# --- docs/evidence/architectures.md ----------------------------------------------------------------------------------

TEXT = """# Architectures

Written by [benchmarks/architectures.py](../benchmarks/architectures.py), which says how; run it again after an update
of transformers or PEFT. {date}; transformers {transformers}, PEFT {peft}, torch {torch}, merge-gate {merge-gate}; on a
CPU.

Of the {types} model types of transformers that were tried, {built} could be built small and got LoRA on all linear
layers. Right is a gate that gives a healthy adapter the verdict that its user gets from PEFT, fails it with one NaN in
it, and merges every tensor to PEFT's bits. **Right: {right}. Wrong: {wrong}.**
{wrong_list}
## Adapters that PEFT does not load whole

PEFT renames the keys of a LoRA adapter by the renamings that transformers keeps for old checkpoints of the model type.
Some of them also match the names that PEFT itself saves, and what they make of those is nowhere in the model. PEFT
warns and goes on: these layers of the merged model are the base's. The gate fails such an adapter (`keys-missing`).

{dropped_table}

## Adapters that the gate fails for another reason

{failed_table}

## Built

| model type | class | tensors of the adapter | healthy | one NaN |
|---|---|---:|---|---|
{built_rows}

## Not built

{not_built} types have no model of their own (a configuration that is part of another), need a package that was not
there, or could not be made small enough without knowing more of them.

| model type | why |
|---|---|
{not_built_rows}
"""


def document(results: Path) -> str:
    outcomes = read(results)
    built = [one for one in outcomes if one.built]
    wrong = [one for one in built if one.wrong]
    failed = [one for one in built if not one.dropped and one.healthy != "passed"]
    others = [one for one in outcomes if not one.built]
    return TEXT.format(
        **head_of(results),
        types=len(outcomes),
        built=len(built),
        right=len(built) - len(wrong),
        wrong=len(wrong),
        wrong_list="".join(f"\n- `{one.model_type}`: {cell('; '.join(one.wrong))}" for one in wrong)
        + ("\n" if wrong else ""),
        dropped_table=table(
            ["model type", "tensors saved", "not loaded", "the first of them"],
            [[f"`{o.model_type}`", o.tensors, len(o.dropped), code(o.dropped[0])] for o in built if o.dropped],
        ),
        failed_table=table(
            ["model type", "class", "healthy", "for a user of PEFT"],
            [
                [f"`{o.model_type}`", f"`{o.model_class}`", o.healthy, cell(o.complaint or "loads and merges")]
                for o in failed
            ],
        ),
        built_rows=rows(
            [[f"`{o.model_type}`", f"`{o.model_class}`", o.tensors, word(o.healthy), word(o.one_nan)] for o in built]
        ),
        not_built=len(others),
        not_built_rows=rows([[f"`{o.model_type}`", cell(o.reason or "")] for o in others]),
    )


def table(head: list[str], lines: list[list[object]]) -> str:
    return rows([head, ["---"] * len(head), *lines]) if lines else "None."


def rows(lines: list[list[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`"


def word(verdict: str | None) -> str:
    """A verdict and its cause; the text of an accident is not ours."""
    return verdict if verdict and re.fullmatch(r"[a-z (-]+\)?", verdict) else cell(verdict or "")


def cell(text: str, most: int = 110) -> str:
    """Text that cannot end a cell or start markup."""
    plain = text.replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
    return code(plain if len(plain) <= most else f"{plain[:most]}…")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="these model types only")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "merge-gate-architectures.jsonl")
    parser.add_argument("--write", action="store_true", help="write docs/evidence/architectures.md, and run nothing")
    arguments = parser.parse_args()
    if arguments.write:
        DOCUMENT.write_text(document(arguments.results), encoding="utf-8")
    else:
        torch.set_num_threads(1)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        run(arguments.types or architectures.model_types(), opened(arguments.results))


if __name__ == "__main__":
    main()

"""Every architecture of the installed transformers: the gate beside what a user of PEFT gets.

    python benchmarks/architectures.py [TYPE ...]     # all, twenty minutes on one core; goes on where it was
    python benchmarks/architectures.py --write        # architectures.json and docs/evidence/truth.md from it

In: model types. Out: a line of JSON for each in the work directory, and with `--write` the data and the document.
Each type has a process of its own, with a limit of time and memory, forked from this one after the imports.
In it (`trial`):

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
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from tests.support.engine import architectures
from tests.support.engine.architecture_trials import Outcome, trial
from tests.support.generated import write_block

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "evidence/truth.md"
DATA = Path(__file__).resolve().parent / "architectures.json"
TIMEOUT_S = 90
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
        if receiver.poll(TIMEOUT_S):
            return receiver.recv()
        return Outcome(model_type=model_type, reason=f"not done in {TIMEOUT_S} s", seconds=TIMEOUT_S)
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


# --- benchmarks/architectures.json and docs/evidence/truth.md -------------------------------------------------------

TEXT = """{date}, transformers {transformers}, PEFT {peft}, torch {torch}, merge-gate {merge-gate}.

| model types | number |
|---|---:|
| tried | {types} |
| built small, with LoRA on all linear layers | {built} |
| the gate is right | {right} |
| the gate is wrong | {wrong} |
| healthy adapters that pass | {passed} |
{found_rows}| healthy adapters that fail | {failed} |
| not built | {not_built} |"""


def data(results: Path) -> dict[str, Any]:
    """What benchmarks/architectures.json stores: the date, the versions, and the answers by model type."""
    head = head_of(results)
    date = head.pop("date")
    return {"date": date, "versions": head, "types": {one.model_type: answer(one) for one in read(results)}}


def answer(outcome: Outcome) -> dict[str, Any]:
    if not outcome.built:
        return {"reason": outcome.reason}
    facts = {"class": outcome.model_class, "tensors": outcome.tensors}
    facts |= {"healthy": outcome.healthy, "one_nan": outcome.one_nan}
    facts |= {"findings": list(outcome.findings)} if outcome.findings else {}
    if outcome.dropped:
        facts |= {"not_loaded": len(outcome.dropped), "first_not_loaded": outcome.dropped[0]}
    elif outcome.complaint:
        facts["for_a_user_of_peft"] = outcome.complaint
    return facts | ({"wrong": list(outcome.wrong)} if outcome.wrong else {})


def stored(answers: dict[str, Any]) -> str:
    """The text of benchmarks/architectures.json: a line for each model type."""
    head = json.dumps({key: value for key, value in answers.items() if key != "types"}).removesuffix("}")
    types = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(facts, ensure_ascii=False)}" for name, facts in answers["types"].items()
    )
    return f'{head}, "types": {{\n{types}\n}}}}\n'


def document(answers: dict[str, Any]) -> str:
    """The block of the page, from what benchmarks/architectures.json stores."""
    types: dict[str, dict[str, Any]] = answers["types"]
    built = {name: facts for name, facts in types.items() if "class" in facts}
    wrong = [name for name, facts in built.items() if "wrong" in facts]
    failed = {name: facts for name, facts in built.items() if facts["healthy"] != "passed"}
    found = Counter(check for facts in built.values() for check in facts.get("findings", ()))
    return TEXT.format(
        date=answers["date"],
        **answers["versions"],
        types=len(types),
        built=len(built),
        right=len(built) - len(wrong),
        wrong=len(wrong),
        passed=len(built) - len(failed),
        found_rows="".join(f"| of these, with a finding of `{check}` | {found[check]} |\n" for check in sorted(found)),
        failed=len(failed),
        not_built=len(types) - len(built),
    )


def rows(lines: list[list[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    command(__doc__, "architectures", DATA, read=data, write=document, sweep=run)


def command(
    page: str,
    block: str,
    stored_at: Path,
    *,
    read: Callable[[Path], dict[str, Any]],
    write: Callable[[dict[str, Any]], str],
    sweep: Callable[[list[str], Path], None],
) -> None:
    """The command line of a sweep over model types: it runs, or writes its data and its block of the page."""
    parser = argparse.ArgumentParser(description=page.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="these model types only")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / f"merge-gate-{block}.jsonl")
    parser.add_argument("--write", action="store_true", help="write the data and the page, and run nothing")
    arguments = parser.parse_args()
    if arguments.write:
        if arguments.results.exists():
            stored_at.write_text(stored(read(arguments.results)), encoding="utf-8")
        write_block(DOCUMENT, block, write(json.loads(stored_at.read_text(encoding="utf-8"))))
    else:
        torch.set_num_threads(1)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        sweep(arguments.types or architectures.model_types(), opened(arguments.results))


if __name__ == "__main__":
    main()

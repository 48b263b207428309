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
import copy
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from merge_gate.files.preflight import preflight
from merge_gate.records.terms import Verdict
from tests.support import methods
from tests.support.engine import architectures
from tests.support.engine.architectures import Architecture
from tests.support.engine.merges import NOT_RUN, merge_adapter
from tests.support.gating import Gate, Judgement
from tests.support.generated import write_block
from tests.support.merged import kept

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "evidence/truth.md"
DATA = Path(__file__).resolve().parent / "architectures.json"
TIMEOUT_S = 90
LIMIT_BYTES = 6 << 30


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a user of PEFT ends with: tensors by name, before and after, or why there are none; and what is not right.

    `dropped` are tensors of the file that did not arrive with their values, `broken` merged ones that are not finite,
    `tied` targets whose weight another module holds as well, `other` targets that compute another thing once they are
    merged, `lost` targets of which no tensor was changed.
    """

    before: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    raised: str | None = None

    @property
    def complaint(self) -> str | None:
        """The first thing that is not right, or None."""
        if self.raised is not None:
            return self.raised
        words = {
            "tensors dropped": self.dropped,
            "tensors not finite": self.broken,
            "targets tied": self.tied,
            "targets not changed": self.lost,
            "targets merged into another layer": self.other,
        }
        return next((f"{len(names)} {word}" for word, names in words.items() if names), None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out for one type. `wrong` is empty where the gate agrees with the user's way in everything.

    `findings` are the checks with a finding for the healthy adapter, if it passed.
    """

    model_type: str
    built: bool = False
    reason: str | None = None
    model_class: str | None = None
    parameters: int = 0
    tensors: int = 0
    dropped: tuple[str, ...] = ()
    complaint: str | None = None
    healthy: str | None = None
    findings: tuple[str, ...] = ()
    one_nan: str | None = None
    wrong: tuple[str, ...] = ()
    seconds: float = 0.0


def trial(model_type: str, work: Path) -> Outcome:
    """Build, adapt, merge both ways, compare."""
    started = time.perf_counter()
    base, adapter = work / "base", work / "adapter"
    try:
        architecture = architectures.build(model_type, base)
        trained = architectures.save_lora(architecture, base, adapter)
    except Exception as error:  # noqa: BLE001 - whatever transformers or PEFT raise: there is nothing to gate
        return Outcome(model_type=model_type, reason=sentence(error), seconds=_since(started))
    user = user_merge(architecture, base, adapter, trained)
    gate = Gate()
    healthy = judged(gate, base, adapter)
    wrong = list(disagreements(user, healthy))
    if not user.complaint and healthy.verdict is Verdict.PASSED:
        wrong += different_bits(user, gate_merge(gate, base, adapter))
    one_nan = judged(gate, base, with_nan(adapter, work / "nan"))
    if one_nan.verdict is not Verdict.FAILED:
        wrong.append(f"one NaN: {one_nan.verdict}")
    return Outcome(
        model_type=model_type,
        built=True,
        model_class=architecture.model_class.__name__,
        parameters=architecture.parameters,
        tensors=len(trained),
        dropped=user.dropped,
        complaint=user.complaint,
        healthy=word(healthy),
        findings=tuple(sorted({one.check for one in healthy.findings} if healthy.verdict is Verdict.PASSED else ())),
        one_nan=word(one_nan),
        wrong=tuple(wrong),
        seconds=_since(started),
    )


# --- the user's way ------------------------------------------------------------------------------------------------


def user_merge(architecture: Architecture, base: Path, adapter: Path, trained: dict[str, Tensor]) -> Merged:
    """Load and merge by transformers and PEFT."""
    try:
        model = architectures.load(architecture, base)
        before = {name: tensor.clone() for name, tensor in methods.values(model).items()}
        with methods.quiet():
            peft_model = PeftModel.from_pretrained(model, adapter)
        dropped, tied, targets = _dropped(peft_model, trained), _tied(peft_model), _targets(peft_model)
        other = _merged_otherwise(peft_model)
        with methods.quiet():
            merged = peft_model.merge_and_unload(safe_merge=True)
    except Exception as error:  # noqa: BLE001 - whatever PEFT raises is what its user sees
        return Merged(raised=sentence(error))
    tensors = methods.values(merged)
    changed = {name for name in before if name in tensors and not methods.same_tensor(before[name], tensors[name])}
    lost = tuple(one for one in targets if not any(name.startswith(f"{one}.") for name in changed))
    return Merged(
        before=before,
        tensors=tensors,
        dropped=dropped,
        broken=_broken(merged, tensors),
        tied=tied,
        other=other,
        lost=lost,
    )


def _merged_otherwise(model: nn.Module) -> tuple[str, ...]:
    """Convolutions in two dimensions that are a class of their own, where this is so."""
    found = []
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and isinstance(base := layer.get_base_layer(), nn.Conv2d):
            if type(base).forward is nn.Conv2d.forward:
                continue
            one: Any = copy.deepcopy(layer).float().eval()
            with torch.no_grad():
                unmerged = one(torch.linspace(-1, 1, base.in_channels * 400).reshape(1, -1, 20, 20))
                one.merge()
                merged = one(torch.linspace(-1, 1, base.in_channels * 400).reshape(1, -1, 20, 20))
            if float((merged - unmerged).norm() / unmerged.norm()) > 1e-3:
                found.append(path)
    return tuple(found)


def _dropped(model: nn.Module, trained: dict[str, Tensor]) -> tuple[str, ...]:
    arrived = dict(model.named_parameters(remove_duplicate=False))
    return tuple(
        name for name, value in trained.items() if name not in arrived or not torch.equal(arrived[name], value)
    )


def _targets(model: nn.Module) -> tuple[str, ...]:
    """Names in the base; a wrapper inside another one stands for the same module."""
    paths = [path for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    return tuple(path.removeprefix("base_model.model.") for path in paths if not path.endswith(".base_layer"))


def _tied(model: nn.Module) -> tuple[str, ...]:
    """Targets whose weight another module holds as well: the merge changes that one too, which was not trained so."""
    holders = Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))
    layers = [
        (name, module.get_base_layer()) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    return tuple(name for name, layer in layers if hasattr(layer, "weight") and holders[id(layer.weight)] > 1)


def _broken(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """NaN and Inf; but some models mean "no limit" by an infinite buffer."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return tuple(name for name in methods.nonfinite(tensors) if name not in buffers or torch.isnan(tensors[name]).any())


def with_nan(adapter: Path, directory: Path, name: str | None = None) -> Path:
    """The adapter with one NaN, in the middle of that tensor, or else of the middle lora_B."""
    state = methods.load_file(adapter / methods.WEIGHTS)
    factors = [one for one in sorted(state) if ".lora_B." in one]
    broken = state[name or factors[len(factors) // 2]]
    broken.view(-1)[broken.numel() // 2] = torch.nan
    return methods.write_variant(adapter, directory, state)


# --- the gate's way ------------------------------------------------------------------------------------------------


def judged(gate: Gate, base: Path, adapter: Path, dtype: str = "auto") -> Judgement:
    torch.manual_seed(0)  # as `architectures.load`
    try:
        return gate.judge(adapter, base, dtype=dtype)
    except Exception as error:  # noqa: BLE001 - as the worker does: the adapter is undecided
        return Judgement(verdict=Verdict.ERROR, cause=sentence(error), findings=(), evidence=None)


def gate_merge(gate: Gate, base: Path, adapter: Path) -> dict[str, Tensor]:
    """The merged tensors of the gate, by the base's names. The base is loaded by now."""
    files = preflight(str(adapter), allow_pickle=False)
    with kept() as found:
        merge_adapter(gate.base(base, files, dtype="auto"), files, no_forward=NOT_RUN)
    return found


# --- the comparison ------------------------------------------------------------------------------------------------


def disagreements(user: Merged, gate: Judgement) -> tuple[str, ...]:
    expected = Verdict.FAILED if user.complaint else Verdict.PASSED
    if gate.verdict is expected:
        return ()
    return (f"healthy: {word(gate)}, and for a user of PEFT: {user.complaint or 'loads and merges'}",)


def different_bits(user: Merged, gate: dict[str, Tensor]) -> tuple[str, ...]:
    """Tensors that the gate merged to other bits than PEFT, and those that PEFT changed and the gate did not merge."""
    places = {user.tensors[name].data_ptr() for name in gate if name in user.tensors}
    same = methods.same_tensor
    found = [name for name, tensor in gate.items() if name not in user.tensors or not same(user.tensors[name], tensor)]
    found += [
        name
        for name, tensor in user.tensors.items()
        if name in user.before and tensor.data_ptr() not in places and not same(user.before[name], tensor)
    ]
    return (f"bits of {len(found)} tensors: {', '.join(found[:3])}",) if found else ()


def word(judgement: Judgement) -> str:
    return f"{judgement.verdict} ({judgement.cause})" if judgement.cause else str(judgement.verdict)


def sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text if type(error).__name__ in text else f"{type(error).__name__}: {text}"


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)


# --- the sweep -------------------------------------------------------------------------------------------------------


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

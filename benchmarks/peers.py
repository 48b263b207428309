"""Compares the gate with similar tools on the same cases, and writes the tables of docs/evidence/peers.md.

    python benchmarks/peers.py --work DIR [CASE ...]     # all: half an hour on two cores; goes on where it was
    python benchmarks/peers.py --work DIR --write        # peers.json and docs/evidence/peers.md from what is there

In: the cases of tests/support/faults.py. Out: a line of JSON for each case in DIR, with what each tool said. Each peer
has a venv of its own in DIR. What each is given is what its documentation asks for:

- merge-gate: one configuration with all cases, `merge-gate run`.
- safe_merge: `from_pretrained` of base and adapter, `merge_and_unload(safe_merge=True)`, in the case's dtype.
- deltalint: base, adapter and the merge, saved in the case's dtype. The merge is PEFT's by `safe_merge=True`, and where
  that refuses, by `safe_merge=False`: this is the tool that looks at a merge which exists.
- adaptersentry: the weights, with `--fail-on review`.

Caught is a broken adapter with an exit code other than 0, or an exception of PEFT. A tool that says it cannot tell has
not caught it (deltalint's exit codes 2 and 3); nor has one that was never asked. A traceback with exit code 1 is caught
too, and said. Peers are asked through the entry point of their command, in one process for all cases.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft import PeftModel
from transformers.utils import logging

from tests.support import faults
from tests.support.all_faults import FAULTS, HEALTHY
from tests.support.cases import lay_out, top_settings, write_config_file
from tests.support.faults import Case
from tests.support.models import VARIANTS, Shelf, load_for_training, read_config

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "evidence/peers.md"
RESULTS = HERE / "peers.json"
PEERS = {"deltalint": ["deltalint==0.1.0", "numpy"], "adaptersentry": ["adaptersentry==2.0.2"]}
ASK = """
import contextlib, importlib.metadata, io, json, sys, traceback
(entry,) = importlib.metadata.entry_points(group="console_scripts", name=sys.argv[1])
main = entry.load()
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = json.loads(line)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
            code = 1
    print("\\nanswer " + json.dumps([code or 0, out.getvalue(), err.getvalue()]), flush=True)
"""
TOOLS = ("merge-gate", "safe_merge", "deltalint", "adaptersentry")
GROUPS = {
    "NaN or Inf in the file": faults.nonfinite_adapters(),
    "overflow in float16 only": faults.overflows(),
    "tensors missing from the file": faults.incomplete_files(),
    "tensors that land nowhere": faults.unused_tensors(),
    "wrong shapes": faults.wrong_shapes(),
    "wrong or unsafe config": faults.wrong_configs(),
    "broken files": faults.broken_files(),
    "a broken base": faults.broken_bases(),
    "a merge without effect, tied weights": faults.vain_merges(),
    "not what was reviewed (`expect`)": faults.broken_promises(),
}
"""The groups of tests/support/faults.py."""
CANNOT_TELL = {"deltalint": (2, 3)}
NOT_TOLD = {"expectation-failed", "base-mismatch"}
"""Causes that only the gate's configuration can have."""
TEXT_LIMIT = 160
TIMEOUT_S = 300


@dataclass(frozen=True)
class Said:
    """What one tool made of one case. `code` None: it was not asked, for the reason in `text`."""

    code: int | None
    text: str
    named: bool = False
    traceback: bool = False


# --- each tool -------------------------------------------------------------------------------------------------------


def install(work: Path) -> dict[str, str]:
    """The peers, each in its venv; by name, its version, or why it could not be installed."""
    found = {}
    for name, packages in PEERS.items():
        home = work / "venvs" / name
        if not (home / "bin" / name).exists():
            venv.create(home, with_pip=True, clear=True)
            done = call([home / "bin" / "pip", "install", "-q", *packages])
            if done.returncode:
                found[name] = f"could not be installed: {done.stderr.strip().splitlines()[-1]}"
                continue
        listed = call([home / "bin" / "pip", "show", name]).stdout
        found[name] = re.search(r"^Version: (.+)$", listed, re.MULTILINE)[1]
    return found


def call(command: list[object]) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=clean())


def clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


class Peer:
    """A peer's command, as often as it is wanted."""

    def __init__(self, work: Path, name: str) -> None:
        self.name = name
        python = work / "venvs" / name / "bin" / "python"
        self.process = subprocess.Popen(
            [python, "-c", ASK, name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean(),
        )  # fmt: skip

    def ask(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [self.name, *(str(word) for word in words)]
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = next(line for line in self.process.stdout if line.startswith("answer "))
        code, out, err = json.loads(line.removeprefix("answer "))
        return subprocess.CompletedProcess(command, code, out, err)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def gate(work: Path, shelf: Shelf, cases: list[Case]) -> dict[str, Said]:
    """One run of the command for each group of settings that hold for a whole file."""
    said = {}
    root = work / "cases"
    for number, (top, members) in enumerate(groupby(sorted(cases, key=top_settings), key=top_settings)):
        chosen = list(members)
        config = write_config_file(shelf, root, number, dict(top), chosen)
        output = work / f"gate-{number}"
        command = [sys.executable, "-m", "merge_gate", "run", config, "--output", output, "--device", "cpu"]
        if not (output / "report.json").exists():
            subprocess.run([str(word) for word in command], capture_output=True, check=False)
        by_name = {case.name: case for case in chosen}
        for adapter in json.loads((output / "report.json").read_text(encoding="utf-8"))["adapters"]:
            findings = [f for f in adapter["findings"] if f["severity"] == "error"]
            text = " ".join(f"{f['check']}: {f['message']} {f['tensor']} {f['module']}" for f in findings)
            code = {"passed": 0, "failed": 1, "error": 3}[adapter["verdict"]]
            said[adapter["name"]] = Said(code, text[:TEXT_LIMIT], names(by_name[adapter["name"]], text))
    return said


def safe_merge(case: Case, base: Path, adapter: Path, into: Path) -> Said:
    """PEFT's own check. The merge is left in `into`, with its base beside it, for those that look at merges."""
    shutil.rmtree(into, ignore_errors=True)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            merge(case, base, adapter, into, safe=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, a user sees it as that
        shutil.rmtree(into, ignore_errors=True)
        text = f"{type(error).__name__}: {error}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                merge(case, base, adapter, into, safe=False)
        except Exception:  # noqa: BLE001 - there is no merge then
            shutil.rmtree(into, ignore_errors=True)
        return Said(1, text[:TEXT_LIMIT], names(case, text))
    text = " ".join(str(warning.message) for warning in heard if "adapter keys" in str(warning.message))
    return Said(0, f"warning: {text[:TEXT_LIMIT]}" if text else "")


def merge(case: Case, base: Path, adapter: Path, into: Path, *, safe: bool) -> None:
    settings = {} if case.dtype == "auto" else {"dtype": case.dtype}
    if case.variant == "six-labels":
        settings["num_labels"] = 6
    model = load_for_training(base, read_config(adapter).get("task_type"), **settings)
    model.save_pretrained(into / "base")
    if case.variant.startswith("resized"):
        model.resize_token_embeddings(VARIANTS[case.variant].save["rows"], mean_resizing=False)
    PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe).save_pretrained(into / "merged")


def deltalint(peer: Peer, case: Case, adapter: Path, merged: Path) -> Said:
    if not (merged / "merged").exists():
        return Said(None, "PEFT makes no merge of it")
    done = peer.ask("check", "--base", merged / "base", "--adapter", adapter, "--merged", merged / "merged", "--json")
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return crashed(case, done)
    bad = [layer for layer in report["layers"] if layer["verdict"] != "PASS"]
    text = " ".join([*report["missing_layers"], *(f"{b['name']} {b['verdict']} {b['diagnosis']}" for b in bad)])
    return Said(done.returncode, f"{report['verdict']}: {text[:TEXT_LIMIT]}", names(case, text))


def adaptersentry(peer: Peer, case: Case, adapter: Path) -> Said:
    if case.top or case.cause in {"base-nonfinite", *NOT_TOLD}:
        return Said(None, "it is not told of that")
    weights = adapter / "adapter_model.safetensors"
    done = peer.ask("scan", weights, "--format", "json", "--fail-on", "review")
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return crashed(case, done)
    text = json.dumps([report["verdict"], report["coverage"]])
    reasons = "; ".join(reason["code"] for reason in report["verdict"]["reasons"])
    return Said(done.returncode, f"{report['verdict']['action']}: {reasons}"[:TEXT_LIMIT], names(case, text))


def crashed(case: Case, done: subprocess.CompletedProcess[str]) -> Said:
    lines = done.stderr.strip().splitlines() or [""]
    return Said(done.returncode, lines[-1][:TEXT_LIMIT], names(case, done.stderr), "Traceback" in done.stderr)


def names(case: Case, text: str) -> bool:
    """Whether the module of the tensor that was broken is in what was said."""
    module = re.sub(r"\.?(lora_\w*|weight|bias|tokens_delta|modules_to_save)(\.\w+)*$", "", case.tensor or "")
    return bool(module) and module in text


# --- all cases -------------------------------------------------------------------------------------------------------


def run(work: Path, cases: list[Case]) -> None:
    """Ask each tool about each case that has no line yet."""
    logging.disable_progress_bar()
    shelf = Shelf(work / "shelf")
    (work / "cases").mkdir(parents=True, exist_ok=True)
    for case in cases:
        if not (work / "cases" / case.name).exists():
            lay_out(case, shelf, work / "cases" / case.name)
    by_gate = gate(work, shelf, cases)
    done = read(work)
    peers = {name: Peer(work, name) for name in PEERS}
    for number, case in enumerate(cases, start=1):
        if case.name in done:
            continue
        adapter, merged = work / "cases" / case.name, work / "merges" / case.name
        base = shelf.base(case.base or VARIANTS[case.variant].base)
        said = {"merge-gate": by_gate[case.name]}
        if case.cause in NOT_TOLD:
            said["safe_merge"] = said["deltalint"] = Said(None, "it is not told of that")
        else:
            said["safe_merge"] = safe_merge(case, base, adapter, merged)
            said["deltalint"] = deltalint(peers["deltalint"], case, adapter, merged)
        said["adaptersentry"] = adaptersentry(peers["adaptersentry"], case, adapter)
        shutil.rmtree(merged, ignore_errors=True)
        line = {"case": case.name} | {tool: asdict(answer) for tool, answer in said.items()}
        with (work / "answers.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(number, len(cases), case.name, {tool: answer.code for tool, answer in said.items()}, flush=True)
    for peer in peers.values():
        peer.end()


def told(results: Path = RESULTS) -> dict[str, dict[str, Said]]:
    """What is kept in the repository."""
    answers = json.loads(results.read_text(encoding="utf-8"))["answers"]
    return {case: {tool: Said(**said[tool]) for tool in TOOLS} for case, said in answers.items()}


def read(work: Path) -> dict[str, dict[str, Said]]:
    path = work / "answers.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {line["case"]: {tool: Said(**line[tool]) for tool in TOOLS} for line in lines}


# --- the page --------------------------------------------------------------------------------------------------------


def tables(answers: dict[str, dict[str, Said]]) -> str:
    """Broken adapters that were caught, by group; and healthy ones that were failed."""
    rows = ["| broken | cases | " + " | ".join(TOOLS) + " |", "|---|---|" + "---|" * len(TOOLS)]
    for label, cases in GROUPS.items():
        known = [case for case in cases if case.name in answers]
        rows.append(f"| {label} | {len(known)} | " + " | ".join(caught(known, t, answers) for t in TOOLS) + " |")
    rows += ["", "| healthy | cases | " + " | ".join(TOOLS) + " |", "|---|---|" + "---|" * len(TOOLS)]
    known = [case for case in HEALTHY if case.name in answers]
    rows.append(
        f"| failed although good | {len(known)} | " + " | ".join(failed(known, t, answers) for t in TOOLS) + " |"
    )
    return "\n".join(rows)


def caught(cases: list[Case], tool: str, answers: dict[str, dict[str, Said]]) -> str:
    said = [answers[case.name][tool] for case in cases]
    asked = [answer for answer in said if answer.code is not None]
    if not asked:
        return "not asked"
    cannot = [answer for answer in asked if answer.code in CANNOT_TELL.get(tool, ())]
    found = [answer for answer in asked if answer.code and answer not in cannot]
    parts = [f"**{len(found)}**" + (f" of {len(asked)}" if len(asked) < len(cases) else "")]
    with_name = sum(answers[case.name][tool].named for case in cases if answers[case.name][tool] in found)
    possible = sum(names(case, case.tensor or "") for case in cases)
    if possible and found:
        parts.append(f"{with_name} of {possible} named")
    warned = sum(answer.code == 0 and answer.text.startswith("warning") for answer in asked)
    crashes = sum(answer.traceback for answer in found)
    counts = {"cannot tell": len(cannot), "warned": warned, "by a traceback": crashes}
    return ", ".join([*parts, *(f"{number} {what}" for what, number in counts.items() if number)])


def failed(cases: list[Case], tool: str, answers: dict[str, dict[str, Said]]) -> str:
    said = [answers[case.name][tool] for case in cases if answers[case.name][tool].code is not None]
    cannot = sum(answer.code in CANNOT_TELL.get(tool, ()) for answer in said)
    number = sum(bool(answer.code) for answer in said) - cannot
    return (
        f"**{number}**"
        + (f" of {len(said)}" if len(said) < len(cases) else "")
        + (f", {cannot} cannot tell" if cannot else "")
    )


def write(work: Path, found: dict[str, str]) -> None:
    """What each tool said, as it is; and the tables made of it."""
    answers = read(work)
    versions = {name: version(name) for name in ("merge-gate", "peft", "transformers", "torch")} | found
    kept = {"date": datetime.now(UTC).date().isoformat(), "versions": versions}
    kept["answers"] = {case: {t: asdict(said[t]) for t in TOOLS} for case, said in answers.items()}
    lines = ",\n".join(f"  {json.dumps(case)}: {json.dumps(said)}" for case, said in kept.pop("answers").items())
    text = json.dumps(kept, indent=1)[:-2] + f',\n "answers": {{\n{lines}\n }}\n}}'
    RESULTS.write_text(text.replace(str(work.resolve()), "WORK") + "\n", encoding="utf-8")
    page = DOCUMENT.read_text(encoding="utf-8")
    made = re.sub(
        r"(<!-- peers\b[^>]*-->\n).*?(\n<!-- /peers -->)",
        lambda match: match[1] + tables(answers) + match[2],
        page,
        flags=re.DOTALL,
    )
    DOCUMENT.write_text(made, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args()
    found = install(options.work.resolve())
    if options.write:
        write(options.work.resolve(), found)
        return
    known = (*FAULTS, *HEALTHY)
    run(options.work.resolve(), [case for case in known if not options.cases or case.name in options.cases])


if __name__ == "__main__":
    main()

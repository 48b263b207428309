"""The exit code set against the report: what the step may say.

In: the gate's exit code, its last words, the directory of its report. Out: an `Outcome`. The result is `pass` or
`fail` only where exit code and finished report agree, and the report with itself; everything else is `error`. A report
comes out of a container: nothing in it is taken on trust.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_gate.action.docker import collect
from merge_gate.errors import ExitCode, GateError
from merge_gate.regular_file import read_regular_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_KINDS: dict[str, Any] = {"schema_version": str, "complete": bool, "result": str, "counts": dict, "adapters": list}
_ADAPTER_KINDS: dict[str, Any] = {
    "name": str, "verdict": str, "cause": (str, type(None)), "findings": list, "line": int, "column": int,
}  # fmt: skip
_FINDING_KINDS: dict[str, Any] = {
    "check": str, "severity": str, "message": str, "hint": (str, type(None)), "tensor": (str, type(None)),
}  # fmt: skip
_VERDICTS = ("passed", "failed", "error")


@dataclass(frozen=True)
class StepOutcome:
    """What the step says. `problem` is why there is no verdict, empty where there is one."""

    result: str
    report: Mapping[str, Any] | None = None
    problem: str = ""


def settle(code: int, path: Path, said: Sequence[str] = (), refused: Sequence[str] = ()) -> StepOutcome:
    """Set the exit code against the report. `pass` and `fail` need both to say so, and the report to be finished.

    `said` are the gate's last words: where there is no report, they are all that tells why. `refused` are files of the
    report that were not what they should be: somebody else wrote there too, so that nothing there is a verdict.
    """
    report, trouble = read_report(path)
    if refused:
        return StepOutcome("error", report, "\n".join(["there is no verdict: the report was tampered with", *refused]))
    if report is None:
        return StepOutcome("error", problem="\n".join([f"the gate ended with exit code {code} and {trouble}", *said]))
    if report["complete"] and (code, report["result"]) in {(ExitCode.PASS, "pass"), (ExitCode.FAIL, "fail")}:
        return StepOutcome(report["result"], report)
    if report["complete"] and (code, report["result"]) == (ExitCode.ERROR, "error"):
        return StepOutcome("error", report)
    finished = "finished" if report["complete"] else "unfinished"
    return StepOutcome(
        "error",
        report,
        f"there is no verdict: the gate ended with exit code {code}, and its report is {finished} and says "
        f"{report['result']!r}",
    )


def broken_off(error: GateError, path: Path) -> StepOutcome:
    """The outcome of a run that ended by an error: what was judged before it is true."""
    return StepOutcome("error", read_report(path)[0], in_words(error))


def in_words(error: GateError) -> str:
    """An error and its hint."""
    return error.message + (f"\nWhat to do: {error.hint}" if error.hint else "")


def read_report(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the report, or why there is none that can be used."""
    try:
        report = json.loads(read_regular_file(path, collect.LIMITS_BYTES["report.json"]))
    except FileNotFoundError:
        return None, "wrote no report"
    except RecursionError:
        return None, "wrote a report that cannot be read (it is nested too deeply)"
    except (OSError, ValueError) as error:
        return None, f"wrote a report that cannot be read ({type(error).__name__}: {error})"
    trouble = _trouble(report)
    return (None, trouble) if trouble else (report, "")


def _trouble(report: Any) -> str:
    if not _is_known(report):
        return "wrote a report that this version of the action does not know"
    if report["complete"] and not report["adapters"] and not _is_empty_shard(report):
        return "judged nothing"
    contradiction = _contradiction(report)
    return f"wrote a report that contradicts itself: {contradiction}" if contradiction else ""


def _is_empty_shard(report: Mapping[str, Any]) -> bool:
    """Tell whether this part of a larger run has no adapters; the run's verdict comes from the combination."""
    shard = report.get("shard")
    if not isinstance(shard, dict) or not _has(shard, {"entries": int, "positions": list}):
        return False
    return shard["entries"] > 0 and not shard["positions"]


def _is_known(report: object) -> bool:
    """Tell whether a report has what is read of it here."""
    if not _has(report, _KINDS) or not isinstance(report, dict):
        return False
    adapters = report["adapters"]
    return (
        report["schema_version"].startswith("1.")
        and report["result"] in {"pass", "fail", "error"}
        and all(_has(adapter, _ADAPTER_KINDS) and adapter["verdict"] in _VERDICTS for adapter in adapters)
        and all(_has(finding, _FINDING_KINDS) for adapter in adapters for finding in adapter["findings"])
    )


def _has(value: object, kinds: Mapping[str, Any]) -> bool:
    return isinstance(value, dict) and all(name in value and isinstance(value[name], kinds[name]) for name in kinds)


def _contradiction(report: Mapping[str, Any]) -> str:
    """Say where counts or result do not follow from the adapters; an unfinished report says `error` in any case."""
    verdicts = Counter(adapter["verdict"] for adapter in report["adapters"])
    accepted = sum(bool(one.get("accepted")) for one in report["adapters"] if one["verdict"] == "failed")
    counts = {verdict: verdicts[verdict] for verdict in _VERDICTS}
    if report["counts"] != counts:
        return f"its counts are {json.dumps(report['counts'])[:200]}, and its adapters are {json.dumps(counts)}"
    if report.get("accepted", 0) != accepted:
        return f"it says that {json.dumps(report['accepted'])[:200]} are accepted, and of its adapters {accepted} are"
    follows = "fail" if counts["failed"] > accepted else "error" if counts["error"] else "pass"
    if report["complete"] and report["result"] != follows:
        return f"its result is {report['result']!r}, and its adapters make it {follows!r}"
    return ""

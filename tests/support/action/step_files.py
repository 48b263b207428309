"""What a step gets and leaves: its inputs, and a report.json as a container leaves it."""

import json

FINDING = {"check": "adapter-nonfinite", "severity": "error", "message": "1 NaN", "hint": "", "tensor": None}


def entry_of(verdict: str) -> dict:
    """The adapter of such a report. One that has not passed has a cause."""
    cause = {} if verdict == "passed" else {"cause": FINDING["check"], "findings": [FINDING]}
    return {"name": "a", "verdict": verdict, "cause": None, "findings": [], "line": 1, "column": 1, **cause}


def report(result: str = "pass", *, complete: bool = True, adapters: int = 1, **changed: object) -> dict:
    verdict = {"pass": "passed", "fail": "failed", "error": "error"}[result]
    entry = entry_of(verdict)
    counts = {"passed": 0, "failed": 0, "error": 0, verdict: adapters}
    return {
        "schema_version": "1.0",
        "complete": complete,
        "result": result,
        "counts": counts,
        "adapters": [entry] * adapters,
        **changed,
    }


def changed(change) -> dict:
    """A finished report of one failed adapter, changed."""
    made = json.loads(json.dumps(report("fail")))
    change(made)
    return made


def asked(environ: dict[str, str], **inputs: str) -> dict[str, str]:
    """The environment of a step with these inputs."""
    given = {"config": "gate.yml", **inputs}
    return {**environ, **{f"MERGE_GATE_INPUT_{name.upper()}": value for name, value in given.items()}}

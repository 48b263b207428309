"""`GateCallback`: gates the adapter of a finished training run of transformers' Trainer.

In: the trainer's model at the end of the training. Out: the saved adapter and its report, in the trainer's output
directory, and an error if the adapter did not pass.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from merge_gate._internal.errors import GateError, UsageError
from merge_gate._internal.text import quoted
from merge_gate.api import gate, refuse_options
from merge_gate.report.wording import run_result, words
from merge_gate.report.wording.untrusted import one_line

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from merge_gate.records.report import Report

FOLDER = "merge-gate"
"""The folder in the trainer's output directory, for the adapter and the report."""

_log = logging.getLogger("merge_gate")


class AdapterNotPassedError(GateError):
    """The trained adapter failed, or could not be judged; `report` says why."""

    def __init__(self, report: Report, page: Path) -> None:
        worst = words.worst_first(report.adapters)[0]
        finding = words.deciding(worst)
        message, hint = (finding.message, finding.hint) if finding else (run_result.headline(report), "")
        place = words.place(finding) if finding else ""
        where = f" in {place}" if place else f": {one_line(message, words.MESSAGE_LENGTH)}"
        super().__init__(words.cause(worst) + where, hint=one_line(hint, words.MESSAGE_LENGTH))
        self.report = report
        self.page = page

    def __str__(self) -> str:
        return f"{super().__str__()}; report: {self.page}"


class GateCallback(TrainerCallback):  # type: ignore[misc] # transformers is skipped by mypy
    """Saves and gates the adapter when the training ends.

    The adapter is merged on the CPU by default, because the training still holds the GPU's memory.

    Args:
        on_failure: `raise` raises `AdapterNotPassedError`, `log` logs an error.
        options: arguments of `merge_gate.gate`, such as `base`, `dtypes`, `checks` and `device`, but not `output`.

    With `log`, no error of the gate ends the training's program.

    Raises:
        TypeError: an argument that `merge_gate.gate` does not have.
        UsageError: the value of an argument is wrong. This is known before the training.

    Attributes:
        report: the report of the last training; None before its end, and on other processes than the first.
    """

    def __init__(self, *, on_failure: Literal["raise", "log"] = "raise", **options: Any) -> None:
        if on_failure not in ("raise", "log"):
            raise UsageError(f"on_failure is {quoted(str(on_failure))}, expected raise or log")
        self._on_failure = on_failure
        self._options = {"device": "cpu"} | options
        refuse_options(output=FOLDER, **self._options)
        self.report: Report | None = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, _: TrainerControl, model: Any = None, **__: Any
    ) -> None:
        """Save the adapter, gate it, and raise or log if it did not pass.

        Raises:
            AdapterNotPassedError: the adapter failed or could not be judged.
            GateError: the model has no adapter, its weights are sharded, or an option is wrong.
        """
        if not state.is_world_process_zero:
            return
        try:
            self._gate(args, model)
        except (GateError, OSError) as error:
            if self._on_failure == "raise":
                raise
            _log.error("%s", error)

    def _gate(self, args: TrainingArguments, model: Any) -> None:
        place, self.report = Path(args.output_dir, FOLDER), None
        output = place / "report"
        adapter = _saved(model, args, place / "adapter" / (Path(args.output_dir).resolve().name or "adapter"))
        self.report = gate(adapter, output=output, **self._options)
        page = output / "report.html"
        if not self.report.passed:
            raise AdapterNotPassedError(self.report, page)
        _log.info("%s: %s", run_result.headline(self.report), page)


def _saved(model: Any, args: TrainingArguments, directory: Path) -> Path:
    """Save the active adapter, and return its directory: PEFT adds a folder for a name other than `default`."""
    from peft import PeftModel  # noqa: PLC0415 - a trainer without PEFT gets a sentence

    if not isinstance(model, PeftModel):
        raise GateError(
            f"the trained model is a {type(model).__name__}, expected a PeftModel with an adapter",
            hint="wrap the model with peft.get_peft_model, or remove GateCallback",
        )
    if args.deepspeed or args.fsdp:
        raise GateError(
            "the weights of the trained model are sharded (DeepSpeed or FSDP), so its adapter cannot be saved here",
            hint="save it with trainer.save_model(), then call merge_gate.gate on the directory",
        )
    name = str(model.active_adapter)
    model.save_pretrained(os.fspath(directory), selected_adapters=[name])
    return directory if name == "default" else directory / name

"""`GateCallback` at the end of a real training run of a tiny model."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from merge_gate import GateError, UsageError, Verdict
from merge_gate.demo import VOCABULARY, make_demo
from merge_gate.integrations.transformers import AdapterNotPassedError, GateCallback
from merge_gate.records.terms import Finding, Origin, Severity
from tests.support.reports import PASS, adapter, report
from tests.support.tried import tried
from tests.support.wording import Wording

pytestmark = pytest.mark.filterwarnings("default")  # transformers and PEFT warn each other's users while they train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("training") / "demo"
    make_demo(str(directory))
    return directory / "base"


def trainer(base: Path, output: Path, callback: GateCallback, *, is_adapter: bool = True, **options: Any) -> Trainer:
    """A training run of two steps in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if is_adapter:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tokens = torch.arange(16) % VOCABULARY
    settings = {"max_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output), disable_tqdm=True, **settings | options),
        train_dataset=[{"input_ids": tokens, "labels": tokens}] * 8,
        callbacks=[callback],
    )


def test_a_trained_adapter_passes(base: Path, tmp_path: Path) -> None:
    callback = GateCallback(dtypes=["bfloat16"])
    trainer(base, tmp_path / "support", callback).train()
    assert callback.report.passed
    (adapter,) = callback.report.adapters
    assert (adapter.name, adapter.verdict, adapter.base.dtype) == ("support", Verdict.PASSED, "bfloat16")
    assert adapter.coverage.modules_merged == 4
    folder = tmp_path / "support" / "merge-gate"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "report"]
    assert (folder / "adapter" / "support" / "adapter_config.json").exists()
    assert (folder / "report" / "report.html").exists()


@pytest.mark.parametrize("on_failure", ["raise", pytest.param("log", marks=pytest.mark.slow)])
def test_a_diverged_training_run_is_an_error(on_failure, base, tmp_path, caplog, wording) -> None:
    """Its learning rate makes every trained weight NaN."""
    callback = GateCallback(on_failure=on_failure, base=base)
    run = trainer(base, tmp_path / "support", callback, learning_rate=float("inf"))
    with caplog.at_level(logging.INFO, "merge_gate"):
        if on_failure == "raise":
            with pytest.raises(AdapterNotPassedError) as caught:
                run.train()
            assert caught.value.report is callback.report
            wording(str(caught.value).replace(str(tmp_path), "<out>"))
        else:
            run.train()
            (record,) = (record for record in caplog.records if record.name == "merge_gate")
            assert record.levelname == "ERROR"
            page = tmp_path / "support" / "merge-gate" / "report" / "report.html"
            assert "adapter-nonfinite" in record.getMessage()
            assert str(page) in record.getMessage()
    assert callback.report.adapters[0].cause == "adapter-nonfinite"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "bfloat16"}, TypeError),
        ({"output": "out"}, TypeError),
        ({"base": "./nowhere"}, UsageError),
        ({"checks": {"roundingloss": "error"}}, UsageError),
        ({"device": "tpu"}, UsageError),
        *(
            pytest.param({key: value}, UsageError, marks=pytest.mark.attempt(number, f"{key}={value!r}", "refused"))
            for number, key, value in (
                ("X08a", "on_failure", "Raise"),
                ("X08b", "on_failure", "error"),
                ("X08c", "on_failure", True),
                ("X08d", "on_failure", None),
                ("X08e", "on_failure", []),
                ("X08f", "allow_pickle", "no"),
            )
        ),
    ],
)
def test_a_wrong_option_is_refused_before_the_training(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        GateCallback(**options)
    assert "\"'" not in str(caught.value), "quoted once"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", tried("Y03", "an output_dir", "the adapter is judged", ["report", "run.yml", "run[1]"])
)
def test_an_output_directory_of_any_name_works(name: str, base: Path, tmp_path: Path) -> None:
    callback = GateCallback(base=base, on_failure="log")  # an adapter before its training has no effect
    run = trainer(base, tmp_path / name, callback)
    callback.on_train_end(run.args, run.state, run.control, model=run.model)
    assert [adapter.name for adapter in callback.report.adapters] == [name]


@pytest.mark.attempt("Y06a", "a file where GateCallback's folder would be, with on_failure='log'", "logged")
@pytest.mark.attempt("Y06b", "a report of another tool in GateCallback's folder, with on_failure='log'", "logged")
@pytest.mark.attempt("Y06c", "a base that is removed during the training, with on_failure='log'", "logged")
@pytest.mark.attempt("Y06d", "a model without an adapter, with on_failure='log'", "logged")
def test_no_error_of_the_gate_ends_a_program_that_logs(base, tmp_path, caplog) -> None:
    moved = tmp_path / "base"
    moved.symlink_to(base)
    callback = GateCallback(on_failure="log", base=moved)
    run, bare = (trainer(base, tmp_path / "out", callback, is_adapter=adapts) for adapts in (True, False))

    def logged(model: Any) -> str:
        caplog.clear()
        callback.on_train_end(run.args, run.state, run.control, model=model)
        (record,) = (record for record in caplog.records if record.name == "merge_gate")
        assert record.levelname == "ERROR"
        assert record.exc_info is None
        return record.getMessage()

    folder = tmp_path / "out" / "merge-gate"
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("")
    assert "merge-gate" in logged(run.model)
    folder.unlink()
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "report.json").write_text("of another tool")
    assert "report.json" in logged(run.model)
    (folder / "report" / "report.json").unlink()
    assert "LlamaForCausalLM" in logged(bare.model)
    moved.unlink()
    assert "no such directory" in logged(run.model)


def test_a_model_without_an_adapter_is_refused(base: Path, tmp_path: Path, wording: Wording) -> None:
    run = trainer(base, tmp_path / "out", GateCallback(), is_adapter=False, max_steps=1)
    with wording.of(GateError):
        run.train()
    assert not (tmp_path / "out" / "merge-gate").exists()


@pytest.mark.attempt("Y61", "a second training without an adapter in one output_dir, on_failure='log'", "no report")
def test_an_earlier_report_is_no_model_without_an_adapter(base: Path, tmp_path: Path) -> None:
    callback = GateCallback(on_failure="log")
    callback.report = PASS
    bare = trainer(base, tmp_path, callback, is_adapter=False)
    callback.on_train_end(bare.args, bare.state, bare.control, model=bare.model)
    assert callback.report is None


def test_other_processes_of_a_training_run_do_nothing(base: Path, tmp_path: Path) -> None:
    callback = GateCallback()
    run = trainer(base, tmp_path / "out", callback)
    run.state.is_world_process_zero = False
    callback.on_train_end(run.args, run.state, run.control, model=run.model)
    assert callback.report is None
    assert not (tmp_path / "out" / "merge-gate").exists()


def test_the_text_of_an_error_without_a_place_has_the_message() -> None:
    finding = Finding(
        check="not-judged", severity=Severity.ERROR, message="no\nspace", hint="free it", origin=Origin.RUNTIME
    )
    broken = adapter("a", Verdict.ERROR, cause=None, findings=(finding,))
    error = AdapterNotPassedError(report(broken), Path("out/report.html"))
    assert str(error) == "not-judged: no space; to do: free it; report: out/report.html"


def test_sharded_weights_are_refused(base: Path, tmp_path: Path, wording: Wording) -> None:
    run = trainer(base, tmp_path / "out", GateCallback())
    run.args.fsdp = True
    with wording.of(GateError):
        GateCallback().on_train_end(run.args, run.state, run.control, model=run.model)

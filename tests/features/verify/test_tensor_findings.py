"""What the findings on values name and advise."""

from pathlib import Path

import pytest
import torch

from merge_gate.features.verify.comparison import Comparison, TensorComparison
from merge_gate.features.verify.tensor_findings import TensorState, bias_limit, state_of, value_findings
from merge_gate.records.terms import Severity
from tests.support.models import make_adapter
from tests.support.verify.merges import Scene, peft_merge, weights_of, write_weights
from tests.support.verify.verification import Verifier

VARIANT = "bfloat16-base"


def one(name: str = "w", *, touched: bool = True, **changes: object) -> TensorComparison:
    values: dict[str, object] = {
        "same": False, "dtype": "bfloat16", "expected_dtype": "bfloat16", "shape": (8, 8), "expected_shape": (8, 8),
        "numel": 64, "units": 1.0, "delta_sq": 1.0, "cross": 1.0, "actual_sq": 1.0, "rounding_sq": 1e-4,
    }  # fmt: skip
    return TensorComparison(name=name, touched=touched, **(values | changes))


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"outside": 0, "bias": 1.0}, TensorState.CLOSE),
        ({"outside": 0, "bias": 99.0}, TensorState.BIASED),
        ({"outside": 3, "bias": 1.0}, TensorState.IMPRECISE),
        ({"outside": 3, "bias": 99.0}, TensorState.BIASED),
        ({"outside": 3, "astray": 1}, TensorState.OTHER),
        ({"outside": None}, TensorState.IMPRECISE),
        ({"outside": 3, "cross": 2.0, "actual_sq": 4.0}, TensorState.SCALED),
        ({"outside": 3, "delta_sq": 0.0, "cross": 0.0, "actual_sq": 1e-4}, TensorState.IMPRECISE),
        ({"outside": 3, "cross": 0.0, "actual_sq": 0.0, "nonfinite": 1}, TensorState.BASE),
        ({"outside": 3, "same_as_base": True}, TensorState.BASE),
    ],
)
def test_a_tensor_has_a_state(changes: dict[str, object], state: TensorState) -> None:
    assert state_of(one(**changes), 5.0) is state


def test_the_limit_of_the_bias_grows_with_the_lines() -> None:
    few, many = (bias_limit(Comparison(tensors=(one(shape=(rows, 64), numel=rows * 64),))) for rows in (1, 1 << 20))
    assert 4 < few < many < 8


@pytest.mark.attempt("M01", "NaN in a tensor that the adapter does not touch", "nonfinite, copy it from the base")
def test_the_hint_on_nan_depends_on_who_wrote_the_tensor() -> None:
    tensors = (one("a", nonfinite=1), one("b", touched=False, nonfinite=2, actual_sq=0.0, cross=0.0))
    merged, untouched = (
        found for found in value_findings(Comparison(tensors=tensors, compared=9)) if found.check == "nonfinite"
    )
    assert (merged.tensor, untouched.tensor) == ("a", "b")
    assert "safe_merge" in merged.hint
    assert "safe_merge" not in untouched.hint
    assert "base" in untouched.hint


@pytest.mark.attempt("M11", "28 tensors from a quantized base", "wrong-base counts all that it does not list")
def test_a_list_of_some_tensors_says_how_many_more_there_are() -> None:
    odd = [
        one(f"w{number}", cross=0.0, requantized=("bnb-4bit nf4", 0.9) if number < 4 else None) for number in range(28)
    ]
    (found,) = value_findings(Comparison(tensors=tuple(odd), compared=40))
    assert found.check == "wrong-base"
    assert '"w3", "w4" and 23 more' in found.message


# --- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.attempt("M02", "one shard is that of another candidate's merge", "other-candidate, by name")
def test_a_candidate_is_named_for_the_tensors_that_it_gave(scene: Scene, verifier: Verifier, tmp_path: Path) -> None:
    base, adapter, other = scene.base(VARIANT), scene.adapter(VARIANT), tmp_path / "other"
    make_adapter(base, other, seed=9)
    for place, of in ((tmp_path / "m", adapter), (tmp_path / "theirs", other)):
        peft_merge(base, of, place)
    own, theirs = weights_of(tmp_path / "m"), weights_of(tmp_path / "theirs")
    mixed = {name: theirs[name] if "layers.1." in name else values for name, values in own.items()}
    given = [name for name in mixed if not torch.equal(mixed[name], own[name])]
    write_weights(tmp_path / "m", mixed)
    report = verifier.report(tmp_path / "m", base, adapter, other)
    (found,) = [finding for finding in report.findings if finding.severity is Severity.ERROR]
    assert (found.check, dict(found.measured)) == ("other-candidate", {"tensors": len(given)})
    write_weights(tmp_path / "m", mixed | {given[0]: mixed[given[0]] + 1})
    report = verifier.report(tmp_path / "m", base, adapter, other)
    found = {finding.check: finding for finding in report.findings if finding.severity is Severity.ERROR}
    assert found.keys() == {"other-candidate", "unexplained"}
    assert "--candidate" not in found["unexplained"].hint

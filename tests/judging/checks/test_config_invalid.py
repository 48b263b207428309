"""When config-invalid fires, and what it says: its messages are in config-invalid.txt."""

import pytest
import torch

from merge_gate.judging.all_checks import refused
from merge_gate.judging.not_judged import NOT_JUDGED
from merge_gate.records.files import Pattern
from merge_gate.records.refusals import Refusal
from tests.support.faults import Case, cast_one, complex_factors
from tests.support.judging.cases import found_in_files, reason, refusing
from tests.support.judging.every_check import EveryCheck

EXPRESSION = Pattern(place="target_modules", text="(a+)+b", expression="(a+)+b")
TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NOT_FLOATING = reason("dtype_clash", name=TENSOR, got="int32", expected="float32")

COMPLEX = reason("imaginary_parts", name=TENSOR, dtype="complex64", count=1_234)


def misspelled(*settings: str) -> Refusal:
    return reason("ignored_settings", settings=settings, peft="9.0.0", saved_by="9.0.0", near=(("alfa", "alpha"),))


class TestConfigInvalid(EveryCheck):
    FIRES = (
        found_in_files("config-invalid"),
        refusing(reason("pattern_refused", pattern=None, names=9, seconds=1.0)),
        refusing(NOT_FLOATING),
    )
    REFUSED = (
        reason("pattern_refused", pattern=EXPRESSION, names=9, seconds=10.0),
        reason("pattern_refused", pattern=None, names=9, seconds=10.0),
        reason("pattern_refused", pattern=EXPRESSION, names=9, seconds=10.0, problem="missing )"),
        reason("pattern_refused", pattern=None, names=9, seconds=10.0, problem="missing )"),
        reason("ignored_settings", settings=("odd=1",), peft="9.0.0", saved_by="9.1.0"),
        reason("ignored_settings", settings=("odd=1",), peft="9.0.0", saved_by="9.0.0"),
        reason("ignored_settings", settings=tuple("abcdefgh"), peft="9.0.0", saved_by="main"),
        reason("ignored_settings", settings=("odd=1",), peft="9.0.0", saved_by="9.0.1.dev0"),
        misspelled("alfa=1"),
        misspelled("alfa=1", "odd=1"),
        NOT_FLOATING,
        COMPLEX,
        reason("imaginary_parts", name=TENSOR, dtype="complex64", count=1),
    )
    FAULTS = (
        Case("imaginary-factors", break_=complex_factors(1.0), cause="config-invalid", warnings=("keys-unexpected",)),
        Case("integer-factor", break_=cast_one("lora_A", torch.int32), cause="config-invalid", tensor="v_proj.lora_A"),
        Case("boolean-factor", "dora", cast_one("lora_B", torch.bool), cause="config-invalid", tensor="v_proj.lora_B"),
        Case(
            "integer-embedding", "saved-embedding", cast_one("embed_tokens", torch.int8),
            cause="config-invalid", tensor="embed_tokens.weight",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("saved_by", ["0.²", "0." + "9" * 5_000, "٩.٩", ".", ""])
def test_a_release_that_is_none_is_not_compared(saved_by: str) -> None:
    """It comes from adapter_config.json, and `int` raises on some of what `str.isdigit` accepts."""
    fact = reason("ignored_settings", settings=("odd=1",), peft="9.0.0", saved_by=saved_by)
    assert refused(fact).check in {"config-invalid", NOT_JUDGED}

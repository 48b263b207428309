"""When not-mergeable fires, and what it says: its messages are in not-mergeable.txt."""

from merge_gate.judging.checks.not_mergeable import DEFECTS
from merge_gate.records.terms import Severity
from tests.support.judging.cases import FOURIERFT, MODULE, Given, evidence, files, judge, reason, refusing, spec, unread
from tests.support.judging.every_check import EveryCheck

NORM = "model.norm.weight"


class TestNotMergeable(EveryCheck):
    FIRES = (
        refusing(reason("layer_left_unmerged", module=MODULE)),
        Given(evidence(peft_type="FOURIERFT", unread=(unread(),)), files(config=FOURIERFT)),
        Given(evidence(unread=(unread(),)), files(config={"init_lora_weights": "pissa"})),
        Given(
            evidence(peft_type="FOURIERFT", unread=(unread(share=0.5, in_logits=False), unread(never_called=False))),
            files(config=FOURIERFT),
            severity=Severity.WARNING,
        ),
        Given(
            evidence(peft_type="FOURIERFT", unread=(unread(share=2.0**-8),)),
            files(config=FOURIERFT),
            severity=Severity.WARNING,
        ),
        Given(evidence(unread=(unread(),)), files(config={"init_lora_weights": False}), severity=Severity.WARNING),
    )
    SITUATIONS = {
        "a layer that is never called": Given(evidence(unread=(unread(),)), files(config={"init_lora_weights": False})),
        "layers that are never called": Given(
            evidence(peft_type="FOURIERFT", unread=(unread(), unread(module="body.out_proj", share=0.25))),
            files(config=FOURIERFT),
        ),
    }
    REFUSED = (
        *(reason("known_defect", defect=one) for one in DEFECTS),
        reason("known_defect", defect="merged-twice", modules=("lm_head", "embed")),
        reason("loftq_without_gpu"),
        reason("layer_left_unmerged", module="model.layers.0"),
        reason("result_lacks_tensors", names=(NORM,), in_wrapper=False),
        reason("result_lacks_tensors", names=("a", "b", "c", "d"), in_wrapper=True),
        reason("setting_lost", adapter="support", setting="use_rslora"),
        reason("tensor_unweighted", adapter="support", tensor=NORM),
        reason("two_vocabularies", adapters=("a", "b"), tensor=NORM),
        reason("modules_left_out", adapter="support", modules=("lm_head",)),
    )


def test_an_unread_layer_has_the_same_message_in_several_dtypes() -> None:
    """What it says is the same, so that it is said once, although the figures differ."""
    told = [
        judge(spec(), files(config=FOURIERFT), evidence(peft_type="FOURIERFT", unread=(unread(share=share),)))
        for share in (6.8123, 6.8119)
    ]
    assert told[0] == told[1] != ()

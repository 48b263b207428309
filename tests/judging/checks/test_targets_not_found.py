"""When targets-not-found fires, and what it says: its messages are in targets-not-found.txt."""

from typing import Any

from merge_gate.records.refusals import Refusal
from tests.support.judging.cases import MANY, reason, refusing
from tests.support.judging.every_check import EveryCheck


def targets(*names: str, **settings: Any) -> Refusal:
    return reason("targets_not_found", targets=names, of_base=("k_proj", "q_proj"), **settings)


class TestTargetsNotFound(EveryCheck):
    FIRES = (refusing(reason("targets_not_found", targets=("query",), of_base=("q_proj",))),)
    REFUSED = (
        targets("query"),
        targets(),
        targets("score", task_type="SEQ_CLS"),
        targets("model.score", task_type="SEQ_CLS"),
        targets("score", task_type="CAUSAL_LM"),
        targets(r".*q_proj$"),
        targets("q_proj", excluded="q_proj, k_proj"),
        targets("q_proj", layers="99"),
        targets("q_proj", layers="99", excluded="a"),
        targets("query", layers="99"),
        targets("layers.0.q_proj", layers="99"),
        targets("X_proj"),
        targets("q" * 301, excluded="e" * 101, layers="9" * 101),
        reason("targets_not_found", targets=MANY, of_base=MANY),
        reason("targets_not_found", targets="q_proj,k_proj", of_base=("k_proj", "q_proj")),
        reason("targets_not_found", targets=".*query", of_base=("k_proj", "q_proj")),
        reason("parameters_not_found", targets=("mlp.up",), of_base=("mlp.gate_up_proj",)),
        reason("parameters_not_found", targets=MANY, of_base=MANY),
    )

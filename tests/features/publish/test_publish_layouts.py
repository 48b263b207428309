"""A slice of the sweep over every model type with converted tensors (tests/tools/publish_layouts.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from merge_gate.features.publish.stored_layout import StoredLayout
from tests.support.engine import publish_layouts
from tests.support.gating import one_thread
from tests.tools import publish_layouts as tool

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ("mixtral", "qwen2_vl")
SLICE = (
    "aria", "deepseek_v3", "gemma3", "gpt_oss", "jamba", "llava", "mllama", "olmoe", "paligemma", "phimoe", "qwen2_moe",
    "qwen3_moe", "swin",
)  # fmt: skip


@pytest.mark.parametrize("model_type", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in SLICE)])
def test_a_published_change_is_what_transformers_loads(model_type: str, tmp_path: Path) -> None:
    with one_thread():
        checked = publish_layouts.check(model_type, tmp_path)
    assert (checked.skipped, checked.refused, checked.wrong) == ("", "", ())
    assert checked.changed


def test_a_way_back_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = StoredLayout.reversed

    def flipped(self: StoredLayout, *args: Any) -> dict[str, torch.Tensor]:
        return {name: -tensor for name, tensor in own(self, *args).items()}

    monkeypatch.setattr(StoredLayout, "reversed", flipped)
    with one_thread():
        checked = publish_layouts.check("mixtral", tmp_path)
    assert len(checked.wrong) == checked.changed


def test_the_page_names_every_exception() -> None:
    kinds = ({}, {"skipped": "no tiny model"}, {"refused": "not exact: `x` | y"}, {"wrong": ("a.weight",)})
    page = tool.document([publish_layouts.Checked(model_type=f"type-{n}", **more) for n, more in enumerate(kinds)])  # type: ignore[arg-type]
    assert all(f"| `type-{n}` |" in page for n in (2, 3))
    assert "| model types with a conversion | 4 |" in page
    assert "| it loads exactly the changed tensors | 1 |" in page
    assert "| `not exact: x / y` |" in page

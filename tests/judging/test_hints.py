"""Words for names of tensors, files, and releases that are not as they should be, and figures in sentences."""

from typing import Any

import pytest

from merge_gate.files.adapter_config import recorded
from merge_gate.judging.checks.phrases import are, describe_pattern, figure, nothing_finite, tensors
from merge_gate.judging.foreign_formats import FORMATS, RENAMED, SINGLE_FILE, by_files, by_keys, by_tensors
from merge_gate.judging.key_hints import names_of_another_kind, of_another_model, wrapped_twice
from merge_gate.judging.peft_releases import NEWEST, Span, written_by
from merge_gate.records.files import Pattern, StoredTensor
from tests.support.judging.cases import tensor
from tests.support.judging.releases import ALWAYS, LORA_0_9
from tests.support.wording import Wording


@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_model_wrapped_more_than_once(times: int) -> None:
    header = StoredTensor(name="base_model.model." * times + "q_proj.lora_A.weight", dtype="F32", shape=(2, 2))
    hint = wrapped_twice((header,))
    assert (f"{times} times" in hint) == (times > 1)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["module.base_model.model.q.lora_A.weight", "module.base_model.model.q.lora_B.weight"], "model.module"),
        (["_orig_mod.base_model.model.q.lora_A.weight"], "torch.compile"),
        (["_orig_mod.base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"], None),
        (["base_model.model._orig_mod.q.lora_A.weight"], "_orig_mod."),
        (["base_model.model.module.q.lora_A.weight"], "model.module"),
        (["base_model.model._orig_mod.q.lora_A.weight", "base_model.model.q.lora_B.weight"], None),
        (["base_model.model.layers.0._checkpoint_wrapped_module.q.lora_A.weight"], "_checkpoint_wrapped_module"),
        (["base_model.model.q.lora_A.weight", "base_model.model.h.1._orig_mod.q.lora_A.weight"], "_orig_mod"),
        (["model.embed_tokens.weight", "model.norm.weight"], "full model"),
        (["model.layers.0.q.lora_A.weight", "model.layers.0.q.lora_B.weight"], "lacks base_model.model."),
        (["model.layers.0.q.lora_A.weight", "base_model.model.q.lora_B.weight"], None),
        (["model.norm.weight"], None),
        (["model.embed_tokens.weight", "base_model.model.q.lora_A.weight"], None),
        ([], None),
    ],
)
def test_names_that_no_peft_model_has(names: list[str], hint: str | None) -> None:
    said = names_of_another_kind(tuple(StoredTensor(name=name, dtype="F32", shape=(2, 2)) for name in names))
    assert (hint in said) if hint else not said


@pytest.mark.parametrize(
    ("wanted", "stored", "differs"),
    [
        ("model.layers.0.q", "model.language_model.layers.0.q", True),
        ("model.layers.0.q", "language_model.model.layers.0.q", True),
        ("model.language_model.layers.0.q", "model.layers.0.q", True),
        ("model.layers.0.q", "model.layers.1.q", False),
        ("model.layers.0.q", "model.language_model.layers.1.q", False),
        ("model.language_model.layers.0.q", "language_model.model.layers.0.q", False),
    ],
)
def test_names_of_a_model_for_text_and_images(wanted: str, stored: str, differs: bool, wording: Wording) -> None:
    missing, stray = ([f"base_model.model.{name}.lora_A.weight"] for name in (wanted, stored))
    hint = of_another_model(missing, stray)
    assert bool(hint) is differs
    if differs:
        wording(hint)


EXAMPLES = (
    ("pytorch_lora_weights.safetensors", "", "unet.down_blocks.0.attentions.0.to_q.lora_A.weight"),
    ("", "", "lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight"),
    ("0000100_adapters.safetensors", "lora_parameters", "model.layers.0.self_attn.q_proj.lora_a"),
    ("adapter-q8_0.gguf", "", ""),
    ("pytorch_adapter.bin", "config_id", "bert.encoder.layer.0.output.adapters.sst.adapter_down.0.weight"),
    ("adapter_config (1).json", "", ""),
    ("adapter_model-00001-of-00002.safetensors", "", ""),
    ("mp_rank_00_model_states.pt", "", ""),
    ("model-00001-of-00003.safetensors", "", ""),
)
MEGATRON = "iter_0000100"


def place(hint: str | None) -> int:
    return next(number for number, one in enumerate(FORMATS) if one.hint == hint)


def test_every_format_is_known_by_each_of_its_marks() -> None:
    known = [
        {place(found) for found in (by_files([file]), by_keys([key]), by_tensors([tensor])) if found}
        for file, key, tensor in EXAMPLES
    ]
    assert all(len(one) == 1 for one in known), "the marks of one format do not mean two"
    assert sorted({place(by_files([MEGATRON])), *(number for one in known for number in one)}) == [*range(len(FORMATS))]


def test_the_first_row_that_fits_counts() -> None:
    assert by_files(["model.safetensors", "pytorch_lora_weights.safetensors"]) == FORMATS[0].hint


@pytest.mark.parametrize(
    ("names", "has_config", "hint"),
    [
        ([], False, None),
        (["README.md"], False, None),
        (["detail.safetensors"], False, SINGLE_FILE),
        (["detail.safetensors"], True, RENAMED),
        (["final.ckpt", "optimizer.pt"], True, RENAMED),
        (["final.ckpt"], False, None),
        (["optimizer.pt", "training_args.bin"], True, None),
    ],
)
def test_weights_of_another_name(names: list[str], has_config: bool, hint: str | None) -> None:
    assert by_files(names, has_config=has_config) == hint


def test_what_is_pefts_is_not_taken_for_anothers() -> None:
    assert by_keys(["r", "lora_alpha", "target_modules"]) is None
    assert by_tensors(["base_model.model.unet.q.lora_A.weight", "unet.q.lora_A.weight"]) is None
    assert by_tensors(["q_proj.lora_A.weight"]) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"peft_type": "LORA", "peft_version": "0.18.1"}, Span(oldest=18, newest=18)),
        ({"peft_type": "LORA", "peft_version": "0.21.3.dev0@abc"}, Span(oldest=21, newest=21)),
        (ALWAYS | {"peft_type": "LORA"}, Span(oldest=0, newest=2)),
        (LORA_0_9, Span(oldest=9, newest=9)),
        (LORA_0_9 | {"layer_replication": None}, Span(oldest=10, newest=13)),
        (ALWAYS | {"peft_type": "LOKR", "r": 2}, Span(oldest=0, newest=13)),
        (ALWAYS | {"peft_type": "LOKR", "exclude_modules": None}, Span(oldest=14, newest=17)),
        (ALWAYS | {"peft_type": "LORA", "kasa_config": None}, Span(oldest=0, newest=NEWEST)),  # no release wrote that
        ({"peft_type": "LORA", "r": 4}, Span(oldest=0, newest=NEWEST)),  # not PEFT's own
        ({"peft_type": "LORA", "peft_version": 3}, Span(oldest=0, newest=NEWEST)),
    ],
)
def test_the_config_dates_itself(config: dict[str, Any], expected: Span) -> None:
    assert written_by(recorded(config)) == expected


@pytest.mark.parametrize(
    "span",
    [
        Span(oldest=9, newest=9),
        Span(oldest=9, newest=NEWEST),
        Span(oldest=0, newest=NEWEST),
        Span(oldest=9, newest=12),
        Span(oldest=0, newest=12),
    ],
)
def test_a_span_in_words(span: Span, wording: Wording) -> None:
    wording(span)


KEYS = {
    "init_lora_weights": 3, "layers_to_transform": 4, "alpha_pattern": 6, "megatron_core": 7, "use_rslora": 8,
    "use_dora": 9, "layer_replication": 10, "lora_bias": 14, "corda_config": 15, "use_qalora": 16,
    "target_parameters": 17, "peft_version": 18, "use_bdlora": 19, "velora_config": 20, "kasa_config": 21,
}  # fmt: skip


@pytest.mark.parametrize("release", sorted(set(KEYS.values())))
def test_each_release_is_known_by_the_keys_that_it_brought(release: int) -> None:
    """`peft_version` without a version in it is a key as any other."""
    keys = {key: None for key, since in (KEYS | {"exclude_modules": 14}).items() if since <= release}
    later = [since for since in KEYS.values() if since > release]
    got = written_by(recorded(ALWAYS | {"peft_type": "LORA"} | keys))
    assert got == Span(oldest=release, newest=min(later) - 1 if later else NEWEST)


def test_a_key_of_one_type_says_nothing_of_another() -> None:
    config = ALWAYS | {"peft_type": "LOKR", "use_dora": False, "exclude_modules": None, "peft_version": None}
    assert written_by(recorded(config)) == Span(oldest=18, newest=NEWEST)


@pytest.mark.parametrize(
    ("count", "said", "verb"),
    [(0, "0 tensors", "are"), (1, "1 tensor", "is"), (2, "2 tensors", "are"), (1234, "1,234 tensors", "are")],
)
def test_so_many(count: int, said: str, verb: str) -> None:
    assert (tensors("x" * count), are("x" * count)) == (said, verb)


@pytest.mark.parametrize("counts", [{"nan": 64}, {"posinf": 64}, {"neginf": 64}, {"nan": 1, "posinf": 2, "neginf": 61}])
def test_nothing_finite(counts: dict[str, int]) -> None:
    assert nothing_finite(tensor(**counts))
    assert not nothing_finite(tensor(**counts | {"numel": 65}))


def test_an_expression_is_shown_at_its_place_and_cut() -> None:
    short, long = (Pattern(place="target_modules", text=text, expression=text) for text in ("(\n", "x" * 1000))
    assert describe_pattern(short) == 'target_modules in adapter_config.json is "(\\n"'
    assert len(describe_pattern(long)) < 300
    assert f'"{"x" * 199}…"' in describe_pattern(long)
    exact = Pattern(place="target_modules", text="x" * 200, expression="x" * 200)
    assert f'"{"x" * 200}"' in describe_pattern(exact)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.25"), (999.0, "999"), (1000.0, "1,000"), (-1000.5, "-1,000"), (1e9 - 1, "999,999,999"), (1e9, "1e+09")],
)
def test_a_figure_has_three_digits_or_is_whole(value: float, text: str) -> None:
    assert figure(value) == text

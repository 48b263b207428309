"""The base's files contradict each other or its config.json.

**Fires when** the base's files contradict each other or config.json. The verdict is `error` and not `failed`. For
example:

- a tensor has another shape than config.json implies;
- quantization codes have no scales, or config.json has no `quantization_config` that explains them;
- `quantization_config` declares a format, and all weights are plain;
- FP8 blocks do not divide a weight evenly;
- two shards have different tensors with the same name;
- an index or config.json cannot be read, or names a file outside of the base's directory.

Some facts are only a `note`: a stale index, a second set of weights, tensors that are stored twice, and a tie that the
files contradict. Stored tensors that the model does not load are a note too, for example layers for multi-token
prediction. They are not part of the merge, and `save_pretrained` does not write them.

```text
base ./models/llama-inconsistent: model.layers.0.mlp.down_proj.weight has shape [32, 48] in its file, and
LlamaForCausalLM of its config.json needs [32, 56]
```

**Why it matters.** The model in memory is not the model in the files, so no merge into it says anything about the
adapter.

**What to do.** Download the base again, with all files from one commit. If the base is quantized, restore the config
that it was quantized with.

**It happened.**

- [axolotl-ai-cloud/axolotl#3771](https://github.com/axolotl-ai-cloud/axolotl/pull/3771): a merge read the codes of an
  FP8 base without their scales, and the adapter was lost.
- [unslothai/unsloth-zoo#803](https://github.com/unslothai/unsloth-zoo/pull/803): the same, and the merged files kept
  the scales without the config that explains them.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_gate._internal.text import counted, listing
from merge_gate.judging.checks.check import ERROR, Check, Symptom
from merge_gate.records.measured import BaseFacts
from merge_gate.records.terms import Finding, Origin, Severity

BASE_INCONSISTENT = Check(
    "base-inconsistent", ERROR, Origin.BASE, Symptom.BAD_BASE, blame=20, page=__doc__, can_be_off=False, is_of_base=True
)

_ONE_COMMIT = (
    "fetch the base again, all files of one commit; if it is quantized, restore the config.json with its "
    "quantization_config, or name the base without quantization"
)


def of_base(base: BaseFacts) -> Iterator[Finding]:
    """What the report's list of bases has: stored tensors that the model does not have."""
    if base.unloaded:
        yield BASE_INCONSISTENT.finding(
            f"base {base.model}: {counted(len(base.unloaded), 'stored tensor')} "
            f"{'is' if len(base.unloaded) == 1 else 'are'} not part of {base.loaded_as}: {listing(base.unloaded, 6)}",
            "they are not merged, and save_pretrained of the merged model does not write them: copy them from the base "
            "if the program that serves the model needs them",
            severity=Severity.NOTE,
            tensor=base.unloaded[0],
        )


def adapter_next_to_base(base: str) -> Finding:
    return BASE_INCONSISTENT.finding(
        f"base {base} has an adapter_config.json next to its weights: transformers loads that adapter with it",
        "remove adapter_config.json from the base's directory, or name the plain base",
    )


def _contradiction(message: str, hint: str, tensor: str) -> Finding:
    return BASE_INCONSISTENT.finding(message, hint, module=tensor.rpartition(".")[0], tensor=tensor)


def stored_tensors_left_out(
    base: str, file: str | None, names: tuple[str, ...], wrapped: tuple[str, ...], class_name: str
) -> Finding:
    """`wrapped` are the ones of a model that PEFT had wrapped. `file` is None if it is not known which one has them."""
    what = (
        f"{counted(len(wrapped), 'weight')} of a model that PEFT had wrapped ({listing(wrapped, 3)})"
        if wrapped
        else f"{counted(len(names), 'tensor')} of its weights that {class_name} does not load ({listing(names, 3)})"
    )
    return _contradiction(
        f"base {base}: {f'{file} holds' if file else 'its weight files hold'} {what}; the model in memory would not be "
        "the model in the files",
        "save the base again after unloading the adapter (get_base_model)" if wrapped else _ONE_COMMIT,
        names[0],
    )


def quantized_weight_torn(base: str, file: str, tensor: str, dtype: str, missing: tuple[str, ...]) -> Finding:
    """A stored tensor of codes lacks tensors that its quantizer reads with it."""
    return _contradiction(
        f"base {base}: {file} holds {tensor} in {dtype}, and lacks {listing(missing, 3)}: without "
        f"{'it' if len(missing) == 1 else 'them'}, codes would be read as weights",
        "fetch the base again, all files of one commit, or name the base without quantization",
        tensor,
    )


def codes_for_numbers(base: str, file: str, tensor: str, dtype: str, class_name: str) -> Finding:
    return _contradiction(
        f"base {base}: {file} holds {tensor} in {dtype}, and {class_name} needs numbers there: codes would be read as "
        "weights",
        _ONE_COMMIT,
        tensor,
    )


def base_shape_clash(base: str, class_name: str, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> Finding:
    return _contradiction(
        f"base {base}: {name} has shape {list(got)} in its file, and {class_name} of its config.json needs "
        f"{list(expected)}",
        "config.json and weights of the base are of different models: fetch the base again",
        name,
    )


REFUSALS = (adapter_next_to_base, stored_tensors_left_out, quantized_weight_torn, codes_for_numbers, base_shape_clash)

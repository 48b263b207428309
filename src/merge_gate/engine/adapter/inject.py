"""A scratch → the same with an adapter's layers in place, put there by PEFT, or why it cannot.

In: a scratch of the base, PEFT's config of the adapter, what the preflight read. Out: PEFT's model, and the base's
names of the scratch's parameters, or `Refused`. Knows no values of the adapter (steps 2 and 3 of load_adapter.py).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any

import peft
import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from merge_gate.engine.adapter.known_defects import blamed_on
from merge_gate.engine.adapter.peft_config import initialisation_reads_base, missing_package
from merge_gate.engine.adapter.svd_ahead import decomposed_ahead
from merge_gate.engine.base.loaded_base import Base, first_line, named_tensors
from merge_gate.errors import Refused
from merge_gate.records.files import AdapterFiles
from merge_gate.records.measured import Refusal
from merge_gate.records.terms import Origin
from merge_gate.tensor_names import ADAPTER_PREFIX
from merge_gate.text import listing, quoted

_UNDER_LAYERS = ("base_layer.weight", "token_adapter.base_layer.weight")
"""Under what PEFT saves an enlarged embedding, or head, that carries a LoRA or trained tokens."""


def fit_vocabulary(scratch: nn.Module, files: AdapterFiles) -> bool:
    """Resize the embeddings to the rows that the file brings, as a user does before loading (peft#2290).

    False where they have as many, or the file brings none.
    """
    if not hasattr(scratch, "get_input_embeddings") or not files.tensors:
        return False
    model: Any = scratch
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return False
    if not isinstance(embedding, nn.Embedding):
        return False
    wanted = set()
    for name, module in scratch.named_modules():
        if module is embedding or (module is head and head is not None):
            suffixes = ("weight", *_UNDER_LAYERS) if module is embedding else _UNDER_LAYERS
            wanted |= {f"{ADAPTER_PREFIX}{name}.{suffix}" for suffix in suffixes}
    for header in files.tensors:
        rows = header.shape[0] if header.name in wanted and len(header.shape) == 2 else 0  # noqa: PLR2004
        if rows and rows != embedding.num_embeddings and header.shape[1] == embedding.embedding_dim:
            model.resize_token_embeddings(rows, mean_resizing=False)
            return True
    return False


def base_slots(scratch: nn.Module) -> tuple[dict[tuple[int, str], str], dict[str, tuple[str, ...]]]:
    """Names of the scratch's parameters before PEFT moves them, and for tied ones the modules that share them."""
    first: dict[int, str] = {id(tensor): name for name, _, tensor in named_tensors(scratch)}
    slots: dict[tuple[int, str], str] = {}
    sharers: dict[str, list[str]] = {}
    for path, module in scratch.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                canonical = first[id(tensor)]
                slots[id(module), name] = canonical
                sharers.setdefault(canonical, []).append(path)
    return slots, {name: tuple(paths) for name, paths in sharers.items() if len(paths) > 1}


def leave_out_replaced(
    model: nn.Module,
    paths: Mapping[int, str],
    slots: dict[tuple[int, str], str],
    sharers: dict[str, tuple[str, ...]],
) -> None:
    """Of a shared tensor, take the modules that a trained copy stands in for out of those that a merge changes.

    Their copy is a tensor of its own in the merged model. Where the first of the sharers is one of them, the others'
    tensor goes by the name of the next one.

    Args:
        model: with the adapter's layers in place.
        paths: the modules of the scratch before that, by id.
        slots: as `base_slots` gives them; edited.
        sharers: likewise.
    """
    replaced = {
        id(inner)
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for inner in wrapper.original_module.modules()
    }
    for name in list(sharers):
        holders = [key for key, held in slots.items() if held == name]
        left = [key for key in holders if key[0] not in replaced]
        if not left or len(left) == len(holders):
            continue
        places = tuple(paths[module] for module, _ in left)
        if name.rpartition(".")[0] in places:
            sharers[name] = places
            continue
        other = f"{places[0]}.{left[0][1]}"
        slots.update(dict.fromkeys(left, other))
        if len(places) > 1:
            sharers[other] = places


def written_whole(model: nn.Module, slots: Mapping[tuple[int, str], str], keys: Container[str]) -> dict[str, str]:
    """Of the keys of a PEFT model those of the base's own tensors, and what the base calls them."""
    named = {
        f"{path}.{attribute}": slots.get((id(module), attribute), "")
        for path, module in model.named_modules()
        for attribute in module._parameters
    }
    return {key: name for key, name in named.items() if name and key in keys}


def inject(scratch: nn.Module, config: Any, base: Base, adapter_name: str, *, blank: bool = False) -> Any:
    """Let PEFT put the adapter's layers on the scratch.

    Args:
        scratch: of the base.
        config: PEFT's.
        base: whose scratch it is.
        adapter_name: PEFT's name for the adapter.
        blank: the adapter's tensors have no values yet (template.py) in place of those that training starts from:
            that saves most of an injection, and for DoRA a product and a norm of every layer.

    Raises:
        Refused: no such modules (`targets-not-found`), or a layer that the method cannot adapt (`not-mergeable`).
    """
    torch.manual_seed(0)
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
    try:
        filled = initialisation_reads_base(config) and not blank
        with (
            _targets_filled(base, config) if filled else contextlib.nullcontext(),
            torch.device("meta") if blank else contextlib.nullcontext(),
            decomposed_ahead(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), base),
        ):
            return model_class(scratch, config, adapter_name)
    except ImportError as error:
        raise Refused(missing_package(error)) from error
    except NoMatchingPeftModuleError as error:
        raise Refused(_no_targets(config, scratch)) from error
    except (AssertionError, RuntimeError) as error:
        refused = _loftq_without_a_gpu(config, error)
        if refused is None and isinstance(error, AssertionError):  # a mistake of somebody's code
            raise
        raise Refused(refused or _injection_failed(error, config, scratch, base)) from error
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError, IndexError) as error:
        raise Refused(_injection_failed(error, config, scratch, base)) from error


@contextlib.contextmanager
def _targets_filled(base: Base, config: Any) -> Iterator[None]:
    """The weights of a module have values while PEFT makes its layer: DoRA, among others, reads them then (hollow.py).

    Only for memory: what is read elsewhere is noticed, cast for good, and loaded again.
    """
    tuner, hollow, name = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), base.hollow, "_create_and_replace"
    own: Any = vars(tuner).get(name) if tuner is not None else None
    if hollow is None or own is None:
        yield
        return

    def with_values(self: Any, peft_config: Any, adapter: str, target: Any, *others: Any, **named: Any) -> Any:
        held = list(target.parameters()) if isinstance(target, nn.Module) else []
        with hollow.filled(held):
            return own(self, peft_config, adapter, target, *others, **named)

    setattr(tuner, name, with_values)
    try:
        yield
    finally:
        setattr(tuner, name, own)


def _no_targets(config: Any, scratch: nn.Module) -> Refusal:
    targets, parameters = getattr(config, "target_modules", None), getattr(config, "target_parameters", None)
    if parameters and not targets:
        return _no_parameters(sorted(parameters), scratch)
    named = [targets] if isinstance(targets, str) else sorted(targets or ())
    shown = listing((quoted(name, 300, "'") for name in named), 12)
    saved = _saved_instead(targets)
    if saved and config.task_type in _SAVED_BY_TASK:
        return Refusal(
            check="targets-not-found",
            message=(
                f"target_modules {shown} leaves nothing to adapt: for task_type {config.task_type} PEFT trains "
                f"{listing(saved)} whole (modules_to_save) instead of adapting it"
            ),
            hint="name other layers in target_modules, or save the adapter without a task_type",
            origin=Origin.CONFIG,
        )
    if not targets:
        return Refusal(
            check="targets-not-found",
            message="target_modules in adapter_config.json is empty, and no target_parameters are named",
            hint="restore the adapter_config.json that was saved with the adapter",
            origin=Origin.CONFIG,
        )
    leaves = sorted({name.rpartition(".")[2] for name, module in scratch.named_modules() if _is_leaf(module)})
    excluded = getattr(config, "exclude_modules", None)
    layers = getattr(config, "layers_to_transform", None)
    but = f" that exclude_modules ({_in_words(excluded)[:100]}) leaves over" if excluded else ""
    but += f" in the layers of layers_to_transform ({str(layers).strip('[]')[:100]})" if layers is not None else ""
    return Refusal(
        check="targets-not-found",
        message=(
            f"target_modules {shown} match no module of the base{but}; the base's layers are called "
            f"{listing(leaves, 12)}"
        ),
        hint=_misread(targets, leaves)
        or (
            f"look at {_narrowed(excluded, layers)} in adapter_config.json: the base has layers of these names"
            if (excluded or layers is not None) and _are_leaves(targets, leaves)
            else "check that this is the adapter's base; transformers 5 renamed the layers of some architectures: then "
            "gate the adapter with the version that it was trained with"
        ),
        origin=Origin.CONFIG,
    )


def _no_parameters(targets: list[str], scratch: nn.Module) -> Refusal:
    large = {name for name, one in scratch.named_parameters() if one.dim() > 1}
    own = sorted({".".join(name.split(".")[-2:]) for name in large})
    shown = listing((quoted(name, 300, "'") for name in targets), 12)
    return Refusal(
        check="targets-not-found",
        message=(
            f"target_parameters {shown} match no parameter of the base, and no target_modules are named; the base's "
            f"parameters are called {listing(own, 12)}"
        ),
        hint="check that this is the adapter's base; target_parameters are the ends of names of parameters, such as "
        "mlp.experts.gate_up_proj; transformers 5 renamed those of some architectures: then gate the adapter with the "
        "version that it was trained with",
        origin=Origin.CONFIG,
    )


def _are_leaves(targets: Any, leaves: list[str]) -> bool:
    return not isinstance(targets, str) and all(name.rpartition(".")[2] in leaves for name in targets)


def _narrowed(excluded: Any, layers: Any) -> str:
    return " and ".join(["exclude_modules"] * bool(excluded) + ["layers_to_transform"] * (layers is not None))


def _in_words(names: Any) -> str:
    return names if isinstance(names, str) else ", ".join(sorted(names))


def _misread(targets: Any, leaves: list[str]) -> str:
    """The hint where PEFT reads what stands there otherwise than it was meant; empty for others."""
    if isinstance(targets, str) and any(leaf in re.split(r"[\s,|]+", targets) for leaf in leaves):
        return (
            "a text in target_modules is one regular expression, which has to match a layer's whole name: write a list "
            "of names"
        )
    if isinstance(targets, (list, tuple, set)) and any(set("*\\()[]|^$") & set(name) for name in targets):
        return "in a list, target_modules are plain names, no regular expressions: write the expression as a text"
    return ""


def _loftq_without_a_gpu(config: Any, error: Exception) -> Refusal | None:
    """PEFT quantises the base anew on each load of such an adapter, on CUDA or XPU only (peft/utils/loftq_utils.py)."""
    scheme = str(getattr(config, "init_lora_weights", "")).lower()
    if scheme != "loftq" or not any(word in str(error) for word in ("CUDA", "NVIDIA", "XPU")):
        return None
    return Refusal(
        check=None,
        message="init_lora_weights is 'loftq': PEFT quantises the base whenever it loads this adapter, on a GPU only",
        hint=(
            "gate it on a machine with a GPU; if it was trained on a base that LoftQ had quantised and saved, name "
            "that base and set init_lora_weights to true in adapter_config.json"
        ),
        origin=Origin.CONFIG,
    )


_SAVED_BY_TASK = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_HEADS = ("classifier", "score", "qa_outputs")
"""Heads that PEFT's classes for these tasks put into modules_to_save (peft/peft_model.py)."""


def _saved_instead(targets: Any) -> list[str]:
    names = targets if isinstance(targets, (list, tuple, set)) else ()
    return sorted(name for name in names if name.rpartition(".")[2] in _HEADS)


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False))


def _injection_failed(error: Exception, config: Any, scratch: nn.Module, base: Base) -> Refusal:
    text = first_line(error)
    tokens = getattr(config, "trainable_token_indices", None)
    if tokens and isinstance(error, IndexError):
        return Refusal(
            check="shape-mismatch",
            message=f"trainable_token_indices name rows that the base's vocabulary does not have: {text}",
            hint="name the base with the enlarged vocabulary, or save the adapter with save_embedding_layers=True",
            origin=Origin.CONFIG,
        )
    if "Unknown initialization" in text:
        return Refusal(
            check="config-invalid",
            message=f"adapter_config.json sets an initialisation that PEFT does not know: {text}",
            hint="it plays no part in a merge unless it names a part of the base (pissa, olora, corda): set it to "
            "true, or restore the adapter_config.json that was saved with the adapter",
            origin=Origin.CONFIG,
        )
    if "dropout probability" in text:
        return Refusal(
            check="config-invalid",
            message=f"adapter_config.json sets a dropout that PEFT refuses: {text}",
            hint="dropout plays no part in a merge: restore the adapter_config.json that was saved with the adapter",
            origin=Origin.CONFIG,
        )
    if "preprocess_corda" in text:
        return Refusal(
            check="not-mergeable",
            message=f"PEFT cannot load a CorDA adapter as it was trained: {text}",
            hint="convert it to plain LoRA on saving (path_initial_model_for_weight_conversion in save_pretrained); "
            "or, where the base less its first factors was saved, name that base and set init_lora_weights to true",
            origin=Origin.CONFIG,
        )
    if "not found in the base model" in text or "No modules were targeted" in text:
        return _no_targets(config, scratch)
    refusal = Refusal(
        check="not-mergeable",
        message=f"PEFT cannot put this {config.peft_type.value} adapter on base {base.facts.model}: {text}",
        hint="PEFT's own message says what is not supported; retrain with a supported setting, or serve it unmerged",
        origin=Origin.CONFIG,
    )
    return blamed_on(refusal, base, config.peft_type.value)

"""Lets PEFT add an adapter's layers to a scratch copy, and reuses it for adapters of the same config and tensor names.

In: a scratch of the base, PEFT's config of the adapter, what the preflight read. Out: PEFT's model, and the base's
names of the scratch's parameters, or `Refused`; for the next adapter, the same scratch copy as it was then, with new
factors. Knows no values of the adapter (steps 2 and 3 of load_adapter.py).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from merge_gate._internal.tensor_names import ADAPTER_PREFIX
from merge_gate.engine.adapter.peft_config import initialization_reads_base, initialization_writes_to_base, raised
from merge_gate.engine.adapter.places import Injected
from merge_gate.engine.base.loaded_base import Base, first_line, named_tensors
from merge_gate.engine.tensors.module_copies import tensors_of
from merge_gate.records.files import AdapterFiles
from merge_gate.records.refusals import Refused

# If adapters differ only in their values, PEFT's injection is most of the cost of a load. Half of that cost is first
# values (for DoRA also norms of the base's rows), which the load overwrites. So PEFT makes the factors on the meta
# device, without values.
#
# A template serves only adapters that leave it unchanged: every layer is merged in blocks, and nothing of the base is
# overwritten. Its factors are NaN before each load, so that no value of an earlier adapter can stay. What follows only
# from names and places is computed for the first adapter of a kind.
#
# Adapters that are merged in one pass are loaded at the same time, so each needs a template. Those after the first of a
# kind get a copy of it, which costs less than an injection.

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

DORA = (
    variants.DoraLinearVariant,
    variants.DoraEmbeddingVariant,
    variants.DoraConv1dVariant,
    variants.DoraConv2dVariant,
    variants.DoraConv3dVariant,
)
"""PEFT's variants for the layers of a DoRA."""


@dataclass(slots=True, kw_only=True)
class Template:
    """A reusable injection for adapters of one `kind`.

    `children` has the children of each module, which PEFT's unloading replaces. `base_names`, `tied_modules`, and
    `targeted` have the same meaning as in `Loaded`. `injected` is what the injection has left. `keys` maps each tensor
    that PEFT would save, by its name in the file, to its key in the model; None until the first adapter of the kind is
    loaded.
    """

    kind: object
    model: Any
    config: Any
    base_names: dict[tuple[int, str], str]
    tied_modules: dict[str, tuple[str, ...]]
    children: tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]
    injected: Injected
    keys: Mapping[str, str] | None = None
    targeted: tuple[str, ...] = ()

    def reset(self) -> None:
        """Restore the state after the injection, with NaN for the factors."""
        for module, children in self.children:
            module._modules.clear()
            module._modules.update(children)
        self.model.base_model.model.peft_config = self.model.peft_config
        for layer in self._layers():
            layer.merged_adapters.clear()
            for _, _, factor in parameters_of(layer):
                factor.data = torch.full_like(factor.data, torch.nan)  # its memory may be a file's (private_copies.py)
        self.injected = replace(self.injected, first=None)

    def duplicate(self) -> Template:
        """Another template for the same base, for an adapter that is loaded while this one is in use."""
        memo = tensors_of(self.model)
        model = copy.deepcopy(self.model, memo)
        made = replace(
            self,
            model=model,
            config=copy.deepcopy(self.config, memo),
            base_names={(id(memo[module]), attribute): name for (module, attribute), name in self.base_names.items()},
            children=tuple(
                (copy.deepcopy(module, memo), copy.deepcopy(children, memo)) for module, children in self.children
            ),
        )
        made.reset()
        return made

    def holds(self, keys: set[str]) -> bool:
        """Whether all of these keys of the model are factors of the adapter, and none is a tensor of the base."""
        own = {id(factor) for layer in self._layers() for _, _, factor in parameters_of(layer)}
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return all(id(named.get(key)) in own for key in keys)

    def _layers(self) -> list[Any]:
        return [module for module, _ in self.children if isinstance(module, BaseTunerLayer)]


def kind_of(files: AdapterFiles) -> object:
    """Adapters of one kind have the same config, and tensors of the same names, dtypes, and shapes."""
    return files.config.digest, files.tensors


def snapshot(model: nn.Module) -> tuple[tuple[nn.Module, dict[str, nn.Module | None]], ...]:
    """Every module of a model with its current children."""
    return tuple((module, dict(module._modules)) for module in model.modules())


def fill_blanks(model: nn.Module) -> bool:
    """Give NaN to the factors that PEFT has made without values, in PEFT's dtype and on its device.

    False if this injection cannot replace an injection with values: another tensor lacks values too, or a LoRA variant
    reads the values later.
    """
    filled: dict[nn.Parameter, nn.Parameter] = {}  # two layers may share a factor
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        held = next(layer.get_base_layer().parameters(), None)
        is_usual = all(type(variant) in DORA for variant in dict(getattr(layer, "lora_variant", {})).values())
        if held is None or (held.is_floating_point() and held.dtype not in _DTYPES) or not is_usual:
            return False
        for module, name, factor in parameters_of(layer):
            if factor.is_meta and factor not in filled:
                values = torch.full_like(factor, torch.nan, device=held.device)
                filled[factor] = nn.Parameter(values, requires_grad=factor.requires_grad)
            module._parameters[name] = filled.get(factor, factor)
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def parameters_of(layer: Any) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter of the adapter in a tuner layer, with the module that holds it and its name there."""
    held = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    modules = (module for container in held if isinstance(container, nn.Module) for module in container.modules())
    for module in modules:
        yield from ((module, name, tensor) for name, tensor in list(module._parameters.items()) if tensor is not None)


_UNDER_LAYERS = ("base_layer.weight", "token_adapter.base_layer.weight")
"""The names under which PEFT saves an enlarged embedding or head that has a LoRA or trained tokens."""


def fit_vocabulary(scratch: nn.Module, files: AdapterFiles, base: Base) -> bool:
    """Resize the embeddings to the rows that the file brings, as a user does before loading (peft#2290).

    False if the sizes are equal, or the file has no such rows.
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
            held = [*embedding.parameters(), *(head.parameters() if isinstance(head, nn.Module) else ())]
            with base.lazy.filled(held) if base.lazy is not None else contextlib.nullcontext():
                model.resize_token_embeddings(rows, mean_resizing=False)
            return True
    return False


def base_slots(scratch: nn.Module) -> tuple[dict[tuple[int, str], str], dict[str, tuple[str, ...]]]:
    """Names of the scratch copy's parameters before PEFT moves them; and the modules that share each tied tensor."""
    first: dict[int, str] = {id(tensor): name for name, _, tensor in named_tensors(scratch)}
    base_names: dict[tuple[int, str], str] = {}
    tied_modules: dict[str, list[str]] = {}
    for path, module in scratch.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                canonical = first[id(tensor)]
                base_names[id(module), name] = canonical
                tied_modules.setdefault(canonical, []).append(path)
    return base_names, {name: tuple(paths) for name, paths in tied_modules.items() if len(paths) > 1}


def leave_out_replaced(
    model: nn.Module,
    paths: Mapping[int, str],
    base_names: dict[tuple[int, str], str],
    tied_modules: dict[str, tuple[str, ...]],
) -> None:
    """Remove modules that a trained copy replaces from the modules whose shared tensor a merge changes.

    Their copy is a tensor of its own in the merged model. If the first module that shares the tensor is one of them,
    the tensor gets the name of the next module.

    Args:
        model: with the adapter's layers in place.
        paths: the modules of the scratch before that, by id.
        base_names: the first result of `base_slots`, which is changed in place.
        tied_modules: the second one, likewise.
    """
    replaced = {
        id(inner)
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for inner in wrapper.original_module.modules()
    }
    for name in list(tied_modules):
        holders = [key for key, held in base_names.items() if held == name]
        left = [key for key in holders if key[0] not in replaced]
        if not left or len(left) == len(holders):
            continue
        places = tuple(paths[module] for module, _ in left)
        if name.rpartition(".")[0] in places:
            tied_modules[name] = places
            continue
        other = f"{places[0]}.{left[0][1]}"
        base_names.update(dict.fromkeys(left, other))
        if len(places) > 1:
            tied_modules[other] = places


def base_tensors_in_file(
    model: nn.Module, base_names: Mapping[tuple[int, str], str], keys: Container[str]
) -> dict[str, str]:
    """The base's own parameters under the loaded `keys` of a PEFT model: each key, and the base's name."""
    named = {
        f"{path}.{attribute}": base_names.get((id(module), attribute), "")
        for path, module in model.named_modules()
        for attribute in module._parameters
    }
    return {key: name for key, name in named.items() if name and key in keys}


def inject(
    scratch: nn.Module, config: Any, base: Base, adapter_name: str, *, blank: bool = False, filled: bool = True
) -> Any:
    """Let PEFT put the adapter's layers on the scratch.

    Args:
        scratch: of the base.
        config: PEFT's.
        base: whose scratch it is.
        adapter_name: PEFT's name for the adapter.
        blank: leave the adapter's tensors without initial values (`Template`). That saves most of an injection, and
            for DoRA a product and a norm of every layer.
        filled: the weights of a lazy base have values while PEFT makes layers over them, if the method reads them.

    Raises:
        Refused: no such modules, or a layer that the method cannot adapt.
    """
    torch.manual_seed(0)
    model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
    try:
        if base.device.type != "cpu":
            _refuse_far_tokens(config, scratch)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
        is_read, private = filled and initialization_reads_base(config), initialization_writes_to_base(config)
        with (
            _filled_during(base, tuner, "_create_and_replace", argument="target", private=private)
            if is_read and not blank
            else contextlib.nullcontext(),
            _filled_during(base, AuxiliaryTrainingWrapper, "__init__", argument="module_to_save"),
            torch.device("meta") if blank else contextlib.nullcontext(),
        ):
            return model_class(scratch, config, adapter_name)
    except NoMatchingPeftModuleError as error:
        raise _no_targets(config, scratch) from error
    except (AssertionError, RuntimeError) as error:
        if _needs_gpu(config, error):
            raise Refused("loftq_without_gpu") from error
        if isinstance(error, AssertionError):  # a bug, of PEFT or of the gate
            raise
        raise _injection_failed(error, config, scratch, base) from error
    except (ImportError, ValueError, TypeError, NotImplementedError, KeyError, AttributeError, IndexError) as error:
        raise _injection_failed(error, config, scratch, base) from error


def _refuse_far_tokens(config: Any, scratch: nn.Module) -> None:
    """Raise a CPU's error for a token id beyond the embedding. On a GPU, PEFT's read would end the process."""
    given = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    tokens = [token for some in given.values() for token in some] if isinstance(given, dict) else given
    rows = max((module.num_embeddings for module in scratch.modules() if isinstance(module, nn.Embedding)), default=0)
    far = next((token for token in tokens if not -rows <= token < rows), None)
    if far is not None:
        raise IndexError(f"index {far} is out of bounds for dimension 0 with size {rows}")


@contextlib.contextmanager
def _filled_during(base: Base, owner: Any, name: str, *, argument: str, private: bool = False) -> Iterator[None]:
    """The module that a method of PEFT gets has values during the call: DoRA, for example, reads them.

    This only saves memory: a tensor that is read elsewhere is noticed, filled permanently, and loaded again. With
    `private`, PEFT also writes to these weights, so they get their own copies until the adapter is removed.
    """
    lazy, own = base.lazy, vars(owner).get(name) if owner is not None else None
    if lazy is None or own is None:
        yield
        return

    def with_values(*given: Any, **named: Any) -> Any:
        module = inspect.signature(own).bind(*given, **named).arguments[argument]
        held = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
        with lazy.filled(held):
            for tensor in held if private else ():
                tensor.data = tensor.data.clone()
            return own(*given, **named)

    setattr(owner, name, with_values)
    try:
        yield
    finally:
        setattr(owner, name, own)


_WITHOUT_TARGETS = ("not found in the base model", "No modules were targeted")
"""Texts of PEFT's errors about targets, which have no exception class of their own."""


def _no_targets(config: Any, scratch: nn.Module) -> Refused:
    targets, parameters = getattr(config, "target_modules", None), getattr(config, "target_parameters", None)
    if parameters and not targets:
        large = {name for name, parameter in scratch.named_parameters() if parameter.dim() > 1}
        ends = sorted({".".join(name.split(".")[-2:]) for name in large})
        return Refused("parameters_not_found", targets=tuple(sorted(parameters)), of_base=tuple(ends))
    leaves = sorted({name.rpartition(".")[2] for name, module in scratch.named_modules() if _is_leaf(module)})
    excluded, layers = getattr(config, "exclude_modules", None), getattr(config, "layers_to_transform", None)
    return Refused(
        "targets_not_found",
        targets=targets if isinstance(targets, str) else tuple(sorted(targets or ())),
        of_base=tuple(leaves),
        task_type=config.task_type,
        excluded=excluded if isinstance(excluded, str) else ", ".join(sorted(excluded or ())),
        layers=None if layers is None else str(layers).strip("[]"),
    )


def _needs_gpu(config: Any, error: Exception) -> bool:
    """Whether PEFT quantizes the base on each load of such an adapter, on CUDA or XPU only (utils/loftq_utils.py)."""
    scheme = str(getattr(config, "init_lora_weights", "")).lower()
    return scheme == "loftq" and any(word in str(error) for word in ("CUDA", "NVIDIA", "XPU"))


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False))


def _injection_failed(error: Exception, config: Any, scratch: nn.Module, base: Base) -> Refused:
    if any(words in first_line(error) for words in _WITHOUT_TARGETS):
        return _no_targets(config, scratch)
    return Refused("inject_raised", base=base.facts.model, **raised(error, config, base))


def targeted_modules(model: Any) -> tuple[str, ...]:
    """The base's names of the modules that carry the adapter: tuner layers and fully trained modules.

    A head that is tied to an embedding with trained tokens is not one of them, because the embedding has the tokens. A
    head whose trained copy is that of the embedding (`ensure_weight_tying`) is not one either.
    """
    targeted: list[str] = []
    trained_tensors: set[int] = set()  # ids of the tensors of trained copies so far
    outer = None
    for path, module in model.named_modules():
        if outer is not None and path.startswith(f"{outer}."):
            continue  # a module inside another one comes right after it
        trained = (
            {id(tensor) for tensor in module.modules_to_save.parameters()}
            if isinstance(module, ModulesToSaveWrapper)
            else set()
        )
        has_tied_tokens = getattr(getattr(module, "token_adapter", None), "tied_adapter", None) is not None
        if has_tied_tokens or (trained and trained <= trained_tensors):
            outer = path
        elif isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper, AuxiliaryTrainingWrapper)):
            targeted.append(path.removeprefix(ADAPTER_PREFIX))
            outer = path
        trained_tensors |= trained
    return tuple(targeted)

"""Why an adapter could not be loaded, merged, or judged: one record for each kind of fact.

The engine and the worker fill them in, and `judging/` makes findings of them. None of them contains a sentence, except
`NotJudged`, which has the message for an error of the gate itself.
"""

from __future__ import annotations

from enum import StrEnum

from merge_gate.records.files import Pattern
from merge_gate.records.terms import Origin, record


class Step(StrEnum):
    """What PEFT was doing when it raised an error."""

    CONFIG = "read adapter_config.json"
    INJECT = "put the adapter's layers on the base"
    LOAD = "load the adapter's tensors"
    ADD = "put a second adapter next to the first"
    COMBINE = "combine adapters"
    MERGE = "merge"


class Defect(StrEnum):
    """What PEFT is known to merge wrongly, or not at all. `judging/refused_merges.py` words each."""

    NO_WEIGHTS = "no-weights"
    X_LORA = "x-lora"
    ARROW = "arrow"
    LAYER_REPLICATION = "layer-replication"
    MERGED_TWICE = "merged-twice"
    TOKENS_WITHOUT_BIAS = "tokens-without-bias"
    OFT_CONVOLUTION = "oft-convolution"
    QUANTIZED_UNKNOWN = "quantized-unknown"
    QUANTIZED_RANDOM_PROJECTION = "quantized-random-projection"
    QUANTIZED_LORA_BIAS = "quantized-lora-bias"
    BONE = "bone"
    LOFTQ_WITHOUT_GPU = "loftq-without-gpu"


@record
class Caught:
    """An exception of a library. `kinds` are the names of its class and of those that it inherits from.

    `text` is the line of its message that says most, and `detail` more of the message, for telling errors apart.
    """

    kinds: tuple[str, ...]
    text: str
    detail: str = ""

    def is_a(self, *kinds: str) -> bool:
        return not set(kinds).isdisjoint(self.kinds)


# --- the adapter's files ---------------------------------------------------------------------------------------------


@record
class PatternRefused:
    """A regular expression of adapter_config.json is not valid, or did not end within `seconds` on `names` names.

    `problem` says why it is not valid; None for an endless one. `pattern` is None if none was being matched.
    """

    pattern: Pattern | None
    names: int
    seconds: float
    problem: str | None = None


@record
class UnknownMethod:
    """PEFT has no adapter type of this name; `known_as` is the same name as PEFT writes it, if there is one."""

    name: str
    peft: str
    known_as: str | None = None


@record
class IgnoredSettings:
    """Keys that adapter_config.json sets (`key=value`) and this release of PEFT ignores.

    Attributes:
        near: pairs of such a key and the key of PEFT's that it is probably a misspelling of, which is not set.
    """

    settings: tuple[str, ...]
    peft: str
    saved_by: str
    near: tuple[tuple[str, str], ...] = ()


@record
class TargetsNotFound:
    """PEFT found nothing to adapt.

    Attributes:
        targets: target_modules of adapter_config.json, as a text or as names.
        task_type: of adapter_config.json.
        excluded: exclude_modules, "" if there are none.
        layers: layers_to_transform, None if it is not set.
        of_base: the names of the base's layers.
    """

    targets: str | tuple[str, ...]
    of_base: tuple[str, ...]
    task_type: str | None = None
    excluded: str = ""
    layers: str | None = None


@record
class ParametersNotFound:
    """target_parameters match no parameter of the base; `of_base` are the ends of the names that it has."""

    targets: tuple[str, ...]
    of_base: tuple[str, ...]


@record
class TensorsMissing:
    """The file lacks tensors that PEFT loads; `trained_whole` is modules_to_save, if these tensors are its modules."""

    names: tuple[str, ...]
    trained_whole: str | None = None


@record
class TensorUnreadable:
    """torch cannot read a tensor as numbers: it is on the meta device, has such a dtype, or `text` is torch's reason.

    `name` is None if torch does not say which tensor it is.
    """

    name: str | None = None
    is_meta: bool = False
    dtype: str = ""
    text: str = ""


@record
class PickleUnreadable:
    """torch's restricted unpickler refuses the weights; `names` is what they would import, if it says so."""

    error: str
    names: str | None = None


@record
class ShapeClash:
    """A tensor has another shape than config and base need; `others` more tensors do not fit either.

    `trained_whole`: it replaces a tensor of the base. `of_tokens`: it has a row for each trained token.
    """

    name: str
    got: tuple[int, ...]
    expected: tuple[int, ...]
    others: int = 0
    trained_whole: bool = False
    of_tokens: bool = False


# --- the merge -------------------------------------------------------------------------------------------------------


@record
class PeftRaised:
    """PEFT raised an error.

    Attributes:
        step: what it was doing.
        error: the exception.
        method: PEFT's name of the adapter's type.
        trains_tokens: whether adapter_config.json sets trainable_token_indices.
        base: the base's name.
        quantization: how the base is quantized.
        is_incomplete: whether the base lacks parameters of its own class.
        combination: the members, and the method that combines them.
    """

    step: Step
    error: Caught
    method: str = ""
    trains_tokens: bool = False
    base: str = ""
    quantization: str = "none"
    is_incomplete: bool = False
    combination: tuple[tuple[str, ...], str] = ((), "")


@record
class KnownDefect:
    """PEFT merges the adapter wrongly, or not at all; `modules` are empty if that concerns the whole adapter.

    `method` is PEFT's name of the method.
    """

    defect: Defect
    method: str = ""
    modules: tuple[str, ...] = ()


@record
class OtherForward:
    """A layer of a class that does more than multiply by its weight: merged, it is off by `share` of the delta."""

    module: str
    class_name: str
    share: float


@record
class LayerLeftUnmerged:
    """PEFT's result still has a layer of the adapter."""

    module: str


@record
class ResultLacksTensors:
    """PEFT's result lacks tensors of the base. `in_wrapper`: it has trained modules that are still wrapped."""

    names: tuple[str, ...]
    in_wrapper: bool


# --- a combination of adapters ---------------------------------------------------------------------------------------


@record
class SettingLost:
    """PEFT's combination loses a setting of a member."""

    adapter: str
    setting: str


@record
class TensorUnweighted:
    """A member brings a tensor of the base whole, and PEFT's combination does not weight it."""

    adapter: str
    tensor: str


@record
class TwoVocabularies:
    """Members bring different values for rows of a tensor that the base lacks."""

    adapters: tuple[str, ...]
    tensor: str


@record
class ModulesLeftOut:
    """PEFT leaves modules that a member adapts out of the combination."""

    adapter: str
    modules: tuple[str, ...]


# --- the base --------------------------------------------------------------------------------------------------------


@record
class BaseRaised:
    """A library raised an error as it loaded the base, or its config.json if there is no `class_name`."""

    base: str
    error: Caught
    class_name: str = ""


@record
class RemoteCodeNeeded:
    """The base comes with code that the gate's config does not allow; `base` is "" if its config.json asks for it."""

    base: str = ""


@record
class BaseOfAnotherClass:
    """The base has none of the tensors of the class that the adapter asks for."""

    base: str
    class_name: str


@record
class AdapterNextToBase:
    """transformers loads an adapter that is in the base's directory."""

    base: str


@record
class QuantizationUnknown:
    """config.json declares a quantization that this release of transformers cannot load."""

    base: str
    method: str
    transformers: str


@record
class LoadedOtherwise:
    """The base was loaded in another quantization or dtype than the config asks for."""

    base: str
    class_name: str
    quantization: str
    asked_quantization: str
    dtype: str
    asked_dtype: str


@record
class StoredTensorsLeftOut:
    """A file of the base has tensors that belong to its weights and that the class does not load.

    `wrapped` are the ones of a model that PEFT had wrapped. `file` is None if it is not known which one has them.
    """

    base: str
    file: str | None
    names: tuple[str, ...]
    wrapped: tuple[str, ...]
    class_name: str


@record
class QuantizedWeightTorn:
    """A stored tensor of codes lacks tensors that its quantizer reads with it."""

    base: str
    file: str
    tensor: str
    dtype: str
    missing: tuple[str, ...]


@record
class CodesForNumbers:
    """Integers are stored for a parameter of floating point."""

    base: str
    file: str
    tensor: str
    dtype: str
    class_name: str


@record
class ParametersNotStored:
    """The base's files lack parameters of its own class; `read` are those files, `elsewhere` others that have some."""

    base: str
    class_name: str
    names: tuple[str, ...]
    read: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()


@record
class BaseShapeClash:
    """A tensor of the base's files has another shape than its class needs."""

    base: str
    class_name: str
    name: str
    got: tuple[int, ...]
    expected: tuple[int, ...]


# --- the run ---------------------------------------------------------------------------------------------------------


@record
class TensorWithoutValues:
    """A tensor that had to be measured is on the meta device."""

    name: str


@record
class NotMeasured:
    """A layer could not be measured."""

    module: str
    error: Caught


@record
class WorkerRaised:
    """An exception that no one expected, or a lack of memory. `in_import`: Python was importing a module."""

    error: Caught
    in_import: bool = False


@record
class NotJudged:
    """The gate itself could not judge an adapter, in the words of the error that says so."""

    message: str
    hint: str = ""
    origin: Origin = Origin.RUNTIME


Refusal = (
    PatternRefused
    | UnknownMethod
    | IgnoredSettings
    | TargetsNotFound
    | ParametersNotFound
    | TensorsMissing
    | TensorUnreadable
    | PickleUnreadable
    | ShapeClash
    | PeftRaised
    | KnownDefect
    | OtherForward
    | LayerLeftUnmerged
    | ResultLacksTensors
    | SettingLost
    | TensorUnweighted
    | TwoVocabularies
    | ModulesLeftOut
    | BaseRaised
    | RemoteCodeNeeded
    | BaseOfAnotherClass
    | AdapterNextToBase
    | QuantizationUnknown
    | LoadedOtherwise
    | StoredTensorsLeftOut
    | QuantizedWeightTorn
    | CodesForNumbers
    | ParametersNotStored
    | BaseShapeClash
    | TensorWithoutValues
    | NotMeasured
    | WorkerRaised
    | NotJudged
)

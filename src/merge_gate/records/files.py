"""The files of adapters and bases, and what they show without a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace

from merge_gate.records.config import AdapterSpec
from merge_gate.records.terms import Finding, ForwardMode, Likeness, record, reported

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
"""An adapter's files, as PEFT names them."""

MANIFEST_NAME, CARD_NAME = "merge-gate.json", "README.md"
"""The files of a published model that say what it was made of: for programs, and for people."""

EXPORT_NAME = "merge-gate-export.json"
"""The file of an exported adapter that says what it was made of."""


@record
class FileSpan:
    """The bytes from `start` up to `end` of a file, which is named relative to the base's directory."""

    file: str
    start: int
    end: int


@record
class FileIdentity:
    """Identifies a file, and changes when something writes to it (identity.py)."""

    name: str
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


@record
class BaseContent:
    """Digests of a base: `weights` covers its weight files, and `settings` the other files that are read."""

    weights: str
    settings: str


@record
class HashedFile:
    """One input file of an adapter or of a base. `path` is relative to the directory.

    `identity` is that of the open file that was hashed. It does not count when two records are compared.
    """

    path: str = reported("Relative to the directory of the adapter, base, or published model.")
    size_bytes: int = reported("Size in bytes.", key="bytes")
    sha256: str = reported("Digest of its bytes, hex.")
    identity: FileIdentity | None = field(default=None, compare=False)


@record
class StoredTensor:
    """A tensor as the header of a weights file describes it.

    `dtype` is safetensors' name for it (F32, BF16, …). `file` is relative to the base's directory, and empty for an
    adapter, which has one weights file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""


@record
class DeclaredQuantization:
    """What a base's files say about its quantization.

    Attributes:
        method: the declared `quant_method`, or "". bitsandbytes has `bitsandbytes_4bit` and `bitsandbytes_8bit`, as in
            transformers' own tables.
        file: config.json, or a file next to it that other programs read (quantize_config.json, hf_quant_config.json).
        key: the key in that file, "" if the whole file is the declaration.
        is_read: whether transformers reads this declaration.
        format: the format inside the method (`fmt`, `format`, `quant_algo`), if the file names one.
        block_size: rows and columns that share a scale, if the file says.
        ignored: names of modules, or patterns of names, that are not quantized.
    """

    method: str
    file: str
    key: str = ""
    is_read: bool = True
    format: str | None = None
    block_size: tuple[int, ...] | None = None
    ignored: tuple[str, ...] = ()


@record
class Fetched:
    """The files of a repository on the Hub, in its cache.

    Attributes:
        repo_id: the repository.
        commit: its commit.
        directory: the snapshot in the cache.
        sizes: the files that a run uses, with their bytes.
        chosen: the files in it that are used.
        streamable: the weight files that were not fetched, to be read by ranges.
        withheld: the repository's files that were not chosen (with their folders).
        is_listed: False if the repository's files are unknown: it could not be asked, and the cache has no list.
        absent: for a plan, the files that it left on the Hub.
        free_bytes: the free space on the disk of the cache; None if it is not known.
    """

    repo_id: str
    commit: str
    directory: str
    sizes: Mapping[str, int] = field(hash=False)
    chosen: tuple[str, ...] = ()
    streamable: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()
    is_listed: bool = True
    absent: tuple[str, ...] = ()
    free_bytes: int | None = None


@record
class BaseFiles:
    """What a base's files say, read without torch (files/base_files.py).

    Attributes:
        directory: the base's directory.
        weights: the weight files that transformers loads, in its order, relative to the directory.
        weight_bytes: the size of these files together.
        tensors: every tensor in those files, in that order. The last of several with one name is the one that counts.
        index: the index that names these files.
        ghosts: names that the index lists, with the file that it names, which does not hold the tensor.
        unlisted: tensors in those files that the index does not list.
        quantization: what the files declare; None for a plain base.
        original: the unquantized base that the files name, if they name one.
        auto_dtype: what keeps the base from being loaded with dtype `auto`; None if nothing does.
        is_float32: whether dtype `auto` is float32, because config.json says so.
        config_dtypes: the dtypes that config.json names, for the whole model or for a part.
        findings: what keeps adapters from being judged on this base: `base-inconsistent`, `base-incomplete`,
            `base-format`. The first one is the cause.
        notes: what is worth reporting if every parameter of the loaded model has a source.
        is_streamed: whether the weight files in the directory are stubs, with headers and without data.
        on_hub: for a plan, what was left on the Hub. Only names and sizes are known then.
    """

    directory: str
    weights: tuple[str, ...] = ()
    weight_bytes: int = 0
    tensors: tuple[StoredTensor, ...] = ()
    index: str | None = None
    ghosts: tuple[tuple[str, str], ...] = ()
    unlisted: tuple[str, ...] = ()
    quantization: DeclaredQuantization | None = None
    original: str | None = None
    auto_dtype: Finding | None = None
    is_float32: bool = False
    config_dtypes: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    is_streamed: bool = False
    on_hub: Fetched | None = None


@record
class Snapshot:
    """The files behind the name of an adapter or a base.

    Attributes:
        name: the name as written.
        revision: the commit of a Hub id; None for a directory.
        withheld: the repository's files that were not fetched (with their folders).
        base_files: what the files of a base say; None for an adapter.
        fetched: what is known of a repository on the Hub; None for a directory.
    """

    name: str
    directory: str
    revision: str | None = None
    withheld: tuple[str, ...] = ()
    base_files: BaseFiles | None = None
    fetched: Fetched | None = None


@record
class Pattern:
    """A regular expression of an adapter's config: `text` is written at `place`, and PEFT compiles `expression`."""

    place: str
    text: str
    expression: str


@record
class AdapterConfig:
    """The content of adapter_config.json, read once (files/adapter_config.py). Only PEFT reads the file again.

    A value that is absent, empty or of a wrong type (which is a finding) is None or False. `digest` covers the whole
    content, and is empty if there is no file. `values` are the keys that are set, each with its value as JSON,
    shortened.
    """

    digest: str = ""
    keys: frozenset[str] = frozenset()
    values: tuple[tuple[str, str], ...] = ()
    patterns: tuple[Pattern, ...] = ()
    peft_type: str | None = None
    peft_version: str | None = None
    task_type: str | None = None
    base_name: str | None = None
    base_revision: str | None = None
    base_class: str | None = None
    r: int | None = None
    alpha: float | None = None
    lora_alpha: float | None = None
    projection_prng_key: int | None = None
    bias: str | None = None
    init_lora_weights: str | None = None
    lora_bias: bool = False
    save_projection: bool = True
    use_cayley_neumann: bool = False
    use_dora: bool = False
    use_rslora: bool = False


@record
class NamedBase:
    """The directory that adapter_config.json names, compared with the base (files/named_base.py).

    `named` and `used` are both `model_type`s, if these differ. `difference` says what else differs. `file` is a file
    next to the adapter that names the type; empty for the directory itself.
    """

    likeness: Likeness
    named: str = ""
    used: str = ""
    difference: str = ""
    file: str = ""


@record
class AdapterFiles:
    """What the preflight read of an adapter without torch.

    `tensors` is empty if nothing has read pickled weights, as in a check or a plan. `weights` is the file that PEFT
    will load, relative to `directory`, or None. `padding` are the modules that an export has filled with zeros.
    `on_hub` is, for a plan, what was left on the Hub: only the config is known then. `named_base` is None if the named
    base is no model in a directory here, or if there is no other base.
    """

    directory: str
    config: AdapterConfig = AdapterConfig()
    weights: str | None = None
    tensors: tuple[StoredTensor, ...] = ()
    files: tuple[HashedFile, ...] = ()
    findings: tuple[Finding, ...] = ()
    padding: frozenset[str] = frozenset()
    on_hub: Fetched | None = None
    named_base: NamedBase | None = None


@record
class Entry:
    """One adapter (or combination) on one base in one dtype, with the files that its names refer to.

    `problem` says why a name has no files.
    """

    spec: AdapterSpec
    dtype: str
    members: tuple[AdapterFiles, ...] = ()
    revision: str | None = None
    base: Snapshot | None = None
    problem: Finding | None = None

    @property
    def base_files(self) -> BaseFiles | None:
        """What the base's files say; None if nothing has read them."""
        return self.base.base_files if self.base is not None else None

    @property
    def no_forward(self) -> str:
        """Why base and adapter are not to be run, by the setting `forward`. Empty if they are."""
        if self.spec.forward is ForwardMode.OFF:
            return "forward is off"
        is_streamed = self.base_files is not None and self.base_files.is_streamed
        if is_streamed and self.spec.forward is ForwardMode.AUTO:
            return "the base is streamed, so it is run only with forward: required"
        return ""

    @property
    def files(self) -> AdapterFiles:
        """The files of all members together. An adapter that is no combination has one member."""
        if len(self.members) == 1:
            return self.members[0]
        first = self.members[0] if self.members else AdapterFiles(directory="")
        return replace(
            first,
            tensors=tuple(tensor for member in self.members for tensor in member.tensors),
            files=tuple(file for member in self.members for file in member.files),
            findings=tuple(finding for member in self.members for finding in member.findings),
        )

"""What is known of a model when it is published: the source of its card, its manifest, and its other files."""

from __future__ import annotations

from merge_gate.records.config import Config
from merge_gate.records.files import Entry, FileIdentity, StoredTensor
from merge_gate.records.report import AdapterReport, BaseReport, Environment
from merge_gate.records.terms import PRESERVE, record


@record
class PublicationFacts:
    """One model to publish.

    Attributes:
        entry: the adapter, its base, and their files.
        report: the verdict on the merge.
        base: the base as it was loaded, with the digest of its weights.
        base_identity: the files that the base was loaded from.
        environment: the versions and the device of the run.
        config: the run's configuration.
        dtype: `preserve`, or the dtype that all floating tensors were cast to.
        tensors: every tensor as it is written.
        base_tensors: every tensor of the base's own files.
        shard_limit_bytes: the limit on a shard's size; None keeps the base's files.
    """

    entry: Entry
    report: AdapterReport
    base: BaseReport
    base_identity: tuple[FileIdentity, ...]
    environment: Environment
    config: Config
    dtype: str
    tensors: tuple[StoredTensor, ...]
    base_tensors: tuple[StoredTensor, ...]
    shard_limit_bytes: int | None

    @property
    def is_dequantized(self) -> bool:
        """Whether the base's files are quantized, and the published tensors are not."""
        files = self.entry.base_files
        return self.dtype != PRESERVE and files is not None and files.quantization is not None

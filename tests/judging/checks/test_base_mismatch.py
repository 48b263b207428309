"""When base-mismatch fires, and what it says: its messages are in base-mismatch.txt."""

from __future__ import annotations

import dataclasses

from merge_gate.records.config import Expect
from merge_gate.records.terms import Origin, Severity
from tests.support.judging.cases import NAMED, Fire, base, evidence, files, spec
from tests.support.judging.every_check import EveryCheck


class TestBaseMismatch(EveryCheck):
    FIRES = (
        Fire(
            ("'acme/mistral'", "'./models/llama'"),
            Origin.CONFIG,
            files=files(config={"base_model_name_or_path": "acme/mistral"}),
            spec=spec(base=NAMED),
        ),
        Fire(
            ("'/home/alice/mistral'", "'./models/llama'"),
            Origin.CONFIG,
            files=files(config={"base_model_name_or_path": "/home/alice/mistral"}),
            spec=spec(base=NAMED),
            severity=Severity.NOTE,
        ),
        Fire(
            ("'unsloth/llama-bnb-4bit'", "'./models/llama'"),
            Origin.CONFIG,
            files=files(config={"base_model_name_or_path": "unsloth/llama-bnb-4bit"}),
            spec=spec(base=NAMED),
            severity=Severity.NOTE,
        ),
        Fire(
            ("'v1'", "'c0ffee'"),
            Origin.CONFIG,
            evidence(base=base(revision="c0ffee")),
            files(config={"base_model_name_or_path": "acme/llama", "revision": "v1"}),
            spec(base=NAMED),
        ),
        Fire(("260", "256"), Origin.CONFIG, evidence(resized=(256, 260)), severity=Severity.NOTE),
    )
    SITUATIONS = (
        (
            "a class that the base is not",
            (
                evidence(base=base(loaded_as="BertModel"), instead_of="BertForMaskedLM"),
                files(config={"task_type": "MASKED_LM"}),
            ),
        ),
        (
            "a revision of the base that the config does not name",
            (
                evidence(base=base(revision="c0ffee")),
                files(config={"base_model_name_or_path": "acme/llama", "revision": "v1"}),
            ),
        ),
        (
            "the revision that was asked for",
            (
                evidence(base=base(revision="c0ffee")),
                files(config={"base_model_name_or_path": "acme/llama", "revision": "c0ffee"}),
            ),
        ),
        (
            "a base whose name only begins like the one used",
            (evidence(), files(config={"base_model_name_or_path": "acme/llamaX", "revision": "main"})),
        ),
    )
    SILENT = ("the revision that was asked for",)
    QUIET = (
        (evidence(), files(config={"base_model_name_or_path": "acme/Llama"}), spec(base=NAMED)),
        (evidence(), files(config={"base_model_name_or_path": "C:\\models\\llama\\"}), spec(base=NAMED)),
        (evidence(), files(config={"base_model_name_or_path": "acme/mistral"}), spec()),
        (
            evidence(),
            files(config={"base_model_name_or_path": "acme/mistral"}),
            spec(base=NAMED, expect=Expect(base="acme/mistral")),
        ),
        (
            evidence(),
            files(config={"base_model_name_or_path": "Acme/Mistral"}),
            spec(base=dataclasses.replace(NAMED, names=("acme/phi", "acme/mistral"))),
        ),
        (evidence(), files(), spec(base=NAMED)),
        (
            evidence(base=base(revision="v1")),
            files(config={"base_model_name_or_path": "llama", "revision": "v1"}),
            spec(base=NAMED),
        ),
    )

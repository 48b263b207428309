"""When base-mismatch fires, and what it says: its messages are in base-mismatch.txt."""

import dataclasses

from merge_gate.records.config import Expect
from merge_gate.records.files import AdapterFiles
from merge_gate.records.terms import Severity
from tests.support.judging.cases import NAMED, Given, base, evidence, files, spec
from tests.support.judging.every_check import EveryCheck

ON_LLAMA = spec(base=NAMED)


def names(base_name: str, revision: str | None = None) -> AdapterFiles:
    return files(config={"base_model_name_or_path": base_name, "revision": revision})


class TestBaseMismatch(EveryCheck):
    FIRES = (
        Given(files=names("acme/mistral"), spec=ON_LLAMA),
        Given(files=names("/home/alice/mistral"), spec=ON_LLAMA, severity=Severity.NOTE),
        Given(files=names("unsloth/llama-bnb-4bit"), spec=ON_LLAMA, severity=Severity.NOTE),
        Given(evidence(base=base(revision="c0ffee")), names("acme/llama", "v1"), spec=ON_LLAMA),
        Given(evidence(resized=(256, 260)), severity=Severity.NOTE),
    )
    SITUATIONS = {
        "a class that the base is not": Given(
            evidence(base=base(loaded_as="BertModel"), instead_of="BertForMaskedLM"),
            files(config={"task_type": "MASKED_LM"}),
        ),
        "an encoder alone": Given(evidence(base=base(loaded_as="T5EncoderModel"), instead_of="T5Model")),
        "a revision of the base that the config does not name": Given(
            evidence(base=base(revision="c0ffee")), names("acme/llama", "v1"), ON_LLAMA
        ),
        "the revision that was asked for": Given(
            evidence(base=base(revision="c0ffee")), names("acme/llama", "c0ffee"), ON_LLAMA
        ),
        "a base whose name only begins like the one used": Given(files=names("acme/llamaX", "main"), spec=ON_LLAMA),
    }
    SILENT = ("the revision that was asked for",)
    QUIET = (
        Given(files=names("acme/Llama"), spec=ON_LLAMA),
        Given(files=names("C:\\models\\llama\\"), spec=ON_LLAMA),
        Given(files=names("acme/mistral")),
        Given(files=names("acme/mistral"), spec=spec(base=NAMED, expect=Expect(base="acme/mistral"))),
        Given(
            files=names("Acme/Mistral"), spec=spec(base=dataclasses.replace(NAMED, names=("acme/phi", "acme/mistral")))
        ),
        Given(spec=ON_LLAMA),
        Given(evidence(base=base(revision="v1")), names("llama", "v1"), spec=ON_LLAMA),
    )

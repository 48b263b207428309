"""What an adapter's check is given, and the cases in which each check fires."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from merge_gate.files.adapter_config import recorded
from merge_gate.judging.all_checks import judge_files, judge_merge
from merge_gate.judging.checks.check import Check
from merge_gate.judging.checks.table import CHECKS
from merge_gate.records.config import AdapterSpec, BaseSpec, Expect
from merge_gate.records.files import AdapterFiles, FileRecord, StoredTensor
from merge_gate.records.measured import (
    BaseFacts,
    Evidence,
    FileTensor,
    TensorMerge,
    TensorStats,
    UnreadLayer,
)
from merge_gate.records.refusals import Refusal
from merge_gate.records.terms import Finding, Origin, Quantization, Severity

MODULE = "model.layers.5.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
LORA_A = f"base_model.model.{MODULE}.lora_A.weight"
LORA_B = f"base_model.model.{MODULE}.lora_B.weight"
HALF_MAX = 65504.0
DIGEST = "9f2c5d1e" * 8


def tensor(name: str = WEIGHT, **changes: Any) -> TensorStats:
    usual = {"dtype": "float16", "shape": (8, 8), "numel": 64, "minimum": -1.0, "maximum": 1.0}
    return TensorStats(name=name, **(usual | changes))


def broken(name: str = WEIGHT, **counts: int) -> TensorStats:
    return tensor(name, first_index=(0, 7), **(counts or {"nan": 1}))


def merged(stats: TensorStats | None = None, **changes: Any) -> TensorMerge:
    usual = {"module": MODULE, "stats": stats or tensor(), "dtype_max": HALF_MAX, "changed": True}
    return TensorMerge(**(usual | changes))


def base(**changes: Any) -> BaseFacts:
    usual = {"model": "./base", "revision": None, "dtype": "float16", "quantization": Quantization.NONE}
    return BaseFacts(**(usual | {"parameters": 64} | changes))


def evidence(**changes: Any) -> Evidence:
    """A sound adapter of one module."""
    usual: dict[str, Any] = {
        "base": base(),
        "peft_type": "LORA",
        "file_tensors": (FileTensor(stats=tensor(LORA_A)), FileTensor(stats=tensor(LORA_B))),
        "targeted": (MODULE,),
        "merges": (merged(),),
        "parameters_checked": 64,
        "parameters_total": 64,
    }
    return Evidence(**(usual | changes))


def files(*, config: Mapping[str, Any] | None = None, **changes: Any) -> AdapterFiles:
    usual: dict[str, Any] = {
        "directory": "adapter",
        "config": recorded({"peft_type": "LORA", "r": 16, "lora_alpha": 32} | dict(config or {})),
        "files": (FileRecord(path="adapter_model.safetensors", size_bytes=8, sha256=DIGEST),),
    }
    return AdapterFiles(**(usual | changes))


def spec(**changes: Any) -> AdapterSpec:
    return AdapterSpec(
        **({"name": "a", "source": "./a", "base": BaseSpec(), "checks": (), "line": 1, "column": 1} | changes)
    )


def judge(spec: AdapterSpec, files: AdapterFiles, evidence: Evidence | None) -> tuple[Finding, ...]:
    """The findings of the phase that there is evidence for: of the merge, or of the files alone."""
    return judge_files(spec, files) if evidence is None else judge_merge(spec, files, evidence)


@dataclass(frozen=True)
class Fire:
    """One reason for which a check fires. The message has `names`: tensors, files and figures, but no sentence."""

    names: tuple[str, ...]
    origin: Origin
    evidence: Evidence | None = field(default_factory=evidence)
    files: AdapterFiles = field(default_factory=files)
    spec: AdapterSpec = field(default_factory=spec)
    severity: Severity | None = None
    places: Mapping[str, Any] = field(default_factory=dict)


def reason(kind: str, **fields: Any) -> Refusal:
    return Refusal(kind=kind, fields=fields)


def found_in_files(row: Check) -> Fire:
    return Fire((), row.origin, None, files(findings=(row.finding("what the preflight says", "do"),)))


REFUSALS: Mapping[str, Refusal] = {
    "base-incomplete": reason(
        "parameters_not_stored", base="./base", class_name="LlamaModel", names=(WEIGHT,), read=("a",)
    ),
    "base-inconsistent": reason(
        "base_shape_clash", base="./base", class_name="LlamaModel", name=WEIGHT, got=(2,), expected=(3,)
    ),
    "base-format": reason("quantization_unknown", base="./base", method="odd", transformers="5.0"),
    "config-invalid": reason("pattern_refused", pattern=None, names=9, seconds=1.0),
    "shape-mismatch": reason("shape_clash", name=LORA_B, got=(2,), expected=(3,)),
    "targets-not-found": reason("targets_not_found", targets=("query",), of_base=("q_proj",)),
    "not-mergeable": reason("other_forward", module=MODULE, class_name="Odd", share=0.5),
}


def refused(check: str, origin: Origin, **places: str) -> Fire:
    return Fire((), origin, evidence(refusal=REFUSALS[check], merges=()), places=places)


def unread(**changes: Any) -> UnreadLayer:
    return UnreadLayer(**({"module": "head.out_proj", "share": 2.5, "never_called": True, "in_logits": True} | changes))


def lossy(share: float, **changes: Any) -> TensorMerge:
    usual: dict[str, Any] = {"base_norm": 10.0, "delta_norm": 1.0, "lost_norm": share, "unchanged_fraction": 0.9}
    return merged(**(usual | changes))


LARGE = lossy(0.0, delta_norm=100.0)
"""A large delta, of which nothing is lost."""
NAMED = BaseSpec(model="/models/llama", label="./models/llama")
FOURIERFT = {"peft_type": "FOURIERFT"}
LOKR = {"peft_type": "LOKR", "base_model_name_or_path": None, "inference_mode": True, "task_type": None}
FIRES: dict[str, tuple[Fire, ...]] = {
    "base-incomplete": (
        refused("base-incomplete", Origin.BASE, module=MODULE, tensor=WEIGHT),
        Fire(
            ("./base is incomplete", "1 parameter of LlamaForCausalLM: model.norm.weight", "random values"),
            Origin.BASE,
            evidence(
                base=base(loaded_as="LlamaForCausalLM", incomplete=("model.norm.weight", "lm_head.weight")),
                initialized=("model.norm.weight",),
            ),
            places={"module": "model.norm", "tensor": "model.norm.weight"},
        ),
        Fire(
            ("LlamaForCausalLM: lm_head.weight",),
            Origin.BASE,
            evidence(base=base(loaded_as="LlamaForCausalLM", incomplete=("lm_head.weight",))),
            severity=Severity.NOTE,
            places={"module": "lm_head", "tensor": "lm_head.weight"},
        ),
    ),
    "base-inconsistent": (refused("base-inconsistent", Origin.BASE),),
    "base-format": (refused("base-format", Origin.BASE),),
    **{check: (found_in_files(CHECKS[check]),) for check in ("file-missing", "file-lfs-pointer", "file-corrupt")},
    "pickle-refused": (found_in_files(CHECKS["pickle-refused"]),),
    "config-invalid": (found_in_files(CHECKS["config-invalid"]), refused("config-invalid", Origin.CONFIG)),
    "config-unsafe": (found_in_files(CHECKS["config-unsafe"]),),
    "keys-missing": (
        Fire(
            (LORA_B,),
            Origin.ADAPTER,
            evidence(missing=(LORA_B,)),
            places={"module": MODULE, "tensor": LORA_B},
        ),
        Fire(("lora.0",), Origin.ADAPTER, evidence(missing=tuple(f"lora.{i}" for i in range(7)))),
    ),
    "keys-unexpected": (
        Fire(("optimizer.step",), Origin.ADAPTER, evidence(unexpected=("optimizer.step",))),
        Fire(
            (),
            Origin.ADAPTER,
            evidence(unnamed=("model.norm.weight",)),
            places={"module": "model.norm", "tensor": "model.norm.weight"},
            severity=Severity.WARNING,
        ),
        Fire(
            (LORA_A,),
            Origin.ADAPTER,
            files=files(tensors=(StoredTensor(name=LORA_A, dtype="C64", shape=(2, 2)),)),
            places={"module": MODULE, "tensor": LORA_A},
            severity=Severity.WARNING,
        ),
    ),
    "shape-mismatch": (refused("shape-mismatch", Origin.ADAPTER, module=MODULE, tensor=LORA_B),),
    "targets-not-found": (refused("targets-not-found", Origin.CONFIG),),
    "not-mergeable": (
        refused("not-mergeable", Origin.CONFIG, module=MODULE),
        Fire(
            ("head.out_proj",),
            Origin.CONFIG,
            evidence(peft_type="FOURIERFT", unread=(unread(),)),
            files(config=FOURIERFT),
            places={"module": "head.out_proj"},
        ),
        Fire(
            ("head.out_proj",),
            Origin.CONFIG,
            evidence(unread=(unread(),)),
            files(config={"init_lora_weights": "pissa"}),
        ),
        Fire(
            (),
            Origin.CONFIG,
            evidence(peft_type="FOURIERFT", unread=(unread(share=0.5, in_logits=False), unread(never_called=False))),
            files(config=FOURIERFT),
            severity=Severity.WARNING,
        ),
        Fire(
            (),
            Origin.CONFIG,
            evidence(peft_type="FOURIERFT", unread=(unread(share=2.0**-8),)),
            files(config=FOURIERFT),
            severity=Severity.WARNING,
        ),
        Fire(
            (),
            Origin.CONFIG,
            evidence(unread=(unread(),)),
            files(config={"init_lora_weights": False}),
            severity=Severity.WARNING,
        ),
    ),
    "base-mismatch": (
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
    ),
    "expectation-failed": (
        Fire(("expect.r", "8", "16"), Origin.CONFIG, spec=spec(expect=Expect(r=8))),
        Fire(("expect.lora_alpha", "64", "32"), Origin.CONFIG, spec=spec(expect=Expect(lora_alpha=64.0))),
        Fire(("expect.peft_type", "'LOHA'", "'LORA'"), Origin.CONFIG, spec=spec(expect=Expect(peft_type="LOHA"))),
        Fire(("expect.base", "'acme/x'"), Origin.CONFIG, spec=spec(expect=Expect(base="acme/x"))),
        Fire(
            ("adapter_model.safetensors", "0" * 64, DIGEST),
            Origin.CONFIG,
            spec=spec(expect=Expect(sha256=(("adapter_model.safetensors", "0" * 64),))),
        ),
        Fire(("gone.bin",), Origin.CONFIG, spec=spec(expect=Expect(sha256=(("gone.bin", DIGEST),)))),
    ),
    "base-nonfinite": (
        Fire(
            ("./base", "model.norm.weight"),
            Origin.BASE,
            evidence(base=base(nonfinite=(broken("model.norm.weight"),))),
            places={"module": "model.norm", "tensor": "model.norm.weight", "nan": 1, "first_index": (0, 7)},
        ),
        Fire(
            ("./base", "lm_head.weight"),
            Origin.BASE,
            evidence(base=base(nonfinite=(broken("lm_head.weight"),)), replaced_nonfinite=("lm_head.weight",)),
            severity=Severity.WARNING,
        ),
        Fire(
            ("./base", "lm_head.weight.absmax"),
            Origin.BASE,
            evidence(base=base(nonfinite=(broken("lm_head.weight.absmax"),)), replaced_nonfinite=("lm_head.weight",)),
            severity=Severity.WARNING,
        ),
    ),
    "adapter-nonfinite": (
        Fire(
            (LORA_B,),
            Origin.ADAPTER,
            evidence(file_tensors=(FileTensor(stats=broken(LORA_B, neginf=2)),)),
            places={"module": MODULE, "tensor": LORA_B, "neginf": 2, "numel": 64},
        ),
        Fire(
            (LORA_B,),
            Origin.ADAPTER,
            evidence(file_tensors=(FileTensor(stats=broken(LORA_B, nan=64)),)),
        ),
        Fire(
            (LORA_B,),
            Origin.ADAPTER,
            evidence(file_tensors=(FileTensor(stats=broken(LORA_B), used=False),)),
            severity=Severity.WARNING,
        ),
    ),
    "merged-nonfinite": (
        Fire(
            (WEIGHT, "float16"),
            Origin.MERGE,
            evidence(merges=(merged(broken(posinf=3)),)),
            places={"module": MODULE, "tensor": WEIGHT, "posinf": 3},
        ),
        Fire((WEIGHT,), Origin.MERGE, evidence(merges=(merged(broken()),))),
    ),
    "no-effect": (
        Fire((), Origin.ADAPTER, evidence(merges=(merged(changed=False),))),
        Fire(
            (),
            Origin.ADAPTER,
            evidence(
                merges=(merged(changed=False),),
                file_tensors=(
                    FileTensor(stats=tensor(LORA_A)),
                    FileTensor(stats=tensor(LORA_B, minimum=0.0, maximum=0.0)),
                ),
            ),
        ),
        Fire(
            ("KaSA",),
            Origin.ADAPTER,
            evidence(
                file_tensors=(
                    FileTensor(stats=tensor(LORA_A)),
                    FileTensor(stats=tensor(LORA_B, minimum=0.0, maximum=0.0)),
                ),
            ),
            files(config={"kasa_config": {"beta": 1e-4}}),
        ),
        Fire(
            (),
            Origin.ADAPTER,
            evidence(merges=(merged(changed=False),)),
            files(config={"lora_alpha": 0}),
        ),
        Fire(
            ("layers.6",),
            Origin.ADAPTER,
            evidence(targeted=(MODULE, "layers.6"), merges=(merged(), merged(module="layers.6", changed=False))),
            severity=Severity.WARNING,
            places={"module": "layers.6"},
        ),
        Fire(
            ("layers.5",),
            Origin.ADAPTER,
            evidence(
                targeted=(MODULE, "head"),
                merges=(merged(), merged(tensor("head.weight"), module="head")),
                file_tensors=(
                    FileTensor(stats=tensor(LORA_A)),
                    FileTensor(stats=tensor(LORA_B, minimum=0.0, maximum=0.0)),
                ),
            ),
            files(config={"kasa_config": {"beta": 1e-4}}),
            severity=Severity.WARNING,
        ),
    ),
    "rounding-loss": (
        Fire(
            ("81.0%", "float16", "90.0%"),
            Origin.MERGE,
            evidence(merges=(lossy(0.81),)),
            places={"tensor": WEIGHT},
        ),
        Fire(
            ("(90.0%)",),
            Origin.MERGE,
            evidence(merges=(lossy(0.9), lossy(0.6), LARGE)),
        ),
    ),
    "headroom": (
        Fire(
            (WEIGHT, "60,000", "65,504", "92%"),
            Origin.MERGE,
            evidence(merges=(merged(tensor(maximum=60000.0)),)),
            places={"module": MODULE, "tensor": WEIGHT},
        ),
        Fire(
            (MODULE, "safe_merge=True"),
            Origin.MERGE,
            evidence(refused_by_safe_merge=(MODULE,)),
            places={"module": MODULE},
        ),
    ),
    "delta-norm": (
        Fire(
            (WEIGHT,),
            Origin.MERGE,
            evidence(merges=(merged(base_norm=1.0, delta_norm=20.0),)),
            places={"module": MODULE, "tensor": WEIGHT},
        ),
        Fire(
            (),
            Origin.MERGE,
            evidence(merges=(merged(tensor(minimum=0.0, maximum=0.0), base_norm=1.0, delta_norm=1.0),)),
            places={"module": MODULE, "tensor": WEIGHT},
        ),
        Fire(
            (),
            Origin.MERGE,
            evidence(merges=(merged(tensor(minimum=-1e-8, maximum=1e-8), base_norm=1.0, delta_norm=1.0),)),
        ),
        Fire(
            (),
            Origin.ADAPTER,
            evidence(file_tensors=(FileTensor(stats=tensor(LORA_A, minimum=0.0, maximum=0.0)),), merges=(merged(),)),
            places={"tensor": LORA_A},
        ),
    ),
    "untrained-tensors": (
        Fire(
            (),
            Origin.ADAPTER,
            evidence(base=base(loaded_as="BertModel"), initialized=("pooler.dense.bias",)),
            places={"module": "pooler.dense", "tensor": "pooler.dense.bias"},
        ),
        Fire(
            (),
            Origin.ADAPTER,
            evidence(base=base(loaded_as="BertModel"), initialized=("pooler.dense.bias", "pooler.dense.weight")),
        ),
    ),
    "not-reproducible": (
        Fire((), Origin.CONFIG, files=files(config={"peft_type": "ADAMSS"})),
        Fire((), Origin.CONFIG, files=files(config={"peft_type": "FROD"})),
        Fire(("'pissa_niter_4'",), Origin.CONFIG, files=files(config={"init_lora_weights": "pissa_niter_4"})),
    ),
    "meaning-changed": (
        Fire((), Origin.CONFIG, files=files(config=LOKR | {"r": 2, "alpha": 4})),
    ),
    "tied-weights": (
        Fire(
            ("lm_head.weight", "embed_tokens"),
            Origin.CONFIG,
            evidence(tied=(("lm_head.weight", "model.embed_tokens"),)),
            places={"module": "lm_head", "tensor": "lm_head.weight"},
        ),
    ),
}  # fmt: skip
ALL = [pytest.param(check, fire, id=f"{check}-{i}") for check, fires in FIRES.items() for i, fire in enumerate(fires)]

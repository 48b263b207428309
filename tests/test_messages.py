"""What a stranger reads at two in the morning: what is wrong, where, whose fault it is, and what to do.

Each row is an adapter as the world has them, a real layout of files, and the words that its report must have.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from merge_gate.config.load_config import load_config
from merge_gate.records.options import RunOptions
from merge_gate.records.terms import Origin, Severity, Verdict
from merge_gate.run.flow import run_gate
from tests.support.faults import configure, edit, halve, overwrite, remove, rename, save_twice
from tests.support.models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_tensors

if TYPE_CHECKING:
    from merge_gate.records.report import AdapterReport
    from merge_gate.records.terms import Finding
    from tests.support.models import Shelf
    from tests.support.wording import Wording

CORPUS = Path(__file__).parent / "corpus"
PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class Row:
    """`source` is a variant of tests.support.models, a directory of the corpus, or empty; `break_` edits its copy.

    `base` names one of tests.support.models or, with a slash, of the corpus; None leaves it to the adapter. The
    message has the names in `says`, and its hint those in `hint`, in that order.
    """

    name: str
    check: str
    says: tuple[str, ...]
    hint: tuple[str, ...]
    source: str = "plain"
    break_: Callable[[Path], None] = lambda _: None
    base: str | None = "llama"
    verdict: Verdict = Verdict.FAILED
    origin: Origin | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)


# --- layouts of other programs -------------------------------------------------------------------------------------


def files(**contents: Any) -> Callable[[Path], None]:
    """Nothing but these files; names are written with __ for a dot. Tensors by shapes, JSON, or bytes."""

    def make(directory: Path) -> None:
        for path in directory.iterdir():
            path.unlink()
        for name, content in contents.items():
            write(directory / name.replace("__", "."), content)

    return make


def write(path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif all(isinstance(shape, tuple) for shape in content.values()):
        save_file({name: torch.ones(shape) for name, shape in content.items()}, path)
    else:
        path.write_text(json.dumps(content))


def tensors(content: Mapping[str, tuple[int, ...]]) -> Callable[[Path], None]:
    """Another program's tensors under PEFT's name, beside PEFT's config."""
    return lambda directory: write(directory / ADAPTER_WEIGHTS, dict(content))


def windows(directory: Path) -> None:
    """What Git's autocrlf does to a file that it takes for text."""
    path = directory / ADAPTER_WEIGHTS
    write(path, {f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{side}.weight": (64, 64) for side in "AB"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096].replace(b"\n", b"\r\n") + bytes(range(256)).replace(b"\n", b"\r\n") * 16)


def renamed_copy(directory: Path) -> None:
    (directory / ADAPTER_WEIGHTS).rename(directory / f"Copy of {ADAPTER_WEIGHTS}")


def split(directory: Path) -> None:
    (directory / ADAPTER_WEIGHTS).rename(directory / "adapter_model-00001-of-00002.safetensors")


def torch_saved(directory: Path) -> None:
    content = {name: tensor.clone() for name, tensor in read_tensors(directory).items()}
    torch.save(content, directory / ADAPTER_WEIGHTS)


def in_a_checkpoint(directory: Path) -> None:
    (directory / "checkpoint-40").mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (directory / name).rename(directory / "checkpoint-40" / name)


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
UNET = {f"unet.{ATTENTION}.lora_A.weight": (4, 8), f"unet.{ATTENTION}.lora_B.weight": (8, 4)}
FLUX = {f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight": (4, 4) for side in "AB"}
KOHYA = {f"lora_unet_{ATTENTION.replace('.', '_')}.{part}": (4, 4) for part in ("lora_down.weight", "lora_up.weight")}
MLX = {f"model.layers.0.self_attn.q_proj.lora_{side}": (4, 4) for side in "ab"}
MLX_CONFIG = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}, "num_layers": 16}
ADAPTER_HUB = {"bert.encoder.layer.0.output.adapters.sst.adapter_down.0.weight": (4, 8)}
ADAPTER_HUB_CONFIG = {"config": {"reduction_factor": 16}, "config_id": "9076f36a", "model_class": "BertModel"}
GGUF = b"GGUF\x03\x00\x00\x00" + bytes(64)
DIFFUSERS = ("diffusers", "pipe.load_lora_weights(DIRECTORY)", "pipe.fuse_lora(safe_fusing=True)")
MLX_HINT = ("MLX",)
HUB_HINT = ("adapters.init(model)", "model.merge_adapter(name)")
NEITHER = ()


def other_formats() -> tuple[Row, ...]:
    file = Origin.FILE
    missing, config = "file-missing", "config-invalid"
    both_mlx = files(adapter_config__json=MLX_CONFIG, adapters__safetensors=MLX)
    both_hub = files(adapter_config__json=ADAPTER_HUB_CONFIG, pytorch_adapter__bin=b"PK", head_config__json=b"{}")
    kohya = ("kohya", "ComfyUI", "pipe.load_lora_weights(FILE)", "adapter_model.safetensors")
    gguf = ("llama.cpp",)
    lost = ()
    return (
        Row(name="unet", check=missing, says=NEITHER, hint=DIFFUSERS, origin=file,
            break_=files(pytorch_lora_weights__safetensors=UNET)),
        Row(name="transformer", check=missing, says=NEITHER, hint=DIFFUSERS, origin=file,
            break_=files(pytorch_lora_weights__safetensors=FLUX)),
        Row(name="kohya", check=missing, says=NEITHER, hint=kohya, break_=files(style__safetensors=KOHYA)),
        Row(name="gguf", check=missing, says=NEITHER, hint=gguf, break_=files(lora__gguf=GGUF)),
        Row(name="mlx", check=config, says=("peft_type",), hint=MLX_HINT, break_=both_mlx),
        Row(name="mlx-weights", check=missing, says=(), hint=MLX_HINT, break_=both_mlx),
        Row(name="adapter-hub", check=config, says=("peft_type",), hint=HUB_HINT, break_=both_hub),
        Row(name="adapter-hub-weights", check=missing, says=(), hint=HUB_HINT, break_=both_hub),
        Row(name="merged", check=missing, says=NEITHER, hint=("model",),
            break_=files(config__json={"model_type": "llama"}, model__safetensors=UNET)),
        Row(name="unet-inside", check="keys-missing", says=lost, hint=DIFFUSERS, break_=tensors(UNET)),
        Row(name="transformer-inside", check="keys-missing", says=lost, hint=DIFFUSERS, break_=tensors(FLUX)),
        Row(name="kohya-inside", check="keys-missing", says=lost, hint=("kohya", "convert_sd_adapter_to_peft.py"),
            break_=tensors(KOHYA)),
        Row(name="mlx-inside", check="keys-missing", says=lost, hint=MLX_HINT, break_=tensors(MLX)),
        Row(name="adapter-hub-inside", check="keys-missing", says=lost, hint=HUB_HINT, break_=tensors(ADAPTER_HUB)),
        Row(name="gguf-inside", check="file-corrupt", says=("GGUF",), hint=gguf,
            break_=overwrite(GGUF)),
    )  # fmt: skip


def files_gone_wrong() -> tuple[Row, ...]:
    page = b"<!DOCTYPE html><html>Sign in</html>"
    return (
        Row(name="copy", check="file-missing", says=(),
            hint=("rename",), break_=renamed_copy),
        Row(name="split", check="file-missing", says=("-of-00002",),
            hint=("sharded",), break_=split),
        Row(name="neither", check="file-missing", says=(*NEITHER, "'README.md'"),
            hint=(), break_=files(README__md=b"# A model")),
        Row(name="checkpoint", check="file-missing", says=NEITHER, hint=("'checkpoint-40'",),
            break_=in_a_checkpoint),
        Row(name="no-config", check="file-missing", says=(ADAPTER_WEIGHTS,),
            hint=("save_pretrained",), break_=remove(ADAPTER_CONFIG)),
        Row(name="line-ends", check="file-corrupt", says=("CR",),
            hint=(".gitattributes",), break_=windows),
        Row(name="page", check="file-corrupt", says=("HTML",), hint=("token",),
            break_=overwrite(page)),
        Row(name="torch-save", check="file-corrupt", says=("zip",), hint=("adapter_model.bin", "allow-pickle"),
            break_=torch_saved),
    )  # fmt: skip


def of_other_releases() -> tuple[Row, ...]:
    llama, config = "corpus/llama", Origin.CONFIG
    newer = configure(frobnicate=3, peft_version="0.99.0")
    return (
        Row(name="bone", source="0.15.2/bone", base=llama, check="not-mergeable", origin=config,
            says=("MiSS",), hint=("convert-bone-to-miss.py",)),
        Row(name="old-oft", source="0.9.0/oft", base=llama, check="not-mergeable", origin=config,
            says=("OFT", "0.14.0"),
            hint=()),
        Row(name="biases-lost", source="0.20.0/lora-bias-only", base=llama, check="keys-missing", origin=Origin.ADAPTER,
            says=(),
            hint=()),
        Row(name="biases-renamed", source="0.3.0/lora-bias-all", base=llama, check="keys-missing",
            says=(),
            hint=("rename",)),
        Row(name="lokr", source="0.6.2/lokr", base=llama, check="meaning-changed", verdict=Verdict.PASSED,
            says=("0.13", "0.14"),
            hint=()),
        Row(name="newer", check="not-judged", says=("frobnicate=3",), verdict=Verdict.ERROR,
            hint=("0.99.0",), break_=newer),
        Row(name="unknown-key", check="config-invalid", says=("frobnicate=3",), origin=config,
            hint=(),
            break_=configure(frobnicate=3)),
        Row(name="unknown-type", check="not-judged", says=("'NEWLORA'",),
            verdict=Verdict.ERROR, hint=("peft_type",), break_=configure(peft_type="NEWLORA")),
        Row(name="small-letters", check="not-judged", says=(),
            verdict=Verdict.ERROR, hint=("'LORA'",), break_=configure(peft_type="lora")),
        Row(name="copies-differ", source="modules-to-save", check="keys-unexpected", break_=save_twice(0.5),
            says=("lm_head.modules_to_save.weight",),
            hint=("twice",)),
    )  # fmt: skip


def of_machines_without_a_gpu() -> tuple[Row, ...]:
    loftq = configure(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    row = Row(name="loftq", check="not-judged", says=("'loftq'",), hint=("init_lora_weights",), verdict=Verdict.ERROR,
              break_=loftq)  # fmt: skip
    return () if torch.cuda.is_available() else (row,)


def adapter_and_base() -> tuple[Row, ...]:
    prefix = rename(PREFIX, PREFIX * 3)
    here = "/home/me/runs/llama-tuned"
    bare = configure(task_type="SEQ_CLS")
    return (
        Row(name="head-saved-instead", source="classifier", base="bert-classifier", check="targets-not-found",
            says=("SEQ_CLS",),
            hint=(), origin=Origin.CONFIG,
            break_=configure(target_modules=["classifier"])),
        Row(name="no-such-layer", check="targets-not-found", origin=Origin.CONFIG,
            says=("q_proj",),
            hint=(),
            break_=configure(target_modules=["query_key_value"])),
        Row(name="all-excluded", check="targets-not-found", origin=Origin.CONFIG,
            says=("q_proj", "exclude_modules"),
            hint=("exclude_modules",),
            break_=configure(target_modules=["q_proj", "v_proj"], exclude_modules=["q_proj", "v_proj"])),
        Row(name="regex-of-names", check="targets-not-found", origin=Origin.CONFIG,
            says=("'q_proj, v_proj'",),
            hint=("target_modules",), break_=configure(target_modules="q_proj, v_proj")),
        Row(name="regexes-in-a-list", check="targets-not-found", origin=Origin.CONFIG,
            says=("'.*q_proj'",),
            hint=("target_modules",), break_=configure(target_modules=[".*q_proj"])),
        Row(name="no-such-number", check="targets-not-found", origin=Origin.CONFIG,
            says=("layers_to_transform", "7"),
            hint=("layers_to_transform",),
            break_=configure(layers_to_transform=[7])),
        Row(name="no-targets", check="targets-not-found", says=("target_modules", "target_parameters"),
            hint=(), break_=configure(target_modules=[]), origin=Origin.CONFIG),
        Row(name="head-of-another-vocabulary", source="modules-to-save", check="shape-mismatch",
            says=("[32, 32]", "[64, 32]"), break_=edit(halve("lm_head")),
            hint=(), origin=Origin.ADAPTER),
        Row(name="rank-of-one-layer", source="patterns", check="shape-mismatch", origin=Origin.ADAPTER,
            says=("[2, 32]", "[4, 32]", "; 3 "), break_=configure(rank_pattern={}),
            hint=("rank_pattern",)),
        Row(name="alpha-of-nothing", check="no-effect", says=("lora_alpha",),
            hint=("lora_alpha",), break_=configure(lora_alpha=0)),
        Row(name="unknown-initialisation", check="config-invalid", origin=Origin.CONFIG,
            says=("'PiSSA'",), hint=(),
            break_=configure(init_lora_weights="PiSSA")),
        Row(name="corda", check="not-mergeable", origin=Origin.CONFIG,
            says=("preprocess_corda",),
            hint=("path_initial_model_for_weight_conversion",),
            break_=configure(init_lora_weights="corda")),
        Row(name="wrapped-thrice", check="keys-missing", says=(),
            hint=("get_peft_model",),
            break_=prefix),
        Row(name="other-head", source="feature-extraction", base="bert-classifier", check="base-mismatch",
            says=("SEQ_CLS", "BertForSequenceClassification", "BertModel"),
            hint=(), verdict=Verdict.PASSED, break_=bare),
        Row(name="path-of-the-trainer", base=None, check="not-judged", verdict=Verdict.ERROR,
            says=("/home/me/runs/llama-tuned",),
            hint=("base.model",),
            break_=configure(base_model_name_or_path=here)),
        Row(name="no-base", base=None, check="not-judged", verdict=Verdict.ERROR,
            says=(), hint=("--base",),
            break_=configure(base_model_name_or_path=None)),
        Row(name="code-of-the-base", base="with-code", check="not-judged", verdict=Verdict.ERROR,
            says=(),
            hint=("trust-remote-code",)),
        Row(name="rank", check="config-invalid", says=("lora_A",),
            hint=(), break_=configure(r=8), origin=Origin.CONFIG),
        Row(name="other-size", source="wide", check="shape-mismatch", origin=Origin.ADAPTER,
            says=("[4, 64]", "[4, 32]", "7"), hint=("rank_pattern",)),
    )  # fmt: skip


ROWS = (*other_formats(), *files_gone_wrong(), *of_other_releases(), *of_machines_without_a_gpu(), *adapter_and_base())


# --- one run -------------------------------------------------------------------------------------------------------


def lay_out(row: Row, shelf: Shelf, directory: Path) -> None:
    source = CORPUS / "adapters" / row.source if "/" in row.source else shelf.adapter(row.source)
    shutil.copytree(source, directory)
    row.break_(directory)


def base_of(row: Row, shelf: Shelf, root: Path) -> str:
    if row.base == "with-code":
        return str(root / "with-code")
    if str(row.base).startswith("corpus/"):
        return str(CORPUS / "bases" / str(row.base).partition("/")[2])
    return str(shelf.base(str(row.base)))


@pytest.fixture(scope="module")
def told(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, AdapterReport]:
    """All rows in one run."""
    root = tmp_path_factory.mktemp("messages")
    shutil.copytree(shelf.base("llama"), root / "with-code")
    code = {"model_type": "acme", "auto_map": {"AutoConfig": "acme.Config", "AutoModelForCausalLM": "acme.Model"}}
    (root / "with-code" / "config.json").write_text(json.dumps(code))
    entries = []
    for row in ROWS:
        lay_out(row, shelf, root / row.name)
        base = {"base": {"model": base_of(row, shelf, root)}} if row.base else {}
        entries.append({"name": row.name, "path": str(root / row.name)} | base)
    path = root / "gate.yml"
    path.write_text(json.dumps({"version": 1, "allow-pickle": True, "adapters": entries}))
    return {one.name: one for one in run_gate(load_config(str(path)), RunOptions(device="cpu")).adapters}


def finding_of(row: Row, report: AdapterReport) -> Finding:
    found = [finding for finding in report.findings if finding.check == row.check]
    assert found, [f"{finding.check}: {finding.message}" for finding in report.findings]
    return found[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_cause_is_found_and_named(row: Row, told: Mapping[str, AdapterReport], wording: Wording) -> None:
    report = told[row.name]
    assert report.verdict is row.verdict, [f"{one.check}: {one.message}" for one in report.findings]
    finding = finding_of(row, report)
    assert finding.severity is (Severity.WARNING if row.verdict is Verdict.PASSED else Severity.ERROR)
    assert row.origin in {None, finding.origin}
    for words, text in ((row.says, finding.message), (row.hint, finding.hint)):
        places = [text.find(word) for word in words]
        assert -1 not in places, (text, words)
        assert places == sorted(places), (text, words)
    if row.name == "no-base":  # the other sentences are in the goldens of tests/files and tests/judging
        wording(finding)


def test_no_adapter_has_a_message_twice(told: Mapping[str, AdapterReport]) -> None:
    for name, report in told.items():
        messages = [finding.message for finding in report.findings]
        assert len(messages) == len(set(messages)), name

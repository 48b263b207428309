"""PEFT's own test configurations: the gate beside PEFT's merge.

    python benchmarks/peft_configurations.py [--tests DIR] [--only TEXT] [--results FILE] [--write]

Downloads the source package of the installed PEFT from the package index (`--tests` names its tests/ directory where it
lies already), and holds every configuration of its tests in every dtype. Of their modules, only the tables and toys
are run. Models of the Hub are made from their configurations, as small; toys get a shell that can be saved and loaded.
One line for each that is not merged to PEFT's bits; `--results` keeps every outcome, and goes on where it was;
`--write` puts them into docs/evidence/truth.md. A quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.architectures import Merged, different_bits, judged, sentence, word
from merge_gate.records.terms import Severity, Verdict
from tests.support import methods
from tests.support.gating import Gate, Judgement, one_thread
from tests.support.generated import write_block
from tests.support.merged import kept

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "evidence/truth.md"
DTYPES = ("float32", "bfloat16")


def fetch(directory: Path) -> Path:
    """PEFT's tests/ directory, out of its source package."""
    wanted = f"peft=={version('peft')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*pip, "--dest", str(directory), wanted], check=True)
    (archive,) = directory.glob("peft-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz") / "tests"


MODULES = {
    "test_custom_models": None,
    "test_decoder_models": "AutoModelForCausalLM",
    "test_encoder_decoder_models": "AutoModelForSeq2SeqLM",
    "test_feature_extraction_models": "AutoModel",
    "test_seq_classifier": "AutoModelForSequenceClassification",
    "test_target_parameters": "AutoModelForCausalLM",
    "test_token_classification_qa": None,
    "test_vision_models": "AutoModelForImageClassification",
}
"""Modules with tables, and the class that their tests load a base with."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row: `model` is the name of its base, `loader` the class of transformers that loads it."""

    name: str
    model: str
    loader: str
    kind: type[Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out. `wrong` says where the gate and PEFT disagree; `reason` why there is nothing to gate."""

    name: str
    dtype: str
    reason: str | None = None
    peft: str = ""
    gate: str = ""
    said: str = ""
    one_nan: str = ""
    wrong: tuple[str, ...] = ()


# --- the tables ----------------------------------------------------------------------------------------------------


def read(tests: Path) -> list[Configuration]:
    """Every configuration that PEFT's tests name, on every model that they run it on."""
    found = [one for module in MODULES for one in _of_module(module, _run_tables(tests / f"{module}.py"))]
    return list({one.name: one for one in found}.values())


def _run_tables(path: Path) -> dict[str, Any]:
    """The names that imports, toy models and tables of one module define; its tests and fixtures are not run."""
    names: dict[str, Any] = {"__name__": f"peft_tests_{path.stem}"}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            with suppress(ImportError):  # packages that only the tests themselves need
                _execute(node, names, path)
        elif _is_model(node) or _is_table(node):
            _execute(node, names, path)
    return names


def _execute(node: ast.stmt, names: dict[str, Any], path: Path) -> None:
    exec(compile(ast.Module(body=[node], type_ignores=[]), str(path), "exec"), names)


def _is_model(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and not node.name.startswith("Test")


def _is_table(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name == "_all_configs"
    return isinstance(node, ast.Assign) and all(
        isinstance(target, ast.Name) and target.id.endswith(("CONFIGS", "TEST_CASES", "_TO_TEST"))
        for target in node.targets
    )


def _of_module(module: str, names: dict[str, Any]) -> Iterator[Configuration]:
    loader = MODULES[module]
    if module == "test_custom_models":
        register_toys(names["MockTransformerWrapper"])
        rows = ((case, model, "AutoModel", kind, settings) for case, model, kind, settings in names["TEST_CASES"])
    elif module == "test_target_parameters":
        rows = ((str(number), *row) for number, row in enumerate(_with_loader(names["ALL_CONFIGS"], loader)))
    elif module == "test_vision_models":
        rows = (
            (name, "tiny-random-ResNetForImageClassification", loader, type(config), config)
            for name, config in names["CONFIGS"].items()
        )
    elif module == "test_token_classification_qa":
        rows = (
            (f"{auto[20:]} {number}", model, auto, *config)
            for table, auto in TOKENS.items()
            for number, config in enumerate(names[table])
            for model in names["PEFT_TOKEN_CLS_MODELS_TO_TEST"]
        )
    else:
        models = next(names[name] for name in names if name.startswith("PEFT_") and name.endswith("_TO_TEST"))
        rows = (
            (str(number), model, loader, *config)
            for number, config in enumerate(names["ALL_CONFIGS"])
            for model in models
        )
    for case, model, auto, kind, settings in rows:
        last = model.rpartition("/")[2]
        yield Configuration(
            name=f"{module.removeprefix('test_')}: {case} {kind.__name__} on {last}",
            model=last,
            loader=auto,
            kind=kind,
            settings=settings,
        )


TOKENS = {"TOKEN_CLS_CONFIGS": "AutoModelForTokenClassification", "QA_CONFIGS": "AutoModelForQuestionAnswering"}


def _with_loader(rows: list[Any], loader: str | None) -> Iterator[tuple[Any, ...]]:
    return ((model, loader, kind, settings) for model, kind, settings in rows)


# --- bases ---------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER = SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": 8}
GPT = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
SEQUENCE = {"vocab_size": 128, "d_model": 32, "decoder_start_token_id": 0}
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | {"tie_word_embeddings": True}),
    "tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration", "T5Config", SEQUENCE | {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        SEQUENCE
        | dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
        | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
        | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    ),
    "tiny-random-BertModel": ("BertModel", "BertConfig", SIZES),
    "tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", SIZES),
    "tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", SIZES),
    "tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", SIZES),
    "tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", "BertConfig", SIZES),
    "tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", "RobertaConfig", SIZES),
    "tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification", "LlamaConfig", DECODER | {"num_labels": 1},
    ),
    "tiny-Llama4ForCausalLM": (
        "Llama4ForCausalLM", "Llama4TextConfig", DECODER | {"intermediate_size_mlp": 48, "num_local_experts": 4},
    ),
    "tiny-GptOssForCausalLM": (
        "GptOssForCausalLM", "GptOssConfig", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 3},
    ),
}  # fmt: skip
"""What stands for a model of the Hub: its class, its configuration's class and settings."""


class ShellConfig(transformers.PretrainedConfig):
    """Names the toy model."""

    model_type = "peft_toy"
    toy: str = ""


def register_toys(toys: Any) -> None:
    """Let transformers save and load PEFT's toy models, by their names, with their layers under their own names."""

    class Shell(transformers.PreTrainedModel):
        config_class = ShellConfig

        def __init__(self, config: ShellConfig) -> None:
            super().__init__(config)
            for name, module in toys.from_pretrained(config.toy).named_children():
                self.add_module(name, module)
            self.post_init()

    Shell.__module__ = "transformers_modules.toy"  # as the class of a base that brings its own code
    transformers.AutoConfig.register("peft_toy", ShellConfig, exist_ok=True)
    transformers.AutoModel.register(ShellConfig, Shell, exist_ok=True)


def make_base(one: Configuration, directory: Path) -> None:
    """Build and save; weights are spread, so that no row is idle."""
    torch.manual_seed(0)
    with methods.quiet():
        if one.model in BASES:
            model_class, config_class, settings = BASES[one.model]
            model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
        else:
            model = transformers.AutoModel.from_config(ShellConfig(toy=one.model))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(directory)


def load_base(one: Configuration, directory: Path, dtype: str) -> nn.Module:
    """As a user loads it."""
    torch.manual_seed(0)
    with methods.quiet():
        loader = getattr(transformers, one.loader)
        model: nn.Module = loader.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    return model


# --- a trial -------------------------------------------------------------------------------------------------------


def hold(one: Configuration, dtype: str, gate: Gate, work: Path) -> Outcome:
    """Make the adapter by PEFT, merge it by PEFT, gate it, and gate it once more with one NaN in it."""
    base, adapter = work / "bases" / one.model, work / "adapter"
    if not base.exists():
        make_base(one, base)
    try:
        case = methods.Case(name=one.name, base=one.model, config=lambda: _config(one))
        methods.save_adapter(case, load_base(one, base, "float32"), adapter, base_directory=base)
    except Exception as error:  # noqa: BLE001 - whatever PEFT says: there is no adapter to gate
        return Outcome(name=one.name, dtype=dtype, reason=sentence(error))
    with kept() as seen:
        judgement = judged(gate, base, adapter, dtype)
    user = user_merge(load_base(one, base, dtype), adapter)
    if not user.raised and different_bits(user, seen):
        # Where weights lie in a file decides how they are aligned in memory, and that the last bit of a product
        # (GLoRA's bias) or a decomposition (PSOFT), in PEFT's own hands too. A copy is aligned otherwise.
        user = user_merge(copy.deepcopy(load_base(one, base, dtype)), adapter)
    broken = work / "broken"
    methods.write_variant(adapter, broken, one_nan(methods.load_file(adapter / methods.WEIGHTS)))
    with_nan = judged(gate, base, broken, dtype)
    return Outcome(
        name=one.name,
        dtype=dtype,
        peft=user.raised or "merges",
        gate=word(judgement),
        said=next((finding.message for finding in judgement.findings if finding.check == judgement.cause), ""),
        one_nan=word(with_nan),
        wrong=tuple(
            _disagreements(
                user, judgement, seen, with_nan=with_nan, base=lambda: load_base(one, base, dtype), broken=broken
            )
        ),
    )


def _config(one: Configuration) -> Any:
    return one.settings if isinstance(one.settings, one.kind) else one.kind(**one.settings)


def user_merge(model: nn.Module, adapter: Path) -> Merged:
    """Load and merge as a user of PEFT does."""
    before = {name: tensor.clone() for name, tensor in methods.values(model).items()}
    try:
        torch.manual_seed(0)
        with methods.quiet(), torch.sparse.check_sparse_tensor_invariants():
            merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
            tensors = methods.values(merged)
    except Exception as error:  # noqa: BLE001 - what PEFT raises is what its user sees
        return Merged(before=before, raised=sentence(error))
    idle = all(methods.same_tensor(tensors[name], tensor) for name, tensor in before.items() if name in tensors)
    return Merged(before=before, tensors=tensors, raised="merges, and changes nothing" if idle else None)


def one_nan(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with one NaN, in the middle of the middle one; some methods save none."""
    names = sorted(name for name, tensor in state.items() if tensor.is_floating_point())
    changed = {name: tensor.clone() for name, tensor in state.items()}
    for name in names[len(names) // 2 :][:1]:
        flat = changed[name].view(-1)
        flat[flat.numel() // 2] = torch.nan
    return changed


def _disagreements(
    user: Merged, judgement: Judgement, seen: dict[str, Tensor], *, with_nan: Judgement, base: Any, broken: Path
) -> Iterator[str]:
    passes = judgement.verdict is Verdict.PASSED
    if passes == bool(user.raised):
        yield f"PEFT: {user.raised or 'merges'}; the gate: {word(judgement)}"
    if passes and not user.raised:
        yield from different_bits(user, seen)
    if with_nan.verdict is Verdict.PASSED and not _is_harmless(with_nan, user_merge(base(), broken)):
        yield "one NaN: passed"


def _is_harmless(judgement: Judgement, user: Merged) -> bool:
    """The merge does not read what is NaN: then nothing of it is in the merged model, and a warning tells."""
    warned = any(f.check == "adapter-nonfinite" and f.severity is Severity.WARNING for f in judgement.findings)
    return warned and not user.raised and not methods.nonfinite(user.tensors)


# --- the sweep -------------------------------------------------------------------------------------------------------


def run(configurations: list[Configuration], results: Path) -> list[Outcome]:
    """Hold each that has no line in the results yet."""
    done = read_results(results)
    with tempfile.TemporaryDirectory() as work, results.open("a", encoding="utf-8") as file:
        for number, (dtype, one) in enumerate(itertools.product(DTYPES, configurations), start=1):
            if (one.name, dtype) in done:
                continue
            outcome = done[one.name, dtype] = hold(one, dtype, Gate(), Path(work))
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            if outcome.wrong or outcome.gate != "passed":
                print(f"{number} {one.name} {dtype}: {say(outcome)}", flush=True)
            shutil.rmtree(Path(work, "adapter"), ignore_errors=True)
            shutil.rmtree(Path(work, "broken"), ignore_errors=True)
    return list(done.values())


def read_results(results: Path) -> dict[tuple[str, str], Outcome]:
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else ()
    outcomes = (Outcome(**line | {"wrong": tuple(line["wrong"])}) for line in map(json.loads, lines))
    return {(one.name, one.dtype): one for one in outcomes}


def say(outcome: Outcome) -> str:
    if outcome.reason:
        return f"not made: {outcome.reason}"
    if outcome.wrong:
        return f"WRONG: {'; '.join(outcome.wrong)} ({outcome.said[:200]})"
    return f"{outcome.gate} as PEFT: {outcome.peft[:120]}"


# --- docs/evidence/truth.md -----------------------------------------------------------------------------------------


TEXT = """{date}, {versions}, in {dtypes}. {names:,} configurations. PEFT makes an adapter for {made:,}.

| outcome | trials |
|---|---:|
| passed with PEFT's bits | {passed:,} |
| refused by both | {refused:,} |
| a verdict that differs from PEFT's | {wrong:,} |
| all | {trials:,} |

With one NaN in the file, {failed:,} of {trials:,} fail. The merge does not read the tensor in the others: a warning."""


def document(outcomes: list[Outcome]) -> str:
    made = [one for one in outcomes if not one.reason]
    refused = [one for one in made if one.gate != "passed" and not one.wrong]
    wrong = [one for one in made if one.wrong]
    return TEXT.format(
        date=datetime.now(UTC).date().isoformat(),
        versions=", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch")),
        dtypes=" and ".join(dict.fromkeys(one.dtype for one in made)),
        names=len({one.name for one in outcomes}),
        made=len({one.name for one in made}),
        trials=len(made),
        passed=len(made) - len(refused) - len(wrong),
        refused=len(refused),
        wrong=len(wrong),
        failed=sum(one.one_nan.startswith("failed") for one in made),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tests", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, one_thread():
        tests = asked.tests or fetch(Path(directory))
        configurations = [one for one in read(tests) if asked.only in one.name]
        outcomes = run(configurations, asked.results or Path(directory, "results.jsonl"))
    text = document(outcomes)
    print(text)
    if asked.write:
        write_block(DOCUMENT, "peft_configurations", text)


if __name__ == "__main__":
    main()

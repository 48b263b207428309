"""Each tensor of the merge is compared or named: new rows, heads that the base lacks, and parts that a file lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from merge_gate.config.from_arguments import config_of
from merge_gate.features.verify.verify_flow import Verification
from merge_gate.records.report import AdapterReport
from merge_gate.run.view import View
from merge_gate.worker.supervisor import WorkerSlot
from tests.support.models import Tensors
from tests.support.quantized.extensions import EMBEDDING, HEAD, ROWS, SCORE, Scene, made

Verify = Callable[..., AdapterReport]
EITHER = ("GGUF", "FP8", "GPTQ")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    scenes: dict[str, Scene] = {}

    def of(name: str) -> Scene:
        scenes[name] = scenes.get(name) or made(tmp_path_factory.mktemp(name), name)
        return scenes[name]

    return of


@pytest.fixture(scope="module")
def verify() -> Iterator[Verify]:
    with WorkerSlot() as worker:

        def run(scene: Scene, release: Path, *allowed: str) -> AdapterReport:
            config = config_of([str(scene.adapter)], base=str(scene.base))
            return Verification(config, str(release), view=View(), worker=worker, allowed=allowed).compare().adapters[0]

        yield run


def written(scene: Scene, path: Path, kind: str, tensors: Tensors) -> Path:
    return scene.gguf(path, tensors) if kind == "GGUF" else scene.directory(path, tensors, kind)


def new_rows(values: float | None) -> Callable[[Tensors], None]:
    """New rows with this value everywhere; random ones without it."""

    def change(tensors: Tensors) -> None:
        for name in (EMBEDDING, HEAD):
            rows = tensors[name][ROWS:]
            random = torch.randn(rows.shape, generator=torch.Generator().manual_seed(8))
            rows.copy_(random if values is None else torch.full_like(rows, values))

    return change


def one_new_row(tensors: Tensors) -> None:
    tensors[EMBEDDING][ROWS + 2] = tensors[EMBEDDING][ROWS + 1]


def one_value_everywhere(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(5.0)


def no_new_rows(tensors: Tensors) -> None:
    for name in (EMBEDDING, HEAD):
        tensors[name] = tensors[name][:ROWS].clone()


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def random_score(tensors: Tensors) -> None:
    tensors[SCORE] = 0.05 * torch.randn(tensors[SCORE].shape, generator=torch.Generator().manual_seed(8))


def head_of_the_embedding(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def with_doubled_embedding(tensors: Tensors) -> None:
    tensors[next(name for name in tensors if name.endswith("embed_tokens.weight"))] *= 2


def nothing(_tensors: Tensors) -> None:
    pass


DIRECTORIES = ("FP8", "GPTQ")
CASES = [
    *((kind, "tokens", change, cause, allowed) for kind in (*EITHER, "MLX") for change, cause, allowed in (
        (nothing, None, ""),
        (new_rows(0.0), "applied-in-part", ""),
        (new_rows(5.0), "unexplained", ""),
        (new_rows(None), "unexplained", ""),
        (one_new_row, "unexplained", ""),
        (one_value_everywhere, "unexplained", ""),
        (no_new_rows, "shape-changed", "shape-changed"),
    )),
    *((kind, "classifier", change, cause, allowed) for kind in DIRECTORIES for change, cause, allowed in (
        (nothing, None, ""), (without(SCORE), "not-carried", "not-carried"), (random_score, "unexplained", "added"),
    )),
    *((kind, "untied", change, cause, allowed) for kind in EITHER for change, cause, allowed in (
        (nothing, None, ""), (without(HEAD), "not-carried", "not-carried"), (head_of_the_embedding, "base-changed", ""),
    )),
    ("GGUF", "vision", nothing, "not-in-format", ""),
    ("GGUF", "vision", nothing, None, "not-in-format"),
    ("GGUF", "vision", with_doubled_embedding, "base-changed", "not-in-format"),
]  # fmt: skip
FIRST = {
    name: next(case for case in CASES if case[1] == name and case[3]) for name in ("tokens", "classifier", "untied")
}
"""One wrong release of each is in `make test`, and all are in `make sweeps`."""


@pytest.mark.parametrize(
    ("kind", "name", "change", "cause", "allowed"),
    [pytest.param(*case, marks=[] if case in FIRST.values() else pytest.mark.slow) for case in CASES],
)
def test_each_tensor_of_the_merge_is_compared_or_named(
    kind: str,
    name: str,
    change: Callable[[Tensors], object],
    cause: str | None,
    allowed: str,
    scene: Callable[[str], Scene],
    verify: Verify,
    tmp_path: Path,
) -> None:
    own = scene(name)
    tensors = {key: values.clone() for key, values in own.merged.items()}
    change(tensors)
    entry = verify(own, written(own, tmp_path, kind, tensors), *filter(None, [allowed]))
    assert entry.cause == cause, [one.message for one in entry.findings if one.check != "strength"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("F16", "tokens"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("F32", "tokens"), ("BF16", "tokens"), ("FP8", "tokens"), ("GPTQ", "classifier"),
        )),
    ],
)  # fmt: skip
def test_new_rows_of_plain_floats_have_the_bits_of_the_merge(
    kind: str, name: str, scene: Callable[[str], Scene], verify: Verify, tmp_path: Path
) -> None:
    """The noise of such a row allows for more than one changed value."""
    own, changed = scene(name), SCORE if name == "classifier" else HEAD
    wrong = {key: values.clone() for key, values in own.merged.items()}
    wrong[changed][-1, 3] *= 1 + 2**-6
    entries = []
    for folder, tensors in (("right", own.merged), ("wrong", wrong)):
        path = tmp_path / folder
        path.mkdir()
        release = (
            own.gguf(path, tensors, Type[kind]) if kind in Type.__members__ else own.directory(path, tensors, kind)
        )
        entries.append(verify(own, release))
    assert [entry.cause for entry in entries] == [None, "unexplained"]
    (message,) = [one.message for one in entries[1].findings if one.check == "unexplained"]
    rows = "" if name == "classifier" else "rows from 128 on, which the base does not have; "
    assert message.endswith(f'"{changed}" ({rows}1 value differs from the adapter\'s)')


def test_each_tensor_that_the_adapter_changes_has_a_row(
    scene: Callable[[str], Scene], verify: Verify, tmp_path: Path
) -> None:
    own = scene("tokens")
    entry = verify(own, own.gguf(tmp_path, own.merged))
    rows = [(one.tensor, "rows from 128 on" in one.message) for one in entry.findings if one.check == "strength"]
    assert len(rows) == len(set(rows)) == 2 * 7 + 2 * 2
    assert {(name, is_new) for name in (EMBEDDING, HEAD) for is_new in (True, False)} <= {*rows}


def test_a_file_of_the_other_part_is_named(scene: Callable[[str], Scene], verify: Verify, tmp_path: Path) -> None:
    own = scene("vision")
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")
    entry = verify(own, own.gguf(tmp_path, own.merged))
    (message,) = [one.message for one in entry.findings if one.check == "not-in-format"]
    assert message.startswith(
        '4 tensors that the adapter changes have no place in this file, and "mmproj-model.gguf" was not read, so they '
        "were not compared: "
    )

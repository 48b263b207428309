"""`merge-gate verify` on a GGUF file, through the worker process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from merge_gate._internal.errors import EngineError, UsageError
from merge_gate.config.from_arguments import config_of
from merge_gate.features.quantized.gguf_release import GgufRelease
from merge_gate.features.verify.verify_flow import Verification, verify_record
from merge_gate.records.report import AdapterReport
from merge_gate.records.terms import Verdict
from merge_gate.report.wording.run_result import advice, verdict_line
from merge_gate.run.view import View
from merge_gate.worker.supervisor import WorkerSlot
from tests.support.quantized.gguf_files import roundtrip, write_llama
from tests.support.quantized.releases import Bench

Verify = Callable[..., tuple[AdapterReport, str]]


@pytest.fixture(scope="module")
def verify(bench: Bench) -> Iterator[Verify]:
    """Verify a release of the base and an adapter. Returns its entry, and what a reader sees."""
    with WorkerSlot() as worker:

        def run(path: Path, share: float = 0.03) -> tuple[AdapterReport, str]:
            config = config_of([str(bench.adapter("lora", share))], base=str(bench.base()))
            report = Verification(config, str(path), view=View(), worker=worker).compare()
            return report.adapters[0], f"{verdict_line(report)}. {advice(report)}"

        yield run


@pytest.fixture
def write(bench: Bench, tmp_path: Path) -> Callable[..., Path]:
    def made(fault: str, share: float = 0.03, rename: tuple[str, str] = ("", "")) -> Path:
        tensors = bench.faulty(fault, "lora", share, partial(roundtrip, kind=Type.Q4_0))
        path = tmp_path / f"{fault}.gguf"
        write_llama(path, tensors, bench.model().config, Type.Q4_0, Type.Q8_0)
        old, new = (text.encode() for text in rename)
        path.write_bytes(path.read_bytes().replace(old, new) if old else path.read_bytes())
        return path

    return made


def test_a_right_release_passes(verify: Verify, write: Callable[..., Path]) -> None:
    entry, said = verify(write("right"))
    assert (entry.verdict, entry.cause) == (Verdict.PASSED, None), said
    first, *notes = entry.findings
    assert "is in this release at 1.00 ± 0.01 of its strength" in first.message
    assert (len(notes), {note.check for note in notes}) == (35, {"strength"})
    assert said.startswith("PASS: the model has the adapter at its full strength. Its tensors were measured.")


@pytest.mark.slow
def test_a_wrong_release_fails(verify: Verify, write: Callable[..., Path]) -> None:
    entry, said = verify(write("codes"))
    assert (entry.verdict, entry.cause) == (Verdict.FAILED, "erased"), said


@pytest.mark.slow
def test_a_delta_below_the_noise_has_no_verdict(verify: Verify, write: Callable[..., Path]) -> None:
    entry, said = verify(write("right", share=1e-4), 1e-4)
    assert (entry.verdict, entry.cause) == (Verdict.ERROR, "not-measurable"), said


def test_a_file_that_cannot_be_read_has_no_verdict(verify: Verify, write: Callable[..., Path]) -> None:
    entry, said = verify(write("right", rename=("GGUF", "GGML")))
    assert (entry.verdict, entry.cause) == (Verdict.ERROR, "not-judged"), said
    assert "begins with" in entry.findings[0].message


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (("llama", "lllll"), "does not know the architecture"),
        (
            ("\x05\x00\x00\x00\x00\x00\x00\x00llama", "\x06\x00\x00\x00\x00\x00\x00\x00falcon"),
            '"falcon" of the GGUF file',
        ),
        (("blk.0.attn_q.weight", "blk.1.attn_q.weight"), "is there twice"),
    ],
)
def test_a_release_is_refused_by_its_header(
    bench: Bench, write: Callable[..., Path], rename: tuple[str, str], words: str
) -> None:
    with write("right", rename=rename).open("rb") as file, pytest.raises(EngineError, match=words):
        GgufRelease(file, bench.model())


def test_a_directory_of_gguf_files_is_a_mistake(verify: Verify, write: Callable[..., Path]) -> None:
    path = write("right")
    with pytest.raises(UsageError, match=r"1 GGUF file and no safetensors files; to do: name one file: .*right\.gguf"):
        verify(path.parent)


def test_a_file_alone_needs_its_base_and_adapter(write: Callable[..., Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "link.gguf").symlink_to(write("right"))
    for path in (write("right"), tmp_path / "pipe.gguf", tmp_path / "link.gguf"):
        with pytest.raises(UsageError, match=r"single file, .*; to do: add --base BASE --adapter ADAPTER"):
            verify_record(str(path), view=View())


def test_a_pipe_or_a_device_is_a_mistake(verify: Verify, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "link.gguf").symlink_to("/dev/zero")
    for name in ("pipe.gguf", "link.gguf"):
        with pytest.raises(UsageError, match=r"is a pipe or a device, or a link to one; to do: write it to a file"):
            verify(tmp_path / name)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_any_rows_of_a_file_are_those_of_the_whole_tensor(bench: Bench, write: Callable[..., Path], name: str) -> None:
    """llama.cpp has the rows of q and k in another order."""
    with write("right").open("rb") as file:
        tensor = GgufRelease(file, bench.model()).open(name)
        whole = tensor.read(slice(None))
        assert tensor.step == 1
        for rows in (slice(0, 1), slice(5, 41), slice(60, None)):
            assert torch.equal(tensor.read(rows), whole[rows])
    near = bench.faulty("right", "lora", 0.03, torch.clone)[name]
    assert float((whole - near).norm()) < 0.15 * float(near.norm())

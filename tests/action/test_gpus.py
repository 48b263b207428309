"""Which GPUs are asked for, and in which words."""

from pathlib import Path

import pytest

from merge_gate._internal.errors import UsageError
from merge_gate.action.docker.gpus import requested_gpus


@pytest.fixture
def with_gpu(tmp_path: Path) -> Path:
    for name in ("null", "nvme0n1", "nvidia0", "nvidiactl"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def without_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dev")
    for name in ("null", "nvme0n1", "dri"):
        (directory / name).touch()
    return directory


@pytest.mark.parametrize(
    ("gpus", "device", "visible", "here", "elsewhere"),
    [
        ("auto", "auto", "", "all", ""),
        ("auto", "cpu", "", "", ""),
        ("auto", "cuda", "", "all", "all"),
        ("auto", "cuda:1", "", "all", "all"),
        ("auto", "auto", "2,3", "2,3", "2,3"),
        ("auto", "auto", "none", "", ""),
        ("auto", "auto", "void", "all", ""),
        ("auto", "auto", "all", "all", ""),
        ("auto", "cpu", "2,3", "", ""),
        ("none", "auto", "2,3", "", ""),
        ("all", "auto", "", "all", "all"),
        ("all", "auto", "GPU-5f1c", "GPU-5f1c", "GPU-5f1c"),
        ("all", "auto", "nvidia.com/gpu=all", "all", "all"),
        ("auto", "auto", "nvidia.com/gpu=0", "nvidia.com/gpu=0", "nvidia.com/gpu=0"),
        ("nvidia.com/gpu=1", "auto", "0,1", "nvidia.com/gpu=1", "nvidia.com/gpu=1"),
        ("nvidia.com/gpu=all", "auto", "", "nvidia.com/gpu=all", "nvidia.com/gpu=all"),
        ("nvidia.com/gpu=all", "auto", "0,1", "0,1", "0,1"),
        ("1", "auto", "nvidia.com/gpu=0,nvidia.com/gpu=1", "1", "1"),
        ("all", "auto", "void", "all", "all"),
        ("3", "auto", "2,3", "3", "3"),
        ("auto", "cuda", "2,3", "2,3", "2,3"),
        ("auto", "auto", "0, 1", "0,1", "0,1"),
        ("0,1", "cuda", "", "0,1", "0,1"),
    ],
)
def test_what_is_wanted(gpus, device, visible, here, elsewhere, with_gpu: Path, without_gpu: Path) -> None:
    environ = {"NVIDIA_VISIBLE_DEVICES": visible} if visible else {}
    assert requested_gpus(gpus, device, environ, with_gpu) == here
    assert requested_gpus(gpus, device, environ, without_gpu) == elsewhere


@pytest.mark.parametrize(
    ("gpus", "device", "visible"),
    [
        ("none", "cuda", ""),
        ("all", "cpu", ""),
        ("0", "cpu", ""),
        ("all", "auto", "none"),
        ("auto", "cuda", "none"),
        ("0", "auto", "none"),
        ("1", "auto", "2,3"),
        ("2,4", "auto", "2,3"),
        ("0", "auto", "GPU-5f1c"),
        ("nvidia.com/gpu=2", "auto", "0,1"),
        ("nvidia.com/gpu=", "auto", ""),
        ("amd.com/gpu=0", "auto", ""),
        ("0 1", "auto", ""),
        ("0,", "auto", ""),
        ("--gpus", "auto", ""),
        ("", "auto", ""),
    ],
)
def test_what_contradicts_itself_is_refused(gpus: str, device: str, visible: str, with_gpu: Path) -> None:
    with pytest.raises(UsageError, match="gpus"):
        requested_gpus(gpus, device, {"NVIDIA_VISIBLE_DEVICES": visible}, with_gpu)


@pytest.mark.parametrize(
    ("gpus", "device", "cuda", "nvidia", "wanted"),
    [
        ("auto", "auto", "1", None, "1"),
        ("auto", "auto", "", None, ""),
        ("auto", "auto", "-1", None, ""),
        ("all", "auto", "GPU-5f1c", "all", "GPU-5f1c"),
        ("all", "auto", "1,2", "0,1", "1"),
        ("auto", "cuda", "1", None, "1"),
        ("all", "auto", "1", None, "1"),
        ("1", "auto", "0,1", None, "1"),
        ("all", "auto", "1", "nvidia.com/gpu=0,nvidia.com/gpu=1", "nvidia.com/gpu=1"),
    ],
)
def test_cudas_own_variable_is_a_ceiling_too(gpus, device, cuda, nvidia, wanted, with_gpu: Path) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": cuda, **({"NVIDIA_VISIBLE_DEVICES": nvidia} if nvidia else {})}
    assert requested_gpus(gpus, device, environ, with_gpu) == wanted


@pytest.mark.parametrize(("gpus", "device", "cuda"), [("all", "auto", ""), ("auto", "cuda", "-1"), ("0", "auto", "1")])
def test_more_than_cudas_own_variable_allots_is_refused(gpus, device, cuda, with_gpu, wording) -> None:
    with wording.of(UsageError):
        requested_gpus(gpus, device, {"CUDA_VISIBLE_DEVICES": cuda}, with_gpu)

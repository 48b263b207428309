"""Norms of blocks have the bits of the norms of the whole, or the whole is used."""

from __future__ import annotations

import pytest
import torch

from merge_gate.engine.blocks import block_merge
from merge_gate.engine.tensors.threads import Buffers
from tests.support.engine.blocks_layers import by_peft, in_blocks, same_bits, tuner_layer, whole


def facts(rows: int, columns: int, *, transposed: bool) -> dict:
    shape = (columns, rows) if transposed else (rows, columns)
    starts = tuple(block.start for block in Buffers().blocks(*shape, torch.device("cpu")))
    return {"rows": rows, "columns": columns, "transposed": transposed, "starts": starts, "threads": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_of_real_models_are_proved(transposed, dtype) -> None:
    for rows, columns in ((2048, 2048), (5632, 2048), (2048, 5632), (3072, 768), (768, 3072)):
        shape = facts(rows, columns, transposed=transposed)
        assert len(shape["starts"]) > 4
        assert block_merge._norms_proved(dtype=dtype, **shape)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "8bit", "4bit"])
def test_without_a_proof_the_bits_are_the_same(monkeypatch, kind) -> None:
    monkeypatch.setattr(block_merge, "_norms_proved", lambda **_: False)
    layer = tuner_layer(kind, 512, 320, 8, dora=True)
    merged = whole(in_blocks(layer))
    assert same_bits(merged, by_peft(layer)[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_the_proof_fails_where_a_block_differs_in_one_bit(monkeypatch, transposed) -> None:
    shape = facts(512, 512, transposed=transposed)
    genuine = block_merge._norms_of

    def nudged(summed: torch.Tensor) -> torch.Tensor:
        norms = genuine(summed)
        if len(norms) == 512:
            norms[131] = torch.nextafter(norms[131], torch.tensor(9e9))
        return norms

    assert block_merge._norms_proved.__wrapped__(dtype=torch.bfloat16, **shape)
    monkeypatch.setattr(block_merge, "_norms_of", nudged)
    assert not block_merge._norms_proved.__wrapped__(dtype=torch.bfloat16, **shape)

"""int4 matrices: rounded as computed by hand, the same for few and many rows, a fraction of the bytes."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.int4 import (
    FEW_ROWS,
    PACKED_ROWS,
    Int4Matrix,
    choose_group,
    quantize_groups,
    unpack_levels,
)
from megatron_cm3leon.generation.matrix_kinds import build_matrix
from tests.models import save_random_opt


def test_a_group_equals_one_computed_by_hand():
    """Levels 0 to 15 are spread from the smallest to the largest weight of a group; level 8 is the zero."""
    weight = torch.cat([torch.arange(32.0).clamp(max=15), torch.full((32,), 2.0)])[None]
    levels, scale, zero = quantize_groups(weight, 32)
    assert levels[0, :16].tolist() == list(range(16)) and levels[0, 16:32].unique().tolist() == [15]
    assert scale[0, 0] == 1 and zero[0].tolist() == [8, 2] and levels[0, 32:].unique().tolist() == [8]


@pytest.mark.parametrize(("width", "group"), [(4096, 128), (1536, 128), (192, 64), (96, 32), (48, 32)])
def test_groups_divide_the_row(width, group):
    assert choose_group(width) == group


@pytest.mark.parametrize(("units", "width"), [(100, 96), (64, 48), (192, 192), (300, 256)])
def test_products_are_those_of_the_rounded_matrix(units, width):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(units, width, generator=generator)
    matrix = Int4Matrix(weight)
    rounded = matrix.convert_rows(slice(None))[:units, :width].float()
    step = matrix.scales_and_zeros[..., 0].float().max()
    assert (rounded - weight).abs().max() < 0.6 * step
    for rows in (1, 3, FEW_ROWS, FEW_ROWS + 1):
        x = torch.randn(rows, width, generator=generator)
        expected = x.bfloat16().float() @ rounded.T
        assert (matrix(x) - expected).norm() < 4e-3 * expected.norm()
    assert matrix(x[:4].view(2, 2, width)).shape == (2, 2, units) and matrix(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_unpacking_inverts_packing_on_every_cpu(capability):
    """torch packs for the vector width of the CPU, which it reads when it is loaded."""
    check = (
        "import torch; from megatron_cm3leon.generation.int4 import unpack_levels\n"
        "levels = torch.randint(16, (192, 96), dtype=torch.int32)\n"
        "packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)\n"
        "assert torch.equal(unpack_levels(packed).int(), levels)"
    )
    subprocess.run([sys.executable, "-c", check], env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, check=True)


def test_unpacking_inverts_packing():
    levels = torch.randint(16, (2 * PACKED_ROWS, 64), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    assert torch.equal(unpack_levels(packed).int(), levels)


def test_bytes_of_a_matrix():
    weight = torch.randn(256, 1024)
    assert build_matrix(weight, "int4").bytes == weight.numel() // 2 + weight.numel() // 128 * 4


def test_a_gpu_is_refused():
    with pytest.raises(ValueError, match=r"int4 on meta: int4 is computed on a CPU only; use int8 or fp8 there"):
        build_matrix(torch.empty(64, 64, device="meta"), "int4")


def test_a_decoder_with_int4_matrices(tmp_path, vocabulary):
    """The layers have 4 bits, the head 8; steps agree with full sequences."""
    save_random_opt(tmp_path, vocabulary, hidden_size=64, heads=4)
    exact, small = Decoder.load(tmp_path), Decoder.load(tmp_path, "int4")
    assert small.words.dtype == torch.bfloat16 and type(small.layers[0].inner) is Int4Matrix
    assert type(small.head()) is type(build_matrix(torch.randn(64, 64), "int8"))
    ids = torch.tensor([[27, 5, 5, 2, 9, 0, 1, 3]])
    expected, logits = exact.all_logits(ids), small.all_logits(ids)
    assert 0 < (logits - expected).std() < 0.35 * expected.std()
    _, cache = small.start([ids[0, :-1].tolist()], 2)
    stepped = small.logits(small.step(ids[0, -1:], cache))
    assert (stepped - logits[:, -1]).abs().max() < 0.15 * expected.std()

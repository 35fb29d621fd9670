"""Attention per sample by FlexAttention: its tiles, and outputs and gradients that equal those of masked attention."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.model.attention import context_positions
from megatron_cm3leon.model.sample_attention import TILE, attend_samples, build_sample_mask, uses_flex
from tests.flex_on_cpu import BACKEND, flex_on_cpu
from tests.recording import MemoryRecorder


def make_packed_samples(length: int) -> torch.Tensor:
    """Two sequences of three samples; one ends with spans of all samples (moved by CM3 masking) and padding."""
    samples = (torch.arange(length) * 3 // length).expand(2, -1).clone()
    samples[1, length - length // 8 :] = torch.randint(0, 3, (length // 8,), generator=torch.Generator().manual_seed(0))
    samples[1, -9:] = -1
    return samples


def find_allowed_pairs(samples: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pairs of query and key that may attend, bool [B, L, S]."""
    same = samples[:, positions, None] == samples[:, None]
    return same & (positions[:, None] >= torch.arange(samples.shape[1]))


def list_positions(length: int, ranks: int) -> list[torch.Tensor | None]:
    return [None] if ranks == 1 else [context_positions(length, rank, ranks) for rank in range(ranks)]


@pytest.mark.parametrize(("length", "ranks"), [(1300, 1), (1024, 2), (640, 2), (48, 1)])
def test_tiles_contain_all_allowed_pairs_and_full_tiles_contain_no_others(length, ranks):
    samples, n_full_tiles = make_packed_samples(length), 0
    for positions in list_positions(length, ranks):
        mask = build_sample_mask(samples, positions)
        allowed = find_allowed_pairs(samples, torch.arange(length) if positions is None else positions)
        rows, columns = allowed.shape[1:]

        def expand_tiles(tiles, rows=rows, columns=columns):
            wide = tiles.to_dense()[:, 0].repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)
            return wide[:, :rows, :columns].bool()

        exact = create_block_mask(mask.mask_mod, 2, None, rows, columns, device="cpu")
        assert torch.equal(expand_tiles(mask), expand_tiles(exact))
        assert not (allowed & ~expand_tiles(mask)).any()
        full = BlockMask.from_kv_blocks(mask.full_kv_num_blocks, mask.full_kv_indices, BLOCK_SIZE=TILE)
        assert not (expand_tiles(full) & ~allowed).any()
        n_full_tiles += int(mask.full_kv_num_blocks.sum())
    assert (n_full_tiles > 0) == (length > 1000)  # in a shorter sequence no sample covers a tile


@pytest.mark.parametrize(("width", "heads", "groups"), [(64, 4, 2), (96, 2, 2), (128, 2, 1)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_flex_attention_equals_masked_attention(width, heads, groups, ranks):
    samples, generator = make_packed_samples(300), torch.Generator().manual_seed(0)
    for positions in list_positions(300, ranks):
        length = 300 // ranks
        shapes = [(2, heads, length, width), (2, groups, 300, width), (2, groups, 300, width)]
        states = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        weights = torch.randn(shapes[0], generator=generator)
        allowed = find_allowed_pairs(samples, torch.arange(300) if positions is None else positions)
        expected = F.scaled_dot_product_attention(*states, attn_mask=allowed[:, None], enable_gqa=True)
        with flex_on_cpu():
            found = attend_samples(*states, build_sample_mask(samples, positions), None)
            gradients = torch.autograd.grad(found, states, weights)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, states, weights), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_uses_one_graph_for_all_micro_batches():
    torch._dynamo.utils.counters.clear()
    layer = torch.nn.Linear(32, 3 * 32)

    def forward(hidden, mask):
        query, key, value = layer(hidden).view(2, 160, 2, 3, 16).permute(3, 0, 2, 1, 4)
        return attend_samples(query, key, value, mask, None)

    with flex_on_cpu():
        compiled = torch.compile(forward, backend=BACKEND, dynamic=False, fullgraph=True)
        for number in range(3):
            hidden = torch.randn(2, 160, 32, requires_grad=True)
            mask = build_sample_mask(make_packed_samples(160).roll(50 * number, 1))
            found, expected = compiled(hidden, mask), forward(hidden, mask)
            torch.testing.assert_close(found, expected)
            ours, theirs = (torch.autograd.grad(each.square().sum(), hidden)[0] for each in (found, expected))
            torch.testing.assert_close(ours, theirs)
    # The second graph is FlexAttention, which the test calls outside the compiled function.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_no_mask_of_all_pairs_is_allocated():
    samples = make_packed_samples(4096)[:1]
    with MemoryRecorder() as recorder:
        build_sample_mask(samples)
    assert recorder.peak < 4096 * 4096 / 8


def test_auto_is_flex_on_a_gpu_without_dropout():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert uses_flex("auto", cuda, 0.0) and uses_flex("flex", cuda, 0.0)
    assert not uses_flex("auto", cpu, 0.0) and not uses_flex("auto", cuda, 0.1) and not uses_flex("masked", cuda, 0.0)


def test_flex_is_rejected_where_it_cannot_run():
    with pytest.raises(ValueError, match=r"train.sample_attention \(flex\) requires a GPU: .* use .*=auto"):
        uses_flex("flex", torch.device("cpu"), 0.0)
    flex = "train.sample_attention=flex"
    for override, message in (
        ("model.dropout=0.1", r"\(flex\) needs model.dropout \(0.1\) to be 0, because .*; use .*=auto"),
        ("train.device=cpu", r"\(flex\) needs a GPU \(train.device is cpu\), because .*; use .*=auto"),
    ):
        with pytest.raises(ValueError, match=message):
            validate_config(load_config(None, [flex, override]), 1)

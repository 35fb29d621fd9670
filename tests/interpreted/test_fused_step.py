"""FusedStep equals the step of the decoder: in the interpreter, or on a GPU, there also as a CUDA graph."""

import pytest
import torch

from megatron_cm3leon.generation import products
from megatron_cm3leon.generation.fused_step import CHUNK, FusedStep
from megatron_cm3leon.generation.grammar import Segment
from megatron_cm3leon.generation.products import Tile
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.step import BatchPrompts, DecodingStep, StepShape
from tests.interpreted.models import DEVICE, build_decoder

CLOSE = 2e-6 if DEVICE == "cpu" else 1e-5
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8], [4] * 30]


def relative_error(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.inference_mode()
def compare_steps(decoder, prompts, steps, tile=None):
    """Largest relative error of the states of `steps` steps, of the cache after them, and of the logits."""
    (_, expected_cache), (_, cache) = (decoder.start(prompts, steps + 1) for _ in range(2))
    fused, errors = FusedStep(decoder, tile), []
    for step_number in range(steps):
        ids = (torch.arange(len(prompts), device=DEVICE) * 7 + step_number) % decoder.vocabulary_size
        expected, state = decoder.step(ids, expected_cache), fused.advance(ids, cache)
        errors.append(relative_error(state, expected))
    assert torch.equal(cache.lengths, expected_cache.lengths)
    for name in ("keys", "values"):
        for one, other in zip(getattr(cache, name), getattr(expected_cache, name), strict=True):
            errors.append(relative_error(one, other))
    return max(*errors, relative_error(fused.logits(expected), decoder.logits(expected)))


@pytest.mark.parametrize(("family", "rows", "layers"), [("opt", 1, 2), ("opt", 4, 1), ("llama", 2, 1), ("qwen3", 3, 1)])
def test_a_fused_step_equals_the_step_of_the_decoder(family, rows, layers):
    assert compare_steps(build_decoder(family, layers=layers), PROMPTS[:rows], 2) < CLOSE


@pytest.mark.parametrize(
    "shape",
    [
        {"family": "opt", "hidden": 36, "heads": 4, "inner": 50},
        {"family": "opt", "hidden": 192, "heads": 2, "activation": "relu"},
        {"family": "llama", "hidden": 36, "heads": 4, "kv_heads": 4, "width": 10, "inner": 50},
        {"family": "qwen3", "hidden": 96, "heads": 3, "kv_heads": 1, "width": 24},
    ],
    ids=str,
)
def test_widths_may_be_other_than_powers_of_two(shape):
    assert compare_steps(build_decoder(**shape), PROMPTS[:2], 1) < CLOSE


@pytest.mark.parametrize(("family", "quantized"), [("opt", "int8"), ("qwen3", "fp8")])
def test_smaller_dtypes_are_equal_or_close(family, quantized):
    """With the same 8-bit weights the fp32 steps are equal; bf16 states differ by rounding."""
    assert compare_steps(build_decoder(family, quantized=quantized), PROMPTS[:2], 1) < CLOSE
    assert compare_steps(build_decoder(family, dtype=torch.bfloat16, quantized=quantized), PROMPTS[:2], 1) < 0.02


def test_lengths_may_be_at_the_ends_of_chunks_and_of_the_cache():
    """The new position is the first or the last of a chunk, or of the cache."""
    decoder = build_decoder("opt", hidden=16, heads=1)
    prompts = [[1], [1] * (CHUNK - 2), [2] * CHUNK, [3] * (2 * CHUNK - 3)]
    assert compare_steps(decoder, prompts, 3) < CLOSE


def test_positions_beyond_a_length_are_not_read():
    decoder = build_decoder("opt", hidden=16, heads=1)
    with torch.inference_mode():
        _, cache = decoder.start([[1, 2, 3], [1] * 100], 3)
        _, clean = decoder.start([[1, 2, 3], [1] * 100], 3)
        for keys, values in zip(cache.keys, cache.values, strict=True):
            keys[0, :, 3:], values[0, :, 3:] = float("nan"), float("nan")
        ids = torch.tensor([4, 5], device=DEVICE)
        fused = FusedStep(decoder)
        found = fused.advance(ids, cache).clone()
        assert torch.equal(found, fused.advance(ids, clean))


def test_small_tiles_give_the_same_step():
    decoder = build_decoder("opt", hidden=32, heads=2, inner=32)
    assert compare_steps(decoder, PROMPTS[:2], 1, Tile(8, 16)) < CLOSE


@torch.inference_mode()
def test_sampling_gives_the_same_tokens():
    """As step.py calls it, with guidance and noise."""
    decoder, sampling, tokens = build_decoder("llama", hidden=32, inner=32), Sampling(guidance=3.0), []
    segment = Segment(torch.arange(8, 40), 3)
    shape = StepShape.of(segment, sampling, sequences=2, size=16, length=segment.length)
    for fused in (None, FusedStep(decoder)):
        cache = decoder.build_cache(4, 16, flat=False)
        step = DecodingStep(decoder, shape, segment, sampling, cache, fused)
        step.begin(BatchPrompts([[1, 2, 3], [4, 5]], [[1], [1]], [1, 2]), segment.length, sampling)
        for step_number in range(segment.length):
            step.prepare(step_number)
            step.advance(cache.size, True)
        tokens.append(step.ids)
    assert torch.equal(*tokens) and len(tokens[0].unique()) > 2


def test_too_many_sequences_are_rejected():
    decoder = build_decoder("opt", hidden=16, heads=1)
    _, cache = decoder.start([[1]] * 5, 2)
    with pytest.raises(ValueError, match=r"at most 4 sequences, not 5; use Decoder\.advance"):
        FusedStep(decoder).advance(torch.zeros(5, dtype=torch.long, device=DEVICE), cache)


@pytest.mark.slow
def test_a_fused_step_of_width_4096(monkeypatch):
    """One layer with the width of 7b and guidance; the interpreter reads 20 million weights per second."""
    if DEVICE == "cpu":  # NumPy sums long rows fast
        monkeypatch.setattr(products, "lane_width", lambda width, itemsize: min(width & -width, 1024))
    decoder = build_decoder("opt", hidden=4096, heads=32, inner=4096, deviation=0.02)
    assert compare_steps(decoder, PROMPTS[1:3], 8, Tile(256, 4096) if DEVICE == "cpu" else None) < 1e-5


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("overlap", [False, True])
@torch.inference_mode()
def test_a_graph_replays_the_step(overlap):
    if overlap and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("overlapping launches need sm_90")
    decoder = build_decoder("qwen3", dtype=torch.bfloat16, quantized="int8")
    (_, expected_cache), (_, cache) = (decoder.start(PROMPTS[:2], 9) for _ in range(2))
    plain, fused = FusedStep(decoder), FusedStep(decoder, overlap=overlap)
    ids = torch.tensor([3, 4], device=DEVICE)
    lengths = cache.lengths.clone()
    fused.advance(ids, cache)  # compiles
    cache.lengths.copy_(lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state = fused.advance(ids, cache)
    cache.lengths.copy_(lengths)
    for step_number in range(8):
        ids.fill_(step_number)
        graph.replay()
        assert torch.equal(state, plain.advance(ids, expected_cache))
    assert torch.equal(cache.lengths, expected_cache.lengths)

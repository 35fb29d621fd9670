"""Decoding on a GPU with captured steps: in fp32 the same tokens as on the CPU, independent of the batches."""

import numpy as np
import pytest
import torch

from megatron_cm3leon.generation import batch, step_graph
from megatron_cm3leon.generation.documents import CompletionOptions
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.grammar import choice_segment, image_segment, opening_segment, text_segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.types import GeneratedImage
from tests.gpu.conftest import VOCABULARY, load_decoder
from tests.models import make_tokenizers

pytestmark = pytest.mark.gpu
WORDS = ["a", "red", "blue", "circle", "square", "x", "on", "white", "small", "large"]
PROMPTS = [[27, 3, 1, 4, 28], [27, 28], [27, 5, 5, 2, 9, 0, 1, 28], [27, 3, 1, 4, 28]]
EMPTY = [[VOCABULARY.eos, VOCABULARY.sentinel(0), VOCABULARY.break_id]] * len(PROMPTS)
SEEDS = [0, 1, 2, 3]
GUIDED = Sampling(guidance=2.0, temperature=0.7)
SHARE = (step_graph, "CACHE_SHARE")
"""Share of a GPU's free memory that a batch may use."""
SEGMENTS = {
    "image": image_segment(VOCABULARY),
    "part of an image": image_segment(VOCABULARY, 5),
    "text": text_segment(VOCABULARY, 9),
    "one token": choice_segment([VOCABULARY.eos, VOCABULARY.break_id]),
    "opening token": opening_segment(VOCABULARY),
}


def decode(decoder, segment, sampling=GUIDED, **options):
    return batch.decode_segments(decoder, PROMPTS, segment, sampling, SEEDS, unconditional=EMPTY, **options)


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_fp32_tokens_equal_those_of_the_cpu(decoders, name, guidance):
    sampling = Sampling(guidance=guidance, temperature=0.7)
    expected, found = (decode(decoder, SEGMENTS[name], sampling) for decoder in decoders)
    assert (found == expected).all()
    assert len({tuple(row) for row in expected}) > 1 or SEGMENTS[name].length == 1


def test_greedy_tokens_equal_those_of_full_forward_passes(decoders):
    _, decoder = decoders
    segment = SEGMENTS["image"]
    ids = batch.decode_segments(decoder, PROMPTS, segment, Sampling(temperature=0.0), SEEDS)
    for prompt, row in zip(PROMPTS, ids.tolist(), strict=True):
        sequence = torch.tensor([prompt + row], device=decoder.device)
        logits = decoder.all_logits(sequence)[0, len(prompt) - 1 : -1, segment.allowed.to(decoder.device)]
        assert (segment.allowed[logits.argmax(-1).cpu()]).tolist() == row


def test_several_batches_per_call_give_the_same_tokens(decoders, monkeypatch):
    _, decoder = decoders
    expected = decode(decoder, SEGMENTS["image"])
    monkeypatch.setattr(batch, "CPU_CACHE_BYTES", 1)  # less than one prompt requires: one batch per prompt
    monkeypatch.setattr(*SHARE, 1e-9)
    options = {"unconditional": EMPTY}
    parts = [part for part, _ in batch.decode_batches(decoder, PROMPTS, SEGMENTS["image"], GUIDED, SEEDS, **options)]
    assert parts == [slice(number, number + 1) for number in range(len(PROMPTS))]
    assert (decode(decoder, SEGMENTS["image"]) == expected).all()


def test_forced_tokens_are_kept(decoders):
    segment = SEGMENTS["image"]
    forced = np.full((len(PROMPTS), segment.length), -1)
    forced[:, [0, 3, 4]] = VOCABULARY.image_start + np.arange(12).reshape(4, 3)
    expected, found = (decode(decoder, segment, forced=forced) for decoder in decoders)
    assert (found == expected).all() and (found[:, [0, 3, 4]] == forced[:, [0, 3, 4]]).all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_smaller_dtypes_are_close_to_fp32_and_deterministic(exported, decoders, device, kind):
    reference, small = decoders[0], load_decoder(exported, kind, device)
    ids = torch.tensor([PROMPTS[2]])
    expected, found = reference.all_logits(ids), small.all_logits(ids.to(device)).cpu()
    assert 0 < (found - expected).abs().max() < 0.15 * expected.std()
    first = decode(small, SEGMENTS["image"])
    assert (decode(small, SEGMENTS["image"]) == first).all()
    assert np.isin(first, SEGMENTS["image"].allowed.numpy()).all()


def test_completed_documents_equal_those_of_the_cpu(decoders):
    """Segments of one token and longer ones, prompts of many lengths, several calls."""
    documents = [["a red"], [], ["x on", "white"]]
    samplings, outputs = [Sampling(temperature=2.0, seed=seed) for seed in range(4)], []
    for decoder in decoders:
        generator = Generator(decoder, make_tokenizers(WORDS, VOCABULARY))
        options = [CompletionOptions(text=sampling, image=sampling, longest=4) for sampling in samplings]
        calls = [generator.complete(documents, each) for each in options]
        parts = [part for call in calls for document in call for part in document]
        outputs.append([part.codes.tolist() if isinstance(part, GeneratedImage) else part for part in parts])
    assert outputs[0] == outputs[1]
    assert {type(part) for part in outputs[0]} == {list, str}


def test_memory_is_freed_after_a_call(decoders):
    """Memory allocated after a call must not grow."""
    _, decoder = decoders
    if decoder.device.type == "cpu":
        pytest.skip("torch does not count the memory of a CPU")
    decode(decoder, SEGMENTS["image"])
    before = torch.cuda.memory_allocated(decoder.device)
    for _ in range(3):
        decode(decoder, SEGMENTS["image"])
    assert torch.cuda.memory_allocated(decoder.device) <= before * 1.01 + (1 << 20)

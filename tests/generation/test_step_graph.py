"""Recorded steps: the tokens of plain ones, for every kind of sampling, with few recordings and little memory.

A CPU stands in for a GPU: recorder.py. Buckets are made small, so that attention's width changes within a segment.
"""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cm3leon.generation import batch, step_graph
from megatron_cm3leon.generation.batch import decode_segments
from megatron_cm3leon.generation.cache import Cache
from megatron_cm3leon.generation.decoder import Decoder
from megatron_cm3leon.generation.documents import CompletionOptions
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.grammar import Segment, choice_segment, image_segment, text_segment
from megatron_cm3leon.generation.near_ties import count_near_ties, unexplained_differences
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.generation.step_graph import CudaGraphs, StepGraphs
from tests.generation.conftest import WORDS
from tests.generation.recorder import HOST_READS, Recorder
from tests.models import make_tokenizers, save_random_llama, save_random_opt

GIVEN = [[27, 1, 5, 28], [27, 3, 28], [27, 1, 5, 28], [27, *range(9), 28]]
WITHOUT = [[27, 30, 28]] * 4
SEEDS = [4, 5, 6, 7]
KINDS = {
    "greedy": Sampling(temperature=0),
    "gumbel": Sampling(temperature=1.3),
    "guided": Sampling(guidance=3.0),
    "guided, greedy": Sampling(guidance=3.0, temperature=0),
    "contrastive": Sampling(contrast_k=3, contrast_alpha=0.2),
    "contrastive, unbounded": Sampling(contrast_k=1, contrast_alpha=0.0),
    "top-k and top-p": Sampling(temperature=2.0, top_k=9, top_p=0.8, guidance=2.0),
    "inverse": Sampling(sampler="inverse-1", top_p=0.9, guidance=2.0),
}


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(step_graph, "BUCKET", 8)


@pytest.fixture(scope="module", params=["opt", "llama", "qwen3"])
def path(request, tmp_path_factory, vocabulary):
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "opt":
        save_random_opt(path, vocabulary, layers=3, heads=4)
    else:
        save_random_llama(path, vocabulary, qk_norm=request.param == "qwen3")
    return path


def recording(path, **options):
    """A decoder whose steps are recorded, and the recorder."""
    decoder, recorder = Decoder.load(path, **options), Recorder()
    decoder.graphs = StepGraphs(decoder, recorder)
    return decoder, recorder


def decode(decoder, segment, sampling, given=GIVEN, seeds=SEEDS, **options):
    return decode_segments(decoder, given, segment, sampling, seeds, unconditional=WITHOUT[: len(given)], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_give_the_tokens_of_plain_ones(path, kind, vocabulary):
    plain, (recorded, recorder) = Decoder.load(path), recording(path)
    segment = image_segment(vocabulary, 12)
    expected = decode(plain, segment, KINDS[kind])
    assert (decode(recorded, segment, KINDS[kind]) == expected).all()
    assert len(recorder.recordings) == 2  # prompts of 11: positions 12 to 16, then 17 to 22


def test_the_same_recording_serves_other_prompts_seeds_and_numbers(path, vocabulary):
    plain, (recorded, recorder) = Decoder.load(path), recording(path)
    segment, first = image_segment(vocabulary, 12), Sampling(guidance=2.0, top_p=0.9)
    decode(recorded, segment, first)
    count = len(recorder.recordings)
    for sampling in (first, Sampling(guidance=5.0, temperature=0.5, top_p=0.5)):
        given = [[27, 2, 28], [27, 4, 4, 4, 28], [27], [27, *range(8), 28]]
        options = {"given": given, "seeds": [9, 8, 7, 6]}
        assert (decode(recorded, segment, sampling, **options) == decode(plain, segment, sampling, **options)).all()
    assert len(recorder.recordings) == count
    decode(recorded, segment, Sampling(temperature=0, guidance=2.0))  # another structure
    assert len(recorder.recordings) == 2 * count
    assert len({id(graph.step.cache) for graph in recorded.graphs.kept.values()}) == 1


def test_kernels_for_few_rows_are_given_the_whole_cache(path, vocabulary, monkeypatch):
    """A step with kernels of its own reads lengths, so that one recording serves all widths."""
    plain, (recorded, recorder) = Decoder.load(path), recording(path)

    class Fused:
        logits = staticmethod(plain.logits)

        @staticmethod
        def advance(ids, cache):
            return plain.advance(ids, cache, cache.size, True)

    monkeypatch.setattr(StepGraphs, "_find_fused", lambda graphs, rows: Fused if rows <= 4 else None)
    segment = image_segment(vocabulary, 12)
    for sampling, count in ((Sampling(), 1), (Sampling(guidance=2.0), 3)):  # 4 rows, then 8 with two widths
        assert (decode(recorded, segment, sampling) == decode(plain, segment, sampling)).all()
        assert len(recorder.recordings) == count


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_smaller_types_are_recorded_too(path, kind, vocabulary):
    plain, (recorded, _) = Decoder.load(path, kind), recording(path, dtype=kind)
    segment, margins = image_segment(vocabulary, 12), np.zeros((4, 12), np.float32)
    expected = decode(plain, segment, Sampling(), margins=margins)
    # A masked bf16 attention rounds differently from one without a mask.
    assert not unexplained_differences(decode(recorded, segment, Sampling()), expected, margins, 0.05)


@pytest.fixture
def recorded(folder):
    return recording(folder)


def test_text_looks_at_the_device_every_16_tokens(recorded, decoder, vocabulary):
    segment = Segment(torch.arange(10), 40, (vocabulary.eos,))  # one that never ends
    expected = decode(decoder, segment, Sampling())
    decode(recorded[0], segment, Sampling())  # records, and makes its tables
    with HostReads() as reads:
        assert (decode(recorded[0], segment, Sampling()) == expected).all()
    assert reads.count == 40 // batch.LOOK_EVERY


def last_of(decoder):
    return list(decoder.graphs.kept.values())[-1]


class HostReads(TorchDispatchMode):
    """Counts values that the host waits for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name in HOST_READS
        return function(*args, **(kwargs or {}))


def test_text_that_has_ended_is_not_gone_on_with(recorded, decoder, vocabulary):
    segment, sampling = text_segment(vocabulary, 39), Sampling(temperature=4.0)
    counted = []
    made = decode(recorded[0], segment, sampling, advance=counted.append)
    assert (made == decode(decoder, segment, sampling)).all()
    assert (made >= 0).sum(1).max() < batch.LOOK_EVERY  # all end early
    assert sum(counted) == 4 * 40 and int(last_of(recorded[0]).step.turn) == batch.LOOK_EVERY


def test_the_host_stays_a_few_tokens_ahead(recorded, vocabulary):
    counted = []
    decode(recorded[0], image_segment(vocabulary, 50), Sampling(), advance=counted.append)
    assert counted == [64, 64, 64, 8] and recorded[1].waits == 2


@pytest.mark.parametrize("length", [1, 7])
def test_short_segments_are_not_recorded(recorded, decoder, vocabulary, length):
    """One token needs no step at all: a step would write beyond a cache of the prompt's length."""
    segment = choice_segment([27, 28]) if length == 1 else image_segment(vocabulary, length)
    assert (decode(recorded[0], segment, Sampling()) == decode(decoder, segment, Sampling())).all()
    assert not recorded[1].recordings


def test_a_document_is_completed_by_recorded_steps(recorded, generator):
    text, image = Sampling(temperature=2.0, seed=3), Sampling(temperature=3.0, seed=3)
    options = CompletionOptions(text=text, image=image, longest=9)
    made = Generator(recorded[0], make_tokenizers(WORDS, generator.vocabulary)).complete([["a red"], []], options)
    for mine, plain in zip(made, generator.complete([["a red"], []], options), strict=True):
        assert len(mine) == len(plain) > 0
        for one, other in zip(mine, plain, strict=True):
            assert one == other if isinstance(one, str) else (one.codes == other.codes).all()
    assert recorded[1].recordings


def test_given_ids_stay(recorded, decoder, vocabulary):
    segment, forced = image_segment(vocabulary, 12), np.full((4, 12), -1)
    forced[:, 3:9:2], forced[2, 11] = 14, 20
    made = decode(recorded[0], segment, Sampling(guidance=2.0), forced=forced)
    assert (made[forced >= 0] == forced[forced >= 0]).all()
    assert (made == decode(decoder, segment, Sampling(guidance=2.0), forced=forced)).all()
    forced[:] = -1  # what an earlier batch was given is forgotten
    again = decode(recorded[0], segment, Sampling(guidance=2.0), forced=forced)
    assert (again == decode(decoder, segment, Sampling(guidance=2.0))).all()


def test_batches_are_equal_and_the_last_is_filled_up(recorded, decoder, vocabulary):
    """Seven prompts, of which three fit: batches of 3, 3 and 1 by one recorded step."""
    segment = image_segment(vocabulary, 12)
    given, seeds = [GIVEN[number % 4] for number in range(7)], list(range(7))
    recorded[1].free = 3.5 * decoder.cache_bytes(24) / step_graph.CACHE_SHARE
    counted = []
    made = decode_segments(recorded[0], given, segment, Sampling(), seeds, advance=counted.append)
    assert (made == decode_segments(decoder, given, segment, Sampling(), seeds)).all()
    assert sum(counted) == 7 * 12 and [shape.sequences for shape in recorded[0].graphs.kept] == [3]


def test_caches_of_earlier_batches_make_room(recorded, decoder, vocabulary, monkeypatch):
    """What is kept stays within its share of memory, and counts as free for the next batch."""
    graphs, recorder = recorded[0].graphs, recorded[1]
    total = 4.5 * decoder.cache_bytes(24) / step_graph.CACHE_SHARE
    monkeypatch.setattr(recorder, "free_bytes", lambda: total - graphs.cache_bytes)
    for count in (4, 3, 4, 1):
        made = decode_segments(recorded[0], GIVEN[-count:], image_segment(vocabulary, 12), Sampling(), SEEDS[-count:])
        assert len(made) == count
        assert graphs.cache_bytes <= step_graph.CACHE_SHARE * total
        assert list(graphs.kept)[-1].sequences == count
    assert recorder.released == 3  # each drops the one before it: 1 would fit beside 3, but not beside 4


def test_few_shapes_are_kept(recorded, vocabulary, monkeypatch):
    monkeypatch.setattr(step_graph, "GRAPHS_KEPT", 2)
    for kind in ("greedy", "gumbel", "top-k and top-p", "gumbel", "greedy"):
        decode(recorded[0], image_segment(vocabulary, 12), KINDS[kind])
    kept = [graph.step.sampling for graph in recorded[0].graphs.kept.values()]
    assert kept == [KINDS["gumbel"], KINDS["greedy"]]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_one_cache_is_alive_at_a_time(folder, vocabulary, monkeypatch, on_gpu):
    decoder = recording(folder)[0] if on_gpu else Decoder.load(folder)
    alive, most, build = weakref.WeakSet(), [], Cache.build.__func__

    class Watched(Cache):
        __hash__ = object.__hash__

    def watch(cls, *arguments):
        most.append(len(alive))
        alive.add(made := build(Watched, *arguments))
        return made

    monkeypatch.setattr(Cache, "build", classmethod(watch))
    monkeypatch.setattr(batch, "LARGEST_BATCH", 1)
    if on_gpu:
        decoder.graphs.backend.free = 1
    decode(decoder, image_segment(vocabulary, 12), Sampling())
    assert most == ([0] if on_gpu else [0, 0, 0, 0])


def test_equal_prompts_are_read_once(decoder, monkeypatch):
    read, run_layer = [], Decoder._run_layer
    monkeypatch.setattr(Decoder, "_run_layer", lambda *given: read.append(len(given[2])) or run_layer(*given))
    state, cache = decoder.start([[27, 1], [27, 3, 28], [27, 1]], 4)
    assert set(read) == {2} and torch.equal(state[0], state[2])
    for row, prompt in enumerate([[27, 1], [27, 3, 28], [27, 1]]):
        alone, own = decoder.start([prompt], 4)
        assert torch.allclose(state[row], alone[0], atol=1e-6)
        for keys, others in zip(cache.keys + cache.values, own.keys + own.values, strict=True):
            assert torch.allclose(keys[row, :, : len(prompt)], others[0, :, : len(prompt)], atol=1e-6)


def test_a_step_writes_into_the_cache_and_makes_nothing_of_its_size(decoder):
    """By index_put_ on the cache's own four dimensions: no view of the whole cache is written to."""
    _, cache = decoder.start([[27, 1, 5], [27, 3, 28]], 60, cache=decoder.build_cache(2, 62, flat=False))
    ids = torch.tensor([3, 4])
    with torch.inference_mode(), Operations() as seen:
        decoder.advance(ids, cache, 62, True)
    written = [args[0] for name, args, _ in seen.calls if name == "aten::index_put_"]
    assert [id(one) for one in written] == [
        id(part) for pair in zip(cache.keys, cache.values, strict=True) for part in pair
    ]
    largest = max(made.numel() for _, args, made in seen.calls if made is not None and not shares_memory(made, args))
    assert largest < cache.keys[0].numel()


class Operations(TorchDispatchMode):
    """Lists operations: name, arguments, the tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.calls.append((function._schema.name, args, made if isinstance(made, torch.Tensor) else None))
        return made


def shares_memory(made, args):
    given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor) and not one.is_mkldnn}
    return made.untyped_storage().data_ptr() in given


def test_nothing_is_compiled_at_run_time(recorded, vocabulary, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a step must not wait for a compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    decode(recorded[0], image_segment(vocabulary, 12), Sampling())
    assert recorded[1].recordings


def test_free_memory_counts_what_the_allocator_holds(monkeypatch):
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 50), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert CudaGraphs.free_bytes(SimpleNamespace(device="cuda")) == 130


def test_near_ties_explain_what_rounding_turns(recorded, decoder, vocabulary):
    segment, margins = image_segment(vocabulary, 12), np.zeros((4, 12), np.float32)
    expected = decode(decoder, segment, Sampling(), margins=margins)
    assert (margins > 0).all() and np.median(margins) > 0.1
    again = np.zeros_like(margins)
    assert (decode(recorded[0], segment, Sampling(), margins=again) == expected).all()
    assert np.abs(again - margins).max() < 1e-4
    other = expected.copy()
    row, turn = np.unravel_index(margins.argmin(), margins.shape)
    other[row, turn:] = 10 + (other[row, turn:] - 9) % 16
    bound = float(margins.min()) * 1.01
    assert count_near_ties(margins, bound) == 1
    assert unexplained_differences(other, expected, margins, bound) == []
    assert unexplained_differences(other, expected, margins, bound / 2) == [row]
    with pytest.raises(ValueError, match=r"sampler \(inverse-1\) has no margins; use gumbel-1"):
        decode(decoder, segment, Sampling(sampler="inverse-1"), margins=margins)


def test_margins_are_of_drawn_tokens_alone(decoder, vocabulary):
    segment, margins = text_segment(vocabulary, 20), np.zeros((4, 21), np.float32)
    made = decode(decoder, segment, Sampling(temperature=4.0), margins=margins)
    assert (np.isinf(margins) == (made < 0)).all() and (made < 0).any()
    forced = np.full((4, 12), -1)
    forced[:, 2] = 11
    decode(decoder, image_segment(vocabulary, 12), Sampling(), margins=margins[:, :12], forced=forced)
    assert np.isinf(margins[:, 2]).all() and np.isfinite(margins[:, :2]).all()


@pytest.mark.parametrize("sampling", [Sampling(guidance=2.0), Sampling(contrast_k=2)], ids=["guidance", "contrast_k"])
def test_guidance_without_the_other_stream_is_refused(decoder, vocabulary, sampling):
    with pytest.raises(ValueError, match="require prompts without the condition; give `unconditional`, or"):
        decode_segments(decoder, GIVEN, image_segment(vocabulary), sampling, SEEDS)

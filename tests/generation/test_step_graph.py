"""Recorded steps: the tokens of steps that are not recorded, for every kind of sampling; few recordings, little memory.

recorder.py replaces the GPU by a CPU. Buckets are small, so that the width of attention changes within a segment.
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

PROMPTS = [[27, 1, 5, 28], [27, 3, 28], [27, 1, 5, 28], [27, *range(9), 28]]
UNCONDITIONAL = [[27, 30, 28]] * 4
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


def load_recorded(path, **options):
    """A decoder whose steps are recorded, and its recorder."""
    decoder, recorder = Decoder.load(path, **options), Recorder()
    decoder.graphs = StepGraphs(decoder, recorder)
    return decoder, recorder


def decode(decoder, segment, sampling, given=PROMPTS, seeds=SEEDS, **options):
    return decode_segments(
        decoder, given, segment, sampling, seeds, unconditional=UNCONDITIONAL[: len(given)], **options
    )


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_give_the_tokens_of_steps_that_are_not_recorded(path, kind, vocabulary):
    plain, (recorded, recorder) = Decoder.load(path), load_recorded(path)
    segment = image_segment(vocabulary, 12)
    expected = decode(plain, segment, KINDS[kind])
    assert (decode(recorded, segment, KINDS[kind]) == expected).all()
    assert len(recorder.recordings) == 2  # prompts of 11: positions 12 to 16, then 17 to 22


def test_the_same_recording_serves_other_prompts_seeds_and_numbers(path, vocabulary):
    plain, (recorded, recorder) = Decoder.load(path), load_recorded(path)
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


def test_kernels_for_few_rows_get_the_full_cache(path, vocabulary, monkeypatch):
    """A step with special kernels reads lengths, so one recording is enough for all widths."""
    plain, (recorded, recorder) = Decoder.load(path), load_recorded(path)

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
def test_smaller_dtypes_are_recorded(path, kind, vocabulary):
    plain, (recorded, _) = Decoder.load(path, kind), load_recorded(path, dtype=kind)
    segment, margins = image_segment(vocabulary, 12), np.zeros((4, 12), np.float32)
    expected = decode(plain, segment, Sampling(), margins=margins)
    # A masked bf16 attention rounds differently from one without a mask.
    assert not unexplained_differences(decode(recorded, segment, Sampling()), expected, margins, 0.05)


@pytest.fixture
def recorded(folder):
    return load_recorded(folder)


def test_text_reads_from_the_device_every_16_tokens(recorded, decoder, vocabulary):
    segment = Segment(torch.arange(10), 40, (vocabulary.eos,))  # one that never ends
    expected = decode(decoder, segment, Sampling())
    decode(recorded[0], segment, Sampling())  # records, and creates its tables
    with HostReads() as reads:
        assert (decode(recorded[0], segment, Sampling()) == expected).all()
    assert reads.count == 40 // batch.LOOK_EVERY


def last_graph(decoder):
    return list(decoder.graphs.kept.values())[-1]


class HostReads(TorchDispatchMode):
    """Counts values that the host waits for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name in HOST_READS
        return function(*args, **(kwargs or {}))


def test_steps_stop_after_all_texts_have_ended(recorded, decoder, vocabulary):
    segment, sampling = text_segment(vocabulary, 39), Sampling(temperature=4.0)
    counted = []
    result = decode(recorded[0], segment, sampling, advance=counted.append)
    assert (result == decode(decoder, segment, sampling)).all()
    assert (result >= 0).sum(1).max() < batch.LOOK_EVERY  # all end early
    assert sum(counted) == 4 * 40 and int(last_graph(recorded[0]).step.turn) == batch.LOOK_EVERY


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
    result = Generator(recorded[0], make_tokenizers(WORDS, generator.vocabulary)).complete([["a red"], []], options)
    for mine, plain in zip(result, generator.complete([["a red"], []], options), strict=True):
        assert len(mine) == len(plain) > 0
        for one, other in zip(mine, plain, strict=True):
            assert one == other if isinstance(one, str) else (one.codes == other.codes).all()
    assert recorded[1].recordings


def test_forced_ids_are_kept(recorded, decoder, vocabulary):
    segment, forced = image_segment(vocabulary, 12), np.full((4, 12), -1)
    forced[:, 3:9:2], forced[2, 11] = 14, 20
    result = decode(recorded[0], segment, Sampling(guidance=2.0), forced=forced)
    assert (result[forced >= 0] == forced[forced >= 0]).all()
    assert (result == decode(decoder, segment, Sampling(guidance=2.0), forced=forced)).all()
    forced[:] = -1  # ids that an earlier batch forced have no effect
    again = decode(recorded[0], segment, Sampling(guidance=2.0), forced=forced)
    assert (again == decode(decoder, segment, Sampling(guidance=2.0))).all()


def test_batches_have_equal_sizes_and_the_last_is_padded(recorded, decoder, vocabulary):
    """Seven prompts, three of which fit into memory: batches of 3, 3 and 1 with one recorded step."""
    segment = image_segment(vocabulary, 12)
    given, seeds = [PROMPTS[number % 4] for number in range(7)], list(range(7))
    recorded[1].free = 3.5 * decoder.cache_bytes(24) / step_graph.CACHE_SHARE
    counted = []
    result = decode_segments(recorded[0], given, segment, Sampling(), seeds, advance=counted.append)
    assert (result == decode_segments(decoder, given, segment, Sampling(), seeds)).all()
    assert sum(counted) == 7 * 12 and [shape.sequences for shape in recorded[0].graphs.kept] == [3]


def test_caches_of_earlier_batches_are_freed(recorded, decoder, vocabulary, monkeypatch):
    """Kept caches stay within their share of memory, and count as free memory for the next batch."""
    graphs, recorder = recorded[0].graphs, recorded[1]
    total = 4.5 * decoder.cache_bytes(24) / step_graph.CACHE_SHARE
    monkeypatch.setattr(recorder, "free_bytes", lambda: total - graphs.cache_bytes)
    for count in (4, 3, 4, 1):
        result = decode_segments(
            recorded[0], PROMPTS[-count:], image_segment(vocabulary, 12), Sampling(), SEEDS[-count:]
        )
        assert len(result) == count
        assert graphs.cache_bytes <= step_graph.CACHE_SHARE * total
        assert list(graphs.kept)[-1].sequences == count
    assert recorder.released == 3  # each drops the one before it: 1 would fit with 3 in memory, but not with 4


def test_only_a_few_shapes_are_kept(recorded, vocabulary, monkeypatch):
    monkeypatch.setattr(step_graph, "GRAPHS_KEPT", 2)
    for kind in ("greedy", "gumbel", "top-k and top-p", "gumbel", "greedy"):
        decode(recorded[0], image_segment(vocabulary, 12), KINDS[kind])
    kept = [graph.step.sampling for graph in recorded[0].graphs.kept.values()]
    assert kept == [KINDS["gumbel"], KINDS["greedy"]]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_one_cache_is_alive_at_a_time(folder, vocabulary, monkeypatch, on_gpu):
    decoder = load_recorded(folder)[0] if on_gpu else Decoder.load(folder)
    alive, most, build = weakref.WeakSet(), [], Cache.build.__func__

    class WatchedCache(Cache):
        __hash__ = object.__hash__

    def build_watched(cls, *arguments):
        most.append(len(alive))
        alive.add(result := build(WatchedCache, *arguments))
        return result

    monkeypatch.setattr(Cache, "build", classmethod(build_watched))
    monkeypatch.setattr(batch, "LARGEST_BATCH", 1)
    if on_gpu:
        decoder.graphs.backend.free = 1
    decode(decoder, image_segment(vocabulary, 12), Sampling())
    assert most == ([0] if on_gpu else [0, 0, 0, 0])


def test_equal_prompts_are_computed_once(decoder, monkeypatch):
    read, run_layer = [], Decoder._run_layer
    monkeypatch.setattr(Decoder, "_run_layer", lambda *given: read.append(len(given[2])) or run_layer(*given))
    state, cache = decoder.start([[27, 1], [27, 3, 28], [27, 1]], 4)
    assert set(read) == {2} and torch.equal(state[0], state[2])
    for row, prompt in enumerate([[27, 1], [27, 3, 28], [27, 1]]):
        single_state, single_cache = decoder.start([prompt], 4)
        assert torch.allclose(state[row], single_state[0], atol=1e-6)
        for keys, others in zip(cache.keys + cache.values, single_cache.keys + single_cache.values, strict=True):
            assert torch.allclose(keys[row, :, : len(prompt)], others[0, :, : len(prompt)], atol=1e-6)


def test_a_step_writes_into_the_cache_without_a_copy_of_it(decoder):
    """By index_put_ on the four dimensions of the cache: no view of the full cache is written to."""
    _, cache = decoder.start([[27, 1, 5], [27, 3, 28]], 60, cache=decoder.build_cache(2, 62, flat=False))
    ids = torch.tensor([3, 4])
    with torch.inference_mode(), Operations() as seen:
        decoder.advance(ids, cache, 62, True)
    written = [args[0] for name, args, _ in seen.calls if name == "aten::index_put_"]
    assert [id(one) for one in written] == [
        id(part) for pair in zip(cache.keys, cache.values, strict=True) for part in pair
    ]
    largest = max(
        result.numel() for _, args, result in seen.calls if result is not None and not shares_memory(result, args)
    )
    assert largest < cache.keys[0].numel()


class Operations(TorchDispatchMode):
    """Lists operations: name, arguments, the resulting tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function._schema.name, args, result if isinstance(result, torch.Tensor) else None))
        return result


def shares_memory(result, args):
    given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor) and not one.is_mkldnn}
    return result.untyped_storage().data_ptr() in given


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


def test_near_ties_explain_tokens_changed_by_rounding(recorded, decoder, vocabulary):
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


def test_only_drawn_tokens_have_margins(decoder, vocabulary):
    segment, margins = text_segment(vocabulary, 20), np.zeros((4, 21), np.float32)
    result = decode(decoder, segment, Sampling(temperature=4.0), margins=margins)
    assert (np.isinf(margins) == (result < 0)).all() and (result < 0).any()
    forced = np.full((4, 12), -1)
    forced[:, 2] = 11
    decode(decoder, image_segment(vocabulary, 12), Sampling(), margins=margins[:, :12], forced=forced)
    assert np.isinf(margins[:, 2]).all() and np.isfinite(margins[:, :2]).all()


@pytest.mark.parametrize("sampling", [Sampling(guidance=2.0), Sampling(contrast_k=2)], ids=["guidance", "contrast_k"])
def test_guidance_without_unconditional_prompts_is_refused(decoder, vocabulary, sampling):
    with pytest.raises(ValueError, match="require prompts without the condition; give `unconditional`, or"):
        decode_segments(decoder, PROMPTS, image_segment(vocabulary), sampling, SEEDS)

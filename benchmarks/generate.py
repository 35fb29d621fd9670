"""Generation with our decoder and with transformers.generate: the same random weights, interleaved in one run.

    python benchmarks/generate.py                     the quickstart's size and 350m, as in docs/generation.md
    python benchmarks/generate.py --size quickstart --family llama --rounds 8
    python benchmarks/generate.py --size 350m --batch 1 --guidance 1 --tokens 16 --only ours-bf16 ours-int8 ours-int4

Contenders sample image tokens after a caption, without decoding to pixels; transformers with its default cache and with
its static cache, each with its own guidance (a second forward pass per step) if guidance is on. Ratios are a peer's
time divided by ours, so above 1 ours is faster: of the fastest rounds, and the median of pairs within a round. Ratios
of CPU time (all threads) are meaningful on a busy machine, too; those of the wall clock include other processes. The
bandwidth share is the number of bytes that a step must read (weights, the rows of the head that may be sampled, the
filled part of the cache), divided by its CPU time per thread and by the rate of a copy.

    python benchmarks/generate.py --quality exported/ shards/heldout/

Quality of the smaller types: the loss on held-out documents, and the largest and the root mean square difference of the
logits from those of fp32, divided by the standard deviation of the latter.

benchmarks/gpu/generation.py measures a GPU.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import cache, partial

import torch

from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.evaluation.loss import measure_loss
from megatron_cm3leon.export.layouts import Shape, stock_weights
from megatron_cm3leon.generation.batch import decode_segments
from megatron_cm3leon.generation.decoder import DTYPES, KINDS, Decoder
from megatron_cm3leon.generation.grammar import image_segment
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.tokenizers.vocab import Vocabulary

OURS = ("ours-fp32", "ours-bf16", "ours-int8", "ours-int4")
PEERS = ("transformers-fp32", "transformers-static-fp32", "transformers-bf16", "transformers-static-bf16")
SIZES = {"quickstart": (4, 192, 4), "350m": (24, 1024, 16), "760m": (24, 1536, 16), "7b": (32, 4096, 32)}
CAPTION_TOKENS = 24


def make_vocabulary(size: str, tokens: int) -> Vocabulary:
    small = size == "quickstart"
    return Vocabulary(
        text_size=480 if small else 56_320,
        image_size=256 if small else 8_192,
        sentinels=16 if small else 512,
        specials=32 if small else 1_024,
        image_height=1,
        image_width=tokens,
        text_sha256="",
        image_sha256="",
    )


def make_shape(size: str, family: str, vocabulary: Vocabulary, context: int) -> Shape:
    layers, hidden, heads = SIZES[size]
    opt = family == "cm3leon"
    return Shape(
        family="opt" if opt else "llama",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads if opt else heads // 2,
        width=hidden // heads,
        inner=4 * hidden if opt else (8 * hidden // 3 + 255) // 256 * 256,
        context=context,
        vocabulary=vocabulary.size,
        tied=opt,
        activation="gelu" if opt else "silu",
        rope_base=0.0 if opt else 10_000.0,
    )


def make_weights(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random weights in `dtype`, the same for every call."""
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, size in stock_weights(shape).items():
        weight = torch.randn(size, generator=generator, device=device) * 0.02
        weights[name] = (1 + weight if len(size) == 1 else weight).to(dtype)
    return weights


@cache
def build_transformers(shape: Shape, dtype: torch.dtype):
    """The stock transformers class with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    shared = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied, "attn_implementation": "sdpa", "pad_token_id": 0,
    }  # fmt: skip
    if shape.learned_positions:
        specific = {
            "ffn_dim": shape.inner, "word_embed_proj_dim": shape.hidden, "activation_function": shape.activation,
            "enable_bias": False, "layer_norm_elementwise_affine": False, "dropout": 0.0,
        }  # fmt: skip
        model = OPTForCausalLM(OPTConfig(**shared, **specific))
    else:
        specific = {"intermediate_size": shape.inner, "num_key_value_heads": shape.kv_heads, "head_dim": shape.width,
                    "rms_norm_eps": shape.epsilon}  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**shared, **specific))
    missing, unknown = model.to(dtype).load_state_dict(make_weights(shape, dtype), strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    return model.eval()


def build(name: str, shape: Shape, vocabulary: Vocabulary, tokens: int) -> Callable[[int, float], None]:
    """A contender: a function of (prompts per batch, guidance) that samples `tokens` image tokens per prompt."""
    kind = name.rsplit("-", 1)[1]
    dtype = torch.bfloat16 if kind == "int4" else DTYPES.get(kind, torch.float32)
    if name in OURS:
        decoder = Decoder(make_weights(shape, dtype), shape, None if kind in DTYPES else kind)
        ours = partial(sample_images, decoder, vocabulary)
        ours.decoder = ours.args[0]
        return ours
    model = build_transformers(shape, dtype)
    static = {"cache_implementation": "static"} if "static" in name else {}

    @torch.inference_mode()
    def peer(batch: int, guidance: float) -> None:
        prompts = torch.tensor(make_prompts(batch, vocabulary))
        guided = {}
        if guidance != 1:
            without = torch.tensor(make_unconditional(batch, vocabulary))
            guided = {"guidance_scale": guidance, "negative_prompt_ids": without}
        generated = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=True, top_k=0, eos_token_id=None, **static, **guided,
        )  # fmt: skip
        assert generated.shape[1] == prompts.shape[1] + tokens

    return peer


def sample_images(
    decoder: Decoder, vocabulary: Vocabulary, batch: int, guidance: float, tokens: int | None = None
) -> None:
    """Sample the tokens of an image, or its first `tokens`, for each of `batch` prompts."""
    decode_segments(
        decoder,
        make_prompts(batch, vocabulary),
        image_segment(vocabulary, tokens),
        Sampling(guidance=guidance),
        list(range(batch)),
        unconditional=make_unconditional(batch, vocabulary),
    )


def make_prompts(batch: int, vocabulary: Vocabulary) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, vocabulary.text_size, (batch, CAPTION_TOKENS), generator=generator).tolist()
    return [[vocabulary.eos, *text, vocabulary.break_id] for text in texts]


def make_unconditional(batch: int, vocabulary: Vocabulary) -> list[list[int]]:
    return [[vocabulary.eos, vocabulary.sentinel(0), vocabulary.break_id]] * batch


def measure_copy() -> float:
    """Bytes per second of CPU time that a copy of 512 MB reads and writes."""
    source = torch.zeros(1 << 27)
    target = torch.empty_like(source)
    return max(2 * source.nbytes / time_once(lambda: target.copy_(source))[1] for _ in range(6))


def time_once(call: Callable[[], None]) -> tuple[float, float]:
    """Seconds of wall-clock time, and CPU seconds per thread."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, (time.process_time() - cpu) / torch.get_num_threads()


def measure(options: argparse.Namespace, size: str) -> list[dict]:
    """One row per contender, batch size and guidance."""
    tokens = options.tokens or (64 if size == "quickstart" else 24)
    vocabulary = make_vocabulary(size, tokens)
    shape = make_shape(size, options.family, vocabulary, 160 if size == "quickstart" else 1152)
    names = options.only or (*OURS, *PEERS)
    contenders = {name: build(name, shape, vocabulary, tokens) for name in names}
    bandwidth, rows = measure_copy(), []
    for batch in options.batch:
        for guidance in options.guidance:
            seconds = {name: [] for name in names}
            for round_number in range(options.rounds + 1):
                for name, call in contenders.items():
                    spent = time_once(lambda call=call: call(batch, guidance))  # noqa: B023 - called at once
                    if round_number:  # round 0 is the warm-up
                        seconds[name].append(spent)
            rows += describe(size, options.family, batch, guidance, tokens, seconds, contenders, bandwidth)
            for row in rows[-len(names) :]:
                print(json.dumps(row), flush=True)
    return rows


def describe(size, family, batch, guidance, tokens, seconds, contenders, bandwidth) -> list[dict]:
    """Rows of all contenders for one batch size and guidance; `seconds`: contender -> [(wall, CPU) per round]."""
    rows = []
    wall = {name: [one[0] for one in times] for name, times in seconds.items()}
    cpu = {name: [one[1] for one in times] for name, times in seconds.items()}
    for name in seconds:
        row = {"model": f"{family} {size}", "batch": batch, "guidance": guidance, "contender": name}
        row |= {"tokens_per_second": batch * tokens / min(wall[name])}
        row |= {"tokens_per_cpu_second": batch * tokens / min(cpu[name])}
        counterpart = f"ours-{name.rsplit('-', 1)[1]}"
        if name in PEERS and counterpart in seconds:
            for clock, times in (("wall", wall), ("cpu", cpu)):
                row[f"over_ours_{clock}"] = min(times[name]) / min(times[counterpart])
                pairs = zip(times[name], times[counterpart], strict=True)
                row[f"over_ours_{clock}_pairs"] = statistics.median(peer / ours for peer, ours in pairs)
        if name in OURS[2:]:
            others = [min(cpu[other]) for other in OURS[:2] if other in cpu]
            if others:
                row["faster_than_best_of_bf16_fp32"] = min(others) / min(cpu[name])
        if name in OURS:
            decoder, streams = contenders[name].decoder, 2 if guidance != 1 else 1
            cache = streams * batch * decoder.cache_bytes(CAPTION_TOKENS + 2 + tokens // 2)
            read = decoder.step_bytes(torch.arange(*_image_range(decoder))) + cache
            row["bandwidth_share"] = read * tokens / min(cpu[name]) / bandwidth
        rows.append(row)
    return rows


def _image_range(decoder: Decoder) -> tuple[int, int]:
    size = "quickstart" if decoder.vocabulary_size < 1000 else "350m"
    vocabulary = make_vocabulary(size, 1)
    return vocabulary.image_start, vocabulary.image_end


def measure_quality(model: str, shards: str, documents: int = 128) -> None:
    """Print loss and logit differences of every type on held-out documents."""
    corpus = open_shards(shards)
    chosen = [corpus.read(number).astype(int).tolist() for number in range(min(documents, corpus.documents))]
    reference = None
    for kind in KINDS:
        decoder = Decoder.load(model, kind)
        row = {"dtype": kind, **measure_loss(decoder, chosen, [[]] * len(chosen), corpus.vocabulary)}
        logits = torch.cat([decoder.all_logits(torch.tensor([ids]))[0] for ids in chosen])
        reference = logits if reference is None else reference
        difference = (logits - reference) / reference.std()
        row |= {"largest_difference": float(difference.abs().max()), "rms_difference": float(difference.std())}
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["quickstart", "350m"])
    parser.add_argument("--family", choices=["cm3leon", "llama"], default="cm3leon")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts per batch")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0, 3.0], help="guidance weights; 1 turns guidance off"
    )
    parser.add_argument(
        "--tokens", type=int, help="image tokens per prompt; default: 64 at the quickstart's size, else 24"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *PEERS], help="contenders; all by default")
    parser.add_argument(
        "--quality", nargs=2, metavar=("MODEL", "SHARDS"), help="measure the quality of the types instead of the speed"
    )
    options = parser.parse_args()
    if options.quality:
        measure_quality(*options.quality)
        return
    for size in options.size:
        measure(options, size)


if __name__ == "__main__":
    run_tool(main)

"""Decoder: an exported model of either family with a static key-value cache, for prompts of different lengths.

The names of tensors end with their layout: B sequences, S positions of one call, C positions of the cache, H hidden,
N heads, G heads of keys and values, D width of a head.

Prompts begin at position 0 of the cache, and the positions after a short one are overwritten as its sequence grows.
Causal attention never reads later positions, so each prompt is computed as if it were alone; only the steps after the
prompts mask the positions beyond the end of each sequence.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_cm3leon.export.layouts import DTYPES, POSITION_OFFSET, Shape, model_prefix
from megatron_cm3leon.export.reader import WeightFiles, read_shape
from megatron_cm3leon.generation.cache import Cache
from megatron_cm3leon.generation.matrices import Matrix
from megatron_cm3leon.generation.matrix_kinds import QUANTIZED, build_matrix

KINDS = (*DTYPES, *QUANTIZED)
"""Types of the matrices. With a quantized one, all other weights are bf16 on a GPU; on a CPU bf16 with int4, whose
kernel is fast in that type only, and fp32 with int8 and fp8."""
HEADS_KEPT = 4
"""Parts of the output head that are kept in memory: one for images, one or two for text, the complete one."""
_ACTIVATIONS = {"relu": torch.relu_, "gelu": functional.gelu}


@dataclass
class Layer:
    """Weights of one layer; norms are None where they do not exist or have no parameters."""

    qkv: Matrix
    """[(N + 2 G) D, H]: queries, keys, values."""
    out: Matrix
    inner: Matrix
    """[F, H], or gate over up [2 F, H]."""
    outer: Matrix
    norms: tuple[Tensor | None, Tensor | None] = (None, None)
    qk_norm: Tensor | None = None
    """[N + G, D]: the queries' norm, repeated, over the keys'."""


class Decoder:
    """Logits of the next token, position after position."""

    def __init__(self, weights: dict[str, Tensor] | WeightFiles, shape: Shape, quantized: str | None = None) -> None:
        """`weights` by the stock class's names, checked; they are removed, and quantized, one by one."""
        self.shape, self.quantized, self.context = shape, quantized, shape.context
        prefix = model_prefix(shape)
        self.words = weights.pop(f"{prefix}embed_tokens.weight")
        self.head_rows = self.words if shape.tied else weights.pop("lm_head.weight")
        self.norm: Tensor | None = None
        self.positions: Tensor | None = None
        self.angles: tuple[Tensor, Tensor] | None = None
        if shape.learned_positions:
            self.positions = weights.pop(f"{prefix}embed_positions.weight")[POSITION_OFFSET:]
        else:
            self.norm = weights.pop(f"{prefix}norm.weight")
            self.angles = _rotary_angles(shape, self.words.device)
        self.layers = [_take_layer(weights, f"{prefix}layers.{n}.", shape, quantized) for n in range(shape.layers)]
        self._heads: dict[bytes, Matrix] = {}
        self.graphs: object = None
        """The `StepGraphs` of step_graph.py, which imports this module."""

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "fp32", device: str | torch.device = "cpu") -> "Decoder":
        """Load an exported folder; ValueError for any other. `dtype` is one of `KINDS`."""
        folder = Path(folder)
        if dtype not in KINDS:
            raise ValueError(f"dtype ({dtype!r}) must be one of: {', '.join(KINDS)}.")
        shape = read_shape(folder)
        on_cpu = torch.device(device).type == "cpu"
        if dtype == "int4" and not on_cpu:
            raise ValueError(f"dtype (int4) on {device}: int4 is computed on a CPU only; use int8 or fp8 there.")
        weights = WeightFiles(folder, shape, plain_dtype(dtype, torch.device(device)), device)
        return cls(weights, shape, None if dtype in DTYPES else dtype)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def vocabulary_size(self) -> int:
        return self.words.shape[0]

    def cache_bytes(self, length: int) -> int:
        """Bytes of the keys and values of one sequence of `length` positions."""
        shape = self.shape
        return 2 * shape.layers * length * shape.kv_heads * shape.width * self.words.element_size()

    def step_bytes(self, allowed: Tensor | None = None) -> int:
        """Bytes of weights that one step reads, with the rows `allowed` of the head (None: all)."""
        matrices = [part for one in self.layers for part in (one.qkv, one.out, one.inner, one.outer)]
        return sum(matrix.bytes for matrix in [*matrices, self.head(allowed)])

    def head(self, allowed: Tensor | None = None) -> Matrix:
        """The rows `allowed` (ids, ascending) of the output head; None: all rows."""
        key = b"" if allowed is None else allowed.cpu().numpy().tobytes()
        if key not in self._heads:
            while len(self._heads) >= HEADS_KEPT:
                del self._heads[next(iter(self._heads))]
            rows = self.head_rows if allowed is None else self.head_rows[allowed.to(self.device)]
            # Every token depends on the head, and only some of its rows are in memory: 8 bits, also with int4 layers.
            self._heads[key] = build_matrix(rows, "int8" if self.quantized == "int4" else self.quantized)
        return self._heads[key]

    # Prompts and steps

    @torch.inference_mode()
    def start(self, prompts: Sequence[Sequence[int]], room: int, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Compute prompts (lists of ids, none empty); up to `room` tokens can be generated after each.

        Equal prompts (candidates, or a common unconditional one) are computed once and written to each of their rows.
        `cache`, if given, is reused; it has as many sequences and enough positions. Returns the final hidden state
        [B, H] after each prompt's last token, for `logits`, and the cache. ValueError for an id that the vocabulary
        does not have, and for prompts that do not fit into the context.
        """
        highest = max(map(max, prompts))
        if highest >= self.vocabulary_size:
            raise ValueError(f"a prompt has the id {highest}; the model's {self.vocabulary_size} begin with 0.")
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        self.check_length(longest, room)
        if cache is None:
            cache = self.build_cache(len(prompts), longest + room - 1)
        cache.begin(lengths)
        distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        which = None
        if len(distinct) < len(prompts):
            which = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=self.device)
        ids_BS = torch.zeros(len(distinct), longest, dtype=torch.long)
        for row, prompt in zip(ids_BS, distinct, strict=True):
            row[: len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
        state_BSH = self._embed(ids_BS.to(self.device))
        with attention_kernels(self.device):
            for layer, cached_keys, cached_values in zip(self.layers, cache.keys, cache.values, strict=True):
                keys, values = self._run_layer(layer, state_BSH)
                cached_keys[:, :, :longest] = keys if which is None else keys[which]
                cached_values[:, :, :longest] = values if which is None else values[which]
        ends = torch.tensor([len(prompt) - 1 for prompt in distinct], device=self.device)
        last = self._normalize(state_BSH[torch.arange(len(distinct), device=self.device), ends], self.norm)
        return last if which is None else last[which], cache

    def build_cache(self, sequences: int, size: int, flat: bool | None = None) -> Cache:
        """An empty cache of `size` positions per sequence; `flat` (by default on a CPU): see cache.py."""
        shape = (sequences, self.shape.kv_heads, size, self.shape.width)
        flat = self.device.type == "cpu" if flat is None else flat
        return Cache.build(self.shape.layers, shape, self.words.dtype, self.device, flat)

    @torch.inference_mode()
    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """Append one token to each sequence; return the final hidden state [B, H] after it."""
        cache.longest += 1
        return self.advance(ids_B, cache, cache.longest, cache.ragged)

    def advance(self, ids_B: Tensor, cache: Cache, width: int, masked: bool) -> Tensor:
        """`step` over the first `width` positions of the cache; shapes depend on `width` and `masked` only.

        All state that changes between steps is on the device, so that a GPU can replay the step as a graph. Keys and
        values are written in place.
        """
        shape, batch = self.shape, len(ids_B)
        state_BH = self.words[ids_B]
        if self.positions is not None:
            state_BH = state_BH + self.positions[cache.lengths]
        angles = None if self.angles is None else [table[cache.lengths][:, None] for table in self.angles]
        cache.mask.view(batch, -1).scatter_(1, cache.lengths[:, None], 0.0)
        mask = cache.mask[..., :width] if masked else None
        positions = cache.next_positions()
        with attention_kernels(self.device):
            for number, layer in enumerate(self.layers):
                query, key, value = self._project(layer, state_BH, angles)
                cache.write(number, positions, key, value)
                # Queries that share keys are passed as positions, so that the keys are not copied for each of them.
                attended = functional.scaled_dot_product_attention(
                    query.reshape(batch, shape.kv_heads, -1, shape.width),
                    cache.keys[number][:, :, :width],
                    cache.values[number][:, :, :width],
                    attn_mask=mask,
                )
                self._finish(layer, state_BH, attended.reshape(batch, -1))
        cache.lengths += 1
        return self._normalize(state_BH, self.norm)

    def logits(self, state: Tensor, head: Matrix | None = None) -> Tensor:
        """fp32 logits of final hidden states [..., H], for the rows of `head` (see `head`; None: all)."""
        return (self.head() if head is None else head)(state).float()

    # Complete sequences

    @torch.inference_mode()
    def states(self, ids_BS: Tensor) -> Tensor:
        """Final hidden states [B, S, H] of complete sequences, without a cache, for `logits`."""
        self.check_length(ids_BS.shape[1], 1)
        state_BSH = self._embed(ids_BS)
        for layer in self.layers:
            self._run_layer(layer, state_BSH)
        return self._normalize(state_BSH, self.norm)

    @torch.inference_mode()
    def all_logits(self, ids_BS: Tensor) -> Tensor:
        """fp32 logits [B, S, vocabulary] of complete sequences."""
        return self.logits(self.states(ids_BS))

    def check_length(self, prompt: int, room: int) -> None:
        """ValueError unless `prompt` tokens and `room` generated ones fit; the last of them needs no position."""
        if prompt + room - 1 > self.context:
            raise ValueError(
                f"a prompt of {prompt} tokens with {room} to generate needs {prompt + room - 1} positions; the "
                f"model's context has {self.context}. Shorten the text or give fewer retrieved documents."
            )

    def fit_text(self, longest: int, prompts: Sequence[Sequence[int]]) -> int:
        """Text pieces that fit after the longest prompt, at most `longest`, at least 1; ValueError for `longest` < 1.

        A prompt after which not even one fits is refused when it is decoded.
        """
        if longest < 1:
            raise ValueError(f"longest ({longest}) must be at least 1 text piece.")
        return max(1, min(longest, self.context - max(map(len, prompts), default=0)))

    def _embed(self, ids_BS: Tensor) -> Tensor:
        state_BSH = self.words[ids_BS]
        return state_BSH if self.positions is None else state_BSH + self.positions[: ids_BS.shape[1]]

    def _run_layer(self, layer: Layer, state_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """One layer over complete sequences, in place; returns its keys and values [B, G, S, D]."""
        length = state_BSH.shape[1]
        angles = None if self.angles is None else [table[:length, None] for table in self.angles]
        query, key, value = (part.transpose(1, 2) for part in self._project(layer, state_BSH, angles))
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        self._finish(layer, state_BSH, attended.transpose(1, 2).flatten(2))
        return key, value

    # Parts of a layer

    def _normalize(self, state: Tensor, weight: Tensor | None) -> Tensor:
        if self.shape.learned_positions:
            return functional.layer_norm(state, (self.shape.hidden,), eps=self.shape.epsilon)
        return functional.rms_norm(state, (self.shape.hidden,), weight, self.shape.epsilon)

    def _project(self, layer: Layer, state: Tensor, angles: list[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., N, D], keys and values [..., G, D] of states [..., H]."""
        heads, groups = self.shape.heads, self.shape.kv_heads
        qkv = layer.qkv(self._normalize(state, layer.norms[0])).unflatten(-1, (-1, self.shape.width))
        both, value = qkv.split([heads + groups, groups], dim=-2)
        if layer.qk_norm is not None:
            both = functional.rms_norm(both, both.shape[-1:], None, self.shape.epsilon) * layer.qk_norm
        if angles is not None:
            cosine, sine = angles
            both = (both * cosine + both.roll(self.shape.width // 2, -1) * sine).to(value.dtype)
        query, key = both.split([heads, groups], dim=-2)
        return query, key, value

    def _finish(self, layer: Layer, state: Tensor, attended: Tensor) -> None:
        """Add attention's output and the feed-forward layer's to the residual stream, in place."""
        state += layer.out(attended)
        inner = layer.inner(self._normalize(state, layer.norms[1]))
        if self.shape.learned_positions:
            inner = _ACTIVATIONS[self.shape.activation](inner)
        else:
            gate, up = inner.chunk(2, dim=-1)
            inner = functional.silu(gate) * up
        state += layer.outer(inner)


def _take_layer(weights: dict[str, Tensor] | WeightFiles, prefix: str, shape: Shape, quantized: str | None) -> Layer:
    def take(name: str) -> Tensor:
        return weights.pop(f"{prefix}{name}.weight")

    qkv = build_matrix(torch.cat([take(f"self_attn.{part}_proj") for part in ("q", "k", "v")]), quantized)
    if shape.learned_positions:
        out, inner, outer = (build_matrix(take(name), quantized) for name in ("self_attn.out_proj", "fc1", "fc2"))
        return Layer(qkv, out, inner, outer)
    inner = build_matrix(torch.cat([take("mlp.gate_proj"), take("mlp.up_proj")]), quantized)
    layer = Layer(
        qkv,
        build_matrix(take("self_attn.o_proj"), quantized),
        inner,
        build_matrix(take("mlp.down_proj"), quantized),
        norms=(take("input_layernorm"), take("post_attention_layernorm")),
    )
    if shape.family == "qwen3":
        query, key = take("self_attn.q_norm"), take("self_attn.k_norm")
        layer.qk_norm = torch.cat([query.expand(shape.heads, -1), key.expand(shape.kv_heads, -1)])
    return layer


def plain_dtype(kind: str, device: torch.device) -> torch.dtype:
    """Type of all weights that are not quantized, for one of `KINDS`."""
    if kind in DTYPES:
        return DTYPES[kind]
    return torch.float32 if device.type == "cpu" and kind != "int4" else torch.bfloat16


def _rotary_angles(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 cosine and signed sine [context, D]; dimensions d and d + D/2 are rotated (RoFormer, arXiv 2104.09864).

    x cos + roll(x, D/2) sin, with the sine of the first half negative.
    """
    rates = shape.rope_base ** (torch.arange(0, shape.width, 2, dtype=torch.float32) / -shape.width)
    angles = torch.arange(shape.context)[:, None].float() * rates
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([cosine, cosine], -1).to(device), torch.cat([-sine, sine], -1).to(device)


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """On a GPU, attention without cuDNN, which builds a plan for every new shape (tens of ms): prompts differ."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])

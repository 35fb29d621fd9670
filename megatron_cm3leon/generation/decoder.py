"""Decoder: an exported model of either family with a static key-value cache, for prompts of different lengths.

Needs torch and safetensors alone. Layout of a tensor is in its name: B sequences, S positions of one call, C positions
of the cache, H hidden, N heads, G heads of keys and values, D width of a head.

Prompts stand at the left of the cache and what follows a short one is overwritten as its sequence grows: causal
attention never reads to the right, so prompts are computed as without the others, and only the steps after them mask
what lies beyond each sequence's own end.
"""

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
"""Types the matrices may have. All else is bf16 on a GPU; on a CPU bf16 with int4, whose kernel takes no other type as
fast, and fp32 with int8 and fp8."""
HEADS_KEPT = 4
"""Parts of the output head that are kept ready: one for pictures, one or two for text, a whole one."""
_ACTIVATIONS = {"relu": torch.relu_, "gelu": functional.gelu}


@dataclass
class Layer:
    """Weights of one layer; norms are None where they have no parameters or are not there."""

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
        """`weights` by the stock class's names, checked; they are taken out, and quantized, one by one."""
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
        self.graphs = None
        """Recorded steps, kept by step_graph.py."""

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "fp32", device: str | torch.device = "cpu") -> "Decoder":
        """Read an exported folder; ValueError where it is none. `dtype` is one of `KINDS`."""
        folder = Path(folder)
        if dtype not in KINDS:
            raise ValueError(f"dtype ({dtype!r}) must be one of: {', '.join(KINDS)}.")
        shape = read_shape(folder)
        on_cpu = torch.device(device).type == "cpu"
        if dtype == "int4" and not on_cpu:
            raise ValueError(f"dtype (int4) on {device}: int4 is computed on a CPU only; use int8 or fp8 there.")
        beside = torch.float32 if on_cpu and dtype != "int4" else torch.bfloat16
        weights = WeightFiles(folder, shape, DTYPES.get(dtype, beside), device)
        return cls(weights, shape, None if dtype in DTYPES else dtype)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def vocabulary_size(self) -> int:
        return self.words.shape[0]

    def cache_bytes(self, length: int) -> int:
        """Bytes of the cache of one sequence of `length` positions."""
        shape = self.shape
        return 2 * shape.layers * length * shape.kv_heads * shape.width * self.words.element_size()

    def step_bytes(self, allowed: Tensor | None = None) -> int:
        """Bytes of weights that a step reads, with the head of these rows (all: None)."""
        matrices = [part for one in self.layers for part in (one.qkv, one.out, one.inner, one.outer)]
        return sum(matrix.bytes for matrix in [*matrices, self.head(allowed)])

    def head(self, allowed: Tensor | None = None) -> Matrix:
        """The output head's rows `allowed` (ids, ascending), or all of it."""
        key = b"" if allowed is None else allowed.cpu().numpy().tobytes()
        if key not in self._heads:
            while len(self._heads) >= HEADS_KEPT:
                del self._heads[next(iter(self._heads))]
            rows = self.head_rows if allowed is None else self.head_rows[allowed.to(self.device)]
            # Every token depends on the head, and only some of its rows are kept: it has 8 bits beside 4-bit layers.
            self._heads[key] = build_matrix(rows, "int8" if self.quantized == "int4" else self.quantized)
        return self._heads[key]

    # Prompts and steps

    @torch.inference_mode()
    def start(self, prompts: list, room: int, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Read prompts (lists of ids, none empty) and make room to generate `room` tokens after each.

        Prompts that are equal (candidates, or a common unconditional one) are computed once and written to each of
        their rows. `cache` is one to use again, of as many sequences and enough positions. Returns the final hidden
        state [B, H] after each prompt's last token, for `logits`, and the cache.
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
        distinct = {tuple(prompt): None for prompt in prompts}
        distinct = {prompt: number for number, prompt in enumerate(distinct)}
        which = None
        if len(distinct) < len(prompts):
            which = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=self.device)
        ids_BS = torch.zeros(len(distinct), longest, dtype=torch.long)
        for row, prompt in zip(ids_BS, distinct, strict=True):
            row[: len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
        state_BSH = self._embed(ids_BS.to(self.device))
        with attention_kernels(self.device):
            for layer, cached_keys, cached_values in zip(self.layers, cache.keys, cache.values, strict=True):
                keys, values = self._attend_whole(layer, state_BSH)
                cached_keys[:, :, :longest] = keys if which is None else keys[which]
                cached_values[:, :, :longest] = values if which is None else values[which]
        ends = torch.tensor([len(prompt) - 1 for prompt in distinct], device=self.device)
        last = self._normalise(state_BSH[torch.arange(len(distinct), device=self.device), ends], self.norm)
        return last if which is None else last[which], cache

    def build_cache(self, sequences: int, size: int, flat: bool | None = None) -> Cache:
        """An empty cache of `size` positions per sequence; `flat` (by default on a CPU): see cache.py."""
        shape = (sequences, self.shape.kv_heads, size, self.shape.width)
        flat = self.device.type == "cpu" if flat is None else flat
        return Cache.build(self.shape.layers, shape, self.words.dtype, self.device, flat)

    @torch.inference_mode()
    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """Append one token to each sequence; the final hidden state [B, H] after it."""
        cache.longest += 1
        return self.advance(ids_B, cache, cache.longest, cache.ragged)

    def advance(self, ids_B: Tensor, cache: Cache, width: int, masked: bool) -> Tensor:
        """`step` over the first `width` positions of the cache; for one width and `masked` its shapes never change.

        Everything that changes is on the device, so that a GPU can replay the step. Keys and values are written in
        place.
        """
        shape, batch = self.shape, len(ids_B)
        state_BH = self.words[ids_B]
        if self.positions is not None:
            state_BH = state_BH + self.positions[cache.lengths]
        angles = None if self.angles is None else [table[cache.lengths][:, None] for table in self.angles]
        cache.mask.view(batch, -1).scatter_(1, cache.lengths[:, None], 0.0)
        mask = cache.mask[..., :width] if masked else None
        places = cache.next_places()
        with attention_kernels(self.device):
            for number, layer in enumerate(self.layers):
                query, key, value = self._project(layer, state_BH, angles)
                cache.write(number, places, key, value)
                # Queries that share keys stand as if they were positions: no copy of the keys for each.
                attended = functional.scaled_dot_product_attention(
                    query.reshape(batch, shape.kv_heads, -1, shape.width),
                    cache.keys[number][:, :, :width],
                    cache.values[number][:, :, :width],
                    attn_mask=mask,
                )
                self._finish(layer, state_BH, attended.reshape(batch, -1))
        cache.lengths += 1
        return self._normalise(state_BH, self.norm)

    def logits(self, state: Tensor, head: Matrix | None = None) -> Tensor:
        """fp32 logits from final hidden states [..., H]; `head` are the rows that matter (see `head`)."""
        return (self.head() if head is None else head)(state).float()

    # Whole sequences

    @torch.inference_mode()
    def states(self, ids_BS: Tensor) -> Tensor:
        """Final hidden states [B, S, H] of whole sequences, without a cache; `logits` takes any of them."""
        self.check_length(ids_BS.shape[1], 1)
        state_BSH = self._embed(ids_BS)
        for layer in self.layers:
            self._attend_whole(layer, state_BSH)
        return self._normalise(state_BSH, self.norm)

    @torch.inference_mode()
    def all_logits(self, ids_BS: Tensor) -> Tensor:
        """fp32 logits [B, S, vocabulary] of whole sequences."""
        return self.logits(self.states(ids_BS))

    def check_length(self, prompt: int, room: int) -> None:
        """Refuse a prompt that leaves no room; the last token generated needs no position of its own."""
        if prompt + room - 1 > self.context:
            raise ValueError(
                f"a prompt of {prompt} tokens with {room} to generate needs {prompt + room - 1} positions; the "
                f"model's context has {self.context}. Shorten the text or give fewer retrieved documents."
            )

    def _embed(self, ids_BS: Tensor) -> Tensor:
        state_BSH = self.words[ids_BS]
        return state_BSH if self.positions is None else state_BSH + self.positions[: ids_BS.shape[1]]

    def _attend_whole(self, layer: Layer, state_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """One layer over whole sequences, in place; its keys and values [B, G, S, D]."""
        length = state_BSH.shape[1]
        angles = None if self.angles is None else [table[:length, None] for table in self.angles]
        query, key, value = (part.transpose(1, 2) for part in self._project(layer, state_BSH, angles))
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        self._finish(layer, state_BSH, attended.transpose(1, 2).flatten(2))
        return key, value

    # Parts of a layer

    def _normalise(self, state: Tensor, weight: Tensor | None) -> Tensor:
        if self.shape.learned_positions:
            return functional.layer_norm(state, (self.shape.hidden,), eps=self.shape.epsilon)
        return functional.rms_norm(state, (self.shape.hidden,), weight, self.shape.epsilon)

    def _project(self, layer: Layer, state: Tensor, angles: list[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., N, D], keys and values [..., G, D] of states [..., H]."""
        heads, groups = self.shape.heads, self.shape.kv_heads
        qkv = layer.qkv(self._normalise(state, layer.norms[0])).unflatten(-1, (-1, self.shape.width))
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
        inner = layer.inner(self._normalise(state, layer.norms[1]))
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
        names = ("self_attn.out_proj", "fc1", "fc2")
        return Layer(qkv, *(build_matrix(take(name), quantized) for name in names))
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


def _rotary_angles(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 cosine and signed sine [context, D]; dimension d turns with d + D/2 (RoFormer, arXiv 2104.09864).

    x cos + roll(x, D/2) sin, with the sine of the first half negative.
    """
    rates = shape.rope_base ** (torch.arange(0, shape.width, 2, dtype=torch.float32) / -shape.width)
    angles = torch.arange(shape.context)[:, None].float() * rates
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([cosine, cosine], -1).to(device), torch.cat([-sine, sine], -1).to(device)


def attention_kernels(device: torch.device) -> AbstractContextManager:
    """On a GPU, attention without cuDNN: it builds a plan for every new shape (tens of ms), and prompts differ."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])

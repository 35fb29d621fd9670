"""Decoder: the exported model with a key-value cache, for batches of prompts of different lengths.

Reads the safetensors of an exported folder (OPT's names) and needs torch alone. Layout of a tensor is in its
name: B sequences, S positions of one call, C positions of the cache, H hidden, N heads, D head width.

Prompts stand at the left of the cache and what follows a short one is overwritten as its sequence grows:
causal attention never reads to the right, so prompts are computed as without the others, and only the steps
after them mask what lies beyond each sequence's own end.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

LAYER_NORM_EPSILON = 1e-5
POSITION_OFFSET = 2
"""Rows in front of the learned positions that OPT never reads."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_REQUIRED = {
    "model_type": "opt",
    "enable_bias": False,
    "layer_norm_elementwise_affine": False,
    "do_layer_norm_before": True,
}


@dataclass
class Layer:
    """Weights of one layer, query, key and value in one matrix [3H, H]."""

    qkv: Tensor
    out: Tensor
    inner: Tensor
    outer: Tensor


@dataclass
class Cache:
    """Keys and values of every layer [B, C, N, D], and how many positions of each sequence are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor  # [B]
    longest: int
    ragged: bool

    def select(self, sequences: Tensor) -> "Cache":
        """A copy with these sequences, any of them any number of times."""
        return Cache(
            [keys[sequences] for keys in self.keys],
            [values[sequences] for values in self.values],
            self.lengths[sequences],
            self.longest,
            self.ragged,
        )


class Decoder:
    """Logits of the next token, position after position."""

    def __init__(self, weights: dict[str, Tensor], config: dict) -> None:
        prefix = "model.decoder."
        self.heads, self.context = config["num_attention_heads"], config["max_position_embeddings"]
        self.activation = {"relu": functional.relu_, "gelu": functional.gelu}[config["activation_function"]]
        self.words = weights[prefix + "embed_tokens.weight"]
        self.head = weights.get("lm_head.weight", self.words)
        self.positions = weights[prefix + "embed_positions.weight"][POSITION_OFFSET:]
        self.hidden = self.words.shape[1]
        self.layers = []
        for number in range(config["num_hidden_layers"]):
            name = f"{prefix}layers.{number}."
            attention = [weights[f"{name}self_attn.{part}_proj.weight"] for part in ("q", "k", "v", "out")]
            inner, outer = weights[name + "fc1.weight"], weights[name + "fc2.weight"]
            self.layers.append(Layer(torch.cat(attention[:3]), attention[3], inner, outer))

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "fp32", device: str | torch.device = "cpu") -> "Decoder":
        """Read an exported folder; ValueError where it is none."""
        folder = Path(folder)
        if dtype not in DTYPES:
            raise ValueError(f"dtype ({dtype!r}) must be one of: {', '.join(DTYPES)}.")
        config = load_config(folder)
        return cls(_read_weights(folder, config, DTYPES[dtype], device), config)

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def vocabulary_size(self) -> int:
        return self.words.shape[0]

    def cache_bytes(self, length: int) -> int:
        """Bytes of the cache of one sequence of `length` positions."""
        return 2 * len(self.layers) * length * self.hidden * self.words.element_size()

    @torch.inference_mode()
    def start(self, prompts: list, room: int) -> tuple[Tensor, Cache]:
        """Read prompts (lists of ids, none empty) and make room to generate `room` tokens after each.

        Returns the final hidden state [B, H] after each prompt's last token, for `logits`, and the cache.
        """
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        self.check_length(longest, room)
        ids_BS = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in zip(ids_BS, prompts, strict=True):
            row[: len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
        ids_BS = ids_BS.to(self.device)
        shape = (len(prompts), longest + room - 1, self.heads, self.hidden // self.heads)
        cache = Cache([], [], torch.tensor(lengths, device=self.device), longest, min(lengths) < longest)
        state_BSH = self.words[ids_BS] + self.positions[:longest]
        for layer in self.layers:
            query, keys, values = self._project(layer, state_BSH)
            for store, new in ((cache.keys, keys), (cache.values, values)):
                store.append(new.new_zeros(shape))
                store[-1][:, :longest] = new
            attended = functional.scaled_dot_product_attention(
                query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), is_causal=True
            )
            self._finish(layer, state_BSH, attended.transpose(1, 2))
        last = state_BSH[torch.arange(len(prompts), device=self.device), cache.lengths - 1]
        return self._normalise(last), cache

    @torch.inference_mode()
    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """Append one token to each sequence; the final hidden state [B, H] after it."""
        rows = torch.arange(len(ids_B), device=self.device)
        state_BSH = (self.words[ids_B] + self.positions[cache.lengths])[:, None]
        cache.longest += 1
        mask = self._mask(cache, state_BSH.dtype) if cache.ragged else None
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            query, key, value = self._project(layer, state_BSH)
            if cache.ragged:
                keys[rows, cache.lengths], values[rows, cache.lengths] = key[:, 0], value[:, 0]
            else:
                keys[:, cache.longest - 1], values[:, cache.longest - 1] = key[:, 0], value[:, 0]
            attended = functional.scaled_dot_product_attention(
                query.transpose(1, 2),
                keys[:, : cache.longest].transpose(1, 2),
                values[:, : cache.longest].transpose(1, 2),
                attn_mask=mask,
            )
            self._finish(layer, state_BSH, attended.transpose(1, 2))
        cache.lengths = cache.lengths + 1
        return self._normalise(state_BSH[:, 0])

    def logits(self, state: Tensor, head: Tensor | None = None) -> Tensor:
        """fp32 logits from final hidden states [..., H]; `head` is those rows of `self.head` that matter."""
        return functional.linear(state, self.head if head is None else head).float()

    @torch.inference_mode()
    def states(self, ids_BS: Tensor) -> Tensor:
        """Final hidden states [B, S, H] of whole sequences, without a cache; `logits` takes any of them."""
        self.check_length(ids_BS.shape[1], 1)
        state_BSH = self.words[ids_BS] + self.positions[: ids_BS.shape[1]]
        for layer in self.layers:
            query, keys, values = (part.transpose(1, 2) for part in self._project(layer, state_BSH))
            attended = functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
            self._finish(layer, state_BSH, attended.transpose(1, 2))
        return self._normalise(state_BSH)

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

    def _normalise(self, state: Tensor) -> Tensor:
        return functional.layer_norm(state, (self.hidden,), eps=LAYER_NORM_EPSILON)

    def _project(self, layer: Layer, state_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = state_BSH.shape
        qkv = functional.linear(self._normalise(state_BSH), layer.qkv)
        return qkv.view(batch, length, 3, self.heads, self.hidden // self.heads).unbind(2)

    def _finish(self, layer: Layer, state_BSH: Tensor, attended_BSND: Tensor) -> None:
        """Add attention's output and the feed-forward layer's to the residual stream, in place."""
        state_BSH += functional.linear(attended_BSND.reshape(state_BSH.shape), layer.out)
        inner = self.activation(functional.linear(self._normalise(state_BSH), layer.inner))
        state_BSH += functional.linear(inner, layer.outer)

    def _mask(self, cache: Cache, dtype: torch.dtype) -> Tensor:
        """Additive [B, 1, 1, C]: each sequence reads up to the token it is at."""
        columns = torch.arange(cache.longest, device=self.device)
        beyond = columns > cache.lengths[:, None]
        return torch.zeros(beyond.shape, dtype=dtype, device=self.device).masked_fill_(beyond, float("-inf"))[
            :, None, None
        ]


def load_config(folder: Path) -> dict:
    """config.json of an exported folder; ValueError names what makes another folder unfit."""
    remedy = "give a folder that tools/convert_checkpoint.py export wrote."
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no exported model: it has no config.json; {remedy}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/config.json is not valid JSON ({error}); {remedy}") from error
    for name, value in _REQUIRED.items():
        if config.get(name) != value:
            raise ValueError(f"{folder} is no exported model: {name} is {config.get(name)!r}, not {value!r}; {remedy}")
    return config


def _read_weights(folder: Path, config: dict, dtype: torch.dtype, device) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors; export the checkpoint again.")
    weights = {}
    for path in files:
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                    weights[name] = file.get_tensor(name).to(dtype)
        except Exception as error:  # the library raises a class of its own for a damaged file
            raise ValueError(f"{path} cannot be read ({error}); export the checkpoint again.") from error
    layers = range(config["num_hidden_layers"])
    parts = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")] + ["fc1", "fc2"]
    expected = ["embed_tokens", "embed_positions", *(f"layers.{n}.{part}" for n in layers for part in parts)]
    missing = [name for name in expected if f"model.decoder.{name}.weight" not in weights]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} weights (model.decoder.{missing[0]}.weight ...); "
            f"export the checkpoint again."
        )
    return weights

"""The same model and training step as users would write them, in plain PyTorch and with Hugging Face's classes.

Both families, with the shapes of a ModelConfig; fused AdamW, clipping at 1.0, fp32 main weights (bf16: under autocast).
They have no z-loss, so a model that is compared with them must not have one either.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_cm3leon.config.schema import ModelConfig
from megatron_cm3leon.data.stream.loader import MicroBatch

Step = Callable[[list[MicroBatch]], float]


class PlainLayer(torch.nn.Module):
    """A transformer layer of either family. Layout: B batch, S sequence, H width."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        assert not model.qk_norm, "written without QK-norm"
        self.model, self.width = model, model.hidden_size // model.heads
        hidden, inner = model.hidden_size, model.ffn_hidden_size
        self.llama = model.family == "llama"
        self.qkv = torch.nn.Linear(hidden, (model.heads + 2 * model.kv_heads) * self.width, bias=False)
        self.projection = torch.nn.Linear(hidden, hidden, bias=False)
        self.up = torch.nn.Linear(hidden, 2 * inner if self.llama else inner, bias=False)
        self.down = torch.nn.Linear(inner, hidden, bias=False)
        self.norms = torch.nn.ModuleList(build_norm(model) for _ in range(2))

    def forward(self, x_BSH: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        heads, groups = self.model.heads, self.model.kv_heads
        qkv = self.qkv(self.norms[0](x_BSH)).unflatten(-1, (heads + 2 * groups, self.width)).transpose(1, 2)
        query, key, value = qkv.split([heads, groups, groups], dim=1)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != groups)
        x_BSH = x_BSH + self.projection(context.transpose(1, 2).flatten(2))
        inner = self.up(self.norms[1](x_BSH))
        if self.llama:
            gate, up = inner.chunk(2, dim=-1)
            return x_BSH + self.down(F.silu(gate) * up)
        return x_BSH + self.down(F.relu(inner))


def build_norm(model: ModelConfig) -> torch.nn.Module:
    if model.family == "llama":
        return torch.nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)
    return torch.nn.LayerNorm(model.hidden_size, eps=model.norm_epsilon, elementwise_affine=False)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat([-right, left], dim=-1) * sine).to(x.dtype)


class PlainModel(torch.nn.Module):
    """`forward(tokens [B, S], positions [B, S])` gives logits [B, S, vocabulary]."""

    def __init__(self, model: ModelConfig, vocabulary: int, length: int) -> None:
        super().__init__()
        self.model = model
        self.tokens = torch.nn.Embedding(vocabulary, model.hidden_size)
        self.positions = torch.nn.Embedding(length, model.hidden_size) if model.family == "cm3leon" else None
        self.layers = torch.nn.ModuleList(PlainLayer(model) for _ in range(model.layers))
        self.norm = build_norm(model)
        self.head = torch.nn.Linear(model.hidden_size, vocabulary, bias=False)
        torch.nn.init.normal_(self.tokens.weight, std=0.02)
        if model.tied_embeddings:
            self.head.weight = self.tokens.weight

    def forward(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
        x_BSH, angles = self.tokens(tokens_BS), None
        if self.positions is not None:
            x_BSH = x_BSH + self.positions(positions_BS)
        else:
            width = self.model.hidden_size // self.model.heads
            rates = self.model.rope_base ** (torch.arange(0, width, 2, device=tokens_BS.device).float() / -width)
            angles_SD = (positions_BS[0, :, None].float() * rates).repeat(1, 2)
            angles = angles_SD.cos(), angles_SD.sin()
        for layer in self.layers:
            x_BSH = layer(x_BSH, angles)
        return self.head(self.norm(x_BSH))


def build_hugging_face(model: ModelConfig, vocabulary: int, length: int) -> torch.nn.Module:
    """OPTForCausalLM, LlamaForCausalLM or (QK-norm) Qwen3ForCausalLM of the same shapes, with torch's SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shared = {
        "vocab_size": vocabulary,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": length,
        "tie_word_embeddings": model.tied_embeddings,
        "attn_implementation": "sdpa",
    }
    if model.family == "llama":
        shared |= {
            "intermediate_size": model.ffn_hidden_size,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.hidden_size // model.heads,
            "rms_norm_eps": model.norm_epsilon,
        }
        return Qwen3ForCausalLM(Qwen3Config(**shared)) if model.qk_norm else LlamaForCausalLM(LlamaConfig(**shared))
    opt = OPTConfig(
        **shared,
        ffn_dim=model.ffn_hidden_size,
        word_embed_proj_dim=model.hidden_size,
        activation_function=model.activation,
        dropout=0.0,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
    )
    return OPTForCausalLM(opt)


def token_losses(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token, [B * S]."""
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), labels_BS.flatten(), reduction="none")


def torch_step(
    model: torch.nn.Module, compute_logits: Callable, bf16: bool, device: torch.device, compiled_loss: bool = False
) -> Step:
    """Step function of a torch model: forward, weighted loss, backward, clip, fused AdamW."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compute_losses = torch.compile(token_losses, dynamic=False) if compiled_loss else token_losses

    def step(batches: list[MicroBatch]) -> float:
        total = sum(batch.loss_weights.sum() for batch in batches)
        loss_sum = 0.0
        for batch in batches:
            tokens, labels, weights, positions = (
                tensor.to(device, non_blocking=True)
                for tensor in (batch.tokens, batch.labels, batch.loss_weights, batch.position_ids)
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = compute_logits(model, tokens, positions)
            losses = compute_losses(logits, labels)
            loss = (losses * weights.flatten()).sum() / total
            loss.backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss_sum)  # waits for the device

    return step


def plain_step(model: ModelConfig, vocabulary: int, length: int, bf16: bool, device: torch.device) -> Step:
    plain = PlainModel(model, vocabulary, length)
    return torch_step(plain, lambda module, tokens, positions: module(tokens, positions), bf16, device)


def hugging_face_step(
    model: ModelConfig,
    vocabulary: int,
    length: int,
    bf16: bool,
    device: torch.device,
    compiled: bool = False,
    compiled_loss: bool = False,
) -> Step:
    """`compiled`: compile the model with torch.compile, not the loss; `compiled_loss`: also compile the loss."""
    with torch.device(device):  # weights are initialized on the device
        module = build_hugging_face(model, vocabulary, length)
    if compiled:
        module = torch.compile(module)

    def compute_logits(module: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return module(tokens, use_cache=False).logits

    return torch_step(module, compute_logits, bf16, device, compiled_loss)

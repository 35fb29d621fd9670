"""Compare token losses of a stage on one rank with a forward pass in plain torch and with Qwen3 of transformers."""

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.distributed.launch import Rank, choose_device
from megatron_cm3leon.engine.groups import destroy_groups, initialize_groups
from tests.data.corpora import make_vocabulary

LAYERS, WIDTH, HEADS, LENGTH = 2, 32, 4, 20


def compute_plain_losses(weights: dict, tokens: torch.Tensor, labels: torch.Tensor, vocabulary: int) -> torch.Tensor:
    words = weights["embedding.word_embeddings.weight"]
    x = words[tokens] + weights["embedding.position_embeddings.weight"][: tokens.shape[1]]
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}."
        normed = F.layer_norm(x, (WIDTH,), eps=1e-5)
        qkv = normed @ weights[prefix + "self_attention.linear_qkv.weight"].T
        query, key, value = qkv.view(*tokens.shape, HEADS, 3, -1).permute(3, 0, 2, 1, 4)
        scores = query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
        scores += torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + context @ weights[prefix + "self_attention.linear_proj.weight"].T
        hidden = F.relu(F.layer_norm(x, (WIDTH,), eps=1e-5) @ weights[prefix + "mlp.linear_fc1.weight"].T)
        x = x + hidden @ weights[prefix + "mlp.linear_fc2.weight"].T
    logits = F.layer_norm(x, (WIDTH,), eps=1e-5) @ words[:vocabulary].T
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def compute_stock_losses(weights: dict, tokens: torch.Tensor, labels: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Qwen3ForCausalLM (LLaMA with RMSNorm of queries and keys) with the same weights."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=256,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            head_dim=WIDTH // HEADS,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
        )
    )
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"][:vocabulary],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"][:vocabulary],
    }
    for layer in range(LAYERS):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        groups = weights[ours + "self_attention.linear_qkv.weight"].view(2, HEADS // 2 + 2, WIDTH // HEADS, WIDTH)
        for name, part in zip("qkv", groups.split([HEADS // 2, 1, 1], dim=1), strict=True):
            state[f"{theirs}self_attn.{name}_proj.weight"] = part.reshape(-1, WIDTH)
        state[theirs + "self_attn.o_proj.weight"] = weights[ours + "self_attention.linear_proj.weight"]
        for name in "qk":
            state[f"{theirs}self_attn.{name}_norm.weight"] = weights[f"{ours}self_attention.{name}_layernorm.weight"]
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        state |= {theirs + "mlp.gate_proj.weight": gate, theirs + "mlp.up_proj.weight": up}
        state[theirs + "mlp.down_proj.weight"] = weights[ours + "mlp.linear_fc2.weight"]
        state[theirs + "input_layernorm.weight"] = weights[ours + "input_layernorm.weight"]
        state[theirs + "post_attention_layernorm.weight"] = weights[ours + "pre_mlp_layernorm.weight"]
    model.load_state_dict(state)
    logits = model.eval()(tokens).logits
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def check_family(rank: Rank, overrides: list[str], expected_losses) -> None:
    overrides = [f"model.layers={LAYERS}", f"model.hidden_size={WIDTH}", f"model.heads={HEADS}", *overrides]
    config = load_config(None, [*overrides, f"data.seq_length={LENGTH}", "train.precision=fp32"])
    validate_config(config, 1)
    initialize_groups(config, rank, choose_device("cpu", rank))
    from megatron.core import parallel_state

    from megatron_cm3leon.model.builder import build_stage, locate_parameters
    from megatron_cm3leon.model.weights import canonical_shapes

    vocabulary = make_vocabulary()
    [stage] = build_stage(config, vocabulary)
    torch.manual_seed(0)
    weights, shapes = {}, {}
    for parameter, placement in locate_parameters(stage):
        torch.nn.init.normal_(parameter, std=0.2)  # also padded rows, which must have no effect
        weights[placement.name], shapes[placement.name] = parameter.detach(), placement.shape
    assert shapes == canonical_shapes(config, vocabulary.size)
    tokens, labels = torch.randint(0, vocabulary.size, (2, 3, LENGTH))
    positions = torch.arange(LENGTH).expand(3, -1)
    found = stage(tokens, positions, None, labels=labels)
    expected = expected_losses(weights, tokens, labels, vocabulary.size)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    check_samples(stage, vocabulary.size)
    parallel_state.destroy_model_parallel()


def check_samples(stage, vocabulary: int) -> None:
    """Two samples with alternating tokens in one sequence must have the same losses as each sample alone."""
    tokens, labels = torch.randint(0, vocabulary, (2, 1, LENGTH))
    samples = (torch.arange(LENGTH) * 2 // 3 % 2)[None]
    positions = torch.where(samples == 0, (samples == 0).cumsum(1), (samples == 1).cumsum(1)) - 1
    packed = stage(tokens, positions, torch.stack([samples, positions]), labels=labels)
    for sample in (0, 1):
        columns = (samples[0] == sample).nonzero()[:, 0]
        own_positions = torch.arange(len(columns))[None]
        expected = stage(tokens[:, columns], own_positions, None, labels=labels[:, columns])
        torch.testing.assert_close(packed[:, columns], expected, rtol=1e-5, atol=1e-5)


def main() -> None:
    rank = Rank.from_environment()
    check_family(rank, [], compute_plain_losses)
    check_family(rank, ["model.family=llama", "model.kv_heads=2", "model.qk_norm=true"], compute_stock_losses)
    print("forward agrees")
    destroy_groups()


if __name__ == "__main__":
    main()

"""One rank: token losses of the built stage against a forward written out in plain torch."""

import torch
import torch.nn.functional as F

from megatron_cm3leon.config import load_config
from megatron_cm3leon.engine.parallel import Rank, choose_device, destroy_groups, initialize_groups
from tests.data.corpora import make_vocabulary

LAYERS, WIDTH, HEADS, LENGTH = 2, 32, 4, 20


def plain_losses(weights: dict, tokens: torch.Tensor, labels: torch.Tensor, vocabulary: int) -> torch.Tensor:
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


def main() -> None:
    overrides = [f"model.layers={LAYERS}", f"model.hidden_size={WIDTH}", f"model.heads={HEADS}"]
    config = load_config(None, [*overrides, f"data.seq_length={LENGTH}", "train.precision=fp32"])
    config.validate(1)
    rank = Rank.from_environment()
    initialize_groups(config, rank, choose_device("cpu", rank))
    from megatron_cm3leon.model.builder import build_stage, place_parameters

    vocabulary = make_vocabulary()
    [stage] = build_stage(config, vocabulary)
    torch.manual_seed(0)
    weights = {}
    for parameter, place in place_parameters(stage):
        torch.nn.init.normal_(parameter, std=0.2)  # padded rows too: they must not matter
        weights[place.name] = parameter.detach()
    tokens, labels = torch.randint(0, vocabulary.size, (2, 3, LENGTH))
    positions = torch.arange(LENGTH).expand(3, -1)
    found = stage(tokens, positions, None, labels=labels)
    torch.testing.assert_close(found, plain_losses(weights, tokens, labels, vocabulary.size), rtol=1e-5, atol=1e-5)
    print("forward agrees")
    destroy_groups()


if __name__ == "__main__":
    main()

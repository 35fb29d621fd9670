"""One training step of ours beside plain PyTorch and Hugging Face, the same model, interleaved in one run.

    python benchmarks/train_step.py --layers 6 --hidden 256 --sequence 512 --precision bf16

Every contender takes the same weights' shapes, the same batch, AdamW with clipping at 1.0, fp32 main
weights (bf16: the two peers under autocast). A round times each once; the table gives the fastest and
the median round, and each peer's time over ours (above 1: ours is faster).
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from transformers import OPTConfig, OPTForCausalLM

from megatron_cm3leon.cli import run_tool
from megatron_cm3leon.config import load_config
from megatron_cm3leon.data.loader import MicroBatch
from megatron_cm3leon.engine.parallel import Rank, choose_device, initialize_groups, set_threads
from megatron_cm3leon.tokenizers.vocab import Vocabulary


class PlainLayer(torch.nn.Module):
    """The transformer layer of family cm3leon as one would write it by hand."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(hidden, 3 * hidden, bias=False)
        self.projection = torch.nn.Linear(hidden, hidden, bias=False)
        self.up = torch.nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = torch.nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        qkv = self.qkv(F.layer_norm(x, (hidden,))).view(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(context.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.down(F.relu(self.up(F.layer_norm(x, (hidden,)))))


class PlainModel(torch.nn.Module):
    def __init__(self, layers: int, hidden: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(vocabulary, hidden)
        self.positions = torch.nn.Embedding(length, hidden)
        self.layers = torch.nn.ModuleList(PlainLayer(hidden, heads) for _ in range(layers))
        torch.nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(F.layer_norm(x, x.shape[-1:]), self.tokens.weight)


def torch_contender(model: torch.nn.Module, logits_of, bf16: bool, device: torch.device):
    """Step function of a torch model: forward, weighted loss, backward, clip, fused AdamW."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batches: list[MicroBatch]) -> float:
        total = sum(batch.loss_weights.sum() for batch in batches)
        loss_sum = 0.0
        for batch in batches:
            tokens, labels, weights, positions = (
                tensor.to(device) for tensor in (batch.tokens, batch.labels, batch.loss_weights, batch.position_ids)
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = logits_of(model, tokens, positions)
            losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
            loss = (losses * weights.flatten()).sum() / total
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss_sum

    return step


def build_contenders(options: argparse.Namespace, vocabulary: Vocabulary, device: torch.device) -> dict:
    from megatron_cm3leon.engine.megatron import MegatronEngine

    config = load_config(
        None,
        [
            f"model.layers={options.layers}",
            f"model.hidden_size={options.hidden}",
            f"model.heads={options.heads}",
            "model.init_std=0.02",
            f"data.seq_length={options.sequence}",
            f"train.precision={options.precision}",
            f"parallel.zero={options.zero}",
        ],
    )
    config.validate(1)
    engine = MegatronEngine(config, vocabulary, device)
    bf16 = options.precision == "bf16"
    plain = PlainModel(options.layers, options.hidden, options.heads, vocabulary.size, options.sequence)
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=vocabulary.size,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            ffn_dim=4 * options.hidden,
            num_attention_heads=options.heads,
            max_position_embeddings=options.sequence,
            word_embed_proj_dim=options.hidden,
            dropout=0.0,
            enable_bias=False,
            layer_norm_elementwise_affine=False,
            attn_implementation="sdpa",
        )
    )
    return {
        "megatron_cm3leon": lambda batches: engine.train_step(batches, 0, 1e-4).loss,
        "plain PyTorch": torch_contender(plain, lambda model, t, p: model(t, p), bf16, device),
        "Hugging Face OPT": torch_contender(opt, lambda model, t, p: model(t, use_cache=False).logits, bf16, device),
    }


def make_batches(options: argparse.Namespace, vocabulary: Vocabulary) -> list[MicroBatch]:
    shape = (options.micro_batch, options.sequence + 1)
    batches = []
    for _ in range(options.accumulate):
        block = torch.randint(0, vocabulary.size, shape)
        positions = torch.arange(options.sequence).expand(options.micro_batch, -1)
        batches.append(
            MicroBatch(
                tokens=block[:, :-1].contiguous(),
                labels=block[:, 1:].contiguous(),
                loss_weights=torch.ones(options.micro_batch, options.sequence),
                position_ids=positions,
                samples=None,
                trimmed=0,
            )
        )
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256, help="width of the residual stream")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=512, help="tokens a block")
    parser.add_argument("--micro-batch", type=int, default=4, help="blocks in one forward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes a step")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens; a multiple of 128")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--zero", type=int, choices=(0, 1), default=0, help="parallel.zero of ours")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes every core")
    options = parser.parse_args()
    rank = Rank.from_environment()
    device = choose_device("auto", rank)
    set_threads(options.threads, rank)
    initialize_groups(load_config(), rank, device)
    vocabulary = Vocabulary(
        text_size=options.vocabulary - 128,
        image_size=64,
        sentinels=32,
        specials=64,
        image_height=8,
        image_width=8,
        text_sha256="",
        image_sha256="",
    )
    contenders = build_contenders(options, vocabulary, device)
    batches = make_batches(options, vocabulary)
    seconds = {name: [] for name in contenders}
    for number in range(options.rounds + 2):
        for name, step in contenders.items():
            start = time.perf_counter()
            step(batches)  # returns the loss as a float: the device has finished
            if number >= 2:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    tokens = options.micro_batch * options.accumulate * options.sequence
    ours = seconds["megatron_cm3leon"]
    print(
        f"{options.precision}, {options.layers} layers, width {options.hidden}, sequence {options.sequence}, {device}"
    )
    print(f"{'':20}{'fastest ms':>12}{'median ms':>12}{'tokens/s':>10}{'/ ours, fastest':>17}{'median of pairs':>17}")
    for name, times in seconds.items():
        pairs = statistics.median(theirs / mine for theirs, mine in zip(times, ours, strict=True))
        print(
            f"{name:20}{min(times) * 1e3:12.1f}{statistics.median(times) * 1e3:12.1f}{tokens / min(times):10.0f}"
            f"{min(times) / min(ours):17.3f}{pairs:17.3f}"
        )
    from megatron_cm3leon.engine.parallel import destroy_groups

    destroy_groups()


if __name__ == "__main__":
    run_tool(main)

"""The check at the end of every conversion: logits of the checkpoint's weights against the stock class on the export.

One side is model/reference.py on canonical weights, the other the transformers class itself, built without weights:
each layer loads its weights from the export's files just before it runs and drops them afterwards. So comparing a 7b
model takes the memory of one layer and the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.shards.reader import open_shards
from megatron_cm3leon.export.folder import ExportFolder
from megatron_cm3leon.model.reference import Read, reference_logits
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary

LARGEST_RELATIVE_DIFFERENCE = 1e-5
"""Relative to the largest |logit|, in fp32: two correct evaluations differ by about 1e-6."""
CHECKED_POSITIONS = 512
"""Length of the compared sequences, or the model's context if that is shorter."""


@dataclass(frozen=True)
class Comparison:
    """Result of a check."""

    max_abs_difference: float
    max_abs_logit: float
    sequences: dict[str, int]
    """Kind (random, real) -> number of compared sequences."""
    positions: int

    @property
    def relative(self) -> float:
        return self.max_abs_difference / self.max_abs_logit if self.max_abs_logit else float("inf")

    @property
    def passed(self) -> bool:
        return self.relative <= LARGEST_RELATIVE_DIFFERENCE  # also false for NaN

    def describe(self) -> str:
        counts = " and ".join(f"{count} {kind}" for kind, count in self.sequences.items())
        return (
            f"max |logit difference| {self.max_abs_difference:.3g}, {self.relative:.3g} of the largest |logit| "
            f"{self.max_abs_logit:.3g} (at most {LARGEST_RELATIVE_DIFFERENCE:g}; {counts} sequences of "
            f"{self.positions} tokens, fp32)"
        )


def compare_logits(read: Read, config: Config, export: ExportFolder, shards: str | Path | None) -> Comparison:
    """Compare the model of the canonical weights that `read` returns with the stock class on `export`.

    `shards` is a folder of documents of the same vocabulary; with None only a random sequence is compared.
    """
    length = min(config.data.seq_length, CHECKED_POSITIONS)
    ids, sequences = make_sequences(export.vocabulary, length, shards)
    with meter(2 * config.model.layers, "comparing logits", "layers") as progress:
        expected = reference_logits(read, config, ids, progress.advance)
        found = stock_logits(export, ids, progress.advance)
    # In place: both are [sequences, positions, vocabulary].
    largest = expected.abs().max().item()
    return Comparison(expected.sub_(found).abs_().max().item(), largest, sequences, length)


def require_passed(comparison: Comparison, output: str | Path) -> None:
    """ValueError if the logits differ."""
    if not comparison.passed:
        raise ValueError(
            f"the exported model's logits differ from the trained model's: {comparison.describe()}; nothing was "
            f"written to {output}."
        )


def make_sequences(vocabulary: Vocabulary, length: int, shards: str | Path | None) -> tuple[Tensor, dict[str, int]]:
    """Ids [sequences, length] and the number of each kind: one random, one of documents joined by </s>."""
    generator = torch.Generator().manual_seed(0)
    rows, kinds = [torch.randint(vocabulary.size, (length,), generator=generator)], {"random": 1}
    if shards is not None:
        corpus = open_shards(shards)
        check_same_vocabulary(vocabulary, corpus.vocabulary, f"shard folder {shards}")
        ids: list[int] = []
        number = 0
        while len(ids) < length:
            ids += [vocabulary.eos, *corpus.read(number % corpus.documents).tolist()]
            number += 1
        rows.append(torch.tensor(ids[:length]))
        kinds["real"] = 1
    return torch.stack(rows), kinds


def find_shards(config: Config, vocabulary: Vocabulary) -> str | None:
    """The run's own shards, if they still exist and have its vocabulary."""
    for folder in [config.data.shards, *(source.shards for source in config.data.sources)]:
        if folder and (Path(folder) / "manifest.json").is_file() and open_shards(folder).vocabulary == vocabulary:
            return folder
    return None


@torch.no_grad()
def stock_logits(export: ExportFolder, ids: Tensor, advance: Callable[[], None] = lambda: None) -> Tensor:
    """Logits [B, S, vocabulary] of the stock class that config.json names, in fp32, layer by layer."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(export.folder, local_files_only=True)
    with torch.device("meta"):
        # Eager attention rounds the softmax differently.
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    _fill_buffers(model, config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    names = set(model.state_dict()) - tied
    if names != set(export.files):
        raise ValueError(f"{type(model).__name__} and {export.folder} differ in {sorted(names ^ set(export.files))}.")
    [layers] = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    prefix = next(name for name, module in model.named_modules() if module is layers)
    _load(model, "", [name for name in names if not name.startswith(f"{prefix}.")], export)
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    for number, layer in enumerate(layers):
        start = f"{prefix}.{number}."
        layer.register_forward_pre_hook(
            lambda module, inputs, start=start: _load(module, start, [n for n in names if n.startswith(start)], export)
        )
        layer.register_forward_hook(lambda module, inputs, output: _unload(module, advance))
    return model.eval()(ids, use_cache=False).logits


def _fill_buffers(model: nn.Module, config) -> None:
    """Compute the tensors that are not weights, such as the frequencies of rotary positions."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(module)(config=config))


def _load(module: nn.Module, prefix: str, names: list[str], export: ExportFolder) -> None:
    weights = {name.removeprefix(prefix): export.read(name) for name in names}
    module.load_state_dict(weights, assign=True, strict=bool(prefix))


def _unload(module: nn.Module, advance: Callable[[], None]) -> None:
    module.to("meta")
    advance()

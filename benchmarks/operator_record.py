"""Record every operator of a training step at real shapes, on a CPU and without memory: FLOPs, bytes, live bytes.

    python benchmarks/operator_record.py                                    all models, as a table and JSON Lines
    python benchmarks/operator_record.py --models "llama 350m" --output -   one of them, JSON on the terminal
    python benchmarks/operator_record.py --tree ../other                    the package of another checkout

Forward and backward passes of one micro-batch and the optimizer step of MegatronEngine, bf16, on fake tensors that
claim to be CUDA tensors (fake_gpu.py). Memory inside a library (workspaces, attention's internal buffers) is not
counted. operator_trace.py describes how bytes, and kernels of torch.compile (`--set train.compile=true`), are counted.
A row has per class of operators the launches, FLOPs, bytes read and written; every matrix product and attention with
its shape and count; the peak of live bytes; and for the loss, the bytes moved and the live bytes per logit (including
the logits and their gradient).
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/operator_record.jsonl"
COLUMNS = ("launches", "flops", "read", "written")
MODELS = {  # family, preset, layers (0: the preset's), micro-batch size; the values of 7b are linear in its layers
    "cm3leon 7b, 8 layers": ("cm3leon", "7b", 8, 1),
    "cm3leon 7b, 16 layers": ("cm3leon", "7b", 16, 1),
    "cm3leon 760m": ("cm3leon", "760m", 0, 4),
    "cm3leon 350m": ("cm3leon", "350m", 0, 4),
    "llama 7b, 8 layers": ("llama", "7b", 8, 1),
    "llama 7b, 16 layers": ("llama", "7b", 16, 1),
    "llama 350m": ("llama", "350m", 0, 4),
}
COMPARED = ("model.dropout=0", "train.z_loss=0", "checkpoint.asynchronous=false", "optimizer.rule=none")
"""Settings of the GPU measurements: Hugging Face's models have no z-loss."""


def describe_tree(folder: Path) -> str:
    """Commit of a checkout, followed by + if the package differs from it."""
    git = ["git", "-C", str(folder)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "megatron_cm3leon"]).returncode
    return commit.stdout.strip() + ("+" if changed else "")


def record(name: str, options: argparse.Namespace) -> dict:
    """Record a step of a model; returns its row."""
    import torch
    from fake_gpu import CUDA, pretend_cuda
    from operator_trace import OperatorTrace
    from train_step import make_batches, make_vocabulary

    from megatron_cm3leon.config.loading import load_config
    from megatron_cm3leon.config.validation import validate_config
    from megatron_cm3leon.distributed.launch import Rank
    from megatron_cm3leon.engine.groups import initialize_groups

    family, preset, layers, micro_batch = MODELS[name]
    micro_batch = options.micro_batch or micro_batch
    values = [
        f"preset={preset}", f"model.family={family}", f"data.seq_length={options.sequence}", "train.precision=bf16",
        f"train.micro_batch_size={micro_batch}", f"train.global_batch_size={micro_batch}", *COMPARED,
    ]  # fmt: skip
    layers = options.layers or layers
    config = load_config(None, [*values, *([f"model.layers={layers}"] if layers else []), *options.set])
    validate_config(config, 1)
    initialize_groups(config, Rank(0, 1, 0, 1), torch.device("cpu"))
    from megatron_cm3leon.engine.megatron import MegatronEngine
    from megatron_cm3leon.model import builder

    builder.initialize_weights = lambda *arguments, **given: None
    trace = OperatorTrace()
    with pretend_cuda(trace):
        trace.recording = False
        batches = make_batches(options.vocabulary, micro_batch, options.sequence, 1)
        engine = MegatronEngine(config, make_vocabulary(options.vocabulary), CUDA)
        mark_sections(trace, engine, builder)
        engine.train_step(batches, 0, 1e-4)  # compiles, and creates the optimizer's state
        trace.recording = True
        trace.restart()
        engine.train_step(batches, 0, 1e-4)
    row = {
        "tree": options.label or describe_tree(options.tree), "model": name, "family": family, "preset": preset,
        "layers": config.model.layers, "micro_batch": micro_batch, "sequence": options.sequence,
        "vocabulary": options.vocabulary, "settings": options.set, "compared": list(COMPARED),
        "torch": torch.__version__,
    }  # fmt: skip
    return row | measure(trace, micro_batch * options.sequence * options.vocabulary)


def mark_sections(trace, engine, builder) -> None:
    """Mark the operators of the loss and of the optimizer, and the buffers that gradients are added to, for the trace.

    Operators that run once per step, independent of the number of micro-batches, belong to the optimizer; this includes
    conversions of weights.
    """
    for model in engine.model:
        trace.gradients |= {trace.number(one.main_grad) for one in model.parameters() if hasattr(one, "main_grad")}
    passes, step = engine.forward_backward, engine.train_step

    def marked(loss, logits_exist: bool):
        def call(*arguments, **given):
            trace.logits = arguments[0].untyped_storage().nbytes() if logits_exist else 0
            with trace.mark("loss"):
                return loss(*arguments, **given)

        return call

    def unmarked_passes(*arguments, **given):
        trace.section = ""
        try:
            return passes(*arguments, **given)
        finally:
            trace.section = "optimizer"

    def marked_step(*arguments):
        trace.section = "optimizer"
        return step(*arguments)

    def marked_conversion(convert):
        def call(layer):
            with trace.mark("optimizer"):
                convert(layer)

        return call

    for layer in getattr(engine, "converted", []):  # older trees have none
        layer.convert_weight = marked_conversion(type(layer).convert_weight).__get__(layer)
    builder.cross_entropy = marked(builder.cross_entropy, True)
    for module in engine.model[-1].modules():  # train.head_chunk
        if hasattr(module, "chunked_losses"):
            module.chunked_losses = marked(module.chunked_losses, False)
    engine.forward_backward, engine.train_step = unmarked_passes, marked_step


def measure(trace, logits: int) -> dict:
    """The fields of a row that come from the trace; `logits`: number of logits."""
    kernels = trace.kernels()
    classes = {total.kind: {key: getattr(total, key) for key in COLUMNS} for total in trace.summarize()}
    shapes = {
        kind: [[*shape, count] for shape, count in Counter(o.shape for o in kernels if o.kind == kind).items()]
        for kind in ("gemm", "attention")
    }
    peak, _ = trace.peak_bytes()
    loss_peak, before = trace.peak_bytes("loss")
    moved = classes["loss"]["read"] + classes["loss"]["written"]
    return {
        "classes": classes, "shapes": shapes, "peak_bytes": peak, "loss_bytes_per_logit": moved / logits,
        "loss_alive_per_logit": (loss_peak - before + trace.logits) / logits,
    }  # fmt: skip


def print_row(row: dict) -> None:
    print(
        f"\n{row['model']}, tree {row['tree']}, {row['layers']} layers, {' '.join(row['settings']) or 'as configured'}"
    )
    print("| class | launches | TFLOP | GB read | GB written |\n|---|---|---|---|---|")
    for kind, found in row["classes"].items():
        numbers = found["flops"] / 1e12, found["read"] / 1e9, found["written"] / 1e9
        print(f"| {kind} | {found['launches']} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")
    print(
        f"peak {row['peak_bytes'] / 2**30:.2f} GiB; the loss moves {row['loss_bytes_per_logit']:.1f} bytes per logit, "
        f"{row['loss_alive_per_logit']:.1f} alive",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="M")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="further fields of the configuration"
    )
    parser.add_argument(
        "--tree", type=Path, default=ROOT, help="checkout whose package is recorded (default: this one)"
    )
    parser.add_argument("--label", default="", help="name of the tree in the rows (default: its commit)")
    parser.add_argument(
        "--output", default=str(RESULTS), help="JSON Lines file to append to; - writes none (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=0, help="number of layers (default: the model's)")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences per micro-batch (default: by model)")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens per sequence (default: 4096)")
    parser.add_argument("--vocabulary", type=int, default=65_536, help="size of the vocabulary (default: 65536)")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(options.tree.resolve()), str(ROOT / "benchmarks")]
    if options.one:
        print(json.dumps(record(options.one, options)))
        return
    for name in options.models:  # a process can create megatron-core's groups only once
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=quiet)
        if done.returncode:
            raise SystemExit(f"error: {name} could not be recorded; the cause is printed above.")
        row = json.loads(done.stdout.splitlines()[-1])
        print_row(row)
        if options.output != "-":
            with open(options.output, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

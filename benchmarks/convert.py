"""Conversion of a model of a preset: peak memory and time of export and import, and the documented memory limit.

    python benchmarks/convert.py --preset 7b --dtype bf16 --shard-size 5GB --scratch /a/disk/with/50GB

Writes a checkpoint of the preset with random weights layer by layer (fp32, only weights, one file per layer), and a
tokenizer folder of the paper's size. Then runs tools/convert_checkpoint.py export, and import from its output, each in
its own process, whose peak resident memory is reported by the kernel. The limit is 1.3 times the largest file of
weights plus 2 GB. The disk must hold the checkpoint (7b: 27 GB) and an export; all files are removed at the end.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.format import Piece, step_folder
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.common.cli import HelpFormatter, run_tool
from megatron_cm3leon.common.progress import track
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.model.weights import canonical_shapes
from megatron_cm3leon.tokenizers.folder import write_vocabulary
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.text import train_text
from megatron_cm3leon.tokenizers.vocab import Vocabulary
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools/convert_checkpoint.py"
PAPER_SIZE = 65536


def write_tokenizers(folder: Path) -> Vocabulary:
    """A small text model and random image codes, with specials up to the paper's vocabulary."""
    folder.mkdir()
    text = train_text((f"word{number} word{number % 7} and {number}" for number in range(2000)), 1000)
    text.save(folder / "text.model")
    shape = dict(image_size=32, codebook_size=8192, embed_dim=4, latent_channels=8, base_channels=8, norm="pixel")
    ImageTokenizer(VQGAN(VQGANConfig(**shape, channel_multiplier=(1, 1), num_res_blocks=0))).save(folder / "image")
    return write_vocabulary(folder, specials=PAPER_SIZE - 8192 - 1000)


def write_checkpoint(run: Path, config: Config, vocabulary: Vocabulary) -> Path:
    """Write random weights, one file per layer, so that only one layer is in memory."""
    folder = step_folder(run, 1)
    sharded.begin_checkpoint(folder)
    groups: dict[str, list] = {}
    for name, shape in canonical_shapes(config, vocabulary.size).items():
        layer = name.split(".")[2] if name.startswith("decoder.layers.") else name
        groups.setdefault(layer, []).append((name, shape))
    generator = torch.Generator().manual_seed(0)
    for number, group in enumerate(track(groups.values(), label="random checkpoint", unit="files")):
        pieces = []
        for name, shape in group:
            weight = torch.empty(shape).normal_(std=0.02, generator=generator)
            weight += len(shape) == 1  # norms
            pieces.append((Piece(name, "weight", shape, (0,) * len(shape), shape, 0, weight.numel()), weight.view(-1)))
        sharded.write_rank_file(folder, number, pieces)
    sharded.finish_checkpoint(folder, config, vocabulary, TrainState(step=1), {"torch": torch.__version__})
    return folder


def measure(label: str, files: Path, *arguments) -> None:
    """Run the tool once; print its time, peak resident memory, and the limit given by the largest file in `files`."""
    before = time.perf_counter()
    process = subprocess.Popen([sys.executable, TOOL, *map(str, arguments)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - before
    if status:
        raise ValueError(f"{label} ended with status {os.waitstatus_to_exitcode(status)}.")
    largest = max(path.stat().st_size for path in files.glob("*.safetensors")) / 1e9
    peak = usage.ru_maxrss * 1024 / 1e9
    print(
        f"{label}: {seconds:.0f} s ({usage.ru_utime:.0f} s user, {usage.ru_stime:.0f} s system), peak "
        f"{peak:.2f} GB; largest file {largest:.2f} GB, limit {1.3 * largest + 2:.2f} GB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--preset", default="350m", help="350m, 760m or 7b")
    parser.add_argument("--family", default="cm3leon", help="cm3leon or llama")
    parser.add_argument("--dtype", default="bf16", help="fp32, bf16 or fp16")
    parser.add_argument("--shard-size", default="5GB", help="maximum size of a file of weights")
    parser.add_argument("--scratch", help="folder to create a temporary folder in (default: the system's)")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.scratch))
    try:
        config = load_config(None, [f"preset={arguments.preset}", f"model.family={arguments.family}"])
        validate_config(config)
        vocabulary = write_tokenizers(scratch / "tok")
        checkpoint = write_checkpoint(scratch / "run", config, vocabulary)
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        print(f"checkpoint: {size / 1e9:.1f} GB", flush=True)
        exported = scratch / "exported"
        paths = ["--checkpoint", checkpoint, "--tokenizer", scratch / "tok", "--output", exported]
        options = ["--dtype", arguments.dtype, "--shard-size", arguments.shard_size]
        measure(f"export {arguments.preset} {arguments.dtype}", exported, "export", *paths, *options)
        shutil.rmtree(scratch / "run")
        measure("import", exported, "import", "--model", exported, "--output", scratch / "back")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    run_tool(main)

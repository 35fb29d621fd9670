"""Merging: what was trained on a base (lora, train.only) and that base become a full checkpoint.

W + alpha / rank x B A is computed in fp32, a weight at a time. The result is a checkpoint like any other: it is
exported, resumed (without Adam's moments) and tuned again.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.format import Piece, list_checkpoints, step_folder
from megatron_cm3leon.common.atomic_io import atomic_directory
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.config.loading import Config, save_config
from megatron_cm3leon.config.schema import LoraConfig
from megatron_cm3leon.model.weights import canonical_shapes, trained_shapes
from megatron_cm3leon.training.base_model import BaseModel, open_recorded_base

FILE_NUMBERS = 1 << 28
"""fp32 values per file of the checkpoint (1 GiB), which is what is in memory at a time."""


class MergedWeights:
    """The weights of the full model, by canonical names."""

    def __init__(self, adapter: sharded.CheckpointReader, base: BaseModel) -> None:
        self.adapter, self.base = adapter, base
        self.shapes = canonical_shapes(adapter.config, adapter.vocabulary.size)

    def read(self, name: str) -> Tensor:
        """One weight, fp32: trained, or the base's with the product of its adapter."""
        shape = self.shapes[name]
        if self.adapter.has(name, "weight"):
            weight = self.adapter.read(name)
        else:
            weight = self.base.read_part(name, "weight", (0,) * len(shape), shape)
        of_adapter = [name.replace(".weight", f".lora_{letter}.weight") for letter in "AB"]
        if not self.adapter.has(of_adapter[0], "weight"):
            return weight
        a, b = (self.adapter.read(each) for each in of_adapter)
        return weight + self.adapter.config.lora.scale * (b @ a)


def open_adapter(path: str | Path) -> sharded.CheckpointReader:
    """Open a checkpoint, or a run's newest, that holds what was trained on a base.

    Raises ValueError for one that holds a full model, and for one that lacks a part of what its configuration trains.
    """
    folder = Path(path)
    found = list_checkpoints(folder.parent if folder.name == "checkpoints" else folder)
    reader = sharded.CheckpointReader(found[-1] if found else folder)
    config = reader.config
    if not config.trains_part:
        raise ValueError(
            f"{reader.folder} holds a full model (lora.rank is 0 and train.only empty); give a checkpoint of a run "
            f"with one of them, or export it as it is."
        )
    reader.check_parameters(trained_shapes(config, reader.vocabulary.size))
    return reader


def open_merged(path: str | Path, base: str | Path | None = None) -> MergedWeights:
    """Open an adapter (as `open_adapter`) and its base: the folder it records, or `base` with the same content.

    Raises ValueError as these do, and for a base with another content.
    """
    reader = open_adapter(path)
    config = reader.config
    if base is not None:
        config.train.init, config.train.init_step = str(base), None
    return MergedWeights(reader, open_recorded_base(config, reader.vocabulary, reader.state, reader.folder))


def merge_adapter(path: str | Path, output: str | Path, base: str | Path | None = None) -> Path:
    """Write the run folder `output` with the full checkpoint of an adapter and its base; returns the checkpoint.

    `path` and `base` as `open_merged`. Raises ValueError as it does, and if `output` is not new or empty; nothing is
    written then.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; give a new run folder.")
    weights = open_merged(path, base)
    reader, config, state = weights.adapter, _as_full(weights.adapter.config), weights.adapter.state
    with atomic_directory(output) as run:
        config.output = str(output.absolute())
        save_config(config, run / "config.yaml")
        folder = step_folder(run, state.step)
        sharded.begin_checkpoint(folder)
        with meter(len(weights.shapes), "merging", "tensors") as progress:
            for number, names in enumerate(_group(weights.shapes)):
                pieces = []
                for name in names:
                    pieces.append(_build_piece(name, weights.read(name)))
                    progress.advance()
                sharded.write_rank_file(folder, number, pieces)
        versions = {"merged from": str(reader.folder), "torch": torch.__version__}
        sharded.finish_checkpoint(folder, config, reader.vocabulary, state, versions)
    return step_folder(output, state.step)


def _as_full(config: Config) -> Config:
    """The configuration of the full model: no adapters, nothing frozen."""
    config = copy.deepcopy(config)
    config.lora = LoraConfig()
    config.train.only, config.train.init, config.train.init_step, config.train.positions = [], "", None, ""
    return config


def _group(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names in groups of at most FILE_NUMBERS numbers, a larger tensor alone."""
    group: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        if group and filled + math.prod(shape) > FILE_NUMBERS:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += math.prod(shape)
    yield group


def _build_piece(name: str, weight: Tensor) -> tuple[Piece, Tensor]:
    shape = tuple(weight.shape)
    return Piece(name, "weight", shape, (0,) * len(shape), shape, 0, weight.numel()), weight.reshape(-1)

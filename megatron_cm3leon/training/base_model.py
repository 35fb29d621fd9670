"""The weights that a new run begins with (train.init): those of a run, of a checkpoint, or of an export.

`open_base_model` finds and checks them; `BaseModel` is the WeightSource that an engine reads its part from, under any
layout. Learned positions become as many as data.seq_length (`resize_positions`).
"""

import copy
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cm3leon.checkpoint.format import MANIFEST, has_step_name, hash_file, list_checkpoints, step_folder
from megatron_cm3leon.checkpoint.sharded import CheckpointReader
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.checkpoint.verify import verify_while_reading
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.distributed.launch import gather_objects
from megatron_cm3leon.model.weights import POSITION_EMBEDDINGS, Placement, draw_initial_weight
from megatron_cm3leon.tokenizers.vocab import Vocabulary, check_same_vocabulary

logger = logging.getLogger(__name__)

_SAME_MODEL = (
    "layers", "hidden_size", "heads", "kv_heads", "ffn_hidden_size", "activation", "qk_norm", "tied_embeddings",
    "norm_epsilon",
)  # fmt: skip
"""Fields of the model section that the weights are bound to, beside the family."""
_EXPORT_FILES = ("config.json", "cm3leon.json")


Part = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name of a weight, offset and shape of a rectangle of it."""


class _Weights(Protocol):
    """The content of a folder with weights."""

    folder: Path
    config: Config
    vocabulary: Vocabulary
    step: int
    """Optimizer steps that the weights were trained for."""

    def hash_content(self) -> str:
        """SHA-256 of the content, hexadecimal; collective."""

    def verify(self, parts: list[Part]) -> AbstractContextManager[None]:
        """Context in which the parts are read, as WeightSource.verify."""

    def read_part(self, name: str, kind: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """As WeightReader.read_part."""


class CheckpointWeights:
    """The weights of a checkpoint; damage is found by its checksums while they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reader = folder, CheckpointReader(folder)
        self.reader.require_whole()
        self.config, self.vocabulary, self.step = self.reader.config, self.reader.vocabulary, self.reader.state.step
        self.read_part = self.reader.read_part

    def hash_content(self) -> str:
        """SHA-256 of the manifest, which has that of every file."""
        return hash_file(self.folder / MANIFEST)

    @contextmanager
    def verify(self, parts: list[Part]) -> Iterator[None]:
        with verify_while_reading(self.reader, self.reader.list_files(parts), gather_objects):
            yield


class ExportWeights:
    """The weights of an export, in fp32. It has no checksums: names, shapes and finite values are checked."""

    def __init__(self, folder: Path) -> None:
        from megatron_cm3leon.export.folder import ExportFolder
        from megatron_cm3leon.export.from_hf import read_run
        from megatron_cm3leon.export.parts import list_parts

        self.folder, self.export = folder, ExportFolder(folder)
        self.config, state = read_run(self.export)
        self.vocabulary, self.step = self.export.vocabulary, state.step
        parts = list_parts(self.config, self.vocabulary.size)
        self.export.check(self.config, parts)
        self.parts = {part.name: part for part in parts}

    def hash_content(self) -> str:
        """SHA-256 over those of config.json, cm3leon.json and all weight files, which the ranks divide."""
        names = sorted([*_EXPORT_FILES, *(path.name for path in self.folder.glob("*.safetensors"))])
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = {name: hash_file(self.folder / name) for name in names[rank::ranks]}
        hashes = {name: value for each in gather_objects(share) for name, value in each.items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def verify(self, parts: list[Part]) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = gather_objects(str(failure) if failure else "")
        if failure:
            raise failure
        if message := next(filter(None, messages), ""):
            raise ValueError(message)

    def read_part(self, name: str, kind: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        from megatron_cm3leon.export.from_hf import read_finite

        return cut_part(read_finite(self.export, self.parts[name]), offset, size)


class BaseModel:
    """Weights for the model of `config`, in which learned positions are as many as its data.seq_length."""

    def __init__(self, weights: _Weights, config: Config) -> None:
        self.weights, self.config, self.folder = weights, config, weights.folder
        self.base_positions = weights.config.data.seq_length

    def check(self, vocabulary: Vocabulary | None) -> None:
        """Raise ValueError, with the remedy, for another vocabulary, model, or an undecided number of positions."""
        if vocabulary:
            check_same_vocabulary(vocabulary, self.weights.vocabulary, f"train.init ({self.folder})")
        model, base = self.config.model, self.weights.config.model
        names = ("family",) if model.family != base.family else _SAME_MODEL
        differing = [name for name in names if getattr(model, name) != getattr(base, name)]
        if differing:
            pairs = [(f"model.{each}", getattr(model, each), getattr(base, each)) for each in differing]
            found = " and ".join(f"{name} ({asked}) is {value}" for name, asked, value in pairs)
            remedy = " ".join(f"{name}={value}" for name, _, value in pairs)
            raise ValueError(
                f"{found} in {self.folder}, whose weights this run begins with (train.init); set {remedy}, or give the "
                f"weights of another model."
            )
        length = self.config.data.seq_length
        if self.has_positions and length > self.base_positions and not self.config.train.positions:
            raise ValueError(
                f"data.seq_length ({length}) must be at most {self.base_positions}, the learned positions of "
                f"{self.folder} (train.init); set train.positions=extend or train.positions=interpolate, or "
                f"data.seq_length={self.base_positions}."
            )

    @property
    def has_positions(self) -> bool:
        """Whether the model has learned positions."""
        return self.config.model.family == "cm3leon"

    @property
    def change_of_positions(self) -> str:
        """extend, interpolate or first (rows); empty when the table stays as it is, and without learned positions."""
        length = self.config.data.seq_length
        if not self.has_positions or length == self.base_positions:
            return ""
        return "first" if length < self.base_positions else self.config.train.positions

    def describe(self, sha256: str) -> dict:
        """The record of the run's state (TrainState.init).

        path: as given, absolute; folder: with the weights; step: that they were trained for; sha256: of the folder's
        content; base_positions and positions, where the number of learned positions changes.
        """
        record = {
            "path": str(Path(self.config.train.init).absolute()),
            "folder": str(self.folder.absolute()),
            "step": self.weights.step,
            "sha256": sha256,
        }
        if change := self.change_of_positions:
            record |= {"base_positions": self.base_positions, "positions": change}
        return record

    def describe_start(self) -> str:
        """What the run begins with, as part of a sentence."""
        return f"the weights of {self.folder}, step {self.weights.step}; {self._describe_positions()}"

    def _describe_positions(self) -> str:
        before, after = self.base_positions, self.config.data.seq_length
        if not self.has_positions:
            old, new = self.weights.config.model.rope_base, self.config.model.rope_base
            rope = f" (model.rope_base {old:g} -> {new:g})" if old != new else ""
            return f"{after} positions (before: {before}) need nothing, because family llama has RoPE{rope}"
        return {
            "": f"the {after} learned positions are unchanged",
            "first": f"the first {after} of {before} learned positions are kept",
            "extend": f"{before} learned positions are kept, {after - before} new ones are added",
            "interpolate": f"{before} learned positions are interpolated to {after}",
        }[self.change_of_positions]

    # --------------------------------------------------------- WeightSource

    def has(self, name: str, kind: str) -> bool:
        """Whether there is such a tensor: weights alone, no moments."""
        return kind == "weight"

    def read_part(self, name: str, kind: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The rectangle of shape `size` at `offset` of a weight, fp32, as WeightReader.read_part."""
        if name == POSITION_EMBEDDINGS and self.change_of_positions:
            return cut_part(self._positions, offset, size)
        return self.weights.read_part(name, kind, offset, size)

    @contextmanager
    def verify(self, placements: list[Placement]) -> Iterator[None]:
        """Verify what the body reads; see WeightSource.verify."""
        parts = [(each.name, each.offset, each.local_shape) for each in placements]
        if self.change_of_positions:  # they are made from all rows
            parts = [part for part in parts if part[0] != POSITION_EMBEDDINGS]
            if len(parts) < len(placements):
                parts.append((POSITION_EMBEDDINGS, (0, 0), self._base_shape))
        with self.weights.verify(parts):
            yield

    @property
    def _base_shape(self) -> tuple[int, ...]:
        return self.base_positions, self.config.model.hidden_size

    @cached_property
    def _positions(self) -> Tensor:
        table = self.weights.read_part(POSITION_EMBEDDINGS, "weight", (0, 0), self._base_shape)
        return resize_positions(table, self.config)


def resize_positions(table: Tensor, config: Config) -> Tensor:
    """Learned positions [data.seq_length, hidden] from those of another length, `table` fp32 [length, hidden].

    Shorter: the first rows. Longer, by train.positions. extend: the rows of `table`, then those that a new model of
    this seed has there. interpolate: row i is row i x (length - 1) / (seq_length - 1) of the table, linearly between
    two rows (in fp64), so that the first and the last row stay.
    """
    before, after = len(table), config.data.seq_length
    if after <= before:
        return table[:after]
    if config.train.positions == "extend":
        shape = (after, table.shape[1])
        added = draw_initial_weight(POSITION_EMBEDDINGS, shape, config, (before, 0), (after - before, shape[1]))
        return torch.cat([table, added])
    scaled = torch.arange(after) * (before - 1)
    low = (scaled // (after - 1)).clamp(max=max(0, before - 2))
    share = ((scaled - low * (after - 1)).double() / (after - 1))[:, None]
    rows = table.double()
    return torch.lerp(rows[low], rows[(low + 1).clamp(max=before - 1)], share).float()


def cut_part(weight: Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """The rectangle of shape `size` at `offset` of a whole tensor; zeros beyond its edge."""
    cut = weight[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]
    if tuple(cut.shape) == tuple(size):
        return cut.contiguous()
    result = weight.new_zeros(size)
    result[tuple(slice(length) for length in cut.shape)] = cut
    return result


def find_weights(path: str, step: int | None = None) -> Path:
    """Folder of the checkpoint or the export that train.init names; `step` as train.init_step.

    Raises ValueError for a path that is neither a run with checkpoints, a checkpoint nor an export, and for a step that
    the run does not have.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"train.init ({path}) is not a folder; give a run folder, a checkpoint (RUN/checkpoints/step-00001000) or "
            f"an export."
        )
    exported = any((folder / name).is_file() for name in _EXPORT_FILES)
    if exported or (folder / MANIFEST).is_file() or has_step_name(folder.absolute()):
        if step is not None:
            what = "an export" if exported else "a checkpoint"
            raise ValueError(
                f"train.init_step ({step}) needs a run folder in train.init ({path}), which is {what}; remove it."
            )
        return folder
    found = list_checkpoints(folder)
    if not found:
        raise ValueError(
            f"train.init ({path}) is neither a run with checkpoints, a checkpoint nor an export; give a run folder, "
            f"RUN/checkpoints/step-00001000, or a folder that tools/convert_checkpoint.py export wrote."
        )
    if step is None:
        return found[-1]
    chosen = step_folder(folder, step)
    if chosen not in found:
        steps = ", ".join(str(int(each.name.removeprefix("step-"))) for each in found)
        raise ValueError(f"train.init_step ({step}) must be a checkpoint of {path}, which has steps {steps}.")
    return chosen


def open_weights(folder: Path) -> _Weights:
    """The weights of a checkpoint or an export; ValueError where the folder is damaged or incomplete."""
    is_export = any((folder / name).is_file() for name in _EXPORT_FILES)
    return ExportWeights(folder) if is_export else CheckpointWeights(folder)


def open_base_model(config: Config, vocabulary: Vocabulary) -> BaseModel:
    """Open and check the weights of train.init; collective, because all ranks take the folder that the first one finds.

    Reads no weight yet. Raises ValueError on every rank, as `find_weights`, `open_weights` and `BaseModel.check` do.
    """
    found: Path | str
    try:
        found = find_weights(config.train.init, config.train.init_step)
    except ValueError as error:
        found = str(error)
    [found, *_] = gather_objects(found)
    if isinstance(found, str):
        raise ValueError(found)
    base = BaseModel(open_weights(found), config)
    base.check(vocabulary)
    return base


def describe_base(config: Config, vocabulary: Vocabulary | None) -> str:
    """Sentence on what a run begins with, for a dry run; `vocabulary` of its data, where they are given.

    Raises ValueError as open_base_model, except for a folder that is not there yet.
    """
    if not Path(config.train.init).exists():
        return f"begins with train.init ({config.train.init}), which is not there yet: it was not checked"
    base = BaseModel(open_weights(find_weights(config.train.init, config.train.init_step)), config)
    base.check(vocabulary)
    return f"begins with {base.describe_start()}"


def check_resumed_init(config: Config, state: TrainState, checkpoint: Path) -> None:
    """Refuse to resume from `checkpoint` with another train.init than that of the run's beginning, recorded in `state`.

    Without train.init, or with the same one, a run resumes; its base need no longer exist.
    """
    if config.trains_part:
        return  # open_recorded_base compares the contents
    asked = config.train.init
    begun = state.init.get("path", "")
    if not asked or str(Path(asked).absolute()) == begun:
        if begun:
            logger.info("the run began with the weights of %s; they are not read again", state.init["folder"])
        return
    before = f"began with the weights of {begun}" if begun else "began with new weights"
    raise ValueError(
        f"train.init ({asked}) is for a new run, but the run of {checkpoint} {before} and would resume; give a new run "
        f"folder (output=...), or remove train.init to resume."
    )


def open_recorded_base(config: Config, vocabulary: Vocabulary, state: TrainState, checkpoint: Path) -> BaseModel:
    """Open the frozen weights of a run that trains a part of them (lora, train.only), to resume from `checkpoint`.

    The folder that `state` records, or train.init where it names another one: the content must be the same. Collective.
    Raises ValueError as open_base_model does, and for another content.
    """
    recorded = Path(state.init["folder"])
    config = copy.deepcopy(config)
    if str(Path(config.train.init).absolute()) == state.init["path"] and recorded.is_dir():
        config.train.init, config.train.init_step = str(recorded), None  # a run may have newer checkpoints now
    base = open_base_model(config, vocabulary)
    if base.weights.hash_content() != state.init["sha256"]:
        raise ValueError(
            f"train.init ({base.folder}) is not the base of {checkpoint}, which has only what was trained on "
            f"{recorded}: the content differs; give a folder with that content, or begin a new run (output=...)."
        )
    return base

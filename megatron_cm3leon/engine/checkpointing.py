"""CheckpointedEngine: what both engines share, mostly saving and loading of weights and Adam's moments.

An engine says where a parameter's fp32 weight and moments are on this rank (`_locate_state`), and which parameters
this rank writes (`_writes`); the position of a parameter in the whole model comes from model/builder.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cm3leon.checkpoint.format import Piece
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.checkpoint.verify import open_verified
from megatron_cm3leon.checkpoint.writer import CheckpointWriter
from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.engine.base import DROPOUT_SEEDING, WeightReader, WeightSource
from megatron_cm3leon.engine.groups import destroy_groups
from megatron_cm3leon.engine.timer import ComputeTimer
from megatron_cm3leon.model.weights import Placement, is_adapter
from megatron_cm3leon.tokenizers.vocab import Vocabulary

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments, in its state and in checkpoints."""


class StateRange(NamedTuple):
    """Part of a parameter whose optimizer state this rank holds."""

    main: torch.Tensor
    """fp32 weight that the optimizer updates; it may contain other parameters as well. Key of the moments."""
    offset: int
    """First number of the part in the flattened `main`."""
    start: int
    """First number of the part in the flattened local parameter."""
    stop: int
    """End (exclusive) of the part in the flattened local parameter."""


class CheckpointedEngine(ABC):
    """Base of the engines; subclasses set `placements` and `adam`, and implement the steps of engine/base.py."""

    placements: list[tuple[torch.nn.Parameter, Placement]]
    """Parameters of this rank and their positions in the whole model."""
    trained: list[tuple[torch.nn.Parameter, Placement]]
    """Those of them that are trained: all, unless lora or train.only freezes some. Checkpoints hold these."""
    adam: torch.optim.Optimizer
    """The optimizer whose state has the moments."""
    versions: dict[str, str]
    """Library -> version, for the manifest of checkpoints."""

    def __init__(self, config: Config, vocabulary: Vocabulary, device: torch.device) -> None:
        """Process groups must exist (engine/groups.py)."""
        self.config, self.vocabulary, self.device = config, vocabulary, device
        self.dropout_seeding = DROPOUT_SEEDING
        self.timer = ComputeTimer(device)
        self.data_group = parallel_state.get_data_parallel_group()
        self.data_rank, self.data_size = self.data_group.rank(), self.data_group.size()
        self.versions = {"torch": torch.__version__, "megatron-core": megatron.core.__version__}
        self.writer = CheckpointWriter(
            dist.get_rank(), dist.get_world_size(), dist.barrier, asynchronous=config.checkpoint.asynchronous
        )

    def compute_seconds(self) -> float:
        """Seconds of computation in the last step; see Engine.compute_seconds."""
        return self.timer.seconds()

    def save(self, folder: Path, state: TrainState) -> None:
        """Write a checkpoint of weights and Adam's moments; see Engine.save."""
        self.writer.save(folder, self._list_pieces(), self.config, self.vocabulary, state, self.versions)

    def poll(self) -> bool:
        """Whether no save is in progress; see Engine.poll."""
        return self.writer.poll()

    def load(self, folder: Path) -> TrainState:
        """Read a checkpoint of any layout and engine; see Engine.load."""
        with open_verified(folder, self.vocabulary, [placement for _, placement in self.trained]) as reader:
            for parameter, placement in self.trained:
                self._load_parameter(reader, parameter, placement, reader.state.step)
        self.dropout_seeding = reader.state.dropout_seeding
        return reader.state

    def load_weights(self, source: WeightSource) -> None:
        """Replace the weights by those of `source`, without moments; see Engine.load_weights."""
        trained = {id(parameter) for parameter, _ in self.trained}
        with source.verify([placement for _, placement in self.placements if not is_adapter(placement.name)]):
            for parameter, placement in self.placements:
                if is_adapter(placement.name):
                    continue
                if id(parameter) in trained:
                    self._load_parameter(source, parameter, placement, 0)
                else:
                    weight = source.read_part(placement.name, "weight", placement.offset, placement.local_shape)
                    self._set_frozen(parameter, weight)

    @torch.no_grad()
    def _set_frozen(self, parameter: torch.nn.Parameter, weight: torch.Tensor) -> None:
        """Give a frozen parameter its weight; both hold this rank's part, perhaps in other shapes."""
        parameter.copy_(weight.view(parameter.shape))

    def close(self) -> None:
        """Wait for the save in progress and destroy the process groups; see Engine.close."""
        self.writer.close()
        destroy_groups()

    def _list_pieces(self) -> Iterator[tuple[Piece, torch.Tensor]]:
        """(position, flat tensor) of what this rank writes; all ranks together write every number once."""
        for number, (parameter, placement) in enumerate(self.trained):
            if not self._writes(number, parameter):
                continue
            main, offset, start, stop = self._locate_state(parameter, placement)
            part = (placement.kept_rows, *placement.local_shape[1:])
            kept = min(stop, math.prod(part))
            if start >= kept:
                continue
            for kind, tensor in ({"weight": main.detach()} | self._get_moments(main)).items():
                piece = Piece(placement.name, kind, placement.shape, placement.offset, part, start, kept)
                yield piece, tensor.reshape(-1)[offset : offset + kept - start]

    def _get_moments(self, main: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adam's moments of a weight of the optimizer; empty before the first step."""
        state = self.adam.state.get(main, {})
        return {kind: state[kind] for kind in MOMENTS if kind in state}

    @abstractmethod
    def _writes(self, number: int, parameter: torch.nn.Parameter) -> bool:
        """Whether this rank writes its part of parameter `number`, and not another rank with the same numbers."""

    @abstractmethod
    def _locate_state(self, parameter: torch.nn.Parameter, placement: Placement) -> StateRange:
        """The part of a parameter whose optimizer state this rank holds."""

    @abstractmethod
    def _load_parameter(
        self, reader: WeightReader, parameter: torch.nn.Parameter, placement: Placement, updates: int
    ) -> None:
        """Read weight and moments of one parameter, which `updates` optimizer steps have changed."""


def is_first_copy(parameter: torch.nn.Parameter) -> bool:
    """Whether this tensor-parallel rank holds a partition of the parameter, or the first of several equal copies."""
    is_partition = getattr(parameter, "tensor_model_parallel", False)
    return is_partition or parallel_state.get_tensor_model_parallel_rank() == 0

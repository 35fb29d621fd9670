"""Import: an export becomes a run folder with one checkpoint; training continues under any layout and engine.

The checkpoint holds the weights and the state of the exported run: the next step reads the batch that would have come
next, at that step's learning rate. Adam's moments are zero.
"""

from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from megatron_cm3leon.checkpoint import sharded
from megatron_cm3leon.checkpoint.format import Piece, step_folder
from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.common.atomic_io import atomic_directory
from megatron_cm3leon.common.progress import meter
from megatron_cm3leon.config.loading import Config, save_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.export.check import Comparison, compare_logits, find_shards, require_passed
from megatron_cm3leon.export.folder import ExportFolder, check_output
from megatron_cm3leon.export.parts import Part, list_parts
from megatron_cm3leon.export.reader import METADATA_FILE
from megatron_cm3leon.tokenizers.folder import Tokenizers

FILE_NUMBERS = 1 << 28
"""fp32 values per file of the checkpoint (1 GiB), which is what is in memory at a time."""


def import_export(
    model: str | Path, output: str | Path, *, check_shards: str | Path | None = None
) -> tuple[Path, Comparison]:
    """Write the run folder `output` from the export `model`; return its checkpoint and the comparison of logits.

    `check_shards` is a folder of shards for the check; by default the run's own, where they still exist. ValueError for
    a folder that is not an export, whose tensors do not match its configuration, are not finite, or give other logits
    in the checkpoint; nothing is written to `output` then.
    """
    export, output = ExportFolder(model), Path(output)
    config, state = read_run(export)
    vocabulary = Tokenizers.load(export.folder).vocabulary
    parts = list_parts(config, vocabulary.size)
    export.check(config, parts)
    check_output(output)
    with atomic_directory(output) as run:
        config.output = str(output.absolute())  # the run is found from any folder
        save_config(config, run / "config.yaml")
        folder = step_folder(run, state.step)
        sharded.begin_checkpoint(folder)
        with meter(len(parts), "importing", "tensors") as progress:
            for number, group in enumerate(_group(parts)):
                pieces = []
                for part in group:
                    pieces.append(_build_piece(part, read_finite(export, part)))
                    progress.advance()
                sharded.write_rank_file(folder, number, pieces)
        sharded.finish_checkpoint(
            folder, config, vocabulary, state, {"imported from": str(model), "torch": torch.__version__}
        )
        reader = sharded.CheckpointReader(folder)
        shards = check_shards or find_shards(config, vocabulary)
        comparison = compare_logits(reader.read, config, export, shards)
        require_passed(comparison, output)
    return step_folder(output, state.step), comparison


def read_run(export: ExportFolder) -> tuple[Config, TrainState]:
    """Configuration and state of the exported run; ValueError where cm3leon.json does not hold them."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), export.metadata["config"]))
        assert isinstance(config, Config)  # because the merged configuration is structured
        state = TrainState.from_dict(export.metadata["state"], config.train.global_batch_size)
    except (OmegaConfBaseException, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{export.folder / METADATA_FILE} does not hold the run's configuration and state ({error}); export the "
            f"checkpoint again."
        ) from error
    validate_config(config)
    return config, state


def _group(parts: list[Part]) -> list[list[Part]]:
    groups: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        count = torch.Size(part.shape).numel()
        if groups[-1] and filled + count > FILE_NUMBERS:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += count
    return groups


def read_finite(export: ExportFolder, part: Part) -> Tensor:
    """One weight in its canonical layout, fp32; ValueError where it has NaN or infinite values."""
    weight = export.read_part(part)
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{' or '.join(part.targets)} of {export.folder} has NaN or infinite values; export the checkpoint again."
        )
    return weight


def _build_piece(part: Part, weight: Tensor) -> tuple[Piece, Tensor]:
    offset = (0,) * len(part.shape)
    return Piece(part.name, "weight", part.shape, offset, part.shape, 0, weight.numel()), weight.reshape(-1)

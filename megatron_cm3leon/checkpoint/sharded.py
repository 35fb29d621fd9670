"""Sharded checkpoints under canonical names: written by every rank at once, read under any layout.

A checkpoint folder holds

    config.yaml  vocab.json  state.json      the run's configuration, vocabulary and TrainState
    rank-00000.safetensors ...               the pieces one rank owned, flat, fp32
    manifest.json                            format, versions, size and SHA-256 of every file

A piece is a flat range of one rank's rectangular part of a whole tensor; its place travels in the
safetensors header. A tensor has up to three kinds: `weight`, and Adam's `exp_avg` and `exp_avg_sq`.
Nothing here depends on the layout that wrote or reads, on megatron-core or on process groups, and no
pickle is read or written. A folder appears under its final name only when it is whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.config import Config, load_config, save_config
from megatron_cm3leon.tokenizers.vocab import Vocabulary

FORMAT = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")
_STEP_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Piece:
    """Where a flat run of numbers lies in a whole tensor."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """First element of the rank's rectangular part."""
    part: tuple[int, ...]
    """Shape of that part."""
    start: int
    """First number of the run, counted in the flattened part."""
    stop: int
    """One past the last number of the run."""


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_folder(run: Path, step: int) -> Path:
    """Folder of the checkpoint of `step` in a run folder."""
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def unfinished(folder: Path) -> Path:
    """Name of a checkpoint folder while it is being written."""
    return folder.with_name(folder.name + ".tmp")


def write_rank(folder: Path, rank: int, pieces: Iterable[tuple[Piece, torch.Tensor]]) -> None:
    """Write one rank's pieces into the unfinished checkpoint of `folder`; tensors are flat fp32."""
    tensors, header = {}, []
    for number, (piece, tensor) in enumerate(pieces):
        assert tensor.numel() == piece.stop - piece.start, f"{piece} does not describe {tensor.numel()} numbers"
        tensors[str(number)] = tensor.detach().reshape(-1).to("cpu", torch.float32).contiguous()
        header.append(asdict(piece))
    path = unfinished(folder) / f"rank-{rank:05d}.safetensors"
    save_file(tensors, path, metadata={"pieces": json.dumps(header)})
    record = {"bytes": path.stat().st_size, "sha256": _hash_file(path)}
    path.with_suffix(".json").write_text(json.dumps(record))


def begin(folder: Path) -> None:
    """Make the empty unfinished folder; one rank calls it before any rank writes."""
    temporary = unfinished(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def finish(folder: Path, config: Config, vocabulary: Vocabulary, state: TrainState, versions: dict) -> None:
    """Write what all ranks share, then give the folder its final name; one rank calls it after every write."""
    temporary = unfinished(folder)
    save_config(config, temporary / "config.yaml")
    vocabulary.save(temporary / "vocab.json")
    state.save(temporary / "state.json")
    files = {}
    for record in sorted(temporary.glob("rank-*.json")):
        files[record.with_suffix(".safetensors").name] = json.loads(record.read_text())
        record.unlink()
    for name in ("config.yaml", "vocab.json", "state.json"):
        path = temporary / name
        files[name] = {"bytes": path.stat().st_size, "sha256": _hash_file(path)}
    manifest = {"format": FORMAT, "step": state.step, "versions": versions, "files": files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if folder.exists():  # a run that went back before this step writes it again
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    latest = folder.parent.parent / "latest"
    pointer = latest.with_suffix(".tmp")
    pointer.write_text(folder.name + "\n")
    os.replace(pointer, latest)


def list_checkpoints(run: str | Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    folders = (Path(run) / "checkpoints").glob("step-*")
    return sorted(folder for folder in folders if _STEP_NAME.fullmatch(folder.name) and folder.is_dir())


def remove_old(run: str | Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints; 0 keeps all."""
    if keep_last:
        for folder in list_checkpoints(run)[:-keep_last]:
            shutil.rmtree(folder)


class CheckpointReader:
    """A complete checkpoint: any whole tensor, or any rectangular part of one, from any layout's files."""

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`; ValueError when it is no checkpoint, is of another format or misses a file."""
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise ValueError(
                f"{self.folder} is no complete checkpoint (it has no manifest.json); "
                f"give a folder such as RUN/checkpoints/step-00001000."
            )
        self.manifest = json.loads(path.read_text())
        if self.manifest.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format {self.manifest.get('format')} is not the one this version reads ({FORMAT})."
            )
        for name, record in self.manifest["files"].items():
            found = (self.folder / name).stat().st_size if (self.folder / name).is_file() else None
            if found != record["bytes"]:
                what = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(
                    f"checkpoint {self.folder} is damaged: {name} {what}, {record['bytes']} bytes were written; "
                    f"delete the folder to resume from the checkpoint before it."
                )

    @cached_property
    def config(self) -> Config:
        config = load_config(self.folder / "config.yaml")
        config.validate()
        return config

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.folder / "vocab.json")

    @cached_property
    def state(self) -> TrainState:
        return TrainState.load(self.folder / "state.json")

    @cached_property
    def _pieces(self) -> dict[tuple[str, str], list[tuple[Piece, Path, str]]]:
        """(name, kind) -> its pieces, each with the file and the key it lies under."""
        found: dict[tuple[str, str], list] = {}
        for name in self.manifest["files"]:
            if not name.startswith("rank-"):
                continue
            path = self.folder / name
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["pieces"])
            for number, fields in enumerate(header):
                fields |= {key: tuple(fields[key]) for key in ("shape", "offset", "part")}
                piece = Piece(**fields)
                found.setdefault((piece.name, piece.kind), []).append((piece, path, str(number)))
        return found

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters, sorted."""
        return sorted({name for name, _ in self._pieces})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole parameter; ValueError for a name the checkpoint does not have."""
        return self._find(name, "weight")[0][0].shape

    def check_parameters(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """ValueError when a parameter of `shapes` (name -> shape of the whole tensor) is not the checkpoint's."""
        unknown = shapes.keys() - set(self.names)
        if unknown:
            raise ValueError(f"checkpoint {self.folder} has no parameter {min(unknown)}; it was made by another model.")
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise ValueError(
                    f"checkpoint {self.folder}: {name} has shape {self.shape(name)}, this model has {shape}; use the "
                    f"model and data.seq_length of the checkpoint's config.yaml."
                )

    def has(self, name: str, kind: str) -> bool:
        return (name, kind) in self._pieces

    def _find(self, name: str, kind: str):
        if not self.has(name, kind):
            raise ValueError(f"checkpoint {self.folder} has no {kind} of {name}; it was made by another model.")
        return self._pieces[name, kind]

    def read(self, name: str, kind: str = "weight") -> torch.Tensor:
        """The whole tensor, fp32, on the CPU."""
        shape = self.shape(name)
        return self.read_part(name, kind, (0,) * len(shape), shape)

    def read_part(self, name: str, kind: str, offset: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The rectangle of `size` at `offset` of the whole tensor; what lies beyond its edge is 0."""
        result = torch.zeros(size)
        missing = prod(
            max(0, min(start + length, edge) - start)
            for start, length, edge in zip(offset, size, self.shape(name), strict=True)
        )
        for (saved_offset, part), pieces in self._parts(name, kind).items():
            low = [max(a, b) for a, b in zip(offset, saved_offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, size, saved_offset, part, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, saved_offset, strict=True))
            result[target] = self._read_pieces(part, pieces, name)[source]
            missing -= prod(b - a for a, b in zip(low, high, strict=True))
        if missing:
            raise ValueError(
                f"checkpoint {self.folder} misses {missing} numbers of {kind} {name}: it is damaged; "
                f"delete the folder to resume from the checkpoint before it."
            )
        return result

    def _parts(self, name: str, kind: str) -> dict[tuple, list]:
        parts: dict[tuple, list] = {}
        for piece, path, key in self._find(name, kind):
            parts.setdefault((piece.offset, piece.part), []).append((piece, path, key))
        return parts

    def _read_pieces(self, part: tuple[int, ...], pieces: list, name: str) -> torch.Tensor:
        flat = torch.empty(prod(part))
        for piece, path, key in pieces:
            with safe_open(path, "pt") as file:
                flat[piece.start : piece.stop] = file.get_tensor(key)
        if sum(piece.stop - piece.start for piece, _, _ in pieces) != flat.numel():
            raise ValueError(f"checkpoint {self.folder} misses pieces of {name}: it is damaged.")
        return flat.view(part)

    def verify(self) -> Iterator[str]:
        """Read every file and compare its SHA-256; yields each name, ValueError at the first that differs."""
        for name, record in self.manifest["files"].items():
            if _hash_file(self.folder / name) != record["sha256"]:
                raise ValueError(f"checkpoint {self.folder} is damaged: {name} does not match its SHA-256.")
            yield name


def read_weights(folder: str | Path) -> CheckpointReader:
    """Open a checkpoint for its weights: `.names`, `.shape(name)`, `.read(name)`, `.config`, `.vocabulary`."""
    return CheckpointReader(folder)

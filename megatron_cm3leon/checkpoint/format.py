"""Format of a checkpoint folder, readable without torch: manifest, checksums, position of every stored number.

    config.yaml  vocab.json  state.json      configuration, vocabulary and TrainState of the run
    rank-00000.safetensors ...               the pieces that one rank wrote, flat, fp32
    manifest.json                            format, versions, size and SHA-256 of every file, and its own SHA-256

The folder is RUN/checkpoints/step-00001000; RUN/latest contains the name of the newest one. While a folder is being
written, its name ends in .tmp. Damage raises a ValueError that names the file and the previous checkpoint; there is no
automatic fallback.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from megatron_cm3leon.checkpoint.state import TrainState
from megatron_cm3leon.common.atomic_io import add_checksum
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.tokenizers.vocab import Vocabulary

FORMAT = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"
SHARED_FILES = ("config.yaml", "vocab.json", "state.json")
HASH_CHUNK_BYTES = 1 << 20
"""Small enough for a core's cache, large enough that hashlib releases the interpreter lock."""
_STEP_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Piece:
    """Position of a flat range of numbers in a whole tensor."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """Index of the first element of the rank's rectangular part."""
    part: tuple[int, ...]
    """Shape of that part."""
    start: int
    """First number of the range in the flattened part."""
    stop: int
    """End of the range (exclusive) in the flattened part."""

    def to_dict(self) -> dict:
        """Entry in the header of a rank file. Keys stay when attributes are renamed."""
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": self.shape,
            "offset": self.offset,
            "part": self.part,
            "start": self.start,
            "stop": self.stop,
        }

    @classmethod
    def from_dict(cls, entry: dict) -> "Piece":
        """Read an entry in the form of `to_dict`."""
        shape, offset, part = (tuple(entry[key]) for key in ("shape", "offset", "part"))
        return cls(entry["name"], entry["kind"], shape, offset, part, entry["start"], entry["stop"])


@dataclass(frozen=True)
class StoredPiece:
    """A piece and the position of its bytes on disk."""

    piece: Piece
    file: str
    begin: int
    """Offset of the first byte from the start of the file."""


def step_folder(run: Path, step: int) -> Path:
    """Path of the checkpoint of `step` in a run folder."""
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def temporary_folder(folder: Path) -> Path:
    """Path of a checkpoint folder while it is being written."""
    return folder.with_name(folder.name + ".tmp")


def rank_file(rank: int) -> str:
    """Name of the file that one rank writes."""
    return f"rank-{rank:05d}.safetensors"


def has_step_name(folder: Path) -> bool:
    """Whether a folder has the name of a complete checkpoint, such as step-00001000."""
    return _STEP_NAME.fullmatch(folder.name) is not None


def parse_step(folder: Path) -> int:
    """Step in the name of a checkpoint folder; raises ValueError for any other name."""
    match = _STEP_NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} does not have the name of a checkpoint; give a folder such as step-00001000.")
    return int(match[1])


def list_checkpoints(run: str | Path) -> list[Path]:
    """Complete checkpoints of a run folder (those with their final name), oldest first."""
    folders = (Path(run) / "checkpoints").glob("step-*")
    return sorted(folder for folder in folders if has_step_name(folder) and folder.is_dir())


def list_unfinished(run: str | Path, endings: tuple[str, ...] = (".tmp",)) -> list[Path]:
    """Incomplete checkpoints of a run folder, oldest first."""
    folders = (Path(run) / "checkpoints").glob("step-*")
    return sorted(
        folder
        for folder in folders
        if folder.suffix in endings and has_step_name(folder.with_suffix("")) and folder.is_dir()
    )


def hash_file(path: Path, report: Callable[[int], None] = lambda size: None) -> str:
    """SHA-256 of a file, hexadecimal; `report` is called with the bytes of every part read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HASH_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            report(size)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict:
    """Read and check manifest.json; raises ValueError when it is missing, damaged or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a complete checkpoint (it has no manifest.json); give a folder such as "
            f"RUN/checkpoints/step-00001000.{suggest_previous(folder)}"
        )
    try:
        manifest = json.loads(path.read_text())
        files = {name: (record["bytes"], record["sha256"]) for name, record in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damage_error(folder, f"{MANIFEST} is not a valid manifest ({error!r})") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format {manifest.get('format')} is not supported; this version reads format {FORMAT}: use the "
            f"version of megatron_cm3leon that wrote the checkpoint."
        )
    if "sha256" in manifest and add_checksum(manifest) != manifest:
        raise damage_error(folder, f"{MANIFEST} does not match its SHA-256")
    missing = [name for name in SHARED_FILES if name not in files]
    if missing:
        raise damage_error(folder, f"{MANIFEST} does not list {missing[0]}")
    return manifest


def count_bytes(folder: Path) -> int:
    """Total bytes of the files in a checkpoint's manifest; 0 when it cannot be read."""
    try:
        return sum(record["bytes"] for record in read_manifest(folder)["files"].values())
    except ValueError:
        return 0


def damage_error(folder: Path, what: str) -> ValueError:
    """Build the error for a damaged checkpoint; `what` begins with the name of the file."""
    return ValueError(f"checkpoint {folder} is damaged: {what}.{suggest_previous(folder)}")


def suggest_previous(folder: Path) -> str:
    """Sentence on how to resume from the checkpoint before a damaged one; empty when the folder is not in a run."""
    if not has_step_name(folder) or folder.parent.name != "checkpoints" or not folder.is_dir():
        return ""
    rename = f"rename the damaged folder (mv {folder} {folder}.damaged) and start the same command again"
    for previous in reversed(list_checkpoints(folder.parent.parent)):
        if previous.name < folder.name and _has_all_files(previous):
            return f" The previous checkpoint is {previous}: to resume from it, {rename}."
    return f" There is no complete checkpoint before it: to start the run from the beginning, {rename}."


def _has_all_files(folder: Path) -> bool:
    """Whether every file exists with its recorded size; contents are verified on loading."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return not any(find_size_damage(folder, name, record) for name, record in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_size_damage(folder: Path, name: str, record: dict) -> str:
    """Problem with the size of one file, or an empty string."""
    size = (folder / name).stat().st_size if (folder / name).is_file() else None
    if size == record["bytes"]:
        return ""
    return f"{name} {'is missing' if size is None else f'has {size} bytes'}, {record['bytes']} bytes were written"


def find_content_damage(
    folder: Path, name: str, record: dict, report: Callable[[int], None] = lambda size: None
) -> str:
    """Problem with the size or the SHA-256 of one file, or an empty string; reads the whole file."""
    if problem := find_size_damage(folder, name, record):
        return problem
    try:
        if hash_file(folder / name, report) != record["sha256"]:
            return f"{name} does not match its SHA-256"
    except OSError as error:  # a broken disk
        return f"{name} cannot be read ({error.strerror or error})"
    return ""


class CheckpointFolder:
    """A complete checkpoint with correct file sizes. Each file is compared with its SHA-256 before it is used."""

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`; raises ValueError when it is not a checkpoint, has another format or lacks a file."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.checked: set[str] = set()
        """Files whose SHA-256 was verified, or is being verified by `verify.verify_while_reading`."""
        for name, record in self.manifest["files"].items():
            if problem := find_size_damage(self.folder, name, record):
                raise damage_error(self.folder, problem)

    def find_damage(self, name: str) -> str:
        """Problem with one file, or an empty string; reads the whole file."""
        return find_content_damage(self.folder, name, self.manifest["files"][name])

    def check(self, name: str) -> Path:
        """Path of a file that matches its SHA-256; each file is hashed once. Raises ValueError when it is damaged."""
        if name not in self.checked:
            if problem := self.find_damage(name):
                raise damage_error(self.folder, problem)
            self.checked.add(name)
        return self.folder / name

    def check_all(self) -> None:
        """Verify the SHA-256 of every file, so that damage is reported before any error that it may have caused."""
        for name in self.manifest["files"]:
            self.check(name)

    @property
    def rank_files(self) -> list[str]:
        """Names of the files with tensor data, one per rank that wrote the checkpoint."""
        return sorted(name for name in self.manifest["files"] if name.startswith("rank-"))

    @property
    def bytes(self) -> int:
        """Total size of the files in the manifest."""
        return sum(record["bytes"] for record in self.manifest["files"].values())

    @cached_property
    def config(self) -> Config:
        """Configuration of the run that wrote the checkpoint, validated."""
        config = load_config(self.check("config.yaml"), expand=False)
        validate_config(config)
        return config

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the run that wrote the checkpoint."""
        return Vocabulary.load(self.check("vocab.json").parent)

    @cached_property
    def state(self) -> TrainState:
        """State of the run when it saved."""
        return TrainState.load(self.check("state.json"), self.config.train.global_batch_size)

    @cached_property
    def pieces(self) -> dict[tuple[str, str], list[StoredPiece]]:
        """(name, kind) -> pieces of that tensor, read from the headers of the rank files only."""
        pieces: dict[tuple[str, str], list[StoredPiece]] = {}
        for file in self.rank_files:
            for stored in self._read_header(file):
                pieces.setdefault((stored.piece.name, stored.piece.kind), []).append(stored)
        return pieces

    def _read_header(self, name: str) -> list[StoredPiece]:
        """Pieces in one file. The header is read before the file is hashed, so every value is checked."""
        try:
            with open(self.folder / name, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > self.manifest["files"][name]["bytes"]:
                    raise ValueError(f"its length, {length} bytes, exceeds the file")
                header = json.loads(file.read(length))
            stored = []
            for number, entry in enumerate(json.loads(header["__metadata__"]["pieces"])):
                begin, end = header[str(number)]["data_offsets"]
                piece = Piece.from_dict(entry)
                if header[str(number)]["dtype"] != "F32" or end - begin != 4 * (piece.stop - piece.start):
                    raise ValueError(f"piece {number} does not hold {piece.stop - piece.start} fp32 numbers")
                stored.append(StoredPiece(piece, name, 8 + length + begin))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damage_error(self.folder, f"the header of {name} cannot be read ({error})") from error
        return stored

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters, sorted."""
        return sorted({name for name, _ in self.pieces})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole parameter; raises ValueError for a name that the checkpoint does not contain."""
        return self.find(name, "weight")[0].piece.shape

    def has(self, name: str, kind: str) -> bool:
        """Whether the checkpoint contains the tensor `name` of `kind`."""
        return (name, kind) in self.pieces

    def find(self, name: str, kind: str) -> list[StoredPiece]:
        """Pieces of one tensor; raises ValueError for a tensor that the checkpoint does not contain."""
        if not self.has(name, kind):
            self.check_all()
            raise ValueError(
                f"checkpoint {self.folder} has no {kind} of {name}; it was written by another model: use the model "
                f"section of its config.yaml."
            )
        return self.pieces[name, kind]

    def require_whole(self) -> None:
        """Raise ValueError for a checkpoint that has only what was trained on a base (lora, train.only)."""
        if self.config.trains_part:
            raise ValueError(
                f"{self.folder} has only what was trained on {self.state.init.get('folder', 'a base')} (lora or "
                f"train.only), not a full model; first run tools/convert_checkpoint.py merge."
            )

    def find_missing_numbers(self) -> str:
        """Sentence on the first tensor whose pieces do not cover its shape, or an empty string."""
        for (name, kind), stored in self.pieces.items():
            count = sum(each.piece.stop - each.piece.start for each in stored)
            shape = stored[0].piece.shape
            if count != prod(shape):
                return f"{kind} of {name} has {count} numbers, but its shape {shape} has {prod(shape)}"
        return ""

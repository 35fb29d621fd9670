"""What a checkpoint folder holds, read without torch: manifest, checksums, where every number lies.

    config.yaml  vocab.json  state.json      the run's configuration, vocabulary and TrainState
    rank-00000.safetensors ...               the pieces one rank owned, flat, fp32
    manifest.json                            format, versions, size and SHA-256 of every file, and its own SHA-256

The folder is RUN/checkpoints/step-00001000; RUN/latest names the newest. While it is written its name ends in
.tmp. Damage is a ValueError that names the file and offers the checkpoint before it; nothing falls back by itself.
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
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.config.validation import validate_config
from megatron_cm3leon.tokenizers.vocab import Vocabulary

FORMAT = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"
SHARED_FILES = ("config.yaml", "vocab.json", "state.json")
HASHED_AT_ONCE = 1 << 20
"""Bytes; small enough to stay in a core's cache, large enough that hashlib works beside other threads."""
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

    def to_dict(self) -> dict:
        """The entry of a rank file's header."""
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
        shape, offset, part = (tuple(entry[key]) for key in ("shape", "offset", "part"))
        return cls(entry["name"], entry["kind"], shape, offset, part, entry["start"], entry["stop"])


@dataclass(frozen=True)
class Stored:
    """A piece and where its bytes lie."""

    piece: Piece
    file: str
    begin: int
    """First byte, counted from the start of the file."""


def step_folder(run: Path, step: int) -> Path:
    """Folder of the checkpoint of `step` in a run folder."""
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def unfinished(folder: Path) -> Path:
    """Name of a checkpoint folder while it is being written."""
    return folder.with_name(folder.name + ".tmp")


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def step_of(folder: Path) -> int | None:
    """Step in a checkpoint folder's name, or None for another name."""
    found = _STEP_NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


def list_checkpoints(run: str | Path) -> list[Path]:
    """Checkpoints of a run folder that have their final name, oldest first."""
    folders = (Path(run) / "checkpoints").glob("step-*")
    return sorted(folder for folder in folders if step_of(folder) is not None and folder.is_dir())


def list_unfinished(run: str | Path, endings: tuple[str, ...] = (".tmp",)) -> list[Path]:
    """Checkpoints of a run folder that were never finished, oldest first."""
    folders = (Path(run) / "checkpoints").glob("step-*")
    return sorted(
        folder
        for folder in folders
        if folder.suffix in endings and step_of(folder.with_suffix("")) is not None and folder.is_dir()
    )


def hash_file(path: Path, report: Callable[[int], None] = lambda size: None) -> str:
    """SHA-256 of a file, hexadecimal; `report` is told the bytes of every part that was read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HASHED_AT_ONCE))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            report(size)
    return digest.hexdigest()


def seal(manifest: dict) -> dict:
    """The manifest with the SHA-256 of its own content."""
    content = json.dumps({name: manifest[name] for name in sorted(manifest) if name != "sha256"}, sort_keys=True)
    return manifest | {"sha256": hashlib.sha256(content.encode()).hexdigest()}


def read_manifest(folder: Path) -> dict:
    """Read and check manifest.json; ValueError when it is missing, damaged or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is no complete checkpoint (it has no manifest.json); give a folder such as "
            f"RUN/checkpoints/step-00001000.{offer_previous(folder)}"
        )
    try:
        manifest = json.loads(path.read_text())
        files = {name: (record["bytes"], record["sha256"]) for name, record in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{MANIFEST} is no manifest ({error!r})") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format {manifest.get('format')} is not the one this version reads ({FORMAT}).")
    if "sha256" in manifest and seal(manifest) != manifest:
        raise damaged(folder, f"{MANIFEST} does not match its SHA-256")
    missing = [name for name in SHARED_FILES if name not in files]
    if missing:
        raise damaged(folder, f"{MANIFEST} does not list {missing[0]}")
    return manifest


def total_bytes(folder: Path) -> int:
    """Bytes that a checkpoint's manifest lists; 0 when it cannot be read."""
    try:
        return sum(record["bytes"] for record in read_manifest(folder)["files"].values())
    except ValueError:
        return 0


def damaged(folder: Path, what: str) -> ValueError:
    """The error to raise; `what` begins with the file's name."""
    return ValueError(f"checkpoint {folder} is damaged: {what}.{offer_previous(folder)}")


def offer_previous(folder: Path) -> str:
    """How to go on from the checkpoint before a damaged one; empty when the folder belongs to no run."""
    step = step_of(folder)
    if step is None or folder.parent.name != "checkpoints" or not folder.is_dir():
        return ""
    rename = f"rename the damaged folder (mv {folder} {folder}.damaged) and start the same command again"
    for before in reversed(list_checkpoints(folder.parent.parent)):
        if step_of(before) < step and _looks_whole(before):
            return f" The checkpoint before it is {before}: to go on from there, {rename}."
    return f" There is no whole checkpoint before it: to begin the run anew, {rename}."


def _looks_whole(folder: Path) -> bool:
    """Every file is there with its size; contents are compared when it is loaded."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return not any(size_damage(folder, name, record) for name, record in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def size_damage(folder: Path, name: str, record: dict) -> str:
    """What is wrong with the size of one file, or an empty string."""
    found = (folder / name).stat().st_size if (folder / name).is_file() else None
    if found == record["bytes"]:
        return ""
    return f"{name} {'is missing' if found is None else f'has {found} bytes'}, {record['bytes']} bytes were written"


def content_damage(folder: Path, name: str, record: dict, report: Callable[[int], None] = lambda size: None) -> str:
    """What is wrong with one file, its SHA-256 included, or an empty string."""
    what = size_damage(folder, name, record)
    try:
        if not what and hash_file(folder / name, report) != record["sha256"]:
            what = f"{name} does not match its SHA-256"
    except OSError as error:  # a broken disk
        what = f"{name} cannot be read ({error.strerror or error})"
    return what


class CheckpointFolder:
    """A complete checkpoint whose sizes are right; what is read from it is compared with its SHA-256 first."""

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`; ValueError when it is no checkpoint, is of another format or misses a file."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.checked: set[str] = set()
        """Files whose SHA-256 was compared, or is being compared by `verify.verified`."""
        for name, record in self.manifest["files"].items():
            if what := size_damage(self.folder, name, record):
                raise damaged(self.folder, what)

    def damage(self, name: str) -> str:
        """What is wrong with one file, or an empty string; reads the whole file."""
        return content_damage(self.folder, name, self.manifest["files"][name])

    def check(self, name: str) -> Path:
        """Path of a file that matches its SHA-256; each is hashed once. ValueError when it is damaged."""
        if name not in self.checked:
            if what := self.damage(name):
                raise damaged(self.folder, what)
            self.checked.add(name)
        return self.folder / name

    def check_all(self) -> None:
        """Compare every file's SHA-256: before blaming a model for what damage may have caused."""
        for name in self.manifest["files"]:
            self.check(name)

    @property
    def rank_files(self) -> list[str]:
        """Files of numbers, one for each rank that wrote."""
        return sorted(name for name in self.manifest["files"] if name.startswith("rank-"))

    @property
    def bytes(self) -> int:
        return sum(record["bytes"] for record in self.manifest["files"].values())

    @cached_property
    def config(self) -> Config:
        config = load_config(self.check("config.yaml"), expand=False)
        validate_config(config)
        return config

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.check("vocab.json").parent)

    @cached_property
    def state(self) -> TrainState:
        return TrainState.load(self.check("state.json"), self.config.train.global_batch_size)

    @cached_property
    def pieces(self) -> dict[tuple[str, str], list[Stored]]:
        """(name, kind) -> its pieces, from the headers of the rank files alone."""
        found: dict[tuple[str, str], list[Stored]] = {}
        for file in self.rank_files:
            for stored in self._read_header(file):
                found.setdefault((stored.piece.name, stored.piece.kind), []).append(stored)
        return found

    def _read_header(self, name: str) -> list[Stored]:
        """Pieces of one file. The header is read before the file is hashed: whatever it holds must not mislead."""
        try:
            with open(self.folder / name, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > self.manifest["files"][name]["bytes"]:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(file.read(length))
            stored = []
            for number, entry in enumerate(json.loads(header["__metadata__"]["pieces"])):
                begin, end = header[str(number)]["data_offsets"]
                piece = Piece.from_dict(entry)
                if header[str(number)]["dtype"] != "F32" or end - begin != 4 * (piece.stop - piece.start):
                    raise ValueError(f"piece {number} is not {piece.stop - piece.start} numbers of fp32")
                stored.append(Stored(piece, name, 8 + length + begin))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(self.folder, f"{name} has a header that cannot be read ({error})") from error
        return stored

    @property
    def names(self) -> list[str]:
        """Canonical names of all parameters, sorted."""
        return sorted({name for name, _ in self.pieces})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole parameter; ValueError for a name the checkpoint does not have."""
        return self.find(name, "weight")[0].piece.shape

    def has(self, name: str, kind: str) -> bool:
        return (name, kind) in self.pieces

    def find(self, name: str, kind: str) -> list[Stored]:
        """Pieces of one tensor; ValueError for a tensor the checkpoint does not have."""
        if not self.has(name, kind):
            self.check_all()
            raise ValueError(f"checkpoint {self.folder} has no {kind} of {name}; it was made by another model.")
        return self.pieces[name, kind]

    def missing_numbers(self) -> str:
        """The first tensor whose pieces are not as many numbers as it has, in words, or an empty string."""
        for (name, kind), stored in self.pieces.items():
            count = sum(each.piece.stop - each.piece.start for each in stored)
            if count != prod(stored[0].piece.shape):
                return f"{kind} of {name} has {count} numbers, its shape {stored[0].piece.shape} needs more or fewer"
        return ""

"""The folder of an export: written tensor by tensor, read strictly.

model.safetensors, or model-00001-of-00003.safetensors ... and model.safetensors.index.json
config.json  generation_config.json  tokenizer.json  tokenizer_config.json  README.md
text.model  image/  vocab.json           the tokenizers of training
cm3leon.json                             the run's configuration and state, and how the export was checked
"""

import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.export.layouts import INDEX, REMEDY, SAFETENSORS_DTYPES, config_fields
from megatron_cm3leon.export.parts import Part
from megatron_cm3leon.export.reader import METADATA_FILE
from megatron_cm3leon.tokenizers.folder import IMAGE_FOLDER, TEXT_MODEL, VOCABULARY
from megatron_cm3leon.tokenizers.vocab import Vocabulary

METADATA_FORMAT = 2
"""Format 1 had no configuration and no state: it cannot be imported."""
IMAGE_FILES = (f"{IMAGE_FOLDER}/config.json", f"{IMAGE_FOLDER}/model.safetensors")
_ADDED_FILES = (METADATA_FILE, TEXT_MODEL, VOCABULARY, *IMAGE_FILES)
"""What an import reads in addition to the files of a stock class."""
_NOT_COMPARED = {
    *("use_cache", "dropout", "attention_dropout", "layerdrop", "init_std", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Fields of config.json that stock training may change: logits do not depend on them, and an import reads none."""


def check_output(output: Path, overwrite: bool = False) -> None:
    """ValueError if `output` exists and is not empty, unless `overwrite` is set and it is an earlier export."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / METADATA_FILE).is_file():
        raise ValueError(f"{output} exists and is not an export (it has no {METADATA_FILE}); give a new folder.")
    if not overwrite:
        raise ValueError(f"{output} already holds an export; give a new folder, or --overwrite to replace it.")


def write_weights(
    folder: Path,
    parts: list[Part],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    shard_bytes: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write the weights of `parts` as safetensors of at most `shard_bytes` each (a larger tensor gets its own file).

    `read` returns the weight of a canonical name in type `dtype`; `advance` is called after each tensor. One weight at
    a time is in memory: the writer of the safetensors library takes all tensors of a file at once, and copies them.
    """
    shards = _plan_shards(parts, dtype, shard_bytes)
    pieces = (piece for part in parts for piece in part.split(read(part.name)))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(_header(shard, dtype))
            for target, shape in shard.items():
                piece = next(pieces)
                assert tuple(piece.shape) == shape and piece.dtype == dtype, (target, piece.shape, piece.dtype)
                file.write(piece.contiguous().view(torch.uint8).numpy().data)
                advance()
            file.flush()
            os.fsync(file.fileno())
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(prod(shape) for shard in shards for shape in shard.values()) * dtype.itemsize
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _plan_shards(parts: list[Part], dtype: torch.dtype, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of each file's tensors, in the order of `parts`."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in (target for part in parts for target in part.targets.items()):
        size = prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def _header(shard: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Header of a safetensors file: its length, then names, shapes and offsets of the tensors."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


class ExportFolder:
    """An export on disk; `check` compares it with the configuration that it records."""

    def __init__(self, folder: str | Path) -> None:
        """ValueError for a folder that is not an export of this version's format."""
        self.folder = Path(folder)
        missing = [name for name in _ADDED_FILES if not (self.folder / name).is_file()]
        if missing and (self.folder / "config.json").is_file():
            raise ValueError(
                f"{self.folder} is not an export: it lacks {', '.join(missing)}. If a stock class saved it, copy "
                f"these files from the export that the model was loaded from; otherwise {REMEDY}"
            )
        self.metadata = self._read_json(METADATA_FILE)
        found = self.metadata.get("format")
        if found != METADATA_FORMAT or not isinstance(self.metadata.get("config"), dict):
            raise ValueError(
                f"{self.folder / METADATA_FILE} has format {found}, not {METADATA_FORMAT}: another version wrote it; "
                f"export the checkpoint again."
            )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.folder)

    def check(self, config: Config, parts: list[Part]) -> None:
        """ValueError unless config.json and the tensors are exactly those of `config` and `parts`."""
        found = _describe_network(self._read_json("config.json"), self.folder)
        required = _describe_network(config_fields(config, self.vocabulary, torch.float32), self.folder)
        for name, value in required.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{self.folder}: config.json has {name} {found.get(name)!r}, the configuration in {METADATA_FILE} "
                    f"requires {value!r}; one of them was changed. {REMEDY.capitalize()}"
                )
        expected = {name: shape for part in parts for name, shape in part.targets.items()}
        missing, unknown = sorted(expected.keys() - self.files.keys()), sorted(self.files.keys() - expected.keys())
        if missing or unknown:
            raise ValueError(
                f"{self.folder} does not hold the weights of its own configuration: {describe_names(missing, unknown)}."
                f" Export the checkpoint again."
            )
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise ValueError(f"{name} of {self.folder} has shape {self.shape(name)}; {shape} is required.")
            with _opened(self.files[name]) as file:
                kind = file.get_slice(name).get_dtype()
            if kind not in SAFETENSORS_DTYPES.values():
                raise ValueError(
                    f"{name} of {self.folder} has type {kind}; one of {', '.join(SAFETENSORS_DTYPES.values())} is "
                    f"required. Save the model in one of these."
                )

    def _read_json(self, name: str) -> dict:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{self.folder} is not an export: it lacks {name}; {REMEDY}")
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); {REMEDY}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a JSON object; {REMEDY}")
        return content

    @cached_property
    def files(self) -> dict[str, Path]:
        """Name of each tensor -> its file; ValueError if the index and the files differ."""
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            pickled = next(self.folder.glob("pytorch_model*.bin"), None)
            other = f" but {pickled.name}, which is not read: save it with safe_serialization=True" if pickled else ""
            raise ValueError(f"{self.folder} is not an export: it has no *.safetensors{other}; {REMEDY}")
        found: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as file:
                found |= dict.fromkeys(file.keys(), path)
        if (self.folder / INDEX).is_file():
            listed = self._read_json(INDEX).get("weight_map")
            if listed != {name: path.name for name, path in found.items()}:
                raise ValueError(f"{self.folder / INDEX} does not match the tensors in the files; export again.")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        with _opened(self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor, fp32. The file is mapped for this call only, so that its pages do not stay in memory."""
        with _opened(self.files[name]) as file:
            return file.get_tensor(name).to(torch.float32, copy=True)

    def read_part(self, part: Part) -> Tensor:
        """One weight in its canonical layout, fp32."""
        return part.join(*(self.read(name) for name in part.targets))


def _describe_network(fields: dict, folder: Path) -> dict:
    """The fields of config.json that decide the logits, with the names and defaults of the stock class.

    Versions of transformers write the same configuration under different names (torch_dtype and dtype, rope_theta and
    rope_parameters), omit defaults and add fields.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if fields.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{folder}: config.json has model_type {fields.get('model_type')!r}; {REMEDY}")
    try:
        known = CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields)).to_dict()
    except Exception as error:  # of types that differ between versions of the library
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: config.json is not valid for transformers ({reason}); {REMEDY}") from error
    skipped = PretrainedConfig().to_dict().keys() | _NOT_COMPARED
    named = {name: known.get(name) for name in ("model_type", "architectures", "tie_word_embeddings")}
    return named | {name: value for name, value in known.items() if name not in skipped}


@contextmanager
def _opened(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); export the checkpoint again.") from error


def describe_names(missing: list[str], unknown: list[str]) -> str:
    """`2 missing (a, b) and 1 unknown (c)`."""
    parts = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
    parts += [f"{len(unknown)} unknown ({_some(unknown)})"] if unknown else []
    return " and ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

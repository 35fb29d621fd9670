"""The model of an exported folder: its shape from config.json, and its weights, checked strictly.

The three stock classes of layouts.py, as tools/convert_checkpoint.py writes them. Names and shapes of all weights
follow from config.json: a weight that is missing, unknown, of another shape, or not finite is refused. Reading needs
neither transformers nor megatron-core.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_cm3leon.export.layouts import (
    INDEX,
    REMEDY,
    REQUIRED_FIELDS,
    SAFETENSORS_DTYPES,
    Shape,
    parse_shape,
    stock_weights,
)

METADATA_FILE = "cm3leon.json"
"""The run's configuration and state, how it was trained, and how the export was checked."""
_AGAIN = "export the checkpoint again."


def read_shape(folder: Path) -> Shape:
    """Read config.json; ValueError for a folder that is not an exported model says why."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not an exported model: it has no config.json; {REMEDY}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is not valid JSON ({error}); {REMEDY}") from error
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in REQUIRED_FIELDS:
        known = ", ".join(REQUIRED_FIELDS)
        raise ValueError(f"{folder} is not an exported model: model_type is {family!r}, not one of {known}; {REMEDY}")
    for name, value in REQUIRED_FIELDS[family].items():
        if config.get(name) != value:
            raise ValueError(
                f"{folder} is not an exported model: {name} is {config.get(name)!r}, not {value!r}; {REMEDY}"
            )
    try:
        return parse_shape(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}/config.json lacks a field or has a wrong one ({error}); {_AGAIN}") from error


def read_training_facts(folder: Path) -> dict:
    """How the exported model was trained ("training" of cm3leon.json); it decides which prompts the model knows.

    "cm3_infill_probability", which earlier exports lack, is then that of their configuration, or 0: without the field
    there was none. ValueError where the file is missing or does not say so.
    """
    path = folder / METADATA_FILE
    try:
        metadata = json.loads(path.read_text())
        cm3 = metadata.get("config", {}).get("cm3", {})
        return {"cm3_infill_probability": cm3.get("infill_probability", 0.0)} | metadata["training"]
    except FileNotFoundError:
        fault = "is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fault = f"cannot be read ({type(error).__name__}: {error})"
    raise ValueError(f"{path} {fault}: it describes how the model was trained; {_AGAIN}")


class WeightFiles:
    """The weights of an exported folder by the stock class's names. All are checked on opening; `pop` reads one.

    So a model is never in memory twice, and quantizing it takes the memory of the result and one layer.
    """

    def __init__(self, folder: Path, shape: Shape, dtype: torch.dtype, device: str | torch.device) -> None:
        """ValueError for a weight that is missing, unknown or of another shape; `pop` returns type `dtype`."""
        self.folder, self.dtype = folder, dtype
        self._files: dict[str, tuple[Path, safe_open]] = {}
        expected = stock_weights(shape)
        for path in _weight_files(folder):
            try:
                file = safe_open(path, framework="pt", device=str(device))
                self._files |= dict.fromkeys(file.keys(), (path, file))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} cannot be read ({error}); {_AGAIN}") from error
        for what, names in (
            ("lacks", [name for name in expected if name not in self._files]),
            ("has unknown", [name for name in self._files if name not in expected]),
        ):
            if names:
                more = " ..." if len(names) > 1 else ""
                raise ValueError(f"{folder} {what} {len(names)} weights ({names[0]}{more}); {_AGAIN}")
        for name, (_, file) in self._files.items():
            part, known = file.get_slice(name), list(SAFETENSORS_DTYPES.values())
            if part.get_dtype() not in known:
                raise ValueError(f"{folder}: {name} has type {part.get_dtype()}, not {', '.join(known)}; {_AGAIN}")
            found, required = part.get_shape(), list(expected[name])
            if found != required:
                raise ValueError(f"{folder}: {name} has shape {found}, config.json requires {required}; {_AGAIN}")

    def pop(self, name: str) -> Tensor:
        """Read a weight and remove its name, as `dict.pop`; ValueError where it is not finite."""
        path, file = self._files.pop(name)
        try:
            weight = file.get_tensor(name).to(self.dtype)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {_AGAIN}") from error
        if not all(torch.isfinite(bound) for bound in weight.aminmax()):
            kind = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"{self.folder}: {name} has NaN or infinite values as {kind}; export an earlier checkpoint"
                f"{'' if self.dtype == torch.float32 else ', or load it as fp32'}."
            )
        return weight


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} cannot be read ({error!r}); {_AGAIN}") from error
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; {_AGAIN}")
    return [folder / name for name in names]

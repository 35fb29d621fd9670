"""The one configuration tree: presets, YAML, `section.key=value`, saving and comparing.

Precedence, lowest first: the defaults of schema.py, the preset, the YAML file, the command line. `load_config` returns
a tree of plain dataclasses; `validate_config` fills derived values and refuses what cannot run.
"""

import difflib
import functools
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from megatron_cm3leon.common.paths import expand_path
from megatron_cm3leon.config.schema import Config, SourceConfig
from megatron_cm3leon.config.setting import list_settings

# Family cm3leon: layers, width, peak rate, batch and warm-up are CM3Leon's table 3. Heads, the activation, Adam's
# betas, epsilon, weight decay, clipping and the linear decay to 0.1 are OPT's: the paper does not print them.
# Family llama: 7b is Chameleon's (table 1, section 2.3), but for its decay, which ends at 0 and therefore cannot be
# exponential to the letter: here it ends at a hundredth. The smaller sizes are ours, of cm3leon's widths and rates.
_CHAMELEON = {"schedule": {"name": "exponential", "warmup_steps": 4000, "floor": 0.01}}
_CHAMELEON_OPTIMIZER = {"epsilon": 1e-5, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "clip": 1.0}
PRESETS: dict[str, dict[str, dict]] = {
    "cm3leon": {
        "350m": {
            "model": {"layers": 24, "hidden_size": 1024, "heads": 16},
            "optimizer": {"learning_rate": 6e-4},
            "train": {"global_batch_size": 2048},
        },
        "760m": {
            "model": {"layers": 24, "hidden_size": 1536, "heads": 16},
            "optimizer": {"learning_rate": 5e-4},
            "train": {"global_batch_size": 2048},
        },
        "7b": {
            "model": {"layers": 32, "hidden_size": 4096, "heads": 32},
            "optimizer": {"learning_rate": 1.2e-4},
            "train": {"global_batch_size": 2048},
        },
    },
    "llama": {
        "350m": {
            **_CHAMELEON,
            "model": {"layers": 24, "hidden_size": 1024, "heads": 16, "qk_norm": True},
            "optimizer": {"learning_rate": 6e-4, **_CHAMELEON_OPTIMIZER},
            "train": {"global_batch_size": 2048, "z_loss": 1e-5},
        },
        "760m": {
            **_CHAMELEON,
            "model": {"layers": 24, "hidden_size": 1536, "heads": 16, "qk_norm": True},
            "optimizer": {"learning_rate": 5e-4, **_CHAMELEON_OPTIMIZER},
            "train": {"global_batch_size": 2048, "z_loss": 1e-5},
        },
        "7b": {
            **_CHAMELEON,
            "model": {
                "layers": 32,
                "hidden_size": 4096,
                "heads": 32,
                "ffn_hidden_size": 11008,
                "qk_norm": True,
                "dropout": 0.1,
            },
            "optimizer": {"learning_rate": 1e-4, **_CHAMELEON_OPTIMIZER},
            "train": {"global_batch_size": 2048, "z_loss": 1e-5},
        },
    },
}

_SETTINGS = dict(list_settings(Config))

SOURCE_FIELDS = tuple(name for name, setting in _SETTINGS.items() if setting.resume == "content")
"""Fields that name folders of data, or determine their shares."""


def load_config(path: str | Path | None = None, overrides: list[str] | None = None, *, expand: bool = True) -> Config:
    """Read a YAML file and `section.key=value` overrides into a Config; call validate_config on it next.

    expand: expand ~ and $VARIABLE in paths; False for a file that an earlier run wrote, perhaps on a machine with other
    variables.

    Raises ValueError for a missing file, a field that does not exist (with the nearest name), a value of another type
    and a path whose variable is not set.
    """
    layers = []
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no configuration file at {path}.")
        try:
            layers.append(OmegaConf.load(path))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    for text in overrides or []:
        if "=" not in text:
            raise ValueError(f"{text!r} is not a valid override; write section.key=value, such as parallel.tensor=2.")
        name, _, value = text.partition("=")
        if " #" in value and value.lstrip()[:1] not in ("'", '"'):
            raise ValueError(
                f"{name} ({value}): YAML reads what follows ' #' as a comment; write {name}='\"{value}\"'."
            )
    layers.append(OmegaConf.from_dotlist(list(overrides or [])))
    for layer in layers:
        check_names(OmegaConf.to_container(layer))
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), *layers)
        if tree.preset:
            sizes = PRESETS.get(tree.model.family, {})
            if sizes and tree.preset not in sizes:
                raise ValueError(f"preset ({tree.preset!r}) must be one of: {', '.join(sizes)}.")
            tree = OmegaConf.merge(OmegaConf.structured(Config), sizes.get(tree.preset, {}), *layers)
        config = OmegaConf.to_object(tree)
        assert isinstance(config, Config)  # the type of its first layer
        return expand_config(config) if expand else config
    except TypeError as error:
        raise ValueError(
            "one entry of a list cannot be changed alone on the command line; give the whole list, such as "
            '"data.sources=[{shards: pairs, weight: 2}, {shards: text}]".'
        ) from error
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error)) from error


def expand_config(config: Config) -> Config:
    """The same object, ~ and $VARIABLE expanded in its paths; ValueError with the field."""
    expand_fields(config, (name for name, setting in _SETTINGS.items() if setting.path))
    names = [name for name, setting in list_settings(SourceConfig) if setting.path]
    for number, source in enumerate(config.data.sources):
        expand_fields(source, names, f"data.sources[{number}].")
    return config


def expand_fields(tree: object, names: Iterable[str], prefix: str = "") -> None:
    """Expand ~ and $VARIABLE in fields of a dataclass (dotted names): paths, or lists of paths; ValueError as above."""
    for name in names:
        *sections, field = name.split(".")
        section = functools.reduce(getattr, sections, tree)
        value = getattr(section, field)
        try:
            new = [expand_path(each) for each in value] if isinstance(value, list) else expand_path(value)
        except ValueError as error:
            raise ValueError(f"{prefix}{name} ({value}): {error}.") from error
        setattr(section, field, new)


def load_fields(path: str | Path, schema: type, overrides: list[str], example: str):
    """Read a YAML file and `section.key=value` overrides into an object of the dataclass `schema`.

    Raises ValueError, with the file, for invalid YAML, a field that does not exist and a value of another type;
    `example` shows the user the expected lists and mappings.
    """
    try:
        layers = [OmegaConf.load(path), OmegaConf.from_dotlist(overrides)]
        for layer in layers:
            check_names(OmegaConf.to_container(layer), schema)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *layers))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {_explain(error)}") from error
    except TypeError as error:
        raise ValueError(
            f"{path}: a list was found where a mapping is required, or a mapping instead of a list; {example}."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _explain(error: OmegaConfBaseException) -> str:
    """Field and first line of the error; its other lines are about types of the library."""
    text = f"{getattr(error, 'full_key', None) or 'configuration'}: {str(error.msg or error).partition(chr(10))[0]}"
    if isinstance(error, InterpolationKeyError):
        text += "; ${name} means a field of the configuration: write $NAME for an environment variable"
    return text


def check_names(tree, schema=Config, prefix: str = "") -> None:
    """ValueError for a field that the dataclass `schema` does not have, with the nearest name."""
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the configuration'} must be a mapping of fields, not {tree!r}.")
    known = {item.name: item for item in fields(schema)}
    for name, value in tree.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {prefix}{nearest[0]}?" if nearest else f"; it has: {', '.join(known)}."
            raise ValueError(f"there is no field {prefix}{name}{hint}")
        section = known[name].type
        if is_dataclass(section):
            check_names(value, section, f"{prefix}{name}.")
        elif get_origin(section) is list and isinstance(value, list) and is_dataclass(get_args(section)[0]):
            for number, each in enumerate(value):
                check_names(each, get_args(section)[0], f"{prefix}{name}[{number}].")


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved tree as YAML; load_config reads it back to an equal Config."""
    Path(path).write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def changed_fields(old: Config, new: Config) -> dict[str, tuple]:
    """Dotted names of the fields that differ, with the old and the new value."""
    left, right = flatten_config(old), flatten_config(new)
    return {name: (left.get(name), value) for name, value in right.items() if left.get(name) != value}


def is_fixed(name: str) -> bool:
    """Whether a resumed run may change the field `name` (section.key) only with --allow-change."""
    setting = _SETTINGS.get(name)
    return setting is not None and setting.resume == "fixed"


def flatten_config(config: Config) -> dict[str, object]:
    """Values by dotted names (section.field), in the order of the schema."""
    return _flatten(asdict(config))


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat

"""Import published image tokenizers into a tokenizer folder: names are checked strictly, and no pickle is run.

taming      taming-transformers' VQModel and GumbelVQ, Chameleon's vqgan.ckpt: the names of vqgan.py
LlamaGen    VQ-16 and VQ-8: encoder.conv_blocks.i.res.j, mid.0-2, and a decoder counted from the lowest resolution

The shape of the network is read from the weights; only the size of the images is not in them. LlamaGen selects codes by
direction: its codebook is stored with length 1, and among codes of equal length the nearest has the nearest direction.
"""

import os
import pickle
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from megatron_cm3leon.tokenizers.folder import IMAGE_FOLDER, TEXT_MODEL, VOCABULARY, write_vocabulary
from megatron_cm3leon.tokenizers.image import ImageTokenizer, check_weights
from megatron_cm3leon.tokenizers.vocab import Vocabulary
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig

TRAINING_ONLY = re.compile(
    r"(loss|discriminator|perceptual_loss|lpips|model_ema|ema_model|ema)\..+|colorize"
    r"|quantize\.((embedding|embed)\.)?(codebook_used|cluster_size|embed_avg|ema_\w+|initted|num_updates)"
)
"""Weights that encoding and decoding do not use: losses, moving averages of weights and codebook, counters.

taming and latent-diffusion decode with the weights themselves, not with their averages (model_ema)."""
_FIRST_WEIGHT = "encoder.conv_in.weight"
"""Both layouts have it; text before it is the prefix of a wrapper, such as `module.`."""
_CONTAINERS = ("state_dict", "model", "model_state_dict", "module")
"""Entries of a checkpoint that hold the weights; other entries are not read."""
_BOOKKEEPING = ("pytorch_lightning.", "lightning.", "omegaconf.", "argparse.", "collections.", "numpy.")
"""Modules whose objects trainers store beside the weights; they are read as empty placeholders."""


def import_image_tokenizer(weights: str | Path, image_size: int) -> tuple[ImageTokenizer, dict]:
    """Read a file of weights for images of `image_size` pixels; returns the tokenizer and a description of it.

    Raises ValueError for a file of another kind, and for weights that are missing, unexpected, of another shape or not
    finite.
    """
    path = Path(weights)
    found = _strip_prefix(read_weights(path), path)
    if any(name.startswith("encoder.conv_blocks.") for name in found):
        layout, found = "LlamaGen", _rename_llamagen(found)
    elif any(name.startswith("encoder.down.") for name in found):
        layout = "taming"
    else:
        names = ", ".join(sorted(found)[:3])
        raise ValueError(
            f"{path} is not a VQGAN of the taming layout (encoder.down.0.block.0 ...) or LlamaGen's "
            f"(encoder.conv_blocks.0.res.0 ...); it has {names} ..."
        )
    kept = {name: value.float() for name, value in found.items() if not TRAINING_ONLY.fullmatch(name)}
    kept = {name.replace("quantize.embed.", "quantize.embedding."): value for name, value in kept.items()}
    try:
        config = read_config(kept, image_size)
        with torch.device("meta"):
            model = VQGAN(config)
        check_weights(model, kept, "the network that the other weights describe")
    except ValueError as error:
        raise ValueError(f"{path} ({layout} layout) cannot be used: {error}") from error
    for name, value in kept.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} of {path} holds NaN or infinity; take another file.")
    if layout == "LlamaGen":
        kept["quantize.embedding.weight"] = functional.normalize(kept["quantize.embedding.weight"], dim=-1)
    model.load_state_dict({name: value.contiguous() for name, value in kept.items()}, assign=True)
    description = {"imported": path.name, "layout": layout, "left_out": len(found) - len(kept)}
    return ImageTokenizer(model), description


def write_image_tokenizer(
    tokenizer: ImageTokenizer, description: dict, folder: str | Path, *, specials: int, sentinels: int
) -> Vocabulary | None:
    """Add image/, and vocab.json if text.model is there, to a tokenizer folder that has no image/ yet."""
    folder = Path(folder)
    if (folder / IMAGE_FOLDER).exists():
        raise ValueError(f"{folder} already has an image tokenizer; give another folder, or move {IMAGE_FOLDER}/ away.")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.tmp-", dir=folder.absolute().parent) as temporary:
        complete = Path(temporary)
        tokenizer.save(complete / IMAGE_FOLDER, training=description)
        if (folder / TEXT_MODEL).is_file():
            shutil.copy2(folder / TEXT_MODEL, complete)
        vocabulary = write_vocabulary(complete, specials=specials, sentinels=sentinels)
        folder.mkdir(exist_ok=True)
        os.replace(complete / IMAGE_FOLDER, folder / IMAGE_FOLDER)
        if vocabulary:
            os.replace(complete / VOCABULARY, folder / VOCABULARY)
    return vocabulary


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a torch checkpoint, which may keep them under one of _CONTAINERS."""
    if not path.is_file():
        raise ValueError(f"--weights {path} does not exist; give a .ckpt, .pt, .pth or .safetensors file.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
    content = _read_torch(path)
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no named weights, neither at its top nor under {' or '.join(_CONTAINERS)}.")
    return content


def _read_torch(path: Path):
    """torch.load of tensors alone. Objects of trainers would require their packages: placeholders replace them."""
    try:
        # Only files since torch 1.6 (zip archives) can be inspected; older ones must hold tensors alone.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        placeholders: list = [
            (type("Placeholder", (_Placeholder,), {}), name) for name in names if name.startswith(_BOOKKEEPING)
        ]
        with torch.serialization.safe_globals(placeholders):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        cause = (
            f"it holds {found[1]}, which is not a weight and is not executed" if found else f"it is damaged ({error})"
        )
        raise ValueError(
            f"{path} cannot be used: {cause}. Where you trust the file, save its tensors alone: "
            f"torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')."
        ) from error


class _Placeholder:
    """Accepts any arguments and state, and does nothing."""

    def __init__(self, *arguments, **options) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


def _strip_prefix(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights by the network's own names: without `module.`, `_orig_mod.` or another prefix of its wrappers.

    Raises ValueError if the file holds several networks, all of them with a prefix.
    """
    prefixes = {name.removesuffix(_FIRST_WEIGHT) for name in weights if f".{name}".endswith(f".{_FIRST_WEIGHT}")}
    if "" in prefixes or not prefixes:
        return weights
    # The file may also hold an average of the weights, under the same wrapper or outside it.
    networks = {
        prefix for prefix in prefixes if not re.search(r"(^|\.)(model_ema|ema_model|ema)\.", prefix)
    } or prefixes
    if len(networks) > 1:
        raise ValueError(
            f"{path} holds {len(networks)} networks ({', '.join(sorted(networks))} ...); save the weights of one."
        )
    [prefix] = networks
    stripped = {name.removeprefix(prefix): value for name, value in weights.items()}
    if len(stripped) < len(weights):
        raise ValueError(
            f"{path} holds some weights both with and without {prefix!r} before their name; keep one kind."
        )
    return stripped


def _rename_llamagen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename LlamaGen's weights to the names of taming-transformers."""
    levels = 1 + max(int(found[1]) for name in weights if (found := re.match(r"encoder\.conv_blocks\.(\d+)\.", name)))
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}

    def rename(name: str) -> str:
        if found := re.fullmatch(r"(encoder|decoder)\.mid\.([012])\.(.+)", name):
            return f"{found[1]}.mid.{middle[found[2]]}.{found[3]}"
        if found := re.fullmatch(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(.+)", name):
            level = int(found[2])
            prefix = f"encoder.down.{level}" if found[1] == "encoder" else f"decoder.up.{levels - 1 - level}"
            return f"{prefix}.{re.sub('^res', 'block', found[3])}"
        return name

    return {rename(name): value for name, value in weights.items()}


def read_config(weights: dict[str, Tensor], image_size: int) -> VQGANConfig:
    """The shape of the network from its weights; ValueError if a weight that shows it is missing."""

    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise ValueError(f"{name} is missing.")
        return weights[name].shape

    levels = 1 + max((int(name.split(".")[2]) for name in weights if name.startswith("encoder.down.")), default=0)
    blocks = len([name for name in weights if re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)])
    base = shape("encoder.conv_in.weight")[0]
    channels = [shape(f"encoder.down.{level}.block.0.conv2.weight")[0] for level in range(levels)]
    attended = [level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in weights]
    codes, width = shape("quantize.embedding.weight")
    return VQGANConfig(
        image_size=image_size,
        codebook_size=codes,
        embed_dim=width,
        latent_channels=shape("encoder.conv_out.weight")[0],
        base_channels=base,
        channel_multiplier=tuple(count // base for count in channels),
        num_res_blocks=blocks,
        attn_resolutions=tuple(image_size >> level for level in attended),
        mid_attention="encoder.mid.attn_1.q.weight" in weights,
        quantizer="logits" if "quantize.proj.weight" in weights else "nearest",
    )

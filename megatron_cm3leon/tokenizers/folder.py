"""The tokenizer folder: text.model, image/{config.json, model.safetensors} and vocab.json.

The two tokenizers are trained separately, in either order; `write_vocabulary` joins them when both are in the folder.
`Tokenizers.load` refuses a folder whose files are not those that vocab.json was written for.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.text import TextTokenizer
from megatron_cm3leon.tokenizers.vocab import Vocabulary

TEXT_MODEL, IMAGE_FOLDER, VOCABULARY = "text.model", "image", "vocab.json"


@dataclass(frozen=True)
class Tokenizers:
    """Both tokenizers and the vocabulary that joins their ids."""

    text: TextTokenizer
    image: ImageTokenizer
    vocabulary: Vocabulary

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "Tokenizers":
        """Read a tokenizer folder; `device` is where the image tokenizer computes."""
        folder = Path(folder)
        vocabulary = Vocabulary.load(folder)
        for name in (TEXT_MODEL, f"{IMAGE_FOLDER}/config.json", f"{IMAGE_FOLDER}/model.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}; tools/train_tokenizer.py writes it.")
        for name, recorded, found in (
            (TEXT_MODEL, vocabulary.text_sha256, hash_text(folder)),
            (f"{IMAGE_FOLDER} (config.json, model.safetensors)", vocabulary.image_sha256, hash_image(folder)),
        ):
            if recorded != found:
                raise ValueError(
                    f"{folder / name} is not the one that {folder / VOCABULARY} was written for (sha256 "
                    f"{found[:16]}, recorded {recorded[:16]}): it was replaced or damaged. Restore it; data "
                    f"and models made with one tokenizer cannot be used with another."
                )
        text = TextTokenizer.load(folder / TEXT_MODEL)
        return cls(text, ImageTokenizer.load(folder / IMAGE_FOLDER, device=device), vocabulary)


def hash_text(folder: str | Path) -> str:
    """SHA-256 of the text model's bytes, hexadecimal."""
    return hashlib.sha256((Path(folder) / TEXT_MODEL).read_bytes()).hexdigest()


def hash_image(folder: str | Path) -> str:
    """SHA-256 of everything that determines the codes: the weights, and the config without "training"."""
    image = Path(folder) / IMAGE_FOLDER
    try:
        config = json.loads((image / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{image / 'config.json'} is damaged or not valid JSON: {error}; restore it.") from error
    config.pop("training", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with (image / "model.safetensors").open("rb") as weights:
        for chunk in iter(lambda: weights.read(1 << 24), b""):
            digest.update(chunk)
    return digest.hexdigest()


def write_vocabulary(folder: str | Path, *, specials: int = 1024, sentinels: int = 512) -> Vocabulary | None:
    """Write vocab.json for the two tokenizers of a folder; None while one of them is missing."""
    folder = Path(folder)
    if not (folder / TEXT_MODEL).is_file() or not (folder / IMAGE_FOLDER / "config.json").is_file():
        (folder / VOCABULARY).unlink(missing_ok=True)
        return None
    image = ImageTokenizer.load(folder / IMAGE_FOLDER)
    vocabulary = Vocabulary(
        text_size=TextTokenizer.load(folder / TEXT_MODEL).size,
        image_size=image.codebook_size,
        sentinels=sentinels,
        specials=specials,
        image_height=image.grid[0],
        image_width=image.grid[1],
        text_sha256=hash_text(folder),
        image_sha256=hash_image(folder),
    )
    vocabulary.save(folder / VOCABULARY)
    return vocabulary

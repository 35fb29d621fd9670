"""CLIP bi-encoder of pairs: one unit vector for a caption, an image, or both (CM3Leon section 2.1).

The vector of a pair is the average of its text vector and its image vector, both of length 1, scaled to length 1.
Everything is read from one local folder, nothing from a network:

    config.json, model.safetensors      written by CLIPModel.save_pretrained
    text.model                          this project's SentencePiece model (tools/train_clip.py), or else
    tokenizer.json | vocab.json + merges.txt, preprocessor_config.json
                                        CLIP's own tokenizer and image sizes, as published models have them

With text.model the ids are SentencePiece's, then begin (T) and end (T + 1), and pixels are in [-1, 1].
This is the only file of retrieval that imports transformers.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from megatron_cm3leon.common.atomic_io import sha256_file
from megatron_cm3leon.common.threads import one_thread_if_small
from megatron_cm3leon.tokenizers.images import to_pixels
from megatron_cm3leon.tokenizers.text import TextTokenizer

TEXT_MODEL = "text.model"
WEIGHTS = "model.safetensors"
_IDENTITY_FILES = (
    "config.json",
    WEIGHTS,
    TEXT_MODEL,
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Inside the `with` transformers shows no progress bar: for one file of weights it has no information."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros is unchanged."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def combine(texts: np.ndarray | None, images: np.ndarray | None) -> np.ndarray:
    """Unit vectors [n, width] of pairs from the unit vectors of their texts and images.

    Where one of the two is a row of zeros (an empty caption) or None, the result is the other vector.
    """
    if texts is not None and images is not None:
        if len(texts) != len(images):
            raise ValueError(f"{len(texts)} texts and {len(images)} images do not form pairs; give as many of each.")
        return normalize(texts + images)
    present = images if texts is None else texts
    if present is None:
        raise ValueError("there is nothing to encode: give texts, images or both.")
    return normalize(present)


def drop_tokens(ids: list[int], share: float, key: Sequence[int]) -> list[int]:
    """Drop each id with probability `share`, but keep at least one; a function of `key` (non-negative integers)."""
    if not ids or share <= 0:
        return ids
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key)))).random(len(ids))
    kept = draws >= share
    kept[draws.argmax()] = True
    return [piece for piece, keep in zip(ids, kept, strict=True) if keep]


def _check_type(path: Path) -> None:
    try:
        found = json.loads(path.read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a valid model configuration ({type(error).__name__}: {error}); give a CLIP folder."
        ) from error
    if found != "clip":
        raise ValueError(f"{path} describes a model of type {found!r}, not 'clip'; give a CLIP folder.")


class Encoder:
    """Encodes texts and images as unit vectors, float32 [n, width]."""

    def __init__(self, model: CLIPModel, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, torch.device(device)
        self.model = model.to(self.device).eval()  # type: ignore[arg-type]  # its decorator loses the bound signature
        config: Any = model.config  # annotated as possibly without the parts below, which every CLIP has
        self.width: int = config.projection_dim
        self.positions: int = config.text_config.max_position_embeddings
        self.image_size: int = config.vision_config.image_size
        self._encode_text, self._begin, self._end = _load_text_tokenizer(folder, config.text_config.vocab_size)
        preprocessor = folder / "preprocessor_config.json"
        self._processor = CLIPImageProcessorPil.from_pretrained(folder) if preprocessor.is_file() else None

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "Encoder":
        """Read a CLIP folder; ValueError names what is missing."""
        folder = Path(folder)
        for name in ("config.json", WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(
                    f"no CLIP encoder at {folder}: {name} is missing. tools/train_clip.py writes such a folder; "
                    f"a published CLIP needs its Hugging Face form with {WEIGHTS}."
                )
        _check_type(folder / "config.json")
        try:
            with _no_progress_bar():
                loaded: Any = CLIPModel.from_pretrained(  # with output_loading_info a pair, which its annotation lacks
                    folder, local_files_only=True, use_safetensors=True, output_loading_info=True
                )
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS} is damaged ({error}); copy it again.") from error
        model, loading_info = loaded
        faults = {
            kind: sorted(loading_info[f"{kind}_keys"])
            for kind in ("missing", "mismatched")
            if loading_info[f"{kind}_keys"]
        }
        if faults:
            shown = "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in faults.items())
            raise ValueError(
                f"{folder / WEIGHTS} does not hold the weights of its config.json ({shown}); copy it again."
            )
        return cls(model, folder, device)

    @property
    def sha256(self) -> str:
        """Identity of the encoder: hash of its configuration, weights and tokenizer files."""
        digest = hashlib.sha256()
        for name in _IDENTITY_FILES:
            path = self.folder / name
            if path.is_file():
                digest.update(f"{name} {sha256_file(path)}\n".encode())
        return digest.hexdigest()

    def tokenize(self, texts: Sequence[str], dropout: float = 0.0, keys: Sequence[Sequence[int]] = ()) -> torch.Tensor:
        """Ids int64 [n, longest] with begin, end and padding; see `encode_texts`."""
        rows = []
        for number, text in enumerate(texts):
            ids = self._encode_text(text)
            if dropout:
                ids = drop_tokens(ids, dropout, keys[number])
            rows.append([self._begin, *ids[: self.positions - 2], self._end])
        longest = max(map(len, rows))
        return torch.tensor([row + [self._end] * (longest - len(row)) for row in rows])

    def count_tokens(self, text: str) -> int:
        """Tokens of a text without begin and end; those beyond `positions` - 2 are not encoded."""
        return len(self._encode_text(text))

    @torch.inference_mode()
    def encode_texts(
        self, texts: Sequence[str], dropout: float = 0.0, keys: Sequence[Sequence[int]] = ()
    ) -> np.ndarray:
        """Unit vectors of captions, float32 [n, width]; zeros for an empty caption.

        `dropout` drops that share of the text tokens, as a function of `keys`: non-negative integers for each text (the
        seed and the document's number).
        """
        if not len(texts):
            return np.zeros((0, self.width), np.float32)
        ids = self.tokenize(texts, dropout, keys).to(self.device)
        with one_thread_if_small(self.model):
            vectors = normalize(self.model.get_text_features(input_ids=ids).pooler_output.float().cpu().numpy())
        vectors[[not text.strip() for text in texts]] = 0
        return vectors

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors of RGB images of any size, float32 [n, width]."""
        if not len(images):
            return np.zeros((0, self.width), np.float32)
        pixels = self.prepare_pixels(images).to(self.device)
        with one_thread_if_small(self.model):
            return normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float().cpu().numpy())

    def prepare_pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pixels float32 [n, 3, image_size, image_size] as this model expects them."""
        if self._processor is not None:
            return self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        return torch.stack([to_pixels(image, self.image_size) for image in images])


def _load_text_tokenizer(folder: Path, vocab_size: int) -> tuple[Callable[[str], list[int]], int, int]:
    """(text -> ids, begin id, end id) of a CLIP folder; `vocab_size` is that of its model."""
    if (folder / TEXT_MODEL).is_file():
        tokenizer = TextTokenizer.load(folder / TEXT_MODEL)
        if tokenizer.size + 2 != vocab_size:
            raise ValueError(
                f"{folder / TEXT_MODEL} has {tokenizer.size} pieces, but the CLIP model beside it requires "
                f"{vocab_size - 2}; copy the text model it was trained with into its folder."
            )
        return tokenizer.encode, tokenizer.size, tokenizer.size + 1
    if not any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt")):
        raise ValueError(
            f"{folder} has no text tokenizer: put {TEXT_MODEL} (tools/train_clip.py does) or CLIP's own "
            f"tokenizer.json, or vocab.json with merges.txt, beside the weights."
        )
    clip_tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(text: str) -> list[int]:
        return clip_tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    return encode, clip_tokenizer.bos_token_id, clip_tokenizer.eos_token_id


def build_tiny_clip(text_pieces: int, image_size: int, patch_size: int, width: int, layers: int) -> CLIPModel:
    """A small CLIPModel with random weights for a SentencePiece model of `text_pieces` pieces."""
    if image_size % patch_size:
        raise ValueError(f"the patch size ({patch_size}) must divide the image size ({image_size}), both in pixels.")
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32),
        "projection_dim": width,
    }
    text = {"vocab_size": text_pieces + 2, "max_position_embeddings": 77}
    text |= {"bos_token_id": text_pieces, "eos_token_id": text_pieces + 1, "pad_token_id": text_pieces + 1}
    vision = {"image_size": image_size, "patch_size": patch_size}
    return CLIPModel(CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=width))


def save_clip(model: CLIPModel, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    with _no_progress_bar():
        model.save_pretrained(folder)

"""CLIP bi-encoder of pairs: one unit vector for a caption, a picture, or both (CM3Leon section 2.1).

A pair's vector is its text vector and its picture vector, each of length 1, averaged and made length 1 again.
Everything is read from one local folder, nothing from a network:

    config.json, model.safetensors      what CLIPModel.save_pretrained writes
    text.model                          this project's SentencePiece model (tools/train_clip.py), or else
    tokenizer.json | vocab.json + merges.txt, preprocessor_config.json
                                        CLIP's own tokenizer and picture sizes, as published models carry them

With text.model, ids are SentencePiece's, then begin (T) and end (T + 1), and pixels are in [-1, 1].
This is the only file of retrieval that imports transformers.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_cm3leon.common.threads import one_thread_if_small
from megatron_cm3leon.data.shards.reader import sha256_file
from megatron_cm3leon.tokenizers.images import to_pixels
from megatron_cm3leon.tokenizers.text import TextTokenizer

transformers.utils.logging.disable_progress_bar()  # for one file of weights it says nothing

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


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def combine(texts: np.ndarray | None, pictures: np.ndarray | None) -> np.ndarray:
    """Unit vectors [n, width] of pairs from unit vectors of their texts and pictures.

    A row of zeros (an empty caption) or None leaves the vector of the other part.
    """
    if texts is None or pictures is None:
        present = texts if pictures is None else pictures
        if present is None:
            raise ValueError("there is nothing to encode: give texts, pictures or both.")
        return normalize(present)
    if len(texts) != len(pictures):
        raise ValueError(f"{len(texts)} texts and {len(pictures)} pictures do not pair up.")
    return normalize(texts + pictures)


def drop_tokens(ids: list[int], share: float, key: Sequence[int]) -> list[int]:
    """Leave out each id with probability `share`, one at least stays; a function of `key` (non-negative)."""
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
        raise ValueError(f"{path} is no model's description ({type(error).__name__}: {error}).") from error
    if found != "clip":
        raise ValueError(f"{path} describes a model of type {found!r}, not 'clip'; give a CLIP folder.")


class Encoder:
    """Texts and pictures to unit vectors, float32 [n, width]."""

    def __init__(self, model: CLIPModel, folder: Path, device: str = "cpu") -> None:
        self.model, self.folder, self.device = model.to(device).eval(), folder, torch.device(device)
        self.width: int = model.config.projection_dim
        self.positions: int = model.config.text_config.max_position_embeddings
        self.image_size: int = model.config.vision_config.image_size
        self._load_text_tokenizer()
        preprocessor = folder / "preprocessor_config.json"
        self._processor = CLIPImageProcessorPil.from_pretrained(folder) if preprocessor.is_file() else None

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "Encoder":
        """Read a CLIP folder; ValueError names what it lacks."""
        folder = Path(folder)
        for name in ("config.json", WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(
                    f"no CLIP encoder at {folder}: {name} is missing. tools/train_clip.py writes such a folder; "
                    f"a published CLIP needs its Hugging Face form with {WEIGHTS}."
                )
        _check_type(folder / "config.json")
        model, account = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        faults = {
            what: sorted(account[f"{what}_keys"]) for what in ("missing", "mismatched") if account[f"{what}_keys"]
        }
        if faults:
            shown = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in faults.items())
            raise ValueError(
                f"{folder / WEIGHTS} does not hold the weights of its config.json ({shown}); copy it again."
            )
        return cls(model, folder, device)

    def _load_text_tokenizer(self) -> None:
        if (self.folder / TEXT_MODEL).is_file():
            tokenizer = TextTokenizer.load(self.folder / TEXT_MODEL)
            vocabulary = self.model.config.text_config.vocab_size
            if tokenizer.size + 2 != vocabulary:
                raise ValueError(
                    f"{self.folder / TEXT_MODEL} has {tokenizer.size} pieces, but the CLIP model beside it was made "
                    f"for {vocabulary - 2}; copy the text model it was trained with into its folder."
                )
            self._encode_text, self._begin, self._end = tokenizer.encode, tokenizer.size, tokenizer.size + 1
            return
        own = [self.folder / name for name in ("tokenizer.json", "merges.txt")]
        if not any(path.is_file() for path in own):
            raise ValueError(
                f"{self.folder} has no text tokenizer: put {TEXT_MODEL} (tools/train_clip.py does) or CLIP's own "
                f"tokenizer.json, or vocab.json with merges.txt, beside the weights."
            )
        tokenizer = CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
        self._encode_text = lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        self._begin, self._end = tokenizer.bos_token_id, tokenizer.eos_token_id

    @property
    def sha256(self) -> str:
        """Identity of the encoder: hash of its configuration, weights and tokenizer files."""
        digest = hashlib.sha256()
        for name in _IDENTITY_FILES:
            path = self.folder / name
            if path.is_file():
                digest.update(f"{name} {sha256_file(path)}\n".encode())
        return digest.hexdigest()

    def tokenize(self, texts: Sequence[str], dropout: float = 0.0, keys=None) -> torch.Tensor:
        """Ids int64 [n, longest] with begin, end and padding; see `encode_texts`."""
        rows = []
        for number, text in enumerate(texts):
            ids = self._encode_text(text)
            if dropout:
                ids = drop_tokens(ids, dropout, keys[number])
            rows.append([self._begin, *ids[: self.positions - 2], self._end])
        longest = max(map(len, rows))
        return torch.tensor([row + [self._end] * (longest - len(row)) for row in rows])

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], dropout: float = 0.0, keys=None) -> np.ndarray:
        """Unit vectors of captions; zeros for one that is empty.

        `dropout` leaves out that share of the text tokens, as a function of `keys`, one sequence of
        non-negative integers a text (the seed and the document's number).
        """
        if not len(texts):
            return np.zeros((0, self.width), np.float32)
        ids = self.tokenize(texts, dropout, keys).to(self.device)
        with one_thread_if_small(self.model):
            vectors = normalize(self.model.get_text_features(input_ids=ids).pooler_output.float().cpu().numpy())
        vectors[[not text.strip() for text in texts]] = 0
        return vectors

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors of RGB pictures of any size."""
        if not len(pictures):
            return np.zeros((0, self.width), np.float32)
        pixels = self.prepare_pixels(pictures).to(self.device)
        with one_thread_if_small(self.model):
            return normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float().cpu().numpy())

    def prepare_pixels(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Pixels float32 [n, 3, image_size, image_size] as this model expects them."""
        if self._processor is not None:
            return self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return torch.stack([to_pixels(picture, self.image_size) for picture in pictures])


def build_tiny_clip(text_pieces: int, image_size: int, patch_size: int, width: int, layers: int) -> CLIPModel:
    """A small CLIPModel with random weights for a SentencePiece model of `text_pieces` pieces."""
    if image_size % patch_size:
        raise ValueError(f"the patch size ({patch_size}) must divide the picture size ({image_size}) in pixels.")
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
    model.save_pretrained(folder)

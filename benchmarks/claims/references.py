"""Images without a model: the data themselves, and what copying and retrieval alone give.

    true            the true images, at the size of the generated ones; the accuracy on them is the ceiling
    reconstructed   the true images through the image tokenizer: the ceiling of what a model can generate
    copy            the training image whose caption is nearest as text
    clip            the training image nearest to the caption by the encoder of retrieval
    clip-bank       the same in the memory bank, without drawings of the query's name in its own style

Copied images pass through the image tokenizer like generated ones.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from claims.items import Drawings, Items
from claims.results import save_part
from PIL import Image

from megatron_cm3leon.common.progress import track
from megatron_cm3leon.generation.codec import Codec
from megatron_cm3leon.retrieval.encoder import Encoder
from megatron_cm3leon.tokenizers.images import load_image

AT_ONCE = 512


def choose_references(
    arm: str, items: Items, codec: Codec, encoder: Encoder
) -> tuple[Drawings, Callable[[slice], list[Image.Image]]]:
    """The items of an arm without a model, and a function that returns the images of some of them."""
    drawings = items.styled if arm.endswith("-style") else items.queries
    if arm.startswith("true"):
        return drawings, lambda part: drawings.load_images(codec.image.image_size, part)
    if arm.startswith("reconstructed"):
        shown = drawings
    elif arm == "copy":
        shown = items.training.select(find_nearest_captions(drawings.captions, items.training.captions))
    else:
        shown = items.memory.select(_find_nearest_images(items, encoder, bank=arm == "clip-bank"))
    return drawings, lambda part: codec.decode_images(shown.read_codes(codec.vocabulary, part))


def find_nearest_captions(captions: Sequence[str], others: Sequence[str]) -> list[int]:
    """For each caption the number of the most similar of `others`: cosine of counts of words, weighted by rarity."""
    documents = [_count_words(text) for text in others]
    postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, words in enumerate(documents):
        for word, count in words.items():
            postings[word].append((number, count))
    weights = {word: math.log(len(others) / len(found)) + 1e-3 for word, found in postings.items()}
    arrays = {word: np.array(found).T for word, found in postings.items()}
    lengths = np.zeros(len(others))
    for word, (numbers, counts) in arrays.items():
        lengths[numbers] += (weights[word] * counts) ** 2
    nearest = []
    for text in captions:
        scores = np.zeros(len(others))
        for word, count in _count_words(text).items():
            if word in arrays:
                numbers, counts = arrays[word]
                scores[numbers] += weights[word] ** 2 * count * counts
        nearest.append(int((scores / np.sqrt(lengths)).argmax()))
    return nearest


def _count_words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _find_nearest_images(items: Items, encoder: Encoder, bank: bool) -> list[int]:
    """Numbers in the memory bank of the images nearest to the queries' captions, among training images or all."""
    memory, queries = items.memory, items.queries
    scores = encoder.encode_texts(queries.captions) @ _encode_memory(items, encoder).T
    if not bank:
        scores[:, np.array([bool(kind) for kind in memory.heldout])] = -np.inf
        return scores.argmax(axis=1).tolist()
    same = defaultdict(list)
    for number, drawing in enumerate(zip(memory.names, memory.styles, strict=True)):
        same[drawing].append(number)
    for row, drawing in enumerate(zip(queries.names, queries.styles, strict=True)):
        scores[row, same[drawing]] = -np.inf
    return scores.argmax(axis=1).tolist()


def _encode_memory(items: Items, encoder: Encoder) -> np.ndarray:
    """Vectors of all images of the memory bank, float32 [n, width]; kept in the work folder."""
    path = items.work / f"memory-images-{encoder.sha256[:12]}.npz"
    if not path.is_file():
        files = items.memory.images
        starts = track(range(0, len(files), AT_ONCE), label="images of the bank", unit="batches")
        parts = [encoder.encode_images([load_image(file) for file in files[s : s + AT_ONCE]]) for s in starts]
        save_part(path, {"vectors": np.concatenate(parts)})
    return np.load(path)["vectors"]

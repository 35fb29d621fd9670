"""Contact sheets of a run: for each validation source, images and captions that its newest checkpoint generates.

The checkpoint is exported to a temporary folder, so that what is drawn is what an export of it would generate. Held-out
pairs give two cells each: the held-out image above the caption that was generated for it, and the image that was
generated for the held-out text above that text.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cm3leon.checkpoint.format import list_checkpoints
from megatron_cm3leon.common.contact_sheet import draw_contact_sheet
from megatron_cm3leon.config.loading import Config, load_config
from megatron_cm3leon.data.shards.reader import Corpus, open_shards, split_segments
from megatron_cm3leon.export import export_checkpoint
from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.sampling import Sampling
from megatron_cm3leon.tokenizers.folder import Tokenizers
from megatron_cm3leon.tokenizers.vocab import check_same_vocabulary

logger = logging.getLogger(__name__)

COLUMNS = 6
"""Cells per row: three pairs."""


@dataclass(frozen=True)
class Pair:
    """A held-out document of one text and one image."""

    text: str
    codes: np.ndarray
    """Image codes, int64 [image tokens]."""


def draw_sheets(
    run: str | Path,
    tokenizer: str | Path,
    output: str | Path,
    sampling: Sampling,
    *,
    pairs: int = 12,
    longest: int = 64,
    dtype: str = "fp32",
    device: str = "auto",
) -> list[Path]:
    """Write NAME.png to `output` for each validation source of a run; returns the files.

    The set validation.shards has the name "validation". `sampling` is that of images, captions are greedy and have at
    most `longest` text pieces. The same `pairs` documents are drawn each time, by sampling.seed. A source without pairs
    of one text and one image is reported and has no sheet. Raises ValueError for a run without a checkpoint, without
    validation data, or without any such pair in them.
    """
    run, output = Path(run), Path(output)
    if pairs < 1:
        raise ValueError(f"--pairs ({pairs}) must be at least 1.")
    if not (run / "config.yaml").is_file() or not list_checkpoints(run):
        raise ValueError(f"{run} is not a run folder with a checkpoint; give the folder of a run's output=...")
    config = load_config(run / "config.yaml", expand=False)
    corpora = {name: open_shards(shards) for name, shards in list_validation_shards(config).items()}
    if not corpora:
        raise ValueError(
            f"the run {run} has no validation data, from which prompts are taken; set validation.sources or "
            f"validation.shards."
        )
    tokenizers = Tokenizers.load(tokenizer)
    found = {}
    for name, corpus in corpora.items():
        check_same_vocabulary(tokenizers.vocabulary, corpus.vocabulary, f"the shards at {corpus.folder}")
        if chosen := read_pairs(corpus, tokenizers, pairs, sampling.seed):
            found[name] = chosen
    if not found:
        raise ValueError(
            f"the validation data of {run} have no document of one text and one image, which a sheet shows; add such a "
            f"source to validation.sources."
        )
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as folder:
        exported = Path(folder) / "exported"
        metadata = export_checkpoint(run, tokenizer, exported)
        generator = Generator.load(exported, dtype, device)
    logger.info("generating with %s", metadata["checkpoint"])
    written = []
    for name, chosen in found.items():
        written.append(output / f"{name}.png")
        draw_pairs(generator, chosen, sampling, longest).save(written[-1])
    return written


def list_validation_shards(config: Config) -> dict[str, str]:
    """Name of each validation source of a run -> its shard folder."""
    options = config.validation
    found = {"validation": options.shards} if options.shards else {}
    return found | {source.name: source.shards for source in options.sources}


def read_pairs(corpus: Corpus, tokenizers: Tokenizers, count: int, seed: int) -> list[Pair]:
    """`count` random pairs of one text and one image (fewer if there are fewer), in either order in the document.

    Other documents that were drawn are skipped, and counted in the log.
    """
    vocabulary, n_skipped = corpus.vocabulary, 0
    pairs: list[Pair] = []
    for number in np.random.default_rng(seed).permutation(corpus.documents):
        segments = split_segments(corpus.read(int(number)).astype(np.int64), vocabulary)
        images = [segment for segment in segments if len(segment) and vocabulary.is_image(int(segment[0]))]
        texts = [segment for segment in segments if len(segment) and vocabulary.is_text(int(segment[0]))]
        if len(segments) != 2 or len(images) != 1 or len(texts) != 1:
            n_skipped += 1
            continue
        pairs.append(Pair(tokenizers.text.decode(texts[0].tolist()), images[0] - vocabulary.image_start))
        if len(pairs) == count:
            break
    if n_skipped:
        what = "%s: skipped %d documents that are not one text and one image%s"
        logger.warning(what, corpus.folder, n_skipped, "" if pairs else ", which are all; it has no sheet")
    return pairs


def draw_pairs(generator: Generator, pairs: list[Pair], sampling: Sampling, longest: int) -> Image.Image:
    """Two cells per pair: the held-out image with its generated caption, a generated image with the held-out text."""
    texts = [pair.text for pair in pairs]
    captions = generator.captions([pair.codes for pair in pairs], longest=longest)
    generated = generator.images(texts, sampling)
    held_out = generator.codec.decode_images(np.stack([pair.codes for pair in pairs]))
    images: list[Image.Image] = []
    labels: list[str] = []
    for text, caption, image, original in zip(texts, captions, generated, held_out, strict=True):
        images += [original, image.image]
        labels += [f"generated text: {caption}", f"generated image: {text}"]
    return draw_contact_sheet(images, labels, COLUMNS)

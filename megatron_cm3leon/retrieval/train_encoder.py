"""Train a small CLIP on the pairs themselves, for a corpus without a suitable published CLIP.

The loss is contrastive: within a batch each caption must select its image and each image its caption, by cosine times a
learned scale of at most 100, as in CLIP. Equal captions of a batch are not negatives of each other. Lower scales were
measured on the shapes: more pairs that differ in one attribute get a score above 0.9, where the filters of filters.py
drop them (33 % of the pairs with four of five equal attributes at scale 20, 23 % at 100).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_cm3leon.common.progress import meter, track
from megatron_cm3leon.data.preprocess.document_reader import read_image
from megatron_cm3leon.data.preprocess.raw_inputs import RawInputs
from megatron_cm3leon.retrieval.encoder import TEXT_MODEL, CLIPModel, Encoder, build_tiny_clip, save_clip
from megatron_cm3leon.tokenizers.text import TextTokenizer


@dataclass(kw_only=True)
class ClipOptions:
    """Size and training of a small CLIP."""

    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 128
    """Pairs per step; each is contrasted with the others."""
    image_size: int = 32
    """Height and width of the images that the encoder sees, in pixels."""
    patch_size: int = 8
    """Height and width of a patch of the image encoder, in pixels."""
    width: int = 64
    """Width of both encoders and of the vectors."""
    layers: int = 2
    """Layers of each encoder."""
    learning_rate: float = 2e-3
    """Peak learning rate; warm-up over a tenth of the steps, then a cosine to 0."""
    max_scale: float = 100.0
    """Largest scale of the cosines in the loss."""
    heldout: float = 0.05
    """Share of the pairs that is held out from training and measured with."""
    max_pairs: int = 100_000
    """Most pairs that are read."""
    threads: int = 1
    """CPU threads; a small model is slower with many threads, in particular on a busy machine."""
    seed: int = 0
    """Seed of weights, batches and the held-out pairs."""

    def validate(self) -> None:
        """Raise ValueError for a value outside its range."""
        for name in ("steps", "image_size", "patch_size", "width", "layers", "threads", "max_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} ({getattr(self, name)}) must be at least 1.")
        if self.batch_size < 2:
            raise ValueError(
                f"--batch-size ({self.batch_size}) must be at least 2: the pairs of a batch are contrasted."
            )
        if not 0 < self.heldout < 1:
            raise ValueError(f"--heldout ({self.heldout}) must be a share between 0 and 1.")


def train_clip(
    source: RawInputs | str | Path, text_model: str | Path, output: str | Path, options: ClipOptions
) -> dict:
    """Train on the pairs of `source`, write a CLIP folder, return figures measured on the held-out pairs.

    Raises ValueError if there are too few pairs for one batch; nothing is written then.
    """
    options.validate()
    torch.set_num_threads(options.threads)
    inputs = source if isinstance(source, RawInputs) else RawInputs(source)
    output, tokenizer = Path(output), TextTokenizer.load(text_model)
    torch.manual_seed(options.seed)
    model = build_tiny_clip(tokenizer.size, options.image_size, options.patch_size, options.width, options.layers)
    captions, images = _read_pairs(inputs, options)
    heldout = max(2, round(options.heldout * len(captions)))
    if len(captions) - heldout < options.batch_size:
        raise ValueError(
            f"--batch-size ({options.batch_size}) exceeds the {max(0, len(captions) - heldout)} training pairs of "
            f"{inputs.name} ({heldout} are held out); lower it. {inputs.explain_skipped()}".rstrip()
        )
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output / TEXT_MODEL)
    encoder = Encoder(model, output)
    pixels = _prepare_pixels(encoder, images)
    ids = encoder.tokenize(captions)
    order = np.random.default_rng(options.seed).permutation(len(captions))
    caption_numbers = torch.from_numpy(np.unique(captions, return_inverse=True)[1])
    loss = _train(model, ids, pixels, caption_numbers, order[heldout:], options)
    save_clip(model.eval(), output)
    chosen = order[:heldout]
    figures = measure_encoder(encoder, [captions[n] for n in chosen], [images[n] for n in chosen])
    skipped = inputs.explain_skipped()
    return {"pairs": len(order) - heldout, "loss": loss, "heldout_pairs": heldout, **figures, "skipped": skipped}


def _read_pairs(inputs: RawInputs, options: ClipOptions) -> tuple[list[str], list[Image.Image]]:
    """Captions, and images of at most four times the training size; ValueError if no pair can be read."""
    captions, images = [], []
    total = min(inputs.source.count or options.max_pairs, options.max_pairs)
    for pair in track(inputs.pairs(), total=total, label="read", unit="pairs"):
        try:
            image, _ = read_image(pair.images[0])
        except ValueError as error:
            inputs.reasons.add(str(error))
            continue
        image.thumbnail((4 * options.image_size, 4 * options.image_size))
        captions.append(pair.caption)
        images.append(image)
        if len(captions) >= options.max_pairs:
            break
    if not captions:
        raise inputs.explain_none("pair that can be read")
    return captions, images


def _prepare_pixels(encoder: Encoder, images: list[Image.Image]) -> torch.Tensor:
    """All images as float16 [n, 3, image_size, image_size]: half the memory, precise enough for 8-bit images."""
    batches = [images[start : start + 256] for start in range(0, len(images), 256)]
    return torch.cat([encoder.prepare_pixels(batch).half() for batch in batches])


def _train(
    model: CLIPModel,
    ids: torch.Tensor,
    pixels: torch.Tensor,
    caption_numbers: torch.Tensor,
    training: np.ndarray,
    options: ClipOptions,
) -> float:
    """Train on the pairs numbered `training`; returns the mean loss of the last tenth of the steps."""
    log_limit = float(np.log(options.max_scale))
    with torch.no_grad():
        model.logit_scale.fill_(log_limit / 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, options.steps))
    random = np.random.default_rng((options.seed, 1))
    model.train()
    losses = []
    with meter(options.steps, "train CLIP", "steps") as progress:
        for _ in range(options.steps):
            chosen = torch.from_numpy(random.choice(training, options.batch_size, replace=False))
            texts = model.get_text_features(input_ids=ids[chosen]).pooler_output
            images = model.get_image_features(pixel_values=pixels[chosen].float()).pooler_output
            loss = contrastive_loss(texts, images, model.logit_scale, caption_numbers[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0.0, log_limit)
            losses.append(loss.item())
            progress.advance(note=f"loss {losses[-1]:.3f}")
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a linear rise over a tenth of the steps, then a cosine towards 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


def contrastive_loss(
    texts: torch.Tensor, images: torch.Tensor, log_scale: torch.Tensor, captions: torch.Tensor
) -> torch.Tensor:
    """Symmetric cross-entropy of matching texts [n, width] with images [n, width].

    Pairs with equal numbers in `captions` are not negatives of each other.
    """
    texts, images = (torch.nn.functional.normalize(vectors, dim=1) for vectors in (texts, images))
    logits = log_scale.exp() * texts @ images.T
    same = (captions[:, None] == captions[None]) & ~torch.eye(len(captions), dtype=torch.bool)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(logits))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def measure_encoder(encoder: Encoder, captions: list[str], images: list[Image.Image]) -> dict[str, float]:
    """recall_at_1 and recall_at_10: shares of held-out captions that find their own image, among at most 1,000."""
    captions, images = captions[:1000], images[:1000]
    scores = encoder.encode_texts(captions) @ encoder.encode_images(images).T
    better = (scores > np.diag(scores)[:, None]).sum(axis=1)
    return {"recall_at_1": float((better < 1).mean()), "recall_at_10": float((better < 10).mean())}

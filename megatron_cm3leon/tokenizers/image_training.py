"""Training of the image tokenizer: reconstruction, a codebook whose codes are used, quality on held-out images.

1. The first `warmup_steps` train encoder and decoder alone, without the codebook.
2. k-means of the latents they produce gives the codebook its first values.
3. The remaining steps train all three: the decoder gets codes, its gradient passes straight through to the encoder,
   the commitment term pulls latents to their codes, and the codes follow the latents: as moving averages
   (`codebook=ema`) or by gradient (`codebook=gradient`). A code that is hardly used restarts at a latent.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from megatron_cm3leon.common.progress import Meter, meter
from megatron_cm3leon.tokenizers.image import ImageTokenizer
from megatron_cm3leon.tokenizers.images import load_image, to_pixels
from megatron_cm3leon.tokenizers.vqgan import VQGAN, VQGANConfig, find_nearest

KMEANS_VECTORS_PER_CODE = 64
KMEANS_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class ImageTrainingOptions:
    """Length and terms of the training of an image tokenizer."""

    steps: int = 1000
    """Optimizer steps."""
    warmup_steps: int | None = None
    """First steps, without the codebook; None: a third of the steps."""
    batch_size: int = 32
    """Images per step."""
    learning_rate: float = 4e-3
    """Peak learning rate: a short linear rise, then a cosine to a hundredth."""
    loss: str = "l2"
    """Reconstruction error per pixel: l2, or l1, which learns slowly if most of an image is flat."""
    commitment: float = 0.25
    """Weight of the term that pulls latents to their codes."""
    codebook: str = "ema"
    """How codes follow latents: ema or gradient."""
    ema_decay: float = 0.99
    """Share of the moving average that is kept per step."""
    revive_below: float = 0.03
    """A code restarts if its moving count is below this share of a uniform use of all codes."""
    precision: str = "bf16"
    """bf16: autocast (half the time of fp32 on a CPU that has it); fp32. Codes are always computed in fp32."""
    seed: int = 0
    """Seed of the weights, the batches and the codebook."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("loss", ("l1", "l2")),
            ("codebook", ("ema", "gradient")),
            ("precision", ("bf16", "fp32")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of: {', '.join(allowed)}.")
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps ({self.steps}) and batch_size ({self.batch_size}) must be at least 1.")
        warmup_steps = self.steps // 3 if self.warmup_steps is None else self.warmup_steps
        object.__setattr__(self, "warmup_steps", warmup_steps)
        if not 0 <= warmup_steps < self.steps:
            raise ValueError(f"warmup_steps ({warmup_steps}) must leave steps for the codebook: 0 to {self.steps - 1}.")

    def to_dict(self) -> dict:
        """The options as the tokenizer's config.json has them under "training"."""
        return {
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "loss": self.loss,
            "commitment": self.commitment,
            "codebook": self.codebook,
            "ema_decay": self.ema_decay,
            "revive_below": self.revive_below,
            "precision": self.precision,
            "seed": self.seed,
        }


class TrainingImages:
    """Images of one size as uint8 in memory, or read anew for each batch if they would not fit."""

    def __init__(
        self, paths: Sequence, size: int, memory_gigabytes: float = 4.0, load: Callable[[Any], Image] = load_image
    ) -> None:
        """`load` returns the image of an item of `paths` as RGB, or raises ValueError with the reason."""
        self.paths, self.size, self.load = paths, size, load
        self.pool = ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads()))
        self._skipped: dict[int, str] = {}
        fits = len(paths) * 3 * size * size <= memory_gigabytes * 1e9
        self.stored = self._read(range(len(paths))) if fits else None

    def __len__(self) -> int:
        return len(self.paths) if self.stored is None else len(self.stored)

    def _read(self, numbers) -> Tensor:
        images = [image for image in self.pool.map(self._read_one, numbers) if image is not None]
        if not images:
            raise ValueError(f"none of the {len(numbers)} images could be read; the first reason: {self.skipped[0]}")
        return torch.stack(images)

    @property
    def skipped(self) -> list[str]:
        """Why images could not be read, in the order of the images."""
        return [self._skipped[number] for number in sorted(self._skipped)]

    def _read_one(self, number: int) -> Tensor | None:
        try:
            pixels = to_pixels(self.load(self.paths[number]), self.size)
        except ValueError as error:
            self._skipped[number] = str(error)
            return None
        return ((pixels + 1) * 127.5).round().to(torch.uint8)

    def batch(self, numbers: Tensor, device: torch.device) -> Tensor:
        """Pixels [B, 3, size, size] in [-1, 1], channels last."""
        chosen = self._read(numbers.tolist()) if self.stored is None else self.stored[numbers]
        pixels = chosen.to(device).float() / 127.5 - 1
        return pixels.contiguous(memory_format=torch.channels_last)


def train_image(
    images: TrainingImages, config: VQGANConfig, options: ImageTrainingOptions, device: str = "cpu"
) -> ImageTokenizer:
    """Train an image tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = VQGAN(config)
    trainer = _Trainer(model, options, torch.device(device))
    draws = torch.Generator().manual_seed(options.seed)
    with meter(options.steps, "image tokenizer", "steps") as progress:
        for step in range(options.steps):
            if step == options.warmup_steps:
                trainer.initialize_codebook(images, draws)
            numbers = torch.randint(len(images), (options.batch_size,), generator=draws)
            loss = trainer.step(step, images.batch(numbers, trainer.device))
            _report(progress, loss)
    return ImageTokenizer(trainer.model)


def _report(progress: Meter, loss: Tensor) -> None:
    if progress.done % 10 == 0:
        progress.advance(1, f"loss {loss.item():.4f}")
    else:
        progress.advance(1, progress.note)


class _Trainer:
    """Model, optimizer and the codebook's moving averages."""

    def __init__(self, model: VQGAN, options: ImageTrainingOptions, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its annotation
        self.options, self.device = options, device
        self.codebook = model.codebook
        if options.codebook == "ema":
            self.codebook.requires_grad_(False)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        self.counts = torch.zeros(len(self.codebook), device=device)
        self.sums = torch.zeros_like(self.codebook)
        self.random = torch.Generator().manual_seed(options.seed + 1)

    def step(self, step: int, pixels: Tensor) -> Tensor:
        """One optimizer step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * learning_rate_share(step, self.options.steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            latents = self.model.encode(pixels).float()
            quantized, extra = latents, torch.zeros((), device=latents.device)
            if step >= (self.options.warmup_steps or 0):
                quantized, extra = self.quantize(latents)
            reconstructed = self.model.decode(quantized)
        error = F.l1_loss if self.options.loss == "l1" else F.mse_loss
        loss = error(reconstructed.float(), pixels) + extra
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents replaced by their codes, with a straight-through gradient, and the codebook's loss terms."""
        codes = self.model.find_codes(latents.detach())
        quantized = self.model.look_up(codes)
        extra = self.options.commitment * F.mse_loss(latents, quantized.detach())
        if self.options.codebook == "gradient":
            extra = extra + F.mse_loss(quantized, latents.detach())
        self.update_codebook(latents.detach(), codes)
        return latents + (quantized - latents).detach(), extra

    @torch.no_grad()
    def update_codebook(self, latents: Tensor, codes: Tensor) -> None:
        """Update the moving averages of each code's latents; unused codes restart at a latent of this batch."""
        flat, codes = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]), codes.flatten()
        keep = self.options.ema_decay
        self.counts.mul_(keep).add_(torch.bincount(codes, minlength=len(self.counts)), alpha=1 - keep)
        self.sums.mul_(keep).index_add_(0, codes, flat, alpha=1 - keep)
        dead = self.counts < self.options.revive_below * len(codes) / len(self.counts)
        if dead.any():
            chosen = torch.randint(len(flat), (int(dead.sum()),), generator=self.random).to(self.device)
            self.counts[dead] = len(codes) / len(self.counts)  # a uniform share, so that it is not restarted at once
            self.sums[dead] = flat[chosen] * self.counts[dead, None]
            self.codebook.data[dead] = flat[chosen]
        if self.options.codebook == "ema":
            self.codebook.data.copy_(self.sums / self.counts[:, None].clamp(min=1e-5))

    @torch.no_grad()
    def initialize_codebook(self, images: TrainingImages, draws: torch.Generator) -> None:
        """Set the codebook to the k-means centers of latents."""
        n_vectors = KMEANS_VECTORS_PER_CODE * len(self.codebook)
        vectors: list[Tensor] = []
        while sum(len(batch) for batch in vectors) < n_vectors:
            numbers = torch.randint(len(images), (self.options.batch_size,), generator=draws)
            latents = self.model.encode(images.batch(numbers, self.device))
            vectors.append(latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float())
        centers, shares = find_centers(torch.cat(vectors), len(self.codebook), draws)
        tokens = self.options.batch_size * latents.shape[2] * latents.shape[3]
        self.codebook.data.copy_(centers)
        self.counts.copy_(shares * tokens)
        self.sums.copy_(centers * self.counts[:, None])


def learning_rate_share(step: int, steps: int) -> float:
    """Share of the peak learning rate: a linear rise over a twentieth of the steps, a cosine down to 0.01."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def find_centers(vectors: Tensor, number: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """k-means: centers [number, D] and the share of the vectors nearest to each.

    The first centers are drawn as in k-means++, distant ones more likely: flat patches are most of an image and would
    otherwise get most of the codes.
    """
    centers = vectors[torch.randint(len(vectors), (1,), generator=draws).to(vectors.device)]
    distances = ((vectors - centers) ** 2).sum(1)
    for _ in range(number - 1):
        weights = (distances + 1e-12).double().cumsum(0)
        draw = torch.rand(1, generator=draws, dtype=torch.float64).to(vectors.device) * weights[-1]
        chosen = vectors[torch.searchsorted(weights, draw).clamp(max=len(vectors) - 1)]
        centers = torch.cat([centers, chosen])
        distances = torch.minimum(distances, ((vectors - chosen) ** 2).sum(1))
    for _ in range(KMEANS_ROUNDS):
        nearest = find_nearest(vectors, centers)
        counts = torch.bincount(nearest, minlength=number).float()
        sums = torch.zeros_like(centers).index_add_(0, nearest, vectors)
        centers = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centers)
    return centers, counts / len(vectors)


def measure_image(tokenizer: ImageTokenizer, images: TrainingImages, limit: int = 2000) -> dict:
    """Quality on held-out images: mean PSNR of the reconstructions in dB, and how the codebook is used."""
    numbers = torch.arange(min(len(images), limit))
    counts, psnr = torch.zeros(tokenizer.codebook_size), []
    for part in numbers.split(32):
        pixels = images.batch(part, tokenizer.device)
        codes = tokenizer.encode(pixels)
        squared = ((tokenizer.decode(codes) - pixels) ** 2).mean(dim=(1, 2, 3)) / 4  # range 2 -> 1
        psnr.append(-10 * torch.log10(squared.clamp(min=1e-10)).cpu())
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
    share = counts / counts.sum()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {
        "pictures": len(numbers),
        "psnr_db": round(torch.cat(psnr).mean().item(), 3),
        "codes_used": round((counts > 0).float().mean().item(), 4),
        "codebook_perplexity": round(entropy.exp().item(), 2),
    }


def train_and_measure(
    paths: Sequence,
    config: VQGANConfig,
    options: ImageTrainingOptions,
    *,
    heldout_paths: Sequence | None = None,
    heldout_share: float = 0.05,
    device: str = "cpu",
    load: Callable[[Any], Image] = load_image,
) -> tuple[ImageTokenizer, dict]:
    """Train on a share of the images, measure on the rest (or on `heldout_paths`); returns also a description of both.

    `paths` are the arguments of `load`: by default the paths of images.
    """
    if heldout_paths is None:
        paths, heldout_paths = split_heldout(paths, heldout_share, options.seed)
    images = TrainingImages(paths, config.image_size, load=load)
    heldout = TrainingImages(heldout_paths, config.image_size, load=load)
    started, cpu_started = time.monotonic(), time.process_time()
    tokenizer = train_image(images, config, options, device)
    description = {
        **options.to_dict(),
        "pictures": len(images),
        "pictures_skipped": len(images.skipped) + len(heldout.skipped),
        "parameters": sum(weight.numel() for weight in tokenizer.model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "heldout": measure_image(tokenizer, heldout),
    }
    return tokenizer, description


def split_heldout(paths: Sequence, share: float, seed: int) -> tuple[list, list]:
    """(train, held-out) paths; at least one is held out."""
    n_heldout = max(1, round(len(paths) * share))
    if n_heldout >= len(paths):
        raise ValueError(f"{len(paths)} images are too few to hold {n_heldout} of them out; give more.")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:n_heldout])
    train = [path for number, path in enumerate(paths) if number not in chosen]
    return train, [paths[number] for number in sorted(chosen)]

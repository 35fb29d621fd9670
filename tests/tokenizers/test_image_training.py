"""Training lowers the error, uses the codebook, gives the same weights with the same seed, and returns a summary."""

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cm3leon.tokenizers.image_training import (
    ImageTrainingOptions,
    TrainingImages,
    find_centers,
    learning_rate_share,
    measure_image,
    split_heldout,
    train_and_measure,
    train_image,
)
from megatron_cm3leon.tokenizers.vqgan import VQGANConfig

CONFIG = VQGANConfig(
    image_size=16,
    codebook_size=16,
    embed_dim=8,
    latent_channels=16,
    base_channels=16,
    channel_multiplier=(1, 1, 1),
    num_res_blocks=0,
    mid_attention=False,
    norm="pixel",
    encoder_kernel=1,
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """40 images of a colored square on white."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(40):
        image = np.full((16, 16, 3), 255, np.uint8)
        row, column = random.integers(0, 8, 2)
        image[row : row + 8, column : column + 8] = ((255, 0, 0), (0, 0, 255))[number % 2]
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    return sorted(folder.iterdir())


def build_options(**changes) -> ImageTrainingOptions:
    return ImageTrainingOptions(**{**dict(steps=30, warmup_steps=10, batch_size=8, learning_rate=5e-3), **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"codebook": "gradient"}, {"loss": "l1"}, {"precision": "fp32"}, {"warmup_steps": 0}]
)
def test_training_lowers_the_error(paths, changes):
    images = TrainingImages(paths, 16)
    before = measure_image(train_image(images, CONFIG, build_options(steps=1, warmup_steps=0)), images)
    steps = 300 if changes.get("loss") == "l1" else 60  # l1 stays at the flat background first
    after = measure_image(train_image(images, CONFIG, build_options(steps=steps, **changes)), images)
    assert after["psnr_db"] > before["psnr_db"] + 2
    assert after["codebook_perplexity"] > 2


def test_the_same_seed_gives_the_same_weights(paths):
    images = TrainingImages(paths, 16)
    first, second, other = (
        train_image(images, CONFIG, build_options(seed=seed, steps=12, warmup_steps=4)).model.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_weights_do_not_depend_on_the_random_generator_of_the_caller(paths):
    images = TrainingImages(paths, 16)
    torch.manual_seed(5)
    first = train_image(images, CONFIG, build_options(steps=2, warmup_steps=1)).model.state_dict()
    torch.manual_seed(6)
    second = train_image(images, CONFIG, build_options(steps=2, warmup_steps=1)).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unused_codes_are_revived(paths, monkeypatch):
    """A codebook whose codes are all far from the data, except one, is used again after training."""
    import megatron_cm3leon.tokenizers.image_training as training

    def start_far_away(trainer, images, draws):
        trainer.codebook.data.fill_(100.0)
        trainer.codebook.data[0] = 0.0

    monkeypatch.setattr(training._Trainer, "initialize_codebook", start_far_away)
    images = TrainingImages(paths, 16)
    revived = measure_image(train_image(images, CONFIG, build_options(steps=40)), images)
    assert revived["codes_used"] >= 0.25  # of 16 codes; these images have few kinds of patches
    not_revived = measure_image(
        train_image(images, CONFIG, build_options(steps=40, codebook="gradient", revive_below=0.0)), images
    )
    assert not_revived["codes_used"] < 0.2


def test_training_returns_a_summary(paths):
    tokenizer, summary = train_and_measure(paths, CONFIG, build_options(), heldout_share=0.2)
    assert summary["pictures"] == 32 and summary["heldout"]["pictures"] == 8
    assert summary["steps"] == 30 and summary["seconds"] > 0 and summary["pictures_skipped"] == 0
    assert 0 < summary["heldout"]["codes_used"] <= 1 <= summary["heldout"]["codebook_perplexity"] <= 16
    assert summary["parameters"] == sum(weight.numel() for weight in tokenizer.model.parameters())


def test_psnr_of_a_known_error(paths):
    """A tokenizer that decodes every image to white has an error in the squares only."""

    class White:
        codebook_size, device = 16, torch.device("cpu")

        def encode(self, pixels):
            return torch.zeros(len(pixels), 16, dtype=torch.long)

        def decode(self, codes):
            return torch.ones(len(codes), 3, 16, 16)

    figures = measure_image(White(), TrainingImages(paths, 16))
    error = 64 / 256 * 2 / 3  # a quarter of the pixels; two of three channels differ by the full range
    assert figures["psnr_db"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert figures["codebook_perplexity"] == pytest.approx(1.0) and figures["codes_used"] == 1 / 16


def test_kmeans_finds_rare_clusters():
    clusters = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    vectors = torch.cat([clusters[:1].repeat(960, 1), clusters[1:].repeat(20, 1)])
    centers, shares = find_centers(vectors, 3, torch.Generator().manual_seed(0))
    order = (centers[:, 0] + 2 * centers[:, 1]).argsort()
    torch.testing.assert_close(centers[order], clusters)
    torch.testing.assert_close(shares[order], torch.tensor([0.96, 0.02, 0.02]))


def test_kmeans_of_fewer_distinct_vectors_than_centers():
    centers, shares = find_centers(torch.zeros(10, 2), 4, torch.Generator().manual_seed(0))
    assert torch.equal(centers, torch.zeros(4, 2)) and shares.sum() == 1


def test_learning_rate_schedule():
    shares = [learning_rate_share(step, 100) for step in range(100)]
    assert shares[0] == 0.2 and shares[4] == shares[5] == 1.0
    assert shares[5:] == sorted(shares[5:], reverse=True) and 0.01 <= shares[-1] < 0.02


def test_damaged_images_are_skipped_and_counted(paths, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = TrainingImages([*paths[:3], tmp_path / "bad.png"], 16)
    assert len(images) == 3 and len(images.skipped) == 1
    with pytest.raises(ValueError, match=r"none of the 1 images could be read; the first reason: .*bad\.png"):
        TrainingImages([tmp_path / "bad.png"], 16)


def test_images_that_do_not_fit_in_memory_are_read_for_each_batch(paths):
    stored, read = TrainingImages(paths, 16), TrainingImages(paths, 16, memory_gigabytes=0.0)
    numbers = torch.tensor([3, 1, 39])
    assert read.stored is None and len(read) == len(stored) == 40
    assert torch.equal(stored.batch(numbers, torch.device("cpu")), read.batch(numbers, torch.device("cpu")))


def test_split_heldout(paths):
    train, heldout = split_heldout(paths, 0.1, seed=0)
    assert len(heldout) == 4 and sorted(train + heldout) == paths
    assert split_heldout(paths, 0.1, seed=0) == (train, heldout)
    with pytest.raises(ValueError, match="1 images are too few"):
        split_heldout(paths[:1], 0.1, seed=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(warmup_steps=30), r"warmup_steps \(30\) must leave steps for the codebook: 0 to 29"),
        (dict(codebook="other"), r"codebook \('other'\) must be one of: ema, gradient"),
        (dict(batch_size=0), r"batch_size \(0\) must be at least 1"),
    ],
)
def test_invalid_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_options(**changes)

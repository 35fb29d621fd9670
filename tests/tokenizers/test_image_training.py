"""Training lowers the error, uses the codebook, repeats with the seed, and gives an account."""

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
    """40 pictures of a coloured square on white."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(40):
        picture = np.full((16, 16, 3), 255, np.uint8)
        row, column = random.integers(0, 8, 2)
        picture[row : row + 8, column : column + 8] = ((255, 0, 0), (0, 0, 255))[number % 2]
        Image.fromarray(picture).save(folder / f"{number:02d}.png")
    return sorted(folder.iterdir())


def options(**changes) -> ImageTrainingOptions:
    return ImageTrainingOptions(**{**dict(steps=30, warmup_steps=10, batch_size=8, learning_rate=5e-3), **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"codebook": "gradient"}, {"loss": "l1"}, {"precision": "fp32"}, {"warmup_steps": 0}]
)
def test_training_lowers_the_error(paths, changes):
    pictures = TrainingImages(paths, 16)
    before = measure_image(train_image(pictures, CONFIG, options(steps=1, warmup_steps=0)), pictures)
    steps = 300 if changes.get("loss") == "l1" else 60  # l1 stays at the flat background first
    after = measure_image(train_image(pictures, CONFIG, options(steps=steps, **changes)), pictures)
    assert after["psnr_db"] > before["psnr_db"] + 2
    assert after["codebook_perplexity"] > 2


def test_same_seed_same_weights(paths):
    pictures = TrainingImages(paths, 16)
    first, second, other = (
        train_image(pictures, CONFIG, options(seed=seed, steps=12, warmup_steps=4)).model.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_seed_does_not_depend_on_the_callers_generator(paths):
    pictures = TrainingImages(paths, 16)
    torch.manual_seed(5)
    first = train_image(pictures, CONFIG, options(steps=2, warmup_steps=1)).model.state_dict()
    torch.manual_seed(6)
    second = train_image(pictures, CONFIG, options(steps=2, warmup_steps=1)).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dead_codes_restart(paths, monkeypatch):
    """From a codebook whose codes but one lie far away, all come back into use."""
    import megatron_cm3leon.tokenizers.image_training as training

    def bad_start(trainer, pictures, draws):
        trainer.codebook.data.fill_(100.0)
        trainer.codebook.data[0] = 0.0

    monkeypatch.setattr(training._Trainer, "initialize_codebook", bad_start)
    pictures = TrainingImages(paths, 16)
    alive = measure_image(train_image(pictures, CONFIG, options(steps=40)), pictures)
    assert alive["codes_used"] >= 0.25  # of 16 codes; these pictures have few kinds of patches
    left = measure_image(
        train_image(pictures, CONFIG, options(steps=40, codebook="gradient", revive_below=0.0)), pictures
    )
    assert left["codes_used"] < 0.2


def test_account(paths):
    tokenizer, account = train_and_measure(paths, CONFIG, options(), heldout_share=0.2)
    assert account["pictures"] == 32 and account["heldout"]["pictures"] == 8
    assert account["steps"] == 30 and account["seconds"] > 0 and account["pictures_skipped"] == 0
    assert 0 < account["heldout"]["codes_used"] <= 1 <= account["heldout"]["codebook_perplexity"] <= 16
    assert account["parameters"] == sum(weight.numel() for weight in tokenizer.model.parameters())


def test_psnr_of_a_known_error(paths):
    """A tokenizer that draws everything white is off by the squares alone."""

    class White:
        codebook_size, device = 16, torch.device("cpu")

        def encode(self, pixels):
            return torch.zeros(len(pixels), 16, dtype=torch.long)

        def decode(self, codes):
            return torch.ones(len(codes), 3, 16, 16)

    measured = measure_image(White(), TrainingImages(paths, 16))
    wrong = 64 / 256 * 2 / 3  # a quarter of the pixels, two channels of three off by the whole range
    assert measured["psnr_db"] == pytest.approx(-10 * np.log10(wrong), abs=1e-3)
    assert measured["codebook_perplexity"] == pytest.approx(1.0) and measured["codes_used"] == 1 / 16


def test_kmeans_finds_rare_clusters():
    places = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    vectors = torch.cat([places[:1].repeat(960, 1), places[1:].repeat(20, 1)])
    centres, shares = find_centers(vectors, 3, torch.Generator().manual_seed(0))
    order = (centres[:, 0] + 2 * centres[:, 1]).argsort()
    torch.testing.assert_close(centres[order], places)
    torch.testing.assert_close(shares[order], torch.tensor([0.96, 0.02, 0.02]))


def test_kmeans_of_fewer_distinct_vectors_than_centres():
    centres, shares = find_centers(torch.zeros(10, 2), 4, torch.Generator().manual_seed(0))
    assert torch.equal(centres, torch.zeros(4, 2)) and shares.sum() == 1


def test_learning_rate():
    shares = [learning_rate_share(step, 100) for step in range(100)]
    assert shares[0] == 0.2 and shares[4] == shares[5] == 1.0
    assert shares[5:] == sorted(shares[5:], reverse=True) and 0.01 <= shares[-1] < 0.02


def test_damaged_pictures_are_left_out_and_counted(paths, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pictures = TrainingImages([*paths[:3], tmp_path / "bad.png"], 16)
    assert len(pictures) == 3 and len(pictures.skipped) == 1
    with pytest.raises(ValueError, match=r"none of the 1 images could be read; the first reason: .*bad\.png"):
        TrainingImages([tmp_path / "bad.png"], 16)


def test_pictures_that_do_not_fit_in_memory_are_read_anew(paths):
    stored, read = TrainingImages(paths, 16), TrainingImages(paths, 16, memory_gigabytes=0.0)
    numbers = torch.tensor([3, 1, 39])
    assert read.stored is None and len(read) == len(stored) == 40
    assert torch.equal(stored.batch(numbers, torch.device("cpu")), read.batch(numbers, torch.device("cpu")))


def test_split_heldout(paths):
    train, held = split_heldout(paths, 0.1, seed=0)
    assert len(held) == 4 and sorted(train + held) == paths
    assert split_heldout(paths, 0.1, seed=0) == (train, held)
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
def test_options_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)

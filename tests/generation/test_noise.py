"""Random numbers: Philox equals published vectors and NumPy; Gumbel noise depends on seed, prompt and id only."""

import sys

import numpy as np
import pytest
import torch

from megatron_cm3leon.generation.noise import (
    GumbelNoise,
    GumbelSource,
    KernelSource,
    UniformSource,
    philox,
    philox_key,
    uniform_numbers,
)

KERNEL = "megatron_cm3leon.generation.noise_kernel"


def philox_by_numpy(counter, key):
    """One block of Philox 4x32-10, written out with integers of Python."""
    a, b, c, d = counter
    first, second = key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ first, right % 2**32, (left >> 32) ^ d ^ second, left % 2**32
        first, second = (first + 0x9E3779B9) % 2**32, (second + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def noise_by_numpy(key, position, ids):
    words = [philox_by_numpy((position, token // 4, 0, 0), key)[token % 4] for token in ids]
    uniform = (np.array([word >> 9 for word in words]) + 0.5) / 2**23
    return (-np.log(-np.log(uniform))).astype(np.float32)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123, philox4x32 10
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_equals_published_vectors(counter, key, expected):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert " ".join(f"{int(word):08x}" for word in words) == expected
    assert " ".join(f"{word:08x}" for word in philox_by_numpy(counter, key)) == expected


@pytest.mark.parametrize("ids", [range(16), range(7, 30), [0, 1, 5, 64, 65_535]])
def test_noise_equals_that_of_numpy(ids):
    keys = torch.tensor([philox_key(seed, [1, 2]) for seed in range(3)])
    found_noise = GumbelNoise(torch.tensor(ids))(keys, torch.tensor([0, 5, 4095]))
    assert found_noise.shape == (3, 3, len(ids)) and found_noise.dtype == torch.float32
    for row, position in zip(found_noise, (0, 5, 4095), strict=True):
        for found, key in zip(row.numpy(), keys.tolist(), strict=True):
            np.testing.assert_array_max_ulp(found, noise_by_numpy(key, position, ids), 2)


def test_the_smallest_and_the_largest_integers_give_finite_noise():
    bits = torch.tensor([0, 2**32 - 1])
    uniform = ((bits >> 9).double() + 0.5) / 2**23
    assert uniform[0] > 0 and uniform[1] < 1
    assert (-(-uniform.log()).log()).isfinite().all()


def test_noise_of_an_id_does_not_depend_on_other_allowed_ids():
    keys, positions = torch.tensor([philox_key(1, [7])]), torch.arange(3)
    all_noise = GumbelNoise(torch.arange(40))(keys, positions)
    selected = torch.tensor([2, 3, 9, 21, 39])
    assert torch.equal(GumbelNoise(selected)(keys, positions), all_noise[..., selected])


def test_noise_has_the_gumbel_distribution():
    noise = GumbelNoise(torch.arange(20_000))(torch.tensor([philox_key(0, [1])]), torch.arange(4)).flatten()
    ordered = noise.double().sort().values
    expected = torch.exp(-torch.exp(-ordered))
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert (expected - steps).abs().max() < 1.63 / len(ordered) ** 0.5  # Kolmogorov-Smirnov, 1 %


@pytest.mark.parametrize("ahead", [1, 3, 64])
def test_a_source_gives_the_same_numbers_however_many_it_computes_at_once(ahead, monkeypatch):
    from megatron_cm3leon.generation import noise

    ids, prompts = torch.arange(5, 25), [[1, 2], [3]]
    monkeypatch.setitem(noise.GROUPS_AT_ONCE, "cpu", ahead * 2 * 6)
    source = GumbelSource(ids, 2, 10)
    source.begin([4, 5], prompts)
    assert source.ahead == min(ahead, 10)
    keys = torch.tensor([philox_key(4, [1, 2]), philox_key(5, [3])])
    expected = GumbelNoise(ids)(keys, torch.arange(10))
    for position in range(10):
        source.prepare(position)
        assert torch.equal(source.at(torch.tensor([position])), expected[position])


def test_the_kernel_gives_the_same_noise(monkeypatch):
    """The kernel of a GPU, in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    ids, prompts = torch.tensor([*range(5, 600), 2000]), [[1, 2], [3]]
    source, expected = KernelSource(ids, 2), GumbelSource(ids, 2, 1)
    for one in (source, expected):
        one.begin([4, 5], prompts)
    for position in (0, 4095):
        expected.prepare(position)
        found_noise = source.at(torch.tensor([position])).numpy()
        np.testing.assert_array_max_ulp(found_noise, expected.at(torch.tensor([position])).numpy(), 2)
    del sys.modules[KERNEL]  # other tests must not get the interpreted module


def test_uniform_numbers_depend_only_on_seed_and_prompt():
    first = uniform_numbers(7, [1, 2, 3], 5)
    assert (first == uniform_numbers(7, [1, 2, 3], 9)[:5]).all()
    assert (first != uniform_numbers(8, [1, 2, 3], 5)).all()
    assert (first != uniform_numbers(7, [1, 2, 4], 5)).all()
    assert ((first >= 0) & (first < 1)).all()
    source = UniformSource(1, 5, torch.device("cpu"))
    source.begin([7], [[1, 2, 3]])
    assert source.at(torch.tensor([2])).tolist() == [first[2]]


def test_numbers_are_those_of_earlier_versions():
    """Images that were generated before samplers could be chosen used these numbers."""
    assert uniform_numbers(7, [1, 2, 3], 3).tolist() == [0.49585942036523967, 0.9099497274644287, 0.18014288179158588]
    assert philox_key(7, [1, 2, 3]) == [42641193, 1868560868]


def test_keys_differ_by_seed_and_prompt():
    keys = {tuple(philox_key(seed, prompt)) for seed in range(20) for prompt in ([1], [1, 2], [2, 1])}
    assert len(keys) == 60

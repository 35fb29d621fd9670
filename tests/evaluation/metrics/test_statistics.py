"""Files of statistics: what every FID program reads, and files that belong to something else."""

import numpy as np
import pytest

from megatron_cm3leon.evaluation.metrics.statistics import (
    BLOCK,
    compute_statistics,
    read_statistics,
    write_statistics,
)


def test_statistics_over_blocks_are_numpys():
    features = np.random.default_rng(0).normal(5, 2, (BLOCK + 100, 3)).astype(np.float32)
    found = compute_statistics(features)
    assert np.allclose(found.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    assert np.allclose(found.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


def test_a_file_is_read_as_it_was_written(tmp_path):
    statistics = compute_statistics(np.random.default_rng(0).normal(size=(9, 4)), {"network": "ab", "resize": "clean"})
    write_statistics(tmp_path / "new" / "s.npz", statistics)
    found = read_statistics(tmp_path / "new" / "s.npz", 4, {"network": "ab"})
    assert np.array_equal(found.mean, statistics.mean) and np.array_equal(found.covariance, statistics.covariance)
    assert found.n == 9 and found.record == statistics.record
    with pytest.raises(ValueError, match="records statistics of another network: ab, not cd"):
        read_statistics(tmp_path / "new" / "s.npz", 4, {"network": "cd"})


def test_files_of_something_else_are_refused(tmp_path):
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    np.savez(tmp_path / "other.npz", x=np.zeros(4))
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], object), sigma=np.eye(4))
    (tmp_path / "text.npz").write_text("mu")
    for name, message in (
        ("narrow", r"statistics of another network: mu and sigma have the shapes \(64,\) and \(64, 64\)"),
        ("nan", "values in mu or sigma that are not finite"),
        ("other", "not a file of statistics with mu and sigma"),
        ("pickle", "not a file of statistics with mu and sigma"),
        ("text", r"not a file of statistics with mu and sigma \(it is not an .npz archive\); write one"),
        ("absent", "does not exist; give a folder of images or an .npz file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_statistics(tmp_path / f"{name}.npz", 4, {})

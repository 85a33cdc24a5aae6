"""Statistics of token shards against scipy, scikit-learn, and distributions known exactly."""

import itertools
import json
import math
import tracemalloc

import numpy as np
import pytest
from evaluated import assert_json_and_plots
from scipy import stats
from sklearn.metrics import mutual_info_score
from token_shards import random_records, write_tokens

from tokenbridge_jax.evaluation import tokens
from tokenbridge_jax.evaluation.tokens import entropies, mutual_information, zipf_fit
from tokenbridge_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 images with 2 posterior samples, each also mirrored, in 2 shards; 7 for validation."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder, {"train": [17, 13], "validation": [7]}, levels=5, samples=2, flips=True)
    return folder


def shared_bits(found) -> dict:
    """The plug-in estimates of mutual information."""
    places = ("channels", "right", "below")
    return {place: found["mutual_information"][place]["plug_in"] for place in places}


def assert_shared(one, other, found) -> None:
    bits = mutual_info_score(one.ravel(), other.ravel()) / math.log(2)
    assert found == pytest.approx(bits, rel=1e-9)


@pytest.mark.parametrize("all_views", [False, True])
def test_statistics_equal_those_of_all_indices_at_once(folder, all_views, monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH", 8)
    found = tokens.token_statistics(folder, all_views=all_views)
    info = tokens.shards.read_info(folder)
    indices = random_records(info, range(30))["indices"][:, : 4 if all_views else 1]
    grids = indices.reshape(-1, 4, 4, 3)
    assert (found["images"], found["views"]) == (30, 4 if all_views else 1)
    assert found["samples"] == len(grids) * 16
    shared = shared_bits(found)
    for c in range(3):
        counts = np.bincount(grids[..., c].ravel(), minlength=5)
        expected = stats.entropy(counts, base=2)
        assert found["entropy"]["plug_in"][c] == pytest.approx(expected, rel=1e-12)
        assert found["level_use"]["perplexity"][c] == pytest.approx(2**expected, rel=1e-12)
        assert found["level_use"]["most_used_level"][c] == counts.argmax()
        assert found["level_use"]["least_used_share"][c] == counts.min() / counts.sum()
        assert_shared(grids[:, :, :-1, c], grids[:, :, 1:, c], shared["right"][c])
        assert_shared(grids[:, :-1, :, c], grids[:, 1:, :, c], shared["below"][c])
        for d in range(3):
            assert_shared(grids[..., c], grids[..., d], shared["channels"][c][d])
    assert found["entropy"]["bits_per_pixel"] == pytest.approx(
        16 * sum(found["entropy"]["corrected"]) / 16**2
    )


def test_counting_in_parts_and_blocks_changes_nothing(folder, monkeypatch):
    """As for millions of pairs."""
    expected = tokens.token_statistics(folder)
    monkeypatch.setattr(tokens, "_MOST_CELLS", 2 * 5**2)  # Two of the nine tables at a time.
    monkeypatch.setattr(tokens, "_RANKS", 7)
    monkeypatch.setattr(tokens, "_BATCH", 4)
    found = tokens.token_statistics(folder)
    for name, fit in expected.pop("rank_frequency").items():
        assert_same_fit(found["rank_frequency"].pop(name), fit)
    assert found | {"rank_frequency": {}} == expected | {"rank_frequency": {}}


def assert_same_fit(found, expected):
    assert found.pop("method") == expected.pop("method")
    for field, value in expected.items():
        assert found[field] == pytest.approx(value, rel=1e-9), field


def test_only_pairs_that_occur_take_memory():
    """With 4096 levels, 152 tables of all pairs would take 20 GB."""
    indices = np.random.default_rng(0).zipf(1.2, size=(4, 16, 16, 16)) % 4096
    tracemalloc.start()
    counts = tokens.TokenCounts(16, 4096)
    counts.update(indices[:3])
    counts.update(indices[3:])
    found = tokens.describe([counts])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26
    shared = shared_bits(found)
    assert_shared(indices[..., 2], indices[..., 7], shared["channels"][2][7])
    assert_shared(indices[:, :, :-1, 3], indices[:, :, 1:, 3], shared["right"][3])
    assert_shared(indices[:, :-1, :, 3], indices[:, 1:, :, 3], shared["below"][3])
    pairs = [
        np.unique(indices[..., c] * 4096 + indices[..., d], return_counts=True)[1]
        for c, d in itertools.combinations(range(16), 2)
    ]
    expected = zipf_fit(np.concatenate(pairs)) | {"possible_types": 120 * 4096**2}
    assert_same_fit(found["rank_frequency"]["pairs"], expected)


def test_splits_and_subsets(folder):
    assert tokens.token_statistics(folder, "validation")["images"] == 7
    assert tokens.token_statistics(folder, max_images=4)["samples"] == 4 * 16
    with pytest.raises(UserError, match="no split 'test'"):
        tokens.token_statistics(folder, "test")
    with pytest.raises(UserError, match="max_images=0 must be at least 1"):
        tokens.token_statistics(folder, max_images=0)


def test_shards_without_images_or_with_too_large_indices(tmp_path):
    write_tokens(tmp_path, {"train": [3], "validation": [0]}, levels=16)
    path = tmp_path / "dataset.json"
    path.write_text(path.read_text().replace('"levels": 16', '"levels": 4'))
    info = json.loads(path.read_text())
    info["quantizer"]["level_values"] = info["quantizer"]["level_values"][:4]
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match="hold index 15, but have 4 levels"):
        tokens.token_statistics(tmp_path)
    with pytest.raises(UserError, match=r"split 'validation' .* holds no images"):
        tokens.token_statistics(tmp_path, "validation")


def test_entropies_are_scipys_and_the_corrected_ones_are_less_biased():
    counts = np.array([[10, 0, 6, 4], [5, 5, 5, 5], [0, 20, 0, 0]])
    plug_in, corrected = entropies(counts)
    np.testing.assert_allclose(plug_in, stats.entropy(counts, base=2, axis=1), rtol=1e-13)
    expected = np.array([2, 3, 0]) / (2 * 20) / math.log(2)
    np.testing.assert_allclose(corrected - plug_in, expected, rtol=1e-12)
    drawn = np.random.default_rng(0).multinomial(100, np.full(16, 1 / 16), size=2000)
    plug_in, corrected = (x.mean() for x in entropies(drawn))
    assert abs(corrected - 4) < 0.01 < 0.1 < 4 - plug_in


def test_mutual_information_of_known_distributions():
    independent = np.outer([1, 2, 5], [4, 3, 1])
    equal = np.diag([8, 8, 16])
    # A channel that flips one bit in ten: its capacity.
    noisy = np.array([[45, 5], [5, 45]])
    capacity = 1 - stats.entropy([0.1, 0.9], base=2)
    for counts, bits in ((independent, 0), (equal, 1.5), (noisy, capacity)):
        plug_in, corrected = (x[0] for x in mutual_information(counts[None]))
        assert plug_in == pytest.approx(bits, abs=1e-12)
        rows, columns = (np.count_nonzero(counts.sum(axis=a)) for a in (0, 1))
        bias = (np.count_nonzero(counts) - rows - columns + 1) / (2 * counts.sum()) / math.log(2)
        assert plug_in - corrected == pytest.approx(bias, abs=1e-12)
    drawn = np.random.default_rng(0).multinomial(500, np.full(64, 1 / 64), size=1000)
    plug_in, corrected = (x.mean() for x in mutual_information(drawn.reshape(-1, 8, 8)))
    assert abs(corrected) < 0.003 < 0.06 < plug_in


def test_total_correlation_of_a_tree():
    """Channel 1 copies 0 (two bits), channel 2 copies 0 half of the time."""
    rng = np.random.default_rng(0)
    first = rng.integers(4, size=(500, 4, 4))
    third = np.where(rng.random(first.shape) < 0.5, first, rng.integers(4, size=first.shape))
    counts = tokens.TokenCounts(3, 4)
    counts.update(np.stack([first, first, third], axis=-1).astype(np.uint8))
    found = tokens.describe([counts])["mutual_information"]
    expected = 2 + 2 - stats.entropy([0.625, 0.125, 0.125, 0.125], base=2)
    assert found["total_correlation_at_least"] == pytest.approx(expected, abs=0.03)
    np.testing.assert_allclose(found["right"]["corrected"], 0, atol=0.003)


def test_zipf_fit_finds_the_law():
    for exponent in (0.5, 1.0, 1.7):
        counts = np.round(1e9 / np.arange(1, 301) ** exponent).astype(np.int64)
        found = zipf_fit(np.random.default_rng(0).permutation(np.append(counts, [0] * 7)))
        assert (found["types"], found["possible_types"]) == (300, 307)
        assert found["exponent"] == pytest.approx(exponent, abs=1e-4)
        assert found["kolmogorov_smirnov"] < 1e-4
        assert found["r_squared"] == pytest.approx(1, abs=1e-6)


def test_zipf_fit_is_the_most_likely():
    counts = np.random.default_rng(1).integers(1, 100, size=40)
    found = zipf_fit(counts)
    ranked = np.sort(counts)[::-1]

    def log_likelihood(exponent: float) -> float:
        law = stats.zipfian(exponent, 40)
        return float((ranked * law.logpmf(np.arange(1, 41))).sum())

    best = log_likelihood(found["exponent"])
    assert best > max(log_likelihood(found["exponent"] + step) for step in (-1e-3, 1e-3))
    law = stats.zipfian(found["exponent"], 40)
    np.testing.assert_allclose(found["fitted"], law.pmf(found["ranks"]), rtol=1e-10)
    distance = np.abs(np.cumsum(ranked) / ranked.sum() - law.cdf(np.arange(1, 41))).max()
    assert found["kolmogorov_smirnov"] == pytest.approx(distance, rel=1e-9)


def test_zipf_fit_without_a_slope():
    assert zipf_fit(np.full(9, 4))["exponent"] == 0
    assert zipf_fit(np.array([0, 7, 0]))["exponent"] is None


def test_statistics_are_json_and_plotted(folder, tmp_path):
    assert_json_and_plots(tokens.token_statistics(folder), tokens.plot, tmp_path, 3)

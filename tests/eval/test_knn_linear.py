import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vjepa_scale.data.manifest import few_labels
from vjepa_scale.eval.knn_linear import (
    effective_rank,
    encoder_features,
    knn_accuracy,
    linear_probe_accuracy,
    pixel_features,
)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    labelled = few_labels(y[:900], per_class=20, seed=0)
    return x[:900][labelled], y[:900][labelled], x[900:], y[900:]


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    assert effective_rank(rng.standard_normal((20_000, 24))) == pytest.approx(24, rel=0.01)
    assert effective_rank(np.outer(rng.standard_normal(300), rng.standard_normal(24))) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.ones((300, 24), np.float32)) == 0
    # singular values 2:1:1 have the entropy 1.5·log 2; an offset common to all rows is no direction
    basis, _ = np.linalg.qr(rng.standard_normal((200, 4)) - np.eye(200, 4))
    basis -= basis.mean(0)
    basis, _ = np.linalg.qr(basis)
    assert effective_rank(basis[:, :3] * [2, 1, 1] + 5.0) == pytest.approx(2**1.5, rel=1e-6)


def test_few_labels_are_balanced_keyed_and_within_their_class():
    labels = np.random.default_rng(1).integers(0, 5, 400)
    chosen = few_labels(labels, per_class=7, seed=3)
    assert np.bincount(labels[chosen]).tolist() == [7] * 5
    assert len(set(chosen)) == 35
    assert (chosen == few_labels(labels, per_class=7, seed=3)).all()
    assert (chosen != few_labels(labels, per_class=7, seed=4)).any()
    with pytest.raises(ValueError, match="fewer than 300"):
        few_labels(labels, per_class=300, seed=0)


def test_knn_agrees_with_a_vote_by_hand(digits):
    train, train_labels, val, val_labels = digits
    scale = train.std(0) + (train.std(0) == 0)
    distance = cdist((val - train.mean(0)) / scale, (train - train.mean(0)) / scale, "cosine")
    votes = train_labels[np.argsort(distance, 1, kind="stable")[:, :5]]
    by_hand = np.mean([np.bincount(v).argmax() == label for v, label in zip(votes, val_labels, strict=True)])
    assert knn_accuracy(train, train_labels, val, val_labels) == pytest.approx(by_hand, abs=2e-3)
    assert by_hand > 0.8


def test_linear_probe_is_logistic_regression_on_standardised_features(digits):
    """Also where features outnumber labels, which the probe solves in a smaller basis."""
    train, train_labels, val, val_labels = digits
    few = np.r_[:40]
    for rows in (few, np.arange(len(train))):
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        expected = plain.fit(train[rows], train_labels[rows]).score(val, val_labels)
        assert linear_probe_accuracy(train[rows], train_labels[rows], val, val_labels) == pytest.approx(
            expected, abs=3e-3
        )


def test_shuffled_labels_are_at_chance(digits):
    train, train_labels, val, val_labels = digits
    shuffled = np.random.default_rng(0).permutation(train_labels)
    assert linear_probe_accuracy(train, train_labels, val, val_labels) > 0.85
    for accuracy in (knn_accuracy, linear_probe_accuracy):
        assert accuracy(train, shuffled, val, val_labels) < 0.2  # chance is 0.1


def test_features_are_means_over_space_in_the_order_of_time():
    clips = torch.randint(0, 256, (5, 3, 4, 6, 6), dtype=torch.uint8)
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.3])

    def encoder(x):  # tokens of one frame and 3×3 pixels, whose features are the three mean colours
        return torch.nn.functional.avg_pool3d(x, (1, 3, 3)).flatten(2).transpose(1, 2)

    features = encoder_features(encoder, clips, tubelet=1, mean=mean, std=std, batch=2)
    colours = clips.numpy().mean((3, 4)).transpose(0, 2, 1) / 255
    np.testing.assert_allclose(features, ((colours - mean) / std).reshape(5, 12), rtol=1e-4, atol=1e-5)


def test_pixels_shrink_by_area_and_keep_flat_colours():
    clips = torch.full((2, 3, 4, 32, 32), 51, dtype=torch.uint8)
    np.testing.assert_allclose(pixel_features(clips, size=8), np.full((2, 3 * 4 * 64), 0.2), rtol=1e-6)

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from benchmark.data.eval_sets import EvalSet, Split
from benchmark.evaluate.features import Encoder
from benchmark.evaluate.linear_probe import DECADES, fit, fit_validated, linear_probe


def problem(n, seed=0, d=6, n_classes=4):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(n_classes, d))
    labels = rng.integers(0, n_classes, n)
    return torch.tensor(centres[labels] + rng.normal(size=(n, d)), dtype=torch.float32), torch.from_numpy(labels)


def test_the_fit_equals_scikit_learns():
    features, labels = problem(300)
    test, test_labels = problem(2000, 1)
    for strength in (1e-3, 1e-1):
        weights, bias = fit(features, labels, 4, strength)
        theirs = LogisticRegression(C=1 / (strength * 300), tol=1e-8, max_iter=5000).fit(features.numpy(), labels.numpy())
        predicted = (test @ weights + bias).argmax(1)
        ours, other = float((predicted == test_labels).float().mean()), theirs.score(test.numpy(), test_labels.numpy())
        assert abs(ours - other) < 0.002
        assert np.allclose((weights - weights.mean(1, keepdim=True)).numpy().T, theirs.coef_ - theirs.coef_.mean(0), atol=5e-3)


def test_the_strength_is_chosen_on_the_validation_split_and_recorded():
    train, train_labels = problem(120)
    validation, validation_labels = problem(60, 1)
    fitted = fit_validated(train, train_labels, validation, validation_labels, 4)
    assert min(DECADES) / 4 < fitted.strength < max(DECADES) * 4
    assert fitted.at_edge == (fitted.strength <= 1e-6 or fitted.strength >= 1e2)
    test, labels = problem(1000, 2)
    assert float((fitted.predict(test) == labels).float().mean()) > 0.6


def test_a_feature_that_never_changes_does_no_harm():
    features, labels = problem(100)
    features[:, 0] = 1.0
    fitted = fit_validated(features[:60], labels[:60], features[60:], labels[60:], 4)
    assert torch.isfinite(fitted.weights).all()


class Flat:
    """The image's own red pixels as features."""

    def encode_images(self, images):
        return torch.from_numpy(images[:, 0, :, 0].astype(np.float32)) / 255


def split(n, name, seed):
    features, labels = problem(n, seed)
    images = np.zeros((n, 6, 6, 3), np.uint8)
    images[:, 0, :, 0] = ((features + 4) * 25).clip(0, 255).to(torch.uint8).numpy()
    return Split(images, labels.numpy(), tuple(f"{name}{index}" for index in range(n)))


def test_sets_that_share_training_images_share_one_fit():
    train, validation = split(100, "train", 0), split(40, "validation", 1)
    sets = [EvalSet(name, tuple("abcd"), ("{c}",), {}, None, train, validation, split(80, name, seed)) for name, seed in (("one", 2), ("two", 3))]
    fitted, encoder = {}, Encoder([Flat()])
    results = [linear_probe(encoder, one, fitted) for one in sets]
    assert len(fitted) == 1 and results[0][1] is results[1][1]
    for metrics, probe in results:
        values = {metric.name: metric for metric in metrics}
        assert values["linear_probe_acc1"].n == 80 and values["linear_probe_acc1"].value > 0.5
        assert values["linear_probe_lambda"].value == probe.strength

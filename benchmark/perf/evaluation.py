"""The linear probe against scikit-learn's logistic regression over the same strengths."""

from __future__ import annotations

import time

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from benchmark.evaluate.linear_probe import DECADES, fit_validated

_CLASSES, _WIDTH, _ROWS = 16, 128, 2000


def probe_ratio() -> float:
    """Seconds of the probe over scikit-learn's: the nine decades, two half-decades and the last fit on both splits."""
    rng = np.random.default_rng(0)
    labels = np.arange(_ROWS) % _CLASSES
    features = (rng.normal(size=(_CLASSES, _WIDTH))[labels] + 3 * rng.normal(size=(_ROWS, _WIDTH))).astype(np.float32)
    n = _ROWS * 3 // 4
    began = time.perf_counter()
    found = fit_validated(torch.from_numpy(features[:n]), torch.from_numpy(labels[:n]), torch.from_numpy(features[n:]), torch.from_numpy(labels[n:]), _CLASSES)
    own = time.perf_counter() - began
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    began = time.perf_counter()
    for strength in (*DECADES, found.strength / 10**0.5, found.strength * 10**0.5):
        LogisticRegression(C=1 / (strength * n), max_iter=1000, tol=1e-5).fit(scaled[:n], labels[:n]).score(scaled[n:], labels[n:])
    LogisticRegression(C=1 / (found.strength * _ROWS), max_iter=1000, tol=1e-5).fit(scaled, labels)
    return own / (time.perf_counter() - began)

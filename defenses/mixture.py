"""Filter by a mixture model of similarities."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark.train.lab import Lab
from benchmark.train.model import Model
from defenses._filter import Filter
from defenses._mixture import Mixture, fit


class MixtureFilter(Filter):
    """Splits the similarities of image and caption into two normal components and drops the pairs likeliest in the lower one.

    Clean pairs should form the component with the higher mean.

    Source: Huang et al., ICLR 2025, arXiv 2502.01385 (as a detector); the split of Yang et al. (SafeCLIP), ICML 2024, arXiv 2310.05862.
    Differs from the paper: the score is the log-odds and not the probability, which saturates and leaves ties.
    """

    paper = "Huang et al. 2025, arXiv 2502.01385; Yang et al. 2024, arXiv 2310.05862"

    def defend(self, lab: Lab) -> Model:
        image, text = lab.features(self.suspect(lab))
        cosine = (image.double() * text.double()).sum(dim=1).numpy()
        mixture = fit(cosine)
        if not mixture.separates:
            low, high = mixture.means
            lab.warn(f"mixture: the components overlap (means {low:.2f} and {high:.2f}), so which pairs belong to the lower one is not clear")
        scores = log_odds(mixture, cosine)
        return self.without_the_most_suspicious(lab, "mixture", torch.from_numpy(scores), scores > 0)


def log_odds(mixture: Mixture, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-odds (n,) of the component with the smaller mean; not monotone in the values where the variances differ."""
    means, variances, weights = (np.array(part) for part in (mixture.means, mixture.variances, mixture.weights))
    logs = np.log(np.maximum(weights, 1e-300)) - 0.5 * (np.log(variances) + (values[:, None] - means) ** 2 / variances)
    return np.asarray(logs[:, 0] - logs[:, 1], dtype=np.float64)

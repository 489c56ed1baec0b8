"""The contrastive loss, as a function of features."""

import torch
from torch import Tensor
from torch.nn import functional


def contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of scaled cosines; features unit-length (b, d), pair i against all others.

    Source: Radford et al., 2021, arXiv 2103.00020.
    """
    logits = scale * image @ text.T
    labels = torch.arange(len(image), device=image.device)
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2

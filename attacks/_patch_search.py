"""Optimises a patch against a frozen model, towards the captions and images of a class (BadCLIP, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from attacks._placing import patch_box
from benchmark.data.eval_sets import EvalSet
from benchmark.data.images import Images
from benchmark.progress import Progress
from benchmark.seeding import generator
from benchmark.train.loss import contrastive
from benchmark.train.model import Model


@dataclass(frozen=True)
class Search:
    """How a patch is looked for.

    Attributes:
        size: side of the patch in pixels; it lies in the centre.
        text, positive, negative: weights of the terms, see `patch_loss`.
        seed: of the first patch and of all draws.
    """

    size: int
    epochs: int
    batch_size: int
    lr: float
    text: float
    positive: float
    negative: float
    margin: float
    seed: int


def patch_loss(image: Tensor, text: Tensor, positive: Tensor, negative: Tensor, scale: Tensor, search: Search) -> Tensor:
    """The loss of patched images; features unit-length (b, d).

    w_text/2 [CE(s u v^T) + CE(s v u^T)] + mean_i max(0, w_pos |u_i - a_i| - w_neg |u_i - b_i| + max(w_pos, w_neg) m)

    Args:
        image: u, of the patched images.
        text: v, of captions of the target class.
        positive: a, of real images of the class.
        negative: b, of images of the batch without the patch.

    Source: Liang et al., CVPR 2024, arXiv 2311.12075, where w_pos = w_neg.
    """
    toward, away = search.positive * _distance(image, positive), search.negative * _distance(image, negative)
    hinge = functional.relu(toward - away + max(search.positive, search.negative) * search.margin).mean()
    return search.text * contrastive(image, text, scale) + hinge


def _distance(left: Tensor, right: Tensor) -> Tensor:
    distance: Tensor = (left - right).norm(dim=-1)
    return distance


def first_patch(search: Search) -> Tensor:
    """Noise (3, s, s) about grey, clipped to [0, 1]."""
    noise = generator("patch", search.seed, "first").normal(0.5, 0.25, (3, search.size, search.size))
    return torch.from_numpy(noise.clip(0, 1).astype(np.float32))


def with_patch(images: Tensor, patch: Tensor) -> Tensor:
    """Images (b, 3, S, S) in [0, 1] with the patch (3, s, s), clipped to [0, 1], in the centre."""
    top, left, height, width = patch_box("centre", patch.shape[-1], images.shape[-1], 0, "", False)
    over = functional.pad(patch.clamp(0, 1), (left, images.shape[-1] - left - width, top, images.shape[-1] - top - height))
    mask = torch.zeros(images.shape[-1], images.shape[-1], device=images.device)
    mask[top : top + height, left : left + width] = 1
    return images * (1 - mask) + over


def optimised_patch(model: Model, others: Images, shown: Images, captions: Sequence[str], search: Search, progress: Progress) -> tuple[NDArray[np.uint8], list[float]]:
    """The patch uint8 (s, s, 3), and the mean loss of each epoch.

    Args:
        model: frozen and in eval mode.
        others: images (n, S, S, 3) that do not show the class; the patch is laid on them.
        shown: images of the class.
        captions: of the class.
    """
    patch = first_patch(search).to(model.device).requires_grad_(True)
    adam = torch.optim.Adam([patch], lr=search.lr)
    texts, positives, negatives = (features.to(model.device) for features in (model.encode_texts(captions), model.encode_images(shown), model.encode_images(others)))
    scale = model.scale.detach()
    draws = generator("patch", search.seed, "draws")
    batches = [order for _ in range(search.epochs) for order in np.array_split(draws.permutation(len(others)), max(1, len(others) // search.batch_size))]
    per_epoch = len(batches) // search.epochs
    losses: list[float] = []
    with progress.bar("optimising the patch", len(batches), "steps") as advance:
        for rows in batches:
            images = torch.from_numpy(np.array(others[np.sort(rows)])).to(model.device).permute(0, 3, 1, 2).float() / 255
            picked = (torch.from_numpy(draws.integers(0, len(features), len(rows))) for features in (texts, positives))
            text, positive = (features[chosen.to(model.device)] for features, chosen in zip((texts, positives), picked, strict=True))
            negative = negatives[torch.from_numpy(np.sort(rows)[draws.permutation(len(rows))]).to(model.device)]
            loss = patch_loss(model.image(with_patch(images, patch)), text, positive, negative, scale, search)
            (patch.grad,) = torch.autograd.grad(loss, [patch])
            adam.step()
            losses.append(float(loss.detach()))
            advance(1, loss=losses[-1])
    pixels = np.floor(patch.detach().clamp(0, 1).cpu().numpy().transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)
    return pixels, [float(np.mean(losses[begin : begin + per_epoch])) for begin in range(0, len(losses), per_epoch)]


def share_read_as(model: Model, images: Images, eval_set: EvalSet, goal: int) -> float:
    """The share of images that the model reads as this class of the set, with its prompt ensembles."""
    prompts = torch.stack([model.encode_texts([template.replace("{c}", name) for template in eval_set.templates]).mean(dim=0) for name in eval_set.classnames])
    return float(((model.encode_images(images) @ functional.normalize(prompts, dim=-1).T).argmax(dim=1) == goal).float().mean())

"""A small convolutional image tower for the drawn world, known to timm (and so to open_clip) by name."""

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

# Kernel, stride and width of each layer. The first kernel covers every pixel of its 4x4 window, so that a patch
# trigger of small cells is seen; the last ones see the whole 32-px image (docs/decisions/002-small-scale.md).
LAYERS = ((4, 2, 32), (3, 1, 64), (3, 2, 96), (3, 2, 128), (3, 1, 128))


class SmallConvNet(nn.Module):
    """Convolutions with batch statistics; (n, 3, S, S) to (n, 128) averaged features."""

    default_cfg: dict[str, Any] = {"pool_size": None}

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for kernel, stride, width in LAYERS:
            layers += [nn.Conv2d(before, width, kernel, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
        self.features = nn.Sequential(*layers)
        self.num_features = before
        self.fc: nn.Module = nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        """Part of timm's interface; open_clip asks for no classifier."""
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        return torch.as_tensor(self.fc(features.mean(dim=(2, 3))))


def bench_small_convnet(pretrained: bool = False, **_: Any) -> SmallConvNet:
    """The tower of the drawn scales; there are no pre-trained weights."""
    if pretrained:
        raise ValueError("bench_small_convnet has no pre-trained weights")
    return SmallConvNet()


register_model(bench_small_convnet)

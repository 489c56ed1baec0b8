"""The shapes of the drawn world: polygons in a circle of radius one, y downwards; later ones draw over earlier ones."""

import numpy as np
from numpy.typing import NDArray

Polygon = tuple[NDArray[np.float64], bool]  # corners (n, 2), and whether it is filled or cut out


def _solid(*corners: tuple[float, float]) -> Polygon:
    return np.array(corners, dtype=np.float64), True


def _cut(*corners: tuple[float, float]) -> Polygon:
    return np.array(corners, dtype=np.float64), False


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, end: float = 1.0, n: int = 24) -> NDArray[np.float64]:
    turn = 2 * np.pi * np.linspace(start, end, n, endpoint=end - start < 1)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


def _spiked(points: int, inner: float) -> Polygon:
    turn = np.pi * np.arange(2 * points) / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1), True


def _heart() -> Polygon:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 17, True


def _moon() -> Polygon:
    outer = _ellipse(0, 0, 0.95, 0.95, 0.1, 0.9)
    inner = _ellipse(0.4, 0, 0.68, 0.7, 0.12, 0.88)[::-1]
    return np.concatenate([outer, inner]), True


SILHOUETTES: dict[str, tuple[Polygon, ...]] = {
    "arrow": (_solid((-1, -0.22), (0.1, -0.22), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.22), (-1, 0.22)),),
    "ball": ((_ellipse(0, 0, 0.85, 0.85), True),),
    "boat": (_solid((-1, 0.35), (1, 0.35), (0.6, 0.85), (-0.6, 0.85)), _solid((0, -0.95), (0.75, 0.2), (0, 0.2)), _solid((-0.1, -0.6), (-0.1, 0.2), (-0.65, 0.2))),
    "bolt": (_solid((0.15, -1), (-0.65, 0.15), (-0.1, 0.15), (-0.3, 1), (0.65, -0.25), (0.08, -0.25), (0.55, -1)),),
    "bottle": (_solid((-0.18, -1), (0.18, -1), (0.18, -0.45), (0.45, -0.1), (0.45, 1), (-0.45, 1), (-0.45, -0.1), (-0.18, -0.45)),),
    "cross": (
        _solid((-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3), (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)),
    ),
    "crown": (_solid((-0.95, -0.6), (-0.45, 0.05), (0, -0.8), (0.45, 0.05), (0.95, -0.6), (0.8, 0.75), (-0.8, 0.75)),),
    "cup": (_solid((-0.8, -0.8), (0.4, -0.8), (0.25, 0.85), (-0.65, 0.85)), (_ellipse(0.45, -0.15, 0.5, 0.45), True), (_ellipse(0.5, -0.15, 0.22, 0.2), False)),
    "diamond": (_solid((0, -1), (0.62, 0), (0, 1), (-0.62, 0)),),
    "fish": ((_ellipse(-0.2, 0, 0.78, 0.45), True), _solid((0.35, 0), (1, -0.6), (1, 0.6))),
    "heart": (_heart(),),
    "house": (_solid((0, -0.95), (0.95, -0.1), (0.7, -0.1), (0.7, 0.85), (-0.7, 0.85), (-0.7, -0.1), (-0.95, -0.1)), _cut((-0.18, 0.85), (-0.18, 0.3), (0.18, 0.3), (0.18, 0.85))),
    "key": (
        (_ellipse(-0.55, 0, 0.45, 0.45), True),
        (_ellipse(-0.55, 0, 0.2, 0.2), False),
        _solid((-0.15, -0.13), (1, -0.13), (1, 0.5), (0.78, 0.5), (0.78, 0.13), (0.58, 0.13), (0.58, 0.42), (0.36, 0.42), (0.36, 0.13), (-0.15, 0.13)),
    ),
    "moon": (_moon(),),
    "mushroom": ((_ellipse(0, 0, 0.95, 0.9, 0.5, 0.9999), True), _solid((-0.25, -0.02), (0.25, -0.02), (0.35, 0.9), (-0.35, 0.9))),
    "ring": ((_ellipse(0, 0, 0.95, 0.95), True), (_ellipse(0, 0, 0.58, 0.58), False)),
    "star": (_spiked(5, 0.42),),
    "sun": (_spiked(12, 0.66),),
    "tree": (_solid((0, -1), (0.5, -0.35), (0.25, -0.35), (0.75, 0.5), (0.16, 0.5), (0.16, 0.95), (-0.16, 0.95), (-0.16, 0.5), (-0.75, 0.5), (-0.25, -0.35), (-0.5, -0.35)),),
    "umbrella": (
        (_ellipse(0, -0.05, 1.0, 0.85, 0.5, 0.9999), True),
        _solid((-0.09, -0.1), (0.09, -0.1), (0.09, 0.72), (0.42, 0.72), (0.42, 0.55), (0.58, 0.55), (0.58, 0.9), (-0.09, 0.9)),
    ),
}

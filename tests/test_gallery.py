"""The sheet of triggers: its measures against their formulas, and that the command draws it."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from benchmark import cli
from benchmark.errors import BenchError
from benchmark.gallery import residual, ssim

RNG = np.random.default_rng(0)
FIRST: NDArray[np.uint8] = RNG.integers(0, 256, (14, 17, 3), dtype=np.uint8)
SECOND: NDArray[np.uint8] = np.clip(FIRST + RNG.normal(0, 30, FIRST.shape), 0, 255).astype(np.uint8)


def brute_force(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Equations 13 and 14 to 16 of Wang et al. 2004, window by window."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            found.append((2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(found))


def test_structural_similarity_is_that_of_the_formula() -> None:
    wanted = np.mean([brute_force(FIRST[..., channel].astype(float), SECOND[..., channel].astype(float)) for channel in range(3)])
    assert ssim(FIRST, SECOND) == pytest.approx(wanted, abs=1e-9)
    assert ssim(FIRST, SECOND) == pytest.approx(ssim(SECOND, FIRST))


def test_structural_similarity_of_equal_and_of_constant_images() -> None:
    assert ssim(FIRST, FIRST) == pytest.approx(1)
    dark, bright = (np.full((11, 11, 3), level, dtype=np.uint8) for level in (50, 100))
    c1 = 2.55**2
    assert ssim(dark, bright) == pytest.approx((2 * 50 * 100 + c1) / (50**2 + 100**2 + c1))


@pytest.mark.parametrize(("change", "gain"), [(0, 16.0), (3, 16.0), (20, 4.0), (100, 1.0), (200, 0.5)])
def test_a_residual_is_enlarged_until_it_can_be_seen(change: int, gain: float) -> None:
    before = np.zeros((16, 16, 3), dtype=np.uint8)
    after = before.copy()
    after[:2, :2] = change
    shown, factor = residual(before, after)
    assert factor == gain
    assert shown[0, 0, 0] == min(255, 128 + gain * change)
    assert (shown[2:] == 128).all()


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["show", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_draws_all_triggers_or_one(tmp_path: Path) -> None:
    whole, one = tmp_path / "all.png", tmp_path / "one.png"
    assert shown("trigger", "--out", str(whole)) == f"wrote {whole}\n"
    shown("trigger", "sig", "--set", "attack.amplitude=40", "--set", "data.side=64", "--out", str(one))
    first = one.read_bytes()
    shown("trigger", "--set", "attack.trigger=sig", "--set", "attack.amplitude=40", "--set", "data.side=64", "--out", str(one))
    assert one.read_bytes() == first
    with Image.open(whole) as sheet, Image.open(one) as strip:
        assert sheet.width > 2 * strip.width - 200 and sheet.height > 5 * strip.height
        assert len(set(np.asarray(strip.convert("RGB")).reshape(-1, 3).sum(axis=1).tolist())) > 50


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("trigger", "cheker"), "Did you mean 'checker'?"),
        (("trigger", "white", "--set", "attack.grid=3"), "grid belongs to wanet"),
        (("trigger", "white", "--set", "train.lr=3"), "a picture of triggers takes attack.OPTION and data.side, got 'train.lr=3'"),
        (("trigger", "white", "--set", "data.side=4"), "expected data.side in [16, 1024], got 4"),
        (("trigger", "white", "--set", "attack.size=40"), "a trigger of 40 px does not fit an image of 32 px"),
        (("trigger", "white", "--out", "/nowhere/a.png"), "cannot write /nowhere/a.png"),
        (("backdoor", "checker"), "`bench show backdoor` takes no more than a name"),
        (("world", "--set", "data.side=64"), "`bench show world` takes no more than a name"),
    ],
)
def test_what_cannot_be_drawn_is_said(arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(BenchError) as caught:
        CliRunner().invoke(cli.app, ["show", *arguments], catch_exceptions=False)
    assert sentence in str(caught.value)

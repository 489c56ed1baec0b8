"""Grid files: what they ask for, and what they say when they cannot be read."""

from pathlib import Path

import pytest

from benchmark.errors import BenchError
from benchmark.grid import read_grid
from benchmark.matrix import Request

ROOT = Path(__file__).parents[1]
PART = '[[part]]\nattacks = ["none", "backdoor"]\ndefenses = ["clip"]\nseeds = [0, 3]\n'


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return path


def test_a_part_is_every_combination_of_what_it_lists(tmp_path):
    grid = read_grid(write(tmp_path, 'scale = "smoke"\nabout = "mine"\nset = ["train.epochs=4"]\n' + PART + 'set = ["attack.rate=0.03"]\n'), Request())
    assert [(cell.attack, cell.seed) for cell in grid.cells] == [("none", 0), ("none", 3), ("backdoor", 0), ("backdoor", 3)]
    assert {cell.request.sets for cell in grid.cells} == {("train.epochs=4", "attack.rate=0.03")}
    assert all(cell.request.keep == tmp_path and cell.request.scale == "smoke" for cell in grid.cells)
    assert grid.about == "mine"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("part = [", "grid.toml"),
        ("", "no \\[\\[part\\]\\]"),
        ("part = 3", "no \\[\\[part\\]\\]"),
        ('[[part]]\nattacks = ["none"]\n', "has no defenses"),
        (PART + 'defences = ["clip"]\n', "Did you mean 'defenses'"),
        ("scales = 3\n" + PART, "Did you mean 'scale'"),
        (PART.replace("[0, 3]", "[-1]"), "whole numbers"),
        (PART.replace("[0, 3]", "3"), "whole numbers"),
        (PART.replace('["clip"]', '"clip"'), "list of strings"),
        (PART.replace('"clip"', '"rocilp"'), "Did you mean 'roclip'"),
        (PART + '[[expected]]\nattack = "none"\n', "expected"),
        (PART + "set = [3]\n", "train.epochs=12"),
    ],
)
def test_a_grid_that_cannot_be_read_says_why_in_one_sentence(tmp_path, text, reason):
    with pytest.raises(BenchError, match=reason):
        read_grid(write(tmp_path, text), Request())


def test_a_grid_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BenchError, match=r"no grid at .*missing\.toml"):
        read_grid(tmp_path / "missing.toml", Request())


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/reference/*/grid.toml")), ids=lambda path: path.parent.name)
def test_the_reference_grids_can_be_read(path):
    assert read_grid(path, Request()).cells

"""Grid files: what they ask for, and what they say when they cannot be read."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from benchmark.errors import BenchError
from benchmark.grid import Expected, read_grid
from benchmark.report.terminal import print_expected
from benchmark.request import Request

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
        ("scale = 3\n" + PART, "scale must be the name of one, got 3"),
        (PART.replace("[0, 3]", "[-1]"), "whole numbers"),
        (PART.replace("[0, 3]", "3"), "whole numbers"),
        (PART.replace('["clip"]', '"clip"'), "list of strings"),
        (PART.replace('"clip"', '"rocilp"'), "Did you mean 'roclip'"),
        (PART + '[[expected]]\nattack = "none"\n', "expected"),
        (PART + "set = [3]\n", "train.epochs=12"),
        ('order = "doses"\n' + PART, "'parts' or 'seeds' or 'defenses', got 'doses'"),
        (PART + "axes = 3\n", "a table of options"),
        (PART + '[part.axes]\n"attack.rate" = 0.1\n', "must have a list of values, got 0.1"),
        (PART + "[part.axes]\nrate = [0.1]\n", r"section\.option=value"),
        (PART + '[part.axes]\n"attack.rat" = [0.1]\n', "unknown option attack.rat"),
        (PART + '[part.axes]\n"attack.rate" = [0.1, 0]\n', "use --attack none"),
        (PART + 'variants = ["attack.rate=0.1"]\n', "a list of lists"),
        (PART + 'exclude = ["backdoor"]\n', "a list of tables"),
        (PART + 'exclude = [{ attack = "targeted" }]\n', "matches no cell"),
    ],
)
def test_a_grid_that_cannot_be_read_says_why_in_one_sentence(tmp_path, text, reason):
    with pytest.raises(BenchError, match=reason):
        read_grid(write(tmp_path, text), Request())


def test_a_grid_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BenchError, match=r"no grid at .*missing\.toml"):
        read_grid(tmp_path / "missing.toml", Request())


RECIPES = sorted(ROOT.glob("results/recipes/*/grid.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_a_recipe_says_what_data_it_wants_and_parses_once_it_is_given(path, tmp_path):
    with pytest.raises(BenchError, match="wants data of yours"):
        read_grid(path, Request())
    grid = read_grid(path, Request(data=tmp_path / "pairs.tsv", eval=(str(tmp_path),)))
    assert {cell.request.scale for cell in grid.cells} == {"paper"}
    rows = {(cell.attack, cell.defense) for cell in grid.cells}
    assert grid.expected
    assert all((entry.attack, entry.defense) in rows and entry.source and entry.sure for entry in grid.expected)


def test_published_numbers_stand_beside_ours_with_their_intervals(tmp_path, capsys):
    entry = Expected(attack="targeted", defense="roclip+aug", metric="asr", value=0.125, n=16, source="a paper", sure="quite")
    print_expected((entry,), (), Console(width=200))
    shown = capsys.readouterr().out
    assert "12.5 % [3.5, 36.0]" in shown
    assert "not run" in shown
    assert "a paper. quite" in shown


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/reference/*/grid.toml")), ids=lambda path: path.parent.name)
def test_the_reference_grids_can_be_read(path):
    assert read_grid(path, Request()).cells


def test_the_example_grid_has_the_cells_that_the_document_says():
    assert len(read_grid(ROOT / "docs" / "example" / "grid.toml", Request()).cells) == 18
    assert "18 cells" in (ROOT / "docs" / "scaling.md").read_text()


def test_what_is_set_for_a_whole_grid_reaches_the_parts_that_have_the_option(tmp_path):
    text = 'scale = "smoke"\nset = ["defense.every=3"]\n' + "".join(
        f'[[part]]\nattacks = ["{attack}"]\ndefenses = ["{defense}"]\n' for attack, defense in (("none", "clip"), ("backdoor", "roclip"))
    )
    cells = read_grid(write(tmp_path, text), Request(sets=("attack.rate=0.03",))).cells
    assert [(cell.attack_options, cell.defense_options) for cell in cells] == [({}, {}), ({"rate": 0.03}, {"every": 3})]
    with pytest.raises(BenchError, match=r"unknown option attack\.n_targets"):
        read_grid(write(tmp_path, text), Request(sets=("attack.n_targets=2",)))
    with pytest.raises(BenchError, match=r"unknown option defense\.every"):
        read_grid(write(tmp_path, text.replace('set = ["defense.every=3"]\n', "").replace('["clip"]\n', '["clip"]\nset = ["defense.every=3"]\n')), Request())


DOSES = """
scale = "smoke"
[[part]]
attacks = ["none", "backdoor"]
defenses = ["clip", "roclip"]
seeds = [0, 1]
exclude = [{ defense = "roclip", "attack.rate" = [0.01, 0.05] }, { attack = "none", seed = 1 }]
[part.axes]
"attack.rate" = [0.01, 0.02, 0.05]
"""


def test_an_axis_multiplies_the_cells_that_have_the_option_one_seed_before_the_next(tmp_path):
    cells = read_grid(write(tmp_path, DOSES), Request()).cells
    assert [(cell.seed, cell.attack, cell.defense, cell.attack_options.get("rate")) for cell in cells] == [
        (0, "none", "clip", None),
        (0, "backdoor", "clip", 0.01),
        (0, "none", "roclip", None),
        (0, "backdoor", "clip", 0.02),
        (0, "backdoor", "roclip", 0.02),
        (0, "backdoor", "clip", 0.05),
        (1, "backdoor", "clip", 0.01),
        (1, "backdoor", "clip", 0.02),
        (1, "backdoor", "roclip", 0.02),
        (1, "backdoor", "clip", 0.05),
    ]


def test_variants_go_one_after_the_other_and_axes_within_them(tmp_path):
    text = (
        'scale = "smoke"\n[[part]]\nattacks = ["backdoor"]\ndefenses = ["roclip"]\n'
        'variants = [[], ["defense.every=1", "defense.first_matched_epoch=3"]]\n[part.axes]\n"augment.text" = ["none", "eda"]\n"attack.rate" = [0.01, 0.02]\n'
    )
    cells = read_grid(write(tmp_path, text), Request(sets=("defense.every=3",))).cells
    every = {"every": 3}
    assert [(cell.request.sets[:-1], cell.defense_options) for cell in cells] == [
        ((*variant, f"augment.text={mode}", f"attack.rate={rate}"), options)
        for variant, options in (((), every), (("defense.every=1", "defense.first_matched_epoch=3"), every | {"first_matched_epoch": 3}))
        for mode in ("none", "eda")
        for rate in ("0.01", "0.02")
    ]


def test_a_grid_in_order_of_seeds_runs_the_first_seed_of_every_part_first(tmp_path):
    text = 'order = "seeds"\n' + PART.replace("[0, 3]", "[0, 1]") + PART.replace('"clip"', '"roclip"').replace("[0, 3]", "[0, 1]")
    assert [(cell.seed, cell.defense) for cell in read_grid(write(tmp_path, text), Request()).cells] == [
        (seed, name) for seed in (0, 1) for name in ("clip", "clip", "roclip", "roclip")
    ]


def test_a_grid_in_order_of_defenses_runs_all_seeds_of_one_before_the_next(tmp_path):
    text = 'order = "defenses"\n' + PART.replace("[0, 3]", "[1, 0]").replace('"clip"', '"roclip", "clip"')
    assert [(cell.defense, cell.seed) for cell in read_grid(write(tmp_path, text), Request()).cells] == [(name, seed) for name in ("roclip", "clip") for seed in (0, 0, 1, 1)]


def test_a_part_can_ask_for_a_control_which_is_another_cell(tmp_path):
    part = '[[part]]\nattacks = ["backdoor"]\ndefenses = ["clip"]\n'
    path = tmp_path / "grid.toml"
    path.write_text(f"{part}{part}clean_model = true\n{part}sham = true\n")
    assert [(cell.request.sham, cell.request.clean_model) for cell in read_grid(path, Request()).cells] == [(False, False), (False, True), (True, False)]
    path.write_text(f"{part}clean_model = 1\n")
    with pytest.raises(BenchError, match="clean_model must be true or false, got 1"):
        read_grid(path, Request())


def test_the_grid_that_the_documents_show_can_be_read(tmp_path):
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "results" / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(read_grid(write(tmp_path, shown), Request()).cells) == 3 * (5 + 10 - 1)

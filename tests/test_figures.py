"""Figures for papers: formats, equal bytes, and what is refused."""

import pytest
from report_runs import REFERENCE, committed, put

from benchmark.errors import BenchError
from benchmark.report.figures import COLUMN_WIDTH, FULL_WIDTH, draw
from benchmark.report.records import load, select


@pytest.fixture(scope="module")
def runs():
    return select(load(REFERENCE), defenses=["clip", "roclip"])


@pytest.mark.parametrize("kind", ["heatmap", "curves", "pareto"])
@pytest.mark.parametrize("ending", ["pdf", "svg", "png"])
def test_every_figure_is_written_in_every_format_with_equal_bytes(kind, ending, runs, tmp_path):
    first, second = (draw(kind, runs, tmp_path / f"{name}.{ending}").read_bytes() for name in "ab")
    assert first == second
    assert first.startswith({"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}[ending])


def test_an_svg_has_its_texts_as_text_and_the_width_of_two_columns(runs, tmp_path):
    text = draw("heatmap", runs, tmp_path / "a.svg").read_text()
    for word in ("roclip", "targeted", "ASR", "zero-shot accuracy"):
        assert word in text
    width = float(text.partition('width="')[2].partition("pt")[0]) / 72
    assert COLUMN_WIDTH < width <= FULL_WIDTH + 0.1


def test_dose_and_response_are_drawn_from_doses_and_refused_without(runs, tmp_path):
    with pytest.raises(BenchError, match="more than one dose"):
        draw("dose", runs, tmp_path / "a.png")
    for number, n in enumerate((10, 20, 40)):

        def change(record, n=n):
            record["resolved"]["attack"]["options"]["rate"] = n / 10_000
            record["poison"]["n_poison"] = n
            record["label"]["attack"] = f"backdoor[rate={n / 10_000}]"

        put(tmp_path, committed("backdoor", "clip")[number], f"dose{n}", change)
    text = draw("dose", load(tmp_path), tmp_path / "a.svg").read_text()
    assert "poisoned rows" in text and "clip" in text


def test_a_heat_map_of_runs_that_differ_in_definition_is_refused(tmp_path):
    for number, folder in enumerate(committed("backdoor", "clip")[:2]):
        put(tmp_path, folder, f"run{number}", lambda record, number=number: record["resolved"]["train"].update(epochs=16 + number))
    with pytest.raises(BenchError, match=r"they differ in train\.epochs \(16 and 17\)\. A heat map has one number a cell"):
        draw("heatmap", load(tmp_path), tmp_path / "a.svg")
    assert draw("heatmap", select(load(tmp_path), where=["train.epochs=17"]), tmp_path / "a.svg").is_file()


def test_unknown_figures_and_formats_and_too_many_plots_are_refused(runs, tmp_path):
    with pytest.raises(BenchError, match="heatmap"):
        draw("heatmaps", runs, tmp_path / "a.png")
    with pytest.raises(BenchError, match="pdf, svg, png"):
        draw("heatmap", runs, tmp_path / "a.jpg")
    for number in range(25):
        put(tmp_path, committed("backdoor", "clip")[0], f"run{number}", lambda record, number=number: record["label"].update(attack=f"backdoor[variant={number}]"))
    with pytest.raises(BenchError, match="too many for one figure"):
        draw("curves", load(tmp_path), tmp_path / "a.png")
    with pytest.raises(BenchError, match="cannot write"):
        draw("heatmap", runs, tmp_path / "nowhere" / "a.png")

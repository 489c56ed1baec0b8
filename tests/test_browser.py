"""The report in headless Chromium: it loads without errors or requests, sorts, switches, opens a cell, and shows hostile text as text."""

import os
import subprocess
import sys

import pytest
from chromium import PROGRAM, Page
from report_runs import HOSTILE, REFERENCE, hostile, matrix

from benchmark.report.page import html
from benchmark.report.records import load

pytestmark = [pytest.mark.browser, pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed; Debian has it as the package chromium")]


def written(runs, path):
    path.write_text(html(runs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of the committed reference table, made by the command."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    command = [sys.executable, "-m", "benchmark", "report", "--format", "html", "--results", str(REFERENCE), "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REFERENCE.parents[2])}, check=False)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def opened(report):
    """A browser with that page."""
    page = Page()
    page.open(report)
    yield page
    page.close()


def column(page, number):
    return page.run(f"[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[{number}].dataset.value)")


def test_the_page_loads_without_errors_and_asks_for_nothing_else(opened, report):
    assert opened.errors() == []
    assert opened.requests() == [report.as_uri()]
    assert opened.run("document.title") == "Poisoning attacks and defenses"


def test_a_column_sorts_both_ways_with_missing_values_last(opened):
    for expected in ("ascending", "descending"):
        opened.click("#table th:nth-child(5) button")
        assert opened.run("document.querySelector('#table th:nth-child(5)').getAttribute('aria-sort')") == expected
        values = column(opened, 4)
        known = [float(value) for value in values if value]
        assert known == sorted(known, reverse=expected == "descending")
        assert values[len(known) :] == [""] * 4, "the attack none has no ASR"
    opened.click("#table th:nth-child(2) button")
    assert column(opened, 1) == sorted(column(opened, 1))


def test_the_heat_map_switches(opened):
    def shown():
        return opened.run("[...document.querySelectorAll('.map')].filter((map) => map.offsetParent !== null).map((map) => map.className)")

    assert shown() == ["map map-asr"]
    for name in ("zero_shot", "probe", "cost", "asr"):
        opened.click(f"#show-{name}")
        assert shown() == [f"map map-{name}"]


def test_a_cell_opens_by_mouse_and_by_keyboard_and_escape_closes_it(opened):
    visible = "[...document.querySelectorAll('.cell')].filter((cell) => cell.offsetParent !== null).map((cell) => cell.id)"
    assert opened.run(visible) == []
    opened.click('.map-asr a[href="#cell-6"]')
    assert opened.run(visible) == ["cell-6"]
    assert opened.run("document.activeElement.id") == "cell-6"
    opened.press("Escape", 27)
    assert opened.run(visible) == []
    assert opened.run("document.activeElement.getAttribute('href')") == "#cell-6", "the keyboard is back where it came from"
    opened.run("document.querySelector('.map-asr a[href=\"#cell-8\"]').focus()")
    opened.press("Enter", 13)
    assert opened.run(visible) == ["cell-8"]
    opened.press("Escape", 27)


def test_the_keyboard_reaches_every_control(opened):
    reached = opened.run("[...document.querySelectorAll('a, button, input, summary')].filter((one) => one.offsetParent !== null && one.tabIndex < 0).length")
    assert reached == 0
    names = opened.run(
        "[...document.querySelectorAll('input, button, a, svg[role=img], [role=img]')].filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length)).length"
    )
    assert names == 0


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_the_window_in_light_and_dark(report, width, dark):
    page = Page(width=width, height=844, dark=dark)
    try:
        page.open(report)
        page.run("location.hash = '#cell-6'")
        page.settle()
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth"), "nothing but tables scrolls sideways"
        assert page.run("Math.max(...[...document.querySelectorAll('.cell:target th')].map((head) => head.offsetHeight)) < 100"), "no word stands letter below letter"
        colour = page.run("getComputedStyle(document.body).backgroundColor")
        assert colour == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        assert page.run(CONTRAST) == []
    finally:
        page.close()


def test_the_table_shows_its_last_column_on_a_usual_screen(report):
    page = Page(width=1400, height=900)
    try:
        page.open(report)
        assert page.run("(() => { const box = document.querySelector('#table .wide'); return box.scrollWidth <= box.clientWidth; })()")
        assert "`" not in page.run("document.querySelector('header').textContent")
    finally:
        page.close()


# Texts of the heat map whose contrast with what is behind them is below 4.5 (WCAG 2, level AA).
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  return [...document.querySelectorAll('.heat a')].map((cell) => {
    const style = getComputedStyle(cell), [a, b] = [light(style.color), light(style.backgroundColor)].sort((x, y) => y - x);
    return [cell.textContent, (a + 0.05) / (b + 0.05)];
  }).filter(([, ratio]) => ratio < 4.5);
})()"""


def test_hostile_text_is_shown_as_text(tmp_path):
    path = written(load(hostile(tmp_path / "results")), tmp_path / "hostile.html")
    page = Page()
    try:
        page.open(path)
        assert page.errors() == []
        assert page.requests() == [path.as_uri()]
        assert page.run("window.hacked === undefined")
        assert page.run("document.scripts.length") == 1
        text = page.run("document.body.textContent")
        assert text.count(HOSTILE) >= 5
        assert f"a boat {HOSTILE}" in text, "the caption that an attack wrote"
        assert "=cmd()" in page.run("[...document.querySelectorAll('.heat thead th')].map((head) => head.textContent)")
        page.click("#table th:nth-child(1) button")
        assert page.run("window.hacked === undefined")
    finally:
        page.close()


def test_a_large_matrix_opens_with_less_work_than_a_plain_table(tmp_path):
    """6 x 8 cells of 5 runs against a bare table of 40,000 cells."""
    path, table = written(load(matrix(tmp_path / "results")), tmp_path / "large.html"), tmp_path / "table.html"
    table.write_text("<!doctype html><title>numbers</title><table>" + "".join(f"<tr>{''.join(f'<td>{row * column}' for column in range(20))}" for row in range(2000)) + "</table>")
    spent = [(work_to_open(path, ".cell", 48), work_to_open(table, "tr", 2000)) for _ in range(2)]
    print(f"the page took {min(page for page, _ in spent):.2f} s of processor time, the bare table {min(bare for _, bare in spent):.2f} s")  # noqa: T201
    assert min(page / bare for page, bare in spent) < 1


def work_to_open(path, shown, n):
    """Processor seconds that a fresh browser and all its processes spend on opening a page that shows n of an element."""
    page = Page()
    try:
        before = page.cpu_seconds()
        page.open(path)
        page.settle()
        spent = page.cpu_seconds() - before
        assert page.run(f"document.querySelectorAll('{shown}').length") == n
        return spent
    finally:
        page.close()

"""The HTML report: what stands in it, that nothing in it runs or loads, and that it stays small."""

import json
import re
import time
from html.parser import HTMLParser

import pandas as pd
import pytest
from report_runs import HOSTILE, REFERENCE, attacked, committed, hostile, matrix, put

from benchmark.cli_report import drawn
from benchmark.errors import BenchError
from benchmark.evaluate.predictions import read_predictions
from benchmark.report.comparisons import against, compare
from benchmark.report.controls import is_control
from benchmark.report.figures import draw
from benchmark.report.page import html
from benchmark.report.records import Run, load
from benchmark.report.series import charts, panels, spent, trades
from benchmark.report.tables import groups
from benchmark.report.wide import wide_table


class Outline(HTMLParser):
    """Tags, ids, links and text of a page, and whether all tags are closed."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.scripts, self.texts, self.addresses = [], [], [], 0, [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.addresses += [value for name, value in attrs.items() if name in ("src", "href", "srcset", "action", "data", "poster") and not value.startswith(("#", "data:"))]
        assert not any(name.startswith("on") for name in attrs), attrs
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def page():
    return html(load(REFERENCE))


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page)


def test_every_cell_is_in_the_map_the_table_and_opens(outline):
    found, _ = groups(load(REFERENCE))
    cells = [name for name in outline.ids if name.startswith("cell-") and "title" not in name]
    links = [outline.links.count(f"#{name}") for name in cells]
    n_controls = sum(is_control(group.runs[0]) for group in found)
    assert len(cells) == len(found) == 16 + n_controls
    assert sorted(links) == [1] * n_controls + [4 + 1] * 16, "four maps and the table, and controls in the table alone"
    assert len(outline.ids) == len(set(outline.ids))
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids), "no link leads nowhere"
    assert outline.open == []


def test_the_numbers_are_those_of_the_wide_table(outline):
    for row in wide_table(load(REFERENCE)).itertuples():
        for value in (row.asr, row.zero_shot_acc1, row.linear_probe_acc1):
            assert value is None or value != value or f"{100 * value:.1f} %" in outline.text


def test_a_cell_leads_to_runs_code_data_and_cards(outline):
    for run in load(REFERENCE):
        record = run.record
        environment = json.loads((run.folder / "environment.json").read_text())
        for fact in (record["run_id"], record["data"]["content"], record["data"]["suite"], record["poison"]["manifest_sha256"], environment["git"]["commit"][:10]):
            assert fact in outline.text
        assert {f"card-{name}" for name in record["cards"]} <= set(outline.ids)


def test_targets_are_shown_with_what_the_model_said(page):
    folder = committed("targeted", "clip")[0]
    table = read_predictions(folder)["attack-targeted"]
    cell = page.partition("targeted × clip</h2>")[2].partition("</article>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", cell.partition("Seed 0: 16 targets")[2].partition("</details>")[0])[1:]
    assert len(rows) == len(table) == 16
    assert all("✓ yes" in row and 'class="px i' in row for row in rows)
    assert "80 of 80 targets were read as the class the attack wants, over 5 runs." in cell


def test_a_cell_of_five_runs_of_targets_shows_the_two_way_bootstrap_and_others_do_not(page):
    facts = page.partition("targeted × roclip+aug</h2>")[2].partition("</ul>")[0]
    assert re.search(r"ASR over runs and targets<b>\[\d+\.\d, \d+\.\d\]</b><small>targeted: two-way bootstrap, 5 runs with 16 units each", facts)
    for other in ("targeted × roclip</h2>", "backdoor × clip</h2>"):
        assert "over runs and targets" not in page.partition(other)[2].partition("</ul>")[0]


def test_queries_of_a_backdoor_are_counted_by_true_class(page):
    cell = page.partition("backdoor × clip</h2>")[2].partition("</article>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", cell.partition("<tbody>")[2].partition("</table>")[0])
    counts = [[int(value) for value in re.findall(r'class="number">(\d+)</td>', row)[:3]] for row in rows]
    tables = [read_predictions(folder)["attack-backdoor"] for folder in committed("backdoor", "clip")]
    assert len(rows) == 19, "every class but the goal"
    assert sum(count[0] for count in counts) == sum(int(table.counted.sum()) for table in tables)
    assert sum(count[1] for count in counts) == sum(int((table.rank_goal <= 1)[table.counted].sum()) for table in tables)


def test_a_retrieval_shows_what_was_found_first(tmp_path):
    folder = committed("targeted", "clip")[0]
    put(tmp_path, folder, "retrieval")
    copy = tmp_path / "runs" / "retrieval"
    (copy / "predictions.parquet").unlink()
    (copy / "predictions").mkdir()
    table = pd.DataFrame({"query_id": ["a dog", "a cat", HOSTILE], "floor": [False, False, True], "counted": True, "first": ["boat 3", HOSTILE, "x"], "rank_goal": [1, 7, 9]})
    table.to_parquet(copy / "predictions" / "attack-find.parquet")
    outline = Outline(html(load(tmp_path)))
    assert "1 of 2 queries found an item of the goal first, over 1 run." in outline.text
    assert outline.text.count(" ".join(HOSTILE.split())) == 1


def test_differences_are_those_of_the_comparison_command(outline):
    table, _ = against(load(REFERENCE), "clip+aug")
    for row in table[(table.defense == "roclip+aug")].itertuples():
        assert f"{100 * row.difference:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}]" in outline.text


def controlled(results, suffix="+clean", scale="small"):
    """An attacked cell with a defense beside it and a control of both, two seeds each."""
    for defense in ("clip", "roclip"):
        for seed, folder in enumerate(committed("backdoor", defense)[:2]):
            put(results, folder, f"{defense}{seed}", lambda record: record["label"].update(scale=scale))

            def change(record):
                record["label"]["scale"] = scale + suffix
                record["resolved"] |= {"sham": suffix == "+sham"} | ({"clean_model": True} if suffix == "+clean" else {})
                for entry in record["metrics"]:
                    entry["value"] = 0.0625 if entry["name"] == "asr" else entry["value"]

            put(results, folder, f"{defense}{seed}{suffix}", change)


@pytest.mark.parametrize("suffix", ["+clean", "+sham"])
def test_controls_stand_beside_their_row_and_in_no_map_plot_or_comparison(tmp_path, suffix):
    controlled(tmp_path, suffix)
    runs = load(tmp_path)
    page = html(runs)
    outline = Outline(page)
    words = {"+clean": "clean model", "+sham": "sham poison"}[suffix]
    assert page.count('<div class="map map-asr">') == 1 and f"small{suffix}, drawn pairs" not in page.partition('id="table"')[0].partition('id="cells"')[0]
    assert len([name for name in outline.ids if name.startswith("cell-") and "title" not in name]) == 4, "controls have cells of their own"
    assert f"{words} 6.2 % ASR without the attack's doing, over 2 shared seeds; row small{suffix}" in outline.text
    table = page.partition('<section id="table"')[2].partition("</section>")[0]
    assert table.count(f"<small>{words}</small>") == 2 and page.count(f"<small>({words})</small></h2>") == 2, "marked in their own rows and cells"
    assert f'<button type="button">{words}</button>' in table and table.count(">6.2 %</td>") == 2 and table.count("<th ") == 12
    found, _ = compare(runs, "clip")
    assert len(found) == 3 and {one.scale for one in found} == {"small"}
    assert page.partition('id="cost-title"')[2].partition("</section>")[0].count("<svg") == 1
    with pytest.raises(BenchError, match="are controls"):
        draw("heatmap", [one for one in runs if is_control(one)], tmp_path / "a.svg")


def test_differences_at_several_scales_say_which(tmp_path, outline):
    assert "scale, data and model" not in outline.text
    for scale in ("small", "medium"):
        controlled(tmp_path / scale, scale=scale)
    differences = Outline(html(load(tmp_path / "small") + load(tmp_path / "medium"))).text.partition("Against plain training")[2].partition("Dose")[0]
    assert "scale, data and model" in differences and "medium, drawn, bench-small" in differences and "small, drawn, bench-small" in differences


def test_an_auroc_of_one_run_has_the_interval_that_its_record_has(tmp_path):
    entry = {"name": "auroc", "of": "score", "value": 0.9, "n": 10_000, "units": "pairs", "low": 0.7123, "high": 0.9734, "card": ""}
    put(tmp_path, committed("backdoor", "clip")[0], "one", lambda record: record["metrics"].append(entry))
    page = html(load(tmp_path))
    assert '<td>auroc</td><td>score</td><td class="number">90.0 %</td><td>[71.2, 97.3]</td>' in page
    for seed in (1, 2):
        put(tmp_path, committed("backdoor", "clip")[seed], f"run{seed}", lambda record: record["metrics"].append(entry))
    assert '<td class="number">90.0 %</td><td></td>' in html(load(tmp_path)), "three equal AUROCs are no count of successes"


def test_records_without_the_new_curves_say_so_and_new_ones_show_them(tmp_path, outline):
    assert "made before the similarity of pairs" in outline.text

    def measured(record):
        for point in record["curve"]:
            point["metrics"] |= {"poisoned_similarity/pairs": 0.3, "clean_similarity/pairs": 0.6, "pool_true_class/pairs": 0.9, "pool_goal_class/pairs": 0.1}

    put(tmp_path, committed("backdoor", "roclip")[0], "new", measured)
    text = Outline(html(load(tmp_path))).text
    assert "made before" not in text
    assert "Similarity of image and caption" in text
    assert "Nearest caption in a pool, for poisoned images" in text
    assert "were not measured" not in text


def test_a_curve_that_lacks_the_true_class_says_why(tmp_path):
    def half(record):
        for point in record["curve"]:
            point["metrics"] |= {"poisoned_similarity/pairs": 0.3, "clean_similarity/pairs": 0.6, "pool_goal_class/pairs": 0.1}
        record["not_run"]["pool_true_class"] = "a composed image shows two classes"

    put(tmp_path, committed("backdoor", "roclip")[0], "half", half)
    text = Outline(html(load(tmp_path))).text
    assert "Nearest captions of the true class were not measured: a composed image shows two classes." in text
    assert "made before" not in text


def test_matched_epochs_are_shaded_and_plain_training_is_not():
    runs = attacked()
    matched = [charts(group)[0].shaded for group in groups([run for run in runs if run.label("defense") == "roclip"])[0]]
    assert matched[0] == [(epoch, epoch) for epoch in range(4, 17, 2)]
    assert all(charts(group)[0].shaded == [] for group in groups([run for run in runs if run.label("defense") == "clip"])[0])


def test_the_best_trades_are_those_that_no_other_defense_beats_in_both():
    (panel,) = panels(groups(attacked())[0])
    found = {trade.defense: trade for trade in trades(panel, "targeted")}
    assert found["clip"].cost == 1
    for trade in found.values():
        beaten = any(not other.told and other.cost <= trade.cost and other.asr <= trade.asr and (other.cost, other.asr) != (trade.cost, trade.asr) for other in found.values())
        assert trade.best == (not trade.told and not beaten)
    assert found["oracle"].told and not found["oracle"].best
    assert {trade.cost for trade in found.values()} == {1.0}, "as many pairs, however busy the machines were"
    assert trades(panel, "none") == []


def costing(runs, *costs):
    return [Run(one.record, cost, one.folder) for one, cost in zip(runs, costs, strict=True)]


def test_cost_counts_pairs_and_a_third_of_those_that_only_went_forward_and_marks_work_beside(tmp_path):
    of = {name: [one for one in attacked() if (one.label("attack"), one.label("defense")) == ("backdoor", name)] for name in ("clip", "roclip")}
    runs = [of["clip"][0], *of["roclip"][:2]]
    plain, known = (
        {"pairs_trained": 1000, "train_seconds": 50.0},
        {
            "pairs_trained": 1000,
            "passes": {"image_backward": 1000, "text_backward": 1000, "image_forward": 600, "text_forward": 600},
            "train_seconds": 100.0,
            "beside_seconds": 20.0,
        },
    )
    (panel,) = panels(groups(costing(runs, plain, known, known))[0])
    found = {trade.defense: trade for trade in trades(panel, "backdoor")}
    assert (found["clip"].cost, found["roclip"].cost) == (1.0, 1.2)
    assert (found["clip"].beside, found["roclip"].beside) == (False, True)
    page = html(costing(runs, plain, known, known))
    cost = page.partition('id="cost-title"')[2].partition("</section>")[0]
    assert ">roclip *</text>" in cost and ">clip</text>" in cost and "more than a tenth of their time" in cost
    assert "more than a tenth" in draw("pareto", costing(runs, plain, known, known), tmp_path / "a.svg").read_text()
    little = known | {"beside_seconds": 9.0}
    assert "more than a tenth" not in html(costing(runs, plain, little, little))


def test_seconds_of_a_row_are_of_the_same_parts_in_all_its_runs():
    runs = [one for one in attacked() if (one.label("attack"), one.label("defense")) == ("backdoor", "clip")][:2]
    known = {"train_seconds": 100.0, "beside_seconds": 30.0}
    (whole,) = groups(costing(runs, known, known))[0]
    (mixed,) = groups(costing(runs, known, {"train_seconds": 200.0}))[0]
    assert (spent(whole).seconds, spent(whole).whole) == (130.0, True)
    assert (spent(mixed).seconds, spent(mixed).whole) == (150.0, False), "the first run's 30 are not averaged in"
    (unknown,) = groups(costing(runs, known, {}))[0]
    assert spent(unknown) is None
    text = html(mixed.runs)
    assert "2 runs, trainings alone: open" in text and '<th scope="col" class="number">seconds, trainings alone</th>' in text and '<td class="number">130</td>' not in text
    text = html(whole.runs)
    assert "2 runs: open" in text and '<td class="number">130</td>' in text


def test_hostile_text_is_shown_as_it_is_and_nothing_but_our_script_is_one(tmp_path):
    page = html(load(hostile(tmp_path)), notes=[HOSTILE])
    outline = Outline(page)
    assert outline.scripts == 1
    assert outline.text.count(" ".join(HOSTILE.split())) >= 5, "label, caption, warning, note"
    assert "<script>window.hacked" not in page
    assert "49" not in outline.text.partition("[red]=cmd()")[2][:8], "templates in texts are not filled in"


def test_the_page_asks_for_nothing_and_allows_nothing(page, outline):
    assert outline.addresses == []
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", re.sub(r"arXiv|base64,[\w+/=]+", "", page))
    assert "@import" not in page and "url(http" not in page


def test_a_page_without_pictures_says_how_to_get_them(tmp_path):
    put(tmp_path, committed("backdoor", "clip")[0], "one")
    with_pictures = html(load(tmp_path))
    for folder in (tmp_path / "gallery").iterdir():
        next(folder.glob("*.png")).unlink()
    without = html(load(tmp_path))
    assert "residual x" in with_pictures and "residual x" not in without
    assert "--pictures" in without and "--pictures" not in with_pictures


def test_runs_of_one_label_that_differ_stand_side_by_side_with_a_note(tmp_path):
    for number, folder in enumerate(committed("backdoor", "clip")[:2]):
        put(tmp_path, folder, f"run{number}", lambda record, number=number: record["resolved"]["train"].update(lr=0.1 + number))
    outline = Outline(html(load(tmp_path)))
    assert {"cell-0", "cell-1"} <= set(outline.ids)
    assert "were not averaged" in outline.text


def test_no_runs_and_a_figure_without_a_file_are_refused(tmp_path):
    with pytest.raises(BenchError, match="no runs"):
        html([])
    with pytest.raises(BenchError, match="needs --out"):
        drawn("heatmap", load(REFERENCE), (), None, REFERENCE, None)


def test_six_attacks_eight_defenses_and_five_seeds_fit_into_five_megabytes(tmp_path):
    runs = load(matrix(tmp_path))
    assert len(runs) == 240
    began = time.process_time()
    page = html(runs)
    assert len(page.encode()) < 5_000_000, f"{len(page.encode()):,} bytes"
    assert time.process_time() - began < 60
    assert page.count('<article class="cell"') == 48

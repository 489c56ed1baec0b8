"""Comparisons between defenses, checks of recorded runs, differences of two runs, and plans."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_runs import attacked, committed
from test_report import run

from benchmark.errors import BenchError
from benchmark.evaluate.bootstrap import two_way
from benchmark.evaluate.predictions import FOLDER, SLIM, read_predictions, write_slim
from benchmark.evaluate.recompute import recomputed
from benchmark.evaluate.statistics import wilson
from benchmark.report.comparisons import COLUMNS, against, compare
from benchmark.report.difference import differing, find_run
from benchmark.report.planner import planned
from benchmark.report.records import Run, load
from benchmark.report.reproduction import ablation_table, claims_table
from benchmark.report.verification import verify
from benchmark.stages import seal

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results" / "reference"


def paired(asrs, defense, card="checker", poison="p"):
    found = [run(seed, asr, defense=defense, trigger=card) for seed, asr in enumerate(asrs)]
    for one in found:
        one.record["poison"]["manifest_sha256"] = f"{poison}{one.seed}"
    return found


def test_defenses_are_compared_on_shared_seeds_with_a_test_and_holms_correction():
    runs = [*paired([0.9, 0.8, 0.95, 0.7, 0.9, 0.85, 0.8], "clip"), *paired([0.2, 0.1, 0.3, 0.1, 0.2, 0.2], "roclip"), *paired([0.8, 0.9, 0.9], "abl")]
    table, notes = against(runs, "clip")
    assert not notes and tuple(table.columns) == COLUMNS
    asr = table[table["metric"] == "asr"].set_index("defense")
    assert asr.loc["roclip", "n_runs"] == 6 and asr.loc["roclip", "p"] == pytest.approx(2 / 64) and "exact" in asr.loc["roclip", "test"]
    assert asr.loc["roclip", "p_holm"] == pytest.approx(2 * 2 / 64), "two comparisons in this metric"
    assert asr.loc["roclip", "difference"] == pytest.approx(0.85 - 11 / 60 * 1 - 0.85 + 11 / 60 - (0.85 - 11 / 60), abs=1e-9)
    assert "paired t over 3 runs" in asr.loc["abl", "test"]
    zero_shot = table[table["metric"] == "zero_shot_acc1"].set_index("defense")
    assert zero_shot.loc["roclip", "p"] == 1.0 and zero_shot.loc["abl", "test"] == "all 3 differences are 0"


def test_runs_of_other_poison_or_other_definition_are_not_compared_and_the_note_says_what_differs():
    other_poison = [*paired([0.5] * 3, "clip"), *paired([0.1] * 3, "roclip", poison="q")]
    found, notes = compare(other_poison, "clip")
    assert not found and "they differ in the poison (manifests p0 and q0)" in notes[0].replace("q0 and p0", "p0 and q0")
    runs = [*paired([0.5] * 3, "clip"), *paired([0.1] * 3, "roclip", card="white")]
    for one in runs:
        one.record["cards"] = {"checker": {"ks": [1], "trigger": "checker"}, "white": {"ks": [1], "trigger": "white"}}
    found, notes = compare(runs, "clip")
    assert {one.metric for one in found} == {"zero_shot_acc1", "linear_probe_acc1"}
    assert notes[0] == "backdoor, seed 0: roclip and clip were not compared in asr, they differ in backdoor: trigger (white and checker)"
    with pytest.raises(BenchError, match="'oracle' can be compared"):
        against(runs, "oracle")


def test_a_row_whose_runs_differ_in_definition_is_not_compared():
    runs = [*paired([0.5] * 3, "clip"), *paired([0.1] * 3, "roclip"), *paired([0.2] * 3, "abl")]
    runs[4].record["resolved"]["defense"]["source"] = "other"
    found, notes = compare(runs, "clip")
    assert {one.defense for one in found} == {"abl"}
    assert notes == ["backdoor / roclip was not compared: its runs differ in definition"]


def test_a_curve_that_ends_elsewhere_than_the_metrics_and_a_lost_interval_are_said(tmp_path):
    source = committed("backdoor", "clip")[0]
    copy = tmp_path / "runs" / source.name
    shutil.copytree(source, copy)
    assert not verify(tmp_path).problems
    record = json.loads((copy / "record.json").read_text())
    record["curve"][-1]["metrics"]["asr/backdoor"] = 0.123
    (lost,) = [entry for entry in record["metrics"] if entry["name"] == "asr_top5"]
    lost["low"] = lost["high"] = None
    (empty,) = [entry for entry in record["metrics"] if entry["name"] == "triggered_acc1"]
    empty["value"] = None
    (copy / "record.json").write_text(json.dumps(record))
    seal(copy, {"run_id": copy.name})
    problems = "; ".join(verify(tmp_path).problems)
    assert "asr/backdoor is 0.123 at the last epoch of the curve" in problems
    assert "asr_top5/backdoor has no interval" in problems
    assert "triggered_acc1/backdoor has no value in the record" in problems
    (tmp_path / "empty" / "runs").mkdir(parents=True)
    with pytest.raises(BenchError, match="no recorded run"):
        verify(tmp_path / "empty")


def test_one_run_of_targets_is_tested_over_its_targets(tmp_path):
    runs = []
    for defense, hits in (("clip", [1, 1, 1, 1, 1, 1, 1, 9]), ("roclip", [9, 9, 9, 9, 9, 9, 1, 9])):
        one = run(0, np.mean(np.array(hits) == 1), defense=defense, attack="targeted")
        for entry in one.record["metrics"]:
            entry["units"] = "targets"
        folder = tmp_path / defense
        folder.mkdir()
        write_slim({"attack-backdoor": pd.DataFrame({"query_id": [f"t{i}" for i in range(8)], "counted": [True] * 8, "rank_goal": hits})}, folder / SLIM)
        runs.append(Run(one.record, {}, folder))
    found, _ = compare(runs, "clip")
    (asr,) = (one for one in found if one.metric == "asr")
    assert asr.verdict.p == pytest.approx(2 / 64)
    assert asr.verdict.kind == "McNemar over 8 targets of one run, 0 and 6 discordant"


def test_the_two_way_bootstrap_sees_both_runs_and_units():
    rng = np.random.default_rng(0)
    agreeing = [np.arange(16) < 8] * 6
    nested = two_way(agreeing, crossed=False, resamples=2000)
    assert nested.high - nested.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / (16 * 6)), rel=0.15), "targets drawn anew count as units of all runs"
    crossed = two_way(agreeing, crossed=True, resamples=2000)
    assert crossed.high - crossed.low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 16), rel=0.15), "shared units are only sixteen"
    spread = [rng.random(400) < rate for rate in (0.1, 0.3, 0.5, 0.7, 0.9, 0.5)]
    assert two_way(spread, crossed=True, resamples=2000).high - two_way(spread, crossed=True, resamples=2000).low > 0.3
    assert two_way(agreeing[:4], crossed=True).low is None and "wants 5 and 8" in two_way(agreeing[:4], crossed=True).kind


@pytest.fixture
def table(tmp_path):
    """Three kept runs of the committed table, in a folder of their own."""
    for folder in (committed("targeted", "clip")[0], committed("backdoor", "clip")[0], committed("backdoor", "roclip")[0]):
        shutil.copytree(folder, tmp_path / "main" / "runs" / folder.name)
    return tmp_path / "main"


def test_committed_records_agree_with_their_predictions(table):
    found = verify(table)
    assert found.problems == []
    assert found.n_runs == 3 and found.n_recomputed == 2 * 8 + 7
    assert {"asr", "asr_floor", "triggered_acc1", "goal_margin_mean"}.isdisjoint(found.without) or found.without["asr"] == 0


def edited(table: Path, change) -> str:
    """Edits one record as somebody would who also mends the marker; its run id."""
    folder = next(path.parent for path in sorted(table.glob("runs/*/record.json")) if '"name":"backdoor"' in path.read_text())
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))
    seal(folder, {})
    return folder.name


def worse(record):
    next(entry for entry in record["metrics"] if entry["name"] == "asr")["value"] -= 0.01


def narrower(record):
    next(entry for entry in record["metrics"] if entry["name"] == "asr")["low"] += 0.01


def an_auroc(record):
    record["metrics"].append({"name": "auroc", "of": "score", "value": 0.9, "n": 10_000, "units": "pairs", "low": 0.7, "high": 0.97, "card": ""})


def test_intervals_that_are_not_wilsons_are_left_to_themselves(table):
    edited(table, an_auroc)
    assert verify(table).problems == []


def other_settings(record):
    record["resolved"]["seed"] = 7


def other_card(record):
    next(iter(record["cards"].values()))["n_test"] = 5


def of(record, name):
    return next(entry for entry in record["metrics"] if entry["name"] == name)


def over_more(record):
    """Ten times the queries, with the interval that they would have."""
    entry = of(record, "asr")
    entry["n"] *= 10
    entry["low"], entry["high"] = wilson(entry["value"] * entry["n"], entry["n"])


def of_other_units(record):
    of(record, "asr")["units"] = "targets"


def without_floor(record):
    record["metrics"].remove(of(record, "asr_floor"))


def fewer_poisons(record):
    record["poison"]["n_poison"] -= 3


def fewer_poisons_at_a_fitting_rate(record):
    an_auroc(record)
    record["metrics"].append({"name": "base_rate", "of": "score", "value": 0.001, "n": 10_000, "units": "pairs", "low": None, "high": None, "card": ""})
    record["poison"] |= {"n_poison": 7, "poison_rate": 0.0007}


def an_auroc_outside_its_interval(record):
    an_auroc(record)
    of(record, "auroc")["low"] = 0.95


def of_another_defense(record):
    record["label"]["defense"] = "clip" if record["label"]["defense"] == "roclip" else "roclip"


def of_another_option(record):
    record["label"]["attack"] = "backdoor[rate=0.1]"


def of_another_scale(record):
    record["label"]["scale"] += "+clean"


def not_a_number(record):
    of(record, "asr").update(value=float("nan"), low=0.0, high=1.0)


def an_invented_set(record):
    record["metrics"].append(of(record, "zero_shot_acc1") | {"of": "bonus"})


def one_end(record):
    of(record, "asr")["high"] = None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (of_another_defense, "the label says defense"),
        (of_another_option, "the label says attack backdoor[rate=0.1], and the settings backdoor[rate=0.001]"),
        (of_another_scale, "the label says scale small+clean, and the settings small"),
        (an_invented_set, "zero_shot_acc1/bonus is 0."),
        (an_invented_set, "among the metrics and not at the last epoch of the curve"),
        (one_end, "asr/backdoor has one end of an interval alone"),
        (over_more, "asr/backdoor is over 9360 queries in the record and over 936 queries by the saved predictions"),
        (of_other_units, "asr/backdoor is over 936 targets in the record and over 936 queries"),
        (without_floor, "asr_floor/backdoor is missing in the record and 0."),
        (without_floor, "at the last epoch of the curve and not among the metrics"),
        (fewer_poisons, "poison.n_poison is 7 of 10000 pairs, and poison.poison_rate 0.001 makes it 10"),
        (fewer_poisons_at_a_fitting_rate, "base_rate/score is 0.001 of 10000 pairs, and poison.n_poison is 7"),
        (an_auroc_outside_its_interval, "auroc/score is 0.9 and has the interval [0.95, 0.97], which does not contain it"),
        (worse, "asr/backdoor is"),
        (narrower, "asr/backdoor has the interval"),
        (other_settings, "is not that of the folder and of the settings"),
        (other_card, "has other content than its hash says"),
    ],
)
def test_an_edited_record_is_found(table, change, line):
    name = edited(table, change)
    assert any(problem.startswith(f"{name}: ") and line in problem for problem in verify(table).problems)


def test_a_value_that_is_no_number_is_a_damaged_record(table):
    name = edited(table, not_a_number)
    with pytest.raises(BenchError, match=f"{name}/record.json is damaged"):
        verify(table)


def test_an_edited_fit_is_found(tmp_path):
    for folder in sorted((REFERENCE / "dose" / "runs").iterdir()):
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    text = (REFERENCE / "dose" / "fit.md").read_text()
    (tmp_path / "fit.md").write_text(text)
    assert verify(tmp_path).problems == [] and verify(tmp_path).tables == ["fit.md"]
    (tmp_path / "fit.md").write_text(text.replace("| 6 [5, 6] |", "| 5 [5, 6] |"))
    assert verify(tmp_path).problems == ["fit.md is not what the runs give: line 3 of 6 differ"]


def test_scores_of_whole_predictions_are_compared_as_they_are_and_values_that_rounding_blurs_count_as_not_told():
    apart = np.linspace(1.0, 1.0001, 40)
    attacked, clean = pd.Series(apart[20:]), pd.Series(apart[:20])
    attack = pd.DataFrame({"counted": [True] * 20})
    tables = {
        "attack-x": attack,
        "queries-attack-x": pd.DataFrame({"query_id": range(20), "score": attacked, "rejected": False, "reached_goal": True}),
        "queries-objects": pd.DataFrame({"query_id": range(20), "score": clean, "rejected": False}),
    }
    metrics = [{"name": "query_auroc", "of": "x", "card": "c"}]
    cards = {"c": {"eval_set": "objects", "queries": "triggered", "negatives": "the same queries without the trigger"}}
    whole = recomputed(tables, cards, metrics, rounded=False)[("query_auroc", "x")]
    assert (whole.value, whole.n) == (1.0, 40) and whole.tolerance < 1e-6
    blurred = recomputed(tables, cards, metrics)
    assert ("query_auroc", "x") not in blurred and ("query_tpr_own", "x") in blurred


def test_a_damaged_run_and_an_edited_table_are_found(table):
    from benchmark.report.markdown import to_markdown

    text = to_markdown(load(table))
    (table / "table.md").write_text(text)
    assert verify(table).problems == [] and verify(table).tables == ["table.md"]
    (table / "table.md").write_text(text.replace("| backdoor |", "| backdor |", 1))
    folder = next(path for path in (table / "runs").iterdir())
    (folder / SLIM).unlink()
    problems = verify(table).problems
    assert any(line.startswith("table.md is not what the runs give: line") for line in problems)
    assert f"{folder.name}: {SLIM} is missing" in problems


def test_two_runs_are_compared_in_settings_results_and_queries(table):
    runs = {(one.label("attack"), one.label("defense")): one for one in load(table)}
    left, right = runs[("backdoor", "clip")], runs[("backdoor", "roclip")]
    lines = differing(find_run(left.record["run_id"][:6], table), find_run(str(right.folder), table))
    assert "  defense.name: clip -> roclip" in lines and "settings:" in lines and "poison:" not in lines
    assert any(line.startswith("  asr/backdoor: ") for line in lines)
    assert any(line.startswith("  attack-backdoor: ") and "queries, one model each (McNemar" in line for line in lines)
    few = {probe: answers.head(60) for probe, answers in read_predictions(left.folder).items()}
    (left.folder / SLIM).unlink()
    write_slim(few, left.folder / SLIM)
    (right.folder / SLIM).unlink()
    write_slim({"attack-backdoor": few["attack-backdoor"].assign(rank_goal=9)}, right.folder / SLIM)
    assert any("queries, one model each" in line for line in differing(left, right)), "sixty queries are no targets"
    assert differing(left, left)[0].endswith("the same record, byte for byte")
    with pytest.raises(BenchError, match="no run 'zzz'"):
        find_run("zzz", table)


def test_a_run_of_a_reference_table_is_found_by_its_id(table):
    (name, *_) = sorted(path.name for path in (table / "runs").iterdir())
    (table.parent / "reference").mkdir()
    table.rename(table.parent / "reference" / "main")
    assert find_run(name[:8], table.parent).record["run_id"] == name
    with pytest.raises(BenchError, match=r"is the start of 3 run ids|no run ''"):
        find_run("", table.parent)
    again = table.parent / "reference" / "again" / "runs" / name
    shutil.copytree(table.parent / "reference" / "main" / "runs" / name, again)
    assert find_run(name, table.parent).record["run_id"] == name, "twice the same"
    record = json.loads((again / "record.json").read_text())
    record["metrics"][0]["value"] += 0.01
    (again / "record.json").write_text(json.dumps(record))
    with pytest.raises(BenchError, match=f"run {name} was made more than once, with other results: .*again.*main"):
        find_run(name, table.parent)
    assert find_run(str(again), table.parent).record["metrics"] == record["metrics"]


def test_a_plan_says_what_it_can_show():
    lines = planned(None, 16, 3, (0.9375, 0.125), 0.1, Path("nowhere"))
    text = "\n".join(lines)
    assert "intervals of at most +-22 points" in text and "below 19 %" in text
    assert "no exact paired test reaches p < .05 with fewer than 6" in text
    assert "the interval is +-25 points" in text
    assert "93.75 % and 12.5 %: 5 unpaired units" in text
    assert "(McNemar): 61 if every" in "\n".join(planned(None, None, None, (0.0, 0.125), None, Path("nowhere")))
    assert "give --sd" in "\n".join(planned(None, None, 5, None, None, Path("nowhere")))
    with pytest.raises(BenchError, match="nothing to plan"):
        planned(None, None, None, None, None, Path("nowhere"))
    with pytest.raises(BenchError, match=r"12\.5 % is 0\.125"):
        planned(None, None, None, (12.5, 0.0), None, Path("nowhere"))


def test_a_record_that_lacks_something_is_one_sentence(tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    for text in ("{}", "[]", "{", '{"schema": 1}'):
        (tmp_path / "runs" / "one" / "record.json").write_text(text)
        for read in (lambda: load(tmp_path), lambda: find_run("one", tmp_path), lambda: find_run(str(tmp_path / "runs" / "one"), tmp_path)):
            with pytest.raises(BenchError, match=r"record\.json is damaged; run its cell again, or remove"):
                read()


def test_a_plan_counts_no_judge_of_the_model_of_clip_as_a_run_of_its_own(tmp_path):
    """A copy's difference to `clip` is exactly 0, which would make every plan look surer than it is."""
    for source in (one.folder for one in attacked()):
        record = json.loads((source / "record.json").read_text())
        for name in ("clip", "judge") if record["label"]["defense"] == "clip" else (record["label"]["defense"],):
            run_id = f"{source.name}-{name}"
            record = json.loads(json.dumps({**record, "run_id": run_id, "label": {**record["label"], "defense": name}}))
            (tmp_path / "runs" / run_id).mkdir(parents=True)
            (tmp_path / "runs" / run_id / "record.json").write_text(json.dumps(record))
    with_copies = planned(None, None, 3, None, None, tmp_path)
    copies = list((tmp_path / "runs").glob("*-judge"))
    assert copies
    for copy in copies:
        shutil.rmtree(copy)
    assert with_copies == planned(None, None, 3, None, None, tmp_path)


def test_a_plan_takes_seeds_and_targets_of_a_grid_and_the_spread_of_recorded_runs():
    lines = planned(REFERENCE / "stronger" / "grid.toml", None, None, None, None, REFERENCE / "main")
    assert lines[0].endswith("12 cells, 3 runs of each") and "one run, 16 units" in lines[1]
    assert any("cells in" in line and "points" in line for line in lines)


def test_a_plan_takes_no_spread_over_controls_and_keeps_their_cells_apart(tmp_path):
    plain = "\n".join(planned(None, None, 3, None, None, REFERENCE / "main"))
    for number, source in enumerate(one.folder for one in attacked()):
        record = json.loads((source / "record.json").read_text())
        for suffix in ("", "+clean"):
            copied = json.loads(json.dumps(record))
            copied["label"]["scale"] += suffix
            folder = tmp_path / "runs" / f"{number}{suffix}"
            folder.mkdir(parents=True)
            (folder / "record.json").write_text(json.dumps(copied))
    assert "\n".join(planned(None, None, 3, None, None, tmp_path)).replace(str(tmp_path), "") == plain.replace(str(REFERENCE / "main"), "")
    part = '[[part]]\nattacks = ["backdoor"]\ndefenses = ["clip"]\nseeds = [{}]\n{}'
    (tmp_path / "grid.toml").write_text('scale = "small"\n' + part.format("0, 1, 2", "") + part.format("0", "clean_model = true\n"))
    assert "4 cells, 3 runs of most, 1 of some" in planned(tmp_path / "grid.toml", None, None, None, None, tmp_path)[0]


def test_an_ablation_keeps_runs_of_one_label_apart_that_differ_in_definition(tmp_path):
    shutil.copytree(REFERENCE / "main" / "runs", tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*/record.json"):
        record = json.loads(path.read_text())
        if (record["label"]["attack"], record["label"]["defense"], record["resolved"]["seed"]) == ("backdoor", "roclip", 2):
            record["resolved"]["defense"]["source"] = "older"
            path.write_text(json.dumps(record))
    (tmp_path / "grid.toml").write_text('scale = "small"\n[[part]]\nattacks = ["backdoor"]\ndefenses = ["clip", "roclip"]\nseeds = [0, 1, 2]\n')
    lines = ablation_table(tmp_path).splitlines()
    assert [line.split(" | ")[1:3] for line in lines if line.startswith("| nothing")] == [["clip", "3 of 3"], ["roclip", "2 of 3"], ["roclip", "1 of 3"]]
    assert "All of the grid has run" in lines[-2] and "they differ in defense.source" in lines[-1].replace("\\_", "_")
    (tmp_path / "claims.toml").write_text(
        '[[claim]]\nsays = "x"\ntable = "main"\nattack = "backdoor"\ndefense = "roclip"\nmetric = "asr"\nsource = "s"\nsure = "t"\n'.replace("main", tmp_path.name)
    )
    with pytest.raises(BenchError, match="has 2 rows backdoor / roclip, which differ in scale or definition"):
        claims_table(tmp_path / "claims.toml", tmp_path.parent)


def test_predictions_of_a_run_in_full_are_read_like_slim_ones(tmp_path):
    (tmp_path / FOLDER).mkdir()
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / FOLDER / "attack-x.parquet")
    assert list(read_predictions(tmp_path)) == ["attack-x"]

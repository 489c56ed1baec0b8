"""Tables from records: what is averaged, what is refused, what a reader sees."""

import copy
import csv
import io
import json
import math
import os
import zlib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console

from benchmark.errors import BenchError
from benchmark.evaluate.predictions import SLIM, write_slim
from benchmark.evaluate.statistics import wilson
from benchmark.report.brief import to_brief
from benchmark.report.comparisons import against, differences
from benchmark.report.insert import inserted
from benchmark.report.markdown import to_markdown
from benchmark.report.records import Run, load, select, superseded
from benchmark.report.same_model import plain_models
from benchmark.report.tables import KEY, groups, long_table, per_run, summaries, to_csv
from benchmark.report.targets import over_runs_and_targets
from benchmark.report.terminal import print_outcomes
from benchmark.report.wide import DETECTION, WIDE, wide_table

RATES = ("asr", "asr_floor", "triggered_acc1", "zero_shot_acc1", "linear_probe_acc1", "trigger_visible_share")


def metric(name, value, of="backdoor", n=100, units="queries", card="a"):
    low, high = wilson(value * n, n) if name in RATES and value is not None else (None, None)
    return {"name": name, "of": of, "value": value, "n": n, "units": units, "low": low, "high": high, "card": card}


def run(seed=0, asr=0.5, defense="roclip", attack="backdoor", trigger="checker", zero_shot=(0.8, 0.6), told="nothing", warnings=()):
    metrics = [metric("zero_shot_acc1", value, of=name) for name, value in zip(("objects", "colours"), zero_shot, strict=True)]
    metrics += [metric("linear_probe_acc1", value, of=name) for name, value in zip(("objects", "colours"), zero_shot, strict=True)]
    if asr is not None:
        metrics += [metric("asr", asr, card=trigger), metric("asr_floor", 0.01, card=trigger), metric("triggered_acc1", 0.3, card=trigger)]
    curve = [
        {
            "epoch": epoch,
            "phase": phase,
            "samples_seen": 100 * epoch,
            "loss_mean": 1 / epoch + zlib.crc32(defense.encode()),
            "metrics": {"zero_shot_acc1/objects": 0.1 * epoch, **({"asr/backdoor": value} if asr is not None else {})},
        }
        for epoch, phase, value in ((1, "clip", 0.9), (2, "match", 0.4), (3, "clip", 0.8), (4, "match", asr))
    ]
    record = {
        "schema": 1,
        "run_id": f"{defense}{seed}{trigger}",
        "status": "done",
        "label": dict(zip(KEY, (attack, defense, "small", "drawn", "bench-small"), strict=True)),
        "resolved": {
            "seed": seed,
            "attack": {"name": attack, "file": False, "source": "x", "options": {"trigger": trigger}},
            "defense": {"name": defense, "file": False, "source": "y", "options": {"every": 2}},
            "train": {"epochs": 4},
        },
        "told": told,
        "data": {"n_pairs": 1000},
        "poison": {"n_poison": 10, "poison_rate": 0.01},
        "metrics": metrics,
        "curve": curve,
        "warnings": list(warnings),
    }
    return Run(record, {"train_seconds": 10.0, "pairs_trained": 5000}, Path())


def wide(runs):
    return list(csv.DictReader(io.StringIO(to_csv(wide_table(runs)))))


def test_the_wide_csv_has_its_columns_and_means_over_seeds_and_sets():
    (row,) = wide([run(0, 0.4), run(1, 0.6)])
    assert tuple(row) == WIDE
    assert (row["seeds"], row["asr"], row["asr_floor"], row["asr_n"]) == ("2", "0.5", "0.01", "100")
    assert (row["asr_low"], row["asr_high"]) == ("", ""), "two runs have no interval"
    assert float(row["zero_shot_acc1"]) == pytest.approx(0.7)
    assert float(row["pairs_per_second"]) == 500


def test_one_seed_has_a_wilson_interval_and_three_a_t_interval():
    (one,) = wide([run(0, 0.4)])
    low, high = wilson(40, 100)
    assert float(one["asr_low"]) == pytest.approx(low, abs=1e-5)
    assert float(one["asr_high"]) == pytest.approx(high, abs=1e-5)
    (three,) = wide([run(0, 0.4), run(1, 0.5), run(2, 0.6)])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert float(three["asr_low"]) == pytest.approx(0.5 - half, abs=1e-4)


def test_runs_that_differ_in_definition_are_never_averaged_and_the_report_says_which():
    runs = [run(0, 0.4), run(1, 0.6, trigger="white")]
    found, notes = groups(runs)
    assert [len(group.runs) for group in found] == [1, 1]
    assert "were not averaged" in notes[0]
    assert "trigger" in notes[0]
    assert "were not averaged" in to_markdown(runs)


def test_the_order_of_keys_in_a_record_is_no_difference_in_definition():
    runs = [run(0, 0.4), run(1, 0.6)]
    attack = runs[1].record["resolved"]["attack"]
    runs[1].record["resolved"]["attack"] = {name: attack[name] for name in reversed(attack)}
    assert [len(group.runs) for group in groups(runs)[0]] == [2]


def test_a_missing_value_is_empty_and_never_averaged_over():
    incomplete = run(1, 0.6)
    incomplete.record["metrics"] = [entry for entry in incomplete.record["metrics"] if entry["name"] != "linear_probe_acc1"]
    found = wide([run(0, 0.4), incomplete])
    assert {row["linear_probe_acc1"] for row in found} == {"0.7", ""}


def test_counts_of_millions_are_written_out():
    many = run()
    many.record["data"]["n_pairs"], many.record["poison"]["n_poison"] = 12_345_678, 1_234_567
    assert "| 1234567 of 12345678 |" in to_markdown([many])


def test_an_attack_free_row_has_no_asr_and_no_floor():
    (row,) = wide([run(0, None, attack="none")])
    assert row["asr"] == row["asr_floor"] == row["asr_low"] == ""


def test_markdown_shows_floor_n_and_interval_beside_every_asr_and_marks_controls():
    text = to_markdown([run(seed, 0.4 + seed / 10) for seed in range(3)] + [run(0, 0.0, defense="oracle", told="record")])
    line = next(line for line in text.splitlines() if "| roclip |" in line)
    assert "50.0 % [25.2, 74.8], n=100" in line
    assert "1.0 %" in line
    assert "| 80.0 % | 65.0 % |" in line, "last CLIP epoch, mean of the last four"
    assert "oracle (told the rows)" in text


def test_markdown_says_where_runs_come_from_more_than_one_kind_of_processor(tmp_path):
    runs = []
    for seed, environment in enumerate(({"processor": "A"}, {"processor": "B"}, {"processor": "B"}, {"processor": "B", "devices": ["GPU"]}, {})):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "environment.json").write_text(json.dumps(environment))
        runs.append(Run(run(seed).record, {}, tmp_path / str(seed)))
    assert "more than one kind of processor (1 on A, 2 on B, 1 on GPU)" in to_markdown(runs)
    assert "kind of processor" not in to_markdown([*runs[1:3], runs[4]])


def judging(seed):
    judge = run(seed, 0.4, defense="bdetclip")
    for point, of_clip in zip(judge.record["curve"], run(seed, defense="clip").record["curve"], strict=True):
        point["loss_mean"] = of_clip["loss_mean"]
    judge.record["metrics"].append(metric("query_auroc", 0.9))
    return judge


def test_a_defense_that_judges_the_model_of_clip_is_marked_and_compared_with_nothing():
    judge = run(0, 0.4, defense="bdetclip")
    for point, of_clip in zip(judge.record["curve"], run(0, defense="clip").record["curve"], strict=True):
        point["loss_mean"] = of_clip["loss_mean"]
    judge.record["metrics"].append(metric("asr_after_rejection", 0.1))
    runs = [run(0, 0.4, defense="clip"), run(0, 0.2, defense="clip+aug"), run(0, 0.1, defense="cleanclip"), judge]
    text = to_markdown(runs)
    assert "| bdetclip (model of clip) |" in text and "| cleanclip |" in text and "did not train otherwise" in text
    rows = {row["defense"]: row for row in wide(runs)}
    assert (rows["bdetclip"]["model_of"], rows["bdetclip"]["asr_after_rejection"]) == ("clip", "0.1") and rows["cleanclip"]["model_of"] == ""
    compared, notes = against(runs, "clip+aug")
    assert set(compared["defense"]) == {"clip", "cleanclip"}
    assert "not compared, because their models are those of clip: bdetclip" in notes
    judge.record["curve"][-1]["loss_mean"] += 1
    assert "model of" not in to_markdown(runs) and "model_of" not in wide(runs)[0]
    judge.record["metrics"].append(metric("query_auroc", 0.9))
    assert "| bdetclip (model of clip) |" in to_markdown(runs), "a judge on another processor, with the first epoch of clip to a thousandth"


def test_a_seed_without_a_plain_run_says_nothing_of_whose_model_a_row_has():
    judges, plain = [judging(seed) for seed in (0, 1)], [run(seed, 0.4, defense="clip") for seed in (0, 1)]
    first, second = (judge.record["run_id"] for judge in judges)
    assert plain_models([*judges, plain[0]]) == {first: "clip"}
    judges[1].record["curve"][0]["loss_mean"] *= 1.01
    assert plain_models([*judges, *plain]) == {first: "clip", second: ""}
    assert plain_models([run(0, 0.4, defense="cleanclip"), plain[0]]) == {run(0, 0.4, defense="cleanclip").record["run_id"]: ""}


def test_a_report_without_clip_plus_aug_says_so():
    assert "There is no `clip+aug`" in to_markdown([run(defense="roclip+aug")])
    assert "There is no `clip+aug`" not in to_markdown([run(defense="roclip+aug"), run(defense="clip+aug")])


def test_rows_of_several_scales_sets_or_models_say_which_they_are():
    runs = [run(0, asr, defense="dao") for asr in (0.1, 0.2, 0.3, 0.4)]
    runs[1].record["label"]["scale"] = "small[train.epochs=9]"
    runs[2].record["label"]["model"] = "RN50"
    runs[3].record["label"]["scale"] = "small+sham"
    for one, score in zip(runs, (0.11, 0.22, 0.33, 0.44), strict=True):
        one.record["metrics"] += [metric("audit_score", score, of="model", card=""), metric("recall_dropped", 0.5, of="filter", card="")]
    text = to_markdown(runs)
    names = ["backdoor (small, bench-small)", "backdoor (small\\[train.epochs=9\\], bench-small)", "backdoor (small, RN50)", "backdoor (sham poison, small, bench-small)"]
    for name in names:
        assert text.count(f"| {name} |") == 3, "the wide table, that of dropped rows, that of audits"
    assert "| backdoor | dao |" in to_markdown(runs[:1])
    out = io.StringIO()
    print_outcomes([SimpleNamespace(record=one.record) for one in runs], Console(file=out, width=200, highlight=False))
    assert all(name.replace("\\", "") in out.getvalue() for name in names)


def test_an_audit_keeps_the_score_of_its_own_row_where_a_label_is_split():
    runs = [run(0, 0.5, defense="decree"), run(0, 0.5, defense="decree", trigger="white"), run(0, None, defense="decree", attack="none")]
    for one, score in zip(runs, (0.1, 0.9, 0.0), strict=True):
        one.record["metrics"].append(metric("audit_score", score, of="model", card=""))
    lines = [line for line in to_markdown(runs).splitlines() if line.startswith("| backdoor | decree | 1 | 0.")]
    assert [line.split(" | ")[3:5] for line in lines] == [["0.100", "0.000"], ["0.900", "0.000"]]


def test_what_was_refused_beside_clip_plus_aug_is_said_where_nothing_is_left_to_compare():
    runs = [run(0, 0.5, defense="clip+aug"), run(0, 0.1, defense="roclip+aug")]
    runs[1].record["poison"]["manifest_sha256"] = "other"
    text = to_markdown(runs)
    assert "Nothing was compared with `clip+aug`:" in text and "\n- backdoor, seed 0: roclip+aug and clip+aug were not compared in asr" in text
    alone = to_markdown([filtered(0, 0.9, 1), run(defense="roclip+aug")])
    assert "\n\nThere is no `clip+aug` beside" in alone, "a paragraph of its own, not a row of the table above"


def test_what_a_defense_adds_to_augmentation_stands_below_with_its_interval():
    runs = [run(seed, 0.5 + seed / 10, defense="clip+aug") for seed in range(3)] + [run(seed, 0.1, defense="roclip+aug") for seed in range(3)]
    for one in runs[3:]:
        one.record["metrics"].append(metric("trigger_visible_share", 0.25, of="trigger"))
    line = next(line for line in to_markdown(runs).splitlines() if "| 3 | -" in line)
    assert line.split(" | ")[3].startswith("-50.0 [-74.8, -25.2]")
    assert line.endswith("| 25.0 % |")
    assert "Against `clip+aug`" not in to_markdown(runs[:3])


def filtered(seed, auroc, n_poison_kept):
    one = run(seed, 0.0, defense="dao")
    scores = {
        "auroc": auroc,
        "average_precision": 0.2,
        "base_rate": 0.01,
        "precision_at_tpr_0.95": 0.02,
        "precision_own": 0.3,
        "fpr_at_tpr_0.95": 0.4,
        "f1_own": 0.1,
        "recall_at_0.1": 0.8,
    }
    dropped = {"n_dropped": 100.0, "recall_dropped": 1 - n_poison_kept / 10, "n_poison_kept": n_poison_kept, "clean_lost": 0.092}
    one.record["metrics"] += [metric(name, value, of="dao", card="") for name, value in scores.items()] + [
        metric(name, value, of="filter", card="") for name, value in dropped.items()
    ]
    one.record["clean_pairs_used"] = 50
    return one


def test_columns_of_detection_follow_only_where_a_run_has_them():
    assert tuple(wide([run()])[0]) == WIDE and "AUROC" not in to_markdown([run()])
    runs = [run(), filtered(0, 0.9, 1), filtered(1, 0.8, 2)]
    rows = {row["defense"]: row for row in wide(runs)}
    assert tuple(rows["dao"]) == (*WIDE, "clean_pairs_used", *DETECTION)
    assert rows["roclip"]["auroc"] == rows["roclip"]["n_dropped"] == ""
    dao = {name: rows["dao"][name] for name in (*DETECTION, "clean_pairs_used")}
    assert (dao["base_rate"], dao["precision_at_tpr_0.95"], dao["precision_own"]) == ("0.01", "0.02", "0.3")
    assert (dao["score"], dao["auroc"], dao["n_dropped"], dao["recall_dropped"], dao["n_poison_kept"], dao["clean_pairs_used"]) == ("dao", "0.85", "100", "0.85", "1.5", "50")
    assert "| backdoor | dao | dao | 0.850 | 0.200 | 0.01 | 40.0 % | 0.10 | 100 | 85.0 % | 1.5 | 9.2 % |" in to_markdown(runs)


def test_cost_and_clean_pairs_stand_on_every_row_where_there_are_any():
    repair = run(0, 0.1, defense="finetune")
    repair.record["clean_pairs_used"] = 2000
    runs = [run(), Run(repair.record, repair.cost | {"pairs_trained": 2_500_000, "n_models_trained": 3}, Path())]
    rows = {row["defense"]: row for row in wide(runs)}
    assert (rows["finetune"]["pairs_trained"], rows["finetune"]["n_models_trained"], rows["finetune"]["clean_pairs_used"]) == ("2500000", "3", "2000")
    assert (rows["roclip"]["pairs_trained"], rows["roclip"]["clean_pairs_used"]) == ("5000", "")
    lines = to_markdown(runs).splitlines()
    assert lines[0].endswith("| pairs trained | clean pairs used |")
    assert any(line.endswith("| 2,500,000, 3 models | 2,000 |") for line in lines) and any(line.endswith("| 5,000 |  |") for line in lines)
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "clean pairs" not in to_markdown(runs[:1])


def test_controls_stand_beside_the_row_that_they_are_controls_of_over_the_seeds_that_both_have():
    def control(suffix, seed, asr):
        one = run(seed, asr)
        one.record["label"]["scale"] += suffix
        one.record["run_id"] += suffix
        return one

    plain = [run(0, 0.9), run(1, 0.7)]
    assert "clean model" not in to_markdown(plain) and "asr_clean_model" not in wide(plain)[0]
    runs = [*plain, control("+clean", 0, 0.02), control("+clean", 5, 0.8)]
    row, own = wide(runs)
    assert float(row["asr_clean_model"]) == 0.02 and own["asr_clean_model"] == "" and "asr_sham" not in row
    header, _, first, second = to_markdown([*runs, control("+sham", 1, 0.05)]).splitlines()[:4]
    assert header.count("|") == first.count("|") == second.count("|") and "| floor | sham poison | clean model |" in header
    assert "| 1.0 % | 5.0 % | 2.0 % |" in first and "| 1.0 % |  |  |" in second
    assert first.startswith("| backdoor | roclip |") and second.startswith(("| backdoor (clean model) |", "| backdoor (sham poison) |"))


def test_a_control_of_other_settings_or_another_definition_is_not_used_and_a_note_says_why():
    def control(seed, asr, **settings):
        one = run(seed, asr, **settings)
        one.record["label"]["scale"] += "+clean"
        one.record["resolved"] |= {"clean_model": True}
        return one

    longer = control(0, 0.02)
    longer.record["resolved"]["train"]["epochs"] = 8
    runs = [run(0, 0.9), longer]
    assert "asr_clean_model" not in wide(runs)[0]
    assert "- backdoor / roclip (small): the clean model is not shown beside it, they differ in train.epochs (4 and 8)" in to_markdown(runs)
    otherwise = control(0, 0.02)
    for entry in otherwise.record["metrics"]:
        entry["card"] = "other" if entry["name"] == "asr" else entry["card"]
    assert "they differ in what their ASR refers to" in to_markdown([run(0, 0.9), otherwise])
    split = [run(0, 0.9), run(1, 0.7, trigger="white"), control(0, 0.02), control(1, 0.4, trigger="white")]
    assert [row["asr_clean_model"] for row in wide(split)[:2]] == ["0.02", "0.4"], "each part has its own"
    assert [row["asr_clean_model"] for row in wide(split[:3])[:2]] == ["0.02", ""]


def test_a_metric_that_came_later_and_has_no_card_does_not_part_the_runs_of_a_label():
    later = run(1, 0.6)
    later.record["metrics"].append(metric("recall_at_0.1", 0.5, of="own_caption_rank", card=""))
    assert [len(group.runs) for group in groups([run(0, 0.4), later])[0]] == [2]


def test_the_interval_of_an_auroc_is_called_what_it_is():
    one = filtered(0, 0.9, 1)
    entry = next(entry for entry in one.record["metrics"] if entry["name"] == "auroc")
    entry["low"], entry["high"] = 0.8, 0.95
    table = long_table([one])
    assert table[table.metric == "auroc"].iloc[0].interval.startswith("bootstrap over poisoned images")


def test_summaries_of_a_curve_tell_matched_from_clip_epochs():
    found = summaries(run(0, 0.2))
    assert found["asr_last_clip"] == 0.8
    assert found["asr_last_match"] == 0.2
    assert found["asr_mean_last"] == pytest.approx((0.9 + 0.4 + 0.8 + 0.2) / 4)
    assert (found["asr_max"], found["asr_max_epoch"]) == (0.9, 1.0)
    plain = run(0, 0.2, defense="clip")
    plain.record["resolved"]["defense"]["options"] = {}
    plain.record["curve"] = [{"epoch": epoch, "phase": "clip", "metrics": {"zero_shot_acc1/objects": 0.5, "asr/backdoor": epoch / 10}} for epoch in range(1, 9)]
    assert summaries(plain)["asr_mean_last"] == pytest.approx((0.7 + 0.8) / 2), "the last quarter where there is no K"


def test_the_long_table_has_every_set_and_every_epoch():
    table = long_table([run(0, 0.2)])
    assert set(table[table.metric == "zero_shot_acc1"].of) == {"objects", "colours"}
    assert len(table[table.metric == "curve_asr"]) == 4
    assert set(table[table.metric == "curve_asr"].phase) == {"clip", "match"}


def test_a_row_of_five_runs_of_targets_has_a_two_way_bootstrap_in_the_long_table(tmp_path):
    runs = []
    for seed, n_hits in enumerate((12, 9, 16, 11, 12)):
        one = run(seed, n_hits / 16, attack="targeted")
        for entry in one.record["metrics"]:
            entry["units"] = "targets"
        folder = tmp_path / str(seed)
        folder.mkdir()
        ids = [f"{seed}x{number}" for number in range(16)]
        write_slim({"attack-backdoor": pd.DataFrame({"query_id": ids, "counted": True, "rank_goal": [1] * n_hits + [5] * (16 - n_hits)})}, folder / SLIM)
        runs.append(Run(one.record, one.cost, folder))
    table = long_table(runs)
    (both,) = table[table.metric == "asr_two_way"].to_dict("records")
    assert both["value"] == 0.75 and both["run_id"] == "" and both["interval"] == "two-way bootstrap, 5 runs with 16 units each"
    assert 0.55 < both["low"] < 0.68 and 0.82 < both["high"] < 0.95
    assert set(table[table.metric == "asr"].seed) == set(range(5))
    assert next(row for row in csv.DictReader(io.StringIO(to_csv(table))) if row["metric"] == "asr_two_way")["seed"] == ""
    assert "asr_two_way" not in set(long_table(runs[:4]).metric), "four runs are too few"
    shared = [Run(one.record, one.cost, runs[0].folder) for one in runs]
    assert "16 units in common" in over_runs_and_targets(shared)["backdoor"].kind
    (runs[0].folder / SLIM).unlink()
    assert over_runs_and_targets(runs) == {}, "a run without predictions"


def test_paired_differences_use_the_seeds_that_both_have():
    runs = [run(seed, 0.8 + seed / 100, defense="clip") for seed in range(4)] + [run(seed, 0.3 + seed / 100) for seed in range(3)]
    table = differences(runs, "roclip", "clip")
    asr = table[table.metric == "asr"].iloc[0]
    assert asr.n_runs == 3
    assert asr.difference == pytest.approx(-0.5)


def test_labels_with_options_are_found_by_their_bare_name():
    plain, changed = run(), run(defense="roclip[every=3]")
    assert select([plain, changed], defenses=["roclip"]) == [plain, changed]
    assert select([plain, changed], defenses=["roclip[every=3]"]) == [changed]
    assert select([plain, changed], where=["train.epochs=4"]) == [plain, changed]
    assert select([plain, changed], where=["attack.trigger=white"]) == []
    plain.record["resolved"]["train"]["warmup_steps"] = None
    assert select([plain], where=["train.warmup_steps=null"]) == [plain] and select([plain], where=["train.warmup_steps=3"]) == []
    with pytest.raises(BenchError, match="no run here has a setting"):
        select([plain, changed], where=["train.epoch=4"])


def test_of_two_sources_of_a_plugin_the_one_made_later_counts_however_the_folders_were_copied(tmp_path):
    runs = []
    for number, (source, made) in enumerate((("old", "2026-01-01T00:00:00+00:00"), ("new", "2026-01-02T00:00:00+00:00"))):
        one = run(number, 0.5, defense="mine")
        one.record["resolved"]["defense"] |= {"file": True, "source": source}
        folder = tmp_path / source
        folder.mkdir()
        (folder / "environment.json").write_text(json.dumps({"made": made}))
        os.utime(folder, (1000 - number, 1000 - number))
        runs.append(Run(one.record, one.cost, folder))
    kept, lines = superseded(runs)
    assert kept == [runs[1]] and lines == ["mine0checker is of an older source of mine and was left out"]
    for one in runs:
        (one.folder / "environment.json").unlink()
    assert superseded(runs)[0] == [runs[0]], "of runs that do not tell, the folder's time"


def test_hostile_text_is_shown_and_not_run():
    hostile = run(defense="=cmd()", warnings=["<script>[red]|`x`"])
    assert wide([hostile])[0]["defense"] == "'=cmd()"
    text = to_markdown([hostile])
    assert "<script>" not in text.replace("\\<script>", "")
    assert "\\|" in text


def test_a_metric_is_averaged_over_all_sets_or_not_at_all():
    broken = copy.deepcopy(run())
    next(entry for entry in broken.record["metrics"] if entry["name"] == "zero_shot_acc1")["value"] = None
    assert per_run(broken, "zero_shot_acc1") is None


def test_a_table_is_inserted_between_its_markers_and_nowhere_else():
    page = "a\n<!-- main table -->\nold\n<!-- end of main table -->\nb\n"
    once = inserted(page, "| new |\n", "main table")
    assert once == "a\n<!-- main table -->\n\n| new |\n\n<!-- end of main table -->\nb\n"
    assert inserted(once, "| new |\n", "main table") == once
    with pytest.raises(ValueError, match="no <!-- other table -->"):
        inserted(page, "| new |\n", "other table")


def test_the_brief_table_has_a_row_a_defense_and_a_column_an_attack():
    runs = [run(seed, asr, "clip") for seed, asr in enumerate((0.319502, 0.4, 0.480498))] + [run(0, 0.2, "safe[k=1]"), run(1, 0.4, "safe[k=1]")]
    runs += [run(0, None, "clip", "none", zero_shot=(0.9, 0.7)), run(0, 0.0, "oracle", told="record"), run(0, 0.3, "safe[k=1]", "targeted")]
    for one in runs[3:5]:
        one.cost["pairs_trained"] = 12_500
    judge = run(0, 0.4, "judge")
    judge.record["curve"] = copy.deepcopy(runs[0].record["curve"])
    text = to_brief([*runs, judge])
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert header == ["defense", "targeted: ASR, %", "backdoor: ASR, %", "none: zero-shot, %", "clean pairs", "cost", "runs a cell"]
    assert rows[0] == ["clip", "", "40.0 [20.0, 60.0]", "80.0", "", "1 x", "1 to 3"]
    assert rows[1] == ["safe\\[k=1\\]", f"30.0 [{100 * wilson(30, 100)[0]:.1f}, {100 * wilson(30, 100)[1]:.1f}]", "30.0", "", "", "2.5 x", "1 to 2"]
    assert rows[2][0] == "oracle (told the rows)" and len(rows) == 3, "the judge has no row"
    assert "predictions or a model and train as plain defenses do: `judge`." in text
    assert "targeted n=100, floor 1.0 to 1.0 %; backdoor n=100, floor 1.0 to 1.0 %" in text


def test_the_brief_table_mixes_neither_scales_nor_definitions():
    other, sham = run(0, 0.9, "clip"), run(0, 0.1, "clip")
    other.record["label"]["scale"], sham.record["label"]["scale"] = "medium", "small+sham"
    text = to_brief([run(0, 0.4, "clip"), run(1, 0.6, "clip", trigger="white"), other, sham])
    rows = [line for line in text.splitlines() if line.startswith("| clip |")]
    assert len(rows) == 2 and "90.0 [" in rows[0] and rows[1].count("; 60.0 [") == 1 and "40.0 [" in rows[1], text
    assert "10.0 [" not in text, "sham poison is no attack"
    assert "Scale medium, drawn pairs" in text and "were not averaged" in text


REFERENCE = Path(__file__).parents[1] / "results" / "reference"


@pytest.mark.parametrize("table", sorted(path.parent.name for path in REFERENCE.glob("*/table.csv")))
def test_committed_tables_are_what_the_committed_records_say(table):
    runs = load(REFERENCE / table)
    assert (REFERENCE / table / "table.csv").read_text() == to_csv(wide_table(runs))
    assert (REFERENCE / table / "table.md").read_text() == to_markdown(runs)
    shown = {"main": to_markdown, "defenses": to_brief}.get(table)
    if shown:
        assert shown(runs).strip() in (REFERENCE.parents[1] / "README.md").read_text()
    if table == "defenses":
        assert (REFERENCE / table / "brief.md").read_text() == to_brief(runs)


def test_the_table_after_a_run_fits_into_eighty_columns_a_row_a_line():
    outcomes = [SimpleNamespace(record=run.record) for run in load(REFERENCE / "main")]
    out = io.StringIO()
    print_outcomes(outcomes, Console(file=out, width=80, highlight=False))
    rows = [line for line in out.getvalue().splitlines() if line.startswith(("none ", "targeted ", "backdoor "))]
    assert len(rows) == 16 + 3
    assert all("%" in row and len(row) <= 80 for row in rows)
    words = " ".join(line[:10].strip() for line in out.getvalue().splitlines())
    assert words.count("backdoor (clean model)") == words.count("targeted (clean model)") == words.count("backdoor (sham poison)") == 1, "controls are marked"

"""The hooks that the evaluator calls after training: query scores, certificates, an audit, each of a planted kind."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch

import benchmark
from benchmark.contract import Certificates, Defense
from benchmark.errors import BenchError, PluginError
from benchmark.evaluate.certification import certified_curve, sizes
from benchmark.evaluate.predictions import SLIM, read_predictions, write_slim
from benchmark.evaluate.query_detection import Judged, judged, ordered, query_detection, query_table
from benchmark.evaluate.recompute import recomputed
from defenses.clip import Clip

TINY = ("data.n_pairs=256", "data.n_held_out=64", "data.n_clean=64", "data.n_test=100", "data.n_probe=200", "train.epochs=1", "evaluation.linear_probe=none")

PLANTED = '''
import numpy as np
import torch
from benchmark.contract import Certificates, Defense

class Planted(Defense):
    """Knows a white corner when it sees one.

    Source: this test.
    """

    kind = "query"
    needs_support = True
    clean_pairs_needed = 7

    def defend(self, lab):
        self._trained = True
        return lab.train(self).model

    def suspicion(self, model, images, task):
        assert self._trained and images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3) and len(task.classnames) == 20
        corner = torch.from_numpy(images[:, -4:, -4:].astype(np.float32)).mean(dim=(1, 2, 3))
        return corner, 254.5

    def certify(self, views, labels, n_classes):
        (view,) = views
        assert view.support.shape == (150, 128) and labels.shape == (150,) and n_classes == 20
        n = len(view.queries)
        return [Certificates("insert", view.predicted.numpy(), np.arange(n) % 5 - 1, "support images added", "encoder", "holds", 4, 1.0)]

    def audit(self, model, images):
        assert images.shape == (7, 32, 32, 3)
        return 0.25
'''


def run(results, defense, attack="backdoor", **more):
    return benchmark.run(attack, str(defense), scale="smoke", sets=(*TINY, *more.pop("sets", ())), results=results, **more)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED)
    return folder, run(folder / "results", folder / "planted.py", sets=("attack.trigger=white",))


def entry(record, name, of):
    (found,) = (one for one in record["metrics"] if (one["name"], one["of"]) == (name, of))
    return found


def test_a_query_detector_reports_auroc_and_f1_at_its_own_threshold(planted):
    _, record = planted
    assert entry(record, "query_auroc", "backdoor")["value"] > 0.95
    f1, hits, alarms = (entry(record, name, "backdoor") for name in ("query_f1_own", "query_tpr_own", "query_fpr_own"))
    assert hits["value"] == 1 and alarms["low"] is not None
    assert f1["value"] == pytest.approx(2 * hits["n"] / (2 * hits["n"] + alarms["value"] * alarms["n"]))
    assert entry(record, "asr_after_rejection", "backdoor")["value"] == 0
    assert entry(record, "query_clean_rejected", "objects")["n"] == 100
    card = record["cards"][f1["card"]]
    assert card["negatives"] == "the same queries without the trigger" and card["trigger"]["kind"] == "patch:white"


def test_certified_accuracy_counts_a_missing_certificate_as_wrong_and_says_what_it_trusts(planted):
    folder, record = planted
    table = pd.read_parquet(folder / "results" / "runs" / record["run_id"] / "predictions" / "certified-objects.parquet")
    correct = table.true == table.pred_insert
    for size in (0, 1, 2, 4):
        assert entry(record, f"certified_acc_{size}", "objects:insert")["value"] == pytest.approx((correct & (table.radius_insert >= size)).mean())
    assert entry(record, "certified_abstained", "objects:insert")["value"] == 0.2
    triggered = entry(record, "certified_not_goal_2", "backdoor:insert")
    card = record["cards"][triggered["card"]]
    assert (card["trusts"], card["unit"], card["n_support"], card["queries"]) == ("encoder", "support images added", 150, "triggered")
    assert triggered["n"] == entry(record, "asr", "backdoor")["n"]
    assert any("says nothing about poisoned pre-training" in line for line in record["warnings"])


def test_an_audit_gets_granted_images_that_are_counted(planted):
    _, record = planted
    assert entry(record, "audit_score", "planted")["value"] == 0.25
    assert record["clean_pairs_used"] == 7


def test_every_metric_of_the_hooks_refers_to_a_card_of_the_record(planted):
    _, record = planted
    assert {one["card"] for one in record["metrics"]} <= set(record["cards"])
    json.dumps(record)


def test_targets_are_judged_against_test_images(planted):
    folder, _ = planted
    record = run(folder / "results", folder / "planted.py", attack="targeted")
    assert entry(record, "query_tpr_own", "targeted")["units"] == "targets"
    assert entry(record, "query_fpr_own", "targeted")["n"] == 100
    certified = entry(record, "certified_not_goal_0", "targeted:insert")
    assert certified["n"] == entry(record, "asr", "targeted")["n"] and record["cards"][certified["card"]]["queries"] == "targets"
    assert entry(record, "certified_asr", "targeted:insert")["value"] + certified["value"] == pytest.approx(1 - entry(record, "certified_abstained", "targeted:insert")["value"])


@pytest.mark.parametrize("form", ["whole", "slim"])
@pytest.mark.parametrize("attack", ["backdoor", "targeted"])
def test_what_the_hooks_say_follows_from_saved_predictions(planted, tmp_path, attack, form):
    folder, _ = planted
    record = run(folder / "results", folder / "planted.py", attack=attack, sets=("attack.trigger=white",) if attack == "backdoor" else ())
    tables = read_predictions(folder / "results" / "runs" / record["run_id"])
    if form == "slim":
        write_slim(tables, tmp_path / SLIM)
        tables = read_predictions(tmp_path)

    def off(tables):
        again = recomputed(tables, record["cards"], record["metrics"], rounded=form == "slim")
        hooked = [
            one for one in record["metrics"] if one["name"].startswith(("query_", "certified_", "asr_after")) and one["name"] != "certified_parameter" and one["value"] is not None
        ]
        assert len(hooked) > 8
        pairs = [(one, again.get((one["name"], one["of"]))) for one in hooked]
        return {one["name"] for one, found in pairs if found is None or abs(found.value - one["value"]) > found.tolerance}

    assert not off(tables)
    edited = dict(tables)
    edited[f"queries-attack-{attack}"] = tables[f"queries-attack-{attack}"].assign(rejected=lambda table: ~table["rejected"], score=lambda table: -table["score"])
    edited["certified-objects"] = tables["certified-objects"].assign(radius_insert=lambda table: table["radius_insert"] - 1)
    assert {"query_tpr_own", "query_auroc", "certified_acc_0", "certified_radius_median"} <= off(edited)


def test_a_defense_without_hooks_gets_none_of_their_metrics(tmp_path):
    record = run(tmp_path, "clip")
    assert not [one for one in record["metrics"] if one["name"].startswith(("query", "certified", "audit"))]
    assert record["clean_pairs_used"] == 0 and not (tmp_path / "cache" / "hooks").exists()


def test_a_certificate_without_labelled_images_is_refused_before_anything_is_trained(tmp_path):
    from PIL import Image

    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "pairs").mkdir()
    lines = ["image\tcaption"]
    for row in range(130):
        Image.fromarray(np.full((32, 32, 3), row, np.uint8)).save(tmp_path / "pairs" / f"{row}.png")
        lines.append(f"pairs/{row}.png\ta photo of a cat")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    for label in ("cat", "dog"):
        (tmp_path / "set" / "test" / label).mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), 9 if label == "cat" else 5, np.uint8)).save(tmp_path / "set" / "test" / label / "0.png")
    with pytest.raises(BenchError, match="has no train split"):
        run(tmp_path / "r", tmp_path / "planted.py", attack="none", data=tmp_path / "pairs.tsv", eval=[tmp_path / "set"])
    assert not (tmp_path / "r" / "cache" / "train").exists()


def test_a_hook_that_breaks_is_the_defenses_failure(planted):
    folder, _ = planted
    (folder / "broken.py").write_text(PLANTED.replace("return corner, 254.5", "return corner[:3], 0.0"))
    with pytest.raises(PluginError, match="one score for each of 100 images"):
        run(folder / "results", folder / "broken.py", sets=("attack.trigger=white",))


def test_a_hook_that_opens_the_sealed_record_fails_the_run(planted):
    folder, _ = planted
    peek = "np.asarray(__import__('pandas').read_parquet(next(__import__('pathlib').Path(" + repr(str(folder)) + ").rglob('poisoned.record/rows.parquet'))))"
    (folder / "peeks.py").write_text(PLANTED.replace("return corner, 254.5", f"{peek}\n        return corner, 254.5"))
    with pytest.raises(PluginError, match="a defense must not open"):
        run(folder / "results", folder / "peeks.py", sets=("attack.trigger=white",))


def test_scores_that_are_not_finite_become_the_most_extreme_of_all_and_are_counted():
    found = judged(lambda images: (torch.tensor([0.0, float("nan"), 2.0, float("-inf")]), 1.0), np.zeros((4, 2, 2, 3), np.uint8))
    assert ordered(found.values).tolist() == [0.0, 3.0, 2.0, -1.0] and found.n_not_finite == 2
    assert found.rejected.tolist() == [False, True, True, False]
    clean, attacked = Judged(np.array([90.0, 100.0]), 1000.0), Judged(np.array([np.nan, np.inf]), 1000.0)
    metrics = {metric.name: metric.value for metric in query_detection("p", clean, attacked, np.array([True, True]), "")}
    assert metrics["query_auroc"] == metrics["query_tpr_own"] == 1.0 and metrics["asr_after_rejection"] == 0.0
    tables = {f"queries-{name}": query_table(("a", "b"), seen, name != "s", np.array([True, True])) for name, seen in (("s", clean), ("attack-p", attacked))}
    again = recomputed(
        tables | {"attack-p": pd.DataFrame({"counted": [True, True]})}, {"c": {"eval_set": "s", "negatives": "test images"}}, [{"name": "query_auroc", "of": "p", "card": "c"}]
    )
    assert {name: again[(name, "p")].value for name in metrics} == pytest.approx(metrics)


def test_the_query_metrics_match_hand_values():
    clean, attacked = Judged(np.array([0.8, 0.3, 0.1]), 0.5), Judged(np.array([0.9, 0.4]), 0.5)
    found = {metric.name: metric.value for metric in query_detection("p", clean, attacked, np.array([True, True]), "")}
    assert found["query_auroc"] == pytest.approx(0.83333, abs=1e-5) and found["query_average_precision"] == pytest.approx(0.83333, abs=1e-5)
    assert found["query_fpr_at_tpr_0.95"] == pytest.approx(1 / 3)
    assert found["query_f1_own"] == 0.5 and found["query_tpr_own"] == 0.5 and found["asr_after_rejection"] == 0.5


def certificates(predicted, radius, largest=4, **more):
    return Certificates("insert", np.array(predicted), np.array(radius), "support images added", "encoder", "holds", largest, 1.0, **more)


def test_certified_curves_never_rise_and_start_at_the_accuracy():
    rng = np.random.default_rng(0)
    true, predicted, radius = rng.integers(0, 3, 200), rng.integers(0, 3, 200), rng.integers(-1, 17, 200)
    curve = [metric for metric in certified_curve(certificates(predicted, radius, 16), "s", true, "") if metric.name.startswith("certified_acc_")]
    assert [metric.name.rpartition("_")[2] for metric in curve] == ["0", "1", "2", "4", "8", "16"]
    assert all(left.value >= right.value for left, right in itertools.pairwise(curve))
    assert curve[0].value == pytest.approx(((true == predicted) & (radius >= 0)).mean())
    assert all(metric.low <= metric.value <= metric.high and metric.n == 200 for metric in curve)
    assert sizes(7) == [0, 1, 2, 4] and sizes(0) == [0]


@pytest.mark.parametrize("change", [{"unit": ""}, {"trusts": "nobody"}, {"says": ""}, {"radius": np.array([0.5])}, {"radius": np.array([5])}, {"radius": np.array([1, 1])}])
def test_a_certificate_without_unit_and_trust_cannot_be_plotted(change):
    facts = {"name": "insert", "predicted": np.array([0]), "radius": np.array([1]), "unit": "rows", "trusts": "none", "says": "holds", "largest": 4, "parameter": 1.0}
    Certificates(**facts)
    with pytest.raises(ValueError, match="certificate"):
        Certificates(**{**facts, **change})


def test_a_defense_says_which_hooks_it_fills_in_and_how_much_clean_data_it_wants():
    class Judges(Clip):
        n_clean: int = 12

        def suspicion(self, model, images, task):
            raise NotImplementedError

    assert Judges.overrides("suspicion") and not Judges.overrides("audit") and not Defense.overrides("certify")
    assert Judges().clean_wanted() == 12 and Clip().clean_wanted() == 0


def test_tables_show_what_was_judged_and_what_each_certificate_trusts(planted):
    from io import StringIO
    from types import SimpleNamespace

    from rich.console import Console

    from benchmark.report.markdown import to_markdown
    from benchmark.report.records import load
    from benchmark.report.terminal import print_outcomes

    folder, record = planted
    text = to_markdown([run for run in load(folder / "results") if run.record["run_id"] == record["run_id"]])
    console = Console(file=StringIO(), width=200)
    print_outcomes([SimpleNamespace(record=record)], console)
    for shown in (text.replace("\\", ""), console.file.getvalue()):
        for words in ("Queries judged at test time", "Certified accuracy against the size e of the attack", "Models audited", "0.250", "not run: --attack none"):
            assert words in shown
    assert "trusts=encoder. Holds; trusts the encoder" in text.replace("\\", "") and "says nothing about poisoned pre-training" in text
    assert "support images added" in text and "objects (clean)" in text and "backdoor (triggered)" in text


def test_tables_of_other_defenses_have_no_such_sections(tmp_path):
    from benchmark.report.judged import sections
    from benchmark.report.records import load
    from benchmark.report.tables import groups

    run(tmp_path, "clip")
    assert sections(groups(load(tmp_path))[0]) == []

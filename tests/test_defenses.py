"""One table over every defense, installed third-party ones included, and what the checks themselves catch."""

import pathlib
import random
import sys
from typing import ClassVar

import numpy as np
import pandas
import pytest
import torch

from benchmark.contract import Attack, Certificates, Defense, Pass, Replace
from benchmark.errors import BenchError
from benchmark.registry import find, names
from benchmark.testing import ContractError, World, check_attack, check_defense, check_plugin
from defenses.clip import Clip


@pytest.mark.parametrize("name", names("defense"))
def test_every_defense_keeps_the_contract(name):
    check_defense(find("defense", name).load())


class _Documented(Defense):
    """Fails one check.

    Source: this test.
    """


def failing(check, cls, reason):
    with pytest.raises(ContractError, match=reason) as caught:
        check(cls)
    return str(caught.value)


def test_a_defense_that_opens_a_sealed_record_fails():
    class Peeks(_Documented):
        """Source: this test."""

        def defend(self, lab):
            root = next(place for place in sys.modules["pathlib"].Path(lab._stages.root).parent.glob("planted/poison/*/poisoned.record"))
            (root / "record.json").read_text()
            return lab.train(Clip()).model

    assert "must not open" in failing(check_defense, Peeks, "it holds what a defender does not know")


def test_answers_that_no_run_could_use_fail():
    class Votes(_Documented):
        """Source: this test."""

        def defend(self, lab):
            model = lab.train(Clip()).model
            return [model, model]

    class Judges(Votes):
        """Source: this test."""

        def suspicion(self, model, images, task):
            return torch.zeros(len(images)), 0.5

    class Certifies(Votes):
        """Source: this test."""

        predicted: ClassVar[int] = 0
        radius: ClassVar[int] = 1

        def certify(self, views, labels, n_classes):
            ones = np.ones(len(views[0].queries), dtype=np.int64)
            return [Certificates("insert", ones * self.predicted, ones * self.radius, "images", "none", "holds", 9, 1.0)]

    class Outside(Certifies):
        """Source: this test."""

        predicted: ClassVar[int] = 99

    class Boasts(Certifies):
        """Source: this test."""

        radius: ClassVar[int] = 2

    class Peeks(_Documented):
        """Source: this test."""

        def suspicion(self, model, images, task):
            pandas.read_parquet(self._record)
            return torch.zeros(len(images)), 0.5

        def defend(self, lab):
            self._record = next(pathlib.Path(lab._stages.root).parent.glob("planted/poison/*/poisoned.record/rows.parquet"))
            return lab.train(Clip()).model

    failing(check_defense, Judges, "defend returns 2 models that vote, and suspicion judges one")
    failing(check_defense, Outside, "predicts classes outside of 0 to")
    failing(check_defense, Boasts, "has a radius of 2, with 2 models")
    check_defense(Certifies)
    failing(check_defense, Peeks, "a defense must not open")


def test_a_defense_that_draws_from_a_global_generator_fails():
    class Draws(_Documented):
        """Source: this test."""

        def loss(self, model, batch, now):
            random.random()
            np.random.random()
            return super().loss(model, batch, now) * (1 + torch.rand(()) * 0)

    failing(check_defense, Draws, "global generator of random, numpy, torch")


def test_a_defense_that_remembers_outside_its_state_fails():
    class Remembers(_Documented):
        """Source: this test."""

        _seen: int = 0

        def plan(self, epoch, now):
            self._seen += 1
            return [Pass(lr=1e-3 * self._seen)]

    failing(check_defense, Remembers, "only `state` survives a restart")


def test_a_defense_with_odd_state_or_no_model_or_no_source_fails():
    class Odd(_Documented):
        no_description: int = 1

        def defend(self, lab):
            return "a model"

        def plan(self, epoch, now):
            self.state["odd"] = np.zeros(3)
            return [Pass()]

    text = failing(check_defense, Odd, "must return a model or a list of models, got str")
    for reason in ("no line `Source:", "tensors, numbers and strings"):
        assert reason in text


def test_a_defense_whose_loss_breaks_on_a_batch_of_one_fails():
    class Breaks(_Documented):
        """Source: this test."""

        def defend(self, lab):
            return []

        def loss(self, model, batch, now):
            return super().loss(model, batch, now) * (float("nan") if len(batch) == 1 else 1)

    failing(check_defense, Breaks, "a batch of 1 gives the loss nan")


class _Attacks(Attack):
    """Source: this test."""

    def poison(self, pairs, lab):
        for row in range(3):
            yield Replace(row, caption="poison")


def test_an_attack_without_a_probe_or_with_one_poison_for_all_seeds_fails():
    text = failing(check_attack, _Attacks, "declares no probe")
    assert "seeds 0 and 1 give the same poison" in text


def test_an_attack_that_edits_nothing_or_draws_freely_fails():
    class Idle(_Attacks):
        """Source: this test."""

        def poison(self, pairs, lab):
            yield Replace(0, caption=pairs.captions[0])
            yield Replace(1, caption=str(random.random()))

    text = failing(check_attack, Idle, "every edit must change its row")
    assert "global generator of random" in text and "two runs with one seed differ" in text


def test_check_plugin_says_a_line_for_each_check(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text('from benchmark.contract import Attack\n\n\nclass Mine(Attack):\n    """Does nothing."""\n\n    size: int = 1\n')
    lines = []
    failures = check_plugin(str(path), lines.append)
    assert len(failures) == 1 and "Source:" in failures[0]
    assert lines[0] == "attack Mine" and lines[1].startswith("FAILED the docstring") and all(line.startswith("ok ") for line in lines[2:])


@pytest.mark.parametrize(
    ("content", "message"),
    [("class Broken(:\n", "line 1"), ("import nothing_of_this_name\n", "cannot be imported"), ("x = 1\n", "neither an Attack nor a Defense"), (None, "no plugin file at")],
)
def test_a_file_that_holds_no_plugin_is_a_bad_request(tmp_path, content, message):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BenchError, match=message):
        check_plugin(str(path), print)


def test_a_misspelt_plugin_is_answered_with_the_nearest_name():
    with pytest.raises(BenchError, match="Did you mean 'roclip'"):
        check_plugin("rocilp", print)


def test_scores_may_be_tensors_that_still_carry_a_gradient(tmp_path):
    lab = World(tmp_path).lab(Clip(), "lab")
    lab.scores("own", torch.ones(192, requires_grad=True), torch.arange(192) > 100)
    assert lab.handed_in[0].values.dtype == np.float64 and lab.handed_in[0].flagged.sum() == 91
    with pytest.raises(BenchError, match="one finite value for each of 192 rows"):
        lab.scores("own", np.ones(3))
    with pytest.raises(BenchError, match=r"wants flagged as a mask, bool \(192,\), got shape \(2,\)"):
        lab.scores("own", np.ones(192), [5, 8])


def test_a_lab_trains_one_tower_and_leaves_the_others_weights(tmp_path):
    lab = World(tmp_path).lab(Clip(), "lab")
    first = lab.train(Clip(), epochs=1).model
    second = lab.train(Clip(), start=first, epochs=1, trainable="image").model
    before, after = first.state(), second.state()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("visual.") for name in moved)


def test_a_lab_answers_the_same_training_from_its_cache(tmp_path):
    lab = World(tmp_path).lab(Clip(), "lab")
    one, two = (lab.train(Clip(), rows=range(64), epochs=1) for _ in range(2))
    assert lab.trainings[0] == lab.trainings[1] and one.model.weights_sha256() == two.model.weights_sha256()
    assert len(lab.costs) == 1, "what is asked for twice is trained and charged once"
    with pytest.raises(BenchError, match=r"handles outside 0\.\.191"):
        lab.train(Clip(), rows=[0, 192])
    with pytest.raises(BenchError, match=r"lab\.train\(rows=\.\.\.\) wants a list of row numbers, got bool"):
        lab.train(Clip(), rows=np.arange(192) < 96)
    assert len(lab.kept_rows) == 64
    lab.train(Clip(), epochs=1)
    assert lab.kept_rows is None, "the last training had all rows"

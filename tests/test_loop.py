import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmark.contract import Defense, Pass
from benchmark.errors import BenchError
from benchmark.progress import Progress, silent
from benchmark.seeding import torch_generator
from benchmark.settings import AugmentSettings, ModelSettings, TrainSettings
from benchmark.train.eda import Eda
from benchmark.train.loop import Budget, TrainingData, opening, snapshot_name, train
from benchmark.train.loss import contrastive
from benchmark.train.model import Model, build, load_weights, optimizer
from benchmark.train.schedule import factor, warmup
from benchmark.train.views import TextViews
from defenses.clip import Clip
from defenses.roclip import RoCLIP

N, BATCH = 40, 8
CAPTIONS = tuple(f"a photo of {word} number {index} on paper" for index, word in enumerate(("boat", "tree", "star", "cup") * 10))


class Heard(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class Dies(RuntimeError):
    pass


def fresh(seed: int = 0) -> Model:
    return build(ModelSettings(), 32, seed, torch.device("cpu"))


def data_of(model: Model, defense: Defense, eda: Eda | None = None, static: bool = True) -> TrainingData:
    images = np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    return TrainingData(images, model.tokenizer.encode(CAPTIONS)[0], TextViews(CAPTIONS, defense, eda, model.tokenizer, "fixed", 0, static))


def budget(epochs: int, augmented: bool = False, **changes) -> Budget:
    return Budget(TrainSettings(epochs=epochs, batch_size=BATCH, **changes), AugmentSettings(), augmented, 0)


def trained(defense: Defense, folder: Path, epochs: int = 2, augmented: bool = False, progress: Progress | None = None, eda: Eda | None = None, static: bool = True, **changes):
    folder.mkdir(exist_ok=True)
    model = fresh()
    log = train(model, defense, data_of(model, defense, eda, static), budget(epochs, augmented, **changes), folder, progress or silent())
    return model, log


def same(left: Model, right: Model) -> bool:
    mine, other = left.state(), right.state()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def dying(cls: type[Defense], at: int) -> type[Defense]:
    alive = []

    class Dying(cls):
        def plan(self, epoch, now):
            if epoch == at and not alive:
                alive.append(True)
                raise Dies
            return super().plan(epoch, now)

    return Dying


def test_clip_equals_a_hand_written_loop_bit_for_bit(tmp_path):
    ours, log = trained(Clip(), tmp_path)
    model = fresh()
    data = data_of(model, Clip())
    model.train_only(data.texts.vocabulary(data.plain_tokens))
    settings = budget(2).settings
    adam = optimizer(model.net, settings)
    total = 2 * (N // BATCH)
    warm, step = warmup(settings, total), 0
    model.net.train()
    for epoch in (1, 2):
        order = torch.randperm(N, generator=torch_generator("order", 0, epoch, 0))
        for rows in order[: N // BATCH * BATCH].view(-1, BATCH):
            for group in adam.param_groups:
                group["lr"] = settings.lr * factor(step, warm, total)
            images = torch.from_numpy(data.images[rows.numpy()]).permute(0, 3, 1, 2).float() / 255
            tokens = torch.from_numpy(data.plain_tokens[rows.numpy()].astype(np.int64))
            loss = contrastive(model.image(images), model.text(tokens[:, : int(tokens.argmax(1).max()) + 1]), model.scale)
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                model.net.logit_scale.clamp_(0, 4.6052)
            step += 1
    assert same(ours, model)
    assert [row["phase"] for row in log] == ["clip", "clip"]


def test_two_trainings_with_one_seed_are_equal(tmp_path):
    assert same(trained(Clip(), tmp_path / "a", augmented=True)[0], trained(Clip(), tmp_path / "b", augmented=True)[0])


@pytest.mark.parametrize("augmented", [False, True])
def test_a_killed_training_continues_to_the_same_weights(tmp_path, augmented):
    whole, log = trained(Clip(), tmp_path / "whole", 3, augmented)
    defense = dying(Clip, 2)
    with pytest.raises(Dies):
        trained(defense(), tmp_path / "killed", 3, augmented)
    continued, log_again = trained(defense(), tmp_path / "killed", 3, augmented)
    assert same(whole, continued)
    assert [{**row, "seconds": 0} for row in log] == [{**row, "seconds": 0} for row in log_again]


def test_a_training_killed_before_a_matched_epoch_steps_the_text_tower_alike(tmp_path):
    """The text tower gets no gradient there, yet momentum and decay move it; a fresh optimizer must do the same."""
    options = {"pool_size": 8, "pool_fraction": None}
    first, second = RoCLIP(**options), dying(RoCLIP, 4)
    whole, _ = trained(first, tmp_path / "whole", 4)
    with pytest.raises(Dies):
        trained(second(**options), tmp_path / "killed", 4)
    resumed = second(**options)
    continued, log = trained(resumed, tmp_path / "killed", 4)
    assert log[3]["match_steps"] == N // BATCH
    assert same(whole, continued)
    assert torch.equal(first.state["pool"], resumed.state["pool"])
    assert (first.state["pointer"], first.state["count"]) == (resumed.state["pointer"], resumed.state["count"])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "cut", "empty"])
def test_a_broken_checkpoint_is_named_and_the_training_starts_anew(tmp_path, content):
    whole, _ = trained(Clip(), tmp_path / "whole", 2)
    with pytest.raises(Dies):
        trained(dying(Clip, 2)(), tmp_path / "broken", 2)
    path = tmp_path / "broken" / "state.pt"
    if content == "empty":
        torch.save({}, path)
    else:
        path.write_bytes(path.read_bytes()[:1000] if content == "cut" else content)
    heard = Heard()
    again, _ = trained(Clip(), tmp_path / "broken", 2, progress=heard)
    assert same(whole, again)
    assert any("cannot be read" in line and "state.pt" in line for line in heard.lines)


def test_every_epoch_leaves_weights_that_load(tmp_path):
    model, _ = trained(Clip(), tmp_path)
    assert same(model, load_weights(tmp_path / snapshot_name(2), ModelSettings(), 32, torch.device("cpu")))
    assert (tmp_path / snapshot_name(1)).is_file()


def test_the_log_is_json_and_counts_its_pairs(tmp_path):
    _, log = trained(Clip(), tmp_path)
    assert json.loads(json.dumps(log)) == log
    assert [row["pairs"] for row in log] == [N // BATCH * BATCH] * 2
    assert log[0]["lr_first"] == pytest.approx(2e-3 / 2) and 0 < log[1]["lr_last"] < 2e-3


def test_too_few_pairs_for_a_batch_are_answered_with_a_remedy(tmp_path):
    with pytest.raises(BenchError, match=r"40 pairs do not fill one batch of 64; use --set train.batch_size=10"):
        model = fresh()
        train(model, Clip(), data_of(model, Clip()), Budget(TrainSettings(batch_size=64), AugmentSettings(), False, 0), tmp_path, silent())


def test_a_pass_that_fills_no_batch_is_an_error(tmp_path):
    class Few(Clip):
        def plan(self, epoch, now):
            return [Pass(), Pass(rows=[1, 2], phase="few")]

    with pytest.raises(BenchError, match=r"epoch 1, pass 2 \(few\): 2 rows do not fill one batch of 8"):
        trained(Few(), tmp_path)


@pytest.mark.parametrize(
    ("rows", "sentence"), [(np.arange(N) % 2 == 0, "wants a list of row numbers, got bool"), ([0, N], "holds handles outside"), ([-1, 0], "holds handles outside")]
)
def test_rows_of_a_pass_that_are_none_are_refused(tmp_path, rows, sentence):
    class Masked(Clip):
        def plan(self, epoch, now):
            return [Pass(rows=rows, phase="some")]

    with pytest.raises(BenchError, match=rf"epoch 1, pass 1 \(some\): Pass\(rows=\.\.\.\) {sentence}"):
        trained(Masked(), tmp_path)


def test_a_plan_stands_at_the_first_step_of_its_epoch(tmp_path):
    seen = []

    class Watching(Clip):
        def plan(self, epoch, now):
            seen.append(now.step)
            return super().plan(epoch, now)

    trained(Watching(), tmp_path, epochs=3)
    assert seen == [0, N // BATCH, 2 * (N // BATCH)]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Broken(Clip):
        def loss(self, model, batch, now):
            return super().loss(model, batch, now) * float("nan")

    with pytest.raises(BenchError, match="the loss is not finite; lower the learning rate"):
        trained(Broken(), tmp_path)


def test_static_texts_are_one_variant_for_all_epochs_and_per_epoch_texts_are_not():
    model, eda = fresh(), Eda(None)
    static = data_of(model, Clip(), eda).texts
    assert np.array_equal(static.epoch(1), static.epoch(2))
    changing = data_of(model, Clip(), eda, static=False).texts
    one, two = changing.epoch(1), changing.epoch(2)
    assert one.shape != two.shape or not np.array_equal(one, two)
    assert changing.vocabulary(np.zeros((1, 2), np.uint16)) is None
    assert np.array_equal(one, changing.epoch(1))


def test_a_training_with_texts_per_epoch_moves_the_whole_embedding(tmp_path):
    model, _ = trained(Clip(), tmp_path, 1, True, eda=Eda(None), static=False)
    assert isinstance(model.net.token_embedding, torch.nn.Embedding)


def test_a_passes_own_rate_is_scaled_by_the_schedule(tmp_path):
    class Slow(Clip):
        def plan(self, epoch, now):
            return [Pass(lr=1e-5), Pass(phase="second")]

    _, log = trained(Slow(), tmp_path, 2)
    assert log[0]["lr_first"] == pytest.approx(1e-5 / 2)
    assert log[0]["phase"] == "clip+second" and log[0]["steps"] == 2 * (N // BATCH)


def test_a_rate_that_is_a_function_is_used_as_it_is(tmp_path):
    class Ramp(Clip):
        def plan(self, epoch, now):
            return [Pass(lr=lambda step, n_steps: 1e-4 * (step + 1) / n_steps)]

    _, log = trained(Ramp(), tmp_path, 1)
    assert (log[0]["lr_first"], log[0]["lr_last"]) == (pytest.approx(1e-4 / 5), pytest.approx(1e-4))


def test_a_defenses_own_views_of_a_caption_stand_beside_each_other(tmp_path):
    class Two(Clip):
        def captions(self, text, rng, rewrite):
            return [text, rewrite(text, rng)]

    data = data_of(fresh(), Two(), Eda(None))
    tokens = data.texts.epoch(1)
    assert tokens.shape[:2] == (2, N)
    assert np.array_equal(tokens[0][:, : data.plain_tokens.shape[1]], data.plain_tokens)
    assert not np.array_equal(tokens[0], tokens[1])


def test_training_leaves_global_generators_alone(tmp_path):
    before = torch.get_rng_state()
    trained(RoCLIP(pool_size=8, pool_fraction=None), tmp_path, 2, augmented=True)
    assert torch.equal(before, torch.get_rng_state())


def test_features_of_all_rows_read_no_more_than_a_batch_at_a_time(tmp_path):
    asked = []

    class Listening:
        def __init__(self, images):
            self.images, self.shape = images, images.shape

        def __len__(self):
            return len(self.images)

        def __getitem__(self, rows):
            asked.append(len(rows))
            return self.images[rows]

    model = fresh()
    data = data_of(model, Clip())
    now = opening(model, replace(data, images=Listening(np.repeat(data.images, 20, axis=0)), plain_tokens=np.repeat(data.plain_tokens, 20, axis=0)), budget(1))
    image, text = now.features()
    assert image.shape == text.shape == (20 * N, 128)
    assert max(asked) == 256
    assert torch.equal(image, model.encode_images(np.repeat(data.images, 20, axis=0)))


def test_what_a_defense_does_before_its_steps_counts_as_training_time(tmp_path):
    class Slow(Clip):
        def plan(self, epoch, now):
            time.sleep(0.5)
            return super().plan(epoch, now)

    _, log = trained(Slow(), tmp_path)
    assert all(row["seconds"] > 0.5 for row in log)

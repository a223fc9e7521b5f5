"""The leak experiment on a tiny scale: real trainings, a real table and picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.bench import leak, leak_longer
from trainer_module.config import KeyBnMode

SCALE = leak.Scale(width=2, batch=16, queue=32, epochs=2, pairs=1, every=1)


@pytest.fixture(scope="module")
def curves():
    draw = np.random.default_rng(0)
    labels = np.arange(32) % 2
    colours = np.array([(30, 30, 200), (200, 160, 30)])[labels]
    images = (draw.integers(0, 50, (32, 32, 32, 3)) + colours[:, None, None]).astype(np.uint8)
    views = np.stack([images, images[:, ::-1]], 1)[None]
    data = leak.Data(views, images, labels, images, labels)
    return list(leak.train(leak.Run("split", KeyBnMode.split), SCALE, data))


def test_every_seed_gives_a_curve_of_its_own_from_the_first_epoch_to_the_last(curves):
    assert [[point.epoch for point in curve] for curve in curves] == [[1, 2]] * len(leak.SEEDS)
    assert len({curve[0].loss for curve in curves}) == len(leak.SEEDS)
    assert all(0 <= point.pretext_top1 <= 1 and 0 <= point.knn_top1 <= 1 for curve in curves for point in curve)


def test_the_knn_tells_two_colours_apart(curves):
    assert min(curve[-1].knn_top1 for curve in curves) > 0.9


def test_an_epoch_takes_its_pair_of_every_image_once_in_an_order_of_its_own():
    scale = leak.Scale(batch=4, epochs=3, pairs=2)
    views = np.zeros((2, 12, 2, 32, 32, 3), np.uint8)
    for name in np.ndindex(views.shape[:3]):
        views[name] = np.ravel_multi_index(name, views.shape[:3])
    nothing = np.zeros(0, np.int64)
    batches = leak._batches(leak.Data(views, views, nothing, views, nothing), 7, scale)
    seen = np.array([[view[:, 0, 0, 0] for view in batch] for batch in batches.as_numpy_iterator()])
    pairs, images, which = np.unravel_index(seen.transpose(0, 2, 1).reshape(3, 12, 2), views.shape[:3])
    assert (which == [0, 1]).all()
    assert (pairs == np.array([0, 1, 0])[:, None, None]).all()
    assert (images[..., 0] == images[..., 1]).all()
    assert (np.sort(images[..., 0]) == np.arange(12)).all()
    assert len({tuple(order) for order in images[..., 0]}) == 3


def test_finished_modes_are_gone_on_from_at_the_same_scale_only(curves, tmp_path):
    path = tmp_path / "curves.json"
    assert leak.load(path, SCALE) == {}
    leak.save(path, SCALE, {"split": curves})
    assert [[leak.Point(*point) for point in curve] for curve in leak.load(path, SCALE)["split"]] == curves
    assert leak.load(path, leak.Scale()) == {}


def test_the_table_has_means_and_half_ranges_and_the_picture_can_be_opened(curves, tmp_path):
    all_modes = dict.fromkeys(leak.MODES, curves)
    figures = leak.table(all_modes)
    ends = [curve[-1].pretext_top1 for curve in curves]
    assert figures["none_pretext_top1"] == pytest.approx(np.mean(ends))
    assert figures["ema_pretext_top1_half_range"] == pytest.approx((max(ends) - min(ends)) / 2)
    leak.draw(all_modes, tmp_path / "leak.png")
    with Image.open(tmp_path / "leak.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("bench", [leak, leak_longer])
def test_the_curves_beside_the_pictures_of_the_notes_are_whole_so_nothing_is_trained_to_draw_them(bench, tmp_path):
    measured = Path(leak.__file__).parent / "measured" / bench.__name__.rpartition(".")[2] / "curves.json"
    (tmp_path / "curves.json").write_bytes(measured.read_bytes())
    figures = bench.measure(str(tmp_path))
    assert 0 < figures["cross_replica_sum_pretext_top1"] < figures["none_pretext_top1"]
    assert (tmp_path / "leak.png").exists()


def ends_of(experiment):
    measured = Path(leak.__file__).parent / "measured" / experiment / "curves.json"
    curves = json.loads(measured.read_text())["curves"]
    return {mode: [leak.Point(*curve[-1]) for curve in curves[mode]] for mode in curves}


def test_every_mode_of_the_notes_was_learning_at_its_end():
    ends = ends_of("leak")
    assert set(ends) == set(leak.MODES)
    chance = np.log(1 + leak.Scale().queue)
    assert max(end.loss for mode in ends.values() for end in mode) < chance - 0.5


def test_of_the_longer_experiment_shuffling_has_the_better_knn_too():
    knn = {mode: np.mean([end.knn_top1 for end in ends]) for mode, ends in ends_of("leak_longer").items()}
    assert knn["cross_replica_sum"] > knn["none"]

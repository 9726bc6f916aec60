import copy
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import headstart
from headstart import augmentation, backbones, engine, history, prefix, training
from headstart.bench import Bench
from headstart.blocks import find_blocks
from headstart.config import resolve
from headstart.errors import TrainingError, UsageError
from headstart.images import Preprocess
from headstart.loading import Album
from headstart.sampling import Draw
from headstart.taps import Tapped, see_blocks

NETWORKS = (
    "timm/test_efficientnet",
    "timm/test_resnet",
    "timm/test_vit",
    "torchvision/resnet18",
    "torchvision/googlenet",
)


def untrained(name: str) -> tuple[nn.Module, int]:
    made = backbones.untrained(name, 0)
    return made.network, 64 if name.startswith("torchvision") else made.spec.preprocess.size


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_cut_anywhere_gives_what_the_whole_one_gives(name):
    network, size = untrained(name)
    blocks = find_blocks(network, size)
    pictures = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(pictures)
        for frozen in range(2 if "vit" in name else 1, len(blocks)):  # the class token joins after the first block
            cut = prefix.cut(network, blocks, frozen, size)
            assert cut is not None, blocks[frozen - 1].name
            torch.testing.assert_close(cut.suffix(cut.prefix(pictures)), expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(network(pictures), expected, rtol=0, atol=0)


def test_what_the_suffix_learns_the_whole_network_knows():
    network, size = untrained("timm/test_efficientnet")
    blocks = find_blocks(network, size)
    cut = prefix.cut(network, blocks, 2, size)
    assert cut is not None
    own = {id(parameter) for parameter in network.parameters()}
    assert {id(parameter) for parameter in cut.suffix.parameters()} < own
    last = blocks[-1].modules[0]
    with torch.no_grad():
        next(cut.suffix.get_submodule(last).parameters()).add_(1.0)
    changed = next(network.get_submodule(last).parameters())
    assert torch.equal(changed, next(cut.suffix.get_submodule(last).parameters()))
    assert not any(changed is parameter for parameter in cut.prefix.parameters())


def test_a_network_with_taps_is_cut_at_its_first_tap_or_before():
    network, size = untrained("timm/test_efficientnet")
    names = [block.name for block in find_blocks(network, size)]
    tapped = Tapped(network, (names[2], names[3], "final"), size)
    blocks = see_blocks(tapped, size)
    assert [block.name for block in blocks] == names
    pictures = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = tapped(pictures)
        for frozen in (2, 3):
            cut = prefix.cut(tapped, blocks, frozen, size)
            assert cut is not None
            torch.testing.assert_close(cut.suffix(cut.prefix(pictures)), expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(tapped(pictures), expected, rtol=0, atol=0)
        assert prefix.cut(tapped, blocks, 4, size) is None  # what the first tap gives is not among the activations


def test_a_copy_of_a_suffix_runs_on_its_own_weights():
    network, size = untrained("timm/test_efficientnet")
    cut = prefix.cut(network, find_blocks(network, size), 2, size)
    assert cut is not None
    activations = cut.prefix(torch.randn(2, 3, size, size))
    double = copy.deepcopy(cut.suffix)
    with torch.no_grad():
        before = double(activations)
        for parameter in cut.suffix.parameters():
            parameter.mul_(2.0)
        torch.testing.assert_close(double(activations), before, rtol=0, atol=0)
        assert not torch.equal(cut.suffix(activations), before)


def test_a_network_that_uses_an_early_block_again_is_not_cut_between(caplog):
    class Reaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.one(x)
            return (self.three(self.two(first)) + first).mean((2, 3))

    caplog.set_level("INFO", "headstart")
    network = Reaching().eval()
    blocks = find_blocks(network, 16)
    assert prefix.cut(network, blocks, 1, 16) is not None
    assert prefix.cut(network, blocks, 2, 16) is None
    assert "no chain after two" in caplog.text


# Activations on disk


@pytest.fixture
def album(shapes) -> Album:
    return Album(sorted(shapes.rglob("*.png"))[:10], Preprocess(size=32))


def mean_rows(pixels: np.ndarray) -> np.ndarray:
    """A prefix that can be told by hand: the rows' mean colours."""
    return pixels.astype(np.float32).mean(2).transpose(0, 2, 1)


VARIED = augmentation.parse("RandomResizedCrop, RandomHorizontalFlip", "mirror", 32)


def test_a_kept_view_is_what_its_epoch_shows_of_the_picture(album, tmp_path):
    stored = prefix.keep(tmp_path / "a.npy", album, VARIED, mean_rows, 3, 4, 2**30)
    assert stored is not None and stored.shape == (10, 4, 3, 32) and stored.dtype == np.float16
    show = prefix.show_kept(stored)
    for picture, epoch in ((0, 0), (7, 3), (2, 5), (9, 11)):
        expected = mean_rows(album.vary(Draw(picture), VARIED, 3, epoch % 4)[None])[0]
        np.testing.assert_allclose(show(Draw(picture), epoch), expected, rtol=2**-10)
        np.testing.assert_array_equal(show(Draw(picture, 2), epoch), show(Draw(picture), epoch))


def test_a_file_that_is_there_is_not_computed_again(album, tmp_path):
    first = prefix.keep(tmp_path / "a.npy", album, VARIED, mean_rows, 3, 2, 2**30)

    def refuse(pixels: np.ndarray) -> np.ndarray:
        raise AssertionError("computed again")

    again = prefix.keep(tmp_path / "a.npy", album, VARIED, refuse, 3, 2, 2**30)
    np.testing.assert_array_equal(first, again)
    assert os.listdir(tmp_path) == ["a.npy"]


def test_what_does_not_fit_is_not_kept_and_that_is_said(album, tmp_path, caplog):
    caplog.set_level("INFO", "headstart")
    assert prefix.keep(tmp_path / "a.npy", album, VARIED, mean_rows, 3, 2, 1000) is None
    assert "run each time" in caplog.text and not list(tmp_path.iterdir())


def test_activations_beyond_half_precision_are_not_kept(album, tmp_path):
    huge = lambda pixels: mean_rows(pixels) * 1e6  # noqa: E731
    assert prefix.keep(tmp_path / "a.npy", album, VARIED, huge, 3, 2, 2**30) is None


@pytest.mark.parametrize("value", [1e6, -1e6, np.inf, np.nan])
def test_activations_of_which_one_is_beyond_half_precision_are_not_kept_and_that_is_said(
    album, tmp_path, caplog, value
):
    caplog.set_level("INFO", "headstart")

    def compute(pixels: np.ndarray) -> np.ndarray:
        rows = mean_rows(pixels)
        rows[1:2, 0, 0] = value  # not of the first one, which is tried alone
        return rows

    assert prefix.keep(tmp_path / "a.npy", album, VARIED, compute, 3, 4, 2**30) is None
    assert "too large for float16" in caplog.text and not list(tmp_path.iterdir())


def test_a_prefix_that_fails_half_way_leaves_no_file_of_that_name(album, tmp_path):
    calls = []

    def fail(pixels: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return mean_rows(pixels)

    with pytest.raises(TrainingError, match="MB are needed"):
        prefix.keep(tmp_path / "a.npy", album, VARIED, fail, 3, 4, 2**30)
    assert not (tmp_path / "a.npy").exists()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_disk_that_has_no_room_after_all_is_an_error_and_not_the_end_of_the_process(album, tmp_path, monkeypatch):
    def refuse(file: int, start: int, size: int) -> None:
        assert size == np.load(tmp_path / ".a.npy.partial").nbytes + 128
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(TrainingError, match="No space left on device"):
        prefix.keep(tmp_path / "a.npy", album, VARIED, mean_rows, 3, 4, 2**30)
    assert not list(tmp_path.iterdir())


def test_activations_of_both_roles_share_the_limit_and_leave_nothing_where_one_has_no_room(
    shapes, tiny_weights, tmp_path, monkeypatch
):
    limits, kept = [], []
    room = prefix.keep

    def keep(file, *given):
        limits.append(given[-1])
        stored = None if len(limits) == 2 else room(file, *given)
        kept.append((file.name, stored is not None and stored.nbytes, file.exists()))
        return stored

    monkeypatch.setattr(prefix, "keep", keep)
    monkeypatch.setattr("headstart.training._tidy", lambda folder: None)
    assert headstart.train(shapes, tmp_path / "run", **options(tiny_weights, epochs=1)) is not None
    (small, size, there), (large, refused, _) = kept
    assert (small, large, there, refused) == ("activations-0-select.npy", "activations-0-fit.npy", True, False)
    assert limits[0] - limits[1] == size > 0
    assert not list((tmp_path / "run").glob("activations-*"))


# Training on them


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "step" not in row and row["epoch"]]


def options(tiny_weights: Path, **more: object) -> dict[str, object]:
    return {
        "weights": str(tiny_weights), "strategy": "finetune", "freeze": "3", "cached_views": 2, "epochs": 4,
        "precision": "float32", "device": "cpu", **more,
    }  # fmt: skip


TAPPED = {"strategy": "lp-ft", "taps": "blocks.1,blocks.2,final"}


@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "sampling": "weighted"}, {"batch_norm": "train"}, TAPPED])
def test_training_on_kept_activations_is_training_with_as_many_views(shapes, tiny_weights, tmp_path, monkeypatch, more):
    score, looks = Bench._score, itertools.count(1)  # the last epoch is taken, whatever select says
    monkeypatch.setattr(Bench, "_score", lambda *given: {**score(*given), "log_loss": 1 / next(looks)})
    settings = options(tiny_weights, **{"learning_rate": 3e-3, "warmup_epochs": 0.0, **more})
    headstart.train(shapes, tmp_path / "kept", **settings)
    assert not list((tmp_path / "kept").glob("activations*"))
    monkeypatch.setattr(prefix, "cut", lambda *_: None)
    headstart.train(shapes, tmp_path / "plain", **settings)
    np.testing.assert_allclose(losses(tmp_path / "kept"), losses(tmp_path / "plain"), rtol=5e-3)
    start = training.find_network(resolve(None, {"weights": str(tiny_weights)})).load().state_dict()
    kept, plain = (headstart.load(tmp_path / name).backbone.state_dict() for name in ("kept", "plain"))
    # Which way each weight went, and how far: what rounding changes is little of that.
    names = [name for name, tensor in start.items() if tensor.is_floating_point()]
    ways = [torch.cat([(end[name] - start[name]).flatten() for name in names]) for end in (kept, plain)]
    assert ways[1].norm() > 1 and (ways[0] - ways[1]).norm() < 0.1 * ways[1].norm()


def test_another_number_of_views_shows_other_pictures(shapes, tiny_weights, tmp_path):
    fast = {"learning_rate": 0.01, "warmup_epochs": 0.0}
    headstart.train(shapes, tmp_path / "two", **options(tiny_weights, **fast))
    headstart.train(shapes, tmp_path / "four", **options(tiny_weights, cached_views=4, **fast))
    two, four = losses(tmp_path / "two"), losses(tmp_path / "four")
    np.testing.assert_allclose(two[:2], four[:2], rtol=1e-5)
    assert abs(two[2] / four[2] - 1) > 1e-4


@pytest.mark.parametrize("rates", ["conv_stem=0", "body=1e-3,conv_stem=1e-5,head=1e-2"])
def test_rates_of_blocks_whose_activations_are_kept_do_no_harm(shapes, tiny_weights, tmp_path, rates):
    run = headstart.train(shapes, tmp_path / "run", **options(tiny_weights, epochs=1, rates=rates))
    assert run.plan.phases[0].settings.rates == rates


@pytest.mark.parametrize("wrong", [{"freeze": ""}, {"mixup": 0.2}, {"unfreeze_epochs": 1}])
def test_views_are_kept_beside_frozen_blocks_only(shapes, tiny_weights, tmp_path, wrong):
    with pytest.raises(UsageError, match="cached_views"):
        headstart.train(shapes, tmp_path / "run", **options(tiny_weights, **wrong))


def test_training_on_kept_activations_uses_all_cores(shapes, tiny_weights, tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    step = engine.Training.take_step

    def watch(self, *given):
        seen.append(torch.get_num_threads())
        return step(self, *given)

    monkeypatch.setattr(engine.Training, "take_step", watch)
    torch.set_num_threads(2)
    try:
        headstart.train(shapes, tmp_path / "run", **options(tiny_weights, epochs=1))
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {2}


def test_a_run_that_had_no_room_for_activations_goes_on_without_them(shapes, tiny_weights, tmp_path, monkeypatch):
    add = history.History.add

    def stop(self, record):
        add(self, record)
        if getattr(record, "epoch", 0) == 2 and hasattr(record, "select"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(history.History, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            headstart.train(shapes, tmp_path / "run", **options(tiny_weights, disk_mebibytes=0))
    room = prefix.keep
    monkeypatch.setattr(prefix, "keep", lambda *given: room(*given[:-1], 2**30))  # by now there is
    assert headstart.train(shapes, tmp_path / "run", **options(tiny_weights, disk_mebibytes=0)) is not None
    monkeypatch.setattr(prefix, "keep", room)
    headstart.train(shapes, tmp_path / "other", **options(tiny_weights, disk_mebibytes=0))
    one, other = (headstart.load(tmp_path / name).backbone.state_dict() for name in ("run", "other"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

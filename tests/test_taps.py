"""Features at several depths: the pooled outputs of blocks, by hook and by cut, in threads, copies and models."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torchvision import models

import headstart
from headstart import backbones
from headstart.backbones import Backbone
from headstart.blocks import find_blocks
from headstart.embedders import prepare
from headstart.errors import UsageError
from headstart.features import key_of
from headstart.images import Preprocess, open_image
from headstart.taps import FINAL, Tapped, find_depths, pool
from headstart.zoo import Spec

CPU = torch.device("cpu")


def build(name):
    """A network of timm's with random weights and statistics, without its last layer."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.eval().requires_grad_(False)


def pictures(count=2, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# By cut and by hook


def cut_resnet(network, x):
    for name in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2"):
        x = network.get_submodule(name)(x)
    return {"layer2.0": x, "layer3.0": network.layer3(x)}


def cut_efficientnet(network, x):
    x = network.bn1(network.conv_stem(x))
    early = network.blocks[1](network.blocks[0](x))
    last = network.blocks[4](network.blocks[3](network.blocks[2](early)))
    return {"conv_stem": x, "blocks.1": early, "conv_head": network.bn2(network.conv_head(last))}


def cut_vit(network, x):
    x = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))
    found = {}
    for number, block in enumerate(network.blocks):
        x = found[f"blocks.{number}"] = block(x)
    return found


def cut_convnext(network, x):
    x = network.stem(x)
    found = {"stem.0": x}
    for number, stage in enumerate(network.stages):
        x = found[f"stages.{number}"] = stage(x)
    return found


CUTS = {
    "test_resnet": cut_resnet,
    "test_efficientnet": cut_efficientnet,
    "test_vit": cut_vit,
    "test_convnext": cut_convnext,
}


@pytest.mark.parametrize("name", CUTS)
def test_taps_are_the_mean_outputs_of_the_network_cut_there_side_by_side_in_the_order_asked_for(name):
    # The mistake: Sequential(*children()[:-1]) as feature extractor.
    network, seen = build(name), pictures()
    with torch.no_grad():
        outputs = CUTS[name](network, seen)
        cut = {tap: x.flatten(2).mean(2) if x.ndim == 4 else x.mean(1) for tap, x in outputs.items()}
        cut["final"] = network(seen)
        for taps in ([*cut], [*reversed(cut)], [next(iter(cut))]):
            found = Tapped(build(name), taps, 64).eval()(seen)
            torch.testing.assert_close(found, torch.cat([cut[tap] for tap in taps], 1), rtol=1e-5, atol=1e-6)


def test_the_last_features_alone_are_the_networks_own():
    network = build("test_resnet")
    with torch.no_grad():
        assert torch.equal(Tapped(network, ["final"], 64)(pictures()), network(pictures()))


def test_every_block_of_a_network_can_be_tapped():
    for name in CUTS:
        network = build(name)
        names = [block.name for block in find_blocks(network, 64)]
        with torch.no_grad():
            found = Tapped(network, names, 64)(pictures())
        assert found.ndim == 2 and len(found) == 2 and found.isfinite().all()


def test_maps_with_their_channels_last_are_averaged_over_places_too():
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, img_size=56, window_size=7, embed_dim=24, num_heads=(1, 2, 2, 4)
    ).eval()
    assert network.output_fmt == "NHWC"
    taps, seen = ["layers.0", "layers.2", "final"], pictures(2, 56)
    with torch.no_grad():
        found = Tapped(network, taps, 56)(seen)
        early = network.layers[0](network.patch_embed(seen))
        last = network.layers[2](network.layers[1](early))
        expected = torch.cat([early.mean((1, 2)), last.mean((1, 2)), network(seen)], 1)
    torch.testing.assert_close(found, expected)
    assert found.shape[1] == 24 + 4 * 24 + network.num_features


def test_torchvisions_maps_with_their_channels_last_are_too():
    torch.manual_seed(0)
    network = models.SwinTransformer([4, 4], 24, [1, 1, 2, 2], [2, 2, 4, 4], [4, 4], num_classes=5).eval()
    network.head = nn.Identity()
    names = [block.name for block in find_blocks(network, 64)]
    with torch.no_grad():
        found = Tapped(network, [names[1]], 64)(pictures())
        expected = network.features[1](network.features[0](pictures()))
    assert names[1] == "features.1" and expected.shape == (2, 16, 16, 24)
    torch.testing.assert_close(found, expected.mean((1, 2)))


def test_a_torchvision_networks_blocks_are_tapped():
    torch.manual_seed(0)
    network = models.resnet18(weights=None).eval()
    network.fc = nn.Identity()
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(pictures()))))
        x = network.layer2(network.layer1(x))
        found = Tapped(network, ["layer2.1"], 64)(pictures())
    torch.testing.assert_close(found, x.mean((2, 3)))


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((2, 3, 5, 5), False),
        ((2, 3, 5, 5), True),  # what the shape says counts
        ((2, 5, 5, 3), False),
        ((2, 5, 5, 3), True),
        ((2, 9, 3), False),
        ((2, 3), False),
    ],
)
def test_pooling_leaves_one_number_a_channel(shape, last):
    # The mistake: no global pooling, so that what follows depends on the size of the pictures.
    output = torch.randn(shape)
    found = pool(output, last)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found.sum(), output.sum() * found.numel() / output.numel())


@pytest.mark.parametrize("last", [False, True])
def test_a_map_with_as_many_channels_as_places_in_a_row_is_read_as_the_network_says(last):
    output = torch.randn(2, 3, 3, 3)
    torch.testing.assert_close(pool(output, last), output.mean((1, 2) if last else (2, 3)))


class Beside(nn.Module):
    """Two scales beside each other, as a tuple, a block that is never called, and places before channels."""

    def __init__(self):
        super().__init__()
        self.first, self.idle = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3)
        self.scales, self.places, self.last = Scales(), Places(), nn.Linear(4, 6)

    def forward(self, x):
        return self.last(self.places(self.scales(self.first(x))[0]).mean((1, 2)))


class Scales(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 5)

    def forward(self, x):
        return self.one(x), self.two(x)


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x.permute(0, 2, 3, 1))


def test_depths_are_of_blocks_that_give_a_tensor_of_features():
    taps, widths = find_depths(Beside().eval(), 32)
    assert taps[-1] == FINAL and not {"scales", "idle"} & set(taps)
    assert dict(zip(taps, widths, strict=True))[FINAL] == 6 and widths[taps.index("places")] == 4


@pytest.mark.parametrize("tap", ["scales", "idle"])
def test_a_block_that_gives_no_tensor_of_features_is_refused(tap):
    with pytest.raises(UsageError, match=f"taps: '{tap}' gives no tensor"):
        Tapped(Beside().eval(), (tap, FINAL), 32)(torch.zeros(1, 3, 32, 32))


# Names


@pytest.mark.parametrize("tap", ["layer9", "layer1", "conv9", "", "Final", "head"])
def test_a_tap_that_is_no_block_is_refused_with_the_names_of_the_blocks(tap):
    with pytest.raises(UsageError) as caught:
        Tapped(build("test_resnet"), ["layer1.0", tap], 64)
    assert caught.value.subject == "taps" and f"{tap!r} is no block of the network" in caught.value.why
    assert "layer1.0, layer2.0" in caught.value.remedy and caught.value.remedy.endswith("final.")


def test_a_misspelt_tap_is_answered_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"did you mean 'final'\?"):
        Tapped(build("test_resnet"), ["finale"], 64)


# Threads, copies, failures


def test_several_threads_at_once_each_get_their_own_features():
    tapped = Tapped(build("test_efficientnet"), ["blocks.0", "final"], 64)
    given = [torch.full((1, 3, 64, 64), float(number)) for number in range(6)]
    with torch.no_grad():
        expected = [tapped(one) for one in given]
    found, ready = {}, threading.Barrier(len(given))

    def run(number):
        with torch.no_grad():
            ready.wait(5)
            found[number] = [tapped(given[number]) for _ in range(10)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(expected):
        assert len(found[number]) == 10 and all(torch.equal(row, one) for row in found[number])
    assert not torch.equal(expected[0], expected[1])
    assert not tapped._caught  # nothing is kept


def test_a_copy_looks_at_its_own_network():
    tapped = Tapped(build("test_resnet"), ["layer1.0", "final"], 64)
    with torch.no_grad():
        before = tapped(pictures())
        copied = copy.deepcopy(tapped)
        for parameter in copied.parameters():
            parameter.mul_(0.5)
        assert torch.equal(tapped(pictures()), before)
        assert not torch.equal(copied(pictures()), before)
        del tapped
        assert copied(pictures()).shape == before.shape


def test_a_pass_that_fails_leaves_nothing_behind_and_the_next_one_works():
    tapped = Tapped(build("test_resnet"), ["layer1.0"], 64)
    with torch.no_grad():
        expected = tapped(pictures())
        with pytest.raises(RuntimeError):
            tapped(torch.zeros(1, 5, 64, 64))
        assert not tapped._caught
        assert torch.equal(tapped(pictures()), expected)


# As part of a backbone


def backbone_of(name, taps, size=64):
    spec = Spec("net", "timm", name, {}, Preprocess(size, 1.0), taps=tuple(taps))
    return Backbone.of(spec, build(name))


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("test_resnet", ("conv1.0", "conv1.6", "layer2.0", "final")),
        ("test_efficientnet", ("conv_stem", "blocks.2", "conv_head")),
        ("test_vit", ("patch_embed", "blocks.3")),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_taps_are_the_same_in_the_networks_fastest_form(name, taps, precision):
    backbone = backbone_of(name, taps)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    with torch.no_grad():
        expected = backbone.network(backbone.spec.preprocess.normalise(torch.from_numpy(pixels)).contiguous()).numpy()
    found = prepare(backbone, CPU, precision)(pixels)
    assert found.shape == expected.shape
    tolerance = (1e-3 if precision == "float32" else 0.1) * np.abs(expected).max()
    assert np.abs(found - expected).max() < tolerance


class Silent(nn.Module):
    """A network whose first block ends with a batch norm of timm's that holds no activation."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), BatchNormAct2d(4, apply_act=False)
        self.last = nn.Conv2d(4, 5, 3)

    def forward(self, x):
        return self.last(self.norm(self.conv(x))).mean((2, 3))


def test_a_tap_on_a_batch_norm_outlives_folding():
    torch.manual_seed(0)
    spec = Spec("net", "timm", "net", {}, Preprocess(16, 1.0), taps=("conv", "final"))
    backbone = Backbone.of(spec, Silent().eval())
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    with torch.no_grad():
        expected = backbone.network(spec.preprocess.normalise(torch.from_numpy(pixels)).contiguous()).numpy()
    np.testing.assert_allclose(prepare(backbone, CPU, "float32")(pixels), expected, rtol=1e-3, atol=1e-4)


def test_a_tapped_backbone_holds_the_weights_of_its_network_and_is_built_again_from_them():
    backbone, plain = backbone_of("test_efficientnet", ["blocks.1"]), build("test_efficientnet")
    state = backbone.state_dict()
    assert state.keys() == plain.state_dict().keys()
    again = Backbone(backbone.spec, state)
    with torch.no_grad():
        torch.testing.assert_close(again.network(pictures()), backbone.network(pictures()))
    assert again.state_dict().keys() == state.keys()
    assert not again.network.training and not any(p.requires_grad for p in again.network.parameters())


@pytest.fixture(scope="module")
def run(shapes, tiny_weights, tmp_path_factory):
    """A run whose head was fitted on features at three depths."""
    folder = tmp_path_factory.mktemp("tapped") / "run"
    settings = {"weights": str(tiny_weights), "precision": "float32", "cache": str(folder.parent / "cache")}
    return headstart.train(shapes, folder, taps="blocks.1, blocks.3,final", **settings)


def test_a_model_with_taps_is_saved_loaded_and_predicts_as_it_was_measured(run, shapes):
    classifier = headstart.load(run.path)
    assert classifier.backbone.spec.taps == ("blocks.1", "blocks.3", "final")
    files = [shapes / source for source in run.evaluation.sources]
    predictions = list(headstart.predict(run.path, files))
    found = [[prediction.probabilities[label] for label in run.evaluation.classes] for prediction in predictions]
    np.testing.assert_allclose(found, run.evaluation.probabilities, atol=2e-3)


def test_a_head_on_taps_is_as_wide_as_its_taps(run, shapes, tiny_weights):
    network = backbones.load(backbones.locate("auto", str(tiny_weights))).network
    pixels = run.classifier.preprocess.apply(open_image(shapes / "circle" / "0.png"))
    seen = run.classifier.preprocess.normalise(torch.from_numpy(pixels)[None]).contiguous()
    with torch.no_grad():
        x = network.bn1(network.conv_stem(seen))
        x = early = network.blocks[1](network.blocks[0](x))
        late = network.blocks[3](network.blocks[2](x))
        expected = torch.cat([early.mean((2, 3)), late.mean((2, 3)), network(seen)], 1)
        found = run.classifier.backbone.network(seen)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_features_of_other_taps_are_kept_apart():
    spec = backbone_of("test_resnet", ()).spec
    taps = ((), ("final",), ("layer1.0",), ("layer1.0", "final"), ("final", "layer1.0"))
    assert len({key_of(spec.adapted(taps=chosen)) for chosen in taps}) == len(taps)


@pytest.mark.parametrize("taps", ["layer9", "blocks.1,nonsense"])
def test_an_unknown_tap_is_refused_before_any_picture_is_opened(shapes, tiny_weights, tmp_path, monkeypatch, taps):
    monkeypatch.setattr(headstart.training.views, "look", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(UsageError, match=r"taps: .* is no block of the network"):
        headstart.train(shapes, tmp_path / "run", weights=str(tiny_weights), taps=taps)
    assert not (tmp_path / "run" / "config.toml").exists()


def test_what_comes_after_the_deepest_tap_is_no_block_of_the_features(shapes, tiny_weights, tmp_path):
    settings = {"weights": str(tiny_weights), "precision": "float32", "device": "cpu", "epochs": 1}
    headstart.train(shapes, tmp_path / "run", strategy="finetune", taps="blocks.1", **settings)
    before = backbones.load(backbones.locate("auto", str(tiny_weights))).state_dict()
    after = headstart.load(tmp_path / "run").backbone.state_dict()
    changed = {name.rpartition(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert any(name.startswith("blocks.1") for name in changed)
    assert not any(name.startswith(("blocks.2", "blocks.3", "conv_head")) for name in changed)
    with pytest.raises(UsageError, match=r"freeze: 'blocks\.2' is no block"):
        headstart.train(shapes, tmp_path / "no", strategy="finetune", taps="blocks.1", freeze="blocks.2", **settings)

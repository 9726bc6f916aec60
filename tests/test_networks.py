"""Every network that the tutorials name: built by that name, cut before its last layer, frozen in part, trained."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from headstart import backbones, zoo
from headstart.blocks import find_blocks
from headstart.config import EngineConfig
from headstart.engine import Adapted, Training
from headstart.material import Material
from headstart.timing import Layout

SIZE = 96  # enough for all of them; their own would take minutes
SMALL = ("AlexNet", "ResNet-18", "MnasNet", "EfficientNet-B0", "GoogLeNet", "DenseNet-121")
LARGE = (
    "VGG-16",
    "VGG-19",
    "Inception-v1",
    "Inception-v3",
    "Inception-v4",
    "Inception-ResNet-v2",
    "ResNet-34",
    "ResNet-50",
    "ResNet-101",
    "ResNet-152",
    "ResNeXt-50",
    "ResNeXt-101",
    "SENet",
    "PNASNet",
    "DenseNet-201",
    "Xception",
    *(f"EfficientNet-B{number}" for number in range(1, 8)),
    # What plain names find in timm stands in torchvision too.
    "torchvision/vgg16",
    "torchvision/inception_v3",
    "torchvision/resnet50",
    "torchvision/densenet121",
    "torchvision/mnasnet1_0",
    "torchvision/efficientnet_b7",
)
EVERY = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]


def build_whole(spec: zoo.Spec) -> tuple[nn.Module, nn.Module]:
    """(a network as its library builds it, with random weights and its last layer; that layer)."""
    torch.manual_seed(0)
    if spec.library == "timm":
        import timm

        whole = timm.create_model(spec.architecture, pretrained=False, **spec.arguments)
        return whole.eval(), whole.get_classifier()
    from torchvision import models

    needs = {"init_weights": False} if spec.architecture in ("googlenet", "inception_v3") else {}
    whole = models.get_model(spec.architecture, weights=None, **spec.arguments, **needs)
    return whole.eval(), [module for module in whole.modules() if isinstance(module, nn.Linear)][-1]


@pytest.mark.parametrize("name", EVERY)
def test_features_by_cut_and_by_hook_agree(name):
    # The mistake: Sequential(*children()[:-1]) as feature extractor, wrong for DenseNet, Inception and others.
    spec = dataclasses.replace(zoo.describe(name)[0], weights="w")
    whole, last = build_whole(spec)
    network, _ = backbones._build(spec, whole.state_dict(), strict=False)
    pictures = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    with torch.inference_mode():
        whole(pictures)
        features = network(pictures)
    hook.remove()
    torch.testing.assert_close(features, seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_step_changes_what_is_trained_and_nothing_that_is_frozen(name):
    # The mistakes: `param.require_grad = False`, which freezes nothing; a frozen network left in train mode.
    made = backbones.untrained(name, seed=0)
    network, classes = made.network, 2
    blocks = find_blocks(network, SIZE)
    frozen = len(blocks) // 2
    settings = EngineConfig(
        epochs=1, batch_size=4, learning_rate=0.1, layer_decay=1.0, optimizer="sgd", freeze=str(frozen),
        loss="cross-entropy", batch_norm="train", weight_decay=0.0, augment="none", schedule="constant",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        dim = network(torch.zeros(1, 3, SIZE, SIZE)).shape[1]
    model = Adapted(network, nn.Linear(dim, classes))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    targets = np.eye(classes, dtype=bool)[[0, 1, 0, 1]]
    material = Material(lambda draw, _: pixels[draw.sample], made.spec.preprocess.normalise, targets, "single")
    training = Training(model, blocks, settings, Layout("float32"), material, lambda *_: {})
    training.state.epoch = 0
    parallel = training.thaw()
    (window,) = training.show()
    training.take_step(parallel, window)

    trained = {"head", *(f"backbone.{module}" for block in blocks[frozen:] for module in block.modules)}
    parameters = dict(model.named_parameters())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    expected = {key for key, value in parameters.items() if key.rpartition(".")[0] in trained and moves(value)}
    assert changed & parameters.keys() == expected
    assert len(expected) > 2
    norms = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name in trained
        for buffer, _ in module.named_buffers(recurse=False)
    }
    buffers = changed - parameters.keys()
    assert buffers <= norms and {key for key in norms if key.endswith("num_batches_tracked")} <= buffers


def moves(parameter: nn.Parameter) -> bool:
    """Whether a step has a reason to change a parameter: dead units have no gradient."""
    return parameter.grad is not None and bool((parameter.data + 0.1 * parameter.grad != parameter.data).any())


@pytest.mark.parametrize("name", EVERY)
def test_a_network_has_the_input_size_and_statistics_of_its_own_weights(name):
    spec, origin = zoo.describe(name)
    assert origin.files
    if "inception" in spec.architecture or "xception" in spec.architecture:
        assert spec.preprocess.size == 299
    own = {(0.485, 0.456, 0.406): (0.229, 0.224, 0.225), (0.5, 0.5, 0.5): (0.5, 0.5, 0.5)}
    assert own[spec.preprocess.mean] == spec.preprocess.std

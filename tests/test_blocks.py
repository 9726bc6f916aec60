"""A network's blocks: in the order they run, with everything in exactly one, frozen and given rates by name."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models

from headstart import backbones
from headstart.blocks import Block, blank, count_frozen, find_blocks, leave_rates, read_rates, run
from headstart.errors import BackboneError, UsageError

bounded = settings(max_examples=60, deadline=None)

TINY = ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_mambaout"]
BUILT_IN_PARTS = {"init_weights": False, "aux_logits": False}
RESNET18 = ["conv1", *(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)), "fc"]
DENSE = [
    "conv0",
    "denseblock1",
    "transition1",
    "denseblock2",
    "transition2",
    "denseblock3",
    "transition3",
    "denseblock4",
]
DENSE = [f"features.{part}" for part in DENSE]
INCEPTION = ["conv1", "conv2", "conv3", *(f"inception{part}" for part in ("3a", "3b", "4a", "4b", "4c", "4d", "4e"))]
INCEPTION += ["inception5a", "inception5b", "fc"]

BLOCKS = tuple(Block(name, (name,)) for name in ["conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer10.0"])


def on_meta(make, *given, **named):
    """A network without numbers: as quickly built as run."""
    with torch.device("meta"):
        return make(*given, **named).eval()


def names_of(network, size):
    return [block.name for block in find_blocks(network, size)]


def tiny(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0).eval()


def tensors_of(network, block):
    """The names of the parameters and buffers that the modules of a block hold themselves."""
    for module_name in block.modules:
        module = network.get_submodule(module_name)
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield f"{module_name}.{name}" if module_name else name


def holds_each_tensor_once(network, blocks):
    all_names = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]
    return Counter(name for block in blocks for name in tensors_of(network, block)) == Counter(all_names)


# The order of running


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("resnet18", {}, RESNET18),
        (
            "vgg11",
            {},
            [*(f"features.{n}" for n in (0, 3, 6, 8, 11, 13, 16, 18)), *(f"classifier.{n}" for n in (0, 3, 6))],
        ),
        ("alexnet", {}, [*(f"features.{n}" for n in (0, 3, 6, 8, 10)), *(f"classifier.{n}" for n in (1, 4, 6))]),
        ("squeezenet1_1", {}, [*(f"features.{n}" for n in (0, 3, 4, 6, 7, 9, 10, 11, 12)), "classifier.1"]),
        ("densenet121", {}, [*DENSE, "classifier"]),
        ("googlenet", BUILT_IN_PARTS, INCEPTION),
        ("convnext_tiny", {}, [*(f"features.{n}" for n in range(8)), "classifier.2"]),
    ],
)
def test_the_blocks_of_torchvisions_networks_are_named_in_the_order_they_run(name, arguments, expected):
    assert names_of(on_meta(models.get_model, name, weights=None, **arguments), 96) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", RESNET18[:-1]),
        ("vit_tiny_patch16_224", ["patch_embed", *(f"blocks.{n}" for n in range(12))]),
        ("tf_efficientnet_lite0", ["conv_stem", *(f"blocks.{n}" for n in range(7)), "conv_head"]),
        ("densenet121", DENSE),
        ("convnext_atto", ["stem.0", *(f"stages.{n}" for n in range(4))]),
        ("test_resnet", ["conv1.0", "conv1.3", "conv1.6", *(f"layer{n}.0" for n in range(1, 5))]),
    ],
)
def test_the_blocks_of_timms_networks_are_named_in_the_order_they_run(name, expected):
    assert names_of(on_meta(timm.create_model, name, num_classes=0), 224) == expected


SMALL_VIT = {"image_size": 32, "patch_size": 8, "num_layers": 5, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}


def small_vit():
    """torchvision's vision transformer, small."""
    torch.manual_seed(0)
    network = models.VisionTransformer(**SMALL_VIT).eval()
    network.heads = nn.Identity()
    return network


def test_every_layer_of_torchvisions_vision_transformer_is_a_block():
    names = names_of(small_vit(), 32)
    layers = [f"encoder.layers.encoder_layer_{number}" for number in range(5)]
    assert names[0] == "conv_proj" and [name for name in names if name in layers] == layers
    whole = names_of(on_meta(models.get_model, "vit_b_16", weights=None), 224)
    assert sum(name.startswith("encoder.layers.") for name in whole) == 12


class Around(nn.Module):
    """A network all of whose layers are in one child: a stem, and a sequence."""

    def __init__(self, stem_width, length):
        super().__init__()
        layers = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(length)))
        self.inner = nn.ModuleDict({"stem": nn.Conv2d(3, stem_width, 1), "layers": layers})

    def forward(self, pixels):
        return self.inner["stem"](self.inner["layers"](pixels)).mean((2, 3))


@pytest.mark.parametrize(
    ("stem_width", "length", "expected"),
    [
        (3, 4, [*(f"inner.layers.{n}" for n in range(4)), "inner.stem"]),
        (3, 3, ["inner"]),  # it is short
        (200, 5, ["inner"]),  # it holds little of the child
    ],
)
def test_a_long_sequence_that_holds_most_of_a_child_is_divided(stem_width, length, expected):
    assert names_of(Around(stem_width, length), 4) == expected


def test_a_backbone_has_no_block_for_the_last_layer_that_was_taken_out():
    backbone = backbones.untrained("torchvision/resnet18", 0)
    assert names_of(backbone.network, 32) == RESNET18[:-1]


def find_spoilt(network, size):
    """The names of the layers that give something that is not a number."""
    spoilt = set()

    def look(name, found):
        if found.isnan().any():
            spoilt.add(name)

    for name, module in network.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda _, given, found, name=name: look(name, found))
    with torch.no_grad():
        look("the end", network(torch.zeros(1, 3, size, size)))
    return spoilt


@pytest.mark.parametrize("name", [*TINY, "torchvision"])
def test_what_is_wrong_in_a_block_is_seen_in_no_earlier_block_and_in_the_end(name):
    # Not a number spreads to all that is computed from it, so it shows what runs after what.
    network, size = (small_vit(), 32) if name == "torchvision" else (tiny(name), 64)
    blocks = find_blocks(network, size)
    assert len(blocks) > 3
    for number, block in enumerate(blocks):
        copied = copy.deepcopy(network)
        state = copied.state_dict()
        for tensor in tensors_of(copied, block):
            if state[tensor].is_floating_point():
                state[tensor].fill_(float("nan"))
        spoilt = find_spoilt(copied, size)
        assert "the end" in spoilt and spoilt & set(block.modules)
        assert not spoilt & {module for earlier in blocks[:number] for module in earlier.modules}


class Shuffled(nn.Module):
    """Layers that run in one order and are registered in another."""

    def __init__(self, kinds, order):
        super().__init__()
        made = {
            "matrix": lambda: nn.Conv2d(3, 3, 1),
            "norm": lambda: nn.BatchNorm2d(3),
            "activation": nn.ReLU,
            "dropout": lambda: nn.Dropout(0.5),
            "sequence": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        }
        self.count = len(kinds)
        for number in order:
            self.add_module(f"part{number}", made[kinds[number]]())

    def forward(self, pixels):
        for number in range(self.count):
            pixels = self.get_submodule(f"part{number}")(pixels)
        return pixels.mean((2, 3))


def expect_blocks(kinds):
    """Block name -> modules: every matrix begins a block, and all else belongs to the one before, or to the first."""
    found, loose = {}, []
    for number, kind in enumerate(kinds):
        layers = [(f"part{number}", kind == "matrix")]
        if kind == "sequence":
            layers = [(f"part{number}.{place}", place == 1) for place in range(3)]
        for name, begins in layers:
            if begins:
                found[name] = [*loose, name] if not found else [name]
            elif found:
                found[next(reversed(found))].append(name)
            else:
                loose.append(name)
    return found or {"": loose}


KINDS = st.lists(st.sampled_from(["matrix", "norm", "activation", "dropout", "sequence"]), min_size=1, max_size=9)


@bounded
@given(KINDS.flatmap(lambda kinds: st.tuples(st.just(kinds), st.permutations(range(len(kinds))))))
def test_a_matrix_begins_a_block_and_norms_activations_and_dropout_belong_to_what_they_follow(drawn):
    kinds, order = drawn
    network = Shuffled(kinds, order).eval()
    blocks = find_blocks(network, 4)
    assert {block.name: list(block.modules) for block in blocks} == expect_blocks(kinds)
    assert [block.name for block in blocks] == list(expect_blocks(kinds))
    assert holds_each_tensor_once(network, blocks)


class Odd(nn.Module):
    """Position embeddings and a buffer of the network's own, a layer that runs twice, and one that never does."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.last = nn.Linear(3, 5)
        self.branches = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.named = nn.ModuleDict({"b": nn.Conv2d(3, 3, 1), "a": nn.BatchNorm2d(3)})
        self.first = nn.Conv2d(3, 3, 1)
        self.positions = nn.Parameter(torch.zeros(3, 1, 1))
        self.register_buffer("level", torch.ones(1))

    def forward(self, pixels):
        found = self.first(pixels + self.positions) * self.level
        found = self.branches[1](found) + self.branches[0](found)
        found = self.first(self.named["a"](self.named["b"](found)))
        return self.last(found.mean((2, 3)))


def test_a_network_of_odd_parts_is_divided_without_a_remainder():
    network = Odd().eval()
    blocks = find_blocks(network, 4)
    assert [block.name for block in blocks] == ["first", "branches.1", "branches.0", "named", "last", "unused"]
    assert blocks[0].modules == ("", "first")  # what belongs to no layer is in the first
    assert blocks[3].modules == ("named.b", "named.a")
    assert holds_each_tensor_once(network, blocks)


def test_a_network_without_layers_that_learn_is_one_block():
    assert find_blocks(nn.Identity(), 4) == (Block("", ("",)),)
    assert find_blocks(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval(), 4) == (Block("", ("0", "1")),)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_every_parameter_and_buffer_is_in_exactly_one_block(library):
    names = {
        "timm": [*TINY, "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "efficientvit_b0", "xception41"],
        "torchvision": ["resnet18", "vgg11_bn", "vit_b_16", "swin_t", "mobilenet_v3_small", "shufflenet_v2_x0_5"],
    }
    make = timm.create_model if library == "timm" else models.get_model
    for name in names[library]:
        network = on_meta(make, name)
        blocks = find_blocks(network, 64 if name.startswith("test_") else 224)
        assert holds_each_tensor_once(network, blocks), name
        assert len({block.name for block in blocks}) == len(blocks) and all(block.modules for block in blocks), name


def test_looking_for_blocks_leaves_the_network_as_it_was():
    network = tiny("test_efficientnet").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    find_blocks(network, 64)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_network_that_fails_is_left_without_hooks():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(7, 7))
    with pytest.raises(BackboneError):
        find_blocks(network, 4)
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_in_another_number_format_is_run_in_its_own(dtype):
    assert names_of(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)).to(dtype), 4) == ["0", "1"]


# Freezing


@pytest.mark.parametrize(
    ("freeze", "count"),
    [
        ("", 0),
        ("0", 0),
        ("2", 2),
        ("6", 6),
        ("all", 6),
        ("conv1", 1),
        ("layer1.0", 2),
        ("layer1", 3),
        ("layer2", 5),
        ("layer10", 6),
    ],
)
def test_blocks_are_frozen_by_number_by_name_and_up_to_the_last_of_a_name(freeze, count):
    assert count_frozen(BLOCKS, freeze) == count


def test_freezing_up_to_a_name_is_freezing_its_number_of_blocks():
    blocks = find_blocks(on_meta(timm.create_model, "test_vit"), 64)
    for number, block in enumerate(blocks, 1):
        assert count_frozen(blocks, block.name) == count_frozen(blocks, str(number)) == number


def test_where_there_are_no_blocks_all_of_them_are_none():
    assert count_frozen((), "all") == count_frozen((), "") == count_frozen((), "0") == 0


@pytest.mark.parametrize("freeze", ["layer3", "layer", "layer1.", "layer1.00", "conv", "ALL", "-1", "1.0", "２", " 1"])
def test_a_name_that_no_block_has_is_refused_with_the_names_of_the_blocks(freeze):
    with pytest.raises(UsageError) as caught:
        count_frozen(BLOCKS, freeze)
    assert repr(freeze) in caught.value.why and caught.value.subject == "freeze" and caught.value.exit_status == 2
    assert caught.value.remedy == "Blocks: conv1, layer1.0, layer1.1, layer2.0, layer2.1, layer10.0."


def test_a_misspelt_block_is_answered_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"'layer1\.2' is no block of the network, did you mean 'layer1\.[01]'\?"):
        count_frozen(BLOCKS, "layer1.2")


def test_a_number_over_the_number_of_blocks_is_refused():
    with pytest.raises(UsageError, match=r"7 is over the network's 6 blocks\. Blocks: conv1, "):
        count_frozen(BLOCKS, "7")


@pytest.mark.parametrize(("number", "whole"), [(24, True), (25, False), (60, False)])
def test_of_many_blocks_the_first_and_the_last_are_named(number, whole):
    blocks = tuple(Block(f"b{place}", ()) for place in range(number))
    with pytest.raises(UsageError) as caught:
        count_frozen(blocks, "x")
    shown = caught.value.remedy
    assert (" ... " not in shown) is whole and "\n" not in str(caught.value)
    assert all(f"b{place}" in shown for place in (0, 11, number - 6, number - 1))
    assert shown.count("b") == (number if whole else 18)


# Rates


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("", {}),
        (" , ,", {}),
        ("head=1e-2", {"head": 0.01}),
        ("conv1=0", {"conv1": 0.0}),
        ("layer2=1e-4, layer1.1 = 3e-5", {"layer2.0": 1e-4, "layer2.1": 1e-4, "layer1.1": 3e-5}),
        ("layer1=1e-4,layer1.0=1e-5", {"layer1.0": 1e-5, "layer1.1": 1e-4}),
        ("layer1.0=1e-5,layer1=1e-4", {"layer1.0": 1e-4, "layer1.1": 1e-4}),
        ("layer10=2,", {"layer10.0": 2.0}),
        ("body=1e-5", {block.name: 1e-5 for block in BLOCKS}),
        ("head=1e-2,body=0", {**{block.name: 0.0 for block in BLOCKS}, "head": 0.01}),
        ("body=1e-5,layer1.1=1e-3", {**{block.name: 1e-5 for block in BLOCKS}, "layer1.1": 1e-3}),
        ("layer1.1=1e-3, body = 1e-5", {block.name: 1e-5 for block in BLOCKS}),
    ],
)
def test_rates_are_read_by_name_a_name_stands_for_all_below_it_and_the_later_one_wins(text, rates):
    assert read_rates(text, BLOCKS) == rates


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("", ""),
        ("conv1=0", ""),
        ("conv1=0,layer1=1e-4,layer2=1e-5, head=1e-3", "layer2=1e-5, head=1e-3"),
        ("layer1.1=1,layer2.0=2,layer=3", "layer2.0=2"),
        ("body=1e-4,conv1=0,layer10.0=1", "body=1e-4,layer10.0=1"),
    ],
)
def test_of_rates_those_of_the_blocks_that_are_left_and_of_the_head_are_left(text, left):
    assert leave_rates(text, BLOCKS[3:]) == left
    assert leave_rates(left, ()) == ",".join(entry for entry in left.split(",") if "head" in entry)


@pytest.mark.parametrize(
    "entry", ["conv1", "conv1=", "conv1=x", "conv1=-1e-3", "conv1=nan", "conv1=inf", "conv1=1e3", "="]
)
def test_what_is_no_rate_is_refused_with_an_example(entry):
    with pytest.raises(UsageError) as caught:
        read_rates(f"head=1e-3,{entry}", BLOCKS)
    assert caught.value.why == f"{entry!r} is no NAME=RATE"
    assert "body=1e-5,blocks.6=1e-4" in caught.value.remedy


@pytest.mark.parametrize("name", ["layer3", "layer", "heads", ""])
def test_a_rate_for_no_block_is_refused_with_the_names_of_the_blocks_and_the_head(name):
    with pytest.raises(UsageError) as caught:
        read_rates(f"{name}=1e-3", BLOCKS)
    assert f"{name!r} is no block of the network" in caught.value.why
    assert caught.value.remedy.endswith("layer2.1, layer10.0, head.")


def test_a_network_of_one_size_is_named_with_what_to_do():
    network = timm.create_model("test_vit", num_classes=0, img_size=64, dynamic_img_size=False).eval()
    assert run(network, blank(network, 64)).shape == (1, network.num_features)
    with pytest.raises(BackboneError, match=r"VisionTransformer: does not run on .* 96 pixels \(.+\)\. .*--size"):
        run(network, blank(network, 96))
    with pytest.raises(BackboneError, match="does not run on pictures of 96 pixels"):
        find_blocks(network, 96)


def test_a_blank_picture_is_of_the_networks_own_number_format():
    assert blank(nn.Conv2d(3, 4, 1).double(), 8).dtype == torch.float64
    assert blank(nn.Flatten(), 8).shape == (1, 3, 8, 8)  # without weights, too

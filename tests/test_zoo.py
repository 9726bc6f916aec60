"""Names of networks: what documents write finds the network that is meant, or an answer that says why not."""

from __future__ import annotations

import dataclasses
import json

import pytest

from headstart import images, zoo
from headstart.errors import BackboneError
from headstart.zoo import DEFAULT, Spec, all_names, describe, describe_packaged, find_name

# Names as documents write them, and the network that is meant.
MEANT = {
    "AlexNet": "torchvision/alexnet",
    "VGG": "timm/vgg16",
    "VGG-16": "timm/vgg16",
    "vgg19_bn": "timm/vgg19_bn",
    "GoogLeNet": "torchvision/googlenet",
    "Inception v1": "torchvision/googlenet",
    "Inception-v3": "timm/inception_v3",
    "inceptionv4": "timm/inception_v4",
    "Inception-ResNet v2": "timm/inception_resnet_v2",
    "ResNet": "timm/resnet50",
    "ResNet-18": "timm/resnet18",
    "ResNet 34": "timm/resnet34",
    "resnet50": "timm/resnet50",
    "ResNet101": "timm/resnet101",
    "RESNET-152": "timm/resnet152",
    "ResNeXt": "timm/resnext50_32x4d",
    "ResNeXt-101": "timm/resnext101_32x8d",
    "SENet": "timm/legacy_senet154",
    "PNASNet": "timm/pnasnet5large",
    "PNASNet-5": "timm/pnasnet5large",
    "DenseNet": "timm/densenet121",
    "DenseNet-169": "timm/densenet169",
    "Xception": "timm/legacy_xception",
    "MnasNet": "timm/mnasnet_100",
    **{f"EfficientNet B{number}": f"timm/efficientnet_b{number}" for number in range(6)},
    **{f"EfficientNet-B{number}": f"torchvision/efficientnet_b{number}" for number in (6, 7)},  # timm has no weights
    "SqueezeNet1_1": "torchvision/squeezenet1_1",  # nor such a network
    "mobilenetv2_100": "timm/mobilenetv2_100",
}


@pytest.mark.parametrize("name", MEANT)
def test_a_name_in_any_spelling_finds_the_network_that_is_meant(name):
    assert find_name(name) == MEANT[name]
    spec, origin = describe(name)
    assert f"{spec.library}/{spec.architecture}" == MEANT[name] == spec.name
    assert origin.files  # it has weights
    assert spec.preprocess.size >= 224


@pytest.mark.parametrize("name", MEANT)
def test_a_name_that_was_found_is_found_again(name):
    assert find_name(MEANT[name]) == MEANT[name]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("timm/resnet18", "timm/resnet18"),
        ("torchvision/resnet18", "torchvision/resnet18"),
        ("torchvision/ResNet-18", "torchvision/resnet18"),
        ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("resnet18.a1_in1k", "timm/resnet18.a1_in1k"),
        ("torchvision/resnet50.IMAGENET1K_V1", "torchvision/resnet50.IMAGENET1K_V1"),
        ("senet.in1k", "timm/legacy_senet154.in1k"),
    ],
)
def test_a_library_and_a_set_of_weights_may_be_named(name, found):
    assert find_name(name) == found


def test_networks_without_weights_have_a_name_too():
    for name in ("timm/efficientnet_b7", "timm/vit_giant_patch14_224"):
        assert find_name(name) == name not in all_names()
        assert describe(name)[1].files == ()
    assert find_name("vit_giant_patch14_224") == "timm/vit_giant_patch14_224"


LOST = {
    "OverFeat": "alexnet",
    "Inception v2": "inception_v3",
    "BN-Inception": "inception_v1",
    "Trimps-Soushen": "inception_resnet_v2",
}


@pytest.mark.parametrize("name", LOST)
def test_a_network_whose_weights_nobody_keeps_is_answered_with_the_reason_and_a_neighbour(name):
    with pytest.raises(BackboneError) as caught:
        find_name(name)
    assert caught.value.subject == name and caught.value.why.startswith("cannot be had: ")
    assert LOST[name] in caught.value.remedy.lower()
    assert find_name(LOST[name])  # what is named instead can be had
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet_18x", "resnet"), ("efficientnet_lite00", "efficientnet_lite0"), ("densnet", "densenet")],
)
def test_an_unknown_name_is_answered_with_the_nearest_one(name, near):
    with pytest.raises(BackboneError, match=f"is unknown, did you mean '.*{near}.*'"):
        find_name(name)


@pytest.mark.parametrize("name", ["keras/resnet18", "timm/squeezenet1_1", "torchvision/senet", "timm/", "", "/"])
def test_a_name_that_a_library_does_not_have_is_refused(name):
    with pytest.raises(BackboneError, match="is unknown"):
        find_name(name)


@pytest.mark.parametrize("name", ["resnet18.nobodys", "torchvision/resnet18.nobodys"])
def test_a_set_of_weights_that_is_unknown_is_answered_with_those_there_are(name):
    with pytest.raises(BackboneError, match=r"has no weights 'nobodys'.*Known for it: \w+"):
        describe(name)


def test_every_alias_leads_to_a_network_with_weights():
    for alias, name in zoo.ALIASES.items():
        assert find_name(alias) == name == find_name(name)
        assert describe(name)[1].files


def test_every_listed_name_is_found_and_is_its_own():
    names = all_names()
    assert names[0] == DEFAULT and len(names) == len(set(names)) > 1000
    for name in names[len(zoo.PACKAGED) :: 20]:
        assert find_name(name) == name


@pytest.mark.parametrize("name", ["Inception v3", "Inception-v4", "Inception-ResNet v2", "Xception"])
def test_inceptions_see_299_pixels(name):
    assert describe(name)[0].preprocess.size == 299


@pytest.mark.parametrize(
    "name", ["timm/inception_v3", "torchvision/inception_v3", "torchvision/googlenet", "timm/vgg16"]
)
def test_statistics_and_geometry_are_those_of_the_weights(name):
    # The mistake: another data set's statistics with ImageNet weights.
    spec, _ = describe(name)
    architecture = spec.architecture
    if spec.library == "timm":
        import timm

        own = timm.models.get_pretrained_cfg(architecture)
        assert (spec.preprocess.mean, spec.preprocess.std) == (own.mean, own.std)
        assert (spec.preprocess.crop, spec.preprocess.interpolation) == (own.crop_pct, own.interpolation)
        return
    from torchvision import models, transforms

    own = models.get_model_weights(architecture).DEFAULT.transforms()
    assert (list(spec.preprocess.mean), list(spec.preprocess.std)) == (own.mean, own.std)
    assert transforms.InterpolationMode(spec.preprocess.interpolation) == own.interpolation
    assert round(spec.preprocess.size / spec.preprocess.crop) == own.resize_size[0]
    assert spec.arguments.get("transform_input", False) == (architecture in ("googlenet", "inception_v3"))


# Specs


def test_a_spec_is_adapted_in_size_geometry_and_taps_and_keeps_the_rest():
    spec = describe_packaged(DEFAULT)
    assert spec.adapted() == spec
    found = spec.adapted(96, "center", ("blocks.2", "final"))
    assert (found.preprocess.size, found.preprocess.fit, found.taps) == (96, "center", ("blocks.2", "final"))
    assert dataclasses.replace(found, preprocess=spec.preprocess, taps=()) == spec
    assert found.adapted(fit="auto").preprocess.fit == "center"
    assert found.adapted().taps == ("blocks.2", "final")
    assert Spec.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_spec_of_before_there_were_taps_has_none():
    values = describe_packaged(DEFAULT).to_json()
    del values["taps"]
    assert Spec.from_json(values).taps == ()


@pytest.mark.parametrize("name", zoo.PACKAGED)
def test_a_packaged_networks_spec_needs_no_package_and_no_library(name):
    spec = describe_packaged(name)
    assert (spec.name, spec.library, spec.digest) == (name, "timm", "")
    assert isinstance(spec.preprocess, images.Preprocess)

"""A classifier answers the same however it is asked; its file comes back bit for bit, or not at all."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import socket
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from headstart import backbones, embedders, labels, model
from headstart.errors import (
    CorruptModel,
    DataError,
    ForeignModel,
    HeadstartError,
    ModelFileError,
    NewerModel,
)
from headstart.heads import NearestNeighbours
from headstart.images import Limits, open_image
from headstart.model import Classifier, Prediction

CLASSES = ("circle", "square", "triangle")
ON = {"device": "cpu", "precision": "float32"}


@pytest.fixture(scope="module")
def backbone(tiny_weights):
    return backbones.load(backbones.locate("auto", str(tiny_weights)))


@pytest.fixture(scope="module")
def dim(backbone):
    return backbone.network.num_features


@pytest.fixture(scope="module")
def classifier(backbone, dim):
    torch.manual_seed(0)
    head = nn.Linear(dim, 3).requires_grad_(False)
    return Classifier(backbone, head, CLASSES, temperature=0.7, provenance={"versions": {"torch": "2"}, "n": [1, 2]})


@pytest.fixture(scope="module")
def tagger(classifier):
    return dataclasses.replace(classifier, task="multi", thresholds=(0.2, 0.5, 0.6), temperature=1.3)


@pytest.fixture(scope="module")
def saved(classifier, tmp_path_factory):
    """A saved classifier; tests must not change the file."""
    file = tmp_path_factory.mktemp("saved") / "model.safetensors"
    classifier.save(file)
    return file


@pytest.fixture
def files(shapes):
    return sorted(shapes.rglob("*.png"))[::3]


def features_of(classifier, paths):
    """What the pieces give when they are called one by one."""
    embed = classifier.embedder(**ON)
    return np.concatenate([embed(np.stack([classifier.preprocess.apply(open_image(path))])) for path in paths])


def probabilities_of(classifier, paths):
    return [list(prediction.probabilities.items()) for prediction in classifier.predict(paths, **ON)]


def rewrite(content: bytes, **changes) -> bytes:
    """The file with another description and a right checksum, as only a writer of such files could make it."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    described = json.loads(header["__metadata__"]["headstart"]) | changes | {"sha256": "0" * 64}
    header["__metadata__"]["headstart"] = json.dumps(described)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    changed = len(text).to_bytes(8, "little") + text + content[8 + length :]
    return changed.replace(b"0" * 64, hashlib.sha256(changed).hexdigest().encode(), 1)


# Round trips


def test_a_saved_classifier_comes_back_whole_and_answers_bit_for_bit(classifier, saved, files):
    again = model.load(saved)
    for name in ("classes", "task", "temperature", "thresholds", "limits", "preprocess", "provenance"):
        assert getattr(again, name) == getattr(classifier, name)
    assert again.backbone.spec == classifier.backbone.spec
    assert probabilities_of(again, files) == probabilities_of(classifier, files)


def test_saving_what_was_loaded_gives_the_same_bytes(saved, tmp_path):
    model.load(saved).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_a_model_is_one_file_and_a_run_folder_with_it_is_as_good(saved, files):
    assert [path.name for path in saved.parent.iterdir()] == ["model.safetensors"]
    assert probabilities_of(model.load(saved.parent), files[:1]) == probabilities_of(model.load(str(saved)), files[:1])


def test_a_moved_model_needs_nothing_that_lay_around_it(saved, tmp_path, files, monkeypatch):
    # The mistake: the best weights die with a temporary folder, and the classes are not saved.
    expected = probabilities_of(model.load(saved), files[:2])
    shutil.copy(saved, tmp_path / "elsewhere.safetensors")
    monkeypatch.setattr(backbones, "locate", None)
    assert probabilities_of(model.load(tmp_path / "elsewhere.safetensors"), files[:2]) == expected


def test_several_labels_come_back_with_their_thresholds(tagger, tmp_path, files):
    tagger.save(tmp_path / "tagger.safetensors")
    again = model.load(tmp_path / "tagger.safetensors")
    assert (again.task, again.thresholds) == ("multi", (0.2, 0.5, 0.6))
    assert list(again.predict(files, **ON)) == list(tagger.predict(files, **ON))


def test_a_neighbours_head_comes_back_and_answers_bit_for_bit(classifier, dim, tmp_path, files):
    random = torch.Generator().manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(30, dim, generator=random), dim=1)
    head = NearestNeighbours(vectors, torch.arange(30) % 3, torch.zeros(dim), torch.full((dim,), 0.5), 3, 5)
    neighbours = dataclasses.replace(classifier, head=head)
    neighbours.save(tmp_path / "neighbours.safetensors")
    again = model.load(tmp_path / "neighbours.safetensors")
    assert (again.head.k, again.head.classes) == (5, 3)
    assert probabilities_of(again, files) == probabilities_of(neighbours, files)


def test_odd_class_names_come_back(classifier, tmp_path):
    odd = ('say "x"', "line\nbreak|猫", "\udcff" + "0" * 64)
    dataclasses.replace(classifier, classes=odd).save(tmp_path / "odd.safetensors")
    assert model.load(tmp_path / "odd.safetensors").classes == odd


def test_limits_come_back_and_hold(classifier, tmp_path, files):
    dataclasses.replace(classifier, limits=Limits(pixels=100)).save(tmp_path / "small.safetensors")
    (prediction,) = model.load(tmp_path / "small.safetensors").predict(files[0], **ON)
    assert "limit" in prediction.error


def test_saving_what_could_not_be_loaded_is_refused_and_leaves_no_file(classifier, dim, tmp_path):
    for head in (nn.Sequential(nn.Linear(dim, 3), nn.GELU()), nn.Linear(dim, 3, bias=False)):
        with pytest.raises(TypeError, match="head"):
            dataclasses.replace(classifier, head=head).save(tmp_path / "model.safetensors")
    assert not list(tmp_path.glob("*model*"))


def test_a_save_that_fails_half_way_leaves_the_model_that_was_there(classifier, saved, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    shutil.copy(saved, file)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        dataclasses.replace(classifier, temperature=9.0).save(file)
    assert file.read_bytes() == saved.read_bytes()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


# Files that are no model, or no longer one


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_a_flipped_bit_anywhere_is_noticed(saved, tmp_path):
    content, file = saved.read_bytes(), tmp_path / "model.safetensors"
    length = int.from_bytes(content[:8], "little")
    random = np.random.default_rng(0)
    seal = content.index(b"sha256")
    places = [*range(8), *random.integers(8, 8 + length, 40), *range(seal, seal + 90, 6)]
    places += [*random.integers(8 + length, len(content), 20), len(content) - 1]
    for place in places:
        file.write_bytes(flipped(content, int(place), int(random.integers(8))))
        with pytest.raises((CorruptModel, ForeignModel, NewerModel)) as caught:
            model.load(file)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_table_of_tensors_is_noticed_whatever_it_makes_of_the_text(saved, tmp_path):
    # Every bit of the first tensor's entry: a comma may become a point, and two numbers one.
    content, file = saved.read_bytes(), tmp_path / "model.safetensors"
    start = content.index(b'"backbone.')
    for place in range(start, content.index(b"}", start) + 2):
        for bit in range(8):
            file.write_bytes(flipped(content, place, bit))
            with pytest.raises((CorruptModel, ForeignModel, NewerModel)):
                model.load(file)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.1, 0.5, 0.9, -1])
def test_a_file_that_is_cut_short_is_noticed(saved, tmp_path, kept):
    content, file = saved.read_bytes(), tmp_path / "model.safetensors"
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises((CorruptModel, ForeignModel)) as caught:
        model.load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    if isinstance(kept, float) or kept == -1:
        assert type(caught.value) is CorruptModel and "cut short" in str(caught.value)


def test_bytes_behind_the_end_are_noticed(saved, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(CorruptModel, match="damaged"):
        model.load(tmp_path / "model.safetensors")


def write_foreign(file, kind):
    if kind == "safetensors":
        save_file({"weight": torch.zeros(3, 3)}, file, {"format": "pt"})
    elif kind == "pickle":
        torch.save({"weight": torch.zeros(3)}, file)
    else:
        contents = {
            "empty": b"",
            "text": b"circle,square\n" * 50,
            "json list": b"\x02\0\0\0\0\0\0\0[]",
            "json number": b"\x01\0\0\0\0\0\0\x007",
            "no header": bytes(8),
            "brackets": b"[" * 300_000,
            "picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        }
        file.write_bytes(contents[kind])


@pytest.mark.parametrize(
    "kind",
    ["safetensors", "pickle", "empty", "text", "json list", "json number", "no header", "brackets", "picture"],
)
def test_a_file_that_headstart_did_not_write_is_said_to_be_foreign_in_one_line(tmp_path, kind):
    file = tmp_path / "model.safetensors"
    write_foreign(file, kind)
    with pytest.raises(ForeignModel) as caught:
        model.load(file)
    text = str(caught.value)
    assert text.startswith(f"model: {file}: ") and "\n" not in text and "headstart" in text
    assert caught.value.exit_status == 2


def test_a_newer_schema_is_told_from_damage(saved, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(rewrite(saved.read_bytes(), schema=model.SCHEMA + 1, entirely="new"))
    with pytest.raises(NewerModel, match=r"schema 2.*pip install -U headstart"):
        model.load(file)


def test_the_helper_that_rewrites_a_file_makes_good_ones(saved, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(rewrite(saved.read_bytes(), temperature=2.5))
    assert model.load(file).temperature == 2.5


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": model.SCHEMA, "head": {}},
        {"head": {"kind": "knn", "classes": 3, "k": 1}},
        {"limits": {"elephants": 1}},
        {"backbone": {}},
        {"classes": None},
        {"thresholds": 3},
    ],
)
def test_a_description_that_lacks_something_is_an_error_of_ours_even_with_a_right_checksum(saved, tmp_path, changes):
    file = tmp_path / "model.safetensors"
    file.write_bytes(rewrite(saved.read_bytes(), **changes))
    with pytest.raises(CorruptModel) as caught:
        model.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.safetensors", "empty folder", "a/b/c"])
def test_a_missing_file_or_a_folder_without_a_model_is_one_line_that_says_what_to_give(tmp_path, name):
    (tmp_path / "empty folder").mkdir()
    with pytest.raises(ModelFileError) as caught:
        model.load(tmp_path / name)
    text = str(caught.value)
    assert type(caught.value) is ModelFileError
    assert str(tmp_path / name) in text and "No such file" in text and "model.safetensors" in text
    assert "\n" not in text and caught.value.exit_status == 2


def test_loading_runs_no_code_from_the_file(saved, tmp_path, files, monkeypatch):
    def forbidden(*arguments, **settings):
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    assert len(list(model.load(saved).predict(files[:1], **ON))) == 1


def test_a_pickle_in_place_of_a_model_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ForeignModel):
        model.load(tmp_path / "model.safetensors")
    assert not (tmp_path / "exploded").exists()


# Answers


def test_one_by_one_in_a_batch_and_by_the_pieces_a_picture_gets_the_same_probabilities(classifier, files):
    in_batch = list(classifier.predict(files, **ON))
    alone = [next(iter(classifier.predict(file, **ON))) for file in files]
    pieces = classifier.classify(features_of(classifier, files))
    for number, (first, second) in enumerate(zip(in_batch, alone, strict=True)):
        assert first.source == second.source == str(files[number]) and first.label == second.label
        of_pieces = dict(zip(CLASSES, pieces[number], strict=True))
        assert first.probabilities == pytest.approx(second.probabilities, abs=1e-5)
        assert first.probabilities == pytest.approx(of_pieces, abs=1e-5)


def test_probabilities_are_the_softmax_of_logits_over_the_temperature(classifier, tagger):
    logits = np.array([[1.0, 2.0, 4.0], [1000.0, 0.0, -1000.0]], np.float32)
    expected = np.exp(logits[0] / 0.7) / np.exp(logits[0] / 0.7).sum()
    found = classifier.probabilities(logits)
    assert found.dtype == np.float64
    assert found[0] == pytest.approx(expected, rel=1e-6) and found[1] == pytest.approx([1, 0, 0])
    assert classifier.probabilities(torch.from_numpy(logits)).tolist() == found.tolist()
    assert tagger.probabilities(logits)[0] == pytest.approx(1 / (1 + np.exp(-logits[0] / 1.3)), rel=1e-6)


def test_one_label_is_the_most_probable_and_the_first_of_equals(classifier):
    decided = classifier.decide(np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]))
    assert decided.tolist() == [[False, True, False], [True, False, False]]


def test_several_labels_are_all_that_reach_their_thresholds_be_it_none(tagger):
    decided = tagger.decide(np.array([[0.2, 0.5, 0.6], [0.19, 0.49, 0.59], [0.9, 0.1, 0.9]]))
    assert decided.tolist() == [[True] * 3, [False] * 3, [True, False, True]]


def test_an_answer_names_the_most_probable_first(classifier, tagger):
    single = classifier.answer("a.png", np.array([0.2, 0.7, 0.1]))
    assert single.label == "square" and single.confidence == 0.7 and not single.multi
    assert list(single.probabilities) == ["square", "circle", "triangle"]
    multi = tagger.answer("a.png", np.array([0.3, 0.4, 0.9]))
    assert multi.labels == ("triangle", "circle") and multi.label == "triangle|circle"
    assert multi.confidence == {"triangle": 0.9, "circle": 0.3}
    none = tagger.answer("a.png", np.zeros(3))
    assert none.label == "" and none.confidence == {}


def test_predictions_are_the_documented_json(classifier, tagger):
    single = classifier.answer("a.png", np.array([0.2, 0.7, 0.1]))
    assert json.loads(json.dumps(single.to_json())) == {
        "source": "a.png",
        "label": "square",
        "confidence": 0.7,
        "probabilities": {"square": 0.7, "circle": 0.2, "triangle": 0.1},
    }
    assert list(single.to_json(top=2)["probabilities"]) == ["square", "circle"]
    multi = tagger.answer("a.png", np.array([0.3, 0.4, 0.9])).to_json(top=1)
    assert multi["labels"] == ["triangle", "circle"] and multi["confidence"] == {"triangle": 0.9, "circle": 0.3}
    assert multi["probabilities"] == {"triangle": 0.9}
    assert Prediction("b.png", error="is empty").to_json() == {"source": "b.png", "error": "is empty"}


def test_an_unreadable_picture_in_the_middle_is_reported_in_its_place(classifier, files, tmp_path):
    (tmp_path / "torn.png").write_bytes(files[0].read_bytes()[:60])
    (tmp_path / "notes.txt").write_text("no picture")
    asked = [files[0], tmp_path / "torn.png", files[1], tmp_path / "gone.png", tmp_path / "notes.txt", files[2]]
    found = list(classifier.predict(asked, **ON))
    assert [prediction.source for prediction in found] == [str(path) for path in asked]
    assert [bool(prediction.error) for prediction in found] == [False, True, False, True, True, False]
    for prediction in found:
        assert set(prediction.to_json()) == (
            {"source", "error"} if prediction.error else {"source", "label", "confidence", "probabilities"}
        )
    without = classifier.predict([files[0], files[1], files[2]], **ON)
    assert [p.label for p in found if not p.error] == [p.label for p in without]


def test_order_is_kept_over_many_batches_and_repeats(classifier, files):
    asked = (files * 8)[:60]
    found = list(classifier.predict(asked, **ON))
    assert [prediction.source for prediction in found] == [str(path) for path in asked]
    once = {prediction.source: prediction.probabilities for prediction in found[: len(files)]}
    for prediction in found:
        assert prediction.probabilities == pytest.approx(once[prediction.source], abs=1e-5)


def test_predictions_that_nobody_waits_for_end_their_threads(classifier, files):
    before = threading.active_count()
    predictions = classifier.predict(files * 20, **ON)
    next(predictions)
    predictions.close()
    assert threading.active_count() == before


def test_predict_takes_a_model_file_and_folders_and_passes_over_what_is_no_picture(saved, make_shapes, tmp_path):
    folder = make_shapes(tmp_path / "pictures", per_class=2)
    (folder / "circle" / "notes.txt").write_text("no picture")
    found = list(model.predict(saved, folder, **ON))
    assert len(found) == 6 and not any(prediction.error for prediction in found)
    assert found == list(model.predict(model.load(saved), [folder], **ON))


def test_predict_with_nothing_to_look_at_says_so(saved, tmp_path):
    with pytest.raises(DataError, match="no pictures"):
        model.predict(saved, tmp_path)


# The stock classifier


def test_imagenet_has_a_thousand_classes_all_of_other_names():
    classes = labels.imagenet_names()
    assert len(classes) == len(set(classes)) == 1000
    assert all(name and name == name.strip() for name in classes)
    assert classes[0] == "tench" and classes[207].lower() == "golden retriever"


def test_imagenet_needs_no_network(files, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    stock = model.load("imagenet")
    (prediction,) = stock.predict(files[0], **ON)
    assert prediction.label in stock.classes
    assert sum(prediction.probabilities.values()) == pytest.approx(1)


def test_a_folder_called_imagenet_comes_before_the_stock_classifier(saved, tmp_path, monkeypatch):
    (tmp_path / "imagenet").mkdir()
    shutil.copy(saved, tmp_path / "imagenet")
    monkeypatch.chdir(tmp_path)
    assert model.load("imagenet").classes == CLASSES


def test_errors_of_model_files_are_errors_of_ours():
    for error in (CorruptModel, ForeignModel, NewerModel):
        assert issubclass(error, ModelFileError) and issubclass(error, HeadstartError)


# Heads of several layers

HIDDEN = ["mlp", "batch-norm"]


def a_trained_head(kind, dim):
    """A head as training leaves it: random weights, and batch norms that have seen something."""
    from headstart.heads import make_head

    torch.manual_seed(1)
    head = make_head(kind, dim, 3, hidden=8)
    with torch.no_grad():
        for tensor in (*head.parameters(), *(buffer for buffer in head.buffers() if buffer.ndim)):
            tensor.add_(0.3 * torch.rand_like(tensor))
    return head.eval().requires_grad_(False)


@pytest.fixture(params=HIDDEN)
def layered(request, classifier, dim):
    return dataclasses.replace(classifier, head=a_trained_head(request.param, dim))


def test_a_head_of_several_layers_comes_back_and_gives_the_same_logits_bit_for_bit(layered, dim, tmp_path, files):
    layered.save(tmp_path / "layered.safetensors")
    again = model.load(tmp_path / "layered.safetensors")
    features = torch.randn(16, dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.head(features), layered.head(features))
    assert probabilities_of(again, files) == probabilities_of(layered, files)
    assert len({label for row in probabilities_of(again, files) for label, _ in row}) == 3


def test_a_loaded_head_of_several_layers_drops_nothing_and_follows_no_batch(layered, dim, tmp_path):
    layered.save(tmp_path / "layered.safetensors")
    head = model.load(tmp_path / "layered.safetensors").head
    assert not any(module.training for module in head.modules())
    assert not any(parameter.requires_grad for parameter in head.parameters())
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    features = torch.randn(4, dim)
    assert torch.equal(head(features), head(features)) and torch.allclose(head(features)[:1], head(features[:1]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


def test_a_head_of_several_layers_is_saved_again_with_the_same_bytes(layered, tmp_path):
    layered.save(tmp_path / "layered.safetensors")
    model.load(tmp_path / "layered.safetensors").save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "layered.safetensors").read_bytes()


def test_loading_a_head_of_several_layers_runs_no_code_from_the_file(layered, tmp_path, files, monkeypatch):
    layered.save(tmp_path / "layered.safetensors")

    def forbidden(*arguments, **settings):
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbidden)
    assert len(list(model.load(tmp_path / "layered.safetensors").predict(files[:1], **ON))) == 1


def described_as(layers, classifier, dim, kind, folder):
    """A model file with a head of several layers that is said to consist of others, with a right checksum."""
    dataclasses.replace(classifier, head=a_trained_head(kind, dim)).save(folder / "layered.safetensors")
    content = (folder / "layered.safetensors").read_bytes()
    (folder / "changed.safetensors").write_bytes(rewrite(content, head={"kind": "layers", "layers": layers}))
    return folder / "changed.safetensors"


@pytest.mark.parametrize("kind", HIDDEN)
@pytest.mark.parametrize("layers", [None, "linear", 7, ["os.system"], ["Linear"], [["linear"]], [{}], ["dropout", 1]])
def test_a_head_of_layers_that_are_not_known_is_damage(classifier, dim, tmp_path, kind, layers):
    with pytest.raises(CorruptModel):
        model.load(described_as(layers, classifier, dim, kind, tmp_path))


@pytest.mark.parametrize("layers", [["linear", "linear"], ["linear", "relu", "dropout", "linear", "batch_norm"]])
def test_a_head_with_more_layers_than_weights_is_damage(classifier, dim, tmp_path, layers):
    with pytest.raises(CorruptModel):
        model.load(described_as(layers, classifier, dim, "mlp", tmp_path))


@pytest.mark.parametrize(("kind", "layers"), [("mlp", []), ("mlp", ["linear"]), ("batch-norm", ["linear"])])
def test_a_head_whose_weights_do_not_fit_its_layers_is_damage(classifier, dim, tmp_path, kind, layers):
    with pytest.raises(CorruptModel):
        model.load(described_as(layers, classifier, dim, kind, tmp_path))


def test_sequences_of_other_layers_are_refused_and_leave_no_file(classifier, dim, tmp_path):
    class Louder(nn.Linear):
        """Not what its name in the file would say."""

    others = (
        nn.Sequential(nn.Linear(dim, 3), nn.Softmax(1)),
        nn.Sequential(nn.Sequential(nn.Linear(dim, 3))),
        nn.Sequential(nn.Linear(dim, 4), nn.LeakyReLU(), nn.Linear(4, 3)),
        nn.Sequential(Louder(dim, 3), nn.ReLU()),
    )
    for head in others:
        with pytest.raises(TypeError, match="Sequential cannot be saved"):
            dataclasses.replace(classifier, head=head.eval()).save(tmp_path / "model.safetensors")
    assert not list(tmp_path.glob("*model*"))


@pytest.mark.parametrize("kind", ["elu", "batch norm", "no bias"])
def test_layers_with_settings_of_their_own_come_back_with_them_or_are_refused(classifier, dim, tmp_path, kind):
    layer = {"elu": nn.ELU(0.1), "batch norm": nn.BatchNorm1d(dim, eps=0.5), "no bias": nn.Dropout()}[kind]
    head = nn.Sequential(layer, nn.Linear(dim, 3, bias=kind != "no bias")).eval().requires_grad_(False)
    file, features = tmp_path / "model.safetensors", torch.randn(5, dim)
    try:
        dataclasses.replace(classifier, head=head).save(file)
    except TypeError:
        return
    assert torch.equal(model.load(file).head(features), head(features))


def test_how_many_pictures_there_are_decides_on_the_engine(classifier, files, monkeypatch):
    asked = []

    def find(spec, load, device, precision, folder, count_missing, *, workshop):
        asked.append((count_missing("torch"), count_missing("openvino")))
        return "torch"

    monkeypatch.setattr(embedders, "find_engine", find)
    assert len(list(classifier.predict(files, **ON))) == len(files)
    assert asked == [(len(files), len(files))]

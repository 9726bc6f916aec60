from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import headstart
from headstart import backbones, compiled, embedders, files, views
from headstart.backbones import Backbone
from headstart.config import RunConfig, TrainConfig
from headstart.embedders import EngineSeconds, find_engine, prepare
from headstart.errors import BackboneError
from headstart.processes import World

CPU = torch.device("cpu")
# Looked for without importing it: an import as it comes would report over the network.
needs_openvino = pytest.mark.skipif(not compiled.find_version(), reason="needs openvino: pip install headstart[fast]")


@pytest.fixture
def backbone(tiny_weights):
    return backbones.load(backbones.locate("auto", str(tiny_weights)))


def make_pixels(count, size=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def nearness(found, expected):
    return torch.nn.functional.cosine_similarity(torch.from_numpy(found), torch.from_numpy(expected)).min().item()


def mean_colours(pixels):
    return pixels.float().mean((1, 2)) @ torch.arange(12.0).view(3, 4)


def compile_small(file, function=mean_colours, precision="float32"):
    return compiled.compile_function(function, torch.from_numpy(make_pixels(4, 8)), precision, 2, file)


def run_python(code, home):
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(home)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


# With OpenVINO


@needs_openvino
@pytest.mark.parametrize("precision, least", [("float32", 0.99999), ("bfloat16", 0.995)])
@pytest.mark.parametrize(
    "adapted", [{}, {"views": ("plain", "mirror", "zoom", "zoom-mirror"), "taps": ("blocks.1", "blocks.2")}]
)
def test_a_compiled_backbone_gives_pytorchs_features_within_rounding(backbone, tmp_path, precision, least, adapted):
    backbone = Backbone(backbone.spec.adapted(**adapted), backbone.state_dict())
    pixels = make_pixels(11)
    embed = prepare(backbone, CPU, precision, "openvino", tmp_path)
    found, expected = embed(pixels), prepare(backbone, CPU, "float32")(pixels)
    assert embed.dtype == getattr(torch, precision)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert nearness(found, expected) > least
    if precision == "float32":
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@needs_openvino
def test_a_pictures_compiled_features_do_not_depend_on_who_else_is_in_the_batch(backbone, tmp_path):
    embed, pixels = prepare(backbone, CPU, "bfloat16", "openvino", tmp_path), make_pixels(9)
    alone = np.concatenate([embed(pixels[number : number + 1]) for number in range(9)])
    assert np.array_equal(embed(pixels), alone)


@needs_openvino
def test_threads_may_call_a_graph_at_once(backbone, tmp_path):
    embed = prepare(backbone, CPU, "float32", "openvino", tmp_path)
    batches = [make_pixels(8, seed=seed) for seed in range(12)]
    expected = [embed(batch) for batch in batches]
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(embed, batches))
    assert all(map(np.array_equal, found, expected))


@needs_openvino
def test_a_second_start_takes_the_graph_from_disk(tmp_path, monkeypatch):
    pixels = make_pixels(3, 8)
    first = compile_small(tmp_path / "a.graph")(pixels)
    monkeypatch.setattr(compiled, "_convert", lambda *_: pytest.fail("it was converted again"))
    assert np.array_equal(compile_small(tmp_path / "a.graph")(pixels), first)


@needs_openvino
def test_in_a_cache_that_cannot_be_written_a_graph_is_used_as_it_is(tmp_path, monkeypatch):
    pixels = make_pixels(3, 8)
    first = compile_small(tmp_path / "a.graph")(pixels)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compiled.Path, "touch", refuse)
    monkeypatch.setattr(compiled, "_convert", lambda *_: pytest.fail("it was converted again"))
    assert np.array_equal(compile_small(tmp_path / "a.graph")(pixels), first)


@needs_openvino
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:64],
        lambda content: b"",
        lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
        lambda content: bytes([255]) + content[1:],
    ],
)
def test_a_damaged_graph_is_made_again(tmp_path, caplog, damage):
    file, pixels = tmp_path / "a.graph", make_pixels(3, 8)
    expected = compile_small(file)(pixels)
    file.write_bytes(damage(file.read_bytes()))
    assert np.array_equal(compile_small(file)(pixels), expected)
    assert "is damaged and is made again" in caplog.text
    caplog.clear()
    assert np.array_equal(compile_small(file)(pixels), expected) and not caplog.records


@needs_openvino
def test_a_graph_that_openvino_does_not_take_is_made_again(tmp_path, caplog):
    caplog.set_level("INFO")
    file, pixels = tmp_path / "a.graph", make_pixels(3, 8)
    file.write_bytes(files.seal(files.UNSEALED.encode() + b"of another processor"))
    expected = compile_small(tmp_path / "b.graph")(pixels)
    assert np.array_equal(compile_small(file)(pixels), expected)
    assert "cannot be used" in caplog.text and file.stat().st_size > 1000


@needs_openvino
def test_a_graph_that_cannot_be_kept_is_used_all_the_same(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "file").write_bytes(b"")
    graph = compile_small(tmp_path / "file" / "a.graph")
    expected = mean_colours(torch.from_numpy(make_pixels(3, 8))).numpy()
    np.testing.assert_allclose(graph(make_pixels(3, 8)), expected, rtol=1e-5)
    assert "cannot be written" in caplog.text


@needs_openvino
def test_the_graphs_used_last_are_kept_and_half_written_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "KEPT", 2)
    for age, name in enumerate(
        ("c.graph", "b.graph", "a.graph", "a.json", ".d.graph.1-1.partial", ".e.graph.2-2.partial")
    ):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / ".e.graph.2-2.partial").touch()  # somebody is writing it now
    compile_small(tmp_path / "new.graph")
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left == [".e.graph.2-2.partial", "a.json", "c.graph", "new.graph"]


def decompose(pixels):
    return torch.linalg.eigvals(pixels.float()[:, :3, :3, 0]).real


def read_number(pixels):
    raise KeyError("no tracing")


@needs_openvino
@pytest.mark.parametrize("function", [decompose, read_number])
def test_what_openvino_cannot_compile_is_none_and_that_is_said(tmp_path, caplog, function):
    caplog.set_level("INFO")
    assert compile_small(tmp_path / "a.graph", function) is None
    assert "OpenVINO cannot compile it: " in caplog.text and not list(tmp_path.iterdir())


class Decomposing(nn.Module):
    """A network with a layer that OpenVINO does not know."""

    def forward(self, pixels):
        return torch.linalg.eigvals(pixels[:, :, :3, :3]).abs().flatten(1)


@needs_openvino
def test_a_network_that_openvino_cannot_compile_falls_back_once_for_all(backbone, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    unknown = Backbone.of(backbone.spec, Decomposing())
    wanted = (unknown.spec, lambda: unknown, CPU, "float32", tmp_path, lambda engine: 10_000)
    monkeypatch.setattr(embedders, "_time_run", lambda _: 1.0)
    assert find_engine(*wanted) == "torch"
    assert "does not run in OpenVINO" in caplog.text and "its features are computed by PyTorch" in caplog.text
    monkeypatch.setattr(compiled, "compile_function", lambda *_: pytest.fail("it was tried again"))
    assert find_engine(*wanted) == "torch"
    assert prepare(unknown, CPU, "float32", "torch", tmp_path)(make_pixels(2)).shape == (2, 9)


@needs_openvino
def test_compiling_changes_neither_the_backbone_nor_pytorchs_threads(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(embedders, "_time_run", lambda _: 1.0)
    before = {name: tensor.clone() for name, tensor in backbone.network.state_dict().items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        find_engine(backbone.spec, lambda: backbone, CPU, "bfloat16", tmp_path, lambda engine: 10_000)
        assert torch.get_num_threads() == 3 and list(tmp_path.glob(f"*{compiled.SUFFIX}"))
    finally:
        torch.set_num_threads(threads)
    after = backbone.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


WATCHED = """
import sys, torch
from pathlib import Path
from headstart import compiled
seen = []
sys.addaudithook(lambda event, _: seen.append(event))
example = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
assert compiled.compile_function(lambda pixels: pixels.float().mean((1, 2)), example, "float32", 1, Path("{file}"))
assert "openvino" in sys.modules
sent = [event for event in seen if event.startswith(("socket", "urllib", "subprocess", "os.fork", "os.exec"))]
sys.exit(", ".join(sent) or 0)
"""


@needs_openvino
def test_compiling_reports_to_nobody(tmp_path):
    done = run_python(WATCHED.replace("{file}", str(tmp_path / "a.graph")), tmp_path)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["a.graph"]  # nor is anything laid in the home folder


INTERRUPTED = """
import signal, torch
from pathlib import Path
from headstart import compiled
example = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
graphs = [
    compiled.compile_function(lambda pixels: pixels.float().mean((1, 2)), example, "float32", 1, Path("{folder}", name))
    for name in ("a.graph", "b.graph")
]
while graphs:
    del graphs[0]  # the oldest first, as a run leaves them
signal.signal(signal.SIGINT, lambda *_: print("handled"))
signal.raise_signal(signal.SIGINT)
"""


@needs_openvino
@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_an_interrupt_is_handled_after_graphs_have_gone(tmp_path):
    done = run_python(INTERRUPTED.replace("{folder}", str(tmp_path)), tmp_path)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


# With or without it


@pytest.fixture
def pretended(monkeypatch):
    """An OpenVINO that is as PyTorch, but for a last bit; the calls to compile with it."""
    calls = []

    def compile_function(function, example, precision, threads, file):
        calls.append(file)
        return lambda pixels: function(torch.from_numpy(pixels)).numpy() * np.float32(1 + 2**-12)

    monkeypatch.setattr(compiled, "find_version", lambda: "2000.0")
    monkeypatch.setattr(compiled, "compile_function", compile_function)
    monkeypatch.setattr(embedders, "time_embedders", lambda *_: (1.0, 0.5))
    monkeypatch.setattr(embedders, "_time_run", lambda _: 1.0)
    return calls


def find_for(backbone, folder, pictures=100_000, device=CPU, precision="float32", load=None, looks=1, workshop=None):
    load = load or (lambda: backbone)
    return find_engine(backbone.spec, load, device, precision, folder, lambda engine: pictures, looks, workshop)


def never():
    raise AssertionError("it need not be loaded")


@pytest.mark.parametrize(
    "seconds, engine", [((1.0, 0.5), "openvino"), ((1.0, 0.95), "torch"), ((1.0, 1.0), "torch"), ((0.5, 1.0), "torch")]
)
def test_the_faster_engine_is_used_and_the_answer_kept(backbone, tmp_path, monkeypatch, pretended, seconds, engine):
    monkeypatch.setattr(embedders, "time_embedders", lambda *_: seconds)
    assert find_for(backbone, tmp_path) == engine
    monkeypatch.setattr(embedders, "time_embedders", lambda *_: pytest.fail("they were timed again"))
    assert find_for(backbone, tmp_path, load=never) == engine
    assert len(pretended) == 1


@pytest.mark.parametrize(
    "by_torch, by_openvino, engine",
    [
        (1000, 1000, "openvino"),
        (1, 1, "torch"),  # starting it takes longer
        (1, 0, "openvino"),
        (1000, 5000, "torch"),  # has nearly all of the features
        (5000, 5000, "openvino"),
    ],
)
def test_the_engine_is_used_that_is_done_first(by_torch, by_openvino, engine):
    assert EngineSeconds(0.01, 0.005).find_best(by_torch, by_openvino) == engine


def test_an_engine_that_cannot_be_used_is_not():
    assert EngineSeconds(0.0, float("inf")).find_best(1000, 0) == "torch"


def test_engines_are_timed_by_turns_on_all_cores(monkeypatch):
    calls = []

    def embedder(name):
        return lambda pixels: calls.append(name)

    monkeypatch.setattr(embedders, "count_cpus", lambda: 2)
    seconds = embedders.time_embedders((embedder("a"), embedder("b")), make_pixels(1, 2))
    assert calls == ["a", "a", "b", "b"] * (1 + embedders.ROUNDS) and min(seconds) > 0


def test_for_few_pictures_nothing_is_converted(backbone, tmp_path, pretended):
    assert find_for(backbone, tmp_path, embedders.TRIAL_RUNS * embedders.count_cpus() - 1, load=never) == "torch"
    assert not pretended and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pictures", "looks", "views", "seconds", "engine"),
    [
        (300, 1, 1, 1.0, "openvino"),
        (100, 3, 1, 1.0, "openvino"),  # three looks to come at each
        (100, 1, 3, 1.0, "openvino"),  # or three views at once
        (299, 1, 1, 1.0, "torch"),  # a trial takes about as many runs
        (99, 3, 1, 1.0, "torch"),
        (1000, 1, 1, 0.0099, "torch"),  # in PyTorch it is done before the trial would be
        (1000, 3, 1, 0.0099, "openvino"),
        (1000, 1, 1, 0.0101, "openvino"),
    ],
)
def test_engines_are_tried_where_pytorch_would_take_long(
    backbone, tmp_path, monkeypatch, pretended, pictures, looks, views, seconds, engine
):
    monkeypatch.setattr(embedders, "_time_run", lambda _: seconds)
    monkeypatch.setattr(embedders, "count_cpus", lambda: 2)
    names = ("plain", "mirror", "zoom")[:views]
    seen = Backbone(backbone.spec.adapted(views=names), backbone.state_dict())
    assert find_for(seen, tmp_path, pictures, looks=looks) == engine and bool(pretended) == (engine == "openvino")


def test_a_run_is_timed_on_one_picture(backbone, monkeypatch):
    seen = []

    def embedder(pixels):
        seen.append(pixels.shape)

    embedder.preprocess = backbone.spec.preprocess
    assert 0 < embedders._time_run(embedder) < 1
    assert seen == [(1, 64, 64, 3)] * 2


def test_geometries_and_views_share_a_graph_and_its_trial(backbone, tmp_path, monkeypatch, pretended):
    assert find_for(backbone, tmp_path) == "openvino"
    monkeypatch.setattr(embedders, "time_embedders", lambda *_: pytest.fail("they were timed again"))
    for form in ({"fit": "squash"}, {"views": ("plain", "zoom")}):
        other = Backbone(backbone.spec.adapted(**form), backbone.state_dict())
        assert find_for(other, tmp_path, load=never) == "openvino"
        prepare(other, CPU, "float32", "openvino", tmp_path)
    assert len(set(pretended)) == 1
    monkeypatch.setattr(embedders, "time_embedders", lambda *_: (1.0, 2.0))
    larger = Backbone(backbone.spec.adapted(size=96), backbone.state_dict())
    assert find_for(larger, tmp_path) == "torch" and len(set(pretended)) == 2


def with_size(backbone, size):
    return Backbone(backbone.spec.adapted(size=size), backbone.state_dict())


def test_engines_are_timed_with_one_size_and_another_gets_its_graph_alone(backbone, tmp_path, monkeypatch, pretended):
    workshop = embedders.Workshop()
    monkeypatch.setattr(embedders, "time_embedders", lambda *_: (0.004, 0.001))
    assert find_for(backbone, tmp_path, workshop=workshop) == "openvino"
    for name in ("time_embedders", "_time_run"):
        monkeypatch.setattr(embedders, name, lambda *_: pytest.fail("they were timed again"))
    larger = with_size(backbone, 128)
    # Four times as many pixels take 0.016 s each by PyTorch: 620 of them are done in less than ten seconds.
    assert find_for(larger, tmp_path, 62, workshop=workshop, looks=10) == "torch" and len(pretended) == 1
    assert find_for(larger, tmp_path, 63, workshop=workshop, looks=10) == "openvino" and len(set(pretended)) == 2
    assert workshop.recall(larger.spec, CPU, "float32") == EngineSeconds(0.016, 0.004)
    # Kept for the next run, which has nothing to foresee by.
    assert find_for(larger, tmp_path, load=never) == "openvino"


@pytest.mark.parametrize("seconds", [(1.0, 2.0), (1.0, 0.95)])
def test_an_engine_that_was_slower_with_one_size_is_not_tried_with_another(
    backbone, tmp_path, monkeypatch, pretended, seconds
):
    workshop = embedders.Workshop()
    monkeypatch.setattr(embedders, "time_embedders", lambda *_: seconds)
    assert find_for(backbone, tmp_path, workshop=workshop) == "torch"
    assert find_for(with_size(backbone, 96), tmp_path, load=never, workshop=workshop) == "torch" and len(pretended) == 1


def test_a_network_whose_larger_graph_fails_is_left_to_pytorch_for_that_size(
    backbone, tmp_path, monkeypatch, pretended
):
    workshop = embedders.Workshop()
    assert find_for(backbone, tmp_path, workshop=workshop) == "openvino"
    monkeypatch.setattr(compiled, "compile_function", lambda *_: None)
    for size in (96, 96, 64):
        expected = "openvino" if size == 64 else "torch"
        assert find_for(with_size(backbone, size), tmp_path, workshop=workshop) == expected
    assert find_for(with_size(backbone, 96), tmp_path, load=never) == "torch"  # kept


def test_what_is_known_from_an_earlier_run_foretells_other_sizes(backbone, tmp_path, monkeypatch, pretended):
    assert find_for(backbone, tmp_path) == "openvino"
    monkeypatch.setattr(embedders, "time_embedders", lambda *_: pytest.fail("they were timed again"))
    workshop = embedders.Workshop()
    assert find_for(backbone, tmp_path, load=never, workshop=workshop) == "openvino"
    assert find_for(with_size(backbone, 96), tmp_path, workshop=workshop) == "openvino"


@pytest.mark.parametrize("given", [{"device": torch.device("cuda")}, {"precision": "float16"}, {"pictures": 0}])
def test_openvino_competes_only_for_what_it_can_do(backbone, tmp_path, pretended, given):
    assert find_for(backbone, tmp_path, load=never, **given) == "torch"


def test_weights_that_cannot_be_recognised_again_are_left_to_pytorch(backbone, tmp_path, pretended):
    nameless = Backbone.of(dataclasses.replace(backbone.spec, digest=""), backbone.network)
    assert find_for(nameless, tmp_path, load=never) == "torch"


def test_other_versions_and_cores_are_timed_anew(backbone, tmp_path, monkeypatch, pretended):
    find_for(backbone, tmp_path)
    monkeypatch.setattr(compiled, "find_version", lambda: "2000.1")
    find_for(backbone, tmp_path)
    monkeypatch.setattr(embedders, "count_cpus", lambda: 77)
    find_for(backbone, tmp_path)
    find_for(backbone, tmp_path, precision="bfloat16")
    assert len(set(pretended)) == len(pretended) == 4


@pytest.mark.parametrize("content", ["", "[]", '{"torch": 1.0}', "\0"])
def test_an_answer_that_cannot_be_read_is_found_again(backbone, tmp_path, caplog, pretended, content):
    caplog.set_level("INFO")
    find_for(backbone, tmp_path)
    (answer,) = tmp_path.glob("*.json")
    answer.write_text(content)
    assert find_for(backbone, tmp_path) == "openvino" and len(pretended) == 2
    assert "are timed again" in caplog.text


def test_an_answer_that_cannot_be_kept_is_used_all_the_same(backbone, tmp_path, caplog, pretended):
    caplog.set_level("INFO")
    (tmp_path / "file").write_bytes(b"")
    assert find_for(backbone, tmp_path / "file") == "openvino" and "will be timed again" in caplog.text


@pytest.mark.parametrize(
    ("change", "engine"),
    [
        (lambda rows: rows, "openvino"),
        (lambda rows: rows + 1e-4 * rows.std(0), "openvino"),
        (lambda rows: np.repeat(rows.mean(0, keepdims=True), len(rows), 0), "torch"),  # the same for all
        (lambda rows: np.roll(rows, 1, 0), "torch"),  # another picture's
        (lambda rows: rows + np.where(np.arange(rows.shape[1]) < 8, 9 * rows.std(), 0), "torch"),  # a depth is wrong
        (None, "torch"),
    ],
)
def test_other_features_or_none_leave_it_to_pytorch(backbone, tmp_path, monkeypatch, pretended, change, engine):
    monkeypatch.setattr(embedders, "time_embedders", lambda *_: (1.0, 0.1))

    def compile_function(function, *_):
        def run(pixels):
            with torch.inference_mode():
                return change(function(torch.from_numpy(pixels)).numpy()).astype(np.float32)

        return run if change is not None else None

    monkeypatch.setattr(compiled, "compile_function", compile_function)
    tapped = Backbone(backbone.spec.adapted(taps=("blocks.0", "final")), backbone.state_dict())
    assert find_for(tapped, tmp_path) == engine


def test_pictures_by_which_engines_are_compared_are_not_alike(backbone):
    pixels = embedders.draw_pictures(64)
    assert pixels.shape == (8, 64, 64, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, embedders.draw_pictures(64))
    with torch.inference_mode():
        rows = backbone.network(backbone.spec.preprocess.normalise(torch.from_numpy(pixels)))
    centred = rows - rows.mean(0)
    likeness = torch.nn.functional.cosine_similarity(centred[:, None], centred[None], 2)
    assert likeness.fill_diagonal_(0).max() < 0.9


def test_an_engine_that_fails_after_its_trial_is_named_with_what_to_do(backbone, tmp_path, monkeypatch, pretended):
    find_for(backbone, tmp_path)
    monkeypatch.setattr(compiled, "compile_function", lambda *_: None)
    with pytest.raises(BackboneError, match="does not run in OpenVINO") as caught:
        prepare(backbone, CPU, "float32", "openvino", tmp_path)
    (answer,) = tmp_path.glob("*.json")
    assert str(answer) in caught.value.remedy


def test_an_openvino_that_cannot_be_imported_is_done_without(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert compile_small(tmp_path / "a.graph") is None and "cannot be imported" in caplog.text


def test_without_openvino_pytorch_is_used_and_nothing_said(backbone, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")

    def look_up(name):
        raise compiled.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiled.metadata, "version", look_up)
    assert compiled.find_version() == "" and find_for(backbone, tmp_path, load=never) == "torch"
    assert not caplog.records and not list(tmp_path.iterdir())


def test_a_network_that_gives_other_batches_than_it_takes_is_left_to_pytorch(backbone, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(compiled, "find_version", lambda: "2000.0")
    monkeypatch.setattr(embedders, "_time_run", lambda _: 1.0)
    monkeypatch.setattr(compiled, "compile_function", lambda *_: lambda pictures: np.ones((2, 5), np.float32))
    assert find_for(backbone, tmp_path) == "torch"
    assert "does not run in OpenVINO (" in caplog.text and ": its features are computed by PyTorch" in caplog.text


def test_a_workshop_remembers_what_was_timed_and_what_is_ready(backbone, tmp_path, monkeypatch, pretended):
    workshop = embedders.Workshop()

    def find(pictures, folder):
        given = (backbone.spec, lambda: backbone, CPU, "float32", folder, lambda engine: pictures)
        return find_engine(*given, workshop=workshop)

    monkeypatch.setattr(embedders, "time_embedders", lambda *_: (0.01, 0.005))
    assert find(10_000, tmp_path / "one") == "openvino"
    monkeypatch.setattr(embedders, "time_embedders", lambda *_: pytest.fail("they were timed again"))
    # Few pictures would not be worth OpenVINO's start, but it is ready; and a cache for one look remembers nothing.
    assert find(1, tmp_path / "two") == "openvino" and len(pretended) == 1
    assert find_for(backbone, tmp_path / "one", 1) == "torch"


# In the cache of features


@pytest.fixture
def look(shapes, backbone, tmp_path):
    """A function that looks at the drawn pictures, all or some."""
    dataset = headstart.read(shapes)

    def look(count=36, world=World()):
        some = dataset.with_samples(dataset.samples[:count])
        config = RunConfig(train=TrainConfig(cache=str(tmp_path / "cache")))
        return views.look(some, backbone.spec, lambda: backbone, config, lambda items, _: items, world=world)

    return look


def test_features_of_both_engines_are_kept_apart(look, monkeypatch, pretended):
    monkeypatch.setattr(embedders, "TRIAL_RUNS", 36 / embedders.count_cpus())
    fast = look()
    assert fast.key.endswith("-openvino") and len(pretended) == 1
    assert np.array_equal(look().matrix, fast.matrix) and len(pretended) == 1  # all are there
    monkeypatch.setattr(compiled, "find_version", lambda: "")
    plain = look()
    assert plain.key.endswith("-cpu") and len(pretended) == 1
    assert not np.array_equal(plain.matrix, fast.matrix)
    np.testing.assert_allclose(plain.matrix, fast.matrix, rtol=0.1, atol=0.1)


def test_features_that_pytorch_has_computed_are_used_where_openvino_is_faster_too(look, monkeypatch, pretended):
    monkeypatch.setattr(embedders, "TRIAL_RUNS", 36 / embedders.count_cpus())
    plain = look(30)
    monkeypatch.setattr(embedders, "TRIAL_RUNS", 6 / embedders.count_cpus())
    monkeypatch.setattr(embedders, "TRIAL_SECONDS", 0.0)
    assert look(30).key == plain.key and not pretended  # nothing is to be computed
    whole = look()
    assert whole.key == plain.key and len(pretended) == 1  # timed, but five times as much would be to do
    assert np.array_equal(whole.matrix[:30], plain.matrix)


def test_the_first_process_decides_for_all(look, monkeypatch, pretended):
    class Second(World):
        def share(self, items):
            return items

        def tell(self, value):
            return "openvino" if value == "torch" else value

        def wait(self):
            pass

    monkeypatch.setattr(embedders, "find_engine", lambda *_: pytest.fail("it is not the first"))
    assert look(world=Second(1, 2, 1)).key.endswith("-openvino")


FEW = """
import sys, headstart
from headstart import backbones, views
from headstart.config import RunConfig, TrainConfig
located, config = backbones.locate("auto", "{weights}"), RunConfig(train=TrainConfig(cache="{cache}"))
load = lambda: backbones.load(located)
view = views.look(headstart.read("{shapes}"), located.spec, load, config, lambda items, _: items)
assert len(view.matrix) == 36
sys.exit("openvino" in sys.modules)
"""


def test_for_few_pictures_openvino_is_not_even_imported(shapes, tiny_weights, tmp_path):
    code = (
        FEW.replace("{weights}", str(tiny_weights)).replace("{shapes}", str(shapes)).replace("{cache}", str(tmp_path))
    )
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr

"""Weights files: reading them without running code in them, and fetching them only when that is asked for."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import io
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from headstart import weights
from headstart.errors import WeightsError
from headstart.weights import Origin

STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "bn.bias": torch.ones(2)}
HUB = Origin("hub", "timm/net.tag", ("model.safetensors", "pytorch_model.bin"))


def url(file: str) -> Origin:
    return Origin("url", f"https://example.org/models/{file}", (file,))


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def offline(monkeypatch) -> None:
    """Whoever asks for a connection fails the test."""

    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("asked for the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def own_library_caches(tmp_path, monkeypatch) -> None:
    """No test sees what timm or torchvision once fetched on this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def answers(monkeypatch) -> Callable[..., list[str]]:
    """A function that gives what the internet answers, one after the other; it returns the addresses asked for."""

    def prepare(*contents: bytes | Exception) -> list[str]:
        asked: list[str] = []
        coming = iter(contents)

        def urlopen(address: str, timeout: float) -> io.BytesIO:
            assert 0 < timeout <= 10
            asked.append(address)
            content = next(coming)
            if isinstance(content, Exception):
                raise content
            return io.BytesIO(content)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    return prepare


# Reading


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_a_state_dict_is_read(tmp_path, suffix):
    file = tmp_path / f"net{suffix}"
    save_file(STATE, file) if suffix == ".safetensors" else torch.save(STATE, file)
    assert same(weights.read(file), STATE)


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema", "net", "network"]
)
def test_a_state_dict_is_found_under_its_usual_keys(tmp_path, key):
    torch.save({"epoch": 7, "optimizer": {"lr": 0.1}, key: STATE}, tmp_path / "net.pth")
    assert same(weights.read(tmp_path / "net.pth"), STATE)


def test_averaged_weights_are_preferred_to_plain_ones(tmp_path):
    averaged = {key: value + 1 for key, value in STATE.items()}
    torch.save({"state_dict": STATE, "state_dict_ema": averaged}, tmp_path / "net.pth")
    assert same(weights.read(tmp_path / "net.pth"), averaged)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "backbone.", "encoder."]
)
def test_prefixes_that_wrappers_leave_are_taken_off(tmp_path, prefix):
    torch.save({"state_dict": {prefix + key: value for key, value in STATE.items()}}, tmp_path / "net.pth")
    assert same(weights.read(tmp_path / "net.pth"), STATE)


def test_a_prefix_that_only_some_layers_have_stays(tmp_path):
    state = {"model.conv.weight": torch.ones(1), "fc.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "net.pth")
    assert same(weights.read(tmp_path / "net.pth"), state)


def test_what_is_no_tensor_is_left_out(tmp_path):
    torch.save({**STATE, "version": 3, "name": "net"}, tmp_path / "net.pth")
    assert same(weights.read(tmp_path / "net.pth"), STATE)


class MakesFolder:
    """Unpickling it makes a folder: any code could stand there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_file_that_would_run_code_is_refused_and_the_code_does_not_run(tmp_path, zipped, inside):
    # The mistake: `torch.load` of a foreign file without `weights_only`.
    trap = MakesFolder(tmp_path / "it-ran")
    content = {"state_dict": {**STATE, "trap": trap}} if inside else trap
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="run code") as caught:
        weights.read(tmp_path / "net.pth")
    assert not (tmp_path / "it-ran").exists()
    assert caught.value.subject == str(tmp_path / "net.pth") and "\n" not in str(caught.value)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, content",
    [
        ("empty.pth", b""),
        ("text.pth", b"hello, these are no weights"),
        ("truncated.pth", saved(STATE)[:-100]),
        ("list.pth", saved([1, 2, 3])),
        ("tensor.pth", saved(torch.ones(3))),
        ("numbers.pth", saved({"a": 1})),
        ("numbered.pth", saved({0: torch.ones(3)})),
        ("empty.safetensors", b""),
        ("text.safetensors", b"hello, these are no weights"),
        ("pickle.safetensors", saved(STATE)),
    ],
)
def test_a_file_that_holds_no_weights_is_an_error_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        weights.read(tmp_path / name)
    assert name in caught.value.subject and caught.value.why and caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_truncated_safetensors_file_is_an_error(tmp_path):
    save_file(STATE, tmp_path / "net.safetensors")
    os.truncate(tmp_path / "net.safetensors", (tmp_path / "net.safetensors").stat().st_size - 4)
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.read(tmp_path / "net.safetensors")


# Finding


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "origin, file",
    [
        (HUB, "timm--net.tag.safetensors"),
        (HUB, "timm--net.tag.bin"),
        (url("net-0123abcd.pth"), "net-0123abcd.pth"),
    ],
)
def test_a_file_laid_into_the_folder_is_found(tmp_path, origin, file):
    assert weights.find(origin, tmp_path) is None
    (tmp_path / file).write_bytes(b"x")
    assert weights.find(origin, tmp_path) == tmp_path / file


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("origin", [HUB, url("net-0123abcd.pth")])
def test_the_error_for_missing_weights_names_the_place_where_they_are_found(tmp_path, origin):
    error = weights.missing("net", origin, tmp_path / "weights", "are not on this machine")
    (place,) = (Path(word.rstrip(",")) for word in str(error).split() if word.startswith(str(tmp_path)))
    assert origin.place in str(error) and "--weights" in str(error) and "\n" not in str(error)
    place.parent.mkdir()
    place.write_bytes(b"x")
    assert weights.find(origin, tmp_path / "weights") == place


@pytest.mark.usefixtures("offline")
def test_what_the_hubs_own_cache_holds_is_found(tmp_path):
    repository = tmp_path / "hub" / "models--timm--net.tag"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.safetensors").write_bytes(b"x")
    assert weights.find(HUB, tmp_path / "weights") == snapshot / "model.safetensors"


@pytest.mark.usefixtures("offline")
def test_what_torchs_own_cache_holds_is_found(tmp_path):
    file = tmp_path / "torch" / "hub" / "checkpoints" / "net-0123abcd.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert weights.find(url("net-0123abcd.pth"), tmp_path / "weights") == file


# Fetching


def named_by_content(content: bytes) -> str:
    return f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def test_fetched_weights_lie_where_they_are_found_again(tmp_path, answers):
    asked = answers(b"content")
    origin = url(named_by_content(b"content"))
    file = weights.fetch("net", origin, tmp_path / "weights")
    assert asked == [origin.place] and file.read_bytes() == b"content"
    assert weights.find(origin, tmp_path / "weights") == file


def test_a_fetch_is_tried_twice_and_then_told_with_the_reason(tmp_path, answers):
    asked = answers(*[urllib.error.URLError("Name or service not known")] * 2)
    with pytest.raises(WeightsError, match=r"could not be fetched \(Name or service not known\)\. Go online, or put"):
        weights.fetch("net", url("net.pth"), tmp_path / "weights")
    assert len(asked) == 2 and not list((tmp_path / "weights").iterdir())


def test_the_second_attempt_counts(tmp_path, answers):
    answers(TimeoutError("timed out"), b"content")
    assert weights.fetch("net", url("net.pth"), tmp_path).read_bytes() == b"content"


def test_a_hub_repository_with_the_other_file_name_is_fetched(tmp_path, answers):
    asked = answers(urllib.error.URLError("Not Found"), b"content")
    file = weights.fetch("net", HUB, tmp_path)
    assert file.name == "timm--net.tag.bin" and file.read_bytes() == b"content"
    assert [address.rsplit("/", 1)[-1] for address in asked] == ["model.safetensors", "pytorch_model.bin"]
    assert all("timm/net.tag" in address for address in asked)


def test_content_that_does_not_match_the_checksum_in_its_name_is_not_kept(tmp_path, answers):
    answers(b"other", b"other")
    with pytest.raises(WeightsError, match="checksum"):
        weights.fetch("net", url(named_by_content(b"content")), tmp_path)
    assert not list(tmp_path.glob("net*"))


@pytest.mark.parametrize("error", [http.client.BadStatusLine("rubbish"), http.client.IncompleteRead(b"abc", 5)])
def test_an_answer_that_is_not_http_is_told_like_no_answer(tmp_path, answers, error):
    answers(error, error)
    with pytest.raises(WeightsError, match="could not be fetched"):
        weights.fetch("net", url("net.pth"), tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path, answers):
    (tmp_path / "file").write_text("in the way")
    answers(b"content", b"content")
    with pytest.raises(WeightsError, match="could not be fetched"):
        weights.fetch("net", url("net.pth"), tmp_path / "file" / "weights")


def test_an_answer_that_breaks_off_is_not_kept(tmp_path, monkeypatch):
    class BreaksOff(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 100)

        def log_message(self, *given: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), BreaksOff) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with pytest.raises(WeightsError, match="could not be fetched"):
                weights.fetch(
                    "net", Origin("url", f"http://127.0.0.1:{server.server_port}/net.pth", ("net.pth",)), tmp_path
                )
        finally:
            server.shutdown()
            thread.join()
    assert not list(tmp_path.glob("net*"))


def test_weights_are_put_into_modules_that_ask_for_the_version_of_their_layout():
    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state, prefix, facts, *rest):
            if facts.get("version") != 3:
                raise ValueError("version?")
            super()._load_from_state_dict(state, prefix, facts, *rest)

    module, given = nn.Sequential(Versioned(2, 1)), {"0.weight": torch.ones(1, 2), "0.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match="version"):
        module.load_state_dict(given)
    weights.put(module, given)
    assert torch.equal(module[0].weight, given["0.weight"])
    weights.put(module, given, assign=True)
    assert module[0].weight.data_ptr() == given["0.weight"].data_ptr()
    with pytest.raises(RuntimeError, match="Missing key"):
        weights.put(module, {"0.weight": torch.ones(1, 2)})

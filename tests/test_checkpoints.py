"""Checkpoints come back bit for bit; what is damaged is noticed, and the one before is used."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headstart import checkpoints
from headstart.checkpoints import Checkpoint, read, remove, write
from headstart.errors import TrainingError

# The function-scoped fixtures (an own cache for each test) hold nothing that examples could share.
bounded = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def at(epoch: int, size: int = 5) -> Checkpoint:
    """A checkpoint that says which epoch it is of, in its tensors and in its facts."""
    tensors = {"model.weight": torch.full((size,), float(epoch)), "optimizer.0.step": torch.tensor(float(epoch))}
    return Checkpoint(tensors, {"phase": 0, "state": {"epoch": epoch, "best": 0.25}})


def epoch_of(folder: Path) -> int | None:
    """Of which epoch the folder's checkpoint is; its tensors and its facts say the same."""
    checkpoint = read(folder)
    if checkpoint is None:
        return None
    (epoch,) = {*checkpoint.tensors["model.weight"].tolist(), checkpoint.facts["state"]["epoch"]}
    return int(epoch)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"cache"}


# Round trips


@bounded
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)), max_size=5),
    st.dictionaries(st.text(max_size=6).filter(lambda name: name != "sha256"), JSON, max_size=4),
    st.integers(0, 2**32),
)
def test_tensors_of_any_type_and_shape_and_facts_come_back_bit_for_bit(tmp_path, kinds, facts, seed):
    random, tensors = np.random.default_rng(seed), {}
    for number, (dtype, shape) in enumerate(kinds):
        # Any bits: numbers that are none, infinities and minus zero too; of truth values, 0 and 1.
        tensor = torch.zeros(shape, dtype=dtype)
        if tensor.numel():
            raw = random.integers(0, 2 if dtype == torch.bool else 256, tensor.nbytes, dtype=np.uint8)
            tensor = torch.from_numpy(raw).view(dtype).reshape(shape)
        tensors[f"tensor {number}"] = tensor
    write(tmp_path, Checkpoint(tensors, facts))
    found = read(tmp_path)
    assert found.facts == facts and found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found.tensors[name]) == bits(tensor)


def test_tensors_in_any_memory_layout_and_with_gradients_come_back_by_their_values(tmp_path):
    plain = torch.randn(2, 3, 4, 5)
    tensors = {
        "channels last": plain.to(memory_format=torch.channels_last),
        "turned": plain[0, 0].T,
        "a part": plain[:, 1, ::2],
        "learning": torch.nn.Parameter(plain[0]),
    }
    write(tmp_path, Checkpoint(tensors, {}))
    found = read(tmp_path).tensors
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].is_contiguous() and not found[name].requires_grad


@pytest.mark.parametrize("name", ["0" * 64, "a" * 64, "__metadata", 'say "x"\n', "狗"])
def test_odd_names_come_back(tmp_path, name):
    write(tmp_path, Checkpoint({name: torch.ones(2)}, {name: name, "note": "0" * 64}))
    found = read(tmp_path)
    assert list(found.tensors) == [name] and found.facts == {name: name, "note": "0" * 64}


def test_an_optimiser_goes_on_from_what_was_kept_of_it(tmp_path):
    def begin():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), 0.1)

    def step(layer, optimizer, number):
        optimizer.zero_grad()
        layer(torch.full((1, 3), float(number))).sum().backward()
        optimizer.step()

    whole, optimizer = begin()
    for number in range(4):
        if number == 2:
            state = optimizer.state_dict()
            flat = {f"o.{n}.{key}": value for n, entry in state["state"].items() for key, value in entry.items()}
            write(tmp_path, Checkpoint({**flat, **whole.state_dict()}, {"groups": state["param_groups"]}))
        step(whole, optimizer, number)
    resumed, optimizer = begin()
    found = read(tmp_path)
    entries = {n: {key: found.tensors[f"o.{n}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")} for n in (0, 1)}
    optimizer.load_state_dict({"state": entries, "param_groups": found.facts["groups"]})
    resumed.load_state_dict({name: found.tensors[name] for name in ("weight", "bias")})
    for number in (2, 3):
        step(resumed, optimizer, number)
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)


def test_a_folder_without_a_checkpoint_has_none(tmp_path):
    assert read(tmp_path) is None


def test_the_one_before_is_kept_and_no_more(tmp_path):
    for epoch in range(4):
        write(tmp_path, at(epoch))
    assert names(tmp_path) == {checkpoints.NAME, checkpoints.PREVIOUS}
    assert epoch_of(tmp_path) == 3
    (tmp_path / checkpoints.NAME).unlink()  # as between the two renames
    assert epoch_of(tmp_path) == 2


def test_removing_takes_checkpoints_away_and_nothing_else(tmp_path):
    write(tmp_path, at(0))
    write(tmp_path, at(1))
    (tmp_path / checkpoints.NAME).write_bytes(b"")
    assert epoch_of(tmp_path) == 0
    (tmp_path / f"{checkpoints.NAME}.new").write_bytes(b"half")
    (tmp_path / "model.safetensors").write_bytes(b"kept")
    remove(tmp_path)
    assert names(tmp_path) == {"model.safetensors"}
    remove(tmp_path)


# What is in the file


def test_the_file_is_safetensors_and_json_and_no_pickle(tmp_path, monkeypatch):
    def forbidden(*given, **named):
        raise AssertionError("pickled")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "dumps")):
        monkeypatch.setattr(module, name, forbidden)
    write(tmp_path, at(7))
    assert epoch_of(tmp_path) == 7
    content = (tmp_path / checkpoints.NAME).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert json.loads(header.pop("__metadata__")["checkpoint"])["state"]["epoch"] == 7
    tensors, end = content[8 + length :], 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        assert entry["dtype"] == "F32" and entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
        assert set(np.frombuffer(tensors[slice(*entry["data_offsets"])], np.float32)) == {7.0}
    assert len(header) == 2 and end == len(tensors)


def test_a_pickle_in_place_of_a_checkpoint_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    write(tmp_path, at(0))
    write(tmp_path, at(1))
    (tmp_path / checkpoints.NAME).write_bytes(pickle.dumps(Bomb()))
    assert epoch_of(tmp_path) == 0
    assert not (tmp_path / "exploded").exists()


# Damage


@pytest.fixture
def pair(tmp_path):
    """A folder with two checkpoints, and a function that puts other content in place of the last one."""
    for epoch in (1, 2):
        write(tmp_path, at(epoch))
    content = {name: (tmp_path / name).read_bytes() for name in (checkpoints.NAME, checkpoints.PREVIOUS)}

    def lay(changed: bytes) -> Path:
        (tmp_path / checkpoints.NAME).write_bytes(changed)
        (tmp_path / checkpoints.PREVIOUS).write_bytes(content[checkpoints.PREVIOUS])
        return tmp_path

    return content[checkpoints.NAME], lay


def flip(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_a_flipped_bit_in_any_byte_is_noticed_and_the_one_before_is_used(pair):
    content, lay = pair
    assert epoch_of(lay(content)) == 2
    for place in range(len(content)):
        assert epoch_of(lay(flip(content, place, place * 5 % 8))) == 1, place


@bounded
@given(st.data())
def test_any_changed_bits_are_noticed_wherever_they_are(pair, data):
    content, lay = pair
    length = 8 + int.from_bytes(content[:8], "little")
    start, end = data.draw(st.sampled_from([(0, 8), (8, length), (length, len(content))]))
    places = data.draw(st.sets(st.tuples(st.integers(start, end - 1), st.integers(0, 7)), min_size=1, max_size=4))
    changed = content
    for place, bit in places:
        changed = flip(changed, place, bit)
    assert epoch_of(lay(changed)) == 1


def test_a_checkpoint_that_is_cut_short_anywhere_or_has_more_behind_it_is_noticed(pair):
    content, lay = pair
    for kept in range(len(content)):
        assert epoch_of(lay(content[:kept])) == 1, kept
    assert epoch_of(lay(content + b"\0")) == 1


@pytest.mark.parametrize("header", [b"[]", b"7", b"{}", b'{"__metadata__": {"checkpoint": "[]"}}', b"[" * 100_000])
def test_a_header_that_says_something_else_is_damage_and_no_failure(pair, header):
    _, lay = pair
    assert epoch_of(lay(len(header).to_bytes(8, "little") + header)) == 1


def test_damage_is_told_in_one_line_that_names_the_file(pair, caplog):
    content, lay = pair
    folder = lay(flip(content, len(content) - 1, 0))
    with caplog.at_level(logging.WARNING):
        assert epoch_of(folder) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    assert str(folder / checkpoints.NAME) in record.getMessage() and "damaged" in record.getMessage()
    assert "the one before is used" in record.getMessage()


def test_nothing_is_told_of_checkpoints_that_are_whole(pair, caplog):
    content, lay = pair
    assert epoch_of(lay(content)) == 2
    assert not caplog.records


def test_where_both_are_damaged_there_is_none_and_both_are_named(pair, caplog):
    content, lay = pair
    folder = lay(content[:-1])
    (folder / checkpoints.PREVIOUS).write_bytes(b"")
    assert read(folder) is None
    told = " ".join(record.getMessage() for record in caplog.records)
    assert str(folder / checkpoints.NAME) in told and str(folder / checkpoints.PREVIOUS) in told


def test_no_checkpoint_is_promised_where_none_is_left(tmp_path, caplog):
    write(tmp_path, at(0))
    (tmp_path / checkpoints.NAME).write_bytes(b"")
    assert read(tmp_path) is None
    (record,) = caplog.records
    assert "the one before is used" not in record.getMessage()


def test_a_damaged_checkpoint_does_not_push_the_good_one_out(pair):
    content, lay = pair
    folder = lay(flip(content, 200, 3))
    assert epoch_of(folder) == 1
    write(folder, at(5))
    assert epoch_of(folder) == 5
    (folder / checkpoints.NAME).write_bytes(b"damaged too")
    assert epoch_of(folder) == 1


# Failing to write


def full(*given):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_with_what_is_needed_and_free_and_the_last_one_stays(tmp_path, monkeypatch):
    write(tmp_path, at(1))
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        free = shutil.disk_usage(tmp_path).free / 2**20
        with pytest.raises(TrainingError) as caught:
            write(tmp_path, at(2, size=3 * 2**18))
    text = str(caught.value)
    found = re.search(r"No space left on device\): ([\d.]+) MiB are needed, ([\d.]+) MiB are free\. ", text)
    assert float(found[1]) == pytest.approx(3.0, abs=0.05)
    assert float(found[2]) == pytest.approx(free, rel=0.2)
    assert str(tmp_path / checkpoints.NAME) in text and "\n" not in text and caught.value.exit_status == 1
    assert names(tmp_path) == before and epoch_of(tmp_path) == 1
    write(tmp_path, at(3))
    assert epoch_of(tmp_path) == 3


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="files have no limit there")
def test_a_write_that_ends_half_way_leaves_no_part_of_a_file_and_the_last_one(tmp_path):
    import resource

    write(tmp_path, at(1))
    before, limits = names(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"File too large.* 0\.4 MiB are needed"):
            write(tmp_path, at(2, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == before and epoch_of(tmp_path) == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_whichever_rename_fails_one_of_the_two_is_whole(tmp_path, monkeypatch, failing, error):
    for epoch in (1, 2):
        write(tmp_path, at(epoch))
    renames, replace = [], Path.replace

    def rename(path, target):
        renames.append(target)
        if len(renames) == failing + 1:
            raise error
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", rename)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else TrainingError):
            write(tmp_path, at(3))
    assert len(renames) == failing + 1
    assert epoch_of(tmp_path) == 2
    write(tmp_path, at(4))
    assert epoch_of(tmp_path) == 4


def test_where_it_may_not_be_written_that_is_said(tmp_path):
    write(tmp_path, at(1))
    (tmp_path / f"{checkpoints.NAME}.new").mkdir()  # in the way, whoever writes
    with pytest.raises(TrainingError, match=r"cannot be written \(.*directory"):
        write(tmp_path, at(2))
    assert epoch_of(tmp_path) == 1


def test_a_folder_that_was_taken_away_is_an_error_of_ours(tmp_path):
    with pytest.raises(TrainingError, match="No such file"):
        write(tmp_path / "gone", at(1))

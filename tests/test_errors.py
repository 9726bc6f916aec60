import copy
import pickle
from pathlib import Path

import pytest

from headstart import errors
from headstart.errors import HeadstartError


def every(kind=HeadstartError):
    """A class and all below it."""
    return [kind, *(below for child in kind.__subclasses__() for below in every(child))]


WHAT = {
    "HeadstartError": ("error", 1),
    "UsageError": ("usage", 2),
    "ConfigError": ("settings", 2),
    "DataError": ("data", 2),
    "UnreadableImage": ("picture", 1),
    "BackboneError": ("backbone", 2),
    "WeightsError": ("weights", 2),
    "RunError": ("run", 2),
    "TrainingError": ("training", 1),
    "DivergedError": ("training", 1),
    "ModelFileError": ("model", 2),
    "CorruptModel": ("model", 2),
    "ForeignModel": ("model", 2),
    "NewerModel": ("model", 2),
}


def test_the_tree_of_errors_with_what_they_say_and_the_exit_status():
    assert {kind.__name__: (kind.what, kind.exit_status) for kind in every()} == WHAT


def test_all_errors_live_in_one_module():
    assert {kind.__module__ for kind in every()} == {errors.__name__}


@pytest.mark.parametrize("kind", every(), ids=lambda kind: kind.__name__)
def test_the_text_is_what_subject_why_and_remedy(kind):
    error = kind(Path("a") / "b.jpg", "cannot be read", "Give another.")
    assert str(error) == f"{kind.what}: {Path('a') / 'b.jpg'}: cannot be read. Give another."
    assert (error.subject, error.why, error.remedy) == (str(Path("a") / "b.jpg"), "cannot be read", "Give another.")


@pytest.mark.parametrize(
    ("why", "text"),
    [
        ("is wrong", "error: x: is wrong. Change it."),
        ("is wrong.", "error: x: is wrong. Change it."),
        ("is unknown, did you mean y?", "error: x: is unknown, did you mean y? Change it."),
    ],
)
def test_a_reason_ends_with_one_mark(why, text):
    assert str(HeadstartError("x", why, "Change it.")) == text


@pytest.mark.parametrize(
    ("subject", "why"), [("two\nlines.jpg", "is wrong"), ("a\r\nb", "is wrong"), ("x", "broke\nin two lines")]
)
def test_the_text_is_one_line_whatever_a_file_is_called(subject, why):
    assert len(str(HeadstartError(subject, why, "Change it.")).splitlines()) == 1


@pytest.mark.parametrize("kind", every(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("travel", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_an_error_travels_between_processes(kind, travel):
    error = kind("a/b.jpg", "is odd, did you mean c?", "Change it.")
    again = travel(error)
    assert type(again) is kind
    assert str(again) == str(error)
    assert (again.subject, again.why, again.remedy) == (error.subject, error.why, error.remedy)


def test_the_kinds_of_a_model_file_that_cannot_be_loaded_are_caught_as_one():
    for kind in (errors.CorruptModel, errors.ForeignModel, errors.NewerModel):
        with pytest.raises(errors.ModelFileError):
            raise kind("m.safetensors", "is wrong", "Change it.")

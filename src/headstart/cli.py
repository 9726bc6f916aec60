"""The command line: one verb per public function. What programs read goes to stdout, the rest to stderr."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import App, CycloptsError, Parameter

from headstart import __version__, display, processes, terminal
from headstart import config as configs
from headstart.errors import BackboneError, HeadstartError, UsageError

if TYPE_CHECKING:
    from headstart.model import Classifier, Prediction

T = TypeVar("T")
app = App(
    name="headstart",
    help="Turn a folder of labelled pictures into an image classifier that can be trusted.",
    version=__version__,
    version_flags=["--version"],
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)


def _flags(*names: str) -> type:
    """A dataclass with an optional field for each setting named, so that flags are settings; None: not given."""
    fields = []
    for entry in (configs.settings()[name] for name in names):
        default = f" [default: {entry.default}]" if entry.default != "" else ""
        parameter = Parameter(help=entry.help + default, show_default=False, negative=(), group="Settings")
        fields.append((entry.name, Annotated[entry.type | None, parameter], dataclasses.field(default=None)))
    return dataclasses.make_dataclass("Flags", fields, frozen=True, namespace={"__module__": __name__})


_AllFlags = _flags(*configs.settings())
_DataFlags = _flags(*configs.settings("data"), "cache")
_EvaluateFlags = _flags(*configs.settings("data"), "device", "precision", "cache", "resamples")
_RankFlags = _flags(
    *configs.settings("data"),
    *("backbone", "weights", "size", "fit", "device", "precision", "cache", "seed", "time_budget"),
)
_PredictFlags = _flags("device", "precision")
Flat = Parameter(name="*")


@app.command
def train(
    data: str,
    /,
    *,
    out: str | None = None,
    config: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    settings: Annotated[_AllFlags, Flat] = _AllFlags(),  # type: ignore[valid-type]
) -> None:
    """Train a classifier on a folder of class folders, an archive of them, or a table.

    Parameters
    ----------
    data
        Folder with a folder for each class (or train/val/test with class folders), a .zip or .tar of one, or a .csv or
        .tsv file.
    out
        Run folder that everything is written to [default: runs/NAME-N, the next free].
    config
        TOML file with settings, such as a run folder's config.toml; flags win over it.
    resume
        Keep a finished run as it is instead of refusing its folder.
    dry_run
        Stop when the plan is made, and print it; the same command without this goes on from there.
    """
    from headstart import training

    if out == "":
        raise UsageError("--out", "is empty", "Name a folder.")
    with terminal.show_progress(quiet=not processes.find_world().first) as track:
        run = training.train(data, out, config=config, resume=resume, dry_run=dry_run, track=track, **_given(settings))
    if not processes.find_world().first:
        return
    if run is None:
        print(f"{display.shown(str(out))} holds this run, finished; nothing was changed.")
    elif isinstance(run, training.Run):
        print(display.summary(run, data))
    else:
        print(display.planned(run))


@app.command
def evaluate(
    run: str,
    /,
    *,
    data: str | None = None,
    json: Path | None = None,
    settings: Annotated[_EvaluateFlags, Flat] = _EvaluateFlags(),  # type: ignore[valid-type]
) -> None:
    """Measure a classifier, on its own report pictures or on others.

    Parameters
    ----------
    run
        Run folder or model.safetensors.
    data
        Labelled pictures, all of which count [default: the run's own report pictures].
    json
        File that the figures are written to, as in metrics.json.
    """
    from headstart import training

    terminal.check_place(json)
    with terminal.show_progress() as track:
        result = training.evaluate(run, data, track=track, **_given(settings))
    for source, why in result.unreadable.items():
        terminal.say(f"left out: {display.shown(source)}: {why}")
    if result.fitted_on:
        terminal.say(f"{result.fitted_on} of these pictures were used for training: the figures flatter")
    elif result.fitted_on is None:
        terminal.say("whether these pictures were used for training is not known")
    print(display.figures(result))
    if json is not None:
        terminal.write_json(json, result.to_json())


@app.command
def predict(
    run: str,
    paths: Annotated[list[str], Parameter(consume_multiple=True)],
    /,
    *,
    top: int | None = None,
    lang: Literal["en", "zh"] | None = None,
    format: display.Format = "table",
    out: Path | None = None,
    draw: Path | None = None,
    settings: Annotated[_PredictFlags, Flat] = _PredictFlags(),  # type: ignore[valid-type]
) -> int:
    """Say what pictures show.

    Parameters
    ----------
    run
        Run folder, model.safetensors, or `imagenet` for the stock classifier with a thousand classes.
    paths
        Picture files, folders, globs, archives (.zip, .tar), and what lies in them, as z.zip::cats/1.jpg.
    top
        How many of the most probable classes to give [default: 3 in a table, else all].
    lang
        Language of the stock classifier's class names, English or Chinese [default: en].
    format
        table; json, one object a line; or csv.
    out
        File to write to instead of the terminal.
    draw
        File (.png or .svg) to draw in: one picture beside its bars, or a grid of the first pictures.
    """
    from headstart import model

    if top is not None and top < 1:
        raise UsageError("--top", f"must be 1 or more, not {top}", "See headstart predict --help.")
    if draw is not None:
        terminal.check_place(draw)
    classifier = model.load(run, lang)
    with terminal.show_progress(out) as track:
        seen: list[Prediction] = []
        predictions = _remember(model.predict(classifier, paths, track=track, **_given(settings)), seen, draw)
        with terminal.open_output(out) as file:
            read, failed = display.write_predictions(predictions, classifier.classes, format, top, file)
    if draw is not None:
        _draw(draw, seen, classifier, top or 3)
    if failed:
        terminal.say(f"{failed} of {read + failed} could not be read")
    return 1 if failed and not read else 0


def _remember(predictions: Iterable[Prediction], seen: list[Prediction], draw: Path | None) -> Iterator[Prediction]:
    """The predictions as they come; where they are to be drawn, the first of them are kept."""
    if draw is None:
        yield from predictions
        return
    from headstart.pictures import MOST_TILES

    for prediction in predictions:
        if len(seen) <= MOST_TILES:  # one more tells the drawing that there are more
            seen.append(prediction)
        yield prediction


def _draw(file: Path, seen: Sequence[Prediction], classifier: Classifier, top: int) -> None:
    from headstart import labels, pictures

    if len(seen) == 1 and not seen[0].error:
        names = labels.find_names(classifier.classes, "zh")
        pictures.draw_answer(seen[0].source, seen[0], file, top, names, classifier.limits)
    else:
        entries: list[pictures.Entry] = [(prediction.source, prediction, None) for prediction in seen]
        pictures.draw_predictions(entries, file, limits=classifier.limits)


@app.command
def audit(
    data: str,
    /,
    *,
    json: Path | None = None,
    settings: Annotated[_DataFlags, Flat] = _DataFlags(),  # type: ignore[valid-type]
) -> None:
    """Say what is wrong with a data set: unreadable pictures, duplicates, leaks, small classes.

    Parameters
    ----------
    data
        Folder of class folders, archive of one, or table.
    json
        File that the findings are written to.
    """
    from headstart import training

    terminal.check_place(json)
    with terminal.show_progress() as track:
        result = training.audit(data, track=track, **_given(settings))
    print(display.findings(result))
    if json is not None:
        terminal.write_json(json, result.to_json())


@app.command
def models(query: str = "", /) -> None:
    """List the networks that can be adapted, and whether their weights are here already.

    Parameters
    ----------
    query
        Part of a name, or a pattern with * and ?.
    """
    from headstart import backbones

    listed = backbones.list_models(query)
    if not listed:
        raise BackboneError(query, "no network has such a name", "Try a shorter part of it.")
    for entry in listed:
        here = "here" if entry.here else "to be fetched"
        details = f"{entry.parameters / 1e6:8.1f} M parameters  {entry.size} px" if entry.parameters else ""
        print(f"{entry.name:<48} {here:<14} {details}".rstrip())


@app.command
def rank(
    data: str,
    /,
    *,
    json: Path | None = None,
    settings: Annotated[_RankFlags, Flat] = _RankFlags(),  # type: ignore[valid-type]
) -> None:
    """Compare the networks whose weights are on this machine on your pictures, and recommend one.

    Parameters
    ----------
    data
        Folder of class folders, archive of one, or table.
    json
        File that the figures are written to.
    """
    from headstart import comparison

    terminal.check_place(json)
    with terminal.show_progress() as track:
        ranked = comparison.rank(data, track=track, **_given(settings))
    print(display.ranking(ranked, comparison.recommend(ranked), data, _given(settings)))
    if json is not None:
        terminal.write_json(json, [entry.to_json() for entry in ranked])


@app.command
def demo(*, out: str = "runs/demo") -> None:
    """Show the main job on handwritten digits, offline, in a minute or less.

    Parameters
    ----------
    out
        Folder that the pictures and the run are written to.
    """
    from headstart import demonstration

    with terminal.show_progress() as track:
        run, predictions = demonstration.demo(out, track=track)
    print(display.summary(run, os.path.join(out, "digits")))
    print("\n" + demonstration.draw(predictions))
    print("\nNow with your own pictures, a folder for each class:\n")
    print("  headstart train PICTURES --out runs/mine")
    print("  headstart predict runs/mine PICTURE...")


recipes = App(name="recipe", help="List, show or run the tutorials' experiments, done right.")
app.command(recipes)


@recipes.command(name="list")
def list_recipes() -> None:
    """List the recipes."""
    from headstart import cookbook

    for name, title in cookbook.list_recipes().items():
        print(f"{name:<10} {title}")


@recipes.command(name="show")
def show_recipe(name: str, /) -> None:
    """Print a recipe: its command, machine, time and expected result, and what it does.

    Parameters
    ----------
    name
        ants-bees, imagewoof, dogs-cats, scenes, birds or identify.
    """
    from headstart import cookbook

    print(cookbook.show(name), end="")


@recipes.command(name="run")
def recipe(
    name: str,
    /,
    *,
    data: str,
    out: str,
    settings: Annotated[_AllFlags, Flat] = _AllFlags(),  # type: ignore[valid-type]
) -> None:
    """Run a recipe; its finished runs are kept when it is run again.

    Parameters
    ----------
    name
        ants-bees, imagewoof, dogs-cats, scenes, birds or identify.
    data
        The pictures, as for train; for identify, a picture or a folder of them.
    out
        Folder for the recipe's runs and drawings.
    """
    from headstart import cookbook

    with terminal.show_progress() as track:
        text = cookbook.recipe(name, data, out, track=track, **_given(settings))
    print(display.shown_lines(text))
    print(f"\nwritten to {display.shown(out)}")


@app.command
def fetch(name: str, /, *, out: str | None = None) -> None:
    """Fetch a tutorial's data set, checked and unpacked.

    Parameters
    ----------
    name
        hymenoptera, imagewoof, dogs-cats or birds.
    out
        Folder that it is unpacked into [default: data/NAME].
    """
    from headstart import tutorial_sets

    with terminal.show_progress() as track:
        folder = tutorial_sets.fetch(name, out, track=track)
    print(display.shown(str(folder)))


def run() -> None:
    """The command: as `main`, but it ends at once. Taking torch apart at exit takes half a second, for nothing."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    _set_up()
    try:
        status = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback

            traceback.print_exception(error)
        return _report(error, words)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, so that it unwinds as an interrupt does."""


def _set_up() -> None:
    def terminate(*_: object) -> None:
        raise _Terminated

    with contextlib.suppress(ValueError):  # only the main thread may set handlers; others do without
        signal.signal(signal.SIGTERM, terminate)
    codecs.register_error("headstart", terminal.encode_odd)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="headstart")
    logger = logging.getLogger("headstart")
    logger.setLevel(logging.INFO if processes.find_world().first else logging.ERROR)
    if not any(isinstance(handler, terminal.Lines) for handler in logger.handlers):
        logger.addHandler(terminal.Lines())
    # Pillow warns of oddities in pictures that it reads all the same.
    import warnings

    warnings.filterwarnings("ignore", module=r"PIL\.")


def _report(error: BaseException, words: Sequence[str]) -> int:
    """One line on stderr for an error; the exit status. Of several processes, the first to fail speaks."""
    world = processes.find_world()
    if world.size > 1 and not processes.speaks_first(world.rank):
        interrupted = 143 if isinstance(error, _Terminated) else 130 if isinstance(error, KeyboardInterrupt) else 1
        return getattr(error, "exit_status", interrupted)
    if isinstance(error, HeadstartError):
        terminal.say(f"error: {display.shown(str(error))}")
        return error.exit_status
    if isinstance(error, CycloptsError):
        text = " ".join(str(error).split())
        verb = words[0] if words and not words[0].startswith("-") else ""
        command = display.shown(" ".join(("headstart", *words))[:200])
        terminal.say(f"error: usage: {command}: {display.shown(text)} See headstart {verb} --help.")
        return 2
    if isinstance(error, KeyboardInterrupt):
        again = "begins anew" if words[:1] == ["predict"] else "goes on from there"
        terminal.say(f"interrupted: what was done so far is kept, the same command {again}")
        return 143 if isinstance(error, _Terminated) else 130
    if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, OSError):
        name = display.shown(str(error.filename or "system"))
        terminal.say(f"error: file: {name}: {error.strerror or error}. Check the disk and permissions.")
        return 1
    text = " ".join(str(error).split()) or "no reason given"
    terminal.say(
        f"error: unexpected: {type(error).__name__}: {display.shown(text)}. Please report this, with --debug's output."
    )
    return 1


def _given(settings: Any) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}

"""Drawings to look at: what a network is shown, what it answers, and one answer with its probabilities.

Nothing here sees a network, only arrays and predictions: a drawing cannot leave a network in another mode.
"""

from __future__ import annotations

import bisect
import functools
import io
import logging
import math
import os
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headstart.errors import UnreadableImage, UsageError
from headstart.files import write_whole
from headstart.images import Limits, Preprocess, open_image

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.text import Text

    from headstart.model import Prediction

log = logging.getLogger(__name__)

Source = bytes | str | os.PathLike[str]  # a picture's content or its file
Entry = tuple[Source, "Prediction", "str | Sequence[str] | None"]  # the last: its true labels, None if unknown

MOST_TILES = 64
MOST_BARS = 20

# Lengths are in pixels of a PNG; an SVG has the same proportions.
_DPI = 144
_TILE = 224  # what most networks are shown, pixel for pixel
_GAP = 16
_TEXT = 15
_LINE = 22
_BAR = 22
_CHART = 448  # the side of a picture that stands beside bars, and their width

# Blue and vermilion of Okabe and Ito's palette, which colour-blind people tell apart.
_BLUE, _VERMILION, _PALE, _GREY, _DARK = "#0072b2", "#d55e00", "#9fc8e3", "#6b6b6b", "#1a1a1a"
_FRAMES = {"right": (_BLUE, 4, "-"), "wrong": (_VERMILION, 4, "--"), "unknown": ("#c8c8c8", 1, "-")}
_MARKS = {"right": "✓ ", "wrong": "✗ ", "unknown": ""}

_LATIN = "DejaVu Sans"  # comes with matplotlib
# Families with Chinese. Older matplotlibs know the files of Noto Sans CJK by their first face, the Japanese one.
_LINUX = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei")
_WINDOWS = ("Microsoft YaHei", "SimHei", "SimSun")
_MACOS = ("PingFang SC", "Hiragino Sans GB", "Heiti SC", "Heiti TC", "STHeiti", "Songti SC", "Arial Unicode MS")
_OTHERS = ("Noto Sans CJK JP", "Noto Serif CJK SC", "Droid Sans Fallback", "AR PL UMing CN", "AR PL UKai CN")
_CHINESE = _LINUX + _WINDOWS + _MACOS + _OTHERS
_EXTRA = "second name"  # marks text that may be left out where no font has it


@dataclass(frozen=True)
class _Tile:
    image: Image.Image | None  # None: it could not be read
    lines: tuple[str, ...]  # beneath it
    verdict: str = "unknown"
    reason: str = ""  # why it could not be read


def denormalise(values: torch.Tensor | NDArray[np.floating[Any]], preprocess: Preprocess) -> NDArray[np.uint8]:
    """The pixels of a network's input: the inverse of `Preprocess.normalise`.

    Args:
        values: (n, 3, side, side), of any float type and on any device; exact from float32 on.
        preprocess: what they were normalised with.

    Returns:
        uint8 of shape (n, side, side, 3).
    """
    array = values if isinstance(values, np.ndarray) else values.detach().float().cpu().numpy()
    mean, std = (np.asarray(three, np.float32).reshape(1, 3, 1, 1) * 255 for three in (preprocess.mean, preprocess.std))
    pixels: NDArray[np.uint8] = np.rint(array * std + mean).clip(0, 255).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


# What is drawn


def draw_batch(
    pictures: NDArray[np.uint8], labels: Sequence[str], file: str | os.PathLike[str], columns: int | None = None
) -> None:
    """Draw a batch as the network sees it: a grid of pictures, each with its label beneath.

    Args:
        pictures: uint8 of shape (n, side, side, 3), varied or not, before normalisation (else see `denormalise`); of
            more than `MOST_TILES` the first are drawn, and the number of the others is said.
        labels: n names.
        file: where to; .png or .svg.
        columns: of the grid; None: as many as rows, at most 8.

    Raises:
        UsageError: for another file ending, no pictures, other arrays than uint8 pictures, or not as many labels.
    """
    _check_grid(file, len(pictures), columns)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        why = f"are {pictures.dtype} of shape {pictures.shape}, not uint8 of shape (n, side, side, 3)"
        raise UsageError("pictures", why, "Give them before they are normalised, or give what denormalise makes.")
    if len(pictures) != len(labels):
        why = f"are {len(pictures)}, and the labels {len(labels)}"
        raise UsageError("pictures", why, "Give each picture one label.")
    shown = zip(pictures[:MOST_TILES], labels[:MOST_TILES], strict=True)
    tiles = [_Tile(_fit(Image.fromarray(pixels), _TILE), (_fit_text(label),)) for pixels, label in shown]
    _draw_grid(tiles, _count_others(len(pictures)), file, columns)


def draw_predictions(
    entries: Sequence[Entry],
    file: str | os.PathLike[str],
    columns: int | None = None,
    limits: Limits = Limits(),
) -> None:
    """Draw a grid of pictures with the label that each was given, its probability, and whether that is right.

    Right ones have a tick and a blue frame, wrong ones a cross, a dashed vermilion frame and the true label. A picture
    that cannot be read is drawn as a grey tile with the reason.

    Args:
        entries: (picture: file or content, prediction, true labels or None where they are unknown); of more than
            `MOST_TILES` the first are drawn, and the number of the others is said.
        file: where to; .png or .svg.
        columns: of the grid; None: as many as rows, at most 8.
        limits: what pictures are too large to be opened.

    Raises:
        UsageError: for another file ending or no entries.
    """
    _check_grid(file, len(entries), columns)
    tiles = [_make_tile(*entry, limits) for entry in entries[:MOST_TILES]]
    verdicts = {tile.verdict for tile in tiles}
    legend = [f"{_MARKS[verdict]}{verdict}" for verdict in ("right", "wrong") if verdict in verdicts]
    footer = [", ".join(legend), *_count_others(len(entries))] if legend else _count_others(len(entries))
    _draw_grid(tiles, footer, file, columns)


def draw_answer(
    picture: Source,
    prediction: Prediction,
    file: str | os.PathLike[str],
    top: int = 3,
    names: Mapping[str, str] | None = None,
    limits: Limits = Limits(),
) -> None:
    """Draw a picture beside the bars of its most probable classes.

    Args:
        picture: its file or content.
        prediction: the answer; bars of labels that were given are darker.
        file: where to; .png or .svg.
        top: how many classes, at most `MOST_BARS`.
        names: class -> its name in another language, which is written after it.
        limits: what is too large to be opened.

    Raises:
        UsageError: for another file ending or a top below 1.
        UnreadableImage: where the picture cannot be opened or the prediction says that it could not.
    """
    _check_ending(file)
    if top < 1:
        raise UsageError("top", f"is {top}", "Give 1 or more.")
    if prediction.error:
        raise UnreadableImage(prediction.source, prediction.error, "Replace it or leave it out.")
    image = _fit(open_image(picture, limits, prediction.source), _CHART)
    ranked = list(prediction.probabilities.items())[: min(top, MOST_BARS)]
    bars_high, axis_high = len(ranked) * (_LINE + _BAR + _GAP), 3 * _LINE
    width = 2 * _CHART + 4 * _GAP + 4 * _TEXT
    height = 2 * _GAP + max(image.height + _LINE, bars_high + axis_high)
    figure, canvas = _open_canvas(width, height)
    _draw_image(canvas, image, _GAP + (_CHART - image.width) // 2, _GAP)
    _write(canvas, _GAP, _GAP + image.height + _LINE, _fit_text(_name(prediction), _CHART), _GREY)
    place = ((3 * _GAP + _CHART) / width, 1 - (_GAP + bars_high) / height, _CHART / width, bars_high / height)
    chart = _open_chart(figure, place, bars_high)
    for row, (label, probability) in enumerate(ranked):
        top_edge = row * (_LINE + _BAR + _GAP)
        _draw_bar(chart, top_edge, label, (names or {}).get(label, ""), probability, label in prediction.labels)
    _save(figure, file)


def _make_tile(picture: Source, prediction: Prediction, truth: str | Sequence[str] | None, limits: Limits) -> _Tile:
    true = None if truth is None else {truth} if isinstance(truth, str) else set(truth)
    image, reason = None, prediction.error
    if not reason:
        try:
            image = _fit(open_image(picture, limits, prediction.source), _TILE)
        except UnreadableImage as error:
            reason = error.why
    verdict = "unknown"
    if true is not None and not prediction.error:
        verdict = "right" if set(prediction.labels) == true else "wrong"
    lines = [] if prediction.error else [_describe(prediction, _MARKS[verdict])]
    if true is not None and verdict != "right":
        lines.append("true: " + _fit_text(", ".join(sorted(true)) or "(none)", _TILE - _measure("true: ")))
    return _Tile(image, (*lines, _fit_text(_name(prediction))), verdict, reason)


def _describe(prediction: Prediction, mark: str) -> str:
    """The labels that were given and their probabilities, in the room beneath a tile."""
    given = [(label, f" {prediction.probabilities[label]:.1%}") for label in prediction.labels]
    if len(given) == 1:
        ((label, probability),) = given
        return mark + _fit_text(label, _TILE - _measure(mark + probability)) + probability
    text = ", ".join(label + probability for label, probability in given) or "(none)"
    return mark + _fit_text(text, _TILE - _measure(mark))


def _name(prediction: Prediction) -> str:
    return Path(prediction.source).name


def _count_others(count: int) -> list[str]:
    return [f"... and {count - MOST_TILES} more"] if count > MOST_TILES else []


def _fit(image: Image.Image, side: int) -> Image.Image:
    """A picture as large as fits into a square; small ones keep their pixels as blocks that can be seen."""
    longest = max(image.size)
    wide, high = (max(1, round(length * side / longest)) for length in image.size)
    resample = Image.Resampling.NEAREST if 2 * longest <= side else Image.Resampling.LANCZOS
    return image.resize((wide, high), resample)


# How it is drawn: on axes that cover the figure, whose unit is the pixel, from the upper left corner


def _draw_grid(
    tiles: Sequence[_Tile], footer: Sequence[str], file: str | os.PathLike[str], columns: int | None
) -> None:
    columns = min(columns or min(8, math.ceil(math.sqrt(len(tiles)))), len(tiles))
    wide, high = _TILE + _GAP, _TILE + _GAP + _LINE * max(len(tile.lines) for tile in tiles)
    bottom = _GAP + high * math.ceil(len(tiles) / columns)
    figure, canvas = _open_canvas(_GAP + wide * columns, bottom + _LINE * len(footer) + (_GAP if footer else 0))
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        _draw_tile(canvas, tile, _GAP + wide * column, _GAP + high * row)
    for number, line in enumerate(footer, 1):
        _write(canvas, _GAP, bottom + _LINE * number, line)
    _save(figure, file)


def _open_canvas(width: int, height: int) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, width), ylim=(height, 0))
    canvas.axis("off")
    return figure, canvas


def _draw_tile(canvas: Axes, tile: _Tile, left: int, top: int) -> None:
    if tile.image is not None:
        aside, down = (_TILE - tile.image.width) // 2, (_TILE - tile.image.height) // 2
        _draw_image(canvas, tile.image, left + aside, top + down)
    else:
        _draw_reason(canvas, tile.reason, left, top)
    colour, thickness, style = _FRAMES[tile.verdict]
    around, side = thickness / 2, _TILE + thickness  # no pixel of the picture is hidden
    line = {"edgecolor": colour, "linewidth": _points(thickness), "linestyle": style}
    canvas.add_patch(_rectangle(left - around, top - around, side, fill=False, **line))
    for number, text in enumerate(tile.lines, 1):
        _write(canvas, left, top + _TILE + number * _LINE, text, _DARK if number == 1 else _GREY)


def _draw_reason(canvas: Axes, reason: str, left: int, top: int) -> None:
    """Draw a grey square that says why there is no picture."""
    canvas.add_patch(_rectangle(left, top, _TILE, facecolor="#d9d9d9"))
    lines = textwrap.wrap(_escape(f"unreadable: {reason}"), 24)[: _TILE // _LINE - 1]
    for number, line in enumerate(lines, 1):
        _write(canvas, left + _GAP / 2, top + number * _LINE, _fit_text(line, _TILE - _GAP))


def _rectangle(left: float, top: float, side: float, **style: Any) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((left, top), side, side, snap=False, **style)


def _draw_image(canvas: Axes, image: Image.Image, left: int, top: int) -> None:
    """Draw a picture, one of its pixels on one of the drawing's."""
    extent = (left, left + image.width, top + image.height, top)
    canvas.imshow(np.asarray(image), extent=extent, aspect="auto", interpolation="nearest")


def _open_chart(figure: Figure, place: tuple[float, float, float, float], height: int) -> Axes:
    """Axes for bars from 0 to 1; their vertical unit is the pixel."""
    chart = figure.add_axes(place)
    chart.set(xlim=(0, 1), ylim=(height, 0), yticks=[])
    chart.set_xlabel("probability", fontsize=_points(_TEXT))
    chart.tick_params(labelsize=_points(_TEXT))
    chart.spines[["top", "right"]].set_visible(False)
    chart.set_axisbelow(True)
    chart.grid(axis="x", alpha=0.25)
    return chart


def _draw_bar(chart: Axes, top: int, label: str, second: str, probability: float, given: bool) -> None:
    """Draw one class: its names, its bar beneath, its probability at the right."""
    chart.barh(top + _LINE + _BAR / 2, probability, _BAR, color=_BLUE if given else _PALE)
    _write(chart, 1.02, top + _LINE + 0.75 * _BAR, f"{probability:.1%}")
    second = _fit_text(second, _CHART / 2)
    label = _fit_text(label, _CHART - _measure(second) - _GAP)
    _write(chart, 0.006, top + 0.75 * _LINE, label)
    if second:
        left = 0.006 + (_measure(label) + _GAP / 2) / _CHART
        _write(chart, left, top + 0.75 * _LINE, second, _GREY, label=_EXTRA)


def _write(canvas: Axes, left: float, baseline: float, text: str, colour: str = _DARK, label: str = "") -> None:
    # A label with dollars in it is no formula.
    canvas.text(left, baseline, text, color=colour, fontsize=_points(_TEXT), parse_math=False, label=label)


def _points(pixels: float) -> float:
    return pixels * 72 / _DPI


# Text: one line, not too long, in fonts that have its characters


def _escape(text: str) -> str:
    """Text in one line, with what cannot be drawn or written (control characters, lone surrogates) as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _fit_text(text: str, room: float = _TILE) -> str:
    """Text that is no wider than so many pixels; where it would be, an ellipsis stands for its middle."""
    text = _escape(text)

    def shorten(kept: int) -> str:
        return text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]

    if _measure(text) <= room:
        return text
    return shorten(max(0, bisect.bisect_right(range(len(text)), room, key=lambda kept: _measure(shorten(kept))) - 1))


def _measure(text: str) -> float:
    """The width of text in pixels: the most that it takes, with or without hinting."""
    return sum(map(_advance, text))


@functools.lru_cache(maxsize=4096)
def _advance(character: str) -> float:
    """The width of a character in pixels; those of scripts that the Latin family lacks are squares."""
    if unicodedata.combining(character):
        return 0.0
    if ord(character) not in _characters(_LATIN):
        return float(_TEXT)
    advance = float(_latin().load_char(ord(character)).linearHoriAdvance) / 65536
    return max(advance, math.floor(advance + 0.5))  # hinting rounds to whole pixels


@functools.lru_cache(maxsize=1)
def _latin() -> Any:
    """The Latin family in the size of all text here."""
    from matplotlib import font_manager, ft2font

    font = ft2font.FT2Font(font_manager.findfont(_LATIN))
    font.set_size(_points(_TEXT), _DPI)
    return font


@functools.lru_cache(maxsize=64)
def _characters(family: str) -> frozenset[int]:
    """The characters that an installed family of fonts has."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont(family)).get_charmap())


def _choose_fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """(families of installed fonts, the first first, that draw these characters; the characters that none has)."""
    chosen, missing = [_LATIN], {c for c in characters if ord(c) not in _characters(_LATIN)}
    for family in _find_families() if missing else ():
        if found := {c for c in missing if ord(c) in _characters(family)}:
            chosen.append(family)
            missing -= found
        if not missing:
            break
    return chosen, missing


def _find_families() -> Iterator[str]:
    """The installed families that may have what the Latin one has not, the best first."""
    yield from _list_families()
    _add_new_fonts()
    yield from _list_families()


def _list_families() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {entry.name for entry in fontManager.ttflist if Path(entry.fname).exists()}
    others = sorted(family for family in installed - set(_CHINESE) if family.startswith("Noto Sans"))
    return [family for family in _CHINESE if family in installed] + others


def _add_new_fonts() -> None:
    """Tell matplotlib, which remembers the fonts that it once found, of those that were installed since."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    for path in sorted(set(findSystemFonts()) - {entry.fname for entry in fontManager.ttflist}):
        try:
            fontManager.addfont(path)
        except Exception as error:  # of bitmaps, damaged, in a format that it does not know: it says so in many ways
            log.debug("%s: not a font to draw with (%s)", path, error)


# Files


def _check_grid(file: str | os.PathLike[str], count: int, columns: int | None) -> None:
    _check_ending(file)
    if not count:
        raise UsageError(file, "there are no pictures to draw", "Give one or more.")
    if columns is not None and columns < 1:
        raise UsageError("columns", f"is {columns}", "Give 1 or more.")


def _check_ending(file: str | os.PathLike[str]) -> str:
    ending = Path(file).suffix.lower()
    if ending not in (".png", ".svg"):
        raise UsageError(file, "is neither a .png nor an .svg file", "Give a file that ends in .png or .svg.")
    return ending[1:]


def _save(figure: Figure, file: str | os.PathLike[str]) -> None:
    """Write a drawing, whole or not at all; the same drawing gives the same bytes."""
    import matplotlib

    ending, content = _check_ending(file), io.BytesIO()
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "headstart",
        "image.composite_image": False,
        "font.sans-serif": [_LATIN, *_CHINESE],
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        if ending == "svg":  # its text is drawn by a browser, with the fonts that it finds
            warnings.filterwarnings("ignore", "Glyph .* missing")
            _set_fonts(figure, ["sans-serif"], set())
        else:
            _set_fonts(figure, *_find_fonts(figure, file))
        figure.savefig(content, format=ending, metadata={"Date": None})
    write_whole(Path(file), content.getvalue())


def _texts(figure: Figure) -> list[Text]:
    from matplotlib.text import Text

    return [artist for artist in figure.findobj() if isinstance(artist, Text)]


def _find_fonts(figure: Figure, file: str | os.PathLike[str]) -> tuple[list[str], set[str]]:
    families, missing = _choose_fonts({c for text in _texts(figure) for c in text.get_text()})
    if missing:
        _warn(_escape(os.fspath(file)), missing, "drawn as ? or left out")
    return families, missing


def find_lacking(text: str) -> set[str]:
    """The characters of a text that no installed font has, for PNGs; what to install for them is logged."""
    _, missing = _choose_fonts(set(text))
    if missing:
        _warn("PNGs", missing, "left out")
    return missing


def _warn(where: str, missing: set[str], outcome: str) -> None:
    shown = "".join(sorted(missing)[:20]) + ("..." if len(missing) > 20 else "")
    remedy = "Install one (on Debian and Ubuntu: fonts-noto-cjk or fonts-wqy-microhei for Chinese), or write .svg"
    log.warning("%s: no installed font has %s, %s. %s: browsers have their own.", where, shown, outcome, remedy)


def _set_fonts(figure: Figure, families: list[str], missing: set[str]) -> None:
    for text in _texts(figure):
        text.set_fontfamily(families)
        if lacking := missing & set(text.get_text()):
            kept = "" if text.get_label() == _EXTRA else text.get_text()
            text.set_text("".join("?" if c in lacking else c for c in kept))

"""How training pictures are varied: torchvision's augmentations by their names, drawn for each picture by itself.

torchvision draws from one generator for the whole process, so that its augmentations change with the number of workers
and their order. Here every picture of every epoch has its own generator. The pixels are Pillow's work, as they are in
torchvision for pictures that are no tensors; tests hold the two together.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from headstart.errors import UsageError
from headstart.images import INTERPOLATIONS, Preprocess

Symmetry = Literal["none", "mirror", "any"]
Random = np.random.Generator
Pair = Sequence[float]
Step = Callable[[Image.Image, Random, Preprocess], Image.Image]
_Change = Callable[[Image.Image, float, Preprocess], Image.Image]

LEANING = 45.0  # degrees; a picture turned further stands no longer upright
# What `auto` stands for, by the declared symmetry. Crops down to a quarter of the area rather than torchvision's 8 %:
# with few pictures, a crop of a twelfth often shows nothing of the class.
AUTOMATIC = {
    "none": "RandomResizedCrop(scale=(0.25, 1.0))",
    "mirror": "RandomResizedCrop(scale=(0.25, 1.0)), RandomHorizontalFlip",
    "any": "RandomResizedCrop(scale=(0.25, 1.0)), RandomHorizontalFlip, RandomVerticalFlip, RandomQuarterTurn",
}


@dataclass(frozen=True)
class Augmentation:
    """Steps from an upright picture to a varied view of it; each takes (picture, generator, preprocess)."""

    names: tuple[str, ...]
    steps: tuple[Step, ...]

    def apply(self, image: Image.Image, preprocess: Preprocess, random: Random) -> NDArray[np.uint8]:
        """A varied view, uint8 (size, size, 3).

        RandomResizedCrop cuts from the whole picture; all else varies the view that evaluation sees, so that both have
        one geometry.
        """
        if "RandomResizedCrop" not in self.names[:1]:
            image = Image.fromarray(preprocess.apply(image))
        for step in self.steps:
            image = step(image, random, preprocess)
        return np.array(image)


def parse(text: str, symmetry: Symmetry, size: int) -> Augmentation:
    """The augmentation of a text such as `RandomResizedCrop(scale=(0.5, 1)), RandomHorizontalFlip`; `auto`, `none`.

    Args:
        text: names of torchvision's, with their arguments where they are not the default.
        symmetry: what leaves a picture's meaning alone.
        size: side of the network's input in pixels; a crop that names another is an error.

    Raises:
        UsageError: for an unknown name, wrong arguments, or a flip or turn that the declared symmetry forbids.
    """
    names: list[str] = []
    steps: list[Step] = []
    for name, positional, named in _read_calls(AUTOMATIC[symmetry] if text == "auto" else text):
        make = _MAKERS[name]
        try:
            step = make(*positional, **named)
        except (TypeError, ValueError) as error:
            raise UsageError("augment", f"{name}: {error}", f"It takes {inspect.signature(make)}.") from error
        _check_symmetry(name, positional, named, symmetry)
        side = inspect.signature(make).bind(*positional, **named).arguments.get("size")
        if side not in (None, size):
            why = f"{name}({side}) does not fit the network's {size} pixels"
            raise UsageError("augment", why, f"Leave its size out, or give --size {side}.")
        if name == "RandomResizedCrop" and names:
            raise UsageError("augment", "RandomResizedCrop must come first", "It cuts from the whole picture.")
        names.append(name)
        steps.append(step)
    return Augmentation(tuple(names), tuple(steps))


def _read_calls(text: str) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """(name, positional arguments, named ones) of each call in a text; only literal values are read."""
    if text in ("none", ""):
        return []
    remedy = f"Known: {', '.join(_MAKERS)}; write them as RandomHorizontalFlip, RandomRotation(10)."
    try:
        tree = ast.parse(f"({text},)", mode="eval").body
        assert isinstance(tree, ast.Tuple)
        calls = []
        for node in tree.elts:
            name = node.func if isinstance(node, ast.Call) else node
            if not isinstance(name, ast.Name):
                raise UsageError("augment", f"{ast.unparse(node)} is no augmentation", remedy)
            if name.id not in _MAKERS:
                raise UsageError("augment", f"{name.id} is unknown", remedy)
            arguments = node.args if isinstance(node, ast.Call) else []
            keywords = node.keywords if isinstance(node, ast.Call) else []
            named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
            calls.append((name.id, [ast.literal_eval(value) for value in arguments], named))
    except (SyntaxError, ValueError) as error:
        raise UsageError("augment", f"{text!r} cannot be read", remedy) from error
    return calls


def _check_symmetry(name: str, positional: list[Any], named: dict[str, Any], symmetry: Symmetry) -> None:
    needs: Symmetry = "none"
    if name == "RandomHorizontalFlip":
        needs = "mirror"
    elif name in ("RandomVerticalFlip", "RandomQuarterTurn"):
        needs = "any"
    elif name == "RandomRotation":
        degrees = positional[0] if positional else named["degrees"]
        needs = "any" if max(map(abs, _as_pair(degrees))) > LEANING else "none"
    order = ("none", "mirror", "any")
    if order.index(needs) > order.index(symmetry):
        why = f"{name} changes what a picture means where its symmetry is {symmetry!r}"
        raise UsageError("augment", why, f"Leave it out, or declare --symmetry {needs}.")


def _as_pair(value: float | Pair) -> tuple[float, float]:
    """A number as the range around zero; a pair as it is."""
    low, high = (-value, value) if isinstance(value, (int, float)) else value
    return float(low), float(high)


# Each maker takes torchvision's arguments, with its defaults, and gives a step.


def _random_resized_crop(size: int | None = None, scale: Pair = (0.08, 1.0), ratio: Pair = (3 / 4, 4 / 3)) -> Step:
    (least, most), (narrow, wide) = scale, ratio
    if not (0 < least <= most <= 1 and 0 < narrow <= wide):
        raise ValueError(f"scale {scale} must lie in 0 to 1, and ratio {ratio} over 0, each from small to large")

    def draw_box(width: int, height: int, random: Random) -> tuple[int, int, int, int]:
        for _ in range(10):  # as torchvision does: ten tries, then the middle
            area = width * height * random.uniform(least, most)
            aspect = math.exp(random.uniform(math.log(narrow), math.log(wide)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
                return left, top, left + w, top + h
        w, h = min(width, round(height * wide)), min(height, round(width / narrow))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def step(image: Image.Image, random: Random, preprocess: Preprocess) -> Image.Image:
        box = draw_box(*image.size, random)
        return image.crop(box).resize((preprocess.size,) * 2, INTERPOLATIONS[preprocess.interpolation])

    return step


def _random_crop(
    size: int | None = None, padding: int = 0, padding_mode: Literal["constant", "reflect"] = "constant"
) -> Step:
    if padding_mode not in ("constant", "reflect") or padding < 0:
        raise ValueError("padding must be 0 or more, padding_mode 'constant' or 'reflect'")

    def step(image: Image.Image, random: Random, preprocess: Preprocess) -> Image.Image:
        pixels = np.pad(np.asarray(image), ((padding, padding), (padding, padding), (0, 0)), padding_mode)
        top, left = random.integers(2 * padding + 1, size=2)
        return Image.fromarray(pixels[top : top + image.height, left : left + image.width])

    return step


def _flip(method: Image.Transpose) -> Callable[..., Step]:
    def make(p: float = 0.5) -> Step:
        return lambda image, random, _: image.transpose(method) if random.random() < p else image

    return make


def _random_quarter_turn() -> Step:
    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)

    def step(image: Image.Image, random: Random, _: Preprocess) -> Image.Image:
        turn = turns[random.integers(4)]
        return image if turn is None else image.transpose(turn)

    return step


def _random_rotation(degrees: float | Pair) -> Step:
    low, high = _as_pair(degrees)
    return lambda image, random, preprocess: _rotate(image, random.uniform(low, high), preprocess)


def _color_jitter(
    brightness: float | Pair = 0, contrast: float | Pair = 0, saturation: float | Pair = 0, hue: float | Pair = 0
) -> Step:
    around_one = [
        (max(0.0, 1.0 - value), 1.0 + value) if isinstance(value, (int, float)) else value
        for value in (brightness, contrast, saturation)
    ]
    ranges = [*around_one, _as_pair(hue)]
    if max(map(abs, ranges[3])) > 0.5 or min(low for low, _ in ranges[:3]) < 0:
        raise ValueError("brightness, contrast and saturation must be 0 or more, hue at most 0.5")

    def step(image: Image.Image, random: Random, _: Preprocess) -> Image.Image:
        factors = [random.uniform(low, high) for low, high in ranges]
        changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for number in random.permutation(4):
            if ranges[number] in ((1.0, 1.0), (0.0, 0.0)):
                continue
            factor = factors[number]
            image = changes[number](image).enhance(factor) if number < 3 else _shift_hue(image, factor)
        return image

    return step


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """A picture with its colours turned on the colour wheel, by -0.5 to 0.5 of a full turn."""
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(turn * 255) % 256)  # wraps around, as the wheel does
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def _rotate(image: Image.Image, degrees: float, preprocess: Preprocess) -> Image.Image:
    """A picture turned counter-clockwise; corners that come into view have the network's mean colour."""
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=_mean_colour(preprocess))


def _mean_colour(preprocess: Preprocess) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in preprocess.mean)
    return red, green, blue


# RandAugment (Cubuk et al., 2020) and TrivialAugment (Mueller and Hutter, 2021): operations and their largest strengths
# are those of torchvision; an operation takes (picture, strength, preprocess).


def _shear(across: float, down: float) -> _Change:
    """Lines leaning across or down by the strength."""

    def change(image: Image.Image, strength: float, preprocess: Preprocess) -> Image.Image:
        # Output to input, with pixels' middles at halves; the top left corner stays.
        x, y = across * strength, down * strength
        return _transform(image, (1.0, x, 0.0, y, 1.0, 0.0), preprocess)

    return change


def _shift(across: float, down: float) -> _Change:
    """Moved by the strength in parts of the side, by whole pixels."""

    def change(image: Image.Image, strength: float, preprocess: Preprocess) -> Image.Image:
        x, y = (float(int(part * strength * image.width)) for part in (across, down))
        return _transform(image, (1.0, 0.0, -x, 0.0, 1.0, -y), preprocess)

    return change


def _transform(
    image: Image.Image, matrix: tuple[float, float, float, float, float, float], preprocess: Preprocess
) -> Image.Image:
    colour = _mean_colour(preprocess)
    method = Image.Transform.AFFINE
    return image.transform(image.size, method, matrix, Image.Resampling.BILINEAR, fillcolor=colour)


def _enhance(kind: Callable[[Image.Image], Any]) -> _Change:
    """Brightness, colour, contrast or sharpness times 1 + strength."""

    def change(image: Image.Image, strength: float, _: Preprocess) -> Image.Image:
        result: Image.Image = kind(image).enhance(1.0 + strength)
        return result

    return change


@dataclass(frozen=True)
class _Operation:
    """An operation, its largest strength for RandAugment and TrivialAugment's wide space, and whether it has a sign."""

    change: _Change
    most: float
    most_wide: float
    signed: bool = True


_OPERATIONS = {
    "Identity": _Operation(lambda image, *_: image, 0.0, 0.0, False),
    "ShearX": _Operation(_shear(1, 0), 0.3, 0.99),
    "ShearY": _Operation(_shear(0, 1), 0.3, 0.99),
    "TranslateX": _Operation(_shift(1, 0), 150 / 331, 32 / 224),
    "TranslateY": _Operation(_shift(0, 1), 150 / 331, 32 / 224),
    "Rotate": _Operation(_rotate, 30.0, 135.0),
    "Brightness": _Operation(_enhance(ImageEnhance.Brightness), 0.9, 0.99),
    "Color": _Operation(_enhance(ImageEnhance.Color), 0.9, 0.99),
    "Contrast": _Operation(_enhance(ImageEnhance.Contrast), 0.9, 0.99),
    "Sharpness": _Operation(_enhance(ImageEnhance.Sharpness), 0.9, 0.99),
    "Posterize": _Operation(lambda image, s, _: ImageOps.posterize(image, 8 - round(s)), 4.0, 6.0, False),
    "Solarize": _Operation(lambda image, s, _: ImageOps.solarize(image, round(255 * (1 - s))), 1.0, 1.0, False),
    "AutoContrast": _Operation(lambda image, *_: ImageOps.autocontrast(image), 0.0, 0.0, False),
    "Equalize": _Operation(lambda image, *_: ImageOps.equalize(image), 0.0, 0.0, False),
}


def _vary(image: Image.Image, random: Random, preprocess: Preprocess, part: float, wide: bool = False) -> Image.Image:
    """One operation by lot, at a part (0 to 1) of its largest strength."""
    name = list(_OPERATIONS)[random.integers(len(_OPERATIONS))]
    operation = _OPERATIONS[name]
    strength = part * (operation.most_wide if wide else operation.most)
    if name == "Rotate":
        strength = min(strength, LEANING)
    if operation.signed and random.random() < 0.5:
        strength = -strength
    return operation.change(image, strength, preprocess)


def _rand_augment(num_ops: int = 2, magnitude: float = 9) -> Step:
    """`magnitude` is on torchvision's scale of 0 to 30; the paper's 0 to 10 is a third of it."""
    if not (num_ops >= 0 and 0 <= magnitude <= 30):
        raise ValueError(f"num_ops {num_ops} must be 0 or more, magnitude {magnitude} on torchvision's scale, 0 to 30")

    def step(image: Image.Image, random: Random, preprocess: Preprocess) -> Image.Image:
        for _ in range(num_ops):
            image = _vary(image, random, preprocess, magnitude / 30)
        return image

    return step


def _trivial_augment_wide() -> Step:
    """One operation of a strength by lot, of 31. Turns end at 45 degrees rather than torchvision's 135."""

    def step(image: Image.Image, random: Random, preprocess: Preprocess) -> Image.Image:
        return _vary(image, random, preprocess, random.integers(31) / 30, wide=True)

    return step


_MAKERS: dict[str, Callable[..., Step]] = {
    "RandomResizedCrop": _random_resized_crop,
    "RandomCrop": _random_crop,
    "RandomHorizontalFlip": _flip(Image.Transpose.FLIP_LEFT_RIGHT),
    "RandomVerticalFlip": _flip(Image.Transpose.FLIP_TOP_BOTTOM),
    "RandomQuarterTurn": _random_quarter_turn,
    "RandomRotation": _random_rotation,
    "ColorJitter": _color_jitter,
    "RandAugment": _rand_augment,
    "TrivialAugmentWide": _trivial_augment_wide,
}

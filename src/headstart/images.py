"""From bytes to an upright RGB picture (`open_image`), and on to a network's input (`Preprocess`).

Both have their only home here: training, evaluation, prediction and audit see the same pixels.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from headstart import archives
from headstart.errors import DataError, UnreadableImage

if TYPE_CHECKING:
    import torch

# EXIF 2.3, tag 0x0112: what turns each stored orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
Fit = Literal["crop", "pad", "squash", "center"]
# Of a picture, as a network sees it: itself, its mirror image, its middle enlarged, the mirror image of that.
View = Literal["plain", "mirror", "zoom", "zoom-mirror"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Limits:
    """What is too large to be opened, told from the file's size and the picture's header."""

    pixels: int = 50_000_000
    bytes: int = 64 * 2**20


def read_bytes(path: str | os.PathLike[str], limits: Limits = Limits()) -> bytes:
    """A picture file's content; `z.zip::a.jpg` is a file in an archive.

    Raises:
        UnreadableImage: for a file that is missing, not readable, empty, not regular, or over the limit.
    """
    try:
        if archives.split(path) is None and not Path(path).is_file():
            why = (
                "is a folder"
                if Path(path).is_dir()
                else "is no regular file"
                if os.path.exists(path)
                else "no such file"
            )
            raise UnreadableImage(path, why, "Give a picture file.")
        size = archives.size(path)
        if size > limits.bytes:
            why = f"{size / 2**20:.1f} MiB is over the limit of {limits.bytes / 2**20:g} MiB"
            raise UnreadableImage(path, why, "Make it smaller, or raise --limit-mebibytes.")
        content = archives.read(path)
    except DataError as error:
        raise UnreadableImage(path, f"its archive {error.why}", error.remedy) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(path, why, "Check the file and its permissions.") from error
    if not content:
        raise UnreadableImage(path, "is empty", "Replace it.")
    return content


def open_image(
    picture: bytes | str | os.PathLike[str],
    limits: Limits = Limits(),
    name: str | os.PathLike[str] = "picture",
) -> Image.Image:
    """An upright RGB picture from a file or its content: the first frame, turned as EXIF says, transparency on white.

    16-bit grey is scaled to 8 bits, never clipped; CMYK, palette and grey are converted.

    Args:
        picture: path or content.
        limits: what is too large; checked before anything is decoded.
        name: how to call given content in errors.

    Raises:
        UnreadableImage: for whatever cannot be decoded, with a reason that is never empty.
    """
    if not isinstance(picture, bytes):
        name, picture = picture, read_bytes(picture, limits)
    with _open_header(picture, limits, name) as image:
        image.load()
        return _upright(_to_rgb(image), _orientation(image))


@contextlib.contextmanager
def _open_header(content: bytes, limits: Limits, name: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """A picture within limits, of which only the header is read; `UnreadableImage` for whatever goes wrong with it."""
    if Image.MAX_IMAGE_PIXELS is not None and limits.pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = limits.pixels  # Pillow's own limit would come first
    try:
        with Image.open(io.BytesIO(content)) as image:
            _check_header(image, limits, name)
            yield image
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        why = f"is over the limit of {limits.pixels / 1e6:g} megapixels"
        raise UnreadableImage(name, why, "Make it smaller, or raise --limit-megapixels.") from error
    # A damaged file leads Pillow's readers to any exception: struct.error, KeyError, RecursionError, MemoryError...
    except Exception as error:
        why = f"cannot be decoded ({' '.join(str(error).split()) or type(error).__name__})"
        if isinstance(error, UnidentifiedImageError):
            why = "is not a picture in a known format"
        raise UnreadableImage(name, why, "Replace it or leave it out.") from error


def _check_header(image: Image.Image, limits: Limits, name: str | os.PathLike[str]) -> None:
    if image.format == "EPS":  # Pillow would start Ghostscript on it
        raise UnreadableImage(name, "is PostScript, a program rather than a picture", "Save it as PNG.")
    width, height = image.size
    if width * height > limits.pixels:
        why = f"{width}x{height} is over the limit of {limits.pixels / 1e6:g} megapixels"
        raise UnreadableImage(name, why, "Make it smaller, or raise --limit-megapixels.")
    if width < 1 or height < 1:
        raise UnreadableImage(name, f"has the size {width}x{height}", "Replace it.")


def check_limits(content: bytes, limits: Limits) -> None:
    """Raise `UnreadableImage` for a picture, known to be readable, that is over limits; only its header is read."""
    with _open_header(content, limits, "picture"):
        pass


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Read after loading: Pillow turns TIFF pictures by itself."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a picture with a damaged EXIF block is still a picture, and stands as it is stored
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy() if image.readonly else image
    if image.mode.startswith(("I", "F")):
        return _to_8_bits(image).convert("RGB")
    if image.has_transparency_data or image.mode in ("RGBa", "La"):
        colours = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floats, scaled to 0..255 by the range of its type, or by its own where that is wider."""
    values = np.asarray(image, dtype=np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0.0 and image.mode == "F" and high <= 1.0:
        low, high = 0.0, 1.0
    elif low >= 0.0 and high <= 255.0:
        low, high = 0.0, 255.0
    elif low >= 0.0 and high <= 65535.0:
        low, high = 0.0, 65535.0
    scaled = (values - low) * (255.0 / max(high - low, 1e-12))
    if isinstance(image.info.get("transparency"), int):
        scaled[values == image.info["transparency"]] = 255.0
    return Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Preprocess:
    """How an upright RGB picture becomes a network's input for evaluation; belongs to the model.

    The short side is resized to `size / crop` and the centre cut out (`fit="crop"`, as in timm's and torchvision's
    evaluation), or the whole picture is laid into the square on grey (`"pad"`), or pressed into it (`"squash"`), or the
    centre is cut out at the picture's own scale, on black where that is smaller (`"center"`, torchvision's CenterCrop).
    """

    size: int = 224
    crop: float = 0.875
    fit: Fit = "crop"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def apply(self, image: Image.Image) -> NDArray[np.uint8]:
        """The network's view of a picture before normalisation, uint8 of shape (size, size, 3)."""
        resample = INTERPOLATIONS[self.interpolation]
        if self.fit == "squash":
            return np.array(image.resize((self.size, self.size), resample))
        if self.fit == "pad":
            return self._padded(image, resample)
        if self.fit == "center":
            return self._centred(image)
        width, height = image.size
        short = int(self.size / self.crop + 1e-6)
        # The long side is cut to whole pixels, as torchvision's Resize does.
        wide, high = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        # Resizing only what the crop shows takes two thirds of the time of resizing everything first; the pixels are
        # the same but for rounding (a grey level; more in one of 2,000 pixels, at hard edges).
        scale_x, scale_y = width / wide, height / high
        box = (left * scale_x, top * scale_y, (left + self.size) * scale_x, (top + self.size) * scale_y)
        box = (box[0], box[1], min(box[2], width), min(box[3], height))
        return np.array(image.resize((self.size, self.size), resample, box=box))

    def _padded(self, image: Image.Image, resample: Image.Resampling) -> NDArray[np.uint8]:
        scale = self.size / max(image.size)
        wide, high = (max(1, round(side * scale)) for side in image.size)
        canvas = Image.new("RGB", (self.size, self.size), tuple(round(255 * m) for m in self.mean))
        canvas.paste(image.resize((wide, high), resample), ((self.size - wide) // 2, (self.size - high) // 2))
        return np.array(canvas)

    def _centred(self, image: Image.Image) -> NDArray[np.uint8]:
        # Rounded as torchvision does; outside the picture, Pillow gives black.
        left, top = (
            round((side - self.size) / 2) if side > self.size else -((self.size - side) // 2) for side in image.size
        )
        return np.array(image.crop((left, top, left + self.size, top + self.size)))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of `apply`, uint8 of shape (n, size, size, 3), as the network's input: float32 (n, 3, size, size).

        The result is channels-last in memory, as the pixels were.
        """
        values = pixels.permute(0, 3, 1, 2).float()
        mean = values.new_tensor(self.mean).view(1, 3, 1, 1)
        std = values.new_tensor(self.std).view(1, 3, 1, 1)
        return values.sub_(mean * 255).div_(std * 255)


# The first 16 waves of the cosine transform (DCT-II) of 64 values.
_COSINES = np.cos(np.pi / 64 * np.arange(16)[:, None] * (np.arange(64) + 0.5))


@dataclass(frozen=True)
class Facts:
    """What an audit needs of a picture: its size, a perceptual hash and a grey thumbnail."""

    width: int
    height: int
    hash: NDArray[np.uint8]  # 256 bits in 32 bytes
    thumbnail: NDArray[np.uint8]  # 16 x 16


def describe(image: Image.Image) -> Facts:
    """The facts of an upright RGB picture.

    The hash is the perceptual hash of the package imagehash, with 256 bits: with 64, X-rays of different people
    collide. A test holds the two together; the package imports scipy for it, which takes 0.7 s.
    """
    grey = image.convert("L").resize((128, 128), Image.Resampling.BOX)
    waves = _COSINES @ np.asarray(grey.resize((64, 64), Image.Resampling.LANCZOS)) @ _COSINES.T
    bits = np.packbits(waves > np.median(waves))
    thumbnail = np.asarray(grey.resize((16, 16), Image.Resampling.BOX))
    return Facts(image.width, image.height, bits, thumbnail)

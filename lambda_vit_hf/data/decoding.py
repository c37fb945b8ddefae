"""From the bytes of an image file to an RGB image, or an error that names the file; and what happens to such files."""

import io
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image


logger = logging.getLogger(__name__)

# 178.9 million pixels, half a gigabyte as RGB: twice what Pillow warns of, where Pillow itself refuses too.
MAX_PIXELS = 2 * 89_478_485
# Resized until its short side fits a model, a longer strip would take gigabytes, however few pixels it has.
MAX_ASPECT_RATIO = 500
# Of Pillow's other formats some have no signature and fit any file, and EPS starts Ghostscript.
PIL.Image.init()
FORMATS = [
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP") if name in PIL.Image.OPEN
]
ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


class UnreadableImageError(OSError):
    """A file that is no image, is cut short, or is too large."""


def decode_image(item, max_pixels: int = MAX_PIXELS, name: str | None = None) -> PIL.Image.Image:
    """
    The upright 8-bit RGB image of an image file.

    As in `transformers.pipeline` and in `datasets`, the rotation in the EXIF data is applied, an animation gives its
    first frame, and transparency is dropped (the colour below it shows). Unlike there, more than 8 bits a channel are
    scaled and not clipped (see [`to_rgb`]). The result carries no metadata: nobody can rotate it a second time.

    Args:
        item (`dict`, `bytes`, `str`, `Path` or `PIL.Image.Image`):
            `{"bytes": ..., "path": ...}` as `datasets.Image(decode=False)` gives it; the content or path of a file; or
            an image that is opened or decoded already.
        max_pixels (`int`, *optional*, defaults to 178,956,970):
            Images with more are refused, by their header, before any memory is taken for them.
        name (`str`, *optional*): how to call the image in errors, where it has no path.

    Raises:
        UnreadableImageError: naming the image, and why.
    """
    try:
        if isinstance(item, PIL.Image.Image):
            check_size(item, max_pixels)
            return upright_rgb(item)
        with open_image(item, max_pixels, name) as image:
            return upright_rgb(image)
    except (UnreadableImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads them to
        raise _unreadable(item, name, error) from error


def open_image(item, max_pixels: int = MAX_PIXELS, name: str | None = None) -> PIL.Image.Image:
    """The image with its header read and its size checked, but no pixel decoded; for `with`. See [`decode_image`]."""
    try:
        image = PIL.Image.open(_source(item), formats=FORMATS)
        try:
            check_size(image, max_pixels)
        except (PIL.Image.DecompressionBombError, ValueError):
            image.close()
            raise
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(item, name, error) from error
    return image


def undecoded(images):
    """
    A dataset or stream of `datasets` with its column `image` left to [`decode_image`]; anything else as it is, also a
    dataset with a transform of the user's, which takes decoded images.
    """
    has_transform = getattr(images, "format", {}).get("type") == "custom"
    if hasattr(images, "cast_column") and "image" in (images.features or {}) and not has_transform:
        import datasets  # not needed otherwise, and not part of the core

        if isinstance(images.features["image"], datasets.Image):
            return images.cast_column("image", datasets.Image(decode=False))
    return images


def image_name(item, name: str | None = None) -> str:
    """What to call an undecoded image: its path where it has one."""
    path = item.get("path") if isinstance(item, Mapping) else item if isinstance(item, (str, Path)) else None
    return str(path or name or "without a name")


def _unreadable(item, name: str | None, error: Exception) -> UnreadableImageError:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return UnreadableImageError(f"Image {image_name(item, name)} cannot be decoded ({reason}). Remove or replace it.")


def _source(item):
    if isinstance(item, Mapping):
        item = item["path"] if item.get("bytes") is None else item["bytes"]
    if isinstance(item, (bytes, bytearray, memoryview)):
        return io.BytesIO(item)
    if not isinstance(item, (str, Path)):
        raise ValueError(f"expected an image file, found {type(item).__name__}")
    if "://" in str(item):
        import fsspec

        with fsspec.open(str(item), "rb") as file:
            return io.BytesIO(file.read())
    return item


# An exported folder carries this file: what serving needs of it imports numpy and Pillow only.


def check_size(image: PIL.Image.Image, max_pixels: int = MAX_PIXELS) -> None:
    """
    Raises:
        PIL.Image.DecompressionBombError: if the image has more pixels.
        ValueError: if it has none, or is a strip.
    """
    size = f"{image.width} x {image.height}"
    if not image.width * image.height:
        raise ValueError(f"an image of {size} pixels")
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"a strip of {size} pixels: one side is over {MAX_ASPECT_RATIO} times as long as the other")
    if image.width * image.height > max_pixels:
        raise PIL.Image.DecompressionBombError(f"{size} pixels are more than the limit of {max_pixels:,}")


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The 8-bit RGB image of one of any mode, rotated as its EXIF data say, without them. See [`to_rgb`]."""
    image.load()
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # broken EXIF data are common, and say nothing about the pixels: the image stays as it is stored
        logger.debug("EXIF data cannot be read.", exc_info=True)
        orientation = None
    # Not ImageOps.exif_transpose: it writes the EXIF data anew, which fails where they are slightly out of order.
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    image = to_rgb(image)
    image.info = {}  # with the EXIF data in it a later exif_transpose would rotate once more
    return image


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    An 8-bit RGB image from one of any mode.

    Pillow alone would clip more than 8 bits to white. Here 16 bits are divided by 256; 32-bit integers too, unless
    they all fit in 8 bits; floats in [0, 1] are multiplied by 255, in [0, 255] kept; integers and floats beyond that
    are stretched so that the smallest value is black and the largest white. CMYK is converted without a colour
    profile, JPEGs of Adobe (which store the inverse) included.

    Raises:
        ValueError: for NaN or infinity, and for a mode that Pillow cannot convert.
    """
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = PIL.Image.fromarray(_eight_bits(np.asarray(image), image.mode == "F"))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, is_float: bool) -> np.ndarray:
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a floating point image with NaN or infinity")
    low, high = values.min(), values.max()
    if low < 0 or high > (255 if is_float else 2**16 - 1):
        values = (values - low) / max(high - low, 1e-300) * 255
    elif is_float and high <= 1:
        values = values * 255
    elif high > 255:
        values = np.floor(values / 256)
    return values.round().astype(np.uint8)


class UnreadableImages:
    """
    What happens to images that cannot be decoded, and which they were.

    Names are kept in a temporary file, because dataloader workers find them and the main process wants to know.
    Each process of a distributed run keeps its own.

    Args:
        on_error (`str`, *optional*, defaults to `"raise"`): `"raise"`, or `"skip"`: go on without the image.
        max_share (`float`, *optional*, defaults to 0.01):
            With `"skip"`: more unreadable images than this share of all raise nevertheless (but ten are never too
            many). More than half of what one process has read raise at once.
        num_images (`int`, *optional*): how many there are; by default, what the process has read counts as all.
    """

    MAX_NAMED = 20
    ALWAYS_ALLOWED = 10

    def __init__(self, on_error: str = "raise", max_share: float = 0.01, num_images: int | None = None):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"Unreadable images can be met with 'raise' or 'skip', not {on_error!r}.")
        if not 0 <= max_share <= 1:
            raise ValueError(f"The share of unreadable images must lie between 0 and 1, got {max_share}.")
        self.on_error, self.max_share, self.num_images = on_error, max_share, num_images
        self._read = self._failed = 0
        folder = tempfile.mkdtemp(prefix="unreadable-images-")
        self._file = Path(folder, "names")
        weakref.finalize(self, _remove, folder, os.getpid())

    def decode(self, item, name: str | None = None, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image | None:
        """
        [`decode_image`], or `None` where that fails, the image is noted and others can do without it.

        Raises:
            UnreadableImageError: with `on_error="raise"`, or if there are too many.
        """
        self._read += 1
        try:
            return decode_image(item, max_pixels, name)
        except UnreadableImageError as error:
            self._note(image_name(item, name), error)
            return None

    def check(self, item, name: str | None = None, max_pixels: int = MAX_PIXELS) -> None:
        """As [`UnreadableImages.decode`], but only the header is read: most broken files show there already."""
        self._read += 1
        try:
            with open_image(item, max_pixels, name):
                pass
        except UnreadableImageError as error:
            self._note(image_name(item, name), error)

    def _note(self, name: str, error: UnreadableImageError) -> None:
        if self.on_error == "raise":
            raise error
        self._failed += 1
        names = self.names
        if name not in names:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(name) + "\n")  # a short write at the end: whole, whoever else writes
            names.append(name)
            if len(names) <= self.MAX_NAMED:
                logger.warning("%s It is left out.", str(error).removesuffix(" Remove or replace it."))
            if len(names) == self.MAX_NAMED:
                logger.warning("Further images that cannot be decoded are counted, but not named.")
        too_many = max(self.ALWAYS_ALLOWED, self.max_share * (self.num_images or self._read))
        hopeless = self._failed > max(self.ALWAYS_ALLOWED, self._read / 2)
        if len(names) > too_many or hopeless:
            raise UnreadableImageError(f"{self.summary()} More than {self.max_share:.1%} are not accepted.") from error

    @property
    def names(self) -> list[str]:
        """Of the images that could not be decoded, in the order in which they were met, each once."""
        if not self._file.exists():
            return []
        lines = self._file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in dict.fromkeys(lines)]

    @property
    def count(self) -> int:
        """Number of images that could not be decoded, each counted once."""
        return len(self.names)

    def summary(self) -> str:
        """One sentence, with the first names."""
        names = self.names
        if not names:
            return "Every image could be decoded."
        more = ", ..." if len(names) > 5 else ""
        of_all = f" of {self.num_images:,}" if self.num_images else ""
        return f"{len(names)}{of_all} images could not be decoded: {', '.join(names[:5])}{more}."


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked dataloader worker has a copy of the object, but the file is not its own
        shutil.rmtree(folder, ignore_errors=True)

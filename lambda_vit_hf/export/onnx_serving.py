"""Classify pictures with an exported model: onnxruntime, numpy and Pillow, nothing else.

    python serve.py picture.jpg another.png

Beside this file: `model.onnx`, and `preprocessing.json`, which says what happens to a picture first and what the
classes are called.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import PIL.Image


logger = logging.getLogger(__name__)

# 178.9 million pixels, half a gigabyte as RGB: twice what Pillow warns of, where Pillow itself refuses too.
MAX_PIXELS = 2 * 89_478_485
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


class OnnxImageClassifier:
    """
    A model folder, served.

    Args:
        folder (`str` or `Path`): with `model.onnx` and `preprocessing.json`.
        num_threads (`int`, *optional*): CPU threads; by default onnxruntime's choice.

    Example:

    ```python
    >>> classifier = OnnxImageClassifier("outputs/served")
    >>> classifier.classify([PIL.Image.open("cat.jpg")])[0][0]
    {'label': 'tabby', 'score': 0.93}
    ```
    """

    def __init__(self, folder: str | Path, num_threads: int = 0):
        folder = Path(folder)
        self.preprocessing = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
        self.labels: list[str] = self.preprocessing["labels"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        available = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)

    def preprocess(self, image: PIL.Image.Image) -> np.ndarray:
        """Pixel values `(3, height, width)`, float32, of one picture of any mode and size."""
        wanted = self.preprocessing
        check_size(image)
        image = upright_rgb(image)
        if wanted["resize"]:
            size = _resized(image, wanted["resize"])
            image = image.resize(size, PIL.Image.Resampling[wanted["resample"].upper()])
        if wanted["center_crop"]:
            image = _center_crop(image, **wanted["center_crop"])
        pixels = np.asarray(image, dtype=np.float32) * np.float32(wanted["rescale_factor"])
        pixels = (pixels - np.float32(wanted["mean"])) / np.float32(wanted["std"])
        return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)

    def logits(self, images: Sequence[PIL.Image.Image]) -> np.ndarray:
        """Class scores `(images, classes)`, before softmax."""
        pixel_values = np.stack([self.preprocess(image) for image in images])
        (logits,) = self.session.run(["logits"], {"pixel_values": pixel_values})
        return logits

    def classify(self, images: Sequence[PIL.Image.Image], top_k: int = 5) -> list[list[dict]]:
        """Of each picture, the `top_k` likeliest classes: `{"label": str, "score": probability}`, best first."""
        logits = self.logits(images)
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        return [
            [{"label": self.labels[index], "score": float(row[index])} for index in order]
            for row, order in zip(scores, best, strict=True)
        ]


# From here to `_eight_bits`, a copy of data/decoding.py: this file is used without that package.


def check_size(image: PIL.Image.Image, max_pixels: int = MAX_PIXELS) -> None:
    """
    Raises:
        PIL.Image.DecompressionBombError: if the image has more pixels.
    """
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
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


def _resized(image: PIL.Image.Image, size: dict) -> tuple[int, int]:
    """Width and height after resizing: as given, or with the shorter side as given."""
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    short, edge = min(image.size), size["shortest_edge"]
    width, height = (int(edge * side / short) if side != short else edge for side in image.size)
    return width, height


def _center_crop(image: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    # Where the picture is smaller, Pillow fills up with black, as Hugging Face's image processors do.
    left, top = int((image.width - width) / 2.0), int((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def main(files: Sequence[str]) -> None:
    if not files:
        raise SystemExit(__doc__)
    classifier = OnnxImageClassifier(Path(__file__).parent)
    for file in files:
        with PIL.Image.open(file, formats=FORMATS) as image:
            (best,) = classifier.classify([image], top_k=3)
        print(f"{file}: {', '.join('{label} ({score:.3f})'.format(**one) for one in best)}")


if __name__ == "__main__":
    main(sys.argv[1:])

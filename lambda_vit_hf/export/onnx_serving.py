"""Classify pictures with an exported model: onnxruntime, numpy and Pillow, nothing else.

    python serve.py picture.jpg another.png

Beside this file: `model.onnx`; `preprocessing.json`, which says what happens to a picture first and what the classes
are called; `decoding.py`, which reads pictures as they were read in training; `SHA256SUMS` of all files, and
`checksums.py`, which compares them.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import PIL.Image

from ..data.decoding import decode_image
from ..models.checksums import check_checksums


class OnnxImageClassifier:
    """
    A model folder, served.

    Args:
        folder (`str` or `Path`): with `model.onnx` and `preprocessing.json`.
        num_threads (`int`, *optional*): CPU threads; by default onnxruntime's choice.

    Raises:
        OSError: if a file is not what `SHA256SUMS` lists.

    Example:

    ```python
    classifier = OnnxImageClassifier("outputs/served")
    classifier.classify([PIL.Image.open("cat.jpg")])[0][0]  # {'label': 'tabby', 'score': 0.93}
    ```
    """

    def __init__(self, folder: str | Path, num_threads: int = 0):
        folder = Path(folder)
        check_checksums(folder)
        self.preprocessing = json.loads((folder / "preprocessing.json").read_text(encoding="utf-8"))
        self.labels: list[str] = self.preprocessing["labels"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        available = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)

    def preprocess(self, image: PIL.Image.Image) -> np.ndarray:
        """Pixel values `(3, height, width)`, float32, of one picture of any mode and size, turned upright."""
        wanted = self.preprocessing
        image = decode_image(image)
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
        # In 8 bits a batch shares its scales: alone, an image gets the same answer whatever comes with it.
        size = 1 if self.preprocessing.get("one_image_at_a_time") else len(pixel_values)
        batches = [pixel_values[start : start + size] for start in range(0, len(pixel_values), size)]
        return np.concatenate([self.session.run(["logits"], {"pixel_values": batch})[0] for batch in batches])

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
        (best,) = classifier.classify([decode_image(file)], top_k=3)
        print(f"{file}: {', '.join('{label} ({score:.3f})'.format(**one) for one in best)}")


if __name__ == "__main__":
    main(sys.argv[1:])

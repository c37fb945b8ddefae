"""Classify pictures with an exported model: onnxruntime, numpy and Pillow, nothing else.

    python serve.py picture.jpg another.png

It reads what transformers.js reads: `onnx/model.onnx`, `preprocessor_config.json`, and in `config.json` the names of
the classes, and whether an image has one of them, several, or a value for each. `decoding.py` reads pictures as in
training; `checksums.py` compares the files with `SHA256SUMS`.
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
    An exported folder, served.

    Args:
        folder (`str` or `Path`): what `lambda-vit export` wrote.
        file (`str`, *optional*, defaults to `"onnx/model.onnx"`): the graph; `"onnx/model_quantized.onnx"` is int8.
        num_threads (`int`, *optional*): CPU threads; by default onnxruntime's choice.

    Raises:
        OSError: if a file is not what `SHA256SUMS` lists.
        ValueError: if the folder holds an encoder, which knows no classes.

    Example:

    ```python
    classifier = OnnxImageClassifier("outputs/served")
    classifier.classify([PIL.Image.open("cat.jpg")])[0][0]  # {'label': 'tabby', 'score': 0.93}
    ```
    """

    def __init__(self, folder: str | Path, file: str = "onnx/model.onnx", num_threads: int = 0):
        folder = Path(folder)
        check_checksums(folder)
        self.preprocessing = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        labels, self.problem_type = config.get("id2label"), config.get("problem_type") or "single_label_classification"
        if labels is None:
            raise ValueError(f"{folder} holds an encoder without class head: it gives features, and no classes.")
        self.labels: list[str] = [labels[str(index)] for index in range(len(labels))]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        available = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        self.session = onnxruntime.InferenceSession(str(folder / file), options, providers=providers)

    def preprocess(self, image: PIL.Image.Image) -> np.ndarray:
        """Pixel values `(3, height, width)`, float32, of one picture of any mode and size, turned upright."""
        wanted = self.preprocessing
        image = decode_image(image)
        if wanted["do_resize"]:
            image = image.resize(_resized(image, wanted["size"]), wanted["resample"])
        if wanted["do_center_crop"]:
            image = _center_crop(image, **wanted["crop_size"])
        pixels = np.asarray(image, dtype=np.float32)
        if wanted["do_rescale"]:
            pixels = pixels * np.float32(wanted["rescale_factor"])
        if wanted["do_normalize"]:
            pixels = (pixels - np.float32(wanted["image_mean"])) / np.float32(wanted["image_std"])
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def logits(self, images: Sequence[PIL.Image.Image]) -> np.ndarray:
        """Class scores `(images, classes)`, before softmax or sigmoid."""
        pixel_values = np.stack([self.preprocess(image) for image in images])
        return self.session.run(["logits"], {"pixel_values": pixel_values})[0]

    def classify(self, images: Sequence[PIL.Image.Image], top_k: int = 5) -> list[list[dict]]:
        """
        Of each picture, the `top_k` classes of largest score: `{"label": str, "score": float}`, best first. Scores are
        those of transformers' pipeline: probabilities, each label's own where an image can have several, or values.
        """
        scores = _SCORES[self.problem_type](self.logits(images))
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        return [
            [{"label": self.labels[index], "score": float(row[index])} for index in order]
            for row, order in zip(scores, best, strict=True)
        ]


def _softmax(logits: np.ndarray) -> np.ndarray:
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


_SCORES = {
    "single_label_classification": _softmax,
    "multi_label_classification": lambda logits: 0.5 * (1 + np.tanh(logits / 2)),  # the sigmoid, without overflow
    "regression": lambda logits: logits,
}


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

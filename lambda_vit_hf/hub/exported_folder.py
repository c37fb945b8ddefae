"""What `lambda-vit export` wrote, as far as a push has to know it: which files, and whether they are whole."""

from pathlib import Path

from ..models.checksums import MANIFEST, check_checksums


# `config.json` is for who runs the graph, as a `vit`; this file beside it is the model's own config.
MODEL_CONFIG = "lambda_config.json"
EXPORTED_FILES = (
    *("README.md", "config.json", MODEL_CONFIG, "preprocessor_config.json"),
    *("onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"),
    *("openvino/openvino_model.xml", "openvino/openvino_model.bin"),
    *("serve.py", "decoding.py", "checksums.py", MANIFEST),
)


def is_exported_folder(folder: str | Path) -> bool:
    """Whether a folder has the Hub's layout of an ONNX model, as `lambda-vit export` writes it."""
    return Path(folder, MODEL_CONFIG).is_file()


def check_exported_folder(folder: str | Path) -> list[Path]:
    """
    The files of an export for the Hub. The model was compared when it was exported; here the files are.

    Raises:
        ValueError: without `SHA256SUMS`, which is written last: the export was not finished.
        OSError: if a file is not what `SHA256SUMS` lists, or gone.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: its export was not finished. Export the model again.")
    check_checksums(folder)
    return [folder / name for name in EXPORTED_FILES if (folder / name).is_file()]

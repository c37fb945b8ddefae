"""Files of weights from anywhere: read without running their code, and without believing the sizes they declare."""

import argparse
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file


WRAPPING_KEYS = ("model", "net", "state_dict", "model_ema", "state_dict_ema")

_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".tar")


def read_state_dict(path: Path, weights_key: str | None = None) -> dict:
    """
    What a file holds by name, unwrapped, without the prefix `module.`.

    Args:
        path (`Path`): `.safetensors`, `.pth`, `.pt`, `.bin` or `.tar`.
        weights_key (`str`, *optional*): which of `WRAPPING_KEYS` to read; required where the file has several.

    Raises:
        FileNotFoundError, OSError, ValueError: as [`convert_checkpoint`].
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. (Hugging Face checkpoints, folders: `from_pretrained`.)")
    content = _read_file(path)
    content = content if isinstance(content, Mapping) else {}
    wrappings = [key for key in WRAPPING_KEYS if isinstance(content.get(key), Mapping)]
    if (weights_key is not None or len(wrappings) > 1) and weights_key not in wrappings:
        raise ValueError(f"{path} has weights under {wrappings}: `weights_key` must be one, got {weights_key!r}.")
    tensors = content[weights_key or wrappings[0]] if wrappings else content
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path} holds no named weights, neither bare nor under one of {WRAPPING_KEYS}.")
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def damage_of_archive(path: str | Path) -> str | None:
    """
    Why a file of `torch.save` must not be read, in a few words; `None` if its records are as they were written. torch
    itself looks neither at their checksums nor at the sizes they declare.
    """
    if not zipfile.is_zipfile(path):
        return "it is cut short, or no archive"
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [record for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
            if packed:  # torch never compresses
                return f"{packed[0].filename} in it is compressed, to grow to {packed[0].file_size:,} bytes"
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        return f"it is no sound archive ({error})"
    return f"the checksum of {damaged} in it does not fit" if damaged else None


def _read_file(path: Path):
    if path.suffix not in (".safetensors", *_PICKLE_SUFFIXES):
        raise ValueError(f"{path} is of unknown type. Expected .safetensors, {', '.join(_PICKLE_SUFFIXES)}.")
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):  # before 2020, torch wrote no archives
        damage = damage_of_archive(path)
        if damage:
            raise ValueError(f"{path} is refused, and nothing in it was read: {damage}. Get it again.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # DeiT and the authors save their command line beside the weights. A Namespace is a bag of attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is refused, and nothing in it was run: it asks for {culprit[1] if culprit else 'code'}, or is"
            " damaged. From a pickle only tensors, plain containers and argparse.Namespace are read. Instead:"
            " where you trust the file, load it there and save its tensors as .safetensors."
        ) from error
    except Exception as error:
        # Damaged files make torch and safetensors raise a dozen unrelated types, few of which name the file.
        raise OSError(
            f"{path} cannot be read: it is cut short, damaged, or no {path.suffix} file ({error}). Get it again."
        ) from error

"""Random images, configs and recipes: taken, or refused in a message that says why; never a crash of another kind."""

import dataclasses
import io
import warnings

import numpy as np
import PIL.Image
import yaml
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification
from lambda_vit_hf.data.decoding import UnreadableImageError, decode_image
from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, parse_arguments
from tests.conftest import TINY


# Other examples in each run; what fails is printed with a line that runs it again.
random_input = settings(
    max_examples=60, deadline=None, database=None, print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBa", "RGBX", "I;16"]
FORMATS = ["PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP", "PPM"]


def attempt(call, *refusals: type[BaseException]):
    """What a call gives, and in what words it refused, if it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(), None
        except refusals as error:
            return None, str(error)


@random_input
@given(st.data())
def test_an_image_of_any_mode_and_size_is_8_bit_rgb(data):
    mode, size = data.draw(st.sampled_from(MODES)), data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    content, orientation = data.draw(st.binary(min_size=16, max_size=64)), data.draw(st.integers(0, 9))
    number = len(PIL.Image.new(mode, size).tobytes())
    image = PIL.Image.frombytes(mode, size, (content * (number // len(content) + 1))[:number])
    image.getexif()[0x0112] = orientation
    decoded, refusal = attempt(lambda: decode_image(image), UnreadableImageError)
    if refusal is not None:
        assert mode == "F" and "NaN" in refusal
        return
    assert (decoded.mode, decoded.info, dict(decoded.getexif())) == ("RGB", {}, {})
    assert decoded.size == (size[::-1] if 5 <= orientation <= 8 else size)
    assert decode_image(decoded).tobytes() == decoded.tobytes()
    for form in FORMATS:
        file = io.BytesIO()
        decoded.save(file, form, lossless=True)
        again = decode_image(file.getvalue())
        assert again.size == decoded.size
        assert again.tobytes() == decoded.tobytes() or form in ("JPEG", "GIF"), form


@random_input
@given(st.sampled_from(FORMATS), st.integers(0, 2**32), st.binary(min_size=1, max_size=9), st.booleans())
def test_a_damaged_file_is_an_image_or_named(form, seed, damage, cut):
    generator, file = np.random.default_rng(seed), io.BytesIO()
    PIL.Image.fromarray(generator.integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(file, form)
    place = int(generator.integers(len(file.getvalue())))
    content = file.getvalue()[:place] + damage + (b"" if cut else file.getvalue()[place + len(damage) :])
    decoded, refusal = attempt(lambda: decode_image(content, max_pixels=10**6), UnreadableImageError)
    assert decoded.mode == "RGB" if refusal is None else "cannot be decoded" in refusal


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.integers(-3, 40), st.floats(), st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 9), st.booleans(), st.none()), max_size=7),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
CHECKED = [
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
    "num_channels", "layer_norm_eps", "initializer_range", "attention_flags", "fold_removed", "fold_exponent",
    "token_merging_r", "token_merging_start", "drop_path_rate", "drop_path_schedule", "num_labels", "qkv_bias",
]  # fmt: skip


@random_input
@given(st.dictionaries(st.sampled_from(CHECKED), ANYTHING, min_size=1, max_size=2))
def test_a_config_is_refused_with_a_reason_or_makes_a_model(values):
    config, refusal = attempt(lambda: LambdaViTConfig(**{**TINY, **values}), ValueError, StrictDataclassError)
    if refusal is not None:
        assert any(name in refusal for name in [*values, "attention_flags"]), refusal
    elif all(isinstance(value, int) and abs(value) < 50 for value in values.values()):  # small enough to be built here
        LambdaViTForImageClassification(config)


FIELDS = sorted({field.name for kind in PROGRAM_ARGUMENTS for field in dataclasses.fields(kind)})
# These start or look for something outside: devices, a directory, another library.
OUTSIDE = {"output_dir", "use_cpu", "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config"}


@random_input
@given(st.dictionaries(st.sampled_from([name for name in FIELDS if name not in OUTSIDE]), ANYTHING, max_size=3))
def test_a_recipe_is_taken_or_refused_in_words(tmp_path, capsys, values):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "output_dir": "x", "use_cpu": True}), encoding="utf-8")
    refusals = (ValueError, OSError, ImportError, SystemExit)  # the last is argparse's
    parsed, refusal = attempt(lambda: parse_arguments([str(path)], PROGRAM_ARGUMENTS), *refusals)
    shown = capsys.readouterr().err
    assert parsed is not None or "error: argument" in shown or refusal.strip("2 ")

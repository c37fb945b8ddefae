"""Decoding: every kind of file comes out as people see it, or is named; what cannot be read is counted."""

import copy
import io
import os
import pickle
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from torch.utils.data import DataLoader, Dataset
from transformers.image_utils import load_image

from lambda_vit_hf.data.decoding import (
    MAX_PIXELS,
    ORIENTATION,
    UnreadableImageError,
    UnreadableImages,
    _remove,
    decode_image,
    open_image,
    to_rgb,
)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(mode: str = "RGB") -> PIL.Image.Image:
    """Smooth, so that JPEG keeps it; different in all corners, so that a turned one is noticed."""
    y, x = np.mgrid[:24, :40]
    pixels = np.stack([5 * x, 9 * y, 100 + 2 * x], axis=-1).astype(np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def largest_difference(image: PIL.Image.Image, expected: PIL.Image.Image) -> int:
    assert (image.mode, image.size) == ("RGB", expected.size)
    return int(np.abs(np.asarray(image, np.int16) - np.asarray(expected.convert("RGB"), np.int16)).max())


MODES = {"PNG": ["1", "L", "LA", "P", "RGB", "RGBA"], "TIFF": ["1", "L", "LA", "P", "PA", "RGB", "RGBA"]}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_mode_becomes_rgb_as_in_the_pipeline(kind, mode):
    content = encoded(picture(mode), kind)
    expected = load_image(PIL.Image.open(io.BytesIO(content)))  # what pipeline("image-classification") does
    assert largest_difference(decode_image({"bytes": content, "path": None}), expected) == 0


@pytest.mark.parametrize(("mode", "tolerance"), [("L", 8), ("RGB", 12), ("CMYK", 12)])
def test_jpegs_keep_their_colours(mode, tolerance):
    # Adobe stores CMYK JPEGs inverted: read as they are, they would be negatives.
    content = encoded(picture(mode), "JPEG", quality=95)
    assert largest_difference(decode_image(content), picture(mode)) <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_rotation_is_applied(orientation):
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(picture(), "PNG", exif=exif)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(content)))
    assert largest_difference(decode_image(content), expected) == 0
    assert (expected.size == (24, 40)) == (orientation >= 5)


@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0"])
def test_broken_exif_data_do_not_cost_an_image(exif):
    assert decode_image(encoded(picture(), "JPEG", exif=exif)).size == (40, 24)


@pytest.mark.parametrize("error", [SyntaxError, struct.error, ValueError, OSError])
def test_whatever_pillow_raises_over_exif_data_the_image_is_kept(monkeypatch, error):
    def broken(self):
        raise error("not a TIFF file")

    monkeypatch.setattr(PIL.Image.Image, "getexif", broken)
    assert largest_difference(decode_image(encoded(picture())), picture()) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "XMP"])
def test_nothing_can_rotate_an_image_a_second_time(kind, orientation):
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(picture(), kind, exif=exif) if kind != "XMP" else encoded(
        picture(), "JPEG", xmp=f'<x tiff:Orientation="{orientation}"/>'.encode()
    )  # fmt: skip
    for item in (content, PIL.Image.open(io.BytesIO(content))):
        image = decode_image(item)
        assert image.size == ((24, 40) if orientation >= 5 else (40, 24))
        assert largest_difference(PIL.ImageOps.exif_transpose(image), image) == 0


def test_an_image_that_is_opened_already_is_decoded_as_its_file(monkeypatch):
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6
    content = encoded(picture("L"), "PNG", exif=exif)
    assert largest_difference(decode_image(PIL.Image.open(io.BytesIO(content))), decode_image(content)) == 0
    with pytest.raises(UnreadableImageError, match=r"row 3.*40 x 24 pixels are more than the limit"):
        decode_image(picture(), max_pixels=959, name="row 3")


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "ICO", "PCX"])
def test_formats_that_are_not_on_the_list_are_not_opened(kind, tmp_path, monkeypatch):
    # Pillow hands an EPS, whatever its name, to Ghostscript.
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **options: pytest.fail("Ghostscript ran"))
    (tmp_path / "a.png").write_bytes(encoded(picture(), kind))
    with pytest.raises(UnreadableImageError, match=r"a\.png cannot be decoded"):
        decode_image(tmp_path / "a.png")


def test_an_orientation_outside_one_to_eight_is_left_alone():
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 9
    assert largest_difference(decode_image(encoded(picture(), exif=exif)), picture()) == 0


def test_transparency_is_dropped_as_in_the_pipeline():
    image = PIL.Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert decode_image(encoded(image)).getpixel((0, 0)) == (200, 100, 50)
    palette = PIL.Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert decode_image(encoded(palette, transparency=b"\xff\x00")).getpixel((0, 0)) == (200, 100, 50)


def test_an_animation_gives_its_first_frame():
    frames = [PIL.Image.new("RGB", (6, 6), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(content).getpixel((3, 3)) == (250, 0, 0)


def grays(array: np.ndarray) -> list[int]:
    return np.asarray(to_rgb(PIL.Image.fromarray(array)))[..., 0].ravel().tolist()


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 255, 256, 2**15, 2**16 - 1], "uint16", [0, 0, 1, 128, 255]),
        ([0, 255, 256, 2**15, 2**16 - 1], "int32", [0, 0, 1, 128, 255]),
        ([0, 100, 255], "int32", [0, 100, 255]),
        ([0, 1], "int32", [0, 1]),
        ([-100, 0, 100], "int32", [0, 128, 255]),
        ([0, 10**6, 2 * 10**6], "int32", [0, 128, 255]),
        ([0, 0.5, 1], "float32", [0, 128, 255]),
        ([0, 100, 255], "float32", [0, 100, 255]),
        ([-1, 0, 1], "float32", [0, 128, 255]),
        ([0, 500, 1000], "float32", [0, 128, 255]),
        ([7000, 7000], "float32", [0, 0]),
    ],
)
def test_more_than_eight_bits_are_scaled_not_clipped(values, dtype, expected):
    assert grays(np.array([values], dtype=dtype)) == expected


def test_a_sixteen_bit_file_is_scaled():
    image = PIL.Image.fromarray(np.array([[0, 2**15, 2**16 - 1]], dtype=np.uint16))
    assert [decode_image(encoded(image)).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_an_image_of_nan_is_refused():
    image = PIL.Image.fromarray(np.array([[0, np.nan]], dtype=np.float32))
    with pytest.raises(UnreadableImageError, match="NaN"):
        decode_image(encoded(image, "TIFF"))


def test_paths_bytes_and_decoded_images_are_taken(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    remote = path.as_uri()  # any address with ://
    for item in (path, str(path), {"path": str(path), "bytes": None}, path.read_bytes(), picture(), {"path": remote}):
        assert largest_difference(decode_image(item), picture()) == 0


def bomb(side: int) -> bytes:
    """A PNG of 66 bytes whose header says it is large."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own limit may have been lifted
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    assert 13_378**2 > MAX_PIXELS > 13_377**2
    with pytest.raises(UnreadableImageError, match="13378 x 13378 pixels are more than the limit"):
        decode_image(bomb(13_378))
    with open_image(bomb(13_377)) as image:
        assert image.size == (13_377, 13_377)
    with pytest.raises(UnreadableImageError, match="40 x 24 pixels are more than the limit of 959"):
        decode_image(encoded(picture()), max_pixels=959)
    with pytest.raises(UnreadableImageError, match="40 x 24 pixels"):
        open_image(encoded(picture()), max_pixels=959)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_a_truncated_file_is_an_error(kind):
    image = PIL.Image.effect_noise((64, 64), 50)
    content = encoded(image, kind)
    with pytest.raises(UnreadableImageError, match=r"Image photo\.x cannot be decoded"):
        decode_image({"bytes": content[: len(content) // 2], "path": "photo.x"})


@pytest.mark.parametrize("item", [None, {"bytes": None, "path": None}, b"", b"rubbish", {"bytes": b""}, 7])
def test_what_is_no_image_is_named_as_told(item):
    with pytest.raises(UnreadableImageError, match="Image row 7 cannot be decoded"):
        decode_image(item, name="row 7")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"gone\.jpg"):
        decode_image(str(tmp_path / "gone.jpg"))


def test_memory_running_out_is_not_the_image_s_fault(monkeypatch):
    def no_memory(self):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_memory)
    with pytest.raises(MemoryError):
        decode_image(encoded(picture()))


# The policy


def test_by_default_the_first_unreadable_image_raises():
    with pytest.raises(UnreadableImageError, match=r"bad\.jpg"):
        UnreadableImages().decode({"bytes": b"?", "path": "bad.jpg"})


def test_skipped_images_are_named_once_and_counted(caplog):
    unreadable = UnreadableImages("skip")
    for name in ("a.jpg", "b 'c'.jpg", "a.jpg"):
        assert unreadable.decode({"bytes": b"?", "path": name}) is None
    assert unreadable.decode(picture()) is not None
    assert (unreadable.count, unreadable.names) == (2, ["a.jpg", "b 'c'.jpg"])
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2 and "a.jpg" in warned[0] and "left out" in warned[0]
    assert unreadable.summary() == "2 images could not be decoded: a.jpg, b 'c'.jpg."


def test_twenty_are_named_in_the_log_and_then_no_more(caplog):
    unreadable = UnreadableImages("skip", max_share=1, num_images=1000)
    for index in range(60):
        unreadable.decode(picture())
        if index < 30:
            unreadable.decode(b"?", f"row {index}")
    assert unreadable.count == 30
    assert len(caplog.records) == 21 and "not named" in caplog.records[-1].getMessage()


class _Reads(UnreadableImages):
    """Reads broken images for ever, some readable ones between them."""

    def read_on(self, good_between: int) -> None:
        for index in range(10_000):
            self._read += good_between
            self.decode(b"?", f"row {index}")


@pytest.mark.parametrize(
    ("num_images", "good_between", "message"),
    [
        (3000, 100, r"^31 of 3,000 images .* row 0, .*, \.\.\.\. More than 1.0% are not accepted"),
        (50, 100, "^11 of 50"),  # ten are always allowed
        (None, 49, "^11 images"),  # how many there are is not known: what was read counts
        (10**6, 0, "^11 of 1,000,000"),  # more than half of all that was read
    ],
)
def test_more_than_the_share_raise(num_images, good_between, message):
    with pytest.raises(UnreadableImageError, match=message):
        _Reads("skip", 0.01, num_images=num_images).read_on(good_between)


def test_up_to_the_share_nothing_raises():
    unreadable = UnreadableImages("skip", 0.01, num_images=1500)
    for index in range(15):
        unreadable.decode(picture())
        unreadable.decode(b"?", f"row {index}")
    assert unreadable.count == 15


@pytest.mark.parametrize(("arguments", "message"), [(("ignore",), "'ignore'"), (("skip", 2), "between 0 and 1")])
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnreadableImages(*arguments)


class Broken(Dataset):
    def __init__(self, unreadable):
        self.unreadable = unreadable

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.unreadable.decode(b"?", f"row {index % 3}") is None


def test_the_main_process_sees_what_workers_found():
    unreadable = UnreadableImages("skip")
    for _ in range(2):
        assert all(bool(batch) for batch in DataLoader(Broken(unreadable), num_workers=2))
    assert sorted(unreadable.names) == ["row 0", "row 1", "row 2"]


def test_copies_share_the_count_and_the_owner_cleans_up():
    unreadable = UnreadableImages("skip")
    folder = unreadable._file.parent
    for copied in (copy.deepcopy(unreadable), pickle.loads(pickle.dumps(unreadable))):
        copied.decode(b"?", "row 1")
    assert unreadable.names == ["row 1"]
    _remove(folder, owner=os.getpid() + 1)  # as a forked worker does, when its copy of the object goes
    assert unreadable.names == ["row 1"]
    del unreadable
    assert not folder.exists()
    assert copied.count == 0


@pytest.mark.parametrize("mode", ["RGB", "F", "P"])
@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(mode, size):
    with pytest.raises(UnreadableImageError, match=f"an image of {size[0]} x {size[1]} pixels"):
        decode_image(PIL.Image.new(mode, size))


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (1503, 3)])
def test_a_strip_is_refused_by_its_header(tmp_path, size):
    PIL.Image.new("RGB", size).save(tmp_path / "strip.png")
    for read in (decode_image, open_image):
        with pytest.raises(UnreadableImageError, match=r"strip\.png.*a strip of"):
            read(str(tmp_path / "strip.png"))
    PIL.Image.new("RGB", (1500, 3)).save(tmp_path / "long.png")
    assert decode_image(str(tmp_path / "long.png")).size == (1500, 3)

"""What happens to a picture before an exported model: a `preprocessor_config.json` that means the same everywhere."""

import re

import PIL.Image


# transformers.js 4.3, `src/image_processors_utils.js`: what its class `ImageProcessor` does as transformers does, and
# the processors that are this class by another name there; others have steps of their own.
PROCESSORS = {
    "BitImageProcessor", "CLIPImageProcessor", "DeiTImageProcessor", "DINOv3ViTImageProcessor", "SiglipImageProcessor",
    "ViTImageProcessor",
}  # fmt: skip
STEPS = {"do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"}
_BOX = 4  # and Hamming, 5: transformers.js takes bilinear instead


def describe_preprocessing(image_processor) -> dict:
    """
    The content of `preprocessor_config.json`, with every option written out: nothing is left to a reader's defaults.

    Args:
        image_processor: a Hugging Face image processor that resizes, crops, rescales and normalizes, or some of it.

    Raises:
        ValueError: naming the option, if transformers.js would not do it, or not as transformers does.
    """
    settings = image_processor.to_dict()
    kind = re.sub(r"(Fast|Pil)$", "", settings["image_processor_type"])
    size, crop = (
        {name: value for name, value in dict(settings.get(of) or {}).items() if value is not None}
        for of in ("size", "crop_size")
    )
    resizes, crops = bool(settings.get("do_resize")), bool(settings.get("do_center_crop"))
    refused = {
        name: True for name, value in settings.items() if name.startswith("do_") and value and name not in STEPS
    }
    if kind not in PROCESSORS:
        refused["image_processor_type"] = kind
    if resizes and set(size) not in ({"height", "width"}, {"shortest_edge"}):
        refused["size"] = size
    resample = settings.get("resample")
    if resizes and (resample is None or int(resample) >= _BOX):
        refused["resample"] = resample
    # Where one side is cut and the other is padded, transformers.js 4.3 stops with an error.
    pads = resizes and any(value > size.get(side, size.get("shortest_edge", 0)) for side, value in crop.items())
    if crops and (pads or set(crop) != {"height", "width"}):
        refused["crop_size"] = crop
    if settings.get("data_format") not in (None, "channels_first"):
        refused["data_format"] = settings["data_format"]
    if refused:
        named = ", ".join(f"{name}={value!r}" for name, value in refused.items())
        raise ValueError(f"Cannot export with the image processor's {named}: transformers.js does not do that.")
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,  # as pictures are read in training
        "do_resize": resizes,
        **({"size": size, "resample": int(resample)} if resizes else {}),
        "do_center_crop": crops,
        **({"crop_size": {name: crop[name] for name in ("height", "width")}} if crops else {}),
        "do_rescale": bool(settings.get("do_rescale")),
        "rescale_factor": settings.get("rescale_factor", 1 / 255),
        "do_normalize": bool(settings.get("do_normalize")),
        **({name: settings[name] for name in ("image_mean", "image_std")} if settings.get("do_normalize") else {}),
    }


def processed_size(image_processor, height: int, width: int) -> tuple[int, int]:
    """Height and width that an image processor gives to a picture of this height and width."""
    picture = PIL.Image.new("RGB", (width, height))
    return tuple(image_processor(picture, return_tensors="pt")["pixel_values"].shape[-2:])

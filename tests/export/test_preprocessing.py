"""`preprocessor_config.json` of an export: every option written out, or refused by name."""

import pytest
from transformers import (
    BeitImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    DeiTImageProcessor,
    DINOv3ViTImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from lambda_vit_hf.export.preprocessing import describe_preprocessing


FAMILIES = [BitImageProcessor, CLIPImageProcessor, DeiTImageProcessor, DINOv3ViTImageProcessor, SiglipImageProcessor,
            ViTImageProcessor]  # fmt: skip
REFUSED = {
    "image_processor_type='BeitImageProcessor'": (BeitImageProcessor, {}),
    "do_pad=True": (ViTImageProcessor, dict(do_pad=True)),
    "longest_edge": (ViTImageProcessor, dict(size={"shortest_edge": 16, "longest_edge": 20})),
    "resample=4": (ViTImageProcessor, dict(resample=4)),
    "resample=5": (ViTImageProcessor, dict(resample=5)),
    "'longest_edge': 16": (CLIPImageProcessor, dict(size={"longest_edge": 16}, crop_size=16)),
    r"crop_size=\{\}": (CLIPImageProcessor, dict(crop_size=None)),
    r"crop_size=\{'shortest_edge': 16\}": (CLIPImageProcessor, dict(crop_size={"shortest_edge": 16})),
    "resample=None": (ViTImageProcessor, dict(resample=None)),
    "crop_size=": (
        ViTImageProcessor,
        dict(size={"shortest_edge": 16}, do_center_crop=True, crop_size={"height": 16, "width": 20}),
    ),
    "data_format='channels_last'": (ViTImageProcessor, dict(data_format="channels_last")),
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_the_processor_of_every_family_is_written_out(family):
    processor = family()
    described = describe_preprocessing(processor)
    assert described["image_processor_type"] == family.__name__
    assert {f"do_{step}" for step in ("resize", "center_crop", "rescale", "normalize")} < set(described)
    settings = processor.to_dict()
    assert {name: settings[name] for name in described if described[name] and name in settings} == {
        name: value for name, value in described.items() if value and name in settings
    }


@pytest.mark.parametrize("named", REFUSED)
def test_an_option_that_transformers_js_does_not_honour_is_refused_by_name(named):
    family, options = REFUSED[named]
    with pytest.raises(ValueError, match=named):
        describe_preprocessing(family(**options))


def test_an_option_without_effect_is_not_refused():
    described = describe_preprocessing(ViTImageProcessor(do_resize=False, resample=4))
    assert not described["do_resize"] and "resample" not in described

"""Linear maps in the place of attention: the least squares they claim to be, and models that keep them."""

import copy
import json

import pytest
import torch
from torch.nn import functional

from lambda_vit_hf import AutoLambdaModel, LambdaViTForImageClassification, fit_linear_maps, removal_curve, summarize
from lambda_vit_hf.evaluation.accounting import count_macs
from lambda_vit_hf.models.mapped_attention import LinearMap
from lambda_vit_hf.selection.linear_maps import RIDGE, change_by_replacement
from tests.conftest import in_two_processes, perturb
from tests.selection.test_families import IMAGES
from tests.selection.test_families import model as family  # noqa: F401


def reference_maps(model, images, layers):
    """From the definition, with each token and the mean of its image's tokens side by side in one matrix."""
    hidden, maps = model.embed(images)[0], {}
    for index, layer in enumerate(model.encoder_layers):
        width = hidden.shape[-1]
        if index in layers:
            tokens = functional.layer_norm(hidden, (width,), eps=model.config.layer_norm_eps).double()
            inputs = torch.cat([tokens, tokens.mean(1, keepdim=True).expand_as(tokens)], dim=-1).flatten(0, 1)
            branch = layer.attention_branch(hidden).flatten(0, 1).double()
            centred = inputs - inputs.mean(0)
            ridge = RIDGE * centred[:, :width].square().mean() * len(inputs)
            penalty = ridge.sqrt() * torch.eye(2 * width).double()
            solution = torch.linalg.lstsq(
                torch.cat([centred, penalty]), torch.cat([branch - branch.mean(0), torch.zeros(2 * width, width)])
            ).solution
            bias = branch.mean(0) - inputs.mean(0) @ solution
            maps[index] = LinearMap(solution[:width].T, solution[width:].T, bias)
            hidden = hidden + (inputs @ solution + bias).reshape(hidden.shape).to(hidden.dtype)
        else:
            hidden = layer.mix_tokens(hidden)
        hidden = layer.feed_forward(hidden)
    return maps


@torch.no_grad()
def test_the_maps_are_the_least_squares_of_what_attention_adds(model, images):
    found = fit_linear_maps(model, images, [4, 1], batch_size=7, disable_tqdm=True)
    for layer, expected in reference_maps(model, images, [1, 4]).items():
        for one, other in zip(found[layer], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"calibration_size": -1}, {"autocast_dtype": "float8"}])
def test_a_wrong_option_is_named(model, images, option):
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` must be"):
        fit_linear_maps(model, images, [1], **option)
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` must be"):
        change_by_replacement(model, model, images, **option)


def test_a_dtype_of_torch_is_taken(model, images):
    assert list(fit_linear_maps(model, images, [1], autocast_dtype=torch.bfloat16, disable_tqdm=True)) == [1]


@torch.no_grad()
def test_attention_that_looks_at_all_tokens_alike_is_replaced_without_loss(model, images, monkeypatch):
    monkeypatch.setattr("lambda_vit_hf.selection.linear_maps.RIDGE", 1e-10)
    images, layer = images.repeat(3, 1, 1, 1) + torch.randn(120, 3, 16, 16), model.encoder_layers[2]
    for name in ("q_proj", "k_proj"):  # each token attends to all alike: the mean of their values
        getattr(layer.attention, name).weight.zero_()
    layer.layernorm_before.weight.fill_(0.7)
    whole = model(images).logits
    model.replace_attention(fit_linear_maps(model, images, [2], disable_tqdm=True))
    torch.testing.assert_close(model(images).logits, whole, rtol=1e-3, atol=1e-3)
    layer.mapped_attention.mean_proj.weight.zero_()
    assert (model(images).logits - whole).abs().max() > 1e-2


@torch.no_grad()
def test_a_map_is_nearer_to_attention_than_nothing_is(model, images):
    whole = model(images).logits
    skipped = copy.deepcopy(model)
    skipped.set_fade_to("skip")
    skipped.remove_attention([1, 3])
    model.replace_attention(fit_linear_maps(model, images, [1, 3], disable_tqdm=True))
    assert (model(images).logits - whole).square().mean() < 0.8 * (skipped(images).logits - whole).square().mean()


@torch.no_grad()
def test_every_family_saves_loads_merges_and_serves_them(family, tmp_path):  # noqa: F811
    before = {name: value.clone() for name, value in family.state_dict().items()}
    maps = fit_linear_maps(family, IMAGES, [1, 5], disable_tqdm=True)  # 5 is the last
    assert all(torch.equal(value, before[name]) for name, value in family.state_dict().items()), "left as it was"
    family.replace_attention(maps)
    family.save_pretrained(tmp_path / "thinner")
    loaded = type(family).from_pretrained(tmp_path / "thinner").eval()
    loaded.newly_initialized_head = False
    assert (loaded.config.fade_to, loaded.config.removed_layers) == ("linear", [1, 5])
    expected = family(IMAGES).to_tuple()[0]
    assert torch.equal(loaded(IMAGES).to_tuple()[0], expected)
    again = fit_linear_maps(loaded, IMAGES, [0], disable_tqdm=True)
    torch.testing.assert_close(loaded.prepare_for_inference()(IMAGES).to_tuple()[0], expected, rtol=1e-4, atol=1e-4)
    family.replace_attention(again)
    assert family.config.removed_layers == [0, 1, 5]


@torch.no_grad()
def test_half_precision(model, images):
    model.replace_attention(fit_linear_maps(model, images, [1, 4], disable_tqdm=True))
    in_bfloat16 = copy.deepcopy(model).bfloat16()(images.bfloat16()).logits.float()
    torch.testing.assert_close(in_bfloat16, model(images).logits, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_a_merged_token_counts_as_often_as_it_stands_for(model, images):
    model.replace_attention(fit_linear_maps(model, images, [2], disable_tqdm=True))
    mapped, tokens = model.encoder_layers[2].mapped_attention, torch.randn(2, 4, 32)
    sizes = torch.tensor([1.0, 1.0, 3.0, 1.0]).reshape(1, 4, 1).expand(2, 4, 1)
    repeated = tokens[:, [0, 1, 2, 2, 2, 3]]
    torch.testing.assert_close(mapped(tokens, sizes), mapped(repeated)[:, [0, 1, 2, 5]])
    given = []
    mapped.register_forward_pre_hook(lambda module, args: given.append(args))
    model.set_token_merging(2)
    model(images)
    ((hidden_states, merged, only_first),) = given
    assert hidden_states.shape[1] == merged.shape[1] == 17 - 4 and merged.sum(1).unique().tolist() == [17.0]
    assert not only_first


def test_a_replaced_model_trains_in_its_maps(model, images):
    model.replace_attention(fit_linear_maps(model, images, [1, 4], disable_tqdm=True))
    model.train()(images, labels=torch.zeros(len(images), dtype=torch.long)).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_what_a_map_costs(model, images):
    whole, width = count_macs(model.config), model.config.hidden_size
    skipped = copy.deepcopy(model)
    skipped.set_fade_to("skip")
    skipped.remove_attention([1, 4])
    model.replace_attention(fit_linear_maps(model, images, [1, 4], disable_tqdm=True))
    assert count_macs(model.config) - count_macs(skipped.config) == 2 * (17 + 1) * width**2 < whole
    added = model.num_parameters() - skipped.num_parameters()
    assert added == 2 * (2 * width**2 + width)
    assert "1  mapped" in summarize(model) and "4 kept, 2 mapped" in summarize(model)


@pytest.mark.parametrize(
    ("change", "layers", "message"),
    [
        (lambda model: model.remove_attention([0]), [1], "Remove all layers in one way"),
        (lambda model: model.set_attention_lambda(0.5, [3]), [1], "half-way diluted"),
        (lambda model: model.prepare_for_inference(), [1], "prepared for inference"),
        (lambda model: model.set_token_merging(1, 5), [1], "token_merging_start"),
        (lambda model: None, [6], "layers 0 to 5"),
        (lambda model: None, [1, 1], "more than once"),
        (lambda model: None, range(6), "no attention at all"),
    ],
)
def test_what_cannot_be_replaced_is_refused_before_it_is_measured(model, images, change, layers, message):
    change(model)
    asked = []
    with pytest.raises(ValueError, match=message):
        fit_linear_maps(model, (asked.append(1) or image for image in images), layers, disable_tqdm=True)
    assert not asked


@pytest.mark.parametrize("broken", ["weight", "bias", "nan", "parts", "float16"])
def test_a_map_of_another_shape_or_of_no_numbers_is_refused(model, images, broken):
    weight, bias = torch.zeros(32, 32), torch.zeros(32)
    maps = {
        "weight": LinearMap(weight, weight[:31], bias),
        "bias": LinearMap(weight, weight, bias[:31]),
        "nan": LinearMap(weight * float("nan"), weight, bias),
        "parts": (weight, bias),
        "float16": (weight, weight + 1e6, bias),
    }
    if broken == "float16":
        model.half()
    state = model.state_dict().keys()
    with pytest.raises(ValueError, match="The map of layer 1"):
        model.replace_attention({1: maps[broken]})
    assert model.state_dict().keys() == state and model.config.fade_to == "identity"


def test_attention_cannot_fade_to_a_map_nor_be_removed_beside_one(model, images, tmp_path):
    with pytest.raises(ValueError, match="must be one of"):
        model.set_fade_to("linear")
    model.replace_attention(fit_linear_maps(model, images, [1], disable_tqdm=True))
    with pytest.raises(ValueError, match="not removed, but replaced"):
        model.remove_attention([2])
    with pytest.raises(ValueError, match="Remove all layers in one way"):
        model.set_fade_to("skip")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another function"):
        LambdaViTForImageClassification.from_pretrained(tmp_path, fade_to="skip")
    with pytest.raises(ValueError, match="not removed, but replaced"):
        LambdaViTForImageClassification.from_pretrained(tmp_path, removed_layers=[2])


def test_a_file_without_its_maps_is_refused(model, tmp_path):
    model.set_fade_to("skip")
    model.remove_attention([1])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "fade_to": "linear"}))
    with pytest.raises(ValueError, match="mapped_attention"):
        AutoLambdaModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("edited", ["skip", "identity"])
def test_an_edited_config_is_neither_saved_nor_folded(model, tmp_path, edited):
    model.replace_attention({1: (torch.zeros(32, 32), torch.zeros(32, 32), torch.zeros(32))})
    model.config.fade_to = edited
    for use in (lambda: model.save_pretrained(tmp_path), model.fold_removed_attention):
        with pytest.raises(ValueError, match="instead of editing the config"):
            use()


def test_what_maps_change_is_measured_in_eval_mode_on_any_images(model, images):
    thinner = copy.deepcopy(model)
    thinner.replace_attention(fit_linear_maps(model, images[::2], [1, 4], disable_tqdm=True))
    with torch.no_grad():
        whole, masked = (one(images[1::2]).logits.double().log_softmax(-1) for one in (model, thinner))
    model.config.hidden_dropout_prob = 0.5
    model.train()
    change = change_by_replacement(model, thinner.train(), images[1::2], batch_size=7)
    assert change.divergence == pytest.approx((whole.exp() * (whole - masked)).sum(-1).mean().item(), rel=1e-4)
    assert change.agreement == (whole.argmax(-1) == masked.argmax(-1)).double().mean().item()
    assert model.training and thinner.training


def test_few_images_are_said(model, images, caplog):
    fit_linear_maps(model, images, [1], disable_tqdm=True)
    assert "40 images are few for maps of a width of 32" in caplog.text and "Take 64." in caplog.text


def test_a_curve_of_a_model_with_maps_counts_more_of_them(model, images):
    zeros = torch.zeros(32, 32)
    model.replace_attention({1: (zeros, zeros, zeros[0])})
    curve = removal_curve(model, images, compare_with=(), disable_tqdm=True)
    point = curve.points[1]
    model.replace_attention({point.layers[0]: (zeros, zeros, zeros[0])})
    assert (point.parameters, point.macs) == (model.num_parameters(), count_macs(model.config))


def maps_of_process(folder, rank=0):
    model = perturb(LambdaViTForImageClassification.from_pretrained(folder))
    images = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    maps = fit_linear_maps(model, images, [1, 4], batch_size=2, disable_tqdm=True)
    return {layer: [part.tolist() for part in parts] for layer, parts in maps.items()}


def test_two_processes_fit_the_same_maps_as_one(model, tmp_path):
    model.save_pretrained(tmp_path)
    first, second = in_two_processes(maps_of_process, str(tmp_path))
    assert first == second
    for layer, parts in maps_of_process(tmp_path).items():
        for one, other in zip(parts, first[str(layer)], strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-6)

"""The search against its definition, and how it is called."""

import copy
import dataclasses
import io
import logging

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from lambda_vit_hf import LambdaViTModel, select_attention_layers
from lambda_vit_hf.selection.config import SelectionConfig
from lambda_vit_hf.selection.strategies import STRATEGIES
from tests.numpy_vit import entropy, masked_output


def train(model, steps: int = 30) -> None:
    """Teaches the model which of five patterns lies under the noise: weights that mean something, in a second."""
    generator = torch.Generator().manual_seed(5)
    patterns = torch.randn(5, 3, 16, 16, generator=generator)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(steps):
        labels = torch.randint(5, (32,), generator=generator)
        images = patterns[labels] + torch.randn(32, 3, 16, 16, generator=generator)
        model(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert (model(images).logits.argmax(-1) == labels).float().mean() > 0.6, "the model has learnt nothing"


@pytest.fixture(scope="module")
def trained_weights(made_once):
    model = copy.deepcopy(made_once.model)
    train(model)
    return model.state_dict()


def reference_nose(model, images, num_layers, mask="identity", output="class_head", compare="magnitude"):
    """NOSE from its definition, in numpy, nothing shared or streamed."""
    chosen, path = [], []
    unmasked = entropy(masked_output(model, images, [], mask, output))
    while len(chosen) < num_layers:
        left = [layer for layer in range(model.config.num_hidden_layers) if layer not in chosen]
        values = {i: unmasked - entropy(masked_output(model, images, [*chosen, i], mask, output)) for i in left}
        chosen.append(min(values, key=lambda i: abs(values[i]) if compare == "magnitude" else values[i]))
        path.append(values)
    return chosen, path


def assert_same_search(selection, reference) -> None:
    order, path = reference
    assert selection.order == order
    for step, expected in zip(selection.steps, path, strict=True):
        assert step.transfer_entropy == pytest.approx(expected, rel=1e-9)
    assert selection.transfer_entropy == pytest.approx(path[-1][order[-1]], rel=1e-9)


@pytest.mark.parametrize("strategy", ["nose", "last"])
@pytest.mark.parametrize("mask", ["skip", "identity"])
def test_a_selection_tells_what_its_first_layers_change(model, images, mask, strategy):
    model.set_fade_to(mask)
    selection = select_attention_layers(model, images, num_removed_layers=3, strategy=strategy)
    with torch.no_grad():
        whole = model(images).logits.double().log_softmax(-1)
        for number, change in enumerate(selection.changes, 1):
            smaller = copy.deepcopy(model)
            smaller.remove_attention(selection.order[:number])
            masked = smaller(images).logits.double().log_softmax(-1)
            kl = (whole.exp() * (whole - masked)).sum(-1).mean().item()
            same = (whole.argmax(-1) == masked.argmax(-1)).double().mean().item()
            assert change.divergence == pytest.approx(kl, rel=1e-4, abs=1e-9)
            assert change.agreement == pytest.approx(same)
    assert len(selection.changes) == 3


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("mask", ["skip", "identity"])
@pytest.mark.parametrize("output", ["class_head", "class_token", "token_mean"])
def test_nose_equals_a_plain_reference(model, trained_weights, images, mask, output, trained):
    if trained:
        model.load_state_dict(trained_weights)
    model, images = model.double(), images.double()
    selection = select_attention_layers(
        model, images, num_removed_layers=4, mask=mask, output=output, batch_size=7, disable_tqdm=True
    )
    assert_same_search(selection, reference_nose(model, images, 4, mask, output))


def test_neither_batch_size_nor_order_changes_it(model, trained_weights, images):
    model.load_state_dict(trained_weights)
    model, images = model.double(), images.double()
    reference = reference_nose(model, images, 3, "identity")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for batch_size, shown in ((1, images), (64, images), (7, images[order])):
        selection = select_attention_layers(
            model, shown, num_removed_layers=3, mask="identity", batch_size=batch_size, disable_tqdm=True
        )
        assert_same_search(selection, reference)


def test_comparing_by_value_takes_the_most_negative(model, images):
    model, images = model.double(), images.double()
    selection = select_attention_layers(model, images, num_removed_layers=3, compare="value")
    assert_same_search(selection, reference_nose(model, images, 3, compare="value"))


@pytest.mark.parametrize("as_stream", [False, True], ids=["dataset", "stream"])
def test_datasets_and_streams_select_what_their_images_do(model, images, as_stream):
    model, images = model.double(), images.double()
    calibration = datasets.Dataset.from_dict({"pixel_values": images.numpy()}).with_format("torch")
    if as_stream:
        calibration = calibration.to_iterable_dataset()
    selection = select_attention_layers(model, calibration, num_removed_layers=4, disable_tqdm=True)
    assert_same_search(selection, reference_nose(model, images, 4))
    assert selection.num_images == 40


def test_a_shuffled_loader_selects_what_its_images_do(model, images):
    model, images = model.double(), images.double()
    loader = DataLoader(list(images), batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(1))
    selection = select_attention_layers(model, loader, num_removed_layers=3, disable_tqdm=True)
    assert_same_search(selection, reference_nose(model, images, 3))


def test_an_attention_layer_that_is_exactly_useless_is_picked_first_with_transfer_entropy_zero(model, images):
    with torch.no_grad():
        model.encoder_layers[3].attention.o_proj.weight.zero_()
        model.encoder_layers[3].attention.o_proj.bias.zero_()
    step = select_attention_layers(model, images, num_removed_layers=1, mask="skip").steps[0]
    assert step.picked == 3
    assert step.transfer_entropy[3] == 0.0


def test_the_model_is_left_as_it_was(model, images):
    before = copy.deepcopy(model.state_dict())
    model.train()
    select_attention_layers(model, images, num_removed_layers=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.removed_layers == []


def test_layers_removed_before_are_no_candidates(model, images):
    model.remove_attention([1, 4])
    selection = select_attention_layers(model, images, num_removed_layers=2)
    assert set(selection.steps[0].transfer_entropy) == {0, 2, 3, 5}
    assert [value is None for value in selection.attention_entropy] == [False, True, False, False, True, False]


def test_layer_entropies_are_those_of_the_branches(model, images):
    selection = select_attention_layers(model, images, num_removed_layers=1)
    outputs = {}
    for name in ("attention", "mlp"):
        getattr(model.encoder_layers[2], name).register_forward_hook(
            lambda _m, _i, out, name=name: outputs.update({name: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        model(images)
    for name, measured in (("attention", selection.attention_entropy), ("mlp", selection.mlp_entropy)):
        expected = np.log(outputs[name].double().numpy().reshape(-1, 32).std(axis=0)).sum()
        assert measured[2] == pytest.approx(expected, rel=1e-5), name


def test_a_bare_model_is_measured_at_its_class_token(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    bare = LambdaViTModel.from_pretrained(tmp_path)
    selection = select_attention_layers(bare, images, num_removed_layers=2)
    assert selection.output == "class_token"
    assert selection.order == select_attention_layers(model, images, num_removed_layers=2, output="class_token").order
    with pytest.raises(ValueError, match="no class head"):
        select_attention_layers(bare, images, num_removed_layers=2, output="class_head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_model_computes_in_half_precision_and_the_statistics_do_not(model, images, dtype):
    seen = []
    model.encoder_layers[0].mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    measured = []

    def measure(search):
        measured.extend(search.transfer_entropy([[3]]))
        assert search.unmasked.means.dtype == search.unmasked.squared_deviations.dtype == torch.float64
        return [3]

    half = select_attention_layers(model, images, num_removed_layers=1, strategy=measure, autocast_dtype=dtype)
    assert set(seen) == {dtype}
    assert half.autocast_dtype == str(dtype).removeprefix("torch.")
    whole = select_attention_layers(model, images, num_removed_layers=1, strategy=measure)
    assert measured[0] != measured[1]
    assert measured[0] == pytest.approx(measured[1], abs=0.02)
    assert half.mlp_entropy == pytest.approx(whole.mlp_entropy, abs=0.1)


def test_a_clear_pick_is_stable_and_a_toss_up_is_not(model, images):
    with torch.no_grad():
        for parameter in model.encoder_layers[3].attention.o_proj.parameters():
            parameter.zero_()
    clear = select_attention_layers(model, images, num_removed_layers=1, mask="skip").steps[0]
    assert (clear.picked, clear.stability, clear.standard_error) == (3, 1.0, 0.0)
    with torch.no_grad():
        for parameter in model.encoder_layers[2].attention.o_proj.parameters():
            parameter.mul_(1e-3)
    # Layers 1 and 2 of a stream that both leave almost alone: which is nearer to 0 depends on the images.
    with torch.no_grad():
        for parameter in model.encoder_layers[1].attention.o_proj.parameters():
            parameter.mul_(1e-3)
    second = select_attention_layers(model, images, num_removed_layers=2, mask="skip").steps[1]
    assert second.picked in (1, 2)
    assert 0.2 < second.stability < 0.999
    assert second.standard_error > 0


def test_one_image_has_no_stability(model, images):
    assert select_attention_layers(model, images[:1], num_removed_layers=1).steps[0].stability is None


def test_too_few_images_for_the_width_are_a_warning_with_the_number_needed(model, images, caplog):
    with caplog.at_level(logging.WARNING):
        select_attention_layers(model, images[:10], num_removed_layers=1)
        assert caplog.text == ""
        selection = select_attention_layers(model, images, num_removed_layers=1, output="class_token")
    assert selection.num_channels == 32
    assert "40 calibration images are few for an output of 32 channels: 64 are needed" in caplog.text
    assert "of the resamples" in caplog.text


def test_dead_channels_are_counted_and_said(model, images, caplog):
    with torch.no_grad():
        model.classifier.weight[2].zero_()
    with caplog.at_level(logging.WARNING):
        selection = select_attention_layers(model, images, num_removed_layers=1)
    assert selection.dead_channels == 1
    assert "1 of 5 output channels never change" in caplog.text
    assert np.isfinite(selection.output_entropy)


@pytest.mark.parametrize("nothing", [[], torch.empty(0, 3, 16, 16), iter([])], ids=["list", "tensor", "iterator"])
def test_an_empty_calibration_set_is_an_error(model, nothing):
    with pytest.raises(ValueError, match="empty"):
        select_attention_layers(model, nothing, num_removed_layers=1)


@pytest.mark.parametrize(
    ("old", "new"), [({"num_layers": 2}, {"num_removed_layers": 2}), ({"ratio": 0.4}, {"removal_ratio": 0.4})]
)
def test_former_names_warn_where_they_are_used(model, images, old, new):
    with pytest.warns(FutureWarning, match=f"`{next(iter(old))}` is now `{next(iter(new))}`") as caught:
        selection = select_attention_layers(model, images, **old)
    assert [warning.filename for warning in caught] == [__file__]
    assert selection == select_attention_layers(model, images, **new)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="former name"):
        select_attention_layers(model, images, **old, **new)


def test_options_come_from_a_config_and_single_ones_replace_its_own(model, images):
    config = SelectionConfig(strategy="beam", mask="identity", output="token_mean", batch_size=7, seed=3)
    selection = select_attention_layers(model, images, 2, selection=config)
    assert selection.config == config
    replaced = select_attention_layers(model, images, 2, strategy="nose", selection=config, mask="skip")
    assert replaced.config == dataclasses.replace(config, strategy="nose", mask="skip")
    by_name = select_attention_layers(model, images, 2, output="token_mean", mask="skip")
    assert (replaced.order, by_name.config.calibration_size) == (by_name.order, None)
    assert (by_name.strategy, by_name.output, by_name.mask, by_name.compare) == (
        "nose", "token_mean", "skip", "magnitude",
    )  # fmt: skip
    with pytest.raises(TypeError, match="masks"):
        select_attention_layers(model, images, 2, masks="skip")


def test_a_config_says_how_many_images_of_a_dataset_are_used(model, images):
    dataset = TensorDataset(images)
    selection = select_attention_layers(model, dataset, 2, selection=SelectionConfig(calibration_size=20))
    assert selection.num_images == 20
    assert select_attention_layers(model, dataset, 2).num_images == 40


def test_there_is_one_progress_bar_for_a_search_and_none_if_it_is_disabled(model, images, monkeypatch):
    bars = []

    def bar(*args, disable, **how):
        bars.append((disable, tqdm(*args, disable=disable, file=io.StringIO(), **how)))
        return bars[-1][1]

    monkeypatch.setattr("lambda_vit_hf.selection.select.tqdm", bar)
    select_attention_layers(model, list(images), num_removed_layers=3)
    ((_, shown),) = bars
    assert shown.n == shown.total == 40 * (1 + 3 + 1), "entropies of the layers, three picks, what they change"
    select_attention_layers(model, images, num_removed_layers=3, disable_tqdm=True)
    monkeypatch.setattr("lambda_vit_hf.selection.select.rank_and_num_processes", lambda: (1, 2))
    select_attention_layers(model, images, num_removed_layers=3)
    assert [disabled for disabled, _ in bars] == [False, True, True]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_the_progress_bar_fills_with_every_strategy(model, images, monkeypatch, strategy):
    bars = []

    def bar(*args, disable, **how):
        bars.append(tqdm(*args, disable=False, file=io.StringIO(), **how))
        return bars[-1]

    monkeypatch.setattr("lambda_vit_hf.selection.select.tqdm", bar)
    select_attention_layers(model, images, num_removed_layers=2, strategy=strategy)
    assert bars[0].n == bars[0].total


def test_parts_of_a_model_stay_in_the_mode_they_were_in(model, images):
    model.train()
    model.encoder_layers[2].eval()
    select_attention_layers(model, images, num_removed_layers=1)
    assert model.training and model.encoder_layers[1].training and not model.encoder_layers[2].training


def test_layer_entropies_do_not_depend_on_folding(model):
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model.remove_attention([0, 1, 2])
    found = []
    for _ in range(2):
        selection = select_attention_layers(model, images, num_removed_layers=1)
        found.append([value for value in (*selection.attention_entropy, *selection.mlp_entropy) if value is not None])
        model.fold_removed_attention()
    assert found[1] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize("fade_to", ["identity", "skip"])
def test_a_masked_layer_does_by_default_what_attention_fades_to(model, images, fade_to):
    model.set_fade_to(fade_to)
    selection = select_attention_layers(model, images, num_removed_layers=3)
    assert selection.mask == fade_to
    assert selection == select_attention_layers(model, images, num_removed_layers=3, mask=fade_to)
    model.remove_attention(selection.layers)
    output = torch.cat([model(batch[None]).logits for batch in images]).detach().numpy()
    assert selection.output_entropy - selection.transfer_entropy == pytest.approx(entropy(output), rel=1e-4)

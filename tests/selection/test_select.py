import copy
import functools
import itertools
import json
import logging
import random

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lambda_vit_hf import LambdaViTForImageClassification, LambdaViTModel, select_attention_layers
from lambda_vit_hf.selection import strategies
from lambda_vit_hf.selection.select import AttentionSelection, count_layers
from lambda_vit_hf.selection.strategies import beam
from tests.conftest import in_two_processes
from tests.numpy_vit import entropy, masked_output


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(3))


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


def reference_nose(model, images, num_layers, mask="skip", output="class_head", compare="magnitude"):
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


@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("mask", ["skip", "identity"])
@pytest.mark.parametrize("output", ["class_head", "class_token", "token_mean"])
def test_nose_equals_a_plain_reference(model, images, mask, output, trained):
    if trained:
        train(model)
    model, images = model.double(), images.double()
    selection = select_attention_layers(
        model, images, num_layers=4, mask=mask, output=output, batch_size=7, disable_tqdm=True
    )
    assert_same_search(selection, reference_nose(model, images, 4, mask, output))


def test_neither_batch_size_nor_order_changes_it(model, images):
    train(model)
    model, images = model.double(), images.double()
    reference = reference_nose(model, images, 3, "identity")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for batch_size, shown in ((1, images), (64, images), (7, images[order])):
        selection = select_attention_layers(
            model, shown, num_layers=3, mask="identity", batch_size=batch_size, disable_tqdm=True
        )
        assert_same_search(selection, reference)


def test_comparing_by_value_takes_the_most_negative(model, images):
    model, images = model.double(), images.double()
    selection = select_attention_layers(model, images, num_layers=3, compare="value")
    assert_same_search(selection, reference_nose(model, images, 3, compare="value"))


@pytest.mark.parametrize("as_stream", [False, True], ids=["dataset", "stream"])
def test_a_race_on_some_of_the_images_does_not_change_the_answer(model, images, as_stream, monkeypatch):
    # Noise decides on an eighth of so few images. A stream is searched without.
    monkeypatch.setattr(strategies, "FEWEST_IMAGES", 1)
    model, images = model.double(), images.double()
    calibration = datasets.Dataset.from_dict({"pixel_values": images.numpy()}).with_format("torch")
    if as_stream:
        calibration = calibration.to_iterable_dataset()
    selection = select_attention_layers(model, calibration, num_layers=4, disable_tqdm=True)
    assert_same_search(selection, reference_nose(model, images, 4))
    assert selection.num_images == 40


def test_a_shuffled_loader_selects_what_its_images_do(model, images):
    model, images = model.double(), images.double()
    loader = DataLoader(list(images), batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(1))
    selection = select_attention_layers(model, loader, num_layers=3, disable_tqdm=True)
    assert_same_search(selection, reference_nose(model, images, 3))


def test_an_attention_layer_that_is_exactly_useless_is_picked_first_with_transfer_entropy_zero(model, images):
    with torch.no_grad():
        model.encoder_layers[3].attention.o_proj.weight.zero_()
        model.encoder_layers[3].attention.o_proj.bias.zero_()
    step = select_attention_layers(model, images, num_layers=1).steps[0]
    assert step.picked == 3
    assert step.transfer_entropy[3] == 0.0


def test_the_model_is_left_as_it_was(model, images):
    before = copy.deepcopy(model.state_dict())
    model.train()
    select_attention_layers(model, images, num_layers=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.removed_layers == []


def test_layers_removed_before_are_no_candidates(model, images):
    model.remove_attention([1, 4])
    selection = select_attention_layers(model, images, num_layers=2)
    assert set(selection.steps[0].transfer_entropy) == {0, 2, 3, 5}
    assert [value is None for value in selection.attention_entropy] == [False, True, False, False, True, False]


def test_layer_entropies_are_those_of_the_branches(model, images):
    selection = select_attention_layers(model, images, num_layers=1)
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


def test_first_last_and_random(model, images):
    assert select_attention_layers(model, images, num_layers=2, strategy="first").layers == [0, 1]
    assert select_attention_layers(model, images, num_layers=2, strategy="last").layers == [4, 5]
    drawn = select_attention_layers(model, images, num_layers=3, strategy="random", seed=5).order
    assert drawn == random.Random(5).sample(range(6), 3)


def test_exhaustive_search_finds_the_least_of_all_sets(model, images):
    sets = list(itertools.combinations(range(6), 3))
    values = {}

    def measure_all(search):
        values.update(zip(sets, search.transfer_entropy(sets), strict=True))
        return [0, 1, 2]

    select_attention_layers(model, images, num_layers=3, strategy=measure_all)
    best = min(sets, key=lambda chosen: abs(values[chosen]))
    selection = select_attention_layers(model, images, num_layers=3, strategy="exhaustive")
    assert selection.layers == list(best)
    assert selection.transfer_entropy == pytest.approx(values[best])


def test_too_many_sets_for_an_exhaustive_search_are_refused(images, monkeypatch, model):
    monkeypatch.setattr(strategies, "MOST_SETS", 19)
    with pytest.raises(ValueError, match="20 sets are too many"):
        select_attention_layers(model, images, num_layers=3, strategy="exhaustive")


def test_a_beam_of_one_is_nose_and_a_full_beam_is_exhaustive(model, images):
    narrow, nose = (select_attention_layers(model, images, num_layers=3, strategy=s) for s in (beam(1), "nose"))
    assert narrow.order == nose.order
    full = select_attention_layers(model, images, num_layers=3, strategy=beam(99))
    exhaustive = select_attention_layers(model, images, num_layers=3, strategy="exhaustive")
    assert full.layers == exhaustive.layers
    middle = select_attention_layers(model, images, num_layers=3, strategy="beam")
    for other in (middle, nose):
        assert abs(exhaustive.transfer_entropy) <= abs(other.transfer_entropy) * (1 + 1e-9)  # rounding of sums


def test_lowest_entropy_sorts_by_the_attentions_own_entropy(model, images):
    selection = select_attention_layers(model, images, num_layers=2, strategy="lowest_entropy")
    assert selection.order == sorted(range(6), key=lambda layer: selection.attention_entropy[layer])[:2]


def test_cosine_takes_the_layers_that_turn_the_stream_least(model, images):
    streams = []
    for layer in model.encoder_layers:
        layer.register_forward_pre_hook(lambda module, args: streams.append((args[0], module.mix_tokens(args[0]))))
    with torch.no_grad():
        model(images)
    influence = [(1 - torch.cosine_similarity(x, mixed, dim=-1)).mean().item() for x, mixed in streams]
    for layer in model.encoder_layers:
        layer._forward_pre_hooks.clear()
    selection = select_attention_layers(model, images, num_layers=3, strategy="cosine", batch_size=7)
    assert selection.order == sorted(range(6), key=influence.__getitem__)[:3]


def test_a_strategy_can_be_a_users_function(model, images):
    def least_alone(search):
        values = search.transfer_entropy([[layer] for layer in search.candidates])
        return sorted(search.candidates, key=lambda layer: abs(values[layer]))[: search.num_layers]

    selection = select_attention_layers(model, images, num_layers=2, strategy=least_alone)
    assert selection.strategy == "least_alone"
    assert selection.order[0] == select_attention_layers(model, images, num_layers=1).order[0]


def test_a_bare_model_is_measured_at_its_class_token(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    bare = LambdaViTModel.from_pretrained(tmp_path)
    selection = select_attention_layers(bare, images, num_layers=2)
    assert selection.output == "class_token"
    assert selection.order == select_attention_layers(model, images, num_layers=2, output="class_token").order
    with pytest.raises(ValueError, match="no class head"):
        select_attention_layers(bare, images, num_layers=2, output="class_head")


def test_a_selection_survives_json(model, images, tmp_path):
    selection = select_attention_layers(model, images, num_layers=3)
    selection.save(tmp_path / "selection.json")
    assert AttentionSelection.load(tmp_path / "selection.json") == selection


def test_a_selection_of_an_older_version_is_read(tmp_path):
    old = {"layers": [1], "order": [1], "strategy": "nose", "output": "class_head", "mask": "skip",
           "compare": "magnitude", "steps": [{"selected": [], "transfer_entropy": {"0": 2.0, "1": -0.5}, "picked": 1}],
           "block_evaluations": 12}  # fmt: skip
    (tmp_path / "selection.json").write_text(json.dumps(old))
    selection = AttentionSelection.load(tmp_path / "selection.json")
    assert selection.steps[0].transfer_entropy == {0: 2.0, 1: -0.5}
    assert selection.steps[0].stability is None
    assert selection.pair_transfer_entropy == selection.interactions == []


def test_pairs_are_measured_on_request(model, images):
    model, images = model.double(), images.double()
    model.remove_attention([4])
    selection = select_attention_layers(model, images, num_layers=1, strategy="first", pairs=True)
    pairs, interactions = selection.pair_transfer_entropy, selection.interactions
    assert pairs[4] == [None] * 6 and [row[4] for row in interactions] == [None] * 6
    values = []

    def measure(search):
        values.extend(search.transfer_entropy([[2], [5], [2, 5]]))
        return [0]

    select_attention_layers(model, images, num_layers=1, strategy=measure)
    assert [pairs[2][2], pairs[5][5], pairs[2][5]] == pytest.approx(values, rel=1e-9)
    assert pairs[5][2] == pairs[2][5]
    assert interactions[2][5] == pytest.approx(values[2] - values[0] - values[1], rel=1e-9)
    assert interactions[2][2] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_model_computes_in_half_precision_and_the_statistics_do_not(model, images, dtype):
    seen = []
    model.encoder_layers[0].mlp.fc1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    measured = []

    def measure(search):
        measured.append(search.step([])[3])
        moments = search._moments[frozenset([3])]
        assert moments.means.dtype == moments.squared_deviations.dtype == torch.float64
        return [3]

    half = select_attention_layers(model, images, num_layers=1, strategy=measure, autocast_dtype=dtype)
    assert set(seen) == {dtype}
    assert half.autocast_dtype == str(dtype).removeprefix("torch.")
    whole = select_attention_layers(model, images, num_layers=1, strategy=measure)
    assert measured[0] != measured[1]
    assert measured[0] == pytest.approx(measured[1], abs=0.02)
    assert half.mlp_entropy == pytest.approx(whole.mlp_entropy, abs=0.1)


def test_a_clear_pick_is_stable_and_a_toss_up_is_not(model, images):
    with torch.no_grad():
        for parameter in model.encoder_layers[3].attention.o_proj.parameters():
            parameter.zero_()
    clear = select_attention_layers(model, images, num_layers=1).steps[0]
    assert (clear.picked, clear.stability, clear.standard_error) == (3, 1.0, 0.0)
    with torch.no_grad():
        for parameter in model.encoder_layers[2].attention.o_proj.parameters():
            parameter.mul_(1e-3)
    # Layers 1 and 2 of a stream that both leave almost alone: which is nearer to 0 depends on the images.
    with torch.no_grad():
        for parameter in model.encoder_layers[1].attention.o_proj.parameters():
            parameter.mul_(1e-3)
    second = select_attention_layers(model, images, num_layers=2).steps[1]
    assert second.picked in (1, 2)
    assert 0.2 < second.stability < 0.999
    assert second.standard_error > 0


def test_one_image_has_no_stability(model, images):
    assert select_attention_layers(model, images[:1], num_layers=1).steps[0].stability is None


def test_too_few_images_for_the_width_are_a_warning_with_the_number_needed(model, images, caplog):
    with caplog.at_level(logging.WARNING):
        select_attention_layers(model, images[:10], num_layers=1)
        assert caplog.text == ""
        selection = select_attention_layers(model, images, num_layers=1, output="class_token")
    assert selection.num_channels == 32
    assert "40 calibration images are few for an output of 32 channels: 64 are needed" in caplog.text
    assert "of the resamples" in caplog.text


def test_dead_channels_are_counted_and_said(model, images, caplog):
    with torch.no_grad():
        model.classifier.weight[2].zero_()
    with caplog.at_level(logging.WARNING):
        selection = select_attention_layers(model, images, num_layers=1)
    assert selection.dead_channels == 1
    assert "1 of 5 output channels never change" in caplog.text
    assert np.isfinite(selection.output_entropy)


@pytest.mark.parametrize(("ratio", "expected"), [(0.4, 5), (0.5, 6), (0.25, 3), (0.3, 4), (0.0, 0)])
def test_ratios_count_layers_as_the_paper_does(ratio, expected):
    assert count_layers(12, None, ratio) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_layers": 1, "ratio": 0.5},
        {"ratio": 1.5},
        {"ratio": -0.1},
        {"ratio": float("nan")},
        {"ratio": "half"},
        {"ratio": 1.0},
        {"num_layers": 6},
        {"num_layers": -1},
        {"num_layers": 1.5},
        {"num_layers": 1, "strategy": "best"},
        {"num_layers": 1, "output": "logits"},
        {"num_layers": 1, "mask": "zero"},
        {"num_layers": 1, "compare": "sign"},
    ],
    ids=str,
)
def test_impossible_requests_are_refused(model, images, arguments):
    with pytest.raises(ValueError):
        select_attention_layers(model, images, **arguments)


@pytest.mark.parametrize("nothing", [[], torch.empty(0, 3, 16, 16), iter([])], ids=["list", "tensor", "iterator"])
def test_an_empty_calibration_set_is_an_error(model, nothing):
    with pytest.raises(ValueError, match=r"empty|iterator"):
        select_attention_layers(model, nothing, num_layers=1)


def test_a_plain_vit_is_refused_with_a_hint(vit, images):
    with pytest.raises(ValueError, match="LambdaViT"):
        select_attention_layers(vit, images, num_layers=1)


def select_in_one_of_two_processes(folder: str, images: str, rank: int) -> list[dict]:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    strategies.FEWEST_IMAGES = 1
    model = LambdaViTForImageClassification.from_pretrained(folder).double()
    # A ragged share: 40 images in batches of 7 make 6 batches, the last of 5 images.
    return [
        select_attention_layers(model, torch.load(images), num_layers=3, strategy=strategy, batch_size=7).to_dict()
        for strategy in ("nose", "cosine")
    ]


def test_two_processes_select_what_one_does(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(strategies, "FEWEST_IMAGES", 1)
    images = images.double()
    model.save_pretrained(tmp_path)
    torch.save(images, tmp_path / "images.pt")
    both = in_two_processes(select_in_one_of_two_processes, str(tmp_path), str(tmp_path / "images.pt"))
    for strategy, *found in zip(("nose", "cosine"), *both, strict=True):
        alone = select_attention_layers(model.double(), images, num_layers=3, strategy=strategy, batch_size=7)
        first, second = (AttentionSelection.from_dict(one) for one in found)
        assert first == second, "the processes disagree"
        assert first.order == alone.order
        assert first.attention_entropy == pytest.approx(alone.attention_entropy, rel=1e-9)
        assert first.transfer_entropy == pytest.approx(alone.transfer_entropy, rel=1e-9)
        assert first.num_images == alone.num_images == 40
        assert first.block_evaluations == alone.block_evaluations
        for ours, expected in zip(first.steps, alone.steps, strict=True):
            assert ours.transfer_entropy == pytest.approx(expected.transfer_entropy, rel=1e-9)


def meet_a_nan_in_the_second_process(folder: str, rank: int) -> str:
    torch.distributed.init_process_group("gloo")
    model = LambdaViTForImageClassification.from_pretrained(folder)
    images = torch.zeros(8, 3, 16, 16)
    images[5] = torch.nan  # the second batch is the second process's
    try:
        select_attention_layers(model, images, num_layers=1, batch_size=4, disable_tqdm=True)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def test_an_error_in_one_process_is_one_in_all(model, tmp_path):
    model.save_pretrained(tmp_path)
    first, second = in_two_processes(meet_a_nan_in_the_second_process, str(tmp_path))
    assert second.startswith("ValueError: Features are NaN or infinite")
    assert first.startswith("RuntimeError: Process 1 failed during layer entropies: ValueError: Features are NaN")


@pytest.mark.parametrize("answer", [[0, 0], [0], [0, 1, 2], [0, 9]], ids=str)
def test_a_strategy_that_gives_something_else_than_asked_for_is_refused(model, answer):
    with pytest.raises(ValueError, match="expected 2 different layers"):
        select_attention_layers(model, torch.randn(4, 3, 16, 16), num_layers=2, strategy=lambda search: answer)


def test_a_strategy_without_a_name_is_called_by_its_kind(model):
    def chosen(layers, search):
        return layers

    strategy = functools.partial(chosen, [0, 1])
    selection = select_attention_layers(model, torch.randn(4, 3, 16, 16), num_layers=2, strategy=strategy)
    assert (selection.strategy, selection.layers) == ("partial", [0, 1])


def test_layer_entropies_do_not_depend_on_folding(model):
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    model.remove_attention([0, 1, 2])
    found = []
    for _ in range(2):
        selection = select_attention_layers(model, images, num_layers=1)
        found.append([value for value in (*selection.attention_entropy, *selection.mlp_entropy) if value is not None])
        model.fold_removed_attention()
    assert found[1] == pytest.approx(found[0], abs=1e-4)

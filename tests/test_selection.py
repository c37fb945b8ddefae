import copy
import itertools
import random

import numpy as np
import pytest
import torch

from lambda_vit_hf import LambdaViTForImageClassification, LambdaViTModel, select_attention_layers, strategies
from lambda_vit_hf.selection import AttentionSelection, count_layers
from lambda_vit_hf.strategies import beam


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def reference_output(model, images, masked, mask, output):
    """The masked model, written out block by block, whole set at once."""
    x = model.vit.embeddings(images)
    for index, layer in enumerate(model.encoder_layers):
        if index in masked:
            x = x if mask == "skip" else x + x
        else:
            x = x + layer.attention(layer.layernorm_before(x))[0]
        x = x + layer.mlp(layer.layernorm_after(x))
    x = model.vit.layernorm(x)
    return {"class_head": model.classifier(x[:, 0]), "class_token": x[:, 0], "token_mean": x.mean(1)}[output]


def reference_nose(model, images, num_layers, mask, output, compare="magnitude"):
    """NOSE from its definition, nothing shared or streamed."""

    @torch.no_grad()
    def entropy(masked):
        features = reference_output(model, images, masked, mask, output).double().numpy()
        return np.log(features.std(axis=0)).sum()

    chosen, path = [], []
    while len(chosen) < num_layers:
        values = {i: entropy([]) - entropy([*chosen, i]) for i in range(6) if i not in chosen}
        chosen.append(min(values, key=lambda i: abs(values[i]) if compare == "magnitude" else values[i]))
        path.append(values)
    return chosen, path


@pytest.mark.parametrize("mask", ["skip", "identity"])
@pytest.mark.parametrize("output", ["class_head", "class_token", "token_mean"])
def test_nose_equals_a_plain_reference(model, images, mask, output):
    model = model.double()
    images = images.double()
    selection = select_attention_layers(model, images, num_layers=4, mask=mask, output=output, batch_size=7)
    order, path = reference_nose(model, images, 4, mask, output)
    assert selection.order == order
    for step, expected in zip(selection.steps, path, strict=True):
        assert step.transfer_entropy == pytest.approx(expected, rel=1e-9)


def test_comparing_by_value_takes_the_most_negative(model, images):
    model, images = model.double(), images.double()
    selection = select_attention_layers(model, images, num_layers=3, compare="value")
    assert selection.order == reference_nose(model, images, 3, "skip", "class_head", "value")[0]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_and_order_do_not_matter(model, images, batch_size):
    expected = select_attention_layers(model, images, num_layers=3)
    shuffled = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    selection = select_attention_layers(model, shuffled, num_layers=3, batch_size=batch_size)
    assert selection.order == expected.order
    assert selection.output_entropy == pytest.approx(expected.output_entropy, rel=1e-5)


def test_an_attention_layer_that_is_exactly_useless_is_picked_first_with_transfer_entropy_zero(model, images):
    with torch.no_grad():
        model.encoder_layers[3].attention.o_proj.weight.zero_()
        model.encoder_layers[3].attention.o_proj.bias.zero_()
    step = select_attention_layers(model, images, num_layers=1).steps[0]
    assert step.picked == 3
    assert step.transfer_entropy[3] == 0.0


def test_shared_beginnings_are_computed_once(model, images):
    blocks = []
    for layer in model.encoder_layers:
        layer.mlp.register_forward_hook(lambda *_: blocks.append(1))
    selection = select_attention_layers(model, images, num_layers=3, batch_size=40)
    search_blocks = len(blocks) - 6 - 6  # the layers' own entropies, and the chosen set's, take one pass each
    assert search_blocks == selection.block_evaluations
    naive = 6 * (1 + 6 + 5 + 4)
    assert selection.block_evaluations < 0.75 * naive


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
        assert abs(exhaustive.transfer_entropy) <= abs(other.transfer_entropy)


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


def select_in_one_of_two_processes(rank, folder, images):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = LambdaViTForImageClassification.from_pretrained(folder).double()
    # A ragged share: 40 images in batches of 7 make 6 batches, the last of 5 images.
    for strategy in ("nose", "cosine"):
        selection = select_attention_layers(model, images, num_layers=3, strategy=strategy, batch_size=7)
        selection.save(f"{folder}/{strategy}-{rank}.json")
    torch.distributed.destroy_process_group()


def test_two_processes_select_what_one_does(model, images, tmp_path):
    images = images.double()
    model.save_pretrained(tmp_path)
    torch.multiprocessing.spawn(select_in_one_of_two_processes, (str(tmp_path), images), nprocs=2)
    for strategy in ("nose", "cosine"):
        alone = select_attention_layers(model.double(), images, num_layers=3, strategy=strategy, batch_size=7)
        first, second = (AttentionSelection.load(tmp_path / f"{strategy}-{rank}.json") for rank in (0, 1))
        assert first == second, "the processes disagree"
        assert first.order == alone.order
        assert first.attention_entropy == pytest.approx(alone.attention_entropy, rel=1e-9)
        assert first.transfer_entropy == pytest.approx(alone.transfer_entropy, rel=1e-9)
        assert first.num_images == alone.num_images == 40
        for ours, expected in zip(first.steps, alone.steps, strict=True):
            assert ours.transfer_entropy == pytest.approx(expected.transfer_entropy, rel=1e-9)

"""What a search costs: blocks computed against the naive count, and memory against the number of images."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification, select_attention_layers
from lambda_vit_hf.selection import strategies
from lambda_vit_hf.selection.masked_forward import MaskedForward
from tests.conftest import perturb


NAIVE = 12 * (1 + 12 + 11 + 10 + 9 + 8 + 7)  # each candidate of six steps, and the unmasked model, of twelve layers


def images(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_that_loses_layers_in(order: list[int], num_hidden_layers: int = 12) -> LambdaViTForImageClassification:
    """The attention of the layers in `order` matters little, of the first least; that of the others, much."""
    torch.manual_seed(0)
    config = LambdaViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=num_hidden_layers, num_attention_heads=2,
        intermediate_size=16, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    model = perturb(LambdaViTForImageClassification(config)).double()
    with torch.no_grad():
        for rank, layer in enumerate(order):
            for parameter in model.encoder_layers[layer].attention.o_proj.parameters():
                parameter.mul_(30.0 ** (rank - 7))
    return model


ORDERS = {
    "as in DeiT-B": [0, 1, 3, 4, 6, 9],
    "bottom up": [0, 1, 2, 3, 4, 5],
    "top down": [11, 10, 9, 8, 7, 6],
    "worst for a search step by step": [10, 9, 8, 7, 6, 0],
    "mixed": [3, 10, 5, 0, 11, 7],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_clear_choices_cost_at_most_58_percent_of_the_naive_search_whatever_the_layers(order):
    model = model_that_loses_layers_in(order)
    blocks = []
    for layer in model.encoder_layers:
        layer.mlp.register_forward_hook(lambda module, args, output: blocks.append(len(output)))
    selection = select_attention_layers(model, images(256), 6, batch_size=256, disable_tqdm=True)
    assert selection.layers == sorted(order)
    # The entropies of the layers themselves take one pass more.
    assert selection.block_evaluations == sum(blocks) / 256 - 12
    assert selection.naive_block_evaluations == NAIVE
    assert selection.block_evaluations <= 0.58 * NAIVE


def test_step_by_step_the_cost_depends_on_where_the_picks_are():
    # Too few images for a race. The paper's order for DeiT-B; and the worst there is.
    few = images(32)
    costs = {
        name: select_attention_layers(model_that_loses_layers_in(order), few, 6, disable_tqdm=True).block_evaluations
        for name, order in ORDERS.items()
    }
    assert costs["as in DeiT-B"] == 382 <= 0.58 * NAIVE
    assert costs["bottom up"] == min(costs.values()) == 375
    assert costs["worst for a search step by step"] == max(costs.values()) == 485


def test_along_a_known_way_all_steps_cost_at_most_46_percent_in_one_pass():
    model = model_that_loses_layers_in([])
    costs = {}
    for name, order in ORDERS.items():
        sets = [[*order[:step], layer] for step in range(6) for layer in range(12) if layer not in order[:step]]
        forward = MaskedForward(model, "class_head", "skip")
        list(forward(images(1), [[], *sets]))
        costs[name] = forward.blocks / NAIVE
    assert min(costs.values()) == costs["top down"] == pytest.approx(0.31, abs=0.005)
    assert max(costs.values()) == costs["bottom up"] == pytest.approx(0.46, abs=0.005)


def test_the_naive_search_chooses_the_same_and_computes_every_set_from_the_image_on():
    model = model_that_loses_layers_in(ORDERS["mixed"])
    calibration = images(32)
    naive = select_attention_layers(model, calibration, 6, disable_tqdm=True, reuse_prefixes=False)
    assert naive.block_evaluations == naive.naive_block_evaluations == NAIVE
    reusing = select_attention_layers(model, calibration, 6, disable_tqdm=True)
    assert naive.order == reusing.order
    for one, other in zip(naive.steps, reusing.steps, strict=True):
        assert one.transfer_entropy == pytest.approx(other.transfer_entropy, rel=1e-9)


def test_a_stream_is_searched_step_by_step_so_that_it_is_read_once_for_each():
    model = model_that_loses_layers_in(ORDERS["mixed"])
    calibration = images(256)
    readings = []

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            readings.append(1)
            return iter(calibration)

    streamed = select_attention_layers(model, Stream(), 6, disable_tqdm=True)
    assert len(readings) == 1 + 6, "once for the entropies of the layers, once for each step"
    stored = select_attention_layers(model, calibration, 6, disable_tqdm=True)
    assert streamed.order == stored.order
    assert stored.block_evaluations < streamed.block_evaluations


@pytest.mark.parametrize(("compare", "goes_wrong"), [("magnitude", False), ("value", True)])
def test_toss_ups_cost_little_more_and_the_best_is_still_found(compare, goes_wrong, monkeypatch):
    # Layers that all matter alike: every pick is a toss-up. In the second case the last pick is foreseen wrongly.
    foreseen = []
    foresee = strategies.foresee

    def watched(search, order):
        way = foresee(search, order)
        if goes_wrong and not foreseen:
            way[-1] = next(layer for layer in range(12) if layer not in way)
        foreseen.append(way)
        return way

    monkeypatch.setattr(strategies, "foresee", watched)
    model = model_that_loses_layers_in([])
    how = {"compare": compare, "batch_size": 256, "disable_tqdm": True}
    racing = select_attention_layers(model, images(256, seed=2), 6, **how)
    assert (foreseen[0] != racing.order) == goes_wrong
    assert racing.block_evaluations <= 0.67 * NAIVE
    naive = select_attention_layers(model, images(256, seed=2), 6, reuse_prefixes=False, **how)
    assert racing.order == naive.order
    for one, other in zip(racing.steps, naive.steps, strict=True):
        assert one.transfer_entropy == pytest.approx(other.transfer_entropy, rel=1e-9)


class PeakMemory(TorchDispatchMode):
    """Most bytes held at a time by tensors that operations made inside; views of `given` do not count."""

    def __init__(self, given: torch.Tensor):
        super().__init__()
        self.given = given.untyped_storage()._cdata
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata == self.given:
                    continue
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def test_memory_does_not_grow_with_the_number_of_images():
    model = model_that_loses_layers_in([2, 1], num_hidden_layers=4)
    peaks = []
    for number in (256, 2048):
        calibration = images(number)
        with PeakMemory(calibration) as memory:
            select_attention_layers(model, calibration, 2, batch_size=64, disable_tqdm=True)
        peaks.append(memory.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
    assert peaks[0] > 64 * 3 * 8 * 8 * 8, "not even one batch was seen"

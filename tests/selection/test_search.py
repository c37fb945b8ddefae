"""What a search costs: blocks computed against the naive count, and memory against the number of images."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification, select_attention_layers
from lambda_vit_hf.selection.strategies import nose
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
    "worst": [10, 9, 8, 7, 6, 0],
    "mixed": [3, 10, 5, 0, 11, 7],
}


COSTS = {"as in DeiT-B": 382, "bottom up": 375, "top down": 485, "worst": 485, "mixed": 434}


@pytest.mark.parametrize("name", ORDERS)
def test_shared_prefixes_save_from_30_to_46_percent_of_the_naive_search(name):
    model = model_that_loses_layers_in(ORDERS[name])
    blocks = []
    for layer in model.encoder_layers:
        layer.mlp.register_forward_hook(lambda module, args, output: blocks.append(len(output)))
    searched = []

    def counted(search):
        order = nose(search)
        searched.append(sum(blocks) / 32 - 12)  # the entropies of the layers themselves take a pass
        return order

    selection = select_attention_layers(
        model, images(32), 6, strategy=counted, mask="skip", batch_size=16, disable_tqdm=True
    )
    assert selection.layers == sorted(ORDERS[name])
    assert selection.block_evaluations == searched[0]
    assert selection.naive_block_evaluations == NAIVE
    assert selection.block_evaluations == COSTS[name]
    assert 0.53 <= COSTS[name] / NAIVE <= 0.70


class Naive:
    """A greedy search that computes every set from the image on."""

    def __call__(self, search):
        search.forward.reuse_prefixes = False
        return nose(search)


def test_the_naive_search_picks_the_same_layers():
    model = model_that_loses_layers_in(ORDERS["mixed"])
    naive = select_attention_layers(model, images(32), 6, strategy=Naive(), disable_tqdm=True)
    assert naive.block_evaluations == naive.naive_block_evaluations == NAIVE
    reusing = select_attention_layers(model, images(32), 6, disable_tqdm=True)
    assert naive.order == reusing.order
    for one, other in zip(naive.steps, reusing.steps, strict=True):
        assert one.transfer_entropy == pytest.approx(other.transfer_entropy, rel=1e-9)


def test_a_stream_is_read_once():
    model = model_that_loses_layers_in(ORDERS["mixed"])
    calibration = images(64)
    readings = []

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            readings.append(1)
            return iter(calibration)

    streamed = select_attention_layers(model, Stream(), 6, disable_tqdm=True)
    assert len(readings) == 1
    assert streamed == select_attention_layers(model, calibration, 6, disable_tqdm=True)


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

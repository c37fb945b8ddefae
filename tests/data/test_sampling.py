"""Which images of many, in which folds; random numbers that start from a known state."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from lambda_vit_hf.data.sampling import balanced_folds, evenly_spaced, fixed_randomness


@pytest.mark.parametrize(("num_items", "size"), [(10, 1), (10, 3), (10, 9), (1000, 512), (1797, 512), (7, 7)])
def test_evenly_spaced_indices_are_spread_over_everything(num_items, size):
    indices = evenly_spaced(num_items, size)
    parts = [range(part * num_items // size, (part + 1) * num_items // size) for part in range(size)]
    assert all(index in part for index, part in zip(indices, parts, strict=True)), f"not one in each part: {indices}"
    assert evenly_spaced(num_items, size) == indices


@pytest.mark.parametrize("size", [None, 5, 6, 1000])
def test_fewer_items_than_wanted_are_all_taken(size):
    assert evenly_spaced(5, size) == [0, 1, 2, 3, 4]


def test_evenly_spaced_indices_meet_every_class_of_a_sorted_dataset():
    labels = [label for label in range(10) for _ in range(100)]
    assert [labels[index] for index in evenly_spaced(1000, 10)] == list(range(10))


def test_evenly_spaced_indices_meet_every_class_of_a_dataset_whose_classes_take_turns():
    # Every tenth of 5,120 images would be 512 of one class.
    classes = Counter(index % 10 for index in evenly_spaced(5120, 512))
    assert len(classes) == 10 and max(classes.values()) < 3 * min(classes.values()), classes
    assert evenly_spaced(5120, 512, seed=1) != evenly_spaced(5120, 512)


@pytest.mark.parametrize("num_items", [0, 1, 31, 32, 512, 1000])
def test_folds_are_of_one_size_and_do_not_depend_on_what_follows(num_items):
    folds = balanced_folds(num_items, 32)
    sizes = torch.bincount(folds, minlength=32)
    assert len(folds) == num_items and sizes.max() - sizes.min() <= 1
    assert torch.equal(balanced_folds(2000, 32)[:num_items], folds)
    assert balanced_folds(5, 1).tolist() == [0] * 5


def test_folds_mix_classes_that_take_turns():
    # With fold n % 32, image n of 32 classes in turn would go to a fold of its own class.
    folds = balanced_folds(32 * 40, 32)
    classes = torch.arange(32 * 40) % 32
    assert min(len(classes[folds == fold].unique()) for fold in range(32)) > 15


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_numbers_inside_depend_on_the_seed_only():
    drawn = []
    for outer_seed, seed in ((1, 7), (2, 7), (1, 8)):
        random.seed(outer_seed), np.random.seed(outer_seed), torch.manual_seed(outer_seed)
        with fixed_randomness(seed):
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True)), "another seed gives the same numbers"


@pytest.mark.parametrize("fails", [False, True], ids=["normally", "by an exception"])
def test_random_numbers_go_on_undisturbed_after_leaving(fails):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    undisturbed = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    try:
        with fixed_randomness(0):
            draw()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert draw() == undisturbed


def test_random_numbers_of_a_gpu_are_left_alone(monkeypatch):
    # torch.manual_seed seeds the GPUs too, and nothing puts their state back: each augmented image would restart
    # the dropout and stochastic depth of a model that trains on one.
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with fixed_randomness(0):
        draw()
    assert seeded == [], "the GPUs' generators were seeded"

"""Pictures: that they are there, and that they show the numbers they are given."""

import importlib

import matplotlib
import numpy as np
import PIL.Image
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from lambda_vit_hf.evaluation import plotting
from lambda_vit_hf.evaluation.plotting import plot_layer_entropies, plot_pairs, plot_search, plot_training
from lambda_vit_hf.selection.config import SelectionConfig
from lambda_vit_hf.selection.select import AttentionSelection, SelectionStep


@pytest.fixture
def selection():
    """NOSE picked layer 2, then layer 0, of four; layer 3 had no attention to begin with."""
    return AttentionSelection(
        order=[2, 0],
        config=SelectionConfig(output="class_head"),
        num_images=32,
        output_entropy=3.0,
        attention_entropy=[0.0, 2.0, 3.0, None],
        mlp_entropy=[4.0, 5.0, 6.0, 7.0],
        steps=[
            SelectionStep([], {0: 0.5, 1: 0.6, 2: -0.125}, 2),
            SelectionStep([2], {0: 0.25, 1: 0.75}, 0),
        ],
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, to look into."""
    drawn = []

    def new_figure(**options):
        drawn.append(Figure(**options))
        return drawn[-1]

    monkeypatch.setattr(plotting, "Figure", new_figure)
    return drawn


LOG = [
    {"step": 1, "lambda": 1.0, "loss": 2.3},
    {"step": 2, "lambda": 0.5, "loss": 2.1},
    {"step": 2, "lambda": 0.5, "eval_accuracy": 0.5},
    {"step": 4, "lambda": 0.0, "eval_accuracy": 0.75},
    {"step": 4, "train_runtime": 1.0},
]


def assert_is_a_picture(path, at_least=(600, 300)):
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= at_least[0] and image.height >= at_least[1], f"too small to read: {image.size}"
        assert image.width <= 4000 and image.height <= 4000, f"too large for a model card: {image.size}"
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 10, "an empty picture"


def line(axes, label):
    found = [line for line in axes.get_lines() if line.get_label() == label]
    assert len(found) == 1, f"{len(found)} lines are labelled {label!r}"
    return found[0]


def points(axes, label):
    horizontal, vertical = line(axes, label).get_data()
    return list(zip(horizontal, vertical, strict=True))


def test_a_users_own_backend_and_figures_are_left_alone(selection, tmp_path):
    before = matplotlib.get_backend()
    try:
        pyplot.switch_backend("svg")
        importlib.reload(plotting)
        mine = pyplot.figure()
        plotting.plot_layer_entropies(selection, tmp_path / "entropy.png")
        plotting.plot_training(LOG, tmp_path / "training.png")
        assert matplotlib.get_backend() == "svg"
        assert pyplot.get_fignums() == [mine.number], "figures pile up in a long process"
    finally:
        pyplot.close("all")
        pyplot.switch_backend(before)


def test_entropies_and_search_are_a_png(selection, tmp_path):
    plot_layer_entropies(selection, str(tmp_path / "entropy.png"))
    assert_is_a_picture(tmp_path / "entropy.png")


def test_training_is_a_png(tmp_path):
    plot_training(LOG, tmp_path / "training.png", base_accuracy=0.8)
    assert_is_a_picture(tmp_path / "training.png")


def test_entropies_are_drawn_by_layer_with_the_removed_ones_marked(selection, figures, tmp_path):
    plot_layer_entropies(selection, tmp_path / "entropy.png")
    entropies = figures[0].axes[0]
    assert points(entropies, "attention output") == [(0, 0.0), (1, 2.0), (2, 3.0)]
    assert points(entropies, "MLP output") == [(0, 4.0), (1, 5.0), (2, 6.0), (3, 7.0)]
    marked = [patch.get_x() + patch.get_width() / 2 for patch in entropies.patches]
    assert sorted(marked) == pytest.approx([0, 2])
    assert [text.get_text() for text in entropies.get_legend().get_texts()].count("attention removed") == 1


def test_the_search_is_drawn_in_the_order_of_picking(selection, figures, tmp_path):
    plot_layer_entropies(selection, tmp_path / "entropy.png")
    picks = figures[0].axes[1]
    assert [bar.get_height() for bar in picks.patches] == [-0.125, 0.25]
    assert [label.get_text() for label in picks.get_xticklabels()] == ["+2", "+0"]
    assert "nose" in picks.get_title()


def test_axes_have_units(selection, figures, tmp_path):
    plot_layer_entropies(selection, tmp_path / "entropy.png")
    plot_training(LOG, tmp_path / "training.png")
    labels = [axes.get_ylabel() for figure in figures for axes in figure.axes]
    assert ["nats" in labels[0], "nats" in labels[1], "lambda" in labels[2], "%" in labels[3]] == [True] * 4, labels


@pytest.mark.parametrize("measured", [False, True], ids=["given layers", "measured without a search"])
def test_a_selection_without_a_search_is_drawn_too(tmp_path, measured):
    entropies = {"attention_entropy": [1.0, 2.0], "mlp_entropy": [1.0, 2.0], "num_images": 8} if measured else {}
    plot_layer_entropies(AttentionSelection([1], **entropies), tmp_path / "entropy.png")
    assert_is_a_picture(tmp_path / "entropy.png")


def cells(axes) -> dict[tuple[int, int], str]:
    """Number written at (row, column)."""
    return {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}


def test_every_candidate_of_every_step_has_a_cell_and_picks_are_framed(selection, figures, tmp_path):
    selection.steps[1].stability = 0.75
    plot_search(selection, tmp_path / "search.png")
    assert_is_a_picture(tmp_path / "search.png", at_least=(400, 200))
    axes, bar = figures[0].axes
    assert cells(axes) == {(0, 0): "0.500", (0, 1): "0.600", (0, 2): "-0.125", (1, 0): "0.250", (1, 1): "0.750"}
    framed = [(patch.get_y() + 0.5, patch.get_x() + 0.5) for patch in axes.patches]
    assert framed == [(0, 2), (1, 0)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1: +2", "2: +0 (75%)"]
    assert "nats" in bar.get_ylabel()
    colors = axes.images[0]
    assert colors.norm(0.0) == 0.5, "white is not 0"
    assert np.ma.getmaskarray(colors.get_array()).tolist() == [[False] * 3, [False, False, True]]


def test_pairs_and_interactions_are_drawn_side_by_side(selection, figures, tmp_path):
    selection.pair_transfer_entropy = [[1.0, 3.5, None], [3.5, 2.0, None], [None, None, None]]
    plot_pairs(selection, tmp_path / "pairs.png")
    assert_is_a_picture(tmp_path / "pairs.png")
    pairs, interactions = figures[0].axes[:2]
    assert cells(pairs) == {(0, 0): "1.00", (0, 1): "3.50", (1, 0): "3.50", (1, 1): "2.00"}
    assert cells(interactions) == {(0, 1): "0.500", (1, 0): "0.500"}


def test_what_was_not_measured_cannot_be_drawn(tmp_path):
    given = AttentionSelection([1])
    with pytest.raises(ValueError, match="without a search"):
        plot_search(given, tmp_path / "search.png")
    with pytest.raises(ValueError, match="pairs=True"):
        plot_pairs(given, tmp_path / "pairs.png")


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[5.0]]], ids=["all zero", "a single value"])
def test_maps_without_spread_are_drawn(values, tmp_path):
    steps = [SelectionStep([], dict(enumerate(values[0])), 0)]
    plot_search(AttentionSelection([0], SelectionConfig(output="class_head"), steps=steps), tmp_path / "s.png")
    assert_is_a_picture(tmp_path / "s.png", at_least=(300, 200))


def test_lambda_and_accuracy_are_drawn_over_steps(figures, tmp_path):
    plot_training(LOG, tmp_path / "training.png", base_accuracy=0.8)
    left, right = figures[0].axes
    assert points(left, "lambda") == [(1, 1.0), (2, 0.5), (4, 0.0)]
    assert points(right, "top-1") == [(2, 50.0), (4, 75.0)]
    assert set(line(right, "top-1 before").get_ydata()) == {80.0}
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["lambda", "top-1", "top-1 before"]


@pytest.mark.parametrize(
    "log",
    [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "lambda": 1.0}], [{"step": 1, "eval_accuracy": 0.5}]],
    ids=["empty", "loss only", "lambda only", "accuracy only"],
)
def test_what_was_not_logged_is_not_drawn(log, figures, tmp_path):
    plot_training(log, tmp_path / "training.png")
    assert_is_a_picture(tmp_path / "training.png")
    logged = {"lambda" if "lambda" in entry else "top-1" for entry in log if "loss" not in entry}
    assert {line.get_label() for axes in figures[0].axes for line in axes.get_lines()} == logged

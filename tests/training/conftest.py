"""Small trainings, of which drawing the choice of layers would take half the time."""

from pathlib import Path

import pytest

from lambda_vit_hf.training import callback


@pytest.fixture(autouse=True)
def no_picture(monkeypatch, request):
    """An empty file instead, except in tests that are marked `draws`. Whole trainings, in end_to_end/, draw theirs."""
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(callback, "plot_layer_entropies", lambda selection, path: Path(path).touch())

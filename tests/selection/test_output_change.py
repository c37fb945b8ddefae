"""What a change of the output is, by what the logits say: against torch.distributions."""

import copy

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from lambda_vit_hf import SelectionConfig, fit_linear_maps, removal_curve, select_attention_layers
from lambda_vit_hf.selection.layer_scores import SMALL_SHARE, attention_benefit, lambda_sensitivity
from lambda_vit_hf.selection.linear_maps import change_by_replacement
from lambda_vit_hf.selection.output_change import OutputChange, sum_of_changes


DISTRIBUTIONS = {
    "single_label_classification": lambda logits: Categorical(logits=logits),
    "multi_label_classification": lambda logits: Bernoulli(logits=logits),
    "regression": lambda values: Normal(values, 1.0),
}
AGREE = {
    "single_label_classification": lambda one, other: one.argmax(-1) == other.argmax(-1),
    "multi_label_classification": lambda one, other: ((one.sigmoid() > 0.5) == (other.sigmoid() > 0.5)).all(-1),
}


def plain_change(whole, masked, kind):
    divergence = kl_divergence(*(DISTRIBUTIONS[kind](one.double()) for one in (whole, masked)))
    divergence = divergence if divergence.dim() == 1 else divergence.sum(-1)
    return divergence, AGREE[kind](whole, masked).double() if kind in AGREE else torch.zeros(len(whole))


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_a_change_is_the_divergence_of_what_the_logits_say(kind):
    whole, masked = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    masked = whole + 0.3 * masked
    divergence, agreeing = (part.sum().item() for part in plain_change(whole, masked, kind))
    assert sum_of_changes(whole, masked, kind).tolist() == pytest.approx([divergence, agreeing])
    assert agreeing < 9, "some differ"
    far = sum_of_changes(torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]]), kind)
    assert far[0] >= 400 and far[1] == 0 and far.isfinite().all(), "without overflow"


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "kind"),
    [
        (None, 5, "single_label_classification"),
        ("multi_label_classification", 5, "multi_label_classification"),
        ("regression", 5, "regression"),
        ("regression", 1, "regression"),
        (None, 1, "multi_label_classification"),
    ],
)
def test_a_search_compares_what_the_head_says(model, images, problem_type, num_labels, kind):
    model.classifier = torch.nn.Linear(model.config.hidden_size, num_labels)
    model.config.num_labels, model.config.problem_type = num_labels, problem_type
    model.newly_initialized_head = False
    order = select_attention_layers(model, images, 3, strategy="divergence", disable_tqdm=True).order
    curve = removal_curve(model, images, SelectionConfig(strategy="divergence"), disable_tqdm=True)
    assert curve.selection.order[:3] == order
    with torch.no_grad():
        whole = model(images).logits
        for point in curve.points[1:]:
            removed = copy.deepcopy(model)
            removed.remove_attention(point.layers)
            divergence, agreeing = (part.mean().item() for part in plain_change(whole, removed(images).logits, kind))
            assert point.kind == kind and point.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-7)
            assert point.divergence > 0, "or any layer would do"
            assert point.agreement == (pytest.approx(agreeing) if kind in AGREE else None)
        mapped = copy.deepcopy(model)
        mapped.replace_attention(fit_linear_maps(model, images, order, disable_tqdm=True))
        divergence, agreeing = (part.mean().item() for part in plain_change(whole, mapped(images).logits, kind))
    change = change_by_replacement(model, mapped, images)
    assert (change.kind, change.divergence) == (kind, pytest.approx(divergence, rel=1e-3))
    if kind == "regression":
        assert curve.choose(max_divergence=curve.points[2].divergence) >= 2
        with pytest.raises(ValueError, match="no agreement"):
            curve.choose(min_agreement=0.5)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_scores_of_layers_compare_what_the_head_says(model, images, kind):
    model.config.problem_type = kind
    scores = {}

    def score(search):
        scores["sensitivity"], scores["benefit"] = lambda_sensitivity(search), attention_benefit(search)
        return [0]

    select_attention_layers(model, images, 1, strategy=score, disable_tqdm=True)
    model.eval()
    with torch.no_grad():
        whole, stream = model(images).logits, model.embed(images)[0]
        for layer in range(model.config.num_hidden_layers):
            mixed = model.encoder_layers[layer].mix_tokens(stream)
            before, after = (
                plain_change(whole, model.read_out(one, "class_head"), kind)[0].mean().item()
                for one in (stream, mixed)
            )
            assert scores["benefit"][layer] == pytest.approx(before - after, rel=1e-3, abs=1e-6)
            stream = model.encoder_layers[layer].feed_forward(mixed)
            model.set_attention_lambda(1 - SMALL_SHARE, [layer])
            changed = plain_change(whole, model(images).logits, kind)[0].mean().item()
            model.set_attention_lambda(1.0, [layer])
            assert scores["sensitivity"][layer] == pytest.approx(2 * changed / SMALL_SHARE**2, rel=1e-2, abs=1e-4)


def test_files_of_before_are_read_and_impossible_ones_refused():
    assert OutputChange(0.1, 0.9).kind == "single_label_classification" and OutputChange(0.1, None).kind == "features"
    for impossible in ((0.1, 0.9, "nonsense"), (0.1, None, "multi_label_classification"), (0.1, 0.9, "regression")):
        with pytest.raises(ValueError, match="No change of an output"):
            OutputChange(*impossible)

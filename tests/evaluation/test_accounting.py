"""Parameters and multiply-accumulates, against the paper's arithmetic and against counting while the model runs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification, LambdaViTModel
from lambda_vit_hf.evaluation.accounting import count_macs, count_parameters, summarize


def vit_base(removed: tuple[int, ...] = ()) -> LambdaViTForImageClassification:
    """ViT-B/16 for ImageNet, without memory for its weights."""
    flags = [index not in removed for index in range(12)]
    with torch.device("meta"):
        return LambdaViTForImageClassification(LambdaViTConfig(num_labels=1000, attention_flags=flags))


def macs_while_running(model) -> int:
    """What linear layers and convolutions multiply in one forward pass, plus the two products of each attention."""
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        counted += output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    embedded = {}
    hooks.append(
        model.base_model.embeddings.register_forward_hook(lambda m, i, output: embedded.update(shape=output.shape))
    )
    size = model.config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    with torch.no_grad():
        model.eval()(torch.zeros(1, model.config.num_channels, height, width))
    for hook in hooks:
        hook.remove()
    _, tokens, hidden = embedded["shape"]
    # softmax(Q K^T) V: two products of (tokens, head width) with (tokens, tokens), over heads of hidden / heads each.
    return counted + len(model.config.kept_layers) * 2 * tokens * tokens * hidden


SMALL = {
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": 7,
}
OFF = {"token_merging_r": 0, "token_merging_start": 0}


def test_vit_base_costs_what_the_literature_says():
    model = vit_base()
    assert count_parameters(model) == 86_567_656
    assert f"{count_macs(model.config) / 1e9:.2f}" == "17.56"


@pytest.mark.parametrize(
    ("removed", "parameters_saved", "macs_saved"),
    [((0, 1, 3, 4, 6), 13.7, 14.9), ((0, 1, 3, 4, 6, 9), 16.4, 17.9)],
    ids=["5 of 12", "6 of 12"],
)
def test_removal_from_vit_base_saves_what_the_paper_says(removed, parameters_saved, macs_saved):
    whole, small = vit_base(), vit_base(removed)
    saved = {
        "parameters": 100 * (1 - count_parameters(small) / count_parameters(whole)),
        "MACs": 100 * (1 - count_macs(small.config) / count_macs(whole.config)),
    }
    assert {name: round(value, 1) for name, value in saved.items()} == {
        "parameters": parameters_saved,
        "MACs": macs_saved,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_flags": [True, False, False, True, False]},
        {"attention_flags": [True, False, False, True, False], "fold_removed": True},
        {"image_size": (12, 8), "num_channels": 1},
        {"num_labels": 0},
    ],
    ids=["whole", "removed", "folded", "rectangular and gray", "no head"],
)
def test_macs_are_those_of_a_forward_pass(changes):
    config = LambdaViTConfig(**{**SMALL, **changes})
    assert count_macs(config) == macs_while_running(LambdaViTForImageClassification(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"token_merging_r": 2},
        {"token_merging_r": 1, "token_merging_start": 1, "attention_flags": [True, False, False, True, False]},
        {"token_merging_r": [0, 3, 0, 100, 0]},
        {"token_merging_r": 100},
    ],
    ids=["every block", "from the second kept block", "a list, capped", "until nothing can merge"],
)
def test_macs_with_token_merging_are_those_of_a_forward_pass(changes):
    config = LambdaViTConfig(**{**SMALL, **changes}, attn_implementation="eager")
    model = LambdaViTForImageClassification(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 12, 12))
    assert count_macs(config) == counter.get_total_flops() // 2
    assert count_macs(config) < count_macs(LambdaViTConfig(**{**SMALL, **changes, **OFF}))


def test_macs_without_a_head_are_those_of_the_bare_model():
    config = LambdaViTConfig(**SMALL)
    assert count_macs(config, num_labels=0) == macs_while_running(LambdaViTModel(config, add_pooling_layer=False))


def test_macs_of_a_plain_vit_count_all_attention():
    assert count_macs(ViTConfig(**SMALL)) == count_macs(LambdaViTConfig(**SMALL))


def test_parameters_do_not_count_buffers():
    module = nn.BatchNorm1d(3)  # 6 parameters, 7 numbers in buffers
    assert count_parameters(module) == 6


@pytest.fixture
def model():
    """Layers kept, diluting, off, removed, kept."""
    model = LambdaViTForImageClassification(LambdaViTConfig(**SMALL))
    model.set_attention_lambda(0.25, [1])
    model.set_attention_lambda(0.0, [2])
    model.remove_attention([3])
    return model


def layer_lines(summary: str) -> list[str]:
    return [" ".join(line.split()) for line in summary.splitlines()[1:-1]]


def test_the_summary_names_the_state_of_each_layer(model):
    whole = sum(p.numel() for p in model.encoder_layers[0].parameters())
    small = sum(p.numel() for p in model.encoder_layers[3].parameters())
    assert small < whole
    assert layer_lines(summarize(model)) == [
        f"0 kept {whole:,}",
        f"1 diluting 0.250 {whole:,}",
        f"2 off {whole:,}",
        f"3 removed {small:,}",
        f"4 kept {whole:,}",
    ]


def test_the_summary_ends_with_the_sums(model):
    total = summarize(model).splitlines()[-1]
    assert "2 kept, 1 diluting, 1 off, 1 removed" in total
    assert f"{count_parameters(model):,} parameters" in total
    assert f"{count_macs(model.config) / 1e9:.4g} GMACs" in total


def test_the_summary_counts_folded_layers_as_removed(model):
    model.fold_removed_attention()
    summary = summarize(model)
    assert layer_lines(summary)[3].startswith("3 folded")
    assert "1 removed" in summary.splitlines()[-1]


def test_the_summary_of_a_headless_model_counts_no_head():
    # So many classes that counting their head would show.
    model = LambdaViTModel(LambdaViTConfig(**{**SMALL, "num_labels": 1000}))
    assert f"{count_macs(model.config, num_labels=0) / 1e9:.4g} GMACs" in summarize(model)


def test_a_shape_is_counted_once_and_another_one_anew(monkeypatch):
    counted = []
    enter = FlopCounterMode.__enter__
    monkeypatch.setattr(FlopCounterMode, "__enter__", lambda self: counted.append(1) or enter(self))
    config = LambdaViTConfig(**{**SMALL, "intermediate_size": 28})
    whole = count_macs(config)
    config._name_or_path = "elsewhere"
    assert count_macs(config) == whole and len(counted) == 1
    assert count_macs(config, num_labels=0) < whole
    config.attention_flags = [False, *config.attention_flags[1:]]
    assert count_macs(config) < whole and len(counted) == 3

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from lambda_vit_hf import (
    LambdaViTConfig,
    LambdaViTForImageClassification,
    LambdaViTForMaskedImageModeling,
    LambdaViTModel,
)
from lambda_vit_hf.models.folding import fold_encoder_, residual_scales
from tests.conftest import REMOVED, TINY, checkpoint_activations, perturb


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).logits


def with_visible_epsilon(model):
    """ViT's own LayerNorm epsilon, 1e-12, is so small that no logit shows whether folding scaled it."""
    model.config.layer_norm_eps = 0.01
    model._set_epsilons()
    return model


def count_attention_calls(model, pixel_values) -> int:
    calls = []
    handles = [
        layer.attention.register_forward_hook(lambda *_: calls.append(1))
        for layer in model.encoder_layers
        if layer.attention is not None
    ]
    logits(model, pixel_values)
    for handle in handles:
        handle.remove()
    return len(calls)


# Invariant 1 of the design: with all attention, transformers' ViT to the bit.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("save_original_format", [True, False], ids=["names of v4", "names of v5"])
def test_all_flags_on_equals_vit_to_the_bit(vit, tmp_path, pixel_values, attention, save_original_format):
    vit.save_pretrained(tmp_path, save_original_format=save_original_format)
    reference = ViTForImageClassification.from_pretrained(tmp_path, attn_implementation=attention)
    model = LambdaViTForImageClassification.from_pretrained(tmp_path, attn_implementation=attention)
    assert torch.equal(logits(model, pixel_values), logits(reference, pixel_values))


def test_gradients_equal_vit_to_the_bit(vit, model, pixel_values):
    labels = torch.tensor([0, 1, 2])
    for network in (vit, model):
        network.train()(pixel_values, labels=labels).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), vit.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_the_bare_model_and_masked_image_modeling_equal_vit(tmp_path, pixel_values):
    config = {**TINY, "encoder_stride": 4}
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    bare = perturb(ViTModel(ViTConfig(**config)))
    bare.save_pretrained(tmp_path / "bare")
    ours = LambdaViTModel.from_pretrained(tmp_path / "bare")
    assert torch.equal(ours(pixel_values).pooler_output, bare(pixel_values).pooler_output)
    masked = perturb(ViTForMaskedImageModeling(ViTConfig(**config)))
    masked.save_pretrained(tmp_path / "masked")
    ours = LambdaViTForMaskedImageModeling.from_pretrained(tmp_path / "masked")
    assert torch.equal(ours(pixel_values, mask).reconstruction, masked(pixel_values, mask).reconstruction)


# Invariant 2: lambda = 0, removed and folded are one function.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_off_removed_and_folded_are_equal_to_the_bit(model, pixel_values, dtype):
    model, pixel_values = with_visible_epsilon(model).to(dtype), pixel_values.to(dtype)
    model.set_attention_lambda(0.0, REMOVED)
    off = logits(model, pixel_values)
    model.remove_attention(REMOVED)
    removed = logits(model, pixel_values)
    model.fold_removed_attention()
    folded = logits(model, pixel_values)
    assert torch.equal(off, removed), "removal changed the function"
    assert torch.equal(removed, folded), "folding changed the function"


def test_removal_equals_the_block_formula_of_the_authors(model, pixel_values):
    model.remove_attention(REMOVED)
    with torch.no_grad():
        x = model.vit.embeddings(pixel_values)
        for index, layer in enumerate(model.encoder_layers):
            if index in REMOVED:
                x = x + x
            else:
                x = x + layer.attention(layer.layernorm_before(x))[0]
            x = x + layer.mlp(layer.layernorm_after(x))
        expected = model.classifier(model.vit.layernorm(x)[:, 0])
        model.fold_removed_attention()
        torch.testing.assert_close(model(pixel_values).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [1.0, 0.7, 0.0])
def test_a_diluted_block_is_the_papers_formula(model, pixel_values, value):
    model.set_attention_lambda(value, [1])
    layer = model.encoder_layers[1]
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        attention = layer.attention(layer.layernorm_before(x))[0]
        expected = value * attention + (1 - value) * x + x
        torch.testing.assert_close(layer.mix_tokens(x), expected)


def test_folding_step_by_step_equals_folding_at_once(model, pixel_values):
    at_once = copy.deepcopy(with_visible_epsilon(model))
    at_once.remove_attention(REMOVED)
    at_once.fold_removed_attention()
    for layer in REMOVED:
        model.remove_attention([layer])
        model.fold_removed_attention()
    assert torch.equal(logits(model, pixel_values), logits(at_once, pixel_values))
    assert model.config.to_dict() == at_once.config.to_dict()


def test_a_checkpoint_folded_without_centring_keeps_its_function(model, pixel_values, tmp_path):
    with_visible_epsilon(model).remove_attention(REMOVED)
    expected = logits(model, pixel_values)
    fold_encoder_(None, model.encoder_layers, residual_scales(model.config.attention_flags))
    model.config.fold_removed = True
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("fold_exponent") == 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    restored = LambdaViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(restored, pixel_values), expected)
    restored.remove_attention([1])  # centred from here on
    assert restored.config.fold_exponent == 2
    model = LambdaViTForImageClassification.from_pretrained(tmp_path)
    model.remove_attention([1])
    assert torch.equal(logits(model, pixel_values), logits(restored, pixel_values))


def test_a_callers_config_does_not_hide_how_a_checkpoint_is_folded(removed, tmp_path, pixel_values):
    with_visible_epsilon(removed).save_pretrained(tmp_path)
    assert removed.config.fold_exponent == 1
    changes = {"layer_norm_eps": 0.01, "attention_flags": removed.config.attention_flags, "fold_removed": True}
    config = LambdaViTConfig(**TINY, **changes)
    restored = LambdaViTForImageClassification.from_pretrained(tmp_path, config=config)
    assert torch.equal(logits(restored, pixel_values), logits(removed, pixel_values))


def test_folding_in_float16_rounds_no_more_than_float16_does(model, pixel_values):
    model.half().remove_attention(REMOVED)
    expected = logits(model, pixel_values.half())
    model.fold_removed_attention()
    torch.testing.assert_close(logits(model, pixel_values.half()), expected, rtol=0, atol=5e-3)


def test_a_folded_model_keeps_the_range_of_float16_that_doubling_leaves(pixel_values):
    torch.manual_seed(0)
    config = LambdaViTConfig(**{**TINY, "num_hidden_layers": 24})
    model = LambdaViTForImageClassification(config).eval()  # transformers' initial weights, around 0.02
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.add_(torch.randn(1, 17, 32))  # a stream around 1
    model.remove_attention(list(range(1, 20)))
    expected = logits(model, pixel_values)
    doubling = copy.deepcopy(model).half()
    assert not torch.isfinite(logits(doubling, pixel_values.half())).all()
    model.fold_removed_attention()
    folded = model.half()
    streams = []
    for layer in folded.encoder_layers:
        layer.register_forward_hook(lambda *call: streams.append(call[-1]))
    logits(folded, pixel_values.half())
    assert max(stream.abs().max() for stream in streams) < 2.0**10
    # Half a unit in the last place of float16 is 2**-11 of a value; some 50 roundings stand between image and logits.
    torch.testing.assert_close(logits(folded, pixel_values.half()).float(), expected, rtol=0, atol=5e-3)


def test_folding_what_float16_cannot_hold_is_refused_and_changes_nothing(model):
    with torch.no_grad():
        model.encoder_layers[5].mlp.fc2.weight.fill_(6.1e-5)  # the smallest normal float16: an eighth is subnormal
    model.half().remove_attention(REMOVED)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="float16 cannot hold"):
        model.fold_removed_attention()
    assert not model.config.fold_removed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Invariant 3: the config describes the module tree, and nothing of a removed attention exists.


def test_attention_is_computed_in_kept_layers_only(model, pixel_values):
    assert count_attention_calls(model, pixel_values) == 6
    model.set_attention_lambda(0.0, [1])
    assert count_attention_calls(model, pixel_values) == 5
    model.remove_attention(REMOVED)
    assert count_attention_calls(model, pixel_values) == 2


def test_infinite_weights_of_an_attention_that_is_off_do_no_harm(model, pixel_values):
    with torch.no_grad():
        model.encoder_layers[1].attention.q_proj.weight.fill_(float("inf"))
    model.set_attention_lambda(0.0, [1])
    model.train()(pixel_values, labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    assert torch.isfinite(model.classifier.weight.grad).all()


def test_the_file_of_a_removed_model_is_smaller_by_exactly_the_removed_weights(model, tmp_path):
    def bytes_and_keys(name):
        model.save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        return sum(tensor.nbytes for tensor in tensors.values()), tensors.keys()

    gone = [p for index in REMOVED for p in model.encoder_layers[index].attention_parameters()]
    # The lambda of a removed layer goes with it.
    expected = sum(parameter.nbytes for parameter in gone) + 4 * len(REMOVED)
    full, _ = bytes_and_keys("full")
    model.remove_attention(REMOVED)
    small, keys = bytes_and_keys("small")
    assert full - small == expected
    parts = ("attention", "layernorm_before")
    assert not [key for key in keys for i in REMOVED if key.startswith(tuple(f"vit.layers.{i}.{p}" for p in parts))]


@pytest.mark.parametrize("fold", [False, True])
def test_a_removed_model_is_rebuilt_from_its_folder(model, tmp_path, pixel_values, fold):
    model.remove_attention(REMOVED)
    if fold:
        model.fold_removed_attention()
    model.save_pretrained(tmp_path)
    expected = logits(model, pixel_values)
    for auto_class in (AutoModelForImageClassification, LambdaViTForImageClassification):
        restored = auto_class.from_pretrained(tmp_path)
        assert type(restored) is LambdaViTForImageClassification
        assert torch.equal(logits(restored, pixel_values), expected)
    assert str(LambdaViTForImageClassification(restored.config)) == str(model), "the config alone builds another tree"


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [(AutoModel, LambdaViTModel), (AutoModelForMaskedImageModeling, LambdaViTForMaskedImageModeling)],
)
def test_auto_classes_know_the_model(auto_class, expected):
    assert type(auto_class.from_config(LambdaViTConfig(**TINY))) is expected


def test_lambda_is_saved_with_the_weights(model, tmp_path, pixel_values):
    model.set_attention_lambda(0.25, [3])
    model.set_attention_lambda(0.0, [4])
    model.save_pretrained(tmp_path)
    restored = LambdaViTForImageClassification.from_pretrained(tmp_path)
    assert restored.attention_lambdas == [1.0, 1.0, 1.0, 0.25, 0.0, 1.0]
    assert torch.equal(logits(restored, pixel_values), logits(model, pixel_values))


def test_load_state_dict_brings_lambda_into_effect(model, pixel_values):
    diluted = copy.deepcopy(model)
    diluted.set_attention_lambda(0.0, [1])
    model.load_state_dict(diluted.state_dict())
    assert torch.equal(logits(model, pixel_values), logits(diluted, pixel_values))
    assert count_attention_calls(model, pixel_values) == 5


def test_copies_of_a_removed_model_are_equal(model, pixel_values, tmp_path):
    model.remove_attention(REMOVED)
    torch.save(model, tmp_path / "pickled.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "pickled.pt", weights_only=False)):
        assert torch.equal(logits(copied, pixel_values), logits(model, pixel_values))


def test_an_edited_config_is_not_saved(model, tmp_path):
    model.config.attention_flags = [False] + [True] * 5
    with pytest.raises(ValueError, match="remove_attention"):
        model.save_pretrained(tmp_path)


# Methods: bad input.


@pytest.mark.parametrize("value", [0.5, 0.0])
def test_a_model_that_is_not_finished_is_not_pushed(model, value):
    model.set_attention_lambda(value, [1])
    with pytest.raises(ValueError, match="Nothing was pushed"):
        model.push_to_hub("someone/something")


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True])
def test_lambda_outside_its_range_is_refused(model, value):
    with pytest.raises(ValueError, match="lambda"):
        model.set_attention_lambda(value, [0])


@pytest.mark.parametrize(
    ("layers", "said"),
    [([6], "out of range"), ([-1], "out of range"), ([1, 1], "more than once"), ([0.5], "integers"), (3, "list")],
)
@pytest.mark.parametrize("method", ["remove_attention", "set_attention_lambda"])
def test_layers_that_do_not_exist_are_refused(model, method, layers, said):
    arguments = (layers,) if method == "remove_attention" else (0.5, layers)
    with pytest.raises(ValueError, match=said):
        getattr(model, method)(*arguments)


def test_removing_twice_or_everything_is_refused_and_changes_nothing(model, pixel_values):
    model.remove_attention([1])
    before = logits(model, pixel_values)
    with pytest.raises(ValueError, match="removed already"):
        model.remove_attention([1, 2])
    with pytest.raises(ValueError, match="no attention at all"):
        model.remove_attention([0, 2, 3, 4, 5])
    assert torch.equal(logits(model, pixel_values), before)
    assert model.config.removed_layers == [1]


# What transformers documents.


def test_one_attention_map_per_kept_layer_and_all_hidden_states(model, vit, pixel_values):
    model.remove_attention(REMOVED)
    model.set_attn_implementation("eager")
    output = model(pixel_values, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == len(model.config.kept_layers) == 3
    assert len(output.hidden_states) == 7


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, pixel_values, use_reentrant):
    model.set_attention_lambda(0.5, [1])
    model.set_attention_lambda(0.0, [2])
    labels = torch.tensor([0, 1, 2])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model, use_reentrant=use_reentrant)
        model.zero_grad()
        model.train()(pixel_values, labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_drop_path_drops_whole_images_in_training_only(model, pixel_values):
    config = LambdaViTConfig(**TINY, drop_path_rate=0.5)
    dropping = LambdaViTForImageClassification(config)
    dropping.load_state_dict(model.state_dict())
    assert torch.equal(logits(dropping.eval(), pixel_values), logits(model, pixel_values))
    branch = torch.ones(1000, 2, 3)
    torch.manual_seed(0)
    dropped = dropping.encoder_layers[0].drop_path.train()(branch)
    per_image = dropped.reshape(1000, -1)
    assert ((per_image == 0).all(1) | (per_image == 2).all(1)).all(), "an image was dropped in part"
    assert 400 < (per_image[:, 0] == 0).sum() < 600


def test_lambda_changing_every_step_does_not_recompile(model, pixel_values):
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(1, 10):
        model.set_attention_lambda(1 - step / 10, [0, 1])
        compiled(pixel_values)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_attention_that_is_off_has_no_gradient_but_is_reachable(model, pixel_values):
    # DistributedDataParallel needs every parameter in the graph; the two-process test trains with it.
    model.set_attention_lambda(0.0, [1])
    hidden_states = torch.randn(2, 17, 32, requires_grad=True)
    layer = model.encoder_layers[1].train()
    layer(hidden_states).sum().backward()
    assert all(parameter.grad is None for parameter in layer.attention_parameters())
    assert all(parameter.grad is not None for parameter in layer.mlp.parameters())
    reached = []
    # Kept in a list: torch holds these nodes only weakly.
    nodes = [p.view_as(p).grad_fn.next_functions[0][0] for p in layer.attention_parameters()]
    for node in nodes:
        node.register_hook(lambda *_: reached.append(1))
    layer(hidden_states).sum().backward()
    assert len(reached) == len(layer.attention_parameters())


def test_meta_device_and_low_memory_loading_work(tmp_path, model, pixel_values):
    with torch.device("meta"):
        skeleton = LambdaViTForImageClassification(LambdaViTConfig(**TINY))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    model.set_attention_lambda(0.0, [1])
    model.save_pretrained(tmp_path)
    restored = LambdaViTForImageClassification.from_pretrained(tmp_path, device_map="cpu")
    assert torch.equal(logits(restored, pixel_values), logits(model, pixel_values))
    assert isinstance(restored.encoder_layers[1].attention_lambda, torch.Tensor)
    assert restored.encoder_layers[1].attention_state == "off"


def test_layers_are_transformers_own_modules_where_nothing_differs(model):
    # Tools that look for ViT's modules (PEFT target_modules, quantisation) find them under ViT's names.
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "classifier"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_of_a_folded_model_are_those_of_the_unfolded_one(model, pixel_values, dtype):
    model, pixel_values = with_visible_epsilon(model).to(dtype), pixel_values.to(dtype)
    model.remove_attention(REMOVED)
    expected = model(pixel_values, output_hidden_states=True).hidden_states
    model.fold_removed_attention()
    found = model(pixel_values, output_hidden_states=True).hidden_states
    assert len(found) == 7
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert torch.equal(model(pixel_values, output_hidden_states=True, return_dict=False)[1][3], expected[3])

"""A saved model is the same function wherever it is opened: Auto classes, pipelines, shards, ONNX, PEFT."""

import copy
import json
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from lambda_vit_hf import (
    LambdaViTBackbone,
    LambdaViTConfig,
    LambdaViTForImageClassification,
    LambdaViTForMaskedImageModeling,
    LambdaViTModel,
)
from tests.conftest import REMOVED, TINY, checkpoint_activations, perturb


KEPT = [1, 3, 4]


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


@pytest.fixture
def repository_exists(monkeypatch):
    # AutoBackbone asks the Hub whether the repository exists, and refuses every local folder (transformers 5.23).
    monkeypatch.setattr(HfApi, "repo_exists", lambda *_, **__: True)


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Auto classes and pipelines.


@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [
        (AutoConfig, LambdaViTConfig),
        (AutoModel, LambdaViTModel),
        (AutoModelForImageClassification, LambdaViTForImageClassification),
        (AutoModelForMaskedImageModeling, LambdaViTForMaskedImageModeling),
        (AutoBackbone, LambdaViTBackbone),
        (AutoImageProcessor, ViTImageProcessor),
    ],
)
def test_every_auto_class_opens_the_folder(folder, repository_exists, auto_class, expected):
    assert type(auto_class.from_pretrained(str(folder))) is expected


def test_auto_models_share_the_encoder_to_the_bit(folder, removed, repository_exists, pixel_values):
    with torch.no_grad():
        expected = removed.vit(pixel_values).last_hidden_state
        bare = AutoModel.from_pretrained(folder)(pixel_values).last_hidden_state
        masked = AutoModelForMaskedImageModeling.from_pretrained(folder).vit(pixel_values).last_hidden_state
        backbone = AutoBackbone.from_pretrained(str(folder), reshape_hidden_states=False)
        maps = backbone(pixel_values).feature_maps
    assert torch.equal(bare, expected)
    assert torch.equal(masked, expected)
    assert torch.equal(maps[0], expected)


def test_the_classification_pipeline_gives_the_models_probabilities(folder, removed, image):
    answers = pipeline("image-classification", model=str(folder))(image, top_k=5)
    inputs = ViTImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    probabilities = logits(removed, inputs.pixel_values)[0].softmax(0)
    expected = {removed.config.id2label[index]: value.item() for index, value in enumerate(probabilities)}
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(expected, abs=1e-6)


def test_the_feature_pipeline_gives_the_last_hidden_state(folder, removed, image):
    features = pipeline("image-feature-extraction", model=str(folder))(image)
    inputs = ViTImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    with torch.no_grad():
        expected = removed.vit(**inputs).last_hidden_state
    torch.testing.assert_close(torch.tensor(features), expected, rtol=0, atol=1e-6)


def test_flags_and_other_settings_can_be_given_together(vit_folder):
    flags = [index not in REMOVED for index in range(6)]
    model = LambdaViTForImageClassification.from_pretrained(
        vit_folder, attention_flags=flags, num_labels=3, ignore_mismatched_sizes=True, dtype=torch.bfloat16
    )
    assert model.config.removed_layers == REMOVED
    assert model.classifier.weight.shape == (3, 32)
    assert model.dtype == torch.bfloat16


# Shards.


def test_a_sharded_model_is_the_same_to_the_bit(removed, tmp_path, pixel_values):
    removed.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    restored = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(restored, pixel_values), logits(removed, pixel_values))


def test_a_missing_shard_is_named(removed, tmp_path):
    removed.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        LambdaViTForImageClassification.from_pretrained(tmp_path)


def test_a_shard_missing_from_the_index_too_is_an_error(removed, tmp_path):
    removed.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if name != shard.name}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="stay random"):
        LambdaViTForImageClassification.from_pretrained(tmp_path)


# PEFT.


# PEFT 0.21 asks transformers for it.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_adapts_kept_layers_only_and_merges(folder, removed, tmp_path, pixel_values):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    adapted = get_peft_model(removed, lora)
    adapters = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert sorted({int(name.split(".layers.")[1].split(".")[0]) for name in adapters}) == KEPT
    assert len(adapters) == 2 * len(KEPT)
    before = logits(adapted, pixel_values)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):  # lora_B starts at zero: lora_A moves in the second step
        optimizer.zero_grad()
        adapted(pixel_values=pixel_values, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    expected = logits(adapted.eval(), pixel_values)
    assert not torch.allclose(before, expected, atol=1e-3), "training changed nothing"
    adapted.save_pretrained(tmp_path / "adapter")
    base = LambdaViTForImageClassification.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, pixel_values), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is LambdaViTForImageClassification
    torch.testing.assert_close(logits(merged, pixel_values), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    restored = LambdaViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(restored, pixel_values), logits(merged, pixel_values))


# Training and copies.


def test_checkpointing_activations_of_a_removed_model_gives_the_same_gradients(removed, pixel_values):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(removed, use_reentrant=False)
        removed.zero_grad()
        removed.train()(pixel_values, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in removed.named_parameters()})
    assert removed.is_activation_checkpointing
    assert [name for name in gradients[0] if not torch.equal(gradients[0][name], gradients[1][name])] == []


def test_copies_and_pickles_of_a_diluting_model_have_their_own_lambda(model, pixel_values):
    model.set_attention_lambda(0.3, [1])
    model.set_attention_lambda(0.0, [2])
    before = logits(model, pixel_values)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied, pixel_values), before)
        copied.set_attention_lambda(0.9, [1])
        assert not torch.equal(logits(copied, pixel_values), before)
    assert torch.equal(logits(model, pixel_values), before)


# Export, compilation.


@pytest.mark.parametrize("state", ["removed and folded", "diluting"])
def test_onnx_gives_the_same_logits_for_any_batch(state, tmp_path, pixel_values):
    torch.manual_seed(0)
    model = perturb(LambdaViTForImageClassification(LambdaViTConfig(**{**TINY, "num_hidden_layers": 3})))
    if state == "diluting":
        model.set_attention_lambda(0.3, [1])
    else:
        model.remove_attention([0, 2])
        model.fold_removed_attention()
    path = tmp_path / "model.onnx"
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    options = {"input_names": ["pixel_values"], "output_names": ["logits"], "dynamic_shapes": shapes}
    torch.onnx.export(model, kwargs={"pixel_values": pixel_values[:2]}, f=path, dynamo=True, verbose=False, **options)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])
    for images in (pixel_values[:1], pixel_values):
        (ours,) = session.run(["logits"], {"pixel_values": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(ours), logits(model, images), rtol=0, atol=1e-5)


def test_torch_export_gives_the_same_logits_for_any_batch(removed, pixel_values):
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(removed, (), {"pixel_values": pixel_values[:2]}, dynamic_shapes=shapes).module()
    for images in (pixel_values[:1], pixel_values):
        torch.testing.assert_close(exported(pixel_values=images).logits, logits(removed, images))


def test_compilation_without_graph_breaks_equals_eager(removed, pixel_values):
    torch._dynamo.reset()
    compiled = torch.compile(removed, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled, pixel_values), logits(removed, pixel_values))
    torch._dynamo.reset()


# Loading options.


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps_load_the_same_model(folder, removed, pixel_values, device_map):
    restored = AutoModelForImageClassification.from_pretrained(folder, device_map=device_map)
    ours = logits(restored, pixel_values.to(restored.device)).cpu()
    torch.testing.assert_close(ours, logits(removed, pixel_values), rtol=0, atol=1e-5)


def test_bfloat16_keeps_lambda_and_comes_near_float32(model, tmp_path, pixel_values):
    model.set_attention_lambda(0.3, [1])
    model.set_attention_lambda(0.0, [2])
    model.save_pretrained(tmp_path)
    small = LambdaViTForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert [layer.attention_state for layer in small.encoder_layers][:4] == ["kept", "diluting", "off", "kept"]
    assert small.attention_lambdas == pytest.approx(model.attention_lambdas, abs=2**-9)
    expected = logits(model, pixel_values)
    tolerance = 0.05 * expected.std().item()  # 8 bits of mantissa through six layers
    torch.testing.assert_close(logits(small, pixel_values).float(), expected, rtol=0, atol=tolerance)


# Said by transformers' mask and by torch, about the set-up of flex attention.
@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree(folder, removed, pixel_values, attention):
    restored = AutoModelForImageClassification.from_pretrained(folder, attn_implementation=attention)
    assert restored.config._attn_implementation == attention
    with torch.compiler.set_stance("force_eager"):  # compiling flex attention for this processor would take 20 s
        ours = logits(restored, pixel_values)
    torch.testing.assert_close(ours, logits(removed, pixel_values), rtol=0, atol=1e-5)


def test_config_says_which_layers_the_attention_maps_are_of(folder, pixel_values):
    model = AutoModelForImageClassification.from_pretrained(folder, attn_implementation="eager")
    calls = {}
    for index, layer in enumerate(model.encoder_layers):
        if layer.attention is not None:
            layer.attention.register_forward_hook(lambda _, __, output, index=index: calls.update({index: output[1]}))
    with torch.no_grad():
        output = model(pixel_values, output_attentions=True, output_hidden_states=True)
    assert model.config.kept_layers == KEPT
    assert len(output.attentions) == len(KEPT)
    assert all(torch.equal(calls[index], map) for index, map in zip(KEPT, output.attentions, strict=True))
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1


def test_images_of_another_size_equal_vit(vit, model):
    larger = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = (network(larger, interpolate_pos_encoding=True).logits for network in (model, vit))
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"24\*24"):
        model(larger)


def test_a_vit_of_another_size_is_opened_too(tmp_path):
    perturb(ViTForImageClassification(ViTConfig(**{**TINY, "num_hidden_layers": 2}))).save_pretrained(tmp_path)
    assert LambdaViTBackbone.from_pretrained(tmp_path).out_features == ["stage2"]

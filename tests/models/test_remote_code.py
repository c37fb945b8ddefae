"""The code that travels with the weights opens them where this package is not installed."""

import json
import os
import subprocess
import sys
import textwrap

import torch
from safetensors.torch import load_file, save_file

from lambda_vit_hf import (
    LambdaViTForImageClassification,
)


CODE = [
    "attention.py", "attention_removal.py", "blocks.py", "checksums.py", "configuration_lambda_vit.py",
    "configuration_removal.py", "features.py", "finite.py", "folding.py", "image_size.py", "inference.py",
    "loading.py", "mapped_attention.py", "modeling_lambda_vit.py", "pretrained_model.py", "token_merging.py",
]  # fmt: skip


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


HIDE_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lambda_vit_hf":
            raise ImportError("lambda_vit_hf is hidden")

sys.meta_path.insert(0, Hidden())
"""


def run_without_package(script: str, tmp_path, *arguments) -> dict[str, torch.Tensor]:
    """Runs `script` in a new interpreter that cannot import this package; returns the tensors it puts in `results`."""
    (tmp_path / "script.py").write_text(
        HIDE_PACKAGE
        + "import torch\nfrom safetensors.torch import load_file, save_file\n"
        + "folder, images, out = sys.argv[1:4]\nimages = load_file(images)['images']\nresults = {}\n"
        + textwrap.dedent(script)
        + "\nsave_file({k: v.detach().contiguous() for k, v in results.items()}, out + '/results.safetensors')\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    offline["OMP_NUM_THREADS"] = "1"
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "script.py", *map(str, arguments), str(tmp_path / "out")],
        cwd=tmp_path, env={**os.environ, **offline}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(tmp_path / "out" / "results.safetensors")


def test_remote_code_opens_in_every_auto_class_and_can_be_saved_again(folder, removed, tmp_path, pixel_values):
    save_file({"images": pixel_values}, tmp_path / "images.safetensors")
    script = """
        import huggingface_hub
        from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, pipeline
        from transformers import AutoModelForImageClassification, AutoModelForMaskedImageModeling
        try:
            import lambda_vit_hf
        except ImportError:
            pass
        else:
            raise SystemExit("the package is not hidden")
        huggingface_hub.HfApi.repo_exists = lambda *_, **__: True
        trusted = {"trust_remote_code": True}
        torch.set_grad_enabled(False)
        assert type(AutoConfig.from_pretrained(folder, **trusted)).__module__.startswith("transformers_modules")
        model = AutoModelForImageClassification.from_pretrained(folder, **trusted)
        results["logits"] = model(images).logits
        results["bare"] = AutoModel.from_pretrained(folder, **trusted)(images).last_hidden_state
        masked = AutoModelForMaskedImageModeling.from_pretrained(folder, **trusted)
        results["masked"] = masked.vit(images).last_hidden_state
        backbone = AutoBackbone.from_pretrained(folder, reshape_hidden_states=False, **trusted)
        results["backbone"] = backbone(images).feature_maps[0]
        assert type(AutoImageProcessor.from_pretrained(folder, **trusted)).__name__ == "ViTImageProcessor"
        classify = pipeline("image-classification", model=folder, **trusted)
        results["pipeline"] = classify.model(images).logits
        model.save_pretrained(out + "/again")
        again = AutoModelForImageClassification.from_pretrained(out + "/again", **trusted)
        results["again"] = again(images).logits
    """
    results = run_without_package(script, tmp_path, folder, tmp_path / "images.safetensors")
    with torch.no_grad():
        hidden = removed.vit(pixel_values).last_hidden_state
    expected = logits(removed, pixel_values)
    different = [name for name in ("logits", "pipeline", "again") if not results[name].equal(expected)]
    different += [name for name in ("bare", "masked", "backbone") if not results[name].equal(hidden)]
    assert different == []
    again = tmp_path / "out" / "again"
    assert sorted(path.name for path in again.glob("*.py")) == CODE
    assert json.loads((again / "config.json").read_text())["auto_map"] == removed.config.auto_map
    here = LambdaViTForImageClassification.from_pretrained(again)
    assert torch.equal(logits(here, pixel_values), expected)


def test_remote_code_resumes_a_trainer_checkpoint_as_if_never_stopped(folder, tmp_path, pixel_values):
    save_file({"images": pixel_values}, tmp_path / "images.safetensors")
    script = """
        from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

        data = [{"pixel_values": images[i % 3] + i, "labels": i % 5} for i in range(8)]
        options = dict(max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True)

        def train(name, **resume):
            model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
            arguments = TrainingArguments(out + name, report_to=[], disable_tqdm=True, save_total_limit=3, **options)
            Trainer(model, arguments, train_dataset=data).train(**resume)
            return model.eval()

        whole = train("/whole")
        resumed = train("/resumed", resume_from_checkpoint=out + "/whole/checkpoint-2")
        last = AutoModelForImageClassification.from_pretrained(out + "/whole/checkpoint-4", trust_remote_code=True)
        results = {"whole": whole(images).logits, "resumed": resumed(images).logits, "last": last(images).logits}
    """
    results = run_without_package(script, tmp_path, folder, tmp_path / "images.safetensors")
    assert torch.equal(results["resumed"], results["whole"])
    assert torch.equal(results["last"], results["whole"])
    checkpoint = tmp_path / "out" / "whole" / "checkpoint-4"
    assert sorted(path.name for path in checkpoint.glob("*.py")) == CODE
    here = LambdaViTForImageClassification.from_pretrained(checkpoint)
    assert torch.equal(logits(here, pixel_values), results["whole"])

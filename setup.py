from pathlib import Path

from setuptools import find_packages, setup


CORE = [
    "torch>=2.12",
    "torchvision",
    "transformers>=5.18,<6",
    "safetensors>=0.5",
    "huggingface_hub>=1.31",
    "Pillow",
    "numpy",
    "tqdm",
]
TRAIN = [
    "accelerate>=1.10",
    "datasets>=4.0",
    "evaluate>=0.4.3",
    "filelock>=4.0",
    "Jinja2>=3.1",
    "matplotlib>=3.8",
    "PyYAML",
    "scikit-learn>=1.3",
    "timm>=1.0.20",
]
EXPORT = ["onnx", "onnxruntime", "onnxscript"]
OPENVINO = [*EXPORT, "openvino>=2025.4"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]
TEST = [*TRAIN, *OPENVINO, "hypothesis>=6.100", "import-linter>=2.0", "ipykernel", "mypy>=1.15", "nbclient>=0.10",
        "peft>=0.18", "pytest>=8", "pytest-xdist>=3.7", "ruff>=0.9", "scipy>=1.11", "setuptools>=77",
        "tensorboard"]  # fmt: skip

# Folders of a checkout that an installation has inside the package.
INSIDE = {
    "lambda_vit_hf.model_cards": "model_cards",
    "lambda_vit_hf.recipes": "trainer_scripts/recipes",
    "lambda_vit_hf.accelerate_configs": "trainer_scripts/accelerate_configs",
}

setup(
    name="lambda-vit-hf",
    version="0.1.0",
    description="Vision transformers with fewer attention layers: entropy-guided removal for Hugging Face ViTs",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["lambda_vit_hf", "lambda_vit_hf.*"]), *INSIDE],
    package_dir=INSIDE,
    package_data={"": ["py.typed", "*.jinja", "*.yaml"]},
    py_modules=["lambda_vit_cli"],
    entry_points={"console_scripts": ["lambda-vit = lambda_vit_cli:main"]},
    install_requires=CORE,
    extras_require={"train": TRAIN, "docs": DOCS, "export": EXPORT, "openvino": OPENVINO, "test": TEST},
)

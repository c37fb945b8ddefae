"""Which attention layers a ViT can do without: NOSE, and simple choices to compare it with.

Transfer entropy of a set S of attention layers (Lin et al., CVPR 2024, section 3.2, equation 5):

    TE(S) = H(output) - H(output with the layers of S masked)          (nats)

NOSE takes the combination with the least transfer entropy, greedily, one layer at a time.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from .calibration import CalibrationBatches
from .entropy import GaussianEntropy
from .modeling_lambda_vit import LambdaViTPreTrainedModel


OUTPUTS = ("class_head", "class_token", "token_mean")
MASKS = ("skip", "identity")
COMPARISONS = ("magnitude", "value")


@dataclass
class SelectionStep:
    """One step of a search: the set so far, each candidate's transfer entropy with it (nats), the layer picked."""

    selected: list[int]
    transfer_entropy: dict[int, float]
    picked: int


@dataclass
class AttentionSelection:
    """
    A choice of attention layers and everything measured on the way. Entropies in nats, layers 0-based.

    Attributes:
        order: layers in the order they were picked; sorted in `layers`.
        steps: the search path, one entry per picked layer (empty for strategies that do not search).
        output_entropy: H(output) of the unmasked model.
        attention_entropy: H of each layer's attention output, `None` where there is no attention.
        mlp_entropy: H of each layer's MLP output.
        dead_channels: output channels that never change over the calibration set.
        block_evaluations: blocks computed per calibration batch for the search.
    """

    order: list[int]
    strategy: str
    output: str
    mask: str
    compare: str
    num_images: int = 0
    output_entropy: float | None = None
    attention_entropy: list[float | None] = field(default_factory=list)
    mlp_entropy: list[float] = field(default_factory=list)
    steps: list[SelectionStep] = field(default_factory=list)
    dead_channels: int = 0
    block_evaluations: int = 0

    @property
    def layers(self) -> list[int]:
        """The chosen layers, sorted."""
        return sorted(self.order)

    def to_dict(self) -> dict:
        """JSON-serialisable, with `layers` first."""
        return {"layers": self.layers, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict) -> "AttentionSelection":
        """Inverse of [`~AttentionSelection.to_dict`]."""
        values = {name: value for name, value in values.items() if name != "layers"}
        steps = [
            SelectionStep(step["selected"], {int(k): v for k, v in step["transfer_entropy"].items()}, step["picked"])
            for step in values.pop("steps")
        ]
        return cls(**values, steps=steps)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "AttentionSelection":
        """Read what [`~AttentionSelection.save`] wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


class AttentionSearch:
    """
    What a strategy works with: the candidates, how many to pick, and transfer entropy on demand.

    Masking a layer leaves every block before it unchanged. So the sets of one request are walked as a tree of
    decisions, block by block, and each shared beginning is computed once per batch. Memory grows with batch size and
    depth, not with the number of images or sets. With several processes each takes its share of the batches.

    Attributes:
        candidates (`list[int]`): layers that still have attention.
        num_layers (`int`): how many to pick.
        seed (`int`): for strategies that draw.
        steps (`list[SelectionStep]`): what `pick` recorded.
        block_evaluations (`int`): blocks computed per calibration batch so far.
    """

    def __init__(self, model, batches, num_layers, output, mask, compare, seed, disable_tqdm):
        self.model, self.batches, self.num_layers = model, batches, num_layers
        self.output, self.mask, self.compare, self.seed = output, mask, compare, seed
        self.disable_tqdm = disable_tqdm
        self.candidates = model.config.kept_layers
        self.steps: list[SelectionStep] = []
        self.block_evaluations = 0
        self.output_entropy: float | None = None
        self.dead_channels = 0

    def transfer_entropy(self, sets: Sequence[Iterable[int]]) -> list[float]:
        """TE of each set of masked layers, in nats, in one pass over the calibration images."""
        sets = [frozenset(layers) for layers in sets]
        if self.output_entropy is None:
            sets = [frozenset(), *sets]
        estimates = [GaussianEntropy() for _ in sets]
        blocks_before = self.block_evaluations
        for pixel_values in self.own_batches("transfer entropy"):
            self.block_evaluations = blocks_before
            hidden_states = self.model.base_model.embeddings(pixel_values)
            self._walk(hidden_states, 0, list(zip(sets, estimates, strict=True)))
        for estimate in estimates:
            estimate.merge_across_processes()
        if self.output_entropy is None:
            unmasked, *estimates = estimates
            self.output_entropy, self.dead_channels = unmasked.value(), unmasked.dead_channels()
        return [self.output_entropy - estimate.value() for estimate in estimates]

    def pick(self, selected: list[int], transfer_entropy: dict[int, float]) -> int:
        """The candidate with the least transfer entropy (ties: the lowest layer); the step is recorded."""
        size = abs if self.compare == "magnitude" else float
        picked = min(sorted(transfer_entropy), key=lambda layer: size(transfer_entropy[layer]))
        self.steps.append(SelectionStep(sorted(selected), transfer_entropy, picked))
        return picked

    def _walk(self, hidden_states: torch.Tensor, depth: int, pending: list) -> None:
        layers = self.model.encoder_layers
        for index in range(depth, len(layers)):
            masked = [pair for pair in pending if index in pair[0]]
            pending = [pair for pair in pending if index not in pair[0]]
            if masked:
                scale = 2 if self.mask == "identity" else 1
                self.block_evaluations += 1
                self._walk(layers[index].feed_forward(scale * hidden_states), index + 1, masked)
            if not pending:
                return
            self.block_evaluations += 1
            hidden_states = layers[index](hidden_states)
        features = self._measured(hidden_states)
        for _, estimate in pending:
            estimate.update(features)

    def _measured(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.model.base_model.layernorm(hidden_states)
        if self.output == "token_mean":
            return hidden_states.mean(dim=1)
        class_token = hidden_states[:, 0]
        return self.model.classifier(class_token) if self.output == "class_head" else class_token

    def layer_entropies(self) -> tuple[list[float | None], list[float]]:
        """H of every attention output and of every MLP output over images and tokens, in nats, by layer."""
        layers = self.model.encoder_layers
        attention = [None if layer.attention is None else GaussianEntropy() for layer in layers]
        mlp = [GaussianEntropy() for _ in layers]
        for pixel_values in self.own_batches("layer entropies"):
            hidden_states = self.model.base_model.embeddings(pixel_values)
            for layer, of_attention, of_mlp in zip(layers, attention, mlp, strict=True):
                if of_attention is not None:
                    of_attention.update(layer.attention(layer.layernorm_before(hidden_states))[0])
                hidden_states = layer.mix_tokens(hidden_states)
                branch = layer.mlp(layer.layernorm_after(hidden_states))
                of_mlp.update(branch)
                hidden_states = hidden_states + branch
        for estimate in (*(e for e in attention if e is not None), *mlp):
            estimate.merge_across_processes()
        return [None if e is None else e.value() for e in attention], [e.value() for e in mlp]

    def own_batches(self, description: str) -> Iterator[torch.Tensor]:
        """This process's share of the calibration batches, on the model's device and in its dtype."""
        rank, num_processes = _rank_and_num_processes()
        batches = tqdm(self.batches, desc=description, total=self.batches.num_batches or None, leave=False,
                       disable=self.disable_tqdm or rank > 0)  # fmt: skip
        for index, pixel_values in enumerate(batches):
            if index % num_processes == rank:
                yield pixel_values.to(self.model.device, self.model.dtype)


def nose(search: AttentionSearch) -> list[int]:
    """Entropy-based selection (paper, algorithm 1): greedy, least transfer entropy of the whole set at each step."""
    order: list[int] = []
    while len(order) < search.num_layers:
        candidates = [layer for layer in search.candidates if layer not in order]
        values = search.transfer_entropy([[*order, layer] for layer in candidates])
        order.append(search.pick(order, dict(zip(candidates, values, strict=True))))
    return order


def first(search: AttentionSearch) -> list[int]:
    """The layers nearest to the image."""
    return search.candidates[: search.num_layers]


def last(search: AttentionSearch) -> list[int]:
    """The layers nearest to the head."""
    return search.candidates[::-1][: search.num_layers]


def random_layers(search: AttentionSearch) -> list[int]:
    """Layers drawn with `seed`."""
    return random.Random(search.seed).sample(search.candidates, search.num_layers)


STRATEGIES: dict[str, Callable[[AttentionSearch], list[int]]] = {
    "nose": nose,
    "first": first,
    "last": last,
    "random": random_layers,
}


def count_layers(num_candidates: int, num_layers: int | None, ratio: float | None) -> int:
    """
    How many layers to remove, from exactly one of a count and a ratio (rounded to the nearest count, halves up).

    Raises:
        ValueError: if both or none are given, if the ratio is outside [0, 1], or if no attention would be left.
    """
    if (num_layers is None) == (ratio is None):
        raise ValueError("Give exactly one of the number of layers and the removal ratio.")
    if ratio is not None:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio <= 1.0:
            raise ValueError(f"The removal ratio is a fraction of the attention layers, in [0, 1]; got {ratio!r}.")
        num_layers = int(ratio * num_candidates + 0.5)
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 0:
        raise ValueError(f"The number of layers to remove must be an integer of 0 or more, got {num_layers!r}.")
    if num_layers >= num_candidates:
        raise ValueError(f"Cannot remove {num_layers} of {num_candidates} attention layers: at least one must stay.")
    return num_layers


@torch.no_grad()
def select_attention_layers(
    model: LambdaViTPreTrainedModel,
    calibration,
    num_layers: int | None = None,
    ratio: float | None = None,
    strategy: str | Callable[[AttentionSearch], list[int]] = "nose",
    output: str | None = None,
    mask: str = "skip",
    compare: str = "magnitude",
    batch_size: int = 64,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> AttentionSelection:
    """
    Choose the attention layers to remove. The model is left as it was. In a distributed run every process must call
    it with the same images; all get the same answer.

    Args:
        model ([`LambdaViTModel`] or [`LambdaViTForImageClassification`]): the trained model.
        calibration: images, in any form that [`CalibrationBatches`] takes; a few hundred training images will do.
        num_layers (`int`, *optional*): how many layers to choose; or
        ratio (`float`, *optional*): the fraction of the attention layers that the model has.
        strategy (`str` or callable, *optional*, defaults to `"nose"`):
            `"nose"`, `"first"`, `"last"`, `"random"`, or a function from an [`AttentionSearch`] to layers in order.
        output (`str`, *optional*):
            What is measured: `"class_head"` (logits; default where there is a head), `"class_token"` or
            `"token_mean"`, both after the final LayerNorm.
        mask (`str`, *optional*, defaults to `"skip"`):
            A masked layer passes its input on (`"skip"`, the authors'), or doubles it (`"identity"`, as it will be
            after dilution).
        compare (`str`, *optional*, defaults to `"magnitude"`): transfer entropy by `"magnitude"` or `"value"`.
        batch_size (`int`, *optional*, defaults to 64): images per batch where `calibration` is not batched.
        seed (`int`, *optional*, defaults to 0): for `"random"`.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar.

    Returns:
        [`AttentionSelection`]

    Raises:
        ValueError: on an empty calibration set, an impossible number of layers, or an unknown option.
    """
    if not isinstance(model, LambdaViTPreTrainedModel):
        raise ValueError(f"Expected a LambdaViT model, got {type(model).__name__}: load it with LambdaViT's classes.")
    has_head = hasattr(model, "classifier")
    output = output or ("class_head" if has_head else "class_token")
    options = (("output", output, OUTPUTS), ("mask", mask, MASKS), ("compare", compare, COMPARISONS))
    for name, value, allowed in options:
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")
    if output == "class_head" and not has_head:
        raise ValueError(f"{type(model).__name__} has no class head: use `output='class_token'` or `'token_mean'`.")
    if not callable(strategy) and strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be a function or one of {sorted(STRATEGIES)}, got {strategy!r}.")
    choose = strategy if callable(strategy) else STRATEGIES[strategy]
    num_layers = count_layers(len(model.config.kept_layers), num_layers, ratio)

    batches = CalibrationBatches(calibration, batch_size)
    search = AttentionSearch(model, batches, num_layers, output, mask, compare, seed, disable_tqdm)
    was_training = model.training
    model.eval()
    try:
        attention_entropy, mlp_entropy = search.layer_entropies()
        order = _same_on_every_process(list(choose(search)))
    finally:
        model.train(was_training)
    return AttentionSelection(
        order=order,
        strategy=strategy if isinstance(strategy, str) else strategy.__name__,
        output=output,
        mask=mask,
        compare=compare,
        num_images=batches.num_images,
        output_entropy=search.output_entropy,
        attention_entropy=attention_entropy,
        mlp_entropy=mlp_entropy,
        steps=search.steps,
        dead_channels=search.dead_channels,
        block_evaluations=search.block_evaluations,
    )


def _rank_and_num_processes() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _same_on_every_process(order: list[int]) -> list[int]:
    # Rounding may differ between processes' hardware; a model must not.
    if _rank_and_num_processes()[1] > 1:
        shared = [order]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]
    return order

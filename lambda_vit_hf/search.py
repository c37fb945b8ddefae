"""Transfer entropy of sets of attention layers, measured so that nothing is computed twice.

    TE(S) = H(output) - H(output with the layers of S masked)          (nats)

Source: Lin et al., CVPR 2024, section 3.2, equation 5.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from .entropy import GaussianEntropy


OUTPUTS = ("class_head", "class_token", "token_mean")
MASKS = ("skip", "identity")
COMPARISONS = ("magnitude", "value")


@dataclass
class SelectionStep:
    """One step of a search: the set so far, each candidate's transfer entropy with it (nats), the layer picked."""

    selected: list[int]
    transfer_entropy: dict[int, float]
    picked: int


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
        attention_entropy, mlp_entropy (`list`): of each layer, once `measure_layers` was called.
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
        self.attention_entropy: list[float | None] = []
        self.mlp_entropy: list[float] = []

    def size(self, transfer_entropy: float) -> float:
        """What is compared: the magnitude of a transfer entropy, or its value."""
        return abs(transfer_entropy) if self.compare == "magnitude" else transfer_entropy

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
        picked = min(sorted(transfer_entropy), key=lambda layer: self.size(transfer_entropy[layer]))
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

    def measure_layers(self) -> None:
        """Sets `attention_entropy` and `mlp_entropy`: H of each branch's output over images and tokens, in nats."""
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
        self.attention_entropy = [None if estimate is None else estimate.value() for estimate in attention]
        self.mlp_entropy = [estimate.value() for estimate in mlp]

    def attention_influence(self) -> dict[int, float]:
        """
        How much each candidate's attention turns the stream: 1 - cos(x, x + Attention(LayerNorm(x))), the mean over
        images and tokens. The block influence of ShortGPT (arXiv 2403.03853) and LLM-Drop (arXiv 2406.15786).
        """
        sums = torch.zeros(len(self.candidates) + 1, dtype=torch.float64)
        for pixel_values in self.own_batches("attention influence"):
            hidden_states = self.model.base_model.embeddings(pixel_values)
            sums[-1] += hidden_states.shape[0] * hidden_states.shape[1]
            for index, layer in enumerate(self.model.encoder_layers):
                mixed = layer.mix_tokens(hidden_states)
                if index in self.candidates:
                    cosine = torch.cosine_similarity(hidden_states.double(), mixed.double(), dim=-1)
                    sums[self.candidates.index(index)] += (1 - cosine).sum().cpu()
                hidden_states = layer.feed_forward(mixed)
        if rank_and_num_processes()[1] > 1:
            parts = [None] * rank_and_num_processes()[1]
            dist.all_gather_object(parts, sums)
            sums = torch.stack(parts).sum(dim=0)
        return {layer: (sums[i] / sums[-1]).item() for i, layer in enumerate(self.candidates)}

    def own_batches(self, description: str) -> Iterator[torch.Tensor]:
        """This process's share of the calibration batches, on the model's device and in its dtype."""
        rank, num_processes = rank_and_num_processes()
        batches = tqdm(self.batches, desc=description, total=self.batches.num_batches or None, leave=False,
                       disable=self.disable_tqdm or rank > 0)  # fmt: skip
        for index, pixel_values in enumerate(batches):
            if index % num_processes == rank:
                yield pixel_values.to(self.model.device, self.model.dtype)


def rank_and_num_processes() -> tuple[int, int]:
    """Of torch's default process group; `(0, 1)` without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1

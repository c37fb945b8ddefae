"""What a selection found: the layers, and everything measured to find them."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .config import SelectionConfig
from .output_change import OutputChange
from .search import SelectionStep
from .strategies import STRATEGIES


_OLD_FIELDS = ("strategy", "output", "mask", "compare", "autocast_dtype")  # of files written before there was a config


@dataclass(frozen=True)
class UnknownStrategy:
    """A strategy that was a function: a file keeps its name only."""

    name: str

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, search):
        raise ValueError(f"The strategy {self.name!r} was a function, of which a file keeps only the name: pass it.")


@dataclass
class AttentionSelection:
    """
    A choice of attention layers and everything measured to find it. Entropies in nats, layers 0-based.

    Attributes:
        order: layers in the order they were picked; sorted in `layers`.
        config: the options, with the `output` that was measured; `None` where the layers were given.
        num_images: calibration images.
        steps: the search path, one entry per picked layer, with the transfer entropy of every candidate and the
            stability of the pick (empty for strategies that do not search).
        changes: entry `k` is how masking the first `k + 1` layers of `order` changes the output, nothing trained
            (empty where the layers were given).
        output_entropy: H(output) of the unmasked model.
        transfer_entropy: of the whole set chosen.
        attention_entropy: H of each layer's attention output, `None` where there is no attention.
        mlp_entropy: H of each layer's MLP output.
        dead_channels: output channels that never change over the calibration set.
        num_channels: width of the measured output.
        block_evaluations: blocks computed per calibration image for the search.
        naive_block_evaluations: the same if every set that is compared were computed from the image on.
        pair_transfer_entropy: of each pair of layers, `[layer][layer]`; of single layers on the diagonal; `None` where
            there is no attention. Empty if pairs were not measured.
    """

    order: list[int]
    config: SelectionConfig | None = None
    num_images: int = 0
    output_entropy: float | None = None
    transfer_entropy: float | None = None
    attention_entropy: list[float | None] = field(default_factory=list)
    mlp_entropy: list[float] = field(default_factory=list)
    steps: list[SelectionStep] = field(default_factory=list)
    changes: list[OutputChange] = field(default_factory=list)
    dead_channels: int = 0
    num_channels: int = 0
    block_evaluations: float = 0
    naive_block_evaluations: float = 0
    pair_transfer_entropy: list[list[float | None]] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        """The chosen layers, sorted."""
        return sorted(self.order)

    @property
    def removed_layers(self) -> list[int]:
        """The chosen layers, sorted, by the name that a model's config gives them."""
        return self.layers

    @property
    def strategy(self) -> str:
        """Name of the strategy; `"given"` where the layers were given."""
        return "given" if self.config is None else self.config.strategy_name

    @property
    def output(self) -> str | None:
        """What was measured."""
        return self.config and self.config.output

    @property
    def mask(self) -> str | None:
        """What a masked layer did."""
        return self.config and self.config.mask

    @property
    def compare(self) -> str | None:
        """How transfer entropies were compared."""
        return self.config and self.config.compare

    @property
    def autocast_dtype(self) -> str | None:
        """What the model computed in, where not in its weights' dtype."""
        return self.config and self.config.autocast_dtype

    @property
    def interactions(self) -> list[list[float | None]]:
        """
        TE(ij) - TE(i) - TE(j) of each pair of layers, in nats: 0 if masking the one does not change what masking the
        other does; `None` on the diagonal and where there is no attention.
        """
        pairs = self.pair_transfer_entropy
        return [
            [None if i == j or pair is None else pair - pairs[i][i] - pairs[j][j] for j, pair in enumerate(row)]
            for i, row in enumerate(pairs)
        ]

    def to_dict(self) -> dict:
        """JSON-serialisable, with `layers` first."""
        return {"layers": self.layers, **asdict(self), "config": self.config and self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: dict) -> "AttentionSelection":
        """
        Inverse of [`~AttentionSelection.to_dict`]; reads what earlier versions wrote, too.

        Raises:
            ValueError: if `layers` and `order` are not the same layers, or what was measured is not of them.
            AttributeError, KeyError, TypeError: if a value is of another kind.
        """
        order = values["order"]
        is_layers = all(type(layer) is int and layer >= 0 for layer in order) and len(set(order)) == len(order)
        if not is_layers or sorted(order) != values.get("layers", sorted(order)):
            raise ValueError(f"A selection's `layers` {values.get('layers')} and `order` {order} do not fit.")
        values = {name: value for name, value in values.items() if name != "layers"}
        options = {name: values.pop(name) for name in _OLD_FIELDS if name in values}
        if options:
            values["config"] = None if options["strategy"] == "given" else {**options, "calibration_size": None}
        steps = [
            SelectionStep(**{**step, "transfer_entropy": {int(k): v for k, v in step["transfer_entropy"].items()}})
            for step in values.pop("steps")
        ]
        changes = [OutputChange(**change) for change in values.pop("changes", ())]
        config = _read_config(values["config"])
        is_measured = all(step.picked in step.transfer_entropy for step in steps)
        is_measured = is_measured and isinstance(values.get("mlp_entropy", []), list)
        if steps and not (is_measured and config is not None and config.output is not None):
            raise ValueError("A selection has steps of a search, but not all that was measured in them.")
        if len(changes) not in (0, len(order)):
            raise ValueError(f"A selection of {len(order)} layers has {len(changes)} changes of the output.")
        return cls(**{**values, "config": config}, steps=steps, changes=changes)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "AttentionSelection":
        """Read what [`~AttentionSelection.save`] wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _read_config(values: dict | None) -> SelectionConfig | None:
    if values is None:
        return None
    known = values["strategy"] in STRATEGIES
    return SelectionConfig.from_dict(values if known else {**values, "strategy": UnknownStrategy(values["strategy"])})

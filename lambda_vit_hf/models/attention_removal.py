"""Fading, removal, replacement and folding of attention layers, in place, of any family's model.

Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024 (arXiv 2404.05657), sections 3.3 and 3.4.
"""

from torch import nn

from .configuration_removal import FADES, ONLY_REPLACED
from .folding import centred_exponent, check_layer_indices, fold_encoder_, folded_layer_norm_eps, residual_scales
from .mapped_attention import LinearMap


class AttentionRemovalMixin:
    """
    `set_fade_to`, `set_attention_lambda`, `remove_attention`, `replace_attention` and `fold_removed_attention`, for
    every Lambda model.

    A family sets `_layers` and `_final_norm`, names of the blocks and of the LayerNorm behind them, and
    `_stream_entry`, that of the module that gives the first block its input; all within the base model.
    """

    _layers, _final_norm, _stream_entry = "layers", "layernorm", "embeddings"

    @property
    def encoder_layers(self) -> nn.ModuleList:
        """The blocks, index 0 nearest to the image."""
        return self.base_model.get_submodule(self._layers)

    @property
    def attention_lambdas(self) -> list[float | None]:
        """Lambda of each layer; `None` where attention is removed."""
        return [layer.attention_lambda.item() if layer.has_attention else None for layer in self.encoder_layers]

    def set_fade_to(self, fade_to: str) -> None:
        """
        Say what attention fades to from now on; see `config.fade_to`.

        Args:
            fade_to (`str`): `"identity"` (the paper's) or `"skip"`.

        Raises:
            ValueError: if it is neither, or would change the function of a model with layers that fade or are removed.
        """
        self._check_not_prepared()
        if fade_to not in FADES:
            raise ValueError(f"`fade_to` must be one of {list(FADES)}, got {fade_to!r}.")
        if fade_to != self.config.fade_to:
            self._check_nothing_is_gone(fade_to)
            self.config.fade_to = fade_to

    def _check_nothing_is_gone(self, fade_to: str) -> None:
        gone = [index for index, value in enumerate(self.attention_lambdas) if value != 1.0]
        if gone or self.config.fold_removed:
            raise ValueError(
                f"The attention of layers {gone} faded to {self.config.fade_to!r}; with {fade_to!r} this would be"
                " another function. Remove all layers in one way."
            )

    def set_attention_lambda(self, value: float, layers: list[int]) -> None:
        """
        Set the dilution coefficient of some layers.

        Args:
            value (`float`): lambda in [0, 1]; 1 is ordinary attention, at 0 the layer's attention is not computed.
            layers (`list[int]`): 0-based layer indices that still have attention.

        Raises:
            ValueError: if `value` is outside [0, 1], or a layer is unknown, repeated or already removed.
        """
        self._check_not_prepared()
        if value is None or isinstance(value, (bool, str)) or not 0.0 <= value <= 1.0:
            raise ValueError(f"lambda must be a number in [0, 1], got {value!r}.")
        for index in self._check_attention_exists(layers):
            self.encoder_layers[index].set_attention_lambda(value)

    def remove_attention(self, layers: list[int]) -> None:
        """
        Drop the attention weights and the first LayerNorm of some layers, whatever their lambda, and record it in the
        config. At lambda = 0 the model stays the same function, to the bit. In a folded model
        (`config.fold_removed`) the newly removed layers are folded too.

        Call it on the unwrapped model, after training: an optimizer keeps the parameters it was given.

        Args:
            layers (`list[int]`): 0-based layer indices that still have attention.

        Raises:
            ValueError: if a layer is unknown, repeated or already removed, or if no attention would be left. The
                model is unchanged then.
        """
        self._check_not_prepared()
        if self.config.fade_to == "linear" and len(layers):
            raise ValueError(ONLY_REPLACED)
        layers = self._check_attention_exists(layers)
        flags = self._flags_without(layers)
        if self.config.fold_removed:
            self._fold(flags)
        for index in layers:
            self.encoder_layers[index].drop_attention()
        self.config.attention_flags = flags
        self._set_epsilons()

    def replace_attention(self, maps: dict[int, LinearMap]) -> None:
        """
        Put a linear map in the place of the attention of some layers, see [`MappedAttention`], and record it in the
        config. [`fit_linear_maps`] finds the maps. The model can be used at once, and trained like any other; call it
        on the unwrapped model, before an optimizer is made.

        Args:
            maps (`dict[int, LinearMap]`): of 0-based layers that still have attention. Their parameters can be
                trained, also in a frozen model.

        Raises:
            ValueError: if a layer is unknown or already removed, no attention would be left, or none for
                `token_merging_start`; if attention of other layers fades, or was removed in another way; if a map has
                another shape, or holds NaN or infinity in the model's dtype. The model is unchanged then.
        """
        width = self.config.hidden_size
        shapes = [(width, width), (width, width), (width,)]
        flags = self.check_replacement(list(maps))
        for index, values in maps.items():
            if [tuple(value.shape) for value in values] != shapes:
                raise ValueError(
                    f"The map of layer {index} must be of shapes {shapes}, got {[tuple(v.shape) for v in values]}."
                )
            dtype = self.encoder_layers[index].stream_norms()[-1].weight.dtype
            if not all(value.to(dtype).isfinite().all() for value in values):
                raise ValueError(f"The map of layer {index} holds NaN or infinity in {dtype}.")
        for index, values in maps.items():
            self.encoder_layers[index].drop_attention(with_map=True)
            self.encoder_layers[index].mapped_attention.set(LinearMap(*values))
        if maps:
            self.config.fade_to, self.config.attention_flags = "linear", flags

    def check_replacement(self, layers: list[int]) -> list[bool]:
        """`config.attention_flags` once these layers are replaced; ValueError where `replace_attention` raises it."""
        self._check_not_prepared()
        layers = self._check_attention_exists(layers)
        diluting = [index for index, value in enumerate(self.attention_lambdas) if value not in (None, 1.0)]
        if diluting:
            raise ValueError(
                f"The attention of layers {diluting} fades (lambda is not 1): set lambda back to 1 first."
            )
        if layers and self.config.fade_to != "linear":
            self._check_nothing_is_gone("linear")
        return self._flags_without(layers)

    def _check_maps(self) -> None:
        """ValueError where `config.fade_to` was edited by hand, and does not say what is in the place of attention."""
        mapped = [index for index, layer in enumerate(self.encoder_layers) if layer.mapped_attention is not None]
        expected = self.config.removed_layers if self.config.fade_to == "linear" else []
        if mapped != expected:
            raise ValueError(
                f"`config.fade_to` is {self.config.fade_to!r}, but linear maps are in layers {mapped}. Use"
                " `replace_attention` and `set_fade_to` instead of editing the config."
            )

    def _flags_without(self, layers: list[int]) -> list[bool]:
        """`attention_flags` once these layers are gone; ValueError if the model could not be used then."""
        flags = [flag and index not in layers for index, flag in enumerate(self.config.attention_flags)]
        if not any(flags):
            raise ValueError(f"Removing {layers} would leave no attention at all. Keep at least one layer.")
        if self.config.token_merging_start >= sum(flags):
            raise ValueError(
                f"Removing {layers} would leave {sum(flags)} attention layers, but `token_merging_start` is"
                f" {self.config.token_merging_start}. Call `set_token_merging` after the removal."
            )
        return flags

    def fold_removed_attention(self) -> None:
        """
        Absorb the doubling of removed layers in the weights that follow; the function stays the same, to the bit in
        float32, bfloat16 and float64. Does nothing in a model that is folded already, or where nothing doubles
        (`config.fade_to` is not `"identity"`).

        Raises:
            ValueError: in float16, if weights would leave the format's range; if adapters or quantised layers stand
                where weights must be divided. The model is unchanged then.
        """
        self._check_not_prepared()
        self._check_maps()
        if not self.config.fold_removed and self.config.fade_to == "identity":
            self._fold(self.config.attention_flags)
            self._set_epsilons()

    def _fold(self, attention_flags: list[bool]) -> None:
        """Divide the stream by what layers without a flag double it, as far as this has not been done."""
        config, old = self.config, self.stream_scales()[1:]
        exponent = centred_exponent(attention_flags)
        new = residual_scales(attention_flags, exponent)
        divisors = [after / before for after, before in zip(new, old, strict=True)]
        entry = self.base_model.get_submodule(self._stream_entry)
        fold_encoder_(entry, self.encoder_layers, divisors, exponent - config.fold_exponent)
        config.fold_removed, config.fold_exponent = True, exponent

    def stream_scales(self) -> list[float]:
        """What the stored stream is smaller by than the paper's: before the first block, then after each block."""
        config = self.config
        if not config.fold_removed:
            return [1.0] * (config.num_hidden_layers + 1)
        return [2.0**-config.fold_exponent, *residual_scales(config.attention_flags, config.fold_exponent)]

    def _check_attention_exists(self, layers: list[int]) -> list[int]:
        layers = check_layer_indices(layers, len(self.encoder_layers))
        removed = [index for index in layers if not self.encoder_layers[index].has_attention]
        if removed:
            raise ValueError(f"The attention of layers {removed} is removed already.")
        return layers

    def _set_epsilons(self) -> None:
        """Bring the LayerNorms that read the stream in line with the config: a folded stream needs smaller ones."""
        epsilons = folded_layer_norm_eps(self.config)
        for layer, eps in zip(self.encoder_layers, epsilons, strict=True):
            for norm in layer.stream_norms():
                norm.eps = eps
        if self._final_norm is not None:
            self.base_model.get_submodule(self._final_norm).eps = epsilons[-1]

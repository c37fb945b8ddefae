"""What a model gives between its images and its logits, part by part: for searches that call the blocks one by one."""

import torch


class FeaturesMixin:
    """
    The parts before and behind the blocks, of any family.

    A family sets `_head_reads`, what its classifier reads: `"class_token"`, `"patch_mean"` or
    `"class_token_and_patch_mean"`; `_head_reads_norm`, whether behind the last LayerNorm; `_num_special_tokens`,
    tokens in front of those of patches, besides registers.
    """

    _head_reads, _head_reads_norm, _num_special_tokens = "class_token", True, 1

    @property
    def has_class_head(self) -> bool:
        """Whether the model gives logits of classes."""
        return any(name.endswith("classifier") for name, _ in self.named_children())

    @property
    def newly_initialized_head(self) -> bool:
        """Whether the class head is random: its weights were not in the checkpoint, nor have they been trained."""
        parameters = dict(self.named_parameters())
        drawn = getattr(self, "_drawn_heads", {})
        return any(name in parameters and _is_same(parameters[name], value) for name, value in drawn.items())

    @newly_initialized_head.setter
    def newly_initialized_head(self, value: bool) -> None:
        if value:
            raise ValueError("Loading finds out whether a head is new; it can only be said to be trained.")
        self._drawn_heads = {}

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of those of patches: class token, distillation token, registers."""
        return self._num_special_tokens + getattr(self.config, "num_register_tokens", 0)

    @property
    def reads_patches(self) -> bool:
        """Whether a classifier of this family reads the tokens of patches: all of them leave the last block then."""
        return "patch" in self._head_reads

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """What enters the first block, `(batch, tokens, hidden)`, and what each block is called with besides."""
        return self.base_model.embeddings(pixel_values), {}

    def read_out(self, hidden_states: torch.Tensor, output: str) -> torch.Tensor:
        """
        What the model makes of what leaves its last block, for blocks that are called one by one.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden)`): the stream after the last block.
            output (`str`): `"class_head"`: the logits, `(batch, classes)`; `"class_token"`: its features behind the
                last LayerNorm (without class token: what the model pools); `"token_mean"`: the mean over all tokens
                there; both `(batch, hidden)`.
        """
        tokens = self.base_model.get_submodule(self._final_norm)(hidden_states)
        if output == "token_mean":
            return tokens.mean(dim=1)
        if output == "class_token":
            return self.pool(tokens)
        return self.classify(self.head_input(tokens if self._head_reads_norm else hidden_states))

    def image_and_patch_features(self, last_hidden_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What users of an encoder without head take from it, both behind the last LayerNorm.

        Args:
            last_hidden_state (`torch.Tensor` of shape `(batch, tokens, hidden)`): the bare model's.

        Returns:
            One vector for each image, `(batch, hidden)`, see `pool`; those of its patches, `(batch, patches, hidden)`.

        Raises:
            ValueError: if tokens merge and what is left of them leaves the model (ViT, DeiT).
        """
        self.check_gives_patch_features()
        tokens = last_hidden_state
        if not self._head_reads_norm:  # the stream as it leaves the last block, in the size of an unfolded model
            tokens = self.base_model.get_submodule(self._final_norm)(tokens / self.stream_scales()[-1])
        return self.pool(tokens), tokens[:, self.num_prefix_tokens :]

    def check_gives_patch_features(self) -> None:
        """
        Raises:
            ValueError: if tokens merge and what is left of them leaves the model (ViT, DeiT).
        """
        if any(self.config.token_merging_schedule()) and not self.reads_patches:
            raise ValueError(
                f"{type(self).__name__} merges tokens, and gives no feature of each patch then. Call"
                " `set_token_merging(0)`, or say --token_merging_r 0."
            )

    def reads_class_token_only(self, output: str) -> bool:
        """Whether an output, as in `read_out`, depends on the other tokens through attention only."""
        if output == "class_head":
            return self._head_reads == "class_token" and self.has_class_head
        return output == "class_token" and self._num_special_tokens > 0

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """One vector for an image, `(batch, hidden)`, of tokens behind the last LayerNorm."""
        return tokens[:, 0]

    def head_input(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the class head reads of `last_hidden_state`, `(batch, features)`."""
        if self._head_reads == "class_token":
            return tokens[:, 0]
        patch_mean = tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return patch_mean if self._head_reads == "patch_mean" else torch.cat([tokens[:, 0], patch_mean], dim=1)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, classes)` of what the class head reads."""
        return self.classifier(features)


def _is_same(weight: torch.Tensor, drawn: torch.Tensor) -> bool:
    """Whether a weight is what was drawn; it may have been rounded since (`model.half().float()`)."""
    weight = weight.detach().cpu()
    kinds = (weight.dtype, torch.float16, torch.bfloat16)
    return any(torch.equal(weight.to(kind), drawn.to(kind)) for kind in kinds)

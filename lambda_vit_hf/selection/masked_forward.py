"""Forward passes of a model with sets of attention layers masked, so that nothing is computed twice.

Masking a layer leaves every block before it unchanged. So all sets form a prefix tree over the blocks, and each shared
prefix is computed once per batch. After the last attention layer that is left unmasked, only the class token is
computed, if it is all that is measured. Tokens are not merged here.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..models.configuration_removal import FADES


OUTPUTS = ("class_head", "class_token", "token_mean")
MASKS = FADES


class MaskedForward:
    """
    Outputs of a model for one batch and many sets of masked attention layers.

    Memory grows with batch size and depth (one hidden state per open branch of the tree), not with the number of sets.

    Args:
        model ([`LambdaPreTrainedModel`]): in eval mode.
        output (`str`): what is returned: `"class_head"`, `"class_token"` or `"token_mean"`, after the final LayerNorm.
        mask (`str`): a masked layer passes its input on (`"skip"`), or doubles it (`"identity"`).
        share (`float`, *optional*, defaults to 1): how much of a masked layer is masked, in (0, 1]: 1 - its lambda.
        reuse_prefixes (`bool`, *optional*, defaults to `True`): `False` computes every set from the image on.

    Attributes:
        blocks (`int`): blocks computed so far, times the images of the batch they were computed for; a masked block,
            of which only the MLP is left, and a block for the class token alone count as whole ones.
    """

    def __init__(self, model, output: str, mask: str, reuse_prefixes: bool = True, share: float = 1.0):
        self.model, self.output, self.mask, self.reuse_prefixes = model, output, mask, reuse_prefixes
        self.share = share
        self._only_class_token_counts = reuse_prefixes and model.reads_class_token_only(output)
        self._extra: dict = {}  # what every block is called with, of the batch at hand
        self.blocks = 0

    def __call__(
        self, pixel_values: torch.Tensor, sets: Sequence[Iterable[int]]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """
        Yields, once per distinct set, the positions in `sets` that hold it and the output, `(batch, features)`.
        """
        pending = [(position, frozenset(layers)) for position, layers in enumerate(sets)]
        hidden_states, self._extra = self.model.embed(pixel_values)
        for together in [pending] if self.reuse_prefixes else [[pair] for pair in pending]:
            yield from self._walk(hidden_states, 0, together)

    def _walk(self, hidden_states: torch.Tensor, depth: int, pending: list[tuple[int, frozenset[int]]]) -> Iterator:
        for index in range(depth, len(self.model.encoder_layers)):
            masked = [pair for pair in pending if index in pair[1]]
            pending = [pair for pair in pending if index not in pair[1]]
            if masked:
                yield from self._walk(self._block(hidden_states, index, masked, is_masked=True), index + 1, masked)
            if not pending:
                return
            hidden_states = self._block(hidden_states, index, pending, is_masked=False)
        yield [position for position, _ in pending], self.model.read_out(hidden_states, self.output)

    def _block(self, hidden_states: torch.Tensor, index: int, pending: list, is_masked: bool) -> torch.Tensor:
        self.blocks += len(hidden_states)
        layer = self.model.encoder_layers[index]
        # Without attention tokens do not see each other: above the last one only the measured token is computed.
        first_only = self._only_class_token_counts and not self._is_attention_left(index, pending)
        masked = 2 * hidden_states if self.mask == "identity" else hidden_states
        if not is_masked:
            hidden_states = layer.mix_tokens(hidden_states, **self._extra)
        elif self.share < 1:
            mixed = layer.mix_tokens(hidden_states, **self._extra)
            hidden_states = mixed + self.share * (masked - mixed)
        else:
            hidden_states = masked
        return layer.feed_forward(hidden_states[:, :1] if first_only else hidden_states)

    def _is_attention_left(self, index: int, pending: list[tuple[int, frozenset[int]]]) -> bool:
        above = [layer for layer in self.model.config.mixing_layers if layer > index]
        return any(self.share < 1 or layer not in masked for layer in above for _, masked in pending)

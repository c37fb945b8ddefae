"""Token merging: tokens that look alike to attention become one, between attention and MLP of a block.

In each merging block the tokens are dealt into two sets, A and B, by turns. Each token of A is matched with the token
of B whose key is most similar, the `r` best matched pairs are merged, and the rest go on as they are: `r` tokens fewer
from there on. A merged token is the mean over the patches it stands for; how many these are is its size, and
attention counts a key as often as its size says (`log(size)` is added to the attention logits).

The class token is the first of A and never merges. Shapes: `(batch, tokens, hidden)`; sizes `(batch, tokens, 1)`.
Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461), section 3, from its text.
"""

from dataclasses import dataclass, field

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

# How the paper of lambda-ViT combines removal with merging (CVPR 2024, ImageNet-1k), by model and share of removed
# layers; the top-1 it reports stands beside. Each is a set of arguments of `from_pretrained`.
PAPER_SETTINGS = {
    "base_40_r24": {"removed_layers": [0, 1, 3, 4, 6], "token_merging_r": 24, "token_merging_start": 1},  # 81.58
    "base_40_r28": {"removed_layers": [0, 1, 3, 4, 6], "token_merging_r": 28, "token_merging_start": 1},  # 81.42
    "base_50_r14": {"removed_layers": [0, 1, 3, 4, 6, 9], "token_merging_r": 14, "token_merging_start": 0},  # 81.28
    "small_25_r22": {"removed_layers": [0, 2, 4], "token_merging_r": 22, "token_merging_start": 1},  # 79.86
    "small_30_r19": {"removed_layers": [0, 2, 4, 6], "token_merging_r": 19, "token_merging_start": 1},  # 79.62
    "tiny_25_r19": {"removed_layers": [0, 2, 4], "token_merging_r": 19, "token_merging_start": 1},  # 72.35
    "tiny_30_r14": {"removed_layers": [0, 2, 4, 6], "token_merging_r": 14, "token_merging_start": 1},  # 71.7
}


@dataclass
class TokenFlow:
    """
    What the blocks of one forward pass share where tokens get fewer; passed from block to block with the call.

    Args:
        schedule (`list[int]`): tokens to merge in each block.
        is_recorded (`bool`, *optional*, defaults to `False`): whether hidden states or attentions are asked for.
        class_token_from (`int`, *optional*): block from whose attention on only the class token is computed.
        sizes (`dict[int, torch.Tensor]`): patches that each token stands for, `(batch, tokens, 1)`, before each block;
            `None` while nothing has merged. Kept for every block: gradient checkpointing computes some a second time.
    """

    schedule: list[int]
    is_recorded: bool = False
    class_token_from: int | None = None
    sizes: dict[int, torch.Tensor | None] = field(default_factory=dict)


def most_mergeable(num_tokens: int) -> int:
    """Tokens that one block can merge at most: all of set A but the class token."""
    return (num_tokens - 1) // 2


def merge_tokens(
    hidden_states: torch.Tensor, sizes: torch.Tensor | None, keys: torch.Tensor, r: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Merge the `r` most similar pairs of tokens.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden)`): class token first.
        sizes (`torch.Tensor` of shape `(batch, tokens, 1)`, *optional*): patches that each token stands for; `None`
            where nothing has merged yet: one each.
        keys (`torch.Tensor` of shape `(batch, heads, tokens, head width)`): of this block's attention. No gradient
            flows through the choice of pairs.
        r (`int`): pairs to merge; capped at `most_mergeable(tokens)`, with a warning (once).

    Returns:
        Tokens `(batch, tokens - r, hidden)`, class token first, then what is left of A, then B; and their sizes, which
        sum to the number of tokens before any merging. With `r = 0` the arguments themselves.
    """
    num_tokens = hidden_states.shape[1]
    if r > most_mergeable(num_tokens):
        if not torch.compiler.is_compiling():
            logger.warning_once(
                f"`token_merging_r` asks to merge {r} tokens in a block that has less than twice as many. At most half"
                " of the tokens can merge in one block, and do."
            )
        r = most_mergeable(num_tokens)
    if r == 0:
        return hidden_states, sizes
    merged, left, partner = _match(keys, r)
    # Means of half-precision tokens are taken in float32: a sum of large tokens would leave the range of float16.
    accumulated = hidden_states if hidden_states.dtype is torch.float64 else hidden_states.float()
    if sizes is None:
        sizes = accumulated.new_ones(hidden_states.shape[0], num_tokens, 1)
    weighted = _combine(accumulated * sizes, merged, left, partner)
    sizes = _combine(sizes, merged, left, partner)
    return (weighted / sizes).to(hidden_states.dtype), sizes


def proportional_attention(sizes: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """`log(size)` of each key as an attention mask `(batch, 1, 1, tokens)`; `None` where nothing has merged."""
    return None if sizes is None else sizes.log().to(dtype).transpose(1, 2).unsqueeze(1)


@torch.no_grad()
def _match(keys: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices `(batch, n)`: of A, the tokens that merge and those left; of B, the partner of each that merges."""
    # Autocast would round the cosines to 8 bits, where near ties decide.
    device_type = "cpu" if keys.is_meta else keys.device.type
    with torch.autocast(device_type, enabled=False):
        directions = torch.nn.functional.normalize(keys.float().mean(dim=1), dim=-1)
        similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)
    best, partner = similarity.max(dim=-1)
    # The class token comes last in order of similarity, so it is always left; and sorted by place, it stays first.
    best = torch.cat([torch.full_like(best[:, :1], -2.0), best[:, 1:]], dim=1)
    order = best.argsort(dim=1, descending=True)
    merged, left = order[:, :r], order[:, r:].sort(dim=1).values
    return merged, left, partner.gather(1, merged)


def _combine(values: torch.Tensor, merged: torch.Tensor, left: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """What is left of A, then B with the merged values added to their partners. `(batch, tokens - r, width)`."""
    width = values.shape[-1]
    set_a, set_b = values[:, ::2], values[:, 1::2]
    moved = set_a.gather(1, merged.unsqueeze(-1).expand(-1, -1, width))
    stay = set_a.gather(1, left.unsqueeze(-1).expand(-1, -1, width))
    return torch.cat([stay, set_b.scatter_add(1, partner.unsqueeze(-1).expand(-1, -1, width), moved)], dim=1)

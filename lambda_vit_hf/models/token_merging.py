"""Token merging: tokens that look alike to attention become one, between attention and MLP of a block.

In each merging block the tokens of patches are dealt into two sets, B and A, by turns. Each token of A is matched with
the token of B whose key is most similar, the `r` best matched pairs are merged, and the rest go on as they are: `r`
tokens fewer from there on. A merged token is the mean over the patches it stands for; how many these are is its size,
and attention counts a key as often as its size says (`log(size)` is added to the attention logits).

Class token, distillation token and registers stand in front and never merge. In families whose classifier reads
patches (DINOv2, SigLIP, CLIP; their encoders too) the last block gives each patch the feature of the token it went
into: so transformers' means and pooling count every patch once.
Shapes: `(batch, tokens, hidden)`; sizes `(batch, tokens, 1)`.
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
        num_prefix_tokens (`int`, *optional*, defaults to 1): tokens in front of those of patches.
        restores_patches (`bool`, *optional*, defaults to `False`): whether the last block gives every patch a feature.
        sizes (`dict[int, torch.Tensor]`): patches that each token stands for, `(batch, tokens, 1)`, before each block;
            `None` while nothing has merged. Kept for every block: gradient checkpointing computes some a second time.
        places (`dict[int, torch.Tensor]`): the same for where the tokens of the image are, see `merge_tokens`; kept
            where patches are restored.
    """

    schedule: list[int]
    is_recorded: bool = False
    class_token_from: int | None = None
    num_prefix_tokens: int = 1
    restores_patches: bool = False
    sizes: dict[int, torch.Tensor | None] = field(default_factory=dict)
    places: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def keep(self, block: int) -> None:
        """Note that this block merges nothing."""
        self.sizes[block + 1], self.places[block + 1] = self.sizes.get(block), self.places.get(block)

    def merge(self, block: int, hidden_states: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """What this block's schedule leaves of its tokens; arguments as of `merge_tokens`."""
        places = self.places.get(block)
        if places is None and self.restores_patches:
            batch, num_tokens = hidden_states.shape[:2]
            places = torch.arange(num_tokens, device=hidden_states.device).expand(batch, -1)
        merged, self.sizes[block + 1], self.places[block + 1] = merge_tokens(
            hidden_states, self.sizes.get(block), keys, self.schedule[block], self.num_prefix_tokens, places
        )
        return merged

    def restore(self, block: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """What leaves this block: from the last one, where that is asked for, a feature for each patch again."""
        places = self.places.get(block + 1)
        if not self.restores_patches or block + 1 < len(self.schedule) or places is None:
            return hidden_states
        return hidden_states.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden_states.shape[-1]))


def most_mergeable(num_tokens: int, num_prefix_tokens: int = 1) -> int:
    """Tokens that one block can merge at most: all of set A."""
    return (num_tokens - num_prefix_tokens) // 2


def merge_tokens(
    hidden_states: torch.Tensor,
    sizes: torch.Tensor | None,
    keys: torch.Tensor,
    r: int,
    num_prefix_tokens: int = 1,
    places: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    Merge the `r` most similar pairs of tokens.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden)`): tokens that never merge first.
        sizes (`torch.Tensor` of shape `(batch, tokens, 1)`, *optional*): patches that each token stands for; `None`
            where nothing has merged yet: one each.
        keys (`torch.Tensor` of shape `(batch, heads, tokens, head width)`): of this block's attention. No gradient
            flows through the choice of pairs.
        r (`int`): pairs to merge; capped at `most_mergeable(tokens, num_prefix_tokens)`, with a warning (once).
        num_prefix_tokens (`int`, *optional*, defaults to 1): how many never merge.
        places (`torch.Tensor` of shape `(batch, tokens of the image)`, *optional*): for each token that the image had,
            which of these it is in; `None` where nobody asks.

    Returns:
        Tokens `(batch, tokens - r, hidden)`, those that never merge first, then what is left of A, then B; their
        sizes, which sum to the number of tokens before any merging; and the places of the image's tokens among them,
        where `places` were given. With `r = 0` the arguments themselves.
    """
    num_tokens = hidden_states.shape[1]
    most = most_mergeable(num_tokens, num_prefix_tokens)
    if r > most:
        if not torch.compiler.is_compiling():
            logger.warning_once(
                f"`token_merging_r` asks to merge {r} tokens in a block that has less than twice as many. At most half"
                " of the tokens can merge in one block, and do."
            )
        r = most
    if r == 0:
        return hidden_states, sizes, places
    pairs = _match(keys[:, :, num_prefix_tokens:], r)
    # Means of half-precision tokens are taken in float32: a sum of large tokens would leave the range of float16.
    accumulated = hidden_states if hidden_states.dtype is torch.float64 else hidden_states.float()
    if sizes is None:
        sizes = accumulated.new_ones(hidden_states.shape[0], num_tokens, 1)
    weighted = _combine(accumulated * sizes, num_prefix_tokens, *pairs)
    sizes = _combine(sizes, num_prefix_tokens, *pairs)
    if places is not None:
        places = _new_places(num_tokens, num_prefix_tokens, *pairs).gather(1, places)
    return (weighted / sizes).to(hidden_states.dtype), sizes, places


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
        similarity = directions[:, 1::2] @ directions[:, ::2].transpose(1, 2)
    best, partner = similarity.max(dim=-1)
    order = best.argsort(dim=1, descending=True)
    merged, left = order[:, :r], order[:, r:].sort(dim=1).values
    return merged, left, partner.gather(1, merged)


def _combine(
    values: torch.Tensor, num_prefix_tokens: int, merged: torch.Tensor, left: torch.Tensor, partner: torch.Tensor
) -> torch.Tensor:
    """What never merges, what is left of A, then B with the merged values added. `(batch, tokens - r, width)`."""
    width = values.shape[-1]
    prefix, patches = values[:, :num_prefix_tokens], values[:, num_prefix_tokens:]
    set_a, set_b = patches[:, 1::2], patches[:, ::2]
    moved = set_a.gather(1, merged.unsqueeze(-1).expand(-1, -1, width))
    stay = set_a.gather(1, left.unsqueeze(-1).expand(-1, -1, width))
    return torch.cat([prefix, stay, set_b.scatter_add(1, partner.unsqueeze(-1).expand(-1, -1, width), moved)], dim=1)


def _new_places(
    num_tokens: int, num_prefix_tokens: int, merged: torch.Tensor, left: torch.Tensor, partner: torch.Tensor
) -> torch.Tensor:
    """Where `_combine` puts each of the tokens. `(batch, tokens)`."""
    num_left, first_of_b = left.shape[1], num_prefix_tokens + left.shape[1]
    places = torch.arange(num_tokens, device=left.device).expand(left.shape[0], -1)
    prefix, patches = places[:, :num_prefix_tokens], places[:, num_prefix_tokens:]
    set_b = first_of_b + torch.arange(patches[:, ::2].shape[1], device=left.device).expand(left.shape[0], -1)
    set_a = patches[:, 1::2].scatter(1, merged, first_of_b + partner)
    if num_left:  # OpenVINO cannot read a file that scatters nothing
        stay = num_prefix_tokens + torch.arange(num_left, device=left.device).expand(left.shape[0], -1)
        set_a = set_a.scatter(1, left, stay)
    return torch.cat([prefix, _dealt_back(set_b, set_a)], dim=1)


def _dealt_back(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """One sequence by turns; `first` may be longer by one."""
    pairs = torch.stack([first[:, : second.shape[1]], second], dim=2).flatten(1)
    return torch.cat([pairs, first[:, second.shape[1] :]], dim=1)

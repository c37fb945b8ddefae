"""Our sections in a user's README.md: written and updated, everything around them kept byte for byte.

Ours is the text between `BEGIN` and `END`, and in the metadata the keys between the same words as comments.
"""

import logging
import re
from pathlib import Path

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump


logger = logging.getLogger(__name__)

BEGIN, END = "<!-- lambda-vit-hf:begin -->", "<!-- lambda-vit-hf:end -->"
_YAML_BEGIN, _YAML_END = "# lambda-vit-hf:begin", "# lambda-vit-hf:end"
# The innermost pair: a lone marker that a user left behind must not swallow what follows it.
_OUR_TEXT = re.compile(f"{BEGIN}(?:(?!{BEGIN})[\\s\\S])*?{END}")
_OUR_KEYS = re.compile(f"^{_YAML_BEGIN}\r?\n(?:(?!{_YAML_BEGIN})[\\s\\S])*?^{_YAML_END}\r?\n", re.MULTILINE)
_TRAINER_CARD = re.compile("the information the Trainer had access to|This model (is a fine-tuned|was trained from)")


def update_card(path: Path, metadata: dict, body: str) -> None:
    """
    Put metadata and text into a card, or make one. The generic card that the Trainer writes is replaced.

    Args:
        path (`Path`): the `README.md`, which need not exist.
        metadata (`dict`): keys for the YAML block; those that the user set stay the user's.
        body (`str`): Markdown between our markers.
    """
    # Any bytes survive: a user's card need not be UTF-8.
    card = path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else ""
    body = body.replace(BEGIN, "").replace(END, "").strip()
    path.write_bytes(_merged(card, metadata, body).encode("utf-8", "surrogateescape"))


def _merged(card: str, metadata: dict, body: str) -> str:
    """A user's card with our keys and our text in it."""
    if _TRAINER_CARD.search(card) and "generated_from_trainer" in card and BEGIN not in card:
        card = ""
    found = REGEX_YAML_BLOCK.match(card)
    before, keys, after = found.groups()[:3] if found else ("---\n", "", "\n---\n")
    text = card[found.end() :] if found else card
    section = f"{BEGIN}\n{body}\n{END}"
    if _OUR_TEXT.search(text):
        text = _OUR_TEXT.sub(lambda _: section, text, count=1)
    else:
        gap = "\n" if text.endswith("\n") or not text else "\n\n"
        text = f"{text}{gap}{section}\n"
    return f"{before}{_merged_keys(keys, metadata, newline=after[: after.index('---')])}{after}{text}"


def _merged_keys(block: str, metadata: dict, newline: str) -> str:
    """The metadata block with our keys, where its user has not set them."""
    lines = f"{block}{newline}" if block else ""
    place = _OUR_KEYS.search(lines)
    start, end = place.span() if place else (len(lines), len(lines))
    try:
        users = yaml.safe_load(lines[:start] + lines[end:]) or {}
        ours = {key: value for key, value in metadata.items() if key not in users}
        text = f"{_YAML_BEGIN}\n{yaml_dump(ours, sort_keys=False)}{_YAML_END}\n" if ours else ""
        merged = lines[:start] + text.replace("\n", newline) + lines[end:]
        is_sound = yaml.safe_load(merged) == {**users, **ours}
    except (yaml.YAMLError, TypeError):
        is_sound = False
    if not is_sound:
        logger.warning("The metadata of the model card cannot be added to, and is left as it is: %.200s", block)
        return block
    return merged.removesuffix(newline)

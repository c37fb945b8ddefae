"""How timm names the weights of each family, as tables: names in a file, and the parameters that their rows go to.

Sources: timm 1.0.31, `VisionTransformer`, `VisionTransformerDistilled` (DeiT) and `Eva` (DINOv3).
This file does not travel with saved models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch


Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TimmLayout:
    """
    A family in timm's files. Names without `.weight` and `.bias` are of modules with both.

    Attributes:
        kind: how the class ends that the file becomes.
        base: where the encoder is in that class.
        blocks: where block `{}` is in the encoder.
        modules, tensors: outside the blocks.
        block_modules, block_tensors: in each block.
        heads: modules of class heads, outside the encoder.
        gated: modules in place of `mlp.fc1` and `mlp.fc2` where the MLP is gated.
        may_lack: parameters that a file has everywhere, or nowhere.
        config: what the configuration says besides shapes that all families have.
        arranged: changes tensors that are stored in another form there.
        num_prefix_positions: position embeddings in front of those of patches; `None`: there are no positions.
        hidden_act: of the MLP; `None`: files of one family differ, and do not say it.
    """

    kind: str
    base: str
    blocks: str
    modules: dict[str, list[str]]
    tensors: dict[str, str]
    block_modules: dict[str, list[str]]
    block_tensors: dict[str, str | list[str]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    gated: dict[str, list[str]] = field(default_factory=dict)
    may_lack: tuple[str, ...] = ()
    config: Callable[[Tensors], dict] = lambda tensors: {}
    arranged: Callable[[Tensors], dict] = dict
    num_prefix_positions: int | None = 1
    hidden_act: str | None = "gelu"

    def names(self, tensors: Tensors) -> dict[str, list[str]]:
        """Every name that the file must have, and the parameters its rows go to."""
        # Counted, not read off the highest number: a gap shows as missing tensors, never as a list without end.
        blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.") and name.count(".") > 2}
        num_blocks = max(len([index for index in blocks if index.isdecimal()]), 1)
        in_block = self.block_modules
        if self.is_gated(tensors):
            in_block = {name: to for name, to in in_block.items() if not name.startswith("mlp.")} | self.gated
        names = {name: [self.base + target] for name, target in self.tensors.items()}
        pairs = {name: [self.base + target for target in targets] for name, targets in self.modules.items()}
        pairs |= {name: [target] for name, target in self.heads.items()}
        for index in range(num_blocks):
            place = f"{self.base}{self.blocks.format(index)}."
            pairs |= {f"blocks.{index}.{name}": [place + one for one in to] for name, to in in_block.items()}
            for name, targets in self.block_tensors.items():
                targets = [targets] if isinstance(targets, str) else targets
                names[f"blocks.{index}.{name}"] = [place + target for target in targets]
        for name, targets in pairs.items():
            names |= {f"{name}.{kind}": [f"{target}.{kind}" for target in targets] for kind in ("weight", "bias")}
        for ending in self.may_lack:
            if not any(name.endswith(ending) for name in tensors):
                names = {name: targets for name, targets in names.items() if not name.endswith(ending)}
        return names

    def is_gated(self, tensors: Tensors) -> bool:
        """By the first block: the gate has names of its own, or its rows stand in front of the others."""
        first, last = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
        if not self.gated or last is None or last.ndim != 2:
            return False
        return first is None or first.shape[0] == 2 * last.shape[1]


def _mlp_width(tensors: Tensors) -> int:
    return tensors["blocks.0.mlp.fc2.weight"].shape[1]


def _config_of_dinov2(tensors: Tensors) -> dict:
    is_gated = DINOV2.is_gated(tensors)
    ratio = 4 if is_gated else _mlp_width(tensors) // tensors["norm.weight"].shape[0]
    registers = {"num_register_tokens": tensors["reg_token"].shape[1]} if "reg_token" in tensors else {}
    return {"layer_norm_eps": 1e-6, "use_swiglu_ffn": is_gated, "mlp_ratio": ratio, **registers}


def _config_of_dinov3(tensors: Tensors) -> dict:
    has_bias = "blocks.0.attn.q_bias" in tensors
    return {
        "layer_norm_eps": 1e-5,
        "intermediate_size": _mlp_width(tensors),
        "num_register_tokens": tensors["reg_token"].shape[1],
        "use_gated_mlp": DINOV3.is_gated(tensors),
        "query_bias": has_bias,
        "key_bias": False,
        "value_bias": has_bias,
    }


def _with_position_of_class_token(tensors: Tensors) -> dict:
    """timm has added it to the class token, and left it out."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return dict(tensors)
    return {**tensors, "pos_embed": torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}


def _with_plain_tables(tensors: Tensors) -> dict:
    """The towers of transformers have no axis of the batch in what is the same for all images."""
    axes = {"pos_embed": (0,), "cls_token": (0, 1)}
    return {name: value.squeeze(axes.get(name, ())) for name, value in tensors.items()}


def _with_joined_projections(tensors: Tensors) -> dict:
    """torch's MultiheadAttention, which pools in transformers' SigLIP, has query, key and value in one."""
    joined = _with_plain_tables(tensors)
    for kind in ("weight", "bias"):
        parts = [joined.pop(f"attn_pool.{name}.{kind}", None) for name in ("q", "kv")]
        if any(part is not None for part in parts):
            joined[f"attn_pool.in_proj_{kind}"] = torch.cat([part for part in parts if part is not None])
    return joined


_VIT_BLOCK = {
    "norm1": ["layernorm_before"],
    "attn.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "attn.proj": ["attention.o_proj"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}
_DINO_BLOCK = _VIT_BLOCK | {"norm1": ["norm1"], "norm2": ["norm2"]}
_TOWER_BLOCK = {
    "norm1": ["layer_norm1"],
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.proj": ["self_attn.out_proj"],
    "norm2": ["layer_norm2"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}
_TOKENS = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
_STEM = {"patch_embed.proj": ["embeddings.patch_embeddings.projection"], "norm": ["layernorm"]}

VIT = TimmLayout(
    kind="ForImageClassification",
    base="vit.",
    blocks="layers.{}",
    modules=_STEM,
    tensors=_TOKENS,
    block_modules=_VIT_BLOCK,
    heads={"head": "classifier"},
    may_lack=(".attn.qkv.bias",),
    config=lambda tensors: {
        "layer_norm_eps": 1e-6,
        "intermediate_size": _mlp_width(tensors),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
    },
)
DEIT = TimmLayout(
    kind="ForImageClassificationWithTeacher",
    base="deit.",
    blocks="layers.{}",
    modules=_STEM,
    tensors={**_TOKENS, "dist_token": "embeddings.distillation_token"},
    block_modules=_VIT_BLOCK,
    heads={"head": "cls_classifier", "head_dist": "distillation_classifier"},
    config=lambda tensors: {"layer_norm_eps": 1e-6, "intermediate_size": _mlp_width(tensors)},
    num_prefix_positions=2,
)
DINOV2 = TimmLayout(
    kind="Model",
    base="",
    blocks="encoder.layer.{}",
    modules=_STEM,
    tensors=_TOKENS,
    block_modules=_DINO_BLOCK,
    block_tensors={"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"},
    gated={"mlp.fc1": ["mlp.gate_proj", "mlp.up_proj"], "mlp.fc2": ["mlp.down_proj"]},
    config=_config_of_dinov2,
)
DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    tensors={**_TOKENS, "reg_token": "embeddings.register_tokens"},
    arranged=_with_position_of_class_token,
)
DINOV3 = TimmLayout(
    kind="Model",
    base="",
    blocks="model.layer.{}",
    modules={"patch_embed.proj": ["embeddings.patch_embeddings"], "norm": ["norm"]},
    tensors={"cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens"},
    block_modules={
        **{name: targets for name, targets in _DINO_BLOCK.items() if name != "attn.qkv"},
        "mlp.fc1": ["mlp.up_proj"],
        "mlp.fc2": ["mlp.down_proj"],
    },
    block_tensors={
        "attn.qkv.weight": [f"attention.{name}_proj.weight" for name in "qkv"],
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
    },
    gated={"mlp.fc1_g": ["mlp.gate_proj"], "mlp.fc1_x": ["mlp.up_proj"], "mlp.fc2": ["mlp.down_proj"]},
    may_lack=(".attn.q_bias", ".attn.v_bias"),
    config=_config_of_dinov3,
    num_prefix_positions=None,
)
SIGLIP = TimmLayout(
    kind="Model",
    base="",
    blocks="encoder.layers.{}",
    modules={
        "patch_embed.proj": ["embeddings.patch_embedding"],
        "norm": ["post_layernorm"],
        "attn_pool.proj": ["head.attention.out_proj"],
        "attn_pool.norm": ["head.layernorm"],
        "attn_pool.mlp.fc1": ["head.mlp.fc1"],
        "attn_pool.mlp.fc2": ["head.mlp.fc2"],
    },
    tensors={
        "pos_embed": "embeddings.position_embedding.weight",
        "attn_pool.latent": "head.probe",
        "attn_pool.in_proj_weight": "head.attention.in_proj_weight",
        "attn_pool.in_proj_bias": "head.attention.in_proj_bias",
    },
    block_modules=_TOWER_BLOCK,
    config=lambda tensors: {"layer_norm_eps": 1e-6, "intermediate_size": _mlp_width(tensors)},
    arranged=_with_joined_projections,
    num_prefix_positions=0,
    hidden_act=None,
)
CLIP = TimmLayout(
    kind="Model",
    base="",
    blocks="encoder.layers.{}",
    modules={"norm_pre": ["pre_layrnorm"], "norm": ["post_layernorm"]},
    tensors={
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    },
    block_modules=_TOWER_BLOCK,
    config=lambda tensors: {"layer_norm_eps": 1e-5, "intermediate_size": _mlp_width(tensors)},
    arranged=_with_plain_tables,
    hidden_act=None,
)

# By the endings of the families' modules.
LAYOUTS = {
    "vit": VIT,
    "deit": DEIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
    "dinov3_vit": DINOV3,
    "siglip_vision": SIGLIP,
    "clip_vision": CLIP,
}

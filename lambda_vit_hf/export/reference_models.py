"""What a Lambda model is compared with: transformers' model of its weights, and a timm ViT pruned the authors' way."""

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.modeling_lambda_vit import LambdaViTForImageClassification
from ..models.pretrained_model import LambdaPreTrainedModel


def transformers_class(model: LambdaPreTrainedModel) -> type[PreTrainedModel] | None:
    """transformers' classifier that a model is derived from, if there is one."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models.") and "ForImageClassification" in kind.__name__:
            return kind
    return None


def as_transformers_model(model: LambdaPreTrainedModel) -> PreTrainedModel:
    """
    transformers' own classifier of the family, with the model's weights, in eval mode, on the CPU.

    Raises:
        ValueError: if attention was removed, which transformers' models cannot leave out, or transformers has no
            classifier with these modules.
    """
    if model.config.removed_layers:
        raise ValueError(
            f"transformers' models cannot leave out attention; layers {model.config.removed_layers} have none."
        )
    plain = transformers_class(model)
    if plain is None:
        raise ValueError(f"transformers has no classifier with the modules of {type(model).__name__}.")
    fields = plain.config_class.__dataclass_fields__
    values = {name: value for name, value in model.config.to_dict().items() if name in fields}
    reference = plain(plain.config_class(**{**values, "num_labels": model.config.num_labels}))
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("attention_lambda")}
    reference.load_state_dict(weights)
    return reference.eval()


class PrunedTimmBlock(nn.Module):
    """
    A block without attention in timm's style, as the authors run it: `x = 2 * x; x = x + mlp(norm2(x))`.

    Shapes: `(batch, tokens, hidden)`. Source: Lin et al., CVPR 2024, section 3.3; own code.
    """

    def __init__(self, norm2: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm2, self.mlp = norm2, mlp

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        x = 2 * x
        return x + self.mlp(self.norm2(x))


def as_timm_vit(model: LambdaViTForImageClassification) -> nn.Module:
    """
    timm's `VisionTransformer` with the model's weights, query, key and value stacked in one projection; removed layers
    become [`PrunedTimmBlock`]s. In eval mode; takes `(batch, channels, height, width)`, returns logits.

    Raises:
        ValueError: if the model is of another family, or its removed layers do not double (the authors' form does), or
            its activation is not GELU.
    """
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, LambdaViTForImageClassification):
        raise ValueError(f"timm's reference is a plain ViT; {type(model).__name__} is of another family.")
    config = model.config
    does_not_double = config.fold_removed or (config.removed_layers and config.fade_to != "identity")
    if does_not_double or config.hidden_act != "gelu":
        raise ValueError(
            "timm's form needs an unfolded model, faded to the identity, with `hidden_act='gelu'`, got"
            f" fold_removed={config.fold_removed}, fade_to={config.fade_to!r}, hidden_act={config.hidden_act!r}."
        )
    timm_vit = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        num_classes=config.num_labels,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        qkv_bias=config.qkv_bias,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
    )
    for index in config.removed_layers:
        block = timm_vit.blocks[index]
        timm_vit.blocks[index] = PrunedTimmBlock(block.norm2, block.mlp)
    timm_vit.load_state_dict(_timm_weights(model))
    return timm_vit.eval()


def _timm_weights(model: LambdaViTForImageClassification) -> dict[str, torch.Tensor]:
    embeddings = model.vit.embeddings
    weights = {"cls_token": embeddings.cls_token, "pos_embed": embeddings.position_embeddings}
    modules = {"patch_embed.proj": embeddings.patch_embeddings.projection, "norm": model.vit.layernorm}
    if model.config.num_labels:
        modules["head"] = model.classifier
    for index, layer in enumerate(model.encoder_layers):
        block = f"blocks.{index}"
        modules |= {f"{block}.norm2": layer.layernorm_after, f"{block}.mlp.fc1": layer.mlp.fc1}
        modules[f"{block}.mlp.fc2"] = layer.mlp.fc2
        if layer.attention is None:
            continue
        modules |= {f"{block}.norm1": layer.layernorm_before, f"{block}.attn.proj": layer.attention.o_proj}
        projections = [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj]
        for kind, _ in projections[0].named_parameters():
            stacked = torch.cat([getattr(projection, kind) for projection in projections])
            weights[f"{block}.attn.qkv.{kind}"] = stacked
    for prefix, module in modules.items():
        weights |= {f"{prefix}.{kind}": parameter for kind, parameter in module.named_parameters()}
    return {name: value.detach().clone() for name, value in weights.items()}

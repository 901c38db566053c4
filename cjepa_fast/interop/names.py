"""What other projects call a ViT's weights and its GELU, and what of them has no place in ours.

timm's names are those of DINO, DINOv2, MAE and I-JEPA too, and ours: `blocks.3.attn.qkv.weight`.
transformers has others by model and version: `encoder.layer.3.attention.attention.query.weight`.
"""

import re
from collections.abc import Iterable

PATCHES = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight",
           "embeddings.patch_embeddings.weight")  # fmt: skip

# Ours for theirs, one after the other; each at the beginning of the name, or after its block's.
OUTSIDE = (
    (r"embeddings\.patch_embeddings(\.projection)?\.", "patch_embed.proj."),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.(?=\w+$)", ""),
    (r"layernorm\.", "norm."),
    (r"(model\.)?(encoder\.)?layers?\.", "blocks."),
    (r"blocks\.\d+\.(?=\d)", "blocks."),  # DINOv2 trains in chunks of blocks
)
INSIDE = (
    (r"attention\.(attention\.)?", "attn."),
    (r"attn\.(query|key|value|[qkv]_proj)\.", lambda found: f"attn.{found[1][0]}."),
    (r"attn\.([qkv])_bias$", r"attn.\1.bias"),
    (r"attn\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"(intermediate\.dense|mlp\.up_proj)\.", "mlp.fc1."),
    (r"(output\.dense|mlp\.down_proj)\.", "mlp.fc2."),
    (r"(layer_scale|lambda_|gamma_|ls)([12])(\.lambda1|\.gamma)?$", r"ls\2.gamma"),
)

# What is left out, since our encoder computes its patch tokens without; one line each.
DROPPED = {
    "class token": r"(cls|dist|distill)_token(s)?$|cls_pos_embed$",
    "registers": r"(reg|register|storage)_tokens?$",
    "mask token": r"mask_token$",
    "head": r"(head|head_dist|fc|pre_logits|attn_pool|pooler|classifier|fc_norm)\.",
    "decoder": r"decoder_?\w*(\.|$)",
}

# What changes the patch tokens and cannot be carried over; by name.
REFUSED = {
    "SwiGLU in the MLP": r"mlp\.(w12|w[123]|weights_in|weights_out|fc1_[gx]|gate_proj)\.",
    "rotary positions (RoPE), as in DINOv3 and EVA-02": r"rope|rotary|attn\.qkv\.bias_mask$",
    "a relative position bias, as in BEiT": r"rel(ative)?_pos",
    "norms of queries and keys": r"attn\.(q|k)_(norm|layernorm)\.",
    "a norm of the patch embedding, as in CLIP": r"norm_pre|ln_pre|pre_la?yrnorm|patch_embed\.norm",
    "a norm inside of attention or MLP": r"(attn|mlp)\.(norm|inner_attn_ln|ffn_ln)\.",
    "a convolutional stem": r"patch_embed\.(backbone|conv|stem)|(conv|cnn)_?stem",
}


def prefixes(names: Iterable[str]) -> list[str]:
    """What stands before a ViT's own names: one for each ViT, "" where nothing does."""
    found = [
        name.removesuffix(patches)
        for name in names
        for patches in PATCHES
        if name == patches or name.endswith(f".{patches}")
    ]
    return sorted(found)


def translated(name: str) -> str:
    """Our name of one of theirs, as far as there is one; no prefix stands before it."""
    for theirs, ours in OUTSIDE:
        name = re.sub(f"^{theirs}", ours, name)
    block = re.match(r"blocks\.\d+\.", name)
    if not block:
        return name
    rest = name[block.end() :]
    for theirs, ours in INSIDE:
        rest = re.sub(f"^{theirs}", ours, rest)
    return block[0] + rest


def kinds(names: Iterable[str], patterns: dict[str, str]) -> dict[str, list[str]]:
    """The names that one of the patterns is of, by its key."""
    found: dict[str, list[str]] = {}
    for name in names:
        for kind, pattern in patterns.items():
            if re.search(rf"(^|\.)({pattern})", name):
                found.setdefault(kind, []).append(name)
                break
    return found


# The activations of transformers and timm that our encoder has, and what it calls them.
GELUS = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_tanh": "tanh"}


def gelu_named(activation: object, said: str) -> str:
    """model.gelu of an activation that `said` names. Raises ValueError for any other."""
    if not isinstance(activation, str) or activation not in GELUS:
        known = ", ".join(map(repr, GELUS))
        raise ValueError(f"{said} is {activation!r}; our encoder has {known} alone")
    return GELUS[activation]

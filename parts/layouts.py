"""Layouts of published checkpoints that a model file does not need for being read.

Each section belongs to one model: the names of its tensors where they are not the model's own, and
its configuration, as plain dicts, so that nothing here depends on the models.
"""

import math

from parts import weights
from parts.cli import UserError

# --------------------------------------------------------------------------------------------------
# SD3.5's transformer in the layout of diffusers

MMDIT_NAMES = (  # (ours, which is Stability's; theirs), applied in this order
    (r"^pos_embed$", "pos_embed.pos_embed"),
    (r"^x_embedder\.", "pos_embed."),
    (r"^t_embedder\.mlp\.0\.", "time_text_embed.timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "time_text_embed.timestep_embedder.linear_2."),
    (r"^y_embedder\.mlp\.0\.", "time_text_embed.text_embedder.linear_1."),
    (r"^y_embedder\.mlp\.2\.", "time_text_embed.text_embedder.linear_2."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
    (r"^joint_blocks\.", "transformer_blocks."),
    (r"\.x_block\.adaLN_modulation\.1\.", ".norm1.linear."),
    (r"\.context_block\.adaLN_modulation\.1\.", ".norm1_context.linear."),
    (r"\.x_block\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.x_block\.mlp\.fc2\.", ".ff.net.2."),
    (r"\.context_block\.mlp\.fc1\.", ".ff_context.net.0.proj."),
    (r"\.context_block\.mlp\.fc2\.", ".ff_context.net.2."),
    (r"\.x_block\.(attn2?)\.proj\.", r".\1.to_out.0."),
    (r"\.x_block\.(attn2?)\.ln_([qk])\.", r".\1.norm_\2."),
    (r"\.x_block\.(attn2?)\.(to_[qkv])\.", r".\1.\2."),
    (r"\.context_block\.attn\.proj\.", ".attn.to_add_out."),
    (r"\.context_block\.attn\.ln_([qk])\.", r".attn.norm_added_\1."),
    (r"\.context_block\.attn\.to_([qkv])\.", r".attn.add_\1_proj."),
)
# Stability fuses q, k and v of a stream in one layer; diffusers and peft have a layer for each.
MMDIT_FUSED = {"qkv": ("to_q", "to_k", "to_v")}
MMDIT_KEYS = {  # ours: the key of a config.json
    "depth": "num_layers", "heads": "num_attention_heads", "head_dim": "attention_head_dim",
    "channels": "in_channels", "patch": "patch_size", "context_dim": "joint_attention_dim",
    "pooled_dim": "pooled_projection_dim", "positions": "pos_embed_max_size",
    "sample_size": "sample_size"}


def mmdit_views(model):
    """Views of an MMDiT as `transformer/` of the diffusers layout has it."""
    views = weights.renamed(weights.named_views(model, MMDIT_FUSED), MMDIT_NAMES)
    # Where nothing but shift and scale is left, diffusers stores scale first.
    last = model.config.depth - 1
    for name in (f"transformer_blocks.{last}.norm1_context.linear", "norm_out.linear"):
        for kind in ("weight", "bias"):
            (rows,) = views[f"{name}.{kind}"]
            shift, scale = rows.chunk(2)
            views[f"{name}.{kind}"] = [scale, shift]
    return views


def mmdit_lora_targets(model, dual=False):
    """{module path: {peft's name: rows}} of the attention projections of an MMDiT.

    Both streams' q, k, v and output, as in Flow-GRPO's code, and with `dual` those of the image
    stream's second attention.
    """
    targets = {}
    # The order decides which random numbers a new adapter's layers get, so it must not change.
    for i, block in enumerate(model.joint_blocks):
        for at in ("x_block.attn", "context_block.attn", *["x_block.attn2"] * dual):
            parent, name = at.split(".")
            attention = getattr(getattr(block, parent), name, None)
            for layer in ("qkv", "proj"):
                linear = getattr(attention, layer, None)
                if linear is None:
                    continue
                path = f"joint_blocks.{i}.{at}.{layer}"
                parts = weights.projections(path, linear.weight.shape[0], MMDIT_FUSED)
                targets[path] = {mmdit_name(name): rows for name, rows in parts.items()}
    return targets


def mmdit_name(path):
    """What diffusers calls a module of ours."""
    (name,) = weights.renamed({f"{path}.": None}, MMDIT_NAMES)
    return name.removesuffix(".")


def mmdit_fields(folder, tensors=math.inf):
    """Fields of mmdit.MMDiTConfig from a diffusers folder's config.json. Raises UserError.

    tensors: how many the folder's files hold.
    """
    raw = weights.read_config(folder / "config.json", tensors)
    try:
        if raw.get("qk_norm") not in (None, "rms_norm"):
            raise ValueError(f"qk_norm {raw['qk_norm']!r} is not supported")
        fields = {ours: raw[theirs] for ours, theirs in MMDIT_KEYS.items()}
        fields["dual_blocks"] = tuple(raw.get("dual_attention_layers", ()))
        fields["qk_norm"] = raw.get("qk_norm") == "rms_norm"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json: not a configuration of SD3.5's transformer "
                        f"({error}); give the folder of an SD3.5 checkpoint") from error
    return fields


def mmdit_fields_of_tensors(entries, path):
    """The same from the tensors' shapes, for a single file, which has no configuration."""
    try:
        blocks = [name.split(".") for name in entries if name.startswith("joint_blocks.")]
        # Counted, and not the greatest number, as a stranger's block may have the number 10⁹.
        depth = len({parts[1] for parts in blocks})
        if depth > 1000:
            raise ValueError(f"at most 1,000 blocks, found {depth:,}")
        width, channels, patch, _ = entries["x_embedder.proj.weight"].shape
        norm = entries.get("joint_blocks.0.x_block.attn.ln_q.weight")
        head_dim = 64 if norm is None else norm.shape[0]
        # A block has a second attention to itself if the file has tensors of one.
        dual_blocks = {int(parts[1]) for parts in blocks if parts[3] == "attn2"}
        return {
            "depth": depth,
            "heads": width // head_dim,
            "head_dim": head_dim,
            "dual_blocks": tuple(sorted(dual_blocks)),
            "channels": channels,
            "patch": patch,
            "context_dim": entries["context_embedder.weight"].shape[1],
            "pooled_dim": entries["y_embedder.mlp.0.weight"].shape[1],
            "qk_norm": norm is not None,
            "positions": math.isqrt(entries["pos_embed"].shape[1])}
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: no SD3.5 transformer under model.diffusion_model.* (looking for "
                        f"{error}); give sd3.5_medium.safetensors or a diffusers folder") from error


def mmdit_json(c):
    """The config.json of an MMDiTConfig."""
    fields = {theirs: getattr(c, ours) for ours, theirs in MMDIT_KEYS.items()}
    return {"_class_name": "SD3Transformer2DModel", **fields, "out_channels": c.channels,
            "caption_projection_dim": c.width, "dual_attention_layers": list(c.dual_blocks),
            "qk_norm": "rms_norm" if c.qk_norm else None}


# --------------------------------------------------------------------------------------------------
# Stable Diffusion's autoencoder in the layout of diffusers

VAE_NAMES = (  # (ours, which is Stability's; theirs), applied in this order
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
VAE_OLDER = (  # (what files written before April 2023 call the attention's projections, theirs)
    (r"(attentions\.0)\.query\.", r"\1.to_q."), (r"(attentions\.0)\.key\.", r"\1.to_k."),
    (r"(attentions\.0)\.value\.", r"\1.to_v."), (r"(attentions\.0)\.proj_attn\.", r"\1.to_out.0."))


def vae_views(vae):
    """Views of a VAE as `vae/` of the diffusers layout has it."""
    last = len(vae.config.channels) - 1

    def from_coarsest(match):  # diffusers numbers the decoder's levels in the order they run
        return f".up.{last - int(match[1])}."

    table = ((r"\.up\.(\d+)\.", from_coarsest), *VAE_NAMES)
    views = weights.renamed(weights.named_views(vae), table)
    for name, (tensor,) in views.items():
        if ".attentions." in name and tensor.dim() == 4:
            views[name] = [tensor.flatten(1)]  # [C,C,1,1] -> [C,C]
    return views


def vae_fields(folder):
    """Fields of vae.VAEConfig from a diffusers folder's config.json. Raises UserError."""
    raw = weights.read_config(folder / "config.json")
    try:
        quant_convs = [raw.get(f"use_{name}", True) for name in ("quant_conv", "post_quant_conv")]
        if quant_convs not in ([True, True], [False, False]):
            raise ValueError("one quant_conv without the other")
        return {
            "channels": tuple(raw["block_out_channels"]),
            "blocks": raw["layers_per_block"],
            "latent_channels": raw["latent_channels"],
            "groups": raw.get("norm_num_groups", 32),
            "scale": raw.get("scaling_factor", 0.18215),  # SD 1.5's, which older files leave out
            "shift": raw.get("shift_factor", 0.0),
            "quant_convs": quant_convs[0]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json: not a configuration of Stable Diffusion's "
                        f"autoencoder ({error}); give the vae/ of its checkpoint") from error


def vae_fields_of_tensors(entries, path):
    """The same from the tensors' shapes, for a single file; scale, shift and groups are SD3's."""
    try:
        down = [name.split(".") for name in entries if name.startswith("encoder.down.")]
        levels = len({parts[2] for parts in down})
        first = [parts for parts in down if parts[2:4] == ["0", "block"]]
        if levels > 10 or len(first) > 1000:
            raise ValueError(f"at most 10 levels, found {levels:,}")
        inputs = [entries[f"encoder.down.{i}.block.0.conv1.weight"] for i in range(levels)]
        return {
            "channels": tuple(entry.shape[0] for entry in inputs),
            "blocks": len({parts[4] for parts in first}),
            "latent_channels": entries["decoder.conv_in.weight"].shape[1]}
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path}: no SD3 autoencoder under first_stage_model.* (looking for "
                        f"{error}); give sd3.5_medium.safetensors or a diffusers folder") from error


# --------------------------------------------------------------------------------------------------
# Qwen2.5-VL

QWEN_NEWER = (  # (a newer scheme, which puts both towers under `model.`; ours, the first one)
    (r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
QWEN_TEXT = {  # ours: the key of a config.json, or of its text_config
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "mlp": "intermediate_size", "vocab": "vocab_size"}
QWEN_VISION = {  # ours: the key of its vision_config
    "vision_width": "hidden_size", "vision_layers": "depth", "vision_heads": "num_heads",
    "vision_mlp": "intermediate_size"}
QWEN_VISION_OPTIONAL = {
    "patch": "patch_size", "frames": "temporal_patch_size", "merge": "spatial_merge_size",
    "window": "window_size", "full_blocks": "fullatt_block_indexes"}
QWEN_LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.gate_up_proj")


def qwen_fused(c):
    """{layer of a QwenVL: the published ones it fuses}, as weights.projections takes it."""
    own = c.kv_heads * c.head_dim
    rows = {"q_proj": c.heads * c.head_dim, "k_proj": own, "v_proj": own}
    return {"qkv_proj": rows, "gate_up_proj": ("gate_proj", "up_proj")}


def qwen_views(model):
    """Views of a QwenVL under the first published names."""
    c = model.config
    views = weights.named_views(model, qwen_fused(c))
    name = "visual.patch_embed.proj.weight"  # published as the kernel of a convolution
    views[name] = [views[name][0].view(-1, 3, c.frames, c.patch, c.patch)]
    return views


def qwen_lora_targets(model):
    """{module path: {peft's name: rows}} of all linear layers of a QwenVL's language model."""
    fused = qwen_fused(model.config)
    targets = {}
    for i, block in enumerate(model.model.layers):
        for name in QWEN_LAYERS:
            rows = block.get_submodule(name).weight.shape[0]
            published = f"model.language_model.layers.{i}.{name}"
            targets[f"model.layers.{i}.{name}"] = weights.projections(published, rows, fused)
    return targets


def qwen_fields(folder, tensors=math.inf):
    """Fields of qwen_vl.QwenVLConfig from a folder's config.json. Raises UserError.

    The file is flat, as first published, or has a text_config. tensors: as for `mmdit_fields`.
    """
    raw = weights.read_config(folder / "config.json", tensors)
    text = raw.get("text_config", raw)
    vision = raw.get("vision_config", {})
    try:
        if raw.get("model_type") != "qwen2_5_vl":
            raise ValueError(f"model_type {raw.get('model_type')!r}")
        if text.get("use_sliding_window"):
            raise ValueError("use_sliding_window is true")
        fields = {ours: text[theirs] for ours, theirs in QWEN_TEXT.items()}
        fields |= {ours: vision[theirs] for ours, theirs in QWEN_VISION.items()}
        fields |= {ours: vision[theirs] for ours, theirs in QWEN_VISION_OPTIONAL.items()
                   if theirs in vision}
        if "full_blocks" in fields:
            fields["full_blocks"] = tuple(fields["full_blocks"])
        rope = text.get("rope_parameters") or text["rope_scaling"]
        scaled = {rope.get("type"), rope.get("rope_type")} - {None, "default", "mrope"}
        if scaled:  # such as yarn, for texts that are longer than those of training
            raise ValueError(f"rope scaling {min(scaled)!r:.80} is not supported")
        fields["sections"] = tuple(rope["mrope_section"])
        fields["theta"] = rope.get("rope_theta", text.get("rope_theta", 1e6))
        fields["eps"] = text.get("rms_norm_eps", 1e-6)
        fields["tied"] = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        fields["image_token"] = raw.get("image_token_id", 151_655)
        check_qwen(fields)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{folder}/config.json: not a Qwen2.5-VL configuration this file knows ({error}); give "
            f"Qwen/Qwen2.5-VL-7B-Instruct or a folder in its layout") from error
    return fields


def check_qwen(fields):
    """ValueError if the numbers of a configuration, each fine by itself, fit no model together."""
    heads = fields["heads"]
    vision_heads = fields["vision_heads"]
    unit = fields.get("patch", 14) * fields.get("merge", 2)  # pixels of a side of a merged token
    fits = {
        "hidden_size is no multiple of num_attention_heads": fields["width"] % heads == 0,
        "num_attention_heads is no multiple of num_key_value_heads":
            heads % fields["kv_heads"] == 0,
        "mrope_section has not one number for each two channels of a head":
            len(fields["sections"]) == 3 and 2 * sum(fields["sections"]) * heads == fields["width"],
        "vision_config's hidden_size is no multiple of four times its num_heads":
            fields["vision_width"] % (4 * vision_heads) == 0,
        "window_size is less than a merged patch": fields.get("window", 112) >= unit,
        "image_token_id is beyond vocab_size": fields["image_token"] < fields["vocab"],
        "tie_word_embeddings is neither true nor false": isinstance(fields["tied"], bool)}
    for what, holds in fits.items():
        if not holds:
            raise ValueError(what)


def qwen_json(c, processor):
    """The config.json of a QwenVLConfig, with the ids of its tokenizer's control tokens."""
    marks = ("video_pad", "vision_start", "vision_end")
    ids = [processor.tokenizer.token_to_id(f"<|{mark}|>") for mark in marks]
    text = {theirs: getattr(c, ours) for ours, theirs in QWEN_TEXT.items()}
    vision = {theirs: getattr(c, ours) for ours, theirs in QWEN_VISION.items()}
    vision |= {theirs: getattr(c, ours) for ours, theirs in QWEN_VISION_OPTIONAL.items()}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        **text, "tie_word_embeddings": c.tied, "rms_norm_eps": c.eps, "rope_theta": c.theta,
        "rope_scaling": {"type": "mrope", "mrope_section": c.sections},
        "hidden_act": "silu", "use_sliding_window": False, "image_token_id": c.image_token,
        "video_token_id": ids[0], "vision_start_token_id": ids[1], "vision_end_token_id": ids[2],
        "bos_token_id": processor.stop[-1], "eos_token_id": processor.stop[0],
        "vision_config": {"model_type": "qwen2_5_vl", **vision, "hidden_act": "silu",
                          "in_chans": 3, "out_hidden_size": c.width}}

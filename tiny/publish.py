"""Writes the miniature's models as transformers and diffusers publish theirs, so both read them.

parts/ only reads these layouts, because nothing but the miniature is trained from the start.
"""

from dataclasses import asdict
from pathlib import Path

from parts import layouts, weights
from parts.clip import END
from parts.files import write_json, write_whole


def save_vae(folder, model, dtype=None):
    """Write a VAE: config.json and diffusion_pytorch_model.safetensors of diffusers."""
    # diffusers refuses a configuration that leaves one of these out, though most never change.
    c = model.config
    levels = len(c.channels)  # diffusers wants the kind of every level's block
    write_json(Path(folder) / "config.json", {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": list(c.channels),
        "in_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * levels,
        "latent_channels": c.latent_channels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": c.blocks, "out_channels": 3, "norm_num_groups": c.groups,
        "scaling_factor": c.scale, "shift_factor": c.shift, "force_upcast": True,
        "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True})
    path = Path(folder) / "diffusion_pytorch_model.safetensors"
    weights.save(path, layouts.vae_views(model), dtype)


def save_text_tower(folder, tower, dtype=None):
    """Write a clip.TextTower as transformers' CLIPTextModelWithProjection."""
    write_json(Path(folder) / "config.json", {
        "architectures": ["CLIPTextModelWithProjection"], **text_json(tower.config)})
    weights.save(Path(folder) / "model.safetensors", tower.views(), dtype)


def text_json(c):
    # our vocabularies end with the start and the end of a text
    return {"model_type": "clip_text_model", **asdict(c), "bos_token_id": c.eos_token_id - 1}


def save_clip(folder, model, dtype=None):
    """Write a clip.CLIP, with its processor if it has one, as transformers' CLIPModel."""
    c = model.vision.config
    write_json(Path(folder) / "config.json", {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": c.projection_dim,
        "text_config": text_json(model.text.config),
        "vision_config": {"model_type": "clip_vision_model", **asdict(c)}})
    if model.processor is not None:
        save_processor(Path(folder), model.processor)
    weights.save(Path(folder) / "model.safetensors", model.views(), dtype)


def save_processor(folder, processor):
    tokenizer = processor.tokenizer
    image = processor.image
    write_whole(folder / "tokenizer.json", tokenizer.tokenizer.to_str(pretty=False))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.max_length,
        "bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END,
        "pad_token": tokenizer.tokenizer.id_to_token(tokenizer.pad)})
    # "shortest_edge" keeps the shape and crops; two sides change the shape
    both = {"height": image.size, "width": image.size}
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor",
        "size": both if image.square else {"shortest_edge": image.size}, "crop_size": both,
        "resample": 3, "image_mean": list(image.mean), "image_std": list(image.std)})


def save_tokenizers(folder, vocab, merges, max_length):
    """Write a pipeline's tokenizer/, which pads with the end as CLIP-L's, and tokenizer_2/."""
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        lines = ["#version: 0.2", *map(" ".join, merges)]  # readers skip the first line
        write_json(Path(folder) / name / "vocab.json", vocab)
        write_whole(Path(folder) / name / "merges.txt", "\n".join(lines) + "\n")
        write_json(Path(folder) / name / "tokenizer_config.json", {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": max_length,
            "bos_token": "<|startoftext|>", "eos_token": END, "unk_token": END, "pad_token": pad})


def save_pipeline(folder):
    """Write model_index.json and the scheduler's configuration: they make a folder a pipeline."""
    write_json(Path(folder) / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
        "shift": 3.0})
    text_tower = ["transformers", "CLIPTextModelWithProjection"]
    tokenizer = ["transformers", "CLIPTokenizer"]
    write_json(Path(folder) / "model_index.json", {
        "_class_name": "StableDiffusion3Pipeline", "t5_tokens": 0,  # no T5, and no zeros for it
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": text_tower, "text_encoder_2": text_tower, "text_encoder_3": [None, None],
        "tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": [None, None]})

"""The smallest models that the trainings take: of one block each, with the miniature's text encoders and tokenizers."""

import shutil

import torch
import torch.nn.functional as F
from PIL import Image

import feedback
import mmdit
import qwen_vl
from parts import chat, vae
from parts.pipeline import TINY
from tiny import publish
from tiny.initialise import initialise

ANSWER = '<think>a</think><answer>{"valence": 5, "arousal": 5}</answer>'


def write_generator(folder):
    """A pipeline that draws noise."""
    torch.manual_seed(0)
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(TINY / name, folder / name)
    config = mmdit.MMDiTConfig(depth=2, heads=2, head_dim=16, dual_blocks=(0,), context_dim=160, pooled_dim=192, positions=8,
                               sample_size=8)
    initialise(mmdit.MMDiT(config)).save_pretrained(folder / "transformer")
    publish.save_vae(folder / "vae", vae.VAE(vae.VAEConfig(channels=(8, 8, 8, 8), blocks=1, groups=4, scale=1.0, shift=0.0)))
    publish.save_pipeline(folder)
    return folder


def write_judge(folder, steps=150):
    """A judge that has learned one answer by heart, so that its answers end, and are mostly readable."""
    torch.manual_seed(0)
    processor = chat.Processor.from_pretrained(TINY / "judge", qwen_vl.QwenVL.from_pretrained(TINY / "judge").config)
    config = qwen_vl.QwenVLConfig(
        width=32, layers=1, heads=2, kv_heads=1, mlp=64, vocab=processor.tokenizer.get_vocab_size(), tied=True, theta=1e4,
        sections=(2, 3, 3), vision_width=32, vision_layers=1, vision_heads=2, vision_mlp=32, patch=16, window=64,
        full_blocks=(0,), image_token=processor.image_token)
    model = qwen_vl.QwenVL(config, processor)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    prompts = [processor(feedback.ask(task, Image.new("RGB", (64, 64)))) for task in feedback.TASKS]
    ids = torch.tensor([*processor.tokenizer.encode(ANSWER).ids, processor.stop[0]]).expand(len(prompts), 1, -1)  # [P,1,C]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        hidden = model.completion_hidden(prompts, ids)
        loss = F.cross_entropy(F.linear(hidden, model.head_weight).flatten(0, 2), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False).save_pretrained(folder)
    return folder

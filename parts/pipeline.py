"""Prompts to pictures: the generator's models put together, and the judge, loaded for pictures of one size."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

import flow_grpo
import mmdit
import qwen_vl
from parts import lora, ops, text_encoders, vae, weights
from parts.cli import UserError
from parts.files import read_json

TINY = Path(__file__).resolve().parent.parent / "tiny" / "weights"
PAPER = "stabilityai/stable-diffusion-3.5-medium"


@dataclass
class Generator:
    mmdit: mmdit.MMDiT
    vae: vae.VAE
    encoders: text_encoders.TextEncoders
    shift: float  # of the noise schedule
    name: str  # for people and files: not the folder where this machine keeps the miniature

    @property
    def device(self):
        return self.mmdit.pos_embed.device

    @torch.no_grad()
    def draw(self, prompts, seeds, size, steps=25, guidance=4.5, noise=None, progress=iter):
        """Pictures [B,3,size,size] uint8 of B prompts; picture i depends on its own prompt and seed only.

        noise [B,16,size/8,size/8]: in place of that of the seeds. progress: wraps the steps, e.g. in tqdm.
        """
        B, cells = len(prompts), size // self.vae.factor
        if noise is None:
            noise = torch.cat([torch.randn(1, self.mmdit.config.channels, cells, cells,
                                           generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        texts = [""] * B + list(prompts) if guidance > 1 else list(prompts)
        unique = list(dict.fromkeys(texts))  # each text is encoded once
        rows = [unique.index(text) for text in texts]
        context, pooled = (z[rows] for z in self.encoders.encode(unique))
        dtype = self.mmdit.pos_embed.dtype
        with ops.all_laid_out(self.mmdit):
            latents = flow_grpo.sample_ode(
                self.mmdit, noise.to(self.device), context.to(self.device, dtype), pooled.to(self.device, dtype), steps,
                guidance, self.shift, progress)
        return self.decode(latents)

    @torch.no_grad()
    def decode(self, latents):
        """Pictures [B,3,H,W] uint8 of scaled latents [B,16,H/8,W/8]."""
        dtype = self.mmdit.pos_embed.dtype
        images = torch.cat([self.vae.decode(z[None].to(dtype)) for z in latents]).float()  # one by one: memory
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def load_generator(source, device="cpu", dtype=None, use_t5=True, encoders_from=None, encoders_device=None, adapter=None):
    """A Generator from a diffusers folder, a hub id or Stability's single file. Raises UserError.

    encoders_from: folder or hub id of the text encoders and scheduler; needed for a single file, which has none.
    encoders_device: where the text encoders live, if not with the rest.
    adapter: folder of a LoRA of its attention, as train_gen.py or peft writes it, which is merged into the weights.
    All headers are checked before the first tensor is read.
    """
    rest = encoders_from or source
    if Path(rest).expanduser().is_file():
        raise UserError(f"{source}: a single file holds no text encoders; add --text-encoders with a "
                                      f"folder or hub id that does, such as {PAPER}")
    listed = read_json(weights.find_file(rest, "model_index.json"))
    shift = read_json(weights.find_file(rest, "scheduler/scheduler_config.json")).get("shift", 3.0)
    use_t5 = use_t5 and text_encoders.has_t5(listed)
    components = {"transformer": source, "vae": source, "text_encoder": rest, "text_encoder_2": rest}
    for component, where in (components | ({"text_encoder_3": rest} if use_t5 else {})).items():
        weights.index(weights.find(where, component))
    if adapter is not None:
        adapter = weights.find(adapter)
        weights.index(adapter)
    # its tokenizers come first
    encoders = text_encoders.TextEncoders.from_pretrained(rest, encoders_device or device, dtype, use_t5)
    model = mmdit.MMDiT.from_pretrained(source, device, dtype)
    if adapter is not None:
        lora.load_lora(adapter, model, model.lora_targets())
    return Generator(model, vae.VAE.from_pretrained(source, device, dtype), encoders, shift,
                     name_of(source) + (f" with {name_of(adapter)}" if adapter is not None else ""))


def name_of(source):
    """What a checkpoint is called in files and on the screen: not where this machine keeps the miniature."""
    path = Path(source)
    return f"tiny/weights/{path.relative_to(TINY)}".removesuffix("/.") if path.is_relative_to(TINY) else str(source)


def to_images(pixels):
    """[B,3,H,W] uint8 -> list of B PIL images."""
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]


def load_judge(source, device, size):
    """The judge, its pictures limited to the size they are drawn at. Its headers are checked first."""
    judge = qwen_vl.QwenVL.from_pretrained(source, device)
    image = judge.processor.image
    judge.processor.image = replace(image, max_pixels=max(image.min_pixels, min(image.max_pixels, size**2)))
    return judge

"""SDXL and InstructPix2Pix: one U-Net, and the two pipelines that draw with it.

    sdxl = SDXL.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", "cuda")
    pixels = sdxl.draw([Case("a swan on the lake", v=7, a=3)], seeds=[0])  # [1,3,1024,1024] uint8

SDXL (Podell et al. 2023) makes pictures of prompts. InstructPix2Pix (Brooks et al. 2023) is Stable
Diffusion 1.5 (Rombach et al. 2022) whose U-Net also reads the latents of a source picture, which it
changes as a prompt says. EmotiCrafter and EmoEdit change the prompt embeddings of the one and of
the other, so both pipelines draw from embeddings, too (`draw_embedded`).

The U-Net predicts the noise in latents. On the way down each level halves the resolution; on the
way up each doubles it again, and reads what the way down kept. Text enters by cross-attention, the
timestep as a bias of each channel. Modules carry diffusers' names but for the few in NAMES; only
its layout is read. Steps, guidance and size are the defaults of diffusers' pipelines.

Shapes: B pictures, C channels of a level, h, w latent cells, N = h·w, L text tokens (77), T width
of the time embedding. Left out: SDXL's refiner and watermark, the safety checker of SD 1.5.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mmdit import Embedder, sinusoids
from parts import clip, hub, ops, text_encoders, vae, weights
from parts.cli import UserError
from parts.files import to_rgb
from parts.pipeline import normal, seeded

SIZES = 6  # numbers of SDXL's size conditioning


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple = (320, 640, 1280)  # of each level, from full resolution down
    blocks: int = 2  # residual blocks of a level on the way down; there is one more on the way up
    transformers: tuple = (0, 2, 10)  # transformer blocks behind each residual block of a level
    middle: int = 10  # transformer blocks between the two ways
    heads: tuple = (5, 10, 20)  # of each level
    context_dim: int = 2048
    pooled_dim: int = 1280  # of the text vector that is embedded with the sizes; 0: neither is
    frequencies: int = 256  # of the sizes' sinusoids
    linear_projection: bool = True  # else the file has 1×1 convolutions around a transformer
    groups: int = 32


SDXL_UNET = UNetConfig()
INSTRUCT_PIX2PIX_UNET = UNetConfig(
    in_channels=8, channels=(320, 640, 1280, 1280), transformers=(1, 1, 1, 0), middle=1,
    heads=(8, 8, 8, 8), context_dim=768, pooled_dim=0, linear_projection=False)


# --------------------------------------------------------------------------------------------------
# Blocks


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, c):
        super().__init__()
        self.norm1 = nn.GroupNorm(c.groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * c.channels[0], c_out)
        self.norm2 = nn.GroupNorm(c.groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time):  # [B,C_in,h,w], [B,T] -> [B,C_out,h,w]
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        if hasattr(self, "conv_shortcut"):  # a sum needs as many channels on both sides
            x = self.conv_shortcut(x)
        return x + y


class Attention(nn.Module):
    def __init__(self, width, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x, context):  # [B,N,C], [B,S,·] -> [B,N,C]
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (ops.in_heads(z, self.heads) for z in projected)
        return self.to_out(ops.attention(q, k, v))


class TransformerBlock(nn.Module):
    def __init__(self, width, context_dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_dim, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff_in = nn.Linear(width, 8 * width)  # the values, then their gates
        self.ff_out = nn.Linear(4 * width, width)

    def forward(self, x, context):  # [B,N,C], [B,L,·] -> [B,N,C]
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        value, gate = self.ff_in(self.norm3(x)).chunk(2, dim=-1)
        return x + self.ff_out(value * F.gelu(gate))


class Transformer(nn.Module):
    """Transformer blocks whose tokens are the cells of a map."""

    def __init__(self, width, heads, depth, c):
        super().__init__()
        self.norm = nn.GroupNorm(c.groups, width, eps=1e-6)
        # A 1×1 convolution of cells is a linear layer of tokens; `UNet.views` knows which is which.
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, c.context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, width)

    def forward(self, x, context):  # [B,C,h,w], [B,L,·] -> [B,C,h,w]
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B,N,C]
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens).transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """The blocks of one resolution on one way, and the convolution of a change of resolution."""

    def __init__(self, c, i, widths, downsample=False, upsample=False):
        """i: index of the level. widths: channels that each residual block reads."""
        super().__init__()
        C = c.channels[i]
        self.resnets = nn.ModuleList(ResBlock(width, C, c) for width in widths)
        if c.transformers[i]:
            self.attentions = nn.ModuleList(
                Transformer(C, c.heads[i], c.transformers[i], c) for _ in widths)
        if downsample:
            self.downsample = nn.Conv2d(C, C, 3, stride=2, padding=1)
        if upsample:
            self.upsample = nn.Conv2d(C, C, 3, padding=1)

    def step(self, j, x, time, context):
        """Its residual block j, and the transformer behind it, if there are any."""
        x = self.resnets[j](x, time)
        return self.attentions[j](x, context) if hasattr(self, "attentions") else x


class Middle(nn.Module):
    def __init__(self, c):
        super().__init__()
        C = c.channels[-1]
        self.resnets = nn.ModuleList(ResBlock(C, C, c) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(C, c.heads[-1], c.middle, c)])

    def forward(self, x, time, context):
        x = self.attentions[0](self.resnets[0](x, time), context)
        return self.resnets[1](x, time)


# --------------------------------------------------------------------------------------------------
# The U-Net


class UNet(nn.Module):
    def __init__(self, config=SDXL_UNET):
        super().__init__()
        c = self.config = config
        first = c.channels[0]
        last = len(c.channels) - 1
        self.conv_in = nn.Conv2d(c.in_channels, first, 3, padding=1)
        self.time_embedding = Embedder(first, 4 * first)
        if c.pooled_dim:
            self.add_embedding = Embedder(c.pooled_dim + SIZES * c.frequencies, 4 * first)
        kept = [first]  # channels of what the way down keeps, in its order
        self.down_blocks = nn.ModuleList()
        for i, C in enumerate(c.channels):
            widths = [kept[-1]] + [C] * (c.blocks - 1)
            self.down_blocks.append(Level(c, i, widths, downsample=i < last))
            kept += [C] * (c.blocks + (i < last))
        self.mid_block = Middle(c)
        self.up_blocks = nn.ModuleList()
        C = c.channels[-1]
        for i in range(last, -1, -1):
            widths = []
            for _ in range(c.blocks + 1):  # each block reads the one before and what was kept
                widths.append(C + kept.pop())
                C = c.channels[i]
            self.up_blocks.append(Level(c, i, widths, upsample=i > 0))
        self.conv_norm_out = nn.GroupNorm(c.groups, first)
        self.conv_out = nn.Conv2d(first, c.out_channels, 3, padding=1)

    def forward(self, latents, timestep, context, pooled=None, sizes=None):
        """The noise [B,C,h,w] in `latents` [B,C_in,h,w].

        timestep [1] or [B] in 0..1000, context [B,L,context_dim]; of SDXL also pooled
        [B,pooled_dim] and sizes [6] in pixels: those asked for, the corner cut off, the result's.
        """
        time = self.time_embedding(sinusoids(timestep, self.config.channels[0]).to(latents))
        if self.config.pooled_dim:
            waves = sinusoids(sizes, self.config.frequencies).flatten()  # [6·frequencies]
            waves = waves.to(latents).expand(len(pooled), -1)
            time = time + self.add_embedding(torch.cat([pooled, waves], dim=-1))  # [B,T]
        # 1. down
        x = self.conv_in(ops.channels_last(latents))
        kept = [x]
        for level in self.down_blocks:
            for j in range(len(level.resnets)):
                x = level.step(j, x, time, context)
                kept.append(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
                kept.append(x)
        # 2. between
        x = self.mid_block(x, time, context)
        # 3. up
        for level in self.up_blocks:
            for j in range(len(level.resnets)):
                x = level.step(j, torch.cat([x, kept.pop()], dim=1), time, context)
            if hasattr(level, "upsample"):
                # To the size that was kept, which may be one less than twice as high or wide.
                x = level.upsample(F.interpolate(x, size=kept[-1].shape[-2:], mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def views(self):
        """Names of diffusers' UNet2DConditionModel."""
        views = weights.renamed(weights.named_views(self), NAMES)
        if not self.config.linear_projection:
            for name, (tensor,) in views.items():
                if name.endswith(("proj_in.weight", "proj_out.weight")):
                    views[name] = [tensor[:, :, None, None]]  # [C,C] -> [C,C,1,1]
        return views

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None):
        """A diffusers folder or hub id (its `unet/`). Raises UserError."""
        path = weights.find(source, "unet")
        entries = weights.index(path)
        make = functools.partial(cls, unet_config(path / "config.json", len(entries)))
        return weights.build(make, cls.views, entries, path, device, dtype)


NAMES = (  # (ours, published)
    (r"_embedding\.mlp\.0\.", "_embedding.linear_1."),
    (r"_embedding\.mlp\.2\.", "_embedding.linear_2."),
    (r"\.(down|up)sample\.", r".\1samplers.0.conv."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.ff_in\.", ".ff.net.0.proj."),
    (r"\.ff_out\.", ".ff.net.2."))
FIXED = {  # settings that no tensor's shape shows; with others the same weights mean another model
    "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False,
    "downsample_padding": 1, "norm_eps": 1e-5, "mid_block_scale_factor": 1,
    "resnet_out_scale_factor": 1, "resnet_skip_time_act": False, "dual_cross_attention": False}


def unet_config(file, tensors=math.inf):
    """The UNetConfig of diffusers' config.json. tensors: how many there are. Raises UserError."""
    numbers = ("attention_head_dim", "num_attention_heads", "transformer_layers_per_block")
    raw = weights.read_config(file, tensors, per_level=numbers)
    try:
        check_fixed(raw, FIXED)
        channels = tuple(raw["block_out_channels"])
        # attention_head_dim is the number of heads: diffusers calls it so by an old mistake.
        heads = raw.get("num_attention_heads", raw.get("attention_head_dim", 8))
        depths = per_level(raw.get("transformer_layers_per_block", 1), channels)
        crossed = [kind.startswith("CrossAttn") for kind in raw["down_block_types"]]
        blocks = raw["layers_per_block"]
        if blocks * (len(channels) + sum(depths)) > tensors:
            raise ValueError("more layers than tensors")
        frequencies = raw.get("addition_time_embed_dim", 256)
        pooled_dim = 0
        if raw.get("addition_embed_type") == "text_time":
            pooled_dim = raw["projection_class_embeddings_input_dim"] - SIZES * frequencies
        return UNetConfig(
            raw["in_channels"], raw["out_channels"], channels, blocks,
            tuple(n * own for n, own in zip(depths, crossed, strict=True)), depths[-1],
            per_level(heads, channels), raw["cross_attention_dim"], pooled_dim, frequencies,
            raw.get("use_linear_projection", False), raw.get("norm_num_groups", 32))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not a configuration of the U-Net of SDXL or InstructPix2Pix "
                        f"({error}); give a whole pipeline in the layout of diffusers") from error


def per_level(value, levels):
    """A number for each level, of a list of them or one for all. Raises ValueError."""
    values = tuple(value) if isinstance(value, list) else (value,) * len(levels)
    if len(values) != len(levels):
        raise ValueError(f"{len(values)} numbers for {len(levels)} levels")
    return values


def check_fixed(raw, fixed):
    """ValueError that names the settings of a configuration that have other values."""
    odd = [f"{name} {raw[name]!r:.80}" for name, value in fixed.items()
           if raw.get(name, value) != value]
    if odd:
        raise ValueError(", ".join(odd))


# --------------------------------------------------------------------------------------------------
# From noise to pictures


@dataclass(frozen=True)
class Schedule:
    """The noise of a model's training; names and defaults are those of diffusers' schedulers."""
    beta_start: float
    beta_end: float
    num_train_timesteps: int = 1000
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    ancestral: bool = False  # a step removes more noise than it has to, and adds some anew

    @classmethod
    def from_pretrained(cls, source):
        """Of a pipeline's scheduler/, Euler's method or its ancestral form. Raises UserError."""
        file = weights.find_file(source, "scheduler/scheduler_config.json")
        raw = weights.read_config(file)
        kinds = {"EulerDiscreteScheduler": False, "EulerAncestralDiscreteScheduler": True}
        try:
            check_fixed(raw, {
                "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
                "interpolation_type": "linear", "final_sigmas_type": "zero",
                "timestep_type": "discrete", "use_karras_sigmas": False, "use_beta_sigmas": False,
                "use_exponential_sigmas": False, "rescale_betas_zero_snr": False,
                "trained_betas": None})
            schedule = weights.fields_of(cls, raw | {"ancestral": kinds[raw["_class_name"]]})
            if schedule.timestep_spacing not in ("linspace", "leading"):
                raise ValueError(f"timestep_spacing {schedule.timestep_spacing!r:.80}")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: not the schedule of SDXL or InstructPix2Pix ({error}); "
                            f"download it again") from error
        return schedule

    def noise_levels(self, steps):
        """(timesteps [steps], σ [steps + 1]), from most noise to none.

        σ is the deviation of the noise beside a picture's unscaled latents (Karras et al. 2022).
        """
        number = self.num_train_timesteps
        betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, number)**2
        signal = torch.cumprod(1 - betas, dim=0)  # the picture's share of the variance
        if self.timestep_spacing == "leading":
            timesteps = np.arange(steps)[::-1] * (number // steps) + self.steps_offset
        else:
            timesteps = np.linspace(0, number - 1, steps)[::-1]
        sigmas = np.interp(timesteps, np.arange(number), ((1 - signal) / signal).sqrt().numpy())
        return timesteps.tolist(), [*sigmas.tolist(), 0.0]


@dataclass
class LatentDiffusion:
    """What both pipelines share: the U-Net, the VAE and the schedule."""
    unet: UNet
    vae: vae.VAE
    schedule: Schedule

    @classmethod
    def from_pretrained(cls, source, device, dtype):
        schedule = Schedule.from_pretrained(source)
        unet = UNet.from_pretrained(source, device, dtype)
        return cls(unet, vae.VAE.from_pretrained(source, device, dtype), schedule)

    @property
    def weight(self):
        """A weight, whose device and type the U-Net's inputs must have."""
        return self.unet.conv_in.weight

    @torch.no_grad()
    def draw(self, predict, seeds, sides, steps, noise, progress):
        """Pictures [B,3,H,W] uint8, on the CPU, of the sides (H, W).

        predict(latents [B,C,h,w] of variance one, timestep [1]) -> the noise in them.
        noise [B,C,h,w]: in place of that of the seeds; an ancestral step's is always the seeds'.
        """
        # 1. the first latents are noise alone
        generators = seeded(seeds)
        h, w = (side // self.vae.factor for side in sides)
        shape = (self.unet.config.out_channels, h, w)
        x = normal(generators, shape) if noise is None else noise
        timesteps, sigmas = self.schedule.noise_levels(steps)
        scale = sigmas[0]
        if self.schedule.timestep_spacing == "leading":
            # The first step is not the noisiest of the training, so a picture is in it, too.
            scale = (sigmas[0]**2 + 1)**0.5
        x = x.to(self.weight.device).float() * scale
        # 2. Euler's steps; an ancestral one goes below the next σ, and what it adds makes up for it
        for i in progress(range(steps)):
            sigma = sigmas[i]
            following = sigmas[i + 1]
            timestep = torch.tensor([timesteps[i]], device=x.device)
            predicted = predict((x / (sigma**2 + 1)**0.5).to(self.weight), timestep)
            if not self.schedule.ancestral:
                x = x + (following - sigma) * predicted
                continue
            added = following * (1 - (following / sigma)**2)**0.5
            below = (following**2 - added**2)**0.5
            x = x + (below - sigma) * predicted + added * normal(generators, shape).to(x)
        # 3. pixels
        return self.vae.pictures(x)


# --------------------------------------------------------------------------------------------------
# The two pipelines


@dataclass
class SDXL:
    """Pictures of prompts."""
    model: LatentDiffusion
    encoders: text_encoders.TextEncoders
    zeros: bool  # stand for the empty prompt's embeddings

    steps = 50
    guidance = 5.0
    size = 1024

    @classmethod
    def from_pretrained(cls, source="stabilityai/stable-diffusion-xl-base-1.0", device="cpu",
                        dtype=None):
        """A diffusers folder or hub id. Raises UserError."""
        texts = ("", "_2")
        index = read_index(source, "StableDiffusionXLPipeline", texts)
        clip_l, clip_g = (load_text(source, name, device, dtype, name == "_2") for name in texts)
        width = clip_l[0].config.hidden_size + clip_g[0].config.hidden_size
        # SDXL reads prompts as SD3 does without T5, but for the pooled vector.
        encoders = text_encoders.TextEncoders(
            clip_l[0], clip_g[0], None, (clip_l[1], clip_g[1]), width, t5_tokens=0)
        model = LatentDiffusion.from_pretrained(source, device, dtype)
        pooled = clip_g[0].config.projection_dim
        check_parts(source, model, model.vae.config.latent_channels, width, pooled)
        return cls(model, encoders, index.get("force_zeros_for_empty_prompt", True))

    def draw(self, cases, seeds, size=None, steps=None, guidance=None, noise=None, progress=iter):
        """Pictures [B,3,size,size] uint8, on the CPU, of the prompts of B cases.

        What SDXL should know of V and A has to stand in the prompts. noise [B,4,size/8,size/8]: in
        place of that of the seeds. progress: wraps the steps.
        """
        context, pooled = self.encode([case.prompt for case in cases])
        return self.draw_embedded(context, pooled, seeds, size, steps, guidance, noise, progress)

    @property
    def network(self):
        """What draws."""
        return self.model.unet

    def encode(self, prompts):
        """B strings -> (context [B,77,2048], pooled [B,1280])."""
        context, pooled = self.encoders.encode(prompts)
        return context, pooled[:, -self.model.unet.config.pooled_dim:]  # the second encoder's

    def draw_embedded(self, context, pooled, seeds, size=None, steps=None, guidance=None,
                      noise=None, progress=iter):
        """As `draw`, of embeddings as `encode` gives them, perhaps changed."""
        size = size or self.size
        guidance = self.guidance if guidance is None else guidance
        B = len(context)
        copies = 1
        if guidance > 1:  # the empty prompt's rows come first
            copies = 2
            empty = self.encode([""] * B)
            if self.zeros:
                empty = [torch.zeros_like(z) for z in empty]
            context = torch.cat([empty[0].to(context), context])
            pooled = torch.cat([empty[1].to(pooled), pooled])
        context = context.to(self.model.weight)
        pooled = pooled.to(self.model.weight)
        sizes = torch.tensor([size, size, 0, 0, size, size], device=context.device)

        def predict(latents, timestep):
            latents = latents.repeat(copies, 1, 1, 1)
            noise = self.model.unet(latents, timestep, context, pooled, sizes).float()
            empty = noise[:B]
            text = noise[-B:]  # the same without guidance
            return empty + guidance * (text - empty)

        return self.model.draw(predict, seeds, (size, size), steps or self.steps, noise, progress)


@dataclass
class InstructPix2Pix:
    """Pictures changed as prompts say."""
    model: LatentDiffusion
    encoder: clip.TextTower
    tokenizer: clip.PromptTokenizer

    steps = 100
    guidance = 7.5  # towards the prompt
    image_guidance = 1.5  # towards the source
    size = 512

    @classmethod
    def from_pretrained(cls, source="timbrooks/instruct-pix2pix", device="cpu", dtype=None):
        """A diffusers folder or hub id. Raises UserError."""
        read_index(source, "StableDiffusionInstructPix2PixPipeline", ("",))
        encoder, tokenizer = load_text(source, "", device, dtype, project=False)
        model = LatentDiffusion.from_pretrained(source, device, dtype)
        channels = 2 * model.vae.config.latent_channels  # a picture's beside its source's
        check_parts(source, model, channels, encoder.config.hidden_size, 0)
        return cls(model, encoder, tokenizer)

    def draw(self, cases, seeds, size=None, steps=None, guidance=None, noise=None, progress=iter):
        """Pictures [B,3,H,W] uint8, on the CPU: each case's source, changed by its prompt.

        The shorter of H and W is `size`, the other as in the sources, which must be of one form.
        noise [B,4,H/8,W/8]: in place of the seeds' first. progress: wraps the steps. Raises
        UserError for a case without a source.
        """
        contexts = (self.encode([case.prompt for case in cases]), self.encode([""] * len(cases)))
        guidance = (self.guidance if guidance is None else guidance, self.image_guidance)
        sources = [case.source for case in cases]
        return self.draw_embedded(contexts, sources, seeds, size, steps, guidance, noise, progress)

    @property
    def network(self):
        """What draws."""
        return self.model.unet

    @torch.no_grad()
    def encode(self, prompts):
        """B strings -> context [B,77,768]."""
        ids = self.tokenizer(prompts).to(self.encoder.token_embedding.weight.device)
        return self.encoder.final_layer_norm(self.encoder.states(ids)[1])

    @torch.no_grad()
    def encode_source(self, source, size):
        """A PIL image, whose shorter side becomes `size` -> unscaled latents [1,4,h,w]. Raises
        UserError."""
        if source is None:
            raise UserError("InstructPix2Pix changes pictures: give every case a source picture")
        small = resized(to_rgb(source), size, self.model.vae.factor)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]  # [1,3,H,W]
        mean, _ = self.model.vae.moments((pixels / 127.5 - 1).to(self.model.weight))
        return mean

    def draw_embedded(self, contexts, sources, seeds, size=None, steps=None, guidance=None,
                      noise=None, progress=iter):
        """As `draw`, of embeddings as `encode` gives them, perhaps changed.

        contexts: (of the prompts, of the empty ones), each [B,L,768]. sources: B PIL images.
        guidance: (towards the prompt, towards the source).
        """
        size = size or self.size
        text_guidance, image_guidance = guidance or (self.guidance, self.image_guidance)
        latents = [self.encode_source(source, size) for source in sources]
        if len({z.shape for z in latents}) > 1:
            raise UserError("pictures that are changed together must have one form; draw one at a "
                            "time (--micro 1)")
        sources = torch.cat(latents)
        sides = [self.model.vae.factor * side for side in sources.shape[2:]]
        # Three predictions: with text and source, with the source alone, with neither.
        sources = torch.cat([sources, sources, torch.zeros_like(sources)])  # [3B,4,h,w]
        text, empty = contexts
        context = torch.cat([text, empty, empty]).to(sources)

        def predict(latents, timestep):
            latents = torch.cat([latents.repeat(3, 1, 1, 1), sources], dim=1)  # [3B,8,h,w]
            noise = self.model.unet(latents, timestep, context).float()
            both, source, neither = noise.chunk(3)
            # Brooks et al. 2023, equation 3
            towards_source = image_guidance * (source - neither)
            return neither + towards_source + text_guidance * (both - source)

        return self.model.draw(predict, seeds, sides, steps or self.steps, noise, progress)


def resized(image, size, multiple):
    """A PIL image whose shorter side is `size`; both are multiples of `multiple`."""
    scale = size / min(image.size)
    sides = [max(multiple, round(side * scale / multiple) * multiple) for side in image.size]
    return image.resize(sides, Image.Resampling.LANCZOS)


# --------------------------------------------------------------------------------------------------
# Loading


def read_index(source, wanted, texts):
    """The model_index.json of a pipeline of the wanted class. Raises UserError.

    texts: suffixes of its text encoders. All that a hub id needs is downloaded.
    """
    folders = ["scheduler", "unet", "vae"]
    for suffix in texts:
        folders += [f"text_encoder{suffix}", f"tokenizer{suffix}"]
    hub.fetch([(source, ["model_index.json", *(f"{folder}/*" for folder in folders)])])
    file = weights.find_file(source, "model_index.json")
    index = weights.read_config(file)
    kind = index.get("_class_name")
    if kind != wanted:
        raise UserError(f"{file}: it is a {kind!r:.80}, expected a {wanted}")
    return index


def load_text(source, suffix, device, dtype, project):
    """(CLIP's text tower, its tokenizer) of a pipeline. project: as for TextTower."""
    name = f"text_encoder{suffix}"
    tower = clip.TextTower.from_pretrained(source, device, dtype, name, project)
    tokenizer = clip.PromptTokenizer(weights.find(source, f"tokenizer{suffix}"))
    tokenizer.fit(tower.config.vocab_size, tower.config.max_position_embeddings)
    return tower, tokenizer


def check_parts(source, model, channels, context_dim, pooled_dim):
    """UserError unless the other parts of a pipeline give what its U-Net takes."""
    c = model.unet.config
    given = (channels, context_dim, pooled_dim)
    taken = (c.in_channels, c.context_dim, c.pooled_dim)
    if given != taken:
        raise UserError(
            f"{source}: its U-Net takes latents of {taken[0]} channels and texts of {taken[1]} and "
            f"{taken[2]} numbers, the other parts give {given[0]}, {given[1]} and {given[2]}; give "
            f"parts of one checkpoint")

"""FLUX.1-dev and FLUX.1-schnell (Black Forest Labs 2024), which the paper compares with.

    flux = Flux.from_pretrained("black-forest-labs/FLUX.1-dev", "cuda", offload=True)
    pixels = flux.draw([Case("a swan on the lake", v=7, a=3)], seeds=[0])  # [1,3,1024,1024] uint8

A rectified flow like SD3.5, with three differences in the transformer. Its double blocks are the
joint blocks of the MMDiT; single blocks follow, in which text and picture share one set of weights
and attention and MLP run side by side. Positions turn queries and keys, where SD3.5 adds a table.
And the strength of guidance is an input: FLUX.1-dev was distilled to obey it, so that a step is one
pass instead of two. FLUX.1-schnell was distilled to four steps and has no such input.

Read is the layout of diffusers. The sizes are those of the published config.json files; steps,
guidance and the length of T5's context are those of the authors' own program,
github.com/black-forest-labs/flux. Left out: the single files, the models that fill or control, and
float16, in which some activations overflow.

Shapes: B pictures, C latent channels (16), h, w latent cells, N = (h/2)(w/2) picture tokens, L text
tokens, S = L + N, D width (3072), H heads (24), E = D/H.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn

import flow_grpo
import mmdit
from parts import clip, hub, layouts, ops, text_encoders, vae, weights
from parts.cli import UserError
from parts.files import read_json
from parts.pipeline import brought, home_of_weights, normal, seeded

THETA = 10_000  # the slowest channels turn about so many times more slowly than the fastest


@dataclass(frozen=True)
class FluxConfig:
    double_blocks: int = 19
    single_blocks: int = 38
    heads: int = 24
    head_dim: int = 128
    channels: int = 16
    context_dim: int = 4096
    pooled_dim: int = 768
    axes: tuple = (16, 56, 56)  # channels of a head for an index that is always 0, row, column
    guided: bool = True  # the strength of guidance is an input
    patch = 2  # latent cells along a token's side
    qk_norm = True

    @property
    def width(self):
        return self.heads * self.head_dim


FLUX_DEV = FluxConfig()
FLUX_SCHNELL = FluxConfig(guided=False)
FLUX_VAE = vae.VAEConfig(scale=0.3611, shift=0.1159)


# --------------------------------------------------------------------------------------------------
# Positions


def rotation_of(config, rows, columns, text, device):
    """(cos, sin), each [S,E/2] float32: how far each token turns each pair of channels.

    The text's tokens do not turn; a token of the picture turns by its row and its column.
    """
    place = torch.zeros(text + rows * columns, 3, dtype=torch.float64, device=device)
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # [N,2]
    place[text:, 1:] = cells.to(place)
    angles = []
    for axis, channels in enumerate(config.axes):
        pairs = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        angles.append(place[:, axis, None] * THETA ** -pairs)  # [S,channels/2]
    angles = torch.cat(angles, dim=1)  # [S,E/2]
    return angles.cos().float(), angles.sin().float()


def rotate(x, rotation):
    """Turn each pair of neighbouring channels of x [B,H,S,E] by its token's angle."""
    cos, sin = rotation
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each [B,H,S,E/2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Transformer


class DoubleBlock(nn.Module):
    """The joint block of the MMDiT, its queries and keys turned by their positions."""

    def __init__(self, c):
        super().__init__()
        self.context_block = mmdit.Stream(c)
        self.x_block = mmdit.Stream(c)

    def forward(self, x, context, cond, rotation):
        """x [B,N,D], context [B,L,D], cond [B,D] -> x and context."""
        mod_x = self.x_block.modulation(cond)
        mod_c = self.context_block.modulation(cond)
        attn_x = self.x_block.attn
        attn_c = self.context_block.attn
        qkv_c = attn_c.qkv(mmdit.modulate(context, mod_c.attn_shift, mod_c.attn_scale))
        qkv_x = attn_x.qkv(mmdit.modulate(x, mod_x.attn_shift, mod_x.attn_scale))
        q, k, v = mmdit.joint_qkv(qkv_c, qkv_x, attn_x.heads, attn_c.norms(), attn_x.norms())
        attended = ops.attention(rotate(q, rotation), rotate(k, rotation), v)  # [B,S,D]
        attended_c, attended_x = attended.split([context.shape[1], x.shape[1]], dim=1)
        x = self.x_block.after_attention(x, attended_x, mod_x)
        return x, self.context_block.after_attention(context, attended_c, mod_c)


class SingleBlock(nn.Module):
    """Attention and MLP side by side, over text and picture in one sequence."""

    def __init__(self, c):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 3 * c.width))
        self.attn = mmdit.Attention(c, has_output=False)
        self.proj_mlp = nn.Linear(c.width, 4 * c.width)
        self.proj_out = nn.Linear(5 * c.width, c.width)

    def forward(self, x, cond, rotation):  # [B,S,D], [B,D] -> [B,S,D]
        shift, scale, gate = self.adaLN_modulation(cond).chunk(3, dim=-1)
        normed = mmdit.modulate(x, shift, scale)
        q, k, v = ops.split_qkv(self.attn.qkv(normed), self.attn.heads, *self.attn.norms())
        attended = ops.attention(rotate(q, rotation), rotate(k, rotation), v)  # [B,S,D]
        both = torch.cat([attended, mmdit.gelu_linear(normed, self.proj_mlp)], dim=-1)  # [B,S,5D]
        return mmdit.gate_residual(x, self.proj_out(both), gate)


class FluxTransformer(nn.Module):
    def __init__(self, config=FLUX_DEV):
        super().__init__()
        c = self.config = config
        self.image_embedder = nn.Linear(c.patch**2 * c.channels, c.width)
        self.context_embedder = nn.Linear(c.context_dim, c.width)
        self.t_embedder = mmdit.Embedder(mmdit.FREQUENCIES, c.width)
        self.y_embedder = mmdit.Embedder(c.pooled_dim, c.width)
        if c.guided:
            self.g_embedder = mmdit.Embedder(mmdit.FREQUENCIES, c.width)
        self.joint_blocks = nn.ModuleList(DoubleBlock(c) for _ in range(c.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(c) for _ in range(c.single_blocks))
        self.final_layer = mmdit.FinalLayer(c)
        self.offload = None  # the device to which each block comes from the host's memory

    def forward(self, latents, timestep, context, pooled, guidance=None):
        """Velocity noise − data [B,C,h,w] at `latents` [B,C,h,w].

        timestep [B] in 0..1000 (1000·σ), context [B,L,context_dim], pooled [B,pooled_dim].
        guidance [B], about 1..10: for a guided model, and only for one. Raises ValueError.
        """
        # 1. inputs
        B, C, h, w = latents.shape
        if h % 2 or w % 2:
            raise ValueError(f"latents are {h}×{w}; both sides must be even")
        if (guidance is None) == self.config.guided:
            raise ValueError("a guided model, and no other, takes the strength of guidance")
        rows, columns = h // 2, w // 2
        tokens = latents.reshape(B, C, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        x = self.image_embedder(tokens.reshape(B, rows * columns, 4 * C))  # [B,N,D]
        # Both numbers are rounded to the type of the weights, as in the published code: in
        # bfloat16 a guidance of 3.5 is embedded as 3,504.
        cond = self.t_embedder(mmdit.sinusoids(timestep.to(x.dtype)).to(x.dtype))  # [B,D]
        if guidance is not None:
            strength = (1000 * guidance).to(x.dtype)
            cond = cond + self.g_embedder(mmdit.sinusoids(strength).to(x.dtype))
        cond = cond + self.y_embedder(pooled)
        context = self.context_embedder(context)  # [B,L,D]
        L = context.shape[1]
        rotation = rotation_of(self.config, rows, columns, L, x.device)
        # 2. blocks, whose weights may lie in the host's memory until they are needed
        for block in self.joint_blocks:
            with brought(self.offload, block):
                x, context = block(x, context, cond, rotation)
        x = torch.cat([context, x], dim=1)  # [B,S,D]
        for block in self.single_blocks:
            with brought(self.offload, block):
                x = block(x, cond, rotation)
        # 3. picture tokens to latents
        x = self.final_layer(x[:, L:], cond).view(B, rows, columns, C, 2, 2)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)  # from [B,C,rows,2,columns,2]

    def views(self):
        """Names of diffusers' FluxTransformer2DModel."""
        views = weights.named_views(self, layouts.MMDIT_FUSED)
        views = weights.renamed(views, (*layouts.MMDIT_NAMES, *NAMES))
        for name in ("norm_out.linear.weight", "norm_out.linear.bias"):
            (rows,) = views[name]
            shift, scale = rows.chunk(2)
            views[name] = [scale, shift]  # the order of diffusers
        return views

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None):
        """A diffusers folder or hub id (its `transformer/`). Raises UserError."""
        path = weights.find(source, "transformer")
        entries = weights.index(path)
        make = functools.partial(cls, read_config(path, len(entries)))
        return weights.build(make, cls.views, entries, path, device, dtype)

    def wait_in_host_memory(self, device):
        """Bring all but the blocks to a device; they come one by one when they are needed."""
        for name, part in self.named_children():
            if name not in ("joint_blocks", "single_blocks"):
                part.to(device)
        self.offload = device


NAMES = (  # (ours, theirs) of what layouts.MMDIT_NAMES does not know of, applied after it
    (r"^image_embedder\.", "x_embedder."),
    (r"^g_embedder\.mlp\.0\.", "time_text_embed.guidance_embedder.linear_1."),
    (r"^g_embedder\.mlp\.2\.", "time_text_embed.guidance_embedder.linear_2."),
    (r"^(single_blocks\.\d+)\.adaLN_modulation\.1\.", r"\1.norm.linear."),
    (r"^(single_blocks\.\d+)\.attn\.ln_([qk])\.", r"\1.attn.norm_\2."),
    (r"^single_blocks\.", "single_transformer_blocks."))
KEYS = {  # ours: the key of a config.json
    "double_blocks": "num_layers", "single_blocks": "num_single_layers",
    "heads": "num_attention_heads", "head_dim": "attention_head_dim",
    "context_dim": "joint_attention_dim", "pooled_dim": "pooled_projection_dim"}


def read_config(folder, tensors):
    """FluxConfig of a folder's config.json. tensors: how many its files hold. UserError."""
    file = folder / "config.json"
    raw = weights.read_config(file, tensors)
    try:
        fields = {ours: raw[theirs] for ours, theirs in KEYS.items()}
        axes = tuple(raw.get("axes_dims_rope", FLUX_DEV.axes))
        inputs = raw["in_channels"]
        if len(axes) != 3 or sum(axes) != fields["head_dim"] or any(n % 2 for n in axes):
            raise ValueError(f"axes_dims_rope {axes} do not divide a head among three axes")
        if inputs % 4 or raw.get("out_channels", inputs) != inputs or raw.get("patch_size", 1) != 1:
            raise ValueError("its inputs are not its outputs, so it fills or controls")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not a configuration of FLUX.1 ({error}); give "
                        f"black-forest-labs/FLUX.1-dev or a folder in its layout") from error
    guided = bool(raw.get("guidance_embeds", False))
    return FluxConfig(**fields, channels=inputs // 4, axes=axes, guided=guided)


# --------------------------------------------------------------------------------------------------
# Schedule


@dataclass(frozen=True)
class Schedule:  # names and defaults are those of diffusers' FlowMatchEulerDiscreteScheduler
    shift: float = 1.0  # of schnell; dev's depends on the size
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256  # tokens of a picture of 256 pixels
    max_image_seq_len: int = 4096  # and of 1024

    def sigmas(self, num_steps, tokens):
        """[T+1] float32, from 1 down to 0, for a picture of so many tokens.

        Larger pictures need more noise to lose their content: the logarithm of the shift grows
        linearly with the number of tokens.
        """
        shift = self.shift
        if self.use_dynamic_shifting:
            span = self.max_image_seq_len - self.base_image_seq_len
            slope = (self.max_shift - self.base_shift) / span
            shift = math.exp(self.base_shift + slope * (tokens - self.base_image_seq_len))
        return flow_grpo.shift_sigma(torch.linspace(1, 0, num_steps + 1), shift)


OTHER_SCHEDULES = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
                   "use_beta_sigmas", "use_flow_sigmas", "invert_sigmas", "stochastic_sampling")


def read_schedule(source):
    """The Schedule of a pipeline. Raises UserError for settings that FLUX.1 does not use."""
    file = weights.find_file(source, "scheduler/scheduler_config.json")
    raw = weights.read_config(file)
    odd = [name for name in OTHER_SCHEDULES if raw.get(name)]
    schedule = weights.fields_of(Schedule, raw)
    if raw.get("time_shift_type", "exponential") != "exponential":
        odd.append("time_shift_type")
    if schedule.max_image_seq_len <= schedule.base_image_seq_len:
        odd.append("max_image_seq_len")
    if odd:
        raise UserError(f"{file}: {', '.join(odd)} is not as FLUX.1 has it; give the scheduler/ "
                        f"of FLUX.1-dev or FLUX.1-schnell")
    return schedule


# --------------------------------------------------------------------------------------------------
# Texts


class FluxTextEncoders:
    """CLIP-L, of which only the end token is read, and T5, which is the context."""

    def __init__(self, clip_l, t5, tokenizers):
        self.clip_l = clip_l
        self.t5 = t5
        self.tokenizers = tokenizers

    @torch.no_grad()
    def encode(self, prompts):
        """list of B strings -> (context [B,L,4096], pooled [B,768]); warns of words it cuts."""
        device = self.t5.shared.weight.device
        # T5 reads more of a prompt than CLIP, so only what T5 cuts is lost.
        _, pooled = self.clip_l(self.tokenizers[0](prompts, warn=False).to(device))
        return self.t5(self.tokenizers[1](prompts).to(device)), pooled

    @classmethod
    def from_pretrained(cls, source, t5_tokens, device="cpu", dtype=None):
        """A diffusers folder or hub id: text_encoder{,_2}/ and tokenizer{,_2}/."""
        folders = [weights.find(source, name) for name in ("tokenizer", "tokenizer_2")]
        tokenizers = [clip.PromptTokenizer(folders[0]),
                      clip.PromptTokenizer(folders[1], max_length=t5_tokens)]
        clip_l = clip.TextTower.from_pretrained(source, device, dtype, "text_encoder", False)
        t5 = text_encoders.T5Encoder.from_pretrained(source, device, dtype, "text_encoder_2")
        tokenizers[0].fit(clip_l.config.vocab_size, clip_l.config.max_position_embeddings)
        tokenizers[1].fit(t5.config.vocab_size)
        return cls(clip_l, t5, tokenizers)


# --------------------------------------------------------------------------------------------------
# Pictures


@dataclass
class Flux:
    transformer: FluxTransformer
    vae: vae.VAE
    encoders: FluxTextEncoders  # or the PromptCache that pipeline.encode_and_free puts here
    schedule: Schedule
    device: str
    dtype: torch.dtype
    coming: tuple = ()  # text encoders that come to the device for a batch of prompts

    size = 1024

    @property
    def network(self):
        """What draws."""
        return self.transformer

    @property
    def steps(self):
        return 50 if self.transformer.config.guided else 4

    @property
    def guidance(self):
        return 3.5 if self.transformer.config.guided else None

    @torch.no_grad()
    def draw(self, cases, seeds, size=None, steps=None, guidance=None, noise=None, progress=iter):
        """Pictures [B,3,size,size] uint8, on the CPU, of the prompts of B cases.

        FLUX reads prompts alone: what it should know of V and A has to stand in them.
        noise [B,C,size/8,size/8]: in place of that of the seeds. progress: wraps the steps.
        """
        # 1. inputs
        size = size or self.size
        steps = steps or self.steps
        guidance = self.guidance if guidance is None else guidance
        c = self.transformer.config
        if guidance is not None and not c.guided:
            raise UserError("FLUX.1-schnell takes no guidance; leave --guidance out")
        if noise is None:
            side = size // self.vae.factor
            noise = normal(seeded(seeds), (c.channels, side, side))
        with brought(self.device, *self.coming):
            texts = self.encoders.encode([case.prompt for case in cases])
        context, pooled = (z.to(self.device, self.dtype) for z in texts)
        model = self.transformer
        if guidance is not None:
            strength = torch.full((len(cases),), float(guidance), device=self.device)
            model = functools.partial(model, guidance=strength)
        # 2. Euler steps
        x = noise.to(self.device).float()  # [B,C,h,w]
        sigmas = self.schedule.sigmas(steps, x[0, 0].numel() // c.patch**2)
        for i in progress(range(steps)):
            # guidance=1: one pass, without the unconditional half that other models need
            velocity = flow_grpo.guided_velocity(model, x, sigmas[i], context, pooled, guidance=1)
            x = x + (sigmas[i + 1] - sigmas[i]) * velocity
        # 3. pixels
        return self.vae.pictures(x)

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None, encoders="gpu", offload=False):
        """A diffusers folder or hub id of FLUX.1-dev or FLUX.1-schnell. Raises UserError.

        encoders: one of pipeline.ENCODERS; to let them leave, call pipeline.encode_and_free.
        offload: each block of the transformer, and text encoders that are on the GPU, wait in the
        host's memory and come when they are needed. `memory` says what each choice takes.
        """
        # 1. refuse other models and damaged files before gigabytes are read
        hub.fetch(files_of_flux(source))
        listed = read_json(weights.find_file(source, "model_index.json"))
        if listed.get("_class_name") != "FluxPipeline":
            raise UserError(f"{source}: its model_index.json is of {listed.get('_class_name')!r}, "
                            f"expected FluxPipeline; give FLUX.1-dev or FLUX.1-schnell")
        schedule = read_schedule(source)
        for component in ("text_encoder", "text_encoder_2", "vae"):
            weights.index(weights.find(source, component))
        folder = weights.find(source, "transformer")
        config = read_config(folder, len(weights.index(folder)))
        # 2. read them
        home = home_of_weights(device, offload, dtype)
        encoders_home = {"gpu": home, "cpu": ("cpu", dtype), "leave": (device, dtype)}[encoders]
        t5_tokens = 512 if config.guided else 256
        texts = FluxTextEncoders.from_pretrained(source, t5_tokens, *encoders_home)
        transformer = FluxTransformer.from_pretrained(source, *home)
        decoder = vae.VAE.from_pretrained(source, device, dtype)
        check_parts(config, texts, decoder.config, source)
        # 3. what waits in the host's memory
        if offload:
            transformer.wait_in_host_memory(device)
        coming = (texts.clip_l, texts.t5) if offload and encoders == "gpu" else ()
        dtype = transformer.image_embedder.weight.dtype
        return cls(transformer, decoder, texts, schedule, device, dtype, coming)


def check_parts(c, texts, vae_config, source):
    """UserError unless the parts of a pipeline, c a FluxConfig, give what the next ones take."""
    given = (texts.t5.config.d_model, texts.clip_l.config.hidden_size, vae_config.latent_channels)
    taken = (c.context_dim, c.pooled_dim, c.channels)
    if given != taken:
        raise UserError(f"{source}: the transformer takes texts of {taken[0]} and {taken[1]} "
                        f"numbers and latents of {taken[2]} channels, the other parts have "
                        f"{given[0]}, {given[1]} and {given[2]}; give parts of one checkpoint")


def files_of_flux(source):
    """What `Flux.from_pretrained` reads, for hub.fetch: not the single files beside it."""
    folders = ("scheduler", "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer",
               "tokenizer_2")
    return [(source, ["model_index.json", *(f"{folder}/*" for folder in folders)])]


def memory(config=FLUX_DEV, encoders="gpu", offload=False, dtype=torch.bfloat16):
    """GiB of weights at most: {"host", "encoding", "drawing"}, for `Flux.from_pretrained`.

    host: in the host's memory. encoding, drawing: on the GPU, while it encodes prompts and while
    it draws; activations come on top. A plan: the models are counted on the meta device.
    """
    with torch.device("meta"):
        transformer = FluxTransformer(config)
        decoder = vae.VAE(FLUX_VAE)
        clip_l = clip.TextTower(clip.CLIP_L_TEXT, project=False)
        t5 = text_encoders.T5Encoder(text_encoders.T5_XXL)
    count = weights.count_parameters
    blocks = [count(block) for block in (*transformer.joint_blocks, *transformer.single_blocks)]
    texts = count(clip_l) + count(t5)
    staying = count(decoder) + count(transformer) - sum(blocks)
    if offload:
        values = {"host": sum(blocks), "encoding": staying, "drawing": staying + max(blocks)}
    else:
        values = dict.fromkeys(("encoding", "drawing"), staying + sum(blocks)) | {"host": 0}
    if encoders == "cpu":
        values["host"] += texts * torch.float32.itemsize / dtype.itemsize  # see weights.build
    else:
        values["encoding"] += texts
    if encoders == "gpu":
        values["host" if offload else "drawing"] += texts
    return {name: value * dtype.itemsize / 2**30 for name, value in values.items()}

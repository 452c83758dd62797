"""Prompts to pictures: Stable Diffusion 3.5 put together from its parts, and the judge beside it.

    generator = load_generator(TINY)
    pixels = generator.draw(["a swan on the lake"], seeds=[0], size=128)  # [1,3,128,128] uint8

    prompts ──► text encoders ──► context, pooled ─┐
    seeds ────► noise ─────────────────────────────┴─► sampler, MMDiT ─► latents ─► VAE ─► pixels

`Generator.draw` is that line from left to right. `load_generator` reads a folder in the layout of
diffusers, or Stability's single file.

Shapes: B pictures of H × W pixels, h × w latents (an eighth of that each way) of C channels (16),
L text tokens of width D.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import feedback
import flow_grpo
import mmdit
import qwen_vl
from parts import lora, ops, text_encoders, vae, weights
from parts.cli import UserError
from parts.files import kind_of, read_json
from parts.judge_server import JudgeServer, is_address
from parts.reading import expected_va

TINY = Path(__file__).resolve().parent.parent / "tiny" / "weights"
PAPER = "stabilityai/stable-diffusion-3.5-medium"
# Answers in one generation of the judge: a token's step reads all of its weights, for however many
# answers, but more of these would need more memory than an update of the generator.
READ_AT_ONCE = 64
ENCODERS = ("gpu", "cpu", "leave")  # of --encoders, in drawing and training
ENCODERS_HELP = "where the text encoders live; leave: encode all prompts first, then free them"


@dataclass
class Generator:
    """The models that make a picture of a prompt."""
    mmdit: mmdit.MMDiT
    vae: vae.VAE
    encoders: text_encoders.TextEncoders
    shift: float  # of the noise schedule: above 1 more of the steps are spent at high noise
    name: str  # of the checkpoint, as `name_of` gives it
    # --offload: the device to which some models come for a batch, from the host's memory
    offload: str | None = None
    coming: tuple = ()

    @property
    def device(self):
        return self.mmdit.pos_embed.device

    @property
    def dtype(self):
        return self.mmdit.pos_embed.dtype

    @torch.no_grad()
    def draw(self, prompts, seeds, size, steps=25, guidance=4.5, noise=None, progress=iter):
        """Pictures [B,3,size,size] uint8, on the CPU, of B prompts.

        Picture i depends on its own prompt and seed only, but for the rounding of a batch.
        noise [B,C,size/8,size/8]: in place of that of the seeds.
        progress: wraps the sampler's steps, e.g. in tqdm.
        """
        if noise is None:
            noise = self.starting_noise(seeded(seeds), size)
        with brought(self.offload, *self.coming):
            context, pooled = self.encode_prompts(prompts, guidance)
            with ops.fast_linears(self.mmdit):  # all steps use the same weights: repacking pays
                latents = flow_grpo.sample_ode(
                    self.mmdit, noise.to(self.device), context, pooled, steps, guidance,
                    self.shift, progress)
            return self.decode(latents)

    @torch.no_grad()
    def encode_prompts(self, prompts, guidance):
        """(context [B,L,D], pooled [B,·]) of B prompts, on the MMDiT's device.

        Classifier-free guidance compares every prompt with the empty one: with guidance > 1 there
        are 2B rows, those of the empty prompt first, as `flow_grpo.guided_velocity` takes them.
        """
        # The unconditional rows come first, so that a chunk in two gives the two halves back.
        texts = [""] * len(prompts) + list(prompts) if guidance > 1 else list(prompts)
        unique = list(dict.fromkeys(texts))  # pictures of one prompt share its encoding
        context, pooled = self.encoders.encode(unique)
        rows = [unique.index(text) for text in texts]
        return context[rows].to(self.device, self.dtype), pooled[rows].to(self.device, self.dtype)

    def starting_noise(self, generators, size):
        """Standard normal noise [B,C,h,w], a picture of size × size from each random generator."""
        side = size // self.vae.factor
        return normal(generators, (self.mmdit.config.channels, side, side))

    def decode(self, latents):
        """Pictures [B,3,H,W] uint8, on the CPU, of scaled latents [B,C,h,w]."""
        return self.vae.pictures(latents)


@contextmanager
def brought(device, *modules):
    """Within it the weights of frozen modules lie on a device, afterwards where they were.

    Judge and generator may so take turns on a GPU that holds one of them. device None: all stay; a
    JudgeServer has no weights here.
    """
    ours = [module for module in modules if device and hasattr(module, "parameters")]
    tensors = [tensor for module in ours for tensor in (*module.parameters(), *module.buffers())]
    waiting = [tensor.data for tensor in tensors]
    try:
        for tensor, own in zip(tensors, waiting, strict=True):
            tensor.data = own.to(device)
        yield
    finally:  # nothing is copied back, because nothing has changed
        for tensor, own in zip(tensors, waiting, strict=True):
            tensor.data = own


PROMPTS_KEPT = 2048  # of a process, encoded; one of SD3.5 has 2.7 MB


class PromptCache:
    """Text encoders in the place of a Generator's, that encode each prompt once.

    The results are kept in host memory, those of the last `limit` prompts. Prompts are encoded one
    by one, because in a batch the rounding would depend on the others, and training on another
    number of processes, or going on after a stop, would not give the same bits.
    """

    def __init__(self, encoders, dtype, limit=PROMPTS_KEPT):
        self.encoders = encoders
        self.dtype = dtype
        self.limit = limit
        self.known = {}  # the least used first

    def encode(self, prompts):
        """(context [B,L,D], pooled [B,·]) of B prompts, on the CPU."""
        # A run of training asks for the same few thousand prompts again and again.
        for prompt in dict.fromkeys(prompts):
            if prompt in self.known:
                self.known[prompt] = self.known.pop(prompt)  # now it is the last one
            else:
                encoded = self.encoders.encode([prompt])
                self.known[prompt] = [z[0].to(self.dtype).cpu() for z in encoded]
        context, pooled = zip(*(self.known[prompt] for prompt in prompts))
        while len(self.known) > self.limit:
            del self.known[next(iter(self.known))]
        return torch.stack(context), torch.stack(pooled)

    def encode_and_free(self, prompts, progress):
        """Encode every prompt that will be needed; then free the memory of the encoders."""
        self.limit = len(prompts)
        for prompt in tqdm(prompts, "prompts", leave=False, disable=not progress):
            self.encode([prompt])
        self.encoders = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def encode_and_free(generator, prompts):
    """Encode all prompts that will be drawn, and free the memory of a generator's encoders."""
    generator.encoders = PromptCache(generator.encoders, generator.dtype)
    generator.encoders.encode_and_free(["", *prompts], progress=True)


def seeded(seeds):
    """A random generator for each seed: on the CPU, where a seed means the same on any machine."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(generators, shape):
    """Standard normal noise [B,*shape], a picture's from its own random generator, on the CPU."""
    return torch.cat([torch.randn((1, *shape), generator=own) for own in generators])


def to_images(pixels):
    """[B,3,H,W] uint8 -> list of B PIL images."""
    return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]  # [3,H,W] -> [H,W,3]


# --------------------------------------------------------------------------------------------------
# Loading


def load_generator(source, device="cpu", dtype=None, use_t5=True, encoders_from=None,
                   encoders="gpu", adapter=None, offload=False):
    """A Generator from a diffusers folder, a hub id or Stability's single file.

    dtype: of the weights (default: float32 on a CPU, bfloat16 elsewhere).
    use_t5: False leaves out T5, 4.8 of SD3.5-Medium's 7.9 billion parameters; zeros stand for it.
    encoders_from: folder or hub id of text encoders and scheduler; a single file has none.
    encoders: one of ENCODERS; "gpu" means `device`, and so does "leave", see `encode_and_free`.
    adapter: folder or hub id of a LoRA of the MMDiT, as train_gen.py, peft or diffusers writes it,
        diffusers' file, or folder of a run of train_gen.py; it is merged into the weights.
    offload: the models wait in the host's memory and come to `device` for each batch, but for text
        encoders that are on the CPU or will leave.
    Raises UserError.
    """
    rest = encoders_from or source
    if Path(rest).expanduser().is_file():
        if kind := kind_of(rest):
            raise UserError(f"{rest}: no generator; {kind}")
        raise UserError(f"{source}: a single file holds no text encoders; add --text-encoders with "
                        f"a folder or hub id that does, such as {PAPER}")

    # 1. check the headers of all files, so that a damaged one is refused before 17 GB are read
    scheduler = weights.read_config(weights.find_file(rest, "scheduler/scheduler_config.json"))
    for path in weight_paths(source, rest, use_t5):
        weights.index(path)
    name = name_of(source)
    if adapter is not None:
        adapter = weights.find(lora.adapter_in(adapter))
        lora.read_adapter(adapter)
        name += f" with {name_of(adapter)}"

    # 2. read them; the encoders first, because their tokenizers are checked only here
    home = home_of_weights(device, offload, dtype)
    encoders_home = {"gpu": home, "cpu": ("cpu", dtype), "leave": (device, dtype)}[encoders]
    towers = text_encoders.TextEncoders.from_pretrained(rest, *encoders_home, use_t5)
    model = mmdit.MMDiT.from_pretrained(source, *home)
    if adapter is not None:
        lora.load_lora(adapter, model, model.lora_targets(dual=True))
    decoder = vae.VAE.from_pretrained(source, *home)
    check_parts(model.config, towers, decoder.config, source)
    generator = Generator(model, decoder, towers, scheduler.get("shift", 3.0), name)
    if offload:
        generator.offload = device
        generator.coming = (model, decoder, *(towers.towers() if encoders == "gpu" else ()))
    return generator


def files_of_generator(source, use_t5=True, encoders_from=None, adapter=None):
    """What `load_generator` reads, for hub.fetch."""
    texts = ["text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*"]
    if use_t5:
        texts += ["text_encoder_3/*", "tokenizer_3/*"]
    head = ["model_index.json", "scheduler/*", "transformer/config.json"]
    return [(encoders_from or source, head + texts), (source, ["transformer/*", "vae/*"]),
            (adapter, ["*"])]


def check_parts(c, encoders, vae_config, source):
    """UserError unless the parts of a generator, c an MMDiTConfig, give what the next ones take."""
    towers = (encoders.clip_l.config, encoders.clip_g.config)
    pooled = sum(tower.projection_dim for tower in towers)
    given = (encoders.context_width, pooled, vae_config.latent_channels)
    taken = (c.context_dim, c.pooled_dim, c.channels)
    if given != taken or sum(tower.hidden_size for tower in towers) > encoders.context_width:
        raise UserError(f"{source}: the transformer takes texts of {taken[0]} and {taken[1]} "
                        f"numbers and latents of {taken[2]} channels, the other parts have "
                        f"{given[0]}, {given[1]} and {given[2]}; give parts of one checkpoint")


def weight_paths(source, rest, use_t5):
    """[local path of a component's weights] of a generator, whose text encoders are in `rest`;
    T5's only if the pipeline has it and use_t5 is true."""
    listed = read_json(weights.find_file(rest, "model_index.json"))
    components = {"transformer": source, "vae": source, "text_encoder": rest,
                  "text_encoder_2": rest}
    if use_t5 and text_encoders.has_t5(listed):
        components["text_encoder_3"] = rest
    return [weights.find(where, component) for component, where in components.items()]


def fingerprints(args):
    """{flag of train_gen.py: what tells the model that it names from others}."""
    paths = {"model": weight_paths(args.model, args.model, not args.no_t5)}
    if args.judge != "none" and not is_address(args.judge):
        paths["judge"] = lora.with_base(args.judge)
    if args.pickscore != "none":
        paths["pickscore"] = [weights.find(args.pickscore)]
    if args.init_adapter != "none":
        adapter = weights.find(lora.adapter_in(args.init_adapter))
        paths["init_adapter"] = [lora.read_adapter(adapter).file]
    return {flag: weights.fingerprint(found) for flag, found in paths.items()}


def described(generator):
    """In words: its name, number of parameters and type of weights."""
    millions = weights.count_parameters(generator.mmdit) / 1e6
    dtype = str(generator.dtype).removeprefix("torch.")
    return f"{generator.name}: {millions:,.1f} M parameter generator ({dtype})"


def home_of_weights(device, offload, dtype=None):
    """(device, dtype) that a model is loaded with; offloaded it has the GPU's type, bfloat16."""
    if offload and torch.device(device).type != "cpu":
        return "cpu", dtype or torch.bfloat16
    return device, dtype


def check_size(generator, size, source):
    """Raise UserError for pictures that are larger than a generator's table of positions."""
    config = generator.mmdit.config
    limit = config.positions * config.patch * generator.vae.factor
    if size > limit:
        raise UserError(f"--size {size}: {source} draws at most {limit} pixels")


def load_judge(source, device, size=None, offload=False):
    """The judge: a QwenVL, or a JudgeServer if `source` is an address. Raises UserError.

    size: pictures of more than size × size pixels are shrunk, if a QwenVL reads them, for those
    that are drawn need no more tokens than that. offload: as for `load_generator`.
    """
    if is_address(source):
        return JudgeServer(source)
    judge = qwen_vl.QwenVL.from_pretrained(source, *home_of_weights(device, offload))
    if size is None:
        return judge
    limits = judge.processor.image
    max_pixels = max(limits.min_pixels, min(limits.max_pixels, size**2))
    judge.processor.image = replace(limits, max_pixels=max_pixels)
    return judge


def judge_of(model, batch=READ_AT_ONCE, max_new_tokens=feedback.ANSWER_LIMIT, progress=True,
             offload=None):
    """A judge as feedback.py asks it: judge(conversations, attempt=0, n=1) -> n texts for each,
    and judge.expected_va(conversations, thoughts), see parts/reading.py.

    The first attempt is answered by the likeliest tokens, further ones at temperature 0.7, each
    from its own seed, the same for all conversations: what is said of a picture does not depend on
    the pictures beside it, and those of a group are compared by the same luck. batch: answers in
    one generation. offload: the device that the model comes to for each call, if it waits in the
    host's memory.
    """
    bar = partial(tqdm, leave=False, disable=not progress)

    def judge(conversations, attempt=0, n=1):
        texts = []
        share = max(1, batch // n)
        starts = range(0, len(conversations), share)
        with brought(offload, model):
            for start in bar(starts, desc="asking the judge"):
                asked = conversations[start:start + share]
                answers = model.generate(
                    asked, n, max_new_tokens, temperature=0.7 if attempt else 0.0,
                    generator=seeded([attempt] * len(asked)),
                    progress=partial(bar, desc="tokens"))
                texts += [completion.text for each in answers for completion in each]
        return texts

    def expected(*asked):
        with brought(offload, model):
            return expected_va(model, *asked)

    judge.expected_va = expected
    return judge


def name_of(source):
    """What a checkpoint is called in files and on the screen.

    The miniature is "tiny/weights", wherever this folder lies: files should not tell its path.
    """
    # A hub id is no path below the miniature's weights and is returned as it is.
    path = Path(source)
    if path.is_relative_to(TINY):
        return f"tiny/weights/{path.relative_to(TINY)}".removesuffix("/.")
    return str(source)

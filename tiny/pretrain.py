"""Train the miniature from nothing, one command per stage, in this order:

    python -m tiny.pretrain data        # draw 20,000 scenes into tiny/cache (about 1 GB)
    python -m tiny.pretrain vae         # the autoencoder
    python -m tiny.pretrain clip        # a small BPE, an image tower and two text towers
    python -m tiny.pretrain other_clip  # another CLIP, which only examines
    python -m tiny.pretrain mmdit       # the MMDiT by rectified flow, on latents of the scenes
    python -m tiny.pretrain decoder     # the decoder again, alone: sharper pictures
    python -m tiny.pretrain aesthetic   # a linear head on the image tower
    python -m tiny.pretrain judge       # a small Qwen2.5-VL by supervised answers, before GRPO
    python -m tiny.pretrain all

The result lies in tiny/weights in the diffusers layout: the miniature is just another checkpoint.
Every stage takes --seed, --samples and --minutes, writes its state every minute and goes on from it
when started again. Captions are mostly words; some carry V and A as numbers. The text towers, like
those of SD3.5, know what a number says. The MMDiT sees numbers in few of its captions, and they are
those of the paper's data: drawn from the Gaussians of the picture's class. So it follows emotion
words well, and a number hardly better than its class. That is what reward feedback is to correct.
Some pairs of subject and place are in no stage (`tiny.scenes.RESERVED`).
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import hashlib
import json
import math
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm

import data
import feedback
import mmdit
import qwen_vl
from parts import chat, cli, clip, text_encoders, weights
from parts import vae as vae_model
from parts.cli import UserError
from parts.files import append_rows, read_json, whole_records, write_json, write_whole
from tiny import lessons, publish, scenes
from tiny.initialise import initialise
from tiny.pool import on_all_cores

HERE = Path(__file__).resolve().parent
CACHE = HERE / "cache"
WEIGHTS = HERE / "weights"
SIZE = 128  # side of the pictures in pixels
TEXT_LENGTH = 48  # tokens of a prompt
# The text towers learn to read numbers, from exact ones in this share of their captions.
CLIP_NUMBERS = 0.3
BOTH = 0.2  # share of the captions with numbers that have words, too
VAE_CONFIG = vae_model.VAEConfig(
    channels=(16, 32, 64, 64), blocks=1, groups=4, scale=1.0, shift=0.0)
MMDIT_CONFIG = mmdit.MMDiTConfig(
    depth=6, heads=5, head_dim=32, dual_blocks=(0, 1, 2), context_dim=160, pooled_dim=192,
    positions=16, sample_size=SIZE // 8)
JUDGE_CONFIG = qwen_vl.QwenVLConfig(
    width=160, layers=4, heads=5, kv_heads=1, mlp=448, tied=True, theta=1e4, sections=(4, 6, 6),
    vision_width=96, vision_layers=4, vision_heads=3, vision_mlp=288, patch=16, window=64,
    full_blocks=(1, 3))


# --------------------------------------------------------------------------------------------------
# Data


def draw_row(seed):
    """Scene, V, A and picture [128,128,3] uint8 of one training row; V and A uniform on 1..9."""
    rng = np.random.default_rng([seed, 20])
    scene = scenes.random_scene(rng)
    v, a = rng.uniform(1, 9, 2)
    return scene, float(v), float(a), np.asarray(scenes.render(scene, v, a, SIZE))


def draw_rows(first, count):
    """The rows of `count` seeds, drawn by all cores."""
    return on_all_cores(draw_row, range(first, first + count), "scenes")


def make_data(args):
    """Write rows.json and pictures.npy, whose name says that both are complete."""
    rows = []

    def pictures():
        for scene, v, a, picture in draw_rows(args.seed * 10_000_000, args.rows):
            rows.append({"scene": asdict(scene), "v": v, "a": a})
            yield picture

    def draw(temporary):
        write_array(temporary, np.uint8, (args.rows, SIZE, SIZE, 3), pictures())
        write_whole(CACHE / "rows.json", json.dumps(rows))

    write_whole(CACHE / "pictures.npy", draw)


def write_array(path, dtype, shape, parts):
    """Write an array as a .npy file, from its parts along the first dimension, one by one.

    Through a memory map a full disk would end the process without a word.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
              "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.asarray(part, dtype).tobytes())


def load_data():
    """(rows [(Scene, v, a)], pictures uint8 [N,128,128,3] as a memory map)."""
    path = CACHE / "pictures.npy"
    if not path.exists():
        raise UserError(f"{path}: missing; run `python -m tiny.pretrain data` first")
    rows = []
    for row in json.loads((CACHE / "rows.json").read_text(encoding="utf-8")):
        rows.append((scenes.Scene(**row["scene"]), row["v"], row["a"]))
    return rows, np.load(path, mmap_mode="r")


def training_rows(count):
    """How many of the rows are trained on; the last ones are held out."""
    return count - min(512, count // 8)


def split(pictures):
    """(pictures to train on, held-out ones)."""
    seen = training_rows(len(pictures))
    return pictures[:seen], pictures[seen:]


def to_tensor(pictures):
    """uint8 [B,H,W,3] -> float [B,3,H,W] in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def rows_alike(rows, key):
    """{key(scene): indices of the rows that have it}."""
    alike = {}
    for i, (scene, _, _) in enumerate(rows):
        alike.setdefault(key(scene), []).append(i)
    return alike


def caption(row, rng, empty=0.1, numbers=0.15, exact=False):
    """A training caption: nothing (for guidance), neutral (10 %), with numbers, else with words.

    The numbers are the scene's own V and A if exact; else they are drawn from the Gaussians of its
    class, as the paper labels its pictures (§4.1).
    """
    scene, v, a = row
    u = rng.random()
    if u < empty:
        return ""
    if u < empty + 0.10:
        return scenes.neutral_caption(scene)
    if u < empty + 0.10 + numbers:
        said = (v, a) if exact else data.draw_va(data.nearest_emotion(v, a), rng)
        begin = scenes.neutral_caption(scene)
        if rng.random() < BOTH:
            begin = scenes.emotional_caption(scene, v, a, rng)
        return data.with_numbers(begin, *said)
    return scenes.emotional_caption(scene, v, a, rng)


# --------------------------------------------------------------------------------------------------
# The training loop that the stages share


@dataclass(frozen=True)
class Schedule:
    samples: int  # unless --samples says otherwise
    batch: int
    lr: float  # the highest learning rate
    weight_decay: float
    ema: float  # decay of the running average of the weights


SCHEDULES = {
    "vae": Schedule(samples=96_000, batch=16, lr=2e-3, weight_decay=0.0, ema=0.998),
    "decoder": Schedule(samples=64_000, batch=16, lr=1.5e-3, weight_decay=0.0, ema=0.998),
    "clip": Schedule(samples=200_000, batch=128, lr=1.5e-3, weight_decay=0.02, ema=0.99),
    "mmdit": Schedule(samples=200_000, batch=32, lr=1.5e-3, weight_decay=0.01, ema=0.999),
    "judge": Schedule(samples=200_000, batch=32, lr=3e-3, weight_decay=0.01, ema=0.99),
}


def train(name, modules, loss_of, args, schedule=None, inputs=""):
    """AdamW with warm-up and cosine decay; in the end the modules hold the EMA of their weights.

    loss_of(step, generator, rng, batch) -> (loss, {metric: number}). It ends when the samples are
    seen or --minutes are over: the decay follows whichever is nearer. The state is written to
    tiny/cache every minute. A killed stage goes on from there, and so does a finished one that is
    given more samples; delete the state to start over. UserError for one that began with another
    seed or other `inputs`, a digest of what the stage begins with.
    """
    schedule = schedule or SCHEDULES[name]
    # 1. begin, or go on from the state on disk
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, betas=(0.9, 0.99),
                                  weight_decay=schedule.weight_decay, fused=True)
    averages = [p.detach().clone() for p in parameters]
    began = [args.seed, inputs]
    path = CACHE / f"{name}.pt"
    whole_records(CACHE / f"{name}.log")  # cuts off a line that a killed stage left half-written
    step = 0
    spent = 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state.get("began", began) != began:
            raise UserError(f"{path}: began with another --seed or other inputs; delete it to "
                            f"start over")
        step = state["step"]
        spent = state["spent"]
        saved = state["parameters"] + state["ema"]
        for values, own in zip(saved, parameters + averages, strict=True):
            own.data.copy_(values)
        optimizer.load_state_dict(state["optimizer"])
    steps = (args.samples or schedule.samples) // schedule.batch
    started = time.time() - spent
    last_save = time.time()
    shown = {}  # running means of the metrics
    bar = tqdm(total=steps, initial=step, desc=name, mininterval=5, dynamic_ncols=True)
    while True:
        # 2. the learning rate of this step
        share = step / steps
        if args.minutes:
            share = max(share, (time.time() - started) / (60 * args.minutes))
        if share >= 1:
            break
        warm_up = min(1.0, (step + 1) / 100)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * warm_up * decay

        # 3. one step; its seeds follow from its number, so that a stage can go on anywhere
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rng = np.random.default_rng([args.seed, step])
        loss, metrics = loss_of(step, generator, rng, schedule.batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(schedule.ema, step / (step + 10)))
        for key, value in {**metrics, "norm": float(norm)}.items():
            shown[key] = 0.98 * shown.get(key, value) + 0.02 * value
        bar.update()
        bar.set_postfix({key: f"{value:.4f}" for key, value in shown.items()}, refresh=False)

        # 4. keep the state
        if time.time() - last_save >= args.save_every or step == steps:
            last_save = time.time()
            spent = last_save - started
            state = {"step": step, "spent": spent, "parameters": [p.data for p in parameters],
                     "ema": averages, "optimizer": optimizer.state_dict(), "began": began}
            save_state(path, state)
            record = {"step": step, "samples": step * schedule.batch, "seconds": spent, **shown}
            append_rows(CACHE / f"{name}.log", [record])
    bar.close()
    for p, average in zip(parameters, averages, strict=True):
        p.data.copy_(average)


def save_state(path, state):
    def save(temporary):
        # through a file of Python's, which knows why a disk refuses; torch's own does not
        with open(temporary, "wb") as file:
            torch.save(state, file)

    write_whole(path, save)


# --------------------------------------------------------------------------------------------------
# Stages: VAE, and its decoder alone


def reconstruction_loss(model, pictures, generator, rng, batch):
    """Loss and metrics of `batch` random 64 px crops: the network is convolutional, and a crop
    costs a quarter."""
    picks = rng.integers(len(pictures), size=batch)
    tops = rng.integers(SIZE - 63, size=batch)
    lefts = rng.integers(SIZE - 63, size=batch)
    crops = [pictures[i, y:y + 64, x:x + 64] for i, y, x in zip(picks, tops, lefts, strict=True)]
    target = to_tensor(np.stack(crops))
    mean, logvar = model.moments(target)
    noise = torch.randn(mean.shape, generator=generator)
    prediction = model.decoder(mean + torch.exp(0.5 * logvar) * noise)
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    # colours at every scale, and edges, which an average of pixels blurs
    colours = 0
    for k in (1, 2, 4, 8):
        difference = F.avg_pool2d(prediction, k) - F.avg_pool2d(target, k)
        colours = colours + difference.abs().mean()
    across = (prediction.diff(dim=-1) - target.diff(dim=-1)).abs().mean()
    down = (prediction.diff(dim=-2) - target.diff(dim=-2)).abs().mean()
    l1 = float((prediction - target).detach().abs().mean())
    return colours + (across + down) + 2e-3 * kl, {"l1": l1, "kl": float(kl.detach())}


@torch.no_grad()
def reconstruct(model, pictures):
    """(mean PSNR in dB, scaled latents) of whole pictures."""
    latents = []
    errors = []
    for start in tqdm(range(0, len(pictures), 32), desc="held-out pictures"):
        x = to_tensor(pictures[start:start + 32])
        latents.append(model.encode(x))
        errors.append((model.decode(latents[-1]).clamp(-1, 1) - x).pow(2).mean((1, 2, 3)))
    psnr = 10 * torch.log10(4 / torch.cat(errors)).mean()  # the range -1..1 has the square 4
    return float(psnr), torch.cat(latents)


def train_vae(args):
    seen, held_out = split(load_data()[1])
    torch.manual_seed(args.seed)
    model = vae_model.VAE(VAE_CONFIG).to(memory_format=torch.channels_last)

    def loss_of(step, generator, rng, batch):
        return reconstruction_loss(model, seen, generator, rng, batch)

    train("vae", [model], loss_of, args)
    psnr, z = reconstruct(model, held_out)
    # diffusion wants latents of about unit variance, so the configuration scales them
    scale = round(1 / float(z.std()), 4)
    model.config = replace(VAE_CONFIG, scale=scale, shift=round(float(z.mean()), 4))
    publish.save_vae(WEIGHTS / "vae", model, torch.bfloat16)
    print(f"vae: held-out PSNR {psnr:.2f} dB, latents mean {z.mean():.3f} sd {z.std():.3f}")


def train_decoder(args):
    """The decoder alone: what an MMDiT was trained on stays as it is, and pictures get sharper."""
    seen, held_out = split(load_data()[1])
    model = vae_model.VAE.from_pretrained(WEIGHTS).to(memory_format=torch.channels_last)
    before, _ = reconstruct(model, held_out)
    model.decoder.requires_grad_(True)

    def loss_of(step, generator, rng, batch):
        return reconstruction_loss(model, seen, generator, rng, batch)

    train("decoder", [model.decoder], loss_of, args)
    after, _ = reconstruct(model, held_out)
    publish.save_vae(WEIGHTS / "vae", model, torch.bfloat16)
    print(f"decoder: held-out PSNR {before:.2f} -> {after:.2f} dB")


# --------------------------------------------------------------------------------------------------
# Stage: CLIP


def learn_bpe(texts, size):
    """(vocab {token: id}, merges [(left, right)]) of a byte-level BPE of at most about `size`.

    Laid out as CLIP's: 256 bytes, 256 bytes that close a word, the merges, start and end. So no
    text is unknown to it.
    """
    tokenizer = clip.clip_tokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = byte_alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def byte_alphabet():
    """The 256 characters that stand for bytes in a byte-level BPE, in CLIP's order."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    printable = sorted(c for c in alphabet if ord(c) < 256)  # these stand for themselves
    return printable + sorted(alphabet - set(printable))


def clip_model(width, layers, vocab, tokenizer):
    """An untrained CLIP of a width; heads have 32 channels."""
    text = clip.TextConfig(
        width, layers, width // 32, 4 * width, "gelu", projection_dim=96, vocab_size=vocab,
        max_position_embeddings=TEXT_LENGTH, eos_token_id=vocab - 1)
    vision = clip.VisionConfig(width, layers, width // 32, 4 * width, "gelu", 96, 64, 8)
    half = (0.5, 0.5, 0.5)
    processor = clip.Processor(tokenizer, clip.ImageConfig(64, half, half))
    return begin(clip.CLIP(text, vision, processor))


def begin(model):
    """The model with random weights."""
    for p in model.parameters():
        if p.dim() > 1:
            # embeddings are small, layers keep the variance of their input
            torch.nn.init.normal_(p, std=0.02 if p.shape[0] > 512 else p[0].numel() ** -0.5)
    return model


def contrast(name, model, small, tokenizers, args):
    """Train a CLIP and, if there is one, a second text tower against its image tower.

    tokenizers: of the CLIP and of the second tower. Returns [share of held-out pictures that find
    their own caption among all, by the CLIP's text tower and by the second].
    """
    # 1. a batch; every second one is of one subject in one place, whose captions only the mood and
    #    the time of day tell apart
    rows, pictures = load_data()
    held_out = training_rows(len(pictures))
    alike = list(rows_alike(rows[:held_out], lambda scene: (scene.subject, scene.place)).values())

    def embed(picks, rng):
        """Embeddings [B,96] of pictures, and of their captions by each text tower."""
        picks = np.sort(picks)
        captions = [caption(rows[i], rng, 0, CLIP_NUMBERS, exact=True) for i in picks]
        # 64 px in -1..1, nearly as the processor makes them
        images = model.embed_images(F.avg_pool2d(to_tensor(pictures[picks]), 2))
        texts = [model.embed_text(tokenizers[0](captions))]
        if small is not None:
            _, pooled = small(tokenizers[1](captions))
            texts.append(F.normalize(pooled, dim=-1))
        return images, texts

    def loss_of(step, generator, rng, batch):
        among = alike[rng.integers(len(alike))] if step % 2 else held_out
        images, texts = embed(rng.permutation(among)[:batch], rng)
        target = torch.arange(len(images))
        loss = 0.0
        for text in texts:
            logits = model.logit_scale.exp().clamp(max=100) * images @ text.T  # [B,B]
            both = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
            loss = loss + both / (2 * len(texts))
        top1 = (logits.argmax(1) == target).float().mean()
        return loss, {"loss": float(loss.detach()), "top1": float(top1)}

    # 2. train and measure
    train(name, [model] if small is None else [small, model], loss_of, args, SCHEDULES["clip"])
    with torch.no_grad():
        images, texts = embed(np.arange(held_out, len(pictures)), np.random.default_rng(0))
        target = torch.arange(len(images))
        return [float(((images @ text.T).argmax(1) == target).float().mean()) for text in texts]


def train_clip(args):
    """The two text towers against one image tower, contrastively."""
    rng = np.random.default_rng(args.seed)
    vocab, merges = learn_bpe([caption(row, rng, empty=0) for row in load_data()[0]], 1500)
    publish.save_tokenizers(WEIGHTS, vocab, merges, TEXT_LENGTH)
    large = clip.PromptTokenizer(WEIGHTS / "tokenizer_2")
    torch.manual_seed(args.seed)
    small = begin(clip.TextTower(clip.TextConfig(
        64, 3, 2, 256, "quick_gelu", projection_dim=96, vocab_size=len(vocab),
        max_position_embeddings=TEXT_LENGTH, eos_token_id=len(vocab) - 1)))
    model = clip_model(96, 4, len(vocab), large)
    tokenizers = (large, clip.PromptTokenizer(WEIGHTS / "tokenizer"))
    own, by_small = contrast("clip", model, small, tokenizers, args)
    publish.save_text_tower(WEIGHTS / "text_encoder", small, torch.bfloat16)
    publish.save_text_tower(WEIGHTS / "text_encoder_2", model.text, torch.bfloat16)
    publish.save_clip(WEIGHTS / "clip", model, torch.bfloat16)
    print(f"clip: a picture finds its own among the held-out captions: {own:.1%} (tower in "
          f"CLIP-L's place: {by_small:.1%})")


def train_other_clip(args):
    """A smaller CLIP of another seed, which nothing is ever rewarded by: an examiner."""
    tokenizer = clip.PromptTokenizer(WEIGHTS / "tokenizer_2")
    args = Namespace(**vars(args) | {"seed": args.seed + 1})
    torch.manual_seed(args.seed)
    model = clip_model(64, 4, tokenizer.tokenizer.get_vocab_size(), tokenizer)
    (own,) = contrast("other_clip", model, None, (tokenizer,), args)
    publish.save_clip(WEIGHTS / "other_clip", model, torch.bfloat16)
    print(f"other_clip: a picture finds its own among the held-out captions: {own:.1%}")


# --------------------------------------------------------------------------------------------------
# Stage: MMDiT


def encode_latents(pictures):
    """Scaled latents of all pictures as a float16 memory map [N,16,16,16] beside them."""
    @torch.no_grad()
    def latents():
        autoencoder = vae_model.VAE.from_pretrained(WEIGHTS)
        for start in tqdm(range(0, len(pictures), 32), desc="latents"):
            yield autoencoder.encode(to_tensor(pictures[start:start + 32])).numpy()

    def encode(temporary):
        write_array(temporary, np.float16, (len(pictures), 16, SIZE // 8, SIZE // 8), latents())

    # of these pictures, by this encoder: others are encoded anew
    file = WEIGHTS / "vae" / "diffusion_pytorch_model.safetensors"
    some = pictures[::max(1, len(pictures) // 100)].tobytes()
    inputs = hashlib.sha256(file.read_bytes() + some).hexdigest()[:16]
    path = CACHE / "latents.npy"
    kept = CACHE / "latents.json"
    if not path.exists() or not kept.exists() or read_json(kept) != {"inputs": inputs}:
        write_whole(path, encode)
        write_json(kept, {"inputs": inputs})
    return np.load(path, mmap_mode="r")


def train_mmdit(args):
    """Rectified flow: the velocity from a latent to noise, at every noise level."""
    rows, pictures = load_data()
    latents = encode_latents(pictures)
    torch.manual_seed(args.seed)
    model = initialise(mmdit.MMDiT(MMDIT_CONFIG))
    # the text encoders are read from a whole folder
    if not (WEIGHTS / "transformer" / "config.json").exists():
        model.save_pretrained(WEIGHTS / "transformer", torch.bfloat16)
    publish.save_pipeline(WEIGHTS)
    encoders = text_encoders.TextEncoders.from_pretrained(WEIGHTS)
    forward = torch.compile(model) if args.compile else model
    held_out = training_rows(len(rows))

    def loss_of(step, generator, rng, batch):
        picks = np.sort(rng.integers(held_out, size=batch))
        x = torch.from_numpy(latents[picks].astype(np.float32))
        captions = [caption(rows[i], rng, numbers=args.numbers) for i in picks]
        context, pooled = encoders.encode(captions)
        # logit-normal noise levels (Esser et al. 2024), their middle moved up: the composition of a
        # picture is settled while it is mostly noise
        sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(batch, generator=generator))
        noise = torch.randn(x.shape, generator=generator)
        level = sigma[:, None, None, None]  # [B,1,1,1]
        velocity = forward((1 - level) * x + level * noise, sigma * 1000, context, pooled)
        loss = (velocity - (noise - x)).pow(2).mean()
        return loss, {"loss": float(loss.detach())}

    train("mmdit", [model], loss_of, args)
    model.save_pretrained(WEIGHTS / "transformer", torch.bfloat16)


# --------------------------------------------------------------------------------------------------
# Stage: judge

# The lessons of 12 steps. Most pictures are only described: these sequences are short, and from
# them the vision tower learns most.
TASKS = ("describe", "regression", "brief", "compare", "describe", "brief",
         "compare", "class", "brief", "compare", "describe", "rewrite")
SMALLER = {"regression": 2, "class": 2, "compare": 4, "rewrite": 4}  # divides the batch: memory


@dataclass
class Material:
    """What the judge's lessons are made of."""
    rows: list  # [(Scene, v, a)]
    pictures: np.ndarray
    processor: chat.Processor
    questions: dict  # {task: Prompt about a blank picture}
    alike: dict  # {(subject, place, time): indices of rows}


def judge_processor(rows, rng):
    """Qwen's tokenizer with a small vocabulary, learned on prompts, answers and captions."""
    texts = [*feedback.PROMPTS.values()] * 20 + [lessons.DESCRIBE]
    for scene, v, a in rows:
        texts += [lessons.answer(task, scene, v, a, rng) for task in feedback.TASKS]
        texts += [scenes.emotional_caption(scene, v, a, rng), lessons.rewrite(scene, (v, a)),
                  lessons.description(scene, v, a)]
    learner = chat.byte_bpe({}, [], special=())
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1200, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = chat.byte_bpe(learned["vocab"], merges)
    # pictures of 128 px are read as they are
    image = chat.ImageConfig(JUDGE_CONFIG.patch, min_pixels=64 * 64, max_pixels=SIZE * SIZE)
    return chat.Processor(tokenizer, image, tokenizer.token_to_id("<|image_pad|>"))


def judge_material(processor, rows, pictures):
    """The Material of all rows, whose last ones are in no lesson."""
    blank = Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8))
    questions = {task: processor(feedback.ask(task, blank)) for task in feedback.TASKS}
    questions["describe"] = processor([{"role": "user", "content": [
        {"type": "image", "image": blank}, {"type": "text", "text": lessons.DESCRIBE}]}])
    alike = rows_alike(rows[:training_rows(len(rows))],
                       lambda scene: (scene.subject, scene.place, scene.time))
    return Material(rows, pictures, processor, questions, alike)


def judging(material, task, i, rng):
    """(Prompt, answers) about row i; an answer's figures are drawn anew each time."""
    row = material.rows[i]
    picture = Image.fromarray(material.pictures[i])
    pixels, _ = chat.image_patches(picture, material.processor.image)
    prompt = replace(material.questions[task], pixels=pixels)  # all pictures have the same size
    if task == "describe":
        return prompt, [lessons.description(*row)]
    return prompt, [lessons.answer(task, *row, rng) for _ in range(3)]


def advising(material, task, i, rng):
    """(Prompt, answers) of a comparison of row i with one alike, or of a rewrite for it.

    The task "brief" asks one of the two without pictures, by the last lines of the question: from
    such short sequences the judge learns to read and to copy.
    """
    why = "it has no JSON object" if rng.random() < 0.1 else None
    scene, *wish = material.rows[i]
    if task == "rewrite" or (task == "brief" and rng.random() < 0.3):
        question = feedback.ask_rewrite(scenes.neutral_caption(scene), *wish, why)
        said = lessons.rewrite(scene, wish)
    else:
        # a held-out row may have none that is alike
        key = (scene.subject, scene.place, scene.time)
        j = int(rng.choice(material.alike.get(key, [i])))
        both = lessons.comparison(material.rows[i], material.rows[j], rng)
        best, worst = (Image.fromarray(material.pictures[k]) for k in (i, j)[::both.order])
        question = feedback.ask_compare(both.request, both.prompt, *both.wish, (best, *both.best),
                                        (worst, *both.worst), why)
        said = both.brief if task == "brief" else both.answer
    if task == "brief":
        text = question[1]["content"][-1]["text"].split("\n", 1)[1]
        question = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    return material.processor(question), [said]


def lesson(material, task, batch, rng):
    """(Prompts, ids [P,G,C] of their answers, padded by -1) of a step of one of TASKS."""
    picks = np.sort(rng.integers(training_rows(len(material.rows)),
                                 size=batch // SMALLER.get(task, 1)))
    ask = judging if task in material.questions else advising
    prompts, texts = zip(*(ask(material, task, i, rng) for i in picks))
    processor = material.processor
    encodings = processor.tokenizer.encode_batch([text for each in texts for text in each])
    ids = [torch.tensor([*encoding.ids, processor.stop[0]]) for encoding in encodings]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)  # [P·G,C]
    return prompts, ids.view(len(picks), len(texts[0]), -1)


def answer_logits(model, prompts, ids):
    """Logits [P·G·C,V] from which a judge says the tokens `ids` [P,G,C]."""
    hidden = model.completion_hidden(prompts, ids.clamp(min=0))  # [P,G,C,D]
    return F.linear(hidden, model.head_weight).flatten(0, 2)


def answer_loss(model, prompts, ids):
    """Cross-entropy of the answers' tokens, as GRPO will see them."""
    return F.cross_entropy(answer_logits(model, prompts, ids), ids.flatten(), ignore_index=-1)


def train_judge(args):
    """Supervised answers to every question that the judge will be asked."""
    # 1. the model
    rows, pictures = load_data()
    seen = training_rows(len(rows))
    processor = judge_processor(rows[:seen:4], np.random.default_rng(args.seed))
    vocab = processor.tokenizer.get_vocab_size()
    torch.manual_seed(args.seed)
    config = replace(JUDGE_CONFIG, vocab=vocab, image_token=processor.image_token)
    model = qwen_vl.QwenVL(config, processor)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02 if p.shape[0] == vocab else p.shape[1] ** -0.5)

    # 2. its lessons
    material = judge_material(processor, rows, pictures)

    def loss_of(step, generator, rng, batch):
        task = TASKS[step % len(TASKS)]
        loss = answer_loss(model, *lesson(material, task, batch, rng))
        return loss, {task: float(loss.detach())}

    train("judge", [model], loss_of, args)
    model.requires_grad_(False)
    model.save_pretrained(CACHE / "judge")  # before GRPO; weights/judge is the one after it


# --------------------------------------------------------------------------------------------------
# Stage: aesthetic head


def spoil(picture, strength, rng):
    """A picture [H,W,3] uint8, blurred, noisy, pale or coarse; strength 0 (as it is) to 1."""
    image = Image.fromarray(picture)
    kind = rng.integers(4)
    if kind == 0:
        return image.filter(ImageFilter.GaussianBlur(6 * strength))
    if kind == 1:
        noisy = np.asarray(image, float) + 70 * strength * rng.standard_normal(picture.shape)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    if kind == 2:
        return Image.blend(image, Image.new("RGB", image.size, "grey"), 0.85 * strength)
    side = round(image.width / (1 + 11 * strength))
    coarse = image.resize((side, side), Image.Resampling.BOX)
    return coarse.resize(image.size, Image.Resampling.NEAREST)


def fit_aesthetic(args):
    """A linear head on CLIP's image embedding in LAION's layout: 10 for a clean picture, 1 for a
    spoilt one."""
    # 1. pictures, a tenth of them clean
    count = args.samples or 6000
    rng = np.random.default_rng([args.seed, 40])
    strengths = rng.uniform(0, 1, count) * (rng.uniform(size=count) > 0.1)
    images = []
    rows = draw_rows(args.seed * 10_000_000 + 5_000_000, count)
    for (*_, picture), strength in zip(rows, strengths.tolist(), strict=True):
        images.append(spoil(picture, strength, rng))

    # 2. ridge regression on four fifths of them
    model = clip.CLIP.from_pretrained(WEIGHTS / "clip")
    starts = tqdm(range(0, count, 100), "embedding")
    embedded = [clip.embed_pictures(model, images[start:start + 100]) for start in starts]
    x = torch.cat([torch.cat(embedded).double(), torch.ones(count, 1)], 1)  # [N,96+1]
    y = torch.from_numpy(10 - 9 * strengths)  # [N]
    fit = count * 4 // 5
    gram = x[:fit].T @ x[:fit] + 1e-3 * torch.eye(x.shape[1])
    solution = torch.linalg.solve(gram, x[:fit].T @ y[:fit])

    # 3. the error on the rest, beside that of the mean as a guess
    error = (x[fit:] @ solution - y[fit:]).abs().mean()
    blind = (y[:fit].mean() - y[fit:]).abs().mean()
    print(f"aesthetic: error {error:.2f} on 1..10, {count - fit} held-out pictures (their mean as "
          f"a guess: {blind:.2f})")
    weight, bias = solution.float()[None].split([x.shape[1] - 1, 1], dim=1)
    weights.save(WEIGHTS / "aesthetic.safetensors", {"weight": [weight], "bias": [bias[0]]})


# --------------------------------------------------------------------------------------------------
# The program

STAGES = {"data": make_data, "vae": train_vae, "clip": train_clip, "other_clip": train_other_clip,
          "mmdit": train_mmdit, "decoder": train_decoder, "aesthetic": fit_aesthetic,
          "judge": train_judge}


def add_training_flags(parser):
    """Add the flags that `train` reads."""
    add = parser.add_argument
    add("--seed", type=cli.integer(0, 2**31), default=0)
    add("--samples", type=cli.integer(1, 10**9),
        help="training samples; each stage has its own default")
    add("--minutes", type=cli.number(0, 10**6),
        help="also stop after this time, the learning rate decayed to it")
    add("--save-every", type=cli.number(0, 10**6), default=60,
        help="seconds between states on disk (default: %(default)s)")


def main(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("stage", choices=[*STAGES, "all"])
    add_training_flags(parser)
    add("--rows", type=cli.integer(8, 10**6), default=20_000,
        help="pictures to draw in the data stage (default: %(default)s)")
    add("--numbers", type=cli.number(0, 1), default=0.15,
        help="share of the MMDiT's captions that carry V and A as numbers (default: %(default)s)")
    add("--compile", action="store_true",
        help="compile the MMDiT: a quarter faster, needs a C compiler")
    args = parser.parse_args(argv)

    def work():
        for stage in STAGES if args.stage == "all" else [args.stage]:
            STAGES[stage](args)

    return cli.run_program(work)


if __name__ == "__main__":
    sys.exit(main())

"""Train the miniature from scratch, one command per stage, in this order:

    python tiny/pretrain.py data     # draw 20,000 scenes into tiny/cache (about 1 GB, not kept in the repository)
    python tiny/pretrain.py vae      # the autoencoder
    python tiny/pretrain.py clip     # a small BPE, an image tower and the two text towers, contrastively
    python tiny/pretrain.py mmdit    # the MMDiT by rectified flow, on the latents of the scenes
    python tiny/pretrain.py decoder  # the autoencoder's decoder again, with the encoder as it is: sharper pictures
    python tiny/pretrain.py aesthetic  # a linear head on the image tower, for clean pictures against spoilt ones
    python tiny/pretrain.py judge    # a small Qwen2.5-VL by supervised answers; train_judge.py goes on from there
    python tiny/pretrain.py all

The result lies in tiny/weights in the diffusers layout: the miniature is just another checkpoint. Every stage takes
--seed, --samples and --minutes, writes its state every minute and goes on from it when started again. Captions are
mostly words; some carry V and A as numbers. The text towers see exact ones, the MMDiT those of a rater with a scale of
their own. So the model follows emotion words well, and numbers in their order only: its pictures are too pleasant and too
calm. That is what reward feedback is to correct.
"""

import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm

from parts.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python tiny/pretrain.py` finds the models
import data
import feedback
import mmdit
import qwen_vl
from parts import chat, clip, text_encoders, weights
from parts import vae as vae_model
from tiny.initialise import initialise
from tiny import lessons, publish, scenes

HERE = Path(__file__).resolve().parent
CACHE, WEIGHTS = HERE / "cache", HERE / "weights"
SIZE, TEXT_LENGTH = 128, 40
CLIP_NUMBERS = 0.3  # share of the captions of the text towers that carry numbers, exact ones: they learn to read them
RATER_SHARE, RATER_SD = (0.7, 0.6), 0.5  # the MMDiT's are a rater's, whose scale spans the upper part of V, the lower of A
VAE_CONFIG = vae_model.VAEConfig(channels=(16, 32, 64, 64), blocks=1, groups=4, scale=1.0, shift=0.0)
MMDIT_CONFIG = mmdit.MMDiTConfig(depth=6, heads=5, head_dim=32, dual_blocks=(0, 1, 2), context_dim=160, pooled_dim=192,
                                 positions=16, sample_size=SIZE // 8)
JUDGE_CONFIG = qwen_vl.QwenVLConfig(
    width=160, layers=4, heads=5, kv_heads=1, mlp=448, tied=True, theta=1e4, sections=(4, 6, 6), vision_width=96,
    vision_layers=4, vision_heads=3, vision_mlp=288, patch=16, window=64, full_blocks=(1, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Data


def draw_row(seed):
    """Scene, V, A and picture [128,128,3] uint8 of one training row; V and A uniform on 1..9."""
    rng = np.random.default_rng([seed, 20])
    scene, (v, a) = scenes.random_scene(rng), rng.uniform(1, 9, 2)
    return scene, float(v), float(a), np.asarray(scenes.render(scene, v, a, SIZE))


def make_data(args):
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = CACHE / "pictures.tmp.npy"
    pictures = np.lib.format.open_memmap(temporary, "w+", np.uint8, (args.rows, SIZE, SIZE, 3))
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        seeds = range(args.seed * 10_000_000, args.seed * 10_000_000 + args.rows)
        for i, (scene, v, a, picture) in enumerate(tqdm(pool.map(draw_row, seeds, chunksize=64), total=args.rows)):
            pictures[i] = picture
            rows.append({"scene": asdict(scene), "v": v, "a": a})
    pictures.flush()
    (CACHE / "rows.json").write_text(json.dumps(rows))
    os.replace(temporary, CACHE / "pictures.npy")


def load_data():
    """(rows [(Scene, v, a)], pictures uint8 [N,128,128,3] as a memory map)."""
    if not (CACHE / "pictures.npy").exists():
        raise SystemExit("tiny/cache/pictures.npy is missing; run `python tiny/pretrain.py data` first")
    rows = [(scenes.Scene(**row["scene"]), row["v"], row["a"]) for row in json.loads((CACHE / "rows.json").read_text())]
    return rows, np.load(CACHE / "pictures.npy", mmap_mode="r")


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


def rated(v, a, rng):
    """(V, A) that a rater gives a scene, or None if it lies off the rater's scale, on which the lowest valence is called 1
    where it is 3.4 (so that a picture of a wished valence is too pleasant) and the highest arousal 9 where it is 5.8."""
    v_share, a_share = RATER_SHARE
    said = np.array([data.VA_MAX - (data.VA_MAX - v) / v_share, data.VA_MIN + (a - data.VA_MIN) / a_share])
    said += rng.normal(0, RATER_SD, 2)
    return said if said.min() >= data.VA_MIN and said.max() <= data.VA_MAX else None


def caption(row, rng, empty=0.1, numbers=0.6, exact=False):
    """A training caption of a row: nothing (for guidance), neutral 10 %, with numbers, else with emotion words.

    The numbers are the scene's own V and A if exact, else those of `rated`. A scene off the rater's scale gets words.
    """
    scene, v, a = row
    u = rng.random()
    if u < empty:
        return ""
    if u < empty + 0.10:
        return scenes.neutral_caption(scene)
    if u < empty + 0.10 + numbers:
        said = (v, a) if exact else rated(v, a, rng)
        if said is not None:
            return data.with_numbers(scenes.neutral_caption(scene), *said)
    return scenes.emotional_caption(scene, v, a, rng)


# ---------------------------------------------------------------------------------------------------------------------
# Training loop shared by the stages


def train(name, modules, loss_of, args, samples, batch, lr, weight_decay=0.0, average=0.0, minutes=None):
    """AdamW with warm-up and cosine decay until `samples` are seen (or `minutes` are over: the decay follows whichever
    is nearer). loss_of(step, generator, rng, batch) -> (loss, {metric: number}). In the end the modules hold the running
    average (EMA) of their weights.

    The state is written to tiny/cache every minute. A killed stage goes on from there, and so does a finished one that is
    given more samples; delete the state to start over.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    ema = [p.detach().clone() for p in parameters]
    state_path, log_path = CACHE / f"{name}.pt", CACHE / f"{name}.log"
    step, spent = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        step, spent = state["step"], state["spent"]
        for saved, mine in zip(state["parameters"] + state["ema"], parameters + ema, strict=True):
            mine.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
    steps, started, last_save = samples // batch, time.time() - spent, time.time()
    bar, smooth = tqdm(total=steps, initial=step, desc=name, mininterval=5, dynamic_ncols=True), {}
    while True:
        share = max(step / steps, (time.time() - started) / (60 * minutes) if minutes else 0.0)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rng = np.random.default_rng([args.seed, step])
        loss, metrics = loss_of(step, generator, rng, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1 - min(average, step / (step + 10)))
        for key, value in {**metrics, "norm": float(norm)}.items():
            smooth[key] = value if key not in smooth else 0.98 * smooth[key] + 0.02 * value
        bar.update()
        bar.set_postfix({k: f"{v:.4f}" for k, v in smooth.items()}, refresh=False)
        if time.time() - last_save >= args.save_every or step == steps:
            last_save = time.time()
            temporary = state_path.with_suffix(".tmp")
            torch.save({"step": step, "spent": last_save - started, "parameters": [p.data for p in parameters],
                        "ema": ema, "optimizer": optimizer.state_dict()}, temporary)
            os.replace(temporary, state_path)
            with open(log_path, "a") as f:
                f.write(json.dumps({"step": step, "samples": step * batch, "seconds": last_save - started, **smooth}) + "\n")
    bar.close()
    for p, averaged in zip(parameters, ema, strict=True):
        p.data.copy_(averaged)


# ---------------------------------------------------------------------------------------------------------------------
# Stage: VAE


def reconstruction_loss(model, pictures, generator, rng, batch):
    """Loss and metrics of `batch` random 64 px crops: the network is convolutional, and a crop costs a quarter."""
    picks, ys, xs = (rng.integers(n, size=batch) for n in (len(pictures), SIZE - 63, SIZE - 63))
    x = to_tensor(np.stack([pictures[i, y:y + 64, x:x + 64] for i, y, x in zip(picks, ys, xs, strict=True)]))
    mean, logvar = model.moments(x)
    y = model.decoder(mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator))
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    colours = sum((F.avg_pool2d(y, k) - F.avg_pool2d(x, k)).abs().mean() for k in (1, 2, 4, 8))  # at every scale
    edges = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
    return colours + edges + 2e-3 * kl, {"l1": float((y - x).detach().abs().mean()), "kl": float(kl.detach())}


@torch.no_grad()
def reconstruct(model, pictures):
    """(mean PSNR in dB, scaled latents) of whole pictures."""
    latents, errors = [], []
    for start in tqdm(range(0, len(pictures), 32), desc="held-out pictures"):
        x = to_tensor(pictures[start:start + 32])
        latents.append(model.encode(x))
        errors.append((model.decode(latents[-1]).clamp(-1, 1) - x).pow(2).mean((1, 2, 3)))
    return float(10 * torch.log10(4 / torch.cat(errors)).mean()), torch.cat(latents)


def train_vae(args):
    seen, held_out = split(load_data()[1])
    torch.manual_seed(args.seed)
    model = vae_model.VAE(VAE_CONFIG).to(memory_format=torch.channels_last)
    train("vae", [model], lambda step, *draw: reconstruction_loss(model, seen, *draw), args, args.samples or 64_000, 16,
          2e-3, average=0.998, minutes=args.minutes)
    psnr, z = reconstruct(model, held_out)
    model.config = replace(VAE_CONFIG, scale=round(1 / float(z.std()), 4), shift=round(float(z.mean()), 4))
    publish.save_vae(WEIGHTS / "vae", model, torch.bfloat16)
    print(f"vae: held-out PSNR {psnr:.2f} dB, latents mean {z.mean():.3f} sd {z.std():.3f}")


def train_decoder(args):
    """The decoder alone, further: what an MMDiT was trained on stays as it is, and pictures get sharper."""
    seen, held_out = split(load_data()[1])
    model = vae_model.VAE.from_pretrained(WEIGHTS).to(memory_format=torch.channels_last)
    before, _ = reconstruct(model, held_out)
    model.decoder.requires_grad_(True)
    train("decoder", [model.decoder], lambda step, *draw: reconstruction_loss(model, seen, *draw), args,
          args.samples or 64_000, 16, 1.5e-3, average=0.998, minutes=args.minutes)
    after, _ = reconstruct(model, held_out)
    publish.save_vae(WEIGHTS / "vae", model, torch.bfloat16)
    print(f"decoder: held-out PSNR {before:.2f} -> {after:.2f} dB")


# ---------------------------------------------------------------------------------------------------------------------
# Stage: CLIP


def learn_bpe(texts, size):
    """(vocab {token: id}, merges [(left, right)]) of a byte-level BPE with at most about `size` tokens.

    Laid out as CLIP's: 256 bytes, 256 bytes that close a word, the merges, start and end. So no text is unknown to it.
    """
    tokenizer = clip.clip_tokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = byte_alphabet()
    tokens = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def byte_alphabet():
    """The 256 characters that stand for bytes in a byte-level BPE, in CLIP's order: printable bytes first."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    printable = sorted(c for c in alphabet if ord(c) < 256)  # these stand for themselves
    return printable + sorted(alphabet - set(printable))


def write_tokenizers(vocab, merges):
    """Write tokenizer/ (pads with the end token, as CLIP-L) and tokenizer_2/ (pads with !, as bigG)."""
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_json(WEIGHTS / name / "vocab.json", vocab)
        (WEIGHTS / name / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        write_json(WEIGHTS / name / "tokenizer_config.json", {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad})


def train_clip(args):
    rows, pictures = load_data()
    rng = np.random.default_rng(args.seed)
    vocab, merges = learn_bpe([caption(row, rng, empty=0) for row in rows], 1500)
    write_tokenizers(vocab, merges)
    tokenize = [clip.PromptTokenizer(WEIGHTS / name) for name in ("tokenizer", "tokenizer_2")]
    torch.manual_seed(args.seed)
    shared = {"projection_dim": 96, "vocab_size": len(vocab), "max_position_embeddings": TEXT_LENGTH,
              "eos_token_id": len(vocab) - 1}
    small = clip.TextTower(clip.TextConfig(64, 3, 2, 256, "quick_gelu", **shared))
    processor = clip.Processor(tokenize[1], clip.ImageConfig(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    model = clip.CLIP(clip.TextConfig(96, 4, 3, 384, "gelu", **shared), clip.VisionConfig(96, 4, 3, 384, "gelu", 96, 64, 8),
                      processor)
    for module in (small, model):
        for p in module.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.02 if p.shape[0] > 512 else p[0].numel() ** -0.5)
    held_out = training_rows(len(pictures))
    alike = {}  # subject and place: rows
    for i, (scene, _, _) in enumerate(rows[:held_out]):
        alike.setdefault((scene.subject, scene.place), []).append(i)
    alike = list(alike.values())

    def embed(picks, rng):
        picks = np.sort(picks)
        pixels = F.avg_pool2d(to_tensor(pictures[picks]), 2)  # 64 px in -1..1, as the processor nearly makes them
        captions = [caption(rows[i], rng, 0, CLIP_NUMBERS, exact=True) for i in picks]
        large = model.embed_text(tokenize[1](captions))
        return model.embed_images(pixels), large, F.normalize(small(tokenize[0](captions))[1], dim=-1)

    def loss_of(step, generator, rng, batch):
        # every second batch is of one subject in one place: only the mood and the time of day tell its captions apart
        among = alike[rng.integers(len(alike))] if step % 2 else held_out
        image, *texts = embed(rng.permutation(among)[:batch], rng)
        target, loss = torch.arange(len(image)), 0.0
        for text in texts:
            logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
            loss = loss + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 4
        return loss, {"loss": float(loss.detach()), "top1": float((logits.argmax(1) == target).float().mean())}

    train("clip", [small, model], loss_of, args, args.samples or 200_000, 128, 1.5e-3, 0.02, average=0.99,
          minutes=args.minutes)
    with torch.no_grad():
        image, *texts = embed(np.arange(held_out, len(pictures)), np.random.default_rng(0))
        top1 = [float(((image @ text.T).argmax(1) == torch.arange(len(image))).float().mean()) for text in texts]
    publish.save_text_tower(WEIGHTS / "text_encoder", small, torch.bfloat16)
    publish.save_text_tower(WEIGHTS / "text_encoder_2", model.text, torch.bfloat16)
    publish.save_clip(WEIGHTS / "clip", model, torch.bfloat16)
    print(f"clip: a picture finds its own among {len(image)} held-out captions: {top1[0]:.1%} (tower in CLIP-L's place: "
          f"{top1[1]:.1%}; chance {1 / len(image):.1%})")


# ---------------------------------------------------------------------------------------------------------------------
# Stage: MMDiT


def encode_latents(pictures):
    """Scaled latents of all pictures as a float16 memory map [N,16,16,16] beside them."""
    path = CACHE / "latents.npy"
    if not path.exists():
        autoencoder = vae_model.VAE.from_pretrained(WEIGHTS)
        latents = np.empty((len(pictures), 16, SIZE // 8, SIZE // 8), np.float16)
        with torch.no_grad():
            for start in tqdm(range(0, len(pictures), 32), desc="latents"):
                latents[start:start + 32] = autoencoder.encode(to_tensor(pictures[start:start + 32])).numpy()
        np.save(path.with_suffix(".tmp.npy"), latents)
        os.replace(path.with_suffix(".tmp.npy"), path)
    return np.load(path, mmap_mode="r")


def write_pipeline_files():
    """model_index.json and the scheduler's configuration: what makes the folder a pipeline in diffusers' layout."""
    write_json(WEIGHTS / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
    write_json(WEIGHTS / "model_index.json", {
        "_class_name": "StableDiffusion3Pipeline", "t5_tokens": 0,  # no T5, and no zeros in its place
        "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": [None, None]})


def train_mmdit(args):
    rows, pictures = load_data()
    latents = encode_latents(pictures)
    torch.manual_seed(args.seed)
    model = initialise(mmdit.MMDiT(MMDIT_CONFIG))
    if not (WEIGHTS / "transformer" / "config.json").exists():  # the text encoders are read from a whole folder
        model.save_pretrained(WEIGHTS / "transformer", torch.bfloat16)
    write_pipeline_files()
    encoders = text_encoders.TextEncoders.from_pretrained(WEIGHTS)
    forward = torch.compile(model) if args.compile else model
    held_out = training_rows(len(rows))

    def loss_of(step, generator, rng, batch):
        picks = np.sort(rng.integers(held_out, size=batch))
        x = torch.from_numpy(latents[picks].astype(np.float32))
        context, pooled = encoders.encode([caption(rows[i], rng, numbers=args.numbers) for i in picks])
        # logit-normal noise levels (Esser et al. 2024), their middle moved up: composition is settled in the noise
        sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(batch, generator=generator))
        noise = torch.randn(x.shape, generator=generator)
        at = sigma[:, None, None, None]
        velocity = forward((1 - at) * x + at * noise, sigma * 1000, context, pooled)
        loss = (velocity - (noise - x)).pow(2).mean()
        return loss, {"loss": float(loss.detach())}

    train("mmdit", [model], loss_of, args, args.samples or 220_000, 32, 1.5e-3, 0.01, average=0.999, minutes=args.minutes)
    model.save_pretrained(WEIGHTS / "transformer", torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# Stage: judge


def judge_processor(rows, rng):
    """Qwen's tokenizer with a small vocabulary learned on prompts, answers and captions; pictures of 128 px as they are."""
    asked = [text for name, text in feedback.PROMPTS.items() if "caption" not in name]  # it is not asked for captions
    texts = asked * 20 + [lessons.DESCRIBE]
    for scene, v, a in rows:
        texts += [lessons.answer(task, scene, v, a, rng) for task in feedback.TASKS]
        texts += [scenes.emotional_caption(scene, v, a, rng), lessons.rewrite(scene, (v, a))]
    learner = chat.byte_bpe({}, [], special=())
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1200, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    learned = json.loads(learner.to_str())["model"]
    tokenizer = chat.byte_bpe(learned["vocab"], [tuple(pair) for pair in learned["merges"]])
    image = chat.ImageConfig(JUDGE_CONFIG.patch, min_pixels=64 * 64, max_pixels=SIZE * SIZE)
    return chat.Processor(tokenizer, image, tokenizer.token_to_id("<|image_pad|>"))


def train_judge(args):
    """Supervised answers. Most pictures are only described: short sequences, from which the eye learns most."""
    rows, pictures = load_data()
    held_out = training_rows(len(rows))
    processor = judge_processor(rows[:held_out:4], np.random.default_rng(args.seed))
    vocab = processor.tokenizer.get_vocab_size()
    torch.manual_seed(args.seed)
    model = qwen_vl.QwenVL(replace(JUDGE_CONFIG, vocab=vocab, image_token=processor.image_token), processor)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02 if p.shape[0] == vocab else p.shape[1] ** -0.5)
    blank = Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8))
    questions = {task: processor(feedback.ask(task, blank)) for task in feedback.TASKS}
    questions["describe"] = processor([{"role": "user", "content": [
        {"type": "image", "image": blank}, {"type": "text", "text": lessons.DESCRIBE}]}])
    alike = {}  # (subject, place, time): rows
    for i, (scene, _, _) in enumerate(rows[:held_out]):
        alike.setdefault((scene.subject, scene.place, scene.time), []).append(i)

    def judging(task, i, rng):
        """(Prompt, answers) about row i; an answer's figures are drawn anew each time."""
        prompt = replace(questions[task], pixels=chat.image_patches(Image.fromarray(pictures[i]), processor.image)[0])
        if task == "describe":
            return prompt, [lessons.thought(*rows[i])]
        return prompt, [lessons.answer(task, *rows[i], rng) for _ in range(3)]

    def advising(task, i, rng):
        """(Prompt, answers) of a comparison of row i with one alike, or of a rewrite for it; in brief: the figures alone."""
        why = "it has no JSON object" if rng.random() < 0.1 else None
        scene, *wish = rows[i]
        if task == "rewrite" or (task == "brief" and rng.random() < 0.3):
            question, said = feedback.ask_rewrite(scenes.neutral_caption(scene), *wish, why), lessons.rewrite(scene, wish)
        else:
            j = int(rng.choice(alike[scene.subject, scene.place, scene.time]))
            both = lessons.comparison(rows[i], rows[j], rng)
            ends = ((Image.fromarray(pictures[k]), *va) for k, va in zip((i, j)[::both.order], (both.best, both.worst)))
            question, said = feedback.ask_compare(both.request, both.prompt, *both.wish, *ends, why), both.answer
            if task == "brief":
                said = both.brief
        if task == "brief":  # its last lines: short sequences, from which it learns to read and to copy
            text = question[1]["content"][-1]["text"].split("\n", 1)[1]
            question = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        return processor(question), [said]

    def loss_of(step, generator, rng, batch):
        task = ("describe", "regression", "brief", "compare", "describe", "brief", "compare", "class", "brief", "compare",
                "describe", "rewrite")[step % 12]
        size = batch // {"regression": 2, "class": 2, "compare": 4, "rewrite": 4}.get(task, 1)
        picks = np.sort(rng.integers(held_out, size=size))
        ask = advising if task in ("brief", "compare", "rewrite") else judging
        prompts, texts = zip(*(ask(task, i, rng) for i in picks))
        encoded = processor.tokenizer.encode_batch([text for answers in texts for text in answers])
        ids = [torch.tensor([*e.ids, processor.stop[0]]) for e in encoded]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1).view(len(picks), len(texts[0]), -1)
        hidden = model.completion_hidden(prompts, ids.clamp(min=0))
        loss = F.cross_entropy(F.linear(hidden, model.head_weight).flatten(0, 2), ids.flatten(), ignore_index=-1)
        return loss, {task: float(loss.detach())}

    train("judge", [model], loss_of, args, args.samples or 240_000, 32, 3e-3, 0.01, average=0.99, minutes=args.minutes)
    model.requires_grad_(False)
    model.save_pretrained(CACHE / "judge")  # before GRPO; weights/judge is the one after it


# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# Stage: aesthetic head


def spoil(picture, strength, rng):
    """A picture [H,W,3] uint8, blurred, noisy, pale or coarse; strength 0 (as it is) to 1."""
    image, kind = Image.fromarray(picture), rng.integers(4)
    if kind == 0:
        return image.filter(ImageFilter.GaussianBlur(6 * strength))
    if kind == 1:
        noisy = np.asarray(image, float) + 70 * strength * rng.standard_normal(picture.shape)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    if kind == 2:
        return Image.blend(image, Image.new("RGB", image.size, "grey"), 0.85 * strength)
    side = round(image.width / (1 + 11 * strength))
    return image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def fit_aesthetic(args):
    """A linear head on the CLIP's image embedding in LAION's layout: 10 for a rendered scene, down to 1 for a spoilt one."""
    count, rng = args.samples or 6000, np.random.default_rng([args.seed, 40])
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        seeds = range(args.seed * 10_000_000 + 5_000_000, args.seed * 10_000_000 + 5_000_000 + count)
        drawn = tqdm(pool.map(draw_row, seeds, chunksize=16), total=count, desc="scenes")
        strengths = rng.uniform(0, 1, count) * (rng.uniform(size=count) > 0.1)
        images = [spoil(picture, strength, rng) for (*_, picture), strength in zip(drawn, strengths.tolist(), strict=True)]
    model = clip.CLIP.from_pretrained(WEIGHTS / "clip")
    x = torch.cat([clip.embed_pictures(model, images[i:i + 100]) for i in tqdm(range(0, count, 100), "embedding")]).double()
    x, y = torch.cat([x, torch.ones(count, 1)], 1), torch.from_numpy(10 - 9 * strengths)
    fit = count * 4 // 5
    solution = torch.linalg.solve(x[:fit].T @ x[:fit] + 1e-3 * torch.eye(x.shape[1]), x[:fit].T @ y[:fit])
    error, blind = ((guess - y[fit:]).abs().mean() for guess in (x[fit:] @ solution, y[:fit].mean()))
    print(f"aesthetic: error {error:.2f} on 1..10, {count - fit} held-out pictures (their mean as a guess: {blind:.2f})")
    weight, bias = solution.float()[None].split([x.shape[1] - 1, 1], dim=1)
    weights.save(WEIGHTS / "aesthetic.safetensors", {"weight": [weight], "bias": [bias[0]]})


STAGES = {"data": make_data, "vae": train_vae, "clip": train_clip, "mmdit": train_mmdit,
          "decoder": train_decoder, "aesthetic": fit_aesthetic, "judge": train_judge}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=20_000, help="pictures to draw in the data stage")
    parser.add_argument("--samples", type=int, help="training samples; each stage has its own default")
    parser.add_argument("--minutes", type=float, help="also stop after this time, the learning rate decayed to it")
    parser.add_argument("--numbers", type=float, default=0.6,
                        help="share of the MMDiT's captions that carry V and A as numbers where the rater gives some "
                             "(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the MMDiT: a quarter faster, needs a C compiler")
    parser.add_argument("--save-every", type=float, default=60, help="seconds between states on disk (default: %(default)s)")
    args = parser.parse_args(argv)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](args)


if __name__ == "__main__":
    main()

"""Draw pictures at a wanted valence and arousal, judge them, and improve the prompt (Algorithm 1).

    python sample.py --v 7 --a 3                        # the miniature, on any laptop
    python sample.py --v 7 --a 3 --prompt "a castle in the hills in the evening" --n 4
    python sample.py --v 7 --a 3 --rounds 3 --rewrite   # textual feedback: 3 rounds of 8 pictures
    python sample.py --grid 5                           # the valence-arousal plane as one picture
    python sample.py --v 7 --a 3 --no-adapter           # the generator before reward feedback
    python sample.py --v 7 --a 3 --preset paper         # SD3.5-Medium and Qwen2.5-VL-7B, on a GPU

The target enters the prompt as words. The judge says what valence and arousal it sees and why; in
each further round it has compared the best and the worst picture and rewritten the prompt
(feedback.py). A run is a folder: the PNGs, each with its prompt, V, A, seed, model and judgement
inside, run.json, contact.png, and index.html to look at.
"""

import json
import re
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data
import feedback
from parts import cli, page, sheets, weights
from parts.cli import UserError, say
from parts.files import read_json, save_png, write_whole
from parts.pipeline import PAPER, TINY, judge_of, load_generator, load_judge, name_of, to_images
from parts.prompts import load_prompts

PRESETS = {  # The adapter is what reward feedback (train_gen.py) has changed in the generator.
    "tiny": {"model": TINY, "adapter": TINY / "adapter", "judge": TINY / "judge"},
    "paper": {"model": PAPER, "adapter": None, "judge": "Qwen/Qwen2.5-VL-7B-Instruct"},
}
PAPER_NEEDS = ("SD3.5-Medium from the hub (17 GB, licence to accept), Qwen2.5-VL-7B (17 GB) and a "
               "GPU with 48 GB, or 12 GB with --no-t5 --judge none")
DEFAULT_PROMPT = "a lighthouse on the sea coast in the evening"
SAMPLING = {  # flag: default with --preset paper, with tiny, type, help
    "sample_steps": (25, 25, cli.integer(1, 1000), "[--num-inference-steps] steps of the sampler"),
    "guidance": (4.5, 4.5, cli.number(0, 100), "[--guidance-scale] classifier-free guidance"),
    "size": (512, 128, cli.picture_side, "side in pixels"),
    "seed": (0, 0, cli.integer(0, 2**62), "of the first picture; the next ones count up"),
    "micro": (8, 8, cli.integer(1, 1000), "pictures drawn at a time"),
}
FEEDBACK = {
    "rounds": (1, 1, cli.integer(1, 100), "the judge rewrites the prompt between two"),
    "tolerance": (0.0, 0.0, cli.number(0, 16), "a loss |ΔV| + |ΔA| that ends the rounds"),
    "readings": (1, 1, cli.integer(1, 100), "answers of the judge, whose mean is taken"),
}


# --------------------------------------------------------------------------------------------------
# Flags


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    scale = cli.number(1, 9)

    # 1. what to draw
    group = parser.add_argument_group("target")
    group.add_argument("--v", type=scale, help="valence, 1 (unpleasant) to 9 (pleasant)")
    group.add_argument("--a", type=scale, help="arousal, 1 (calm) to 9 (excited)")
    group.add_argument("--grid", type=cli.integer(2, 9), metavar="K",
                       help="K×K targets all over the plane, as one labelled picture")
    group.add_argument("--prompt", type=cli.text(feedback.LONGEST_PROMPT), default=DEFAULT_PROMPT,
                       help="what to draw, without emotion (default: %(default)s)")

    # 2. what draws and judges
    group = parser.add_argument_group("models")
    group.add_argument("--preset", choices=PRESETS, default="tiny",
                       help="tiny: the miniature; paper: SD3.5-Medium (default: %(default)s)")
    group.add_argument("--model", help="folder, .safetensors file or hub id, not the preset's")
    group.add_argument("--adapter", help="folder, file or hub id of what train_gen.py, peft or "
                       "diffusers wrote, or a run: its last one (default: the miniature has one)")
    group.add_argument("--no-adapter", action="store_true",
                       help="the generator as it was before reward feedback")
    group.add_argument("--text-encoders", help="folder or hub id, if --model is a single file")
    group.add_argument("--no-t5", action="store_true", help="without T5, which needs 9 GB")
    group.add_argument("--judge", help="folder, hub id or http://…/v1 of it, or none")
    group.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    group.add_argument("--compile", action="store_true", help="the generator by torch.compile: "
                       "a C++ compiler and a minute at first, for many pictures")

    # 3. how, and where the result goes
    cli.add_settings(parser.add_argument_group("sampling"), SAMPLING)
    group = parser.add_argument_group("feedback")
    cli.add_settings(group, FEEDBACK)
    group.add_argument("--n", "--images-per-round", type=cli.integer(1, 1000),
                       help="pictures a round (default: 1, or 8 with --rounds)")
    group.add_argument("--rewrite", action="store_true", help="the judge writes the first too")
    group.add_argument("--questions", type=Path, metavar="FILE", help="JSON with other questions "
                       f"to the judge, by name: {', '.join(feedback.PROMPTS)}")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, help="folder (default: in out/, named after the target)")
    group.add_argument("--json", action="store_true", help="print run.json and nothing else")
    args = cli.parse_settings(parser, SAMPLING | FEEDBACK, argv)
    return complete(args, parser.error)


def complete(args, refuse):
    """Fill in the defaults that depend on other flags; refuse flags that do not go together."""
    if args.grid is None and (args.v is None or args.a is None):
        refuse("give a target: --v and --a, each 1..9 (or --grid 5 for the whole plane)")
    if args.adapter and args.no_adapter:
        refuse("--adapter and --no-adapter: give one of them")
    args.n = args.n or (8 if args.rounds > 1 else 1)
    if args.rounds > 1 and args.n < 2:
        refuse(f"--n {args.n}: expected 2 or more, as --rounds compares the best and the worst")
    preset = PRESETS[args.preset]
    # The preset's adapter changes the preset's own generator and fits no other.
    if not (args.adapter or args.no_adapter or args.model):
        args.adapter = preset["adapter"]
    args.model = args.model or preset["model"]
    args.judge = args.judge or preset["judge"]
    feeds_back = args.rounds > 1 or args.rewrite
    if args.judge == "none" and feeds_back:
        refuse("--judge none: --rounds and --rewrite need a judge")
    # A grid without feedback only shows its pictures, so nobody need judge them.
    if args.judge == "none" or (args.grid and not feeds_back):
        args.judge = None
    if args.out is None:
        name = f"grid{args.grid}" if args.grid else f"v{args.v:g}_a{args.a:g}"
        name += f"_seed{args.seed}"
        if args.prompt != DEFAULT_PROMPT:  # a folder for each prompt
            name += "_" + re.sub(r"\W+", "-", args.prompt.lower()).strip("-")[:40]
        args.out = Path("out") / name
    return args


# --------------------------------------------------------------------------------------------------
# The run


def run(args):
    started = time.perf_counter()

    # 1. load the models, but first refuse what they are not needed for
    check_machine(args)
    judge, generator = load(args)

    # 2. the targets, a grid's row by row from the highest arousal down, and the head of run.json
    levels = [1 + 8 * i / (args.grid - 1) for i in range(args.grid)] if args.grid else []
    targets = [(v, a) for a in reversed(levels) for v in levels] or [(args.v, args.a)]
    settings = {"model": generator.name, "steps": args.sample_steps, "guidance": args.guidance,
                "size": args.size}
    record = {
        "prompt": args.prompt, **settings, "judge": args.judge and name_of(args.judge),
        "seed": args.seed, "rounds": args.rounds, "images_per_round": args.n,
        "rewrite": args.rewrite, "tolerance": args.tolerance, "readings": args.readings,
        "device": args.device, "torch": torch.__version__, "grid": None, "cells": [], "seconds": {}}
    options = feedback.RefineOptions(
        rewrite=args.rewrite, tolerance=args.tolerance, seed=args.seed, readings=args.readings)

    # 3. for each target draw, judge, and improve the prompt (Algorithm 1)
    # With one picture a target, a row of the grid is one batch, drawn ahead of its targets.
    one_each = args.grid and judge is None and args.n == 1
    ahead = {}
    bar = tqdm(targets, desc="grid", unit="target", leave=False, disable=args.grid is None)
    for index, (v, a) in enumerate(bar):
        if one_each and index % args.grid == 0:
            ahead = draw_row(generator, args, targets[index:index + args.grid])
        facts = {"valence": v, "arousal": a, **settings}
        generate = partial(draw_and_save, generator, args, ahead, facts)
        rounds = []
        cell = {"v": v, "a": a, "best": None, "rounds": []}
        record["cells"].append(cell)
        for finished in feedback.refine_rounds(
                args.prompt, v, a, generate, judge, args.rounds, args.n, options):
            rounds.append(finished)
            cell["rounds"].append(save_round(args, facts, finished))
            r, i = feedback.best_of(rounds)
            cell["best"] = None if judge is None else {"round": r, "image": i}
            if args.grid is None and args.rounds > 1:
                say(page.round_line(finished, r, rounds[r].pictures[i].loss))
            # The page shows a run that goes on, too; a grid's grows by whole targets.
            if not ahead and (args.grid is None or finished.next_prompt is None):
                page.write(record, args.out, started)
        if judge is not None:
            name_emotion(args, facts, cell, rounds[r], judge)

    # 4. the grid, the page, and the result on standard output
    if args.grid:
        record["grid"] = f"grid{args.grid}.png"
        grid = sheets.va_grid(record, args.out)
        save_png(grid, args.out / record["grid"], prompt=args.prompt, seed=args.seed, **settings)
    page.write(record, args.out, started)
    say(page.latency(record))
    text = json.dumps(record, indent=1, ensure_ascii=False)
    print(text if args.json else page.summary(record, args.out))


def check_machine(args):
    """Refuse, before models are loaded, what cannot be done here; reads the user's questions."""
    args.device = cli.device_of(args.device)
    if args.questions is not None:
        load_prompts(args.questions, feedback.PROMPTS, feedback.VALUES)
    file = args.out / "run.json"
    if file.exists() and (before := read_json(file).get("prompt")) != args.prompt:
        raise UserError(f"{args.out} holds pictures of {before!r}; give another --out")
    try:  # Permissions alone do not tell: a disk may be full or mounted for reading only.
        write_whole(args.out / ".probe", "").unlink()
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot write there ({error.strerror}); choose another "
                        f"folder") from error


def load(args):
    """(the judge as feedback.py asks it, or None; the Generator)."""
    judge = None
    if args.judge is not None:
        model = load_judge(args.judge, args.device, args.size)
        # A rewrite, with its analysis, is the longest answer that is asked for.
        judge = judge_of(model, max_new_tokens=feedback.REWRITE_LIMIT)
    generator = load_generator(args.model, args.device, use_t5=not args.no_t5,
                               encoders_from=args.text_encoders, adapter=args.adapter)
    if args.compile:
        for block in generator.mmdit.joint_blocks:
            block.compile()
    # The MMDiT has position embeddings for so many patches a side and no more.
    config = generator.mmdit.config
    limit = config.positions * config.patch * generator.vae.factor
    if args.size > limit:
        raise UserError(f"--size {args.size}: {args.model} draws at most {limit} pixels")
    millions = weights.count_parameters(generator.mmdit) / 1e6
    dtype = str(generator.dtype).removeprefix("torch.")
    say(f"{generator.name}: {millions:,.1f} M parameter generator on {args.device} ({dtype}), "
        f"{args.size} px, {args.sample_steps} steps"
        + (f"; --preset paper would need {PAPER_NEEDS}" if args.preset == "tiny" else ""))
    return judge, generator


# --------------------------------------------------------------------------------------------------
# Drawing and saving


def draw(generator, args, prompts, seeds):
    """PIL images of prompts, each with its seed, in one batch."""
    return to_images(generator.draw(
        prompts, seeds, size=args.size, steps=args.sample_steps, guidance=args.guidance,
        progress=partial(tqdm, desc="drawing", unit="step", leave=False)))


def draw_row(generator, args, targets):
    """{prompt: PIL image} of a row of a grid, all of one seed: only the emotion differs."""
    prompts = [data.with_words(args.prompt, v, a) for v, a in targets]
    images = draw(generator, args, prompts, [args.seed] * len(prompts))
    return dict(zip(prompts, images, strict=True))


def draw_and_save(generator, args, ahead, facts, prompt, seeds):
    """PIL images of one prompt, one a seed, unless drawn `ahead`; written at once, for Ctrl-C."""
    if args.grid is None:
        say(f"round {(seeds[0] - args.seed) // args.n}: {prompt}")
    images = []
    for start in range(0, len(seeds), args.micro):
        batch = seeds[start:start + args.micro]
        ready = [ahead[prompt]] if prompt in ahead else None
        images += ready or draw(generator, args, [prompt] * len(batch), batch)
        for image, seed in zip(images[start:], batch, strict=True):
            save_picture(args, facts, prompt, seed, image)
    return images


def save_picture(args, facts, prompt, seed, image, judgement=None):
    """Write a picture with all that is known of it into its PNG; returns the file's name."""
    # Every round draws the next n seeds, so the seed tells the round.
    target = f"v{facts['valence']:g}_a{facts['arousal']:g}_" if args.grid else ""
    name = f"{target}round{(seed - args.seed) // args.n}_seed{seed}.png"
    said = {}
    if judgement is not None and args.judge is not None:
        said = {"judge": name_of(args.judge), "judged_valence": judgement.v,
                "judged_arousal": judgement.a, "judged_emotion": judgement.emotion,
                "reasoning": judgement.reasoning}
    save_png(image, args.out / name, prompt=prompt, seed=seed, **facts, **said)
    return name


def save_round(args, facts, finished):
    """Write a round's pictures again, now with their judgements; returns its part of run.json."""
    images = []
    for picture in finished.pictures:
        said = picture.judgement
        name = save_picture(args, facts, finished.prompt, picture.seed, picture.image, said)
        loss = None if said.v is None else picture.loss
        images.append({"file": name, "seed": picture.seed, **vars(said), "loss": loss})
    # The fields of a Round, with file names in the place of its pictures.
    entry = {"prompt": finished.prompt, "images": images, **vars(finished)}
    del entry["pictures"]
    if args.judge is None:
        entry["best"] = None
    if args.judge is None or len(images) == 1:
        entry["worst"] = None
    return entry


def name_emotion(args, facts, cell, best_round, judge):
    """Ask the judge for the emotion class too, but only of the best picture of all rounds."""
    best = best_round.pictures[best_round.best]
    emotion = feedback.judge_emotion(judge, best.image)
    at = cell["best"]
    cell["rounds"][at["round"]]["images"][at["image"]]["emotion"] = emotion
    judgement = replace(best.judgement, emotion=emotion)
    save_picture(args, facts, best_round.prompt, best.seed, best.image, judgement)


def main(argv=None):
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    args = parse_args(argv)
    return cli.run_program(
        partial(run, args),
        f"stopped; the rounds and pictures finished so far are kept in {args.out}")


if __name__ == "__main__":
    sys.exit(main())

"""Draw pictures at a wanted valence and arousal, judge them, and improve the prompt (Algorithm 1).

    python sample.py --v 7 --a 3                        # the miniature, on any laptop
    python sample.py --v 7 --a 3 --prompt "a castle in the hills in the evening" --n 4
    python sample.py --v 7 --a 3 --rounds 3 --rewrite   # textual feedback: 3 rounds of 8 pictures
    python sample.py --grid 5                           # the valence-arousal plane as one picture
    python sample.py --play                             # the plane to click in, in a browser
    python sample.py --v 7 --a 3 --no-adapter           # the generator before reward feedback
    python sample.py --v 7 --a 3 --preset paper         # SD3.5-Medium and Qwen2.5-VL-7B, on a GPU

The target enters the prompt as numbers (`--form`). The judge says what valence and arousal it sees
and why; in each further round it has compared the best and the worst picture and rewritten the
prompt (feedback.py). A run is a folder: the PNGs, each with its prompt, V, A, seed, model and
judgement inside, run.json, contact.png, and index.html to look at.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

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
from parts import cli, hub, lora, page, pipeline, play, presets, server, sheets
from parts.cli import say
from parts.files import save_png
from parts.pipeline import PAPER, TINY, judge_of, load_generator, load_judge, name_of, to_images
from tiny import scenes

PRESETS = {  # The adapter is what reward feedback (train_gen.py) has changed in the generator.
    "tiny": {"model": TINY, "adapter": TINY / "adapter", "judge": TINY / "judge"},
    "paper": {"model": PAPER, "adapter": None, "judge": "Qwen/Qwen2.5-VL-7B-Instruct"},
}
PAPER_NEEDS = ("SD3.5-Medium from the hub (17 GB, licence to accept), Qwen2.5-VL-7B (17 GB) and a "
               "GPU with 48 GB, 24 GB with --offload, or 12 GB with --no-t5 --judge none")
DEFAULT_PROMPT = "a lighthouse on the sea coast in the evening"
STEPS = partial(tqdm, desc="drawing", unit="step", leave=False)
SAMPLING = {  # flag: default with --preset paper, with tiny, type, help
    "form": ("numbers", "numbers", tuple(data.TARGET_FORMS), "how the target enters the prompt"),
    "sample_steps": (25, 25, cli.integer(1, 1000), "[--num-inference-steps] steps of the sampler"),
    "guidance": (4.5, 4.5, cli.number(0, 100), "[--guidance-scale] classifier-free guidance"),
    "size": (512, 128, cli.picture_side, "side in pixels"),
    "seed": (0, 0, cli.integer(0, 2**62), "of the first picture; the next ones count up"),
    "micro": (8, 8, cli.integer(1, 1000), "pictures drawn at a time"),
}
FEEDBACK = {
    "rounds": (1, 1, cli.integer(1, 100), "the judge rewrites the prompt between two"),
    "tolerance": (0.0, 0.0, cli.number(0, 16), "a loss |ΔV| + |ΔA| that ends the rounds"),
    "readings": (1, 8, cli.readings, "mean of so many answers of the judge, or logits, or thought"),
    "result": ("best", "best", ("best", "last"), "the best picture of all rounds, or of the last"),
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
                       help="without emotion (default: %(default)s)")

    # 2. what draws and judges
    group = parser.add_argument_group("models")
    group.add_argument("--preset", choices=PRESETS, help=cli.PRESET_HELP)
    group.add_argument("--model", help="folder, .safetensors file or hub id, not the preset's")
    group.add_argument("--adapter", help="a LoRA's folder, file or hub id, or a run (default: "
                       "the miniature's)")
    group.add_argument("--no-adapter", action="store_true",
                       help="the generator as it was before reward feedback")
    group.add_argument("--text-encoders", help="folder or hub id, if --model is a single file")
    group.add_argument("--no-t5", action="store_true", help="without T5, which needs 9 GB")
    group.add_argument("--judge", help="folder, hub id or http://…/v1 of it, or none")
    group.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    group.add_argument("--encoders", choices=pipeline.ENCODERS, default="gpu",
                       help=f"{pipeline.ENCODERS_HELP} (default: gpu)")
    group.add_argument("--offload", action="store_true", help="judge and generator take turns on "
                       "the GPU and wait in the host's memory")
    group.add_argument("--compile", action="store_true", help="the generator by torch.compile: "
                       "needs a C++ compiler and a minute")

    # 3. how, and where the result goes
    cli.add_settings(parser.add_argument_group("sampling"), SAMPLING)
    group = parser.add_argument_group("feedback")
    cli.add_settings(group, FEEDBACK)
    group.add_argument("--n", "--images-per-round", type=cli.integer(1, 1000),
                       help="pictures a round (default: 1, or 8 with --rounds)")
    group.add_argument("--rewrite", action="store_true", help="the judge writes the first too")
    group.add_argument("--questions", type=feedback.QUESTIONS, metavar="FILE",
                       help="JSON with other questions to the judge, see docs/commands.md")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, help="folder (default: in out/, named after the target)")
    group.add_argument("--json", action="store_true", help="print run.json and nothing else")
    group.add_argument("--play", action="store_true", help="serve a page to click targets in, "
                       "which begins with --v, --a and --prompt")
    server.add_port(group)
    args = presets.parse_settings(parser, SAMPLING | FEEDBACK, argv)
    return complete(args, parser.error)


def complete(args, refuse):
    """Fill in the defaults that depend on other flags; refuse flags that do not go together."""
    if args.play and (args.grid or args.out or args.json):
        refuse("--play: shows its pictures in a browser; leave out --grid, --out and --json")
    if not (args.play or args.grid) and (args.v is None or args.a is None):
        refuse("give a target: --v and --a, each 1..9 (or --grid 5 for the whole plane)")
    if args.grid and not (args.v is None and args.a is None):
        refuse("--grid: has all targets of the plane; leave out --v and --a")
    if args.adapter and args.no_adapter:
        refuse("--adapter and --no-adapter: give one of them")
    args.n = args.n or (8 if args.rounds > 1 else 4 if args.play else 1)
    if (args.rounds > 1 or args.play) and args.n < 2:
        refuse(f"--n {args.n}: expected 2 or more, as feedback compares the best and the worst")
    preset = PRESETS[args.preset]
    # what is unlike the usual, for the folder's name; of a path the end tells it from others
    unlike = ["no-adapter" if args.no_adapter else (args.adapter or "")[-40:]]
    # The preset's adapter changes the preset's own generator and fits no other.
    if not (args.adapter or args.no_adapter or args.model):
        args.adapter = preset["adapter"]
    args.model = args.model or preset["model"]
    args.judge = args.judge or preset["judge"]
    feeds_back = args.rounds > 1 or args.rewrite
    if args.judge == "none" and feeds_back:
        refuse("--judge none: --rounds and --rewrite need a judge")
    if args.encoders == "leave" and feeds_back:
        refuse("--encoders leave: --rounds and --rewrite write prompts later on; give cpu")
    if args.encoders == "leave" and args.play:
        refuse("--encoders leave: --play asks for prompts later on; give cpu")
    # A grid without feedback only shows its pictures, so nobody need judge them.
    if args.judge == "none" or (args.grid and not feeds_back):
        args.judge = None
    if args.out is None and not args.play:
        name = f"grid{args.grid}" if args.grid else f"v{args.v:g}_a{args.a:g}"
        name += f"_seed{args.seed}"
        if args.prompt != DEFAULT_PROMPT:  # a folder for each prompt
            unlike.append(args.prompt[:40])
        words = [re.sub(r"\W+", "-", text.lower()).strip("-") for text in unlike if text]
        args.out = Path("out") / "_".join([name, *words])
    return args


# --------------------------------------------------------------------------------------------------
# The run


def run(args):
    started = time.perf_counter()
    feedback.PROMPTS.update(args.questions or {})

    # 1. load the models, but first refuse what they are not needed for
    check_machine(args)
    play_server = play.open_page(args.port) if args.play else None
    judge, generator = load(args)
    settings = {"model": generator.name, "steps": args.sample_steps, "guidance": args.guidance,
                "size": args.size}
    options = feedback.RefineOptions(rewrite=args.rewrite, tolerance=args.tolerance, form=args.form,
                                     seed=args.seed, readings=args.readings)
    if args.play:  # a browser chooses the targets
        return play.serve(play_server, play.Studio(
            args, settings, args.judge, feedback.LONGEST_PROMPT, partial(draw, generator, args),
            partial(feedback.refine_rounds, judge=judge), partial(feedback.judge_emotion, judge),
            options))

    # 2. the targets, a grid's row by row from the highest arousal down, and the head of run.json
    levels = [1 + 8 * i / (args.grid - 1) for i in range(args.grid)] if args.grid else []
    targets = [(v, a) for a in reversed(levels) for v in levels] or [(args.v, args.a)]
    if args.encoders == "leave":
        prompts = [data.TARGET_FORMS[args.form](args.prompt, v, a) for v, a in targets]
        pipeline.encode_and_free(generator, prompts)
    record = {
        "prompt": args.prompt, **settings, "judge": args.judge,
        "seed": args.seed, "rounds": args.rounds, "images_per_round": args.n,
        "form": args.form, "rewrite": args.rewrite, "tolerance": args.tolerance,
        "readings": args.readings, "result": args.result, "questions": args.questions,
        "device": args.device, "torch": torch.__version__, "grid": None, "cells": [], "seconds": {}}

    # 3. for each target draw, judge, and improve the prompt (Algorithm 1)
    # With one picture a target, a row of the grid is one batch, drawn ahead of its targets.
    one_each = args.grid and judge is None and args.n == 1
    ahead = {}
    bar = tqdm(targets, desc="grid", unit="target", leave=False, disable=args.grid is None)
    for index, (v, a) in enumerate(bar):
        if one_each and index % args.grid == 0:
            row = targets[index:index + args.grid]
            ahead, row_seconds = feedback.timed(draw_row, generator, args, row)
        facts = {"valence": v, "arousal": a, **settings}
        generate = partial(draw_and_save, generator, args, ahead, facts)
        rounds = []
        cell = {"v": v, "a": a, "best": None, "rounds": []}
        record["cells"].append(cell)
        for finished in feedback.refine_rounds(
                args.prompt, v, a, generate, judge, args.rounds, args.n, options):
            if one_each:
                finished.seconds["draw"] += row_seconds / args.grid  # its share of the row's
            rounds.append(finished)
            cell["rounds"].append(save_round(args, facts, finished))
            r, i = feedback.best_of(rounds, args.result)
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
    text = json.dumps(record, indent=1)  # in ASCII, for a pipe of any encoding
    print(text if args.json else page.summary(record, args.out))


def check_machine(args):
    """Refuse, before models are loaded, what cannot be done here."""
    args.device = cli.device_of(args.device)
    if not args.play:  # which writes nothing
        page.check_folder(args.out, args.prompt)
    if args.preset == "tiny" and (remark := scenes.remark_on(args.prompt)):
        say(remark)


def load(args):
    """(the judge as feedback.py asks it, or None; the Generator)."""
    hub.fetch(lora.files_with_base(args.judge), pipeline.files_of_generator(
        args.model, not args.no_t5, args.text_encoders, args.adapter))
    judge = None
    if args.judge is not None:
        model = load_judge(args.judge, args.device, args.size, args.offload)
        # A rewrite, with its analysis, is the longest answer that is asked for.
        judge = judge_of(model, max_new_tokens=feedback.REWRITE_LIMIT, progress=not args.play,
                         offload=args.device if args.offload else None)
        args.judge = name_of(args.judge)  # as the pictures and run.json tell it
    generator = load_generator(
        args.model, args.device, use_t5=not args.no_t5, encoders_from=args.text_encoders,
        encoders=args.encoders, adapter=args.adapter, offload=args.offload)
    if args.compile:
        for block in generator.mmdit.joint_blocks:
            block.compile()
    pipeline.check_size(generator, args.size, args.model)
    say(f"{pipeline.described(generator)} on {args.device}, {args.size} px, {args.sample_steps} "
        f"steps"
        + (f"; --preset paper would need {PAPER_NEEDS}" if args.preset == "tiny" else ""))
    return judge, generator


# --------------------------------------------------------------------------------------------------
# Drawing and saving


def draw(generator, args, prompts, seeds, progress=STEPS):
    """PIL images of prompts, each with its seed, in one batch. progress: wraps the steps."""
    return to_images(generator.draw(prompts, seeds, size=args.size, steps=args.sample_steps,
                                    guidance=args.guidance, progress=progress))


def draw_row(generator, args, targets):
    """{prompt: PIL image} of a row of a grid, all of one seed: only the emotion differs."""
    prompts = [data.TARGET_FORMS[args.form](args.prompt, v, a) for v, a in targets]
    images = []
    for start in range(0, len(prompts), args.micro):
        batch = prompts[start:start + args.micro]
        images += draw(generator, args, batch, [args.seed] * len(batch))
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
    said = page.judgement_facts(args.judge, judgement)
    save_png(image, args.out / name, prompt=prompt, seed=seed, **facts, **said)
    return name


def save_round(args, facts, finished):
    """Write a round's pictures again, now with their judgements; returns its part of run.json."""
    files = [save_picture(args, facts, finished.prompt, picture.seed, picture.image,
                          picture.judgement) for picture in finished.pictures]
    return page.round_entry(finished, files, args.judge)


def name_emotion(args, facts, cell, best_round, judge):
    """Ask the judge for the emotion class too, but only of the result."""
    best = best_round.pictures[best_round.best]
    emotion = feedback.judge_emotion(judge, best.image)
    at = cell["best"]
    cell["rounds"][at["round"]]["images"][at["image"]]["emotion"] = emotion
    judgement = replace(best.judgement, emotion=emotion)
    save_picture(args, facts, best_round.prompt, best.seed, best.image, judgement)


def main(argv=None):
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    args = parse_args(argv)
    kept = "" if args.play else f"; what was finished is kept in {args.out}"
    return cli.run_program(partial(run, args), f"stopped{kept}")


if __name__ == "__main__":
    sys.exit(main())

"""Draw pictures at a wanted valence and arousal, judge them, and let the judge's words improve the prompt (Algorithm 1).

    python sample.py --v 7 --a 3                                   # the miniature, on any laptop
    python sample.py --v 7 --a 3 --prompt "a castle in the hills in the evening" --n 4
    python sample.py --v 7 --a 3 --rounds 3 --rewrite              # textual feedback: 3 rounds of 8 pictures
    python sample.py --grid 5                                      # the valence-arousal plane as one picture
    python sample.py --v 7 --a 3 --no-adapter                      # the generator before reward feedback
    python sample.py --v 7 --a 3 --preset paper                    # SD3.5-Medium and Qwen2.5-VL-7B, on a GPU

The target enters the prompt as words. The judge says what valence and arousal it sees and why; in each further round it has
compared the best and the worst picture and rewritten the prompt (feedback.py). A run is a folder: the PNGs, each with its
prompt, V, A, seed, model and judgement inside, run.json, contact.png, and index.html to look at.
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import feedback
from parts import page, weights
from parts.cli import UserError, device_of, say
from parts.files import save_png
from parts.pipeline import PAPER, TINY, load_generator, load_judge, name_of, to_images

PRESETS = {  # model, adapter trained by reward feedback, side in pixels, judge
    "tiny": (TINY, TINY / "adapter", 128, TINY / "judge"),
    "paper": (PAPER, None, 512, "Qwen/Qwen2.5-VL-7B-Instruct"),
}
PAPER_NEEDS = ("SD3.5-Medium from the hub (17 GB, licence to accept), Qwen2.5-VL-7B (17 GB) and a GPU with 48 GB, or 12 GB "
               "with --no-t5 --judge none")
DEFAULT_PROMPT = "a lighthouse on the sea coast in the evening"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def va_grid(pictures, levels, size):
    """One picture of n² PIL pictures, row by row from the highest arousal down, with both axes labelled."""
    n, margin, gap = len(levels), max(28, size // 4), max(2, size // 32)
    font = ImageFont.load_default(max(12, size // 9))
    side = n * size + (n - 1) * gap
    grid = Image.new("RGB", (margin + side + gap, side + margin + gap), "white")
    draw = ImageDraw.Draw(grid)
    centres = [i * (size + gap) + size / 2 for i in range(n)]
    for k, picture in enumerate(pictures):
        row, column = divmod(k, n)
        grid.paste(picture, (margin + column * (size + gap), gap + row * (size + gap)))
    for i, level in enumerate(levels):
        draw.text((margin + centres[i], side + gap + margin / 2), f"V {level:g}", "black", font, anchor="mm")
        draw.text((margin / 2, gap + centres[n - 1 - i]), f"A\n{level:g}", "black", font, anchor="mm", align="center")
    return grid


# ---------------------------------------------------------------------------------------------------------------------
# The program


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(say(f"error: {message}; see --help") or 2)  # one line, no usage
    parser.add_argument("--v", help="valence, 1 (unpleasant) to 9 (pleasant)")
    parser.add_argument("--a", help="arousal, 1 (calm) to 9 (excited)")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="what to draw, without emotion (default: %(default)s)")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="tiny: the miniature; paper: SD3.5-Medium")
    parser.add_argument("--model", help="folder, .safetensors file or hub id in place of the preset's model")
    parser.add_argument("--adapter", help="folder or hub id of an adapter that train_gen.py or peft wrote "
                                          "(default: the miniature has one, the paper's preset none)")
    parser.add_argument("--no-adapter", action="store_true", help="the generator as it was before reward feedback")
    parser.add_argument("--text-encoders", help="folder or hub id of the text encoders, if --model is a single file")
    parser.add_argument("--judge", help="folder or hub id of the judge in place of the preset's, or none")
    parser.add_argument("--no-t5", action="store_true", help="leave T5 out: less memory, long prompts read less well")
    parser.add_argument("--steps", type=int, default=25, help="steps of the sampler (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.5, help="classifier-free guidance (default: %(default)s)")
    parser.add_argument("--size", type=int, help="side in pixels (default: 128 for tiny, 512 for paper)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones count up")
    parser.add_argument("--rounds", type=int, default=1, help="rounds; between two, the judge rewrites the prompt")
    parser.add_argument("--n", "--images-per-round", type=int, help="pictures a round (default: 1, or 8 with --rounds)")
    parser.add_argument("--rewrite", action="store_true", help="the judge writes the first prompt too")
    parser.add_argument("--tolerance", type=float, default=0.0, metavar="LOSS", help="no further round once the judge "
                        "finds a picture so near: |ΔV| + |ΔA| (default: %(default)s)")
    parser.add_argument("--readings", type=int, default=1, help="answers of the judge whose mean is a picture's V and A "
                        "(default: %(default)s)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON file with other questions to the judge, by name: "
                        + ", ".join(feedback.PROMPTS))
    parser.add_argument("--grid", type=int, metavar="K", help="a labelled K×K picture of the valence-arousal plane")
    parser.add_argument("--out", type=Path, help="folder of the run (default: one in out/ named after target and seed)")
    parser.add_argument("--json", action="store_true", help="print run.json to standard output, nothing else")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn at a time (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--compile", action="store_true", help="the generator's blocks by torch.compile, which needs a C++ "
                        "compiler: a minute or so at first, for many pictures")
    parser.add_argument("--cuda-graphs", action="store_true", help="each step of the judge's answers as one CUDA graph")
    return parser.parse_args(argv)


def check(args):
    """Refuse senseless wishes before anything is loaded; fills in the preset's defaults. Raises UserError."""
    if args.grid is None:
        if args.v is None or args.a is None:
            raise UserError("give a target: --v and --a, each 1..9 (or --grid 5 for the whole plane)")
        try:
            args.v, args.a = data.check_va(args.v, args.a)
        except ValueError as error:
            raise UserError(f"--v, --a: {error}") from error
    elif not 2 <= args.grid <= 9:
        raise UserError(f"--grid {args.grid}: expected 2..9 rows and columns")
    if not args.prompt.strip() or len(args.prompt) > feedback.LONGEST_PROMPT:
        raise UserError(f"--prompt has {len(args.prompt):,} characters; give 1 to {feedback.LONGEST_PROMPT:,} "
                         f"(the text encoders read about 250 words)")
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt: {error.reason}; give it in UTF-8") from error
    if args.adapter and args.no_adapter:
        raise UserError("--adapter and --no-adapter: give one of them")
    model, adapter, size, judge = PRESETS[args.preset]
    args.adapter = None if args.no_adapter else args.adapter or (adapter if args.model is None else None)
    args.model, args.size, args.judge = args.model or model, args.size or size, args.judge or judge
    args.n = (8 if args.rounds > 1 else 1) if args.n is None else args.n
    for name, value, low, high in (
            ("steps", args.steps, 1, 1000), ("rounds", args.rounds, 1, 100), ("n", args.n, 1 + (args.rounds > 1), 1000),
            ("batch", args.batch, 1, 1000), ("readings", args.readings, 1, 100), ("tolerance", args.tolerance, 0, 16),
            ("guidance", args.guidance, 0, 100), ("seed", args.seed, 0, 2**62)):
        if not low <= value <= high:
            raise UserError(f"--{name} {value}: expected {low}..{high}"
                             + (" (best and worst are compared)" if name == "n" and args.rounds > 1 else ""))
    if args.judge == "none" and (args.rounds > 1 or args.rewrite):
        raise UserError("--judge none: --rounds and --rewrite need a judge")
    if args.judge == "none" or (args.grid and args.rounds == 1 and not args.rewrite):
        args.judge = None
    if args.prompts is not None:
        feedback.load_prompts(args.prompts)
    if args.size % 16 or not 16 <= args.size <= 4096:
        raise UserError(f"--size {args.size}: expected a multiple of 16, 16..4096")
    args.device = device_of(args.device)
    if args.cuda_graphs and not args.device.startswith("cuda"):
        raise UserError(f"--cuda-graphs: needs a GPU, the device is {args.device}")
    if args.out is None:
        args.out = Path("out") / (f"grid{args.grid}_seed{args.seed}" if args.grid else
                                  f"v{args.v:g}_a{args.a:g}_seed{args.seed}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        probe = args.out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot write there ({error.strerror}); choose another folder") from error


def run(args):
    started = time.perf_counter()
    model = None if args.judge is None else load_judge(args.judge, args.device, args.size)
    generator = load_generator(args.model, args.device, use_t5=not args.no_t5, encoders_from=args.text_encoders,
                               adapter=args.adapter)
    if args.compile:
        generator.mmdit.compile_blocks()
    if model is not None:
        model.graphs = args.cuda_graphs
    limit = generator.mmdit.config.positions * generator.mmdit.config.patch * generator.vae.factor
    if args.size > limit:
        raise UserError(f"--size {args.size}: {args.model} draws at most {limit} pixels")
    millions = weights.count_parameters(generator.mmdit) / 1e6
    say(f"{generator.name}: {millions:,.1f} M parameter generator on {args.device} "
        f"({str(generator.mmdit.pos_embed.dtype).removeprefix('torch.')}), {args.size} px, {args.steps} steps"
        + (f"; --preset paper would need {PAPER_NEEDS}" if args.preset == "tiny" else ""))
    judge = None if model is None else feedback.judge_of(model, max_new_tokens=feedback.REWRITE_LIMIT)
    levels = [1 + 8 * i / (args.grid - 1) for i in range(args.grid)] if args.grid else []
    targets = [(v, a) for a in reversed(levels) for v in levels] or [(args.v, args.a)]  # the highest arousal first
    facts = {"model": generator.name, "steps": args.steps, "guidance": args.guidance, "size": args.size}
    record = {"prompt": args.prompt, **facts, "judge": None if judge is None else name_of(args.judge), "seed": args.seed,
              "rounds": args.rounds, "images_per_round": args.n, "rewrite": args.rewrite, "tolerance": args.tolerance,
              "readings": args.readings, "device": args.device, "torch": torch.__version__, "grid": None, "cells": [],
              "seconds": {}}
    draw = partial(generator.draw, size=args.size, steps=args.steps, guidance=args.guidance,
                   progress=partial(tqdm, desc="drawing", unit="step", leave=False))
    ready = {}  # (prompt, seed): picture drawn ahead, as a grid's are, a row in one batch
    if args.grid and args.rounds == args.n == 1 and not args.rewrite:
        prompts = [data.with_words(args.prompt, v, a) for v, a in targets]
        for start in tqdm(range(0, len(prompts), args.grid), desc="grid", unit="row", leave=False):
            row = prompts[start:start + args.grid]  # one seed for all: only the emotion changes
            ready |= dict(zip([(prompt, args.seed) for prompt in row], to_images(draw(row, [args.seed] * len(row)))))
    best = []  # the best picture of each cell
    for v, a in tqdm(targets, desc="grid", unit="cell", leave=False, disable=args.grid is None or bool(ready)):
        cell = Cell(v, a, args, facts, record["judge"], partial(picture_of, draw, ready))
        record["cells"].append(cell.record)

        def report(finished, cell=cell):
            cell.add(finished)
            if not ready and (finished.next_prompt is None or not args.grid):
                record["seconds"] = seconds_of(record, time.perf_counter() - started)
                page.write(record, args.out)

        feedback.refine(args.prompt, v, a, cell.generate, judge, args.rounds, args.n, args.rewrite, args.tolerance,
                        args.seed, readings=args.readings, report=report)
        best.append(cell.finish(judge))
    if args.grid:
        record["grid"] = save_png(va_grid(best, levels, args.size), args.out / f"grid{args.grid}.png", prompt=args.prompt,
                                  seed=args.seed, **facts).name
    record["seconds"] = seconds_of(record, time.perf_counter() - started)
    page.write(record, args.out)
    say(latency(record))
    print(json.dumps(record, indent=1, ensure_ascii=False) if args.json else summary(record, args.out))


def picture_of(draw, ready, prompt, seeds):
    """PIL pictures of a prompt, one a seed: those that are ready, else drawn."""
    if all((prompt, seed) in ready for seed in seeds):
        return [ready[prompt, seed] for seed in seeds]
    return to_images(draw([prompt] * len(seeds), seeds))


class Cell:
    """One target of a run: its files, and its part of run.json."""

    def __init__(self, v, a, args, facts, judge, draw):
        self.args, self.facts, self.judge, self.draw = args, {"valence": v, "arousal": a, **facts}, judge, draw
        self.rounds, self.prefix = [], f"v{v:g}_a{a:g}_" if args.grid else ""
        self.record = {"v": v, "a": a, "best": None, "rounds": []}

    def save(self, image, number, prompt, seed, said=None):
        told = {} if said is None else {"judge": self.judge, "judged_valence": said.v, "judged_arousal": said.a,
                                        "judged_emotion": said.emotion, "reasoning": said.reasoning}
        return save_png(image, self.args.out / f"{self.prefix}round{number}_seed{seed}.png", prompt=prompt, seed=seed,
                        **self.facts, **told).name

    def generate(self, prompt, seeds):
        """Draw and keep at once: what happens while judging loses no picture."""
        if self.args.grid is None:
            say(f"round {len(self.rounds)}: {prompt}")
        images = []
        for start in range(0, len(seeds), self.args.batch):
            part = seeds[start:start + self.args.batch]
            images += self.draw(prompt, part)
            for image, seed in zip(images[start:], part):
                self.save(image, len(self.rounds), prompt, seed)
        return images

    def add(self, finished):
        """A finished round: write what was judged into its files."""
        pictures, judged = [], self.judge is not None
        for picture in finished.pictures:
            said = picture.judgement
            name = self.save(picture.image, len(self.rounds), finished.prompt, picture.seed, said if judged else None)
            pictures.append({"file": name, "seed": picture.seed, "v": said.v, "a": said.a, "emotion": said.emotion,
                             "reasoning": said.reasoning, "loss": None if said.v is None else picture.loss})
        self.rounds.append(finished)
        self.record["rounds"].append({
            "prompt": finished.prompt, "images": pictures, "best": finished.best if judged else None,
            "worst": finished.worst if judged and len(pictures) > 1 else None, "analysis": finished.analysis,
            "next_prompt": finished.next_prompt, "note": finished.note, "seconds": finished.seconds})
        r, i = feedback.best_of(self.rounds)
        if judged:
            self.record["best"] = {"round": r, "image": i}
            if self.args.grid is None and self.args.rounds > 1:
                loss, least = finished.pictures[finished.best].loss, self.rounds[r].pictures[i].loss
                say("\n    ".join(filter(None, (f"    loss {loss:.2f}, best so far {least:.2f} (round {r})", finished.note,
                                                finished.analysis))))

    def finish(self, judge):
        """The best picture of all rounds, whose emotion class is asked for as well."""
        r, i = feedback.best_of(self.rounds)
        best = self.rounds[r].pictures[i]
        if judge is not None:
            emotion = feedback.judge_images(judge, [best.image], ("class",))[0].emotion
            self.record["rounds"][r]["images"][i]["emotion"] = emotion
            self.save(best.image, r, self.rounds[r].prompt, best.seed, replace(best.judgement, emotion=emotion))
        return best.image


def seconds_of(record, total):
    """Seconds of the whole run, by part."""
    rounds = [r["seconds"] for cell in record["cells"] for r in cell["rounds"]]
    return {part: sum(s[part] for s in rounds) for part in ("draw", "judge", "rewrite")} | {"total": total}


def latency(record):
    """What appendix C measures, of this run, in a line."""
    rounds = [r["seconds"] for r in record["cells"][0]["rounds"]]
    text = f"{rounds[0]['draw']:.1f} s for the first {record['images_per_round']} pictures"
    if record["judge"] is not None:
        text += f", {rounds[0]['judge'] + rounds[0]['rewrite']:.1f} s to judge them and rewrite the prompt"
    if len(rounds) > 1:
        text += f", {sum(sum(s.values()) for s in rounds):.1f} s for {len(rounds)} rounds"
    return f"{text}; {record['seconds']['total']:.1f} s in all with loading"


def summary(record, folder):
    """The files of a run, the picture nearest to its target first."""
    if record["grid"]:
        return f"{folder / record['grid']}\n{folder / 'index.html'}"
    images = [image for r in record["cells"][0]["rounds"] for image in r["images"]]
    images.sort(key=lambda image: 16.0 if image["loss"] is None else image["loss"])
    lines = []
    for image in images:
        seen = "" if record["judge"] is None else "  its V-A answer cannot be read" if image["v"] is None else (
            f"  V {image['v']:.2f}  A {image['a']:.2f}")
        lines.append(f"{folder / image['file']}{seen}" + (f"  {image['emotion']}" if image["emotion"] else ""))
    if images[0]["reasoning"]:
        lines.insert(1, f"    {images[0]['reasoning']}")
    return "\n".join([*lines, str(folder / "index.html")])


def main(argv=None):
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    args = parse_args(argv)
    try:
        check(args)
        run(args)
    except (UserError, OSError) as error:
        say(f"error: {error}")
        return 2
    except torch.OutOfMemoryError:
        say(f"error: the GPU has too little memory for {args.model} at {args.size} px; try --no-t5, a smaller --size or "
            f"--device cpu")
        return 2
    except KeyboardInterrupt:
        say(f"stopped; the rounds and pictures finished so far are kept in {args.out}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

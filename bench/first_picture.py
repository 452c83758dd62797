"""Seconds from `python sample.py` to the picture on the disk, and where they go, beside diffusers' shortest script.

    python -m bench.first_picture  # half a minute on 2 idle cores
    python -m bench.first_picture --steps 2 --size 64 --repeats 1  # some seconds

Each run is a process of its own, the file system's cache warm. Ours draws one picture of the miniature (without its
adapter, which the peer has not), asks the judge for its valence, arousal and class, and writes picture, page and record.
The peer's script loads the same folder by `StableDiffusion3Pipeline`, draws one picture of the same prompt and saves it:
no judge, no page. Their pictures are compared. float32, on the CPU.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np

import data
import sample
from bench import timing
from parts.files import open_picture
from parts.pipeline import TINY

ROOT = Path(__file__).resolve().parent.parent
OURS = """
import sys, time
began = float(sys.argv.pop(1))
import sample
imported = time.time()
load = sample.load
def timed(args):
    global loaded
    models = load(args)
    loaded = time.time()
    return models
sample.load = timed
code = sample.main(sys.argv[1:])
print(imported - began, loaded - imported, time.time() - loaded)
sys.exit(code)
"""
PEER = """
import sys
import torch
from diffusers import StableDiffusion3Pipeline
folder, prompt, steps, size, out = sys.argv[1:]
pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32)
image = pipeline(prompt, num_inference_steps=int(steps), guidance_scale=4.5, height=int(size), width=int(size),
                 generator=torch.Generator().manual_seed(0), max_sequence_length=0).images[0]
image.save(out)
"""
PARTS = ("imports", "loading", "drawing", "judging", "writing")


def ours(args, out):
    """{part: seconds} of a run of sample.py, the interpreter's start among its imports."""
    flags = ["--v", "7", "--a", "3", "--no-adapter", "--sample-steps", str(args.steps), "--size", str(args.size), "--out", str(out)]
    command = [sys.executable, "-c", OURS, str(time.time()), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imports, loading, rest = map(float, done.stdout.splitlines()[-1].split())
    seconds = json.loads((out / "run.json").read_text(encoding="utf-8"))["seconds"]
    drawing, judging = seconds["draw"], seconds["judge"]
    return dict(zip(PARTS, (imports, loading, drawing, judging, rest - drawing - judging), strict=True))


def main(argv=None):
    parser = timing.make_parser(__doc__, repeats=5)
    parser.add_argument("--steps", type=int, default=25, help="of the sampler (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="in pixels (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.steps, args.size, args.repeats, args.threads) < 1 or args.size % 16 or args.size > 128:
        parser.error("all must be at least 1, and --size a multiple of 16 up to 128")
    found = []  # {part: seconds} of each of our runs
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prompt = data.with_numbers(sample.DEFAULT_PROMPT, 7, 3)
        peer = [sys.executable, "-c", PEER, str(TINY), prompt, str(args.steps), str(args.size), str(folder / "peer.png")]
        paths = {"diffusers": lambda: subprocess.run(peer, cwd=ROOT, capture_output=True, check=True),
                 "ours": lambda: found.append(ours(args, folder / "ours"))}
        if args.profile:
            return timing.profile(paths["ours"])
        for path in paths.values():  # the files are read once before
            path()
        found.clear()
        seconds = timing.in_turn(paths, args.repeats)
        pictures = [np.asarray(open_picture(folder / name), int) for name in ("peer.png", "ours/round0_seed0.png")]
        apart = int(np.abs(pictures[0] - pictures[1]).max())
    row = timing.row(f"from the command to one picture of {args.size} px, {args.steps} steps; ours judges it, too",
                     f"diffusers {diffusers.__version__}", *seconds.values())
    parts = {part: statistics.median(run[part] for run in found) for part in PARTS}
    note = "Ours: " + ", ".join(f"{part} {value:.2f} s" for part, value in parts.items())
    return timing.show([row], args, f"{note}. The two pictures are {apart} of 255 apart.", apart <= 2)


if __name__ == "__main__":
    sys.exit(main())

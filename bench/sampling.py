"""Whole pictures of the miniature against diffusers, from its own folder: texts, steps with guidance, autoencoder.

    python bench/sampling.py             # half a minute on 2 idle cores
    python bench/sampling.py --steps 2 --pictures 2 --size 64 --repeats 1

Both draw from the same noise, with `diffusers.StableDiffusion3Pipeline` on tiny/weights for the peer; their pictures may
differ by 2 of 255 levels. Then they take turns in one process. float32, on the CPU, which must be idle.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import diffusers
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `python bench/sampling.py` finds sample
import data
import sample


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, about in (("pictures", 8, "drawn together"), ("steps", 10, "of the sampler"),
                                 ("size", 128, "in pixels"), ("repeats", 7, "times, in turn"), ("threads", 2, "of torch")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(vars(args).values()) < 1 or args.size % 16 or args.size > 128:
        parser.error("all must be at least 1, and --size a multiple of 16 up to 128")
    torch.set_num_threads(args.threads)
    generator = sample.load_generator(sample.TINY)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        str(sample.TINY), text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [data.with_words(sample.DEFAULT_PROMPT, 1 + 8 * i / args.pictures, 5) for i in range(args.pictures)]
    noise = torch.randn(args.pictures, 16, args.size // 8, args.size // 8, generator=torch.Generator().manual_seed(0))
    paths = {"diffusers": lambda: pipeline(
                 prompts, num_inference_steps=args.steps, guidance_scale=4.5, height=args.size, width=args.size,
                 latents=noise, output_type="pt", max_sequence_length=0).images * 255,
             "ours": lambda: generator.draw(prompts, range(args.pictures), args.size, args.steps, noise=noise).float()}
    gap = float((paths["diffusers"]() - paths["ours"]()).abs().max())
    seconds = {name: [] for name in paths}
    for name in tqdm(list(paths) * args.repeats, unit="run"):
        started = time.perf_counter()
        paths[name]()
        seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    work = f"{args.pictures} pictures of {args.size} px, {args.steps} steps, guidance 4.5"
    print(f"| {work} (torch {torch.__version__}, diffusers {diffusers.__version__}, {args.threads} threads) | s | ratio |\n"
          "| --- | --- | --- |")
    for name, value in median.items():
        print(f"| {name} | {value:.3g} | {median['diffusers'] / value:.2f} |")
    print(f"Greatest difference of a pixel: {gap:.2f} of 255.")
    return int(gap > 2)


if __name__ == "__main__":
    sys.exit(main())

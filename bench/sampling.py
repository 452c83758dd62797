"""Whole pictures of the miniature against diffusers, from its own folder: texts, steps with guidance, autoencoder.

    python -m bench.sampling  # half a minute on 2 idle cores
    python -m bench.sampling --steps 2 --pictures 2 --size 64 --repeats 1  # some seconds

Both draw from the same noise, with `diffusers.StableDiffusion3Pipeline` on tiny/weights for the peer; their pictures may
differ by 2 of 255 levels. Then they take turns in one process. The share is of the rate of one large matrix product,
measured in the same run, by the FLOP of all parts. float32, on the CPU, which must be idle.
"""

import sys

import diffusers
import torch

import data
import sample
from bench import timing
from parts.pipeline import TINY, load_generator


def make_paths(args):
    """{name: draw() -> pictures [B,3,H,W] of 0..255} of the peer and ours."""
    generator = load_generator(TINY)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        str(TINY), text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [data.with_words(sample.DEFAULT_PROMPT, 1 + 8 * i / args.pictures, 5) for i in range(args.pictures)]
    noise = torch.randn(args.pictures, 16, args.size // 8, args.size // 8, generator=torch.Generator().manual_seed(0))
    return {"diffusers": lambda: pipeline(
                prompts, num_inference_steps=args.steps, guidance_scale=4.5, height=args.size, width=args.size,
                latents=noise, output_type="pt", max_sequence_length=0).images * 255,
            "ours": lambda: generator.draw(prompts, range(args.pictures), args.size, args.steps, noise=noise).float()}


def main(argv=None):
    parser = timing.make_parser(__doc__, repeats=7)
    for name, default, about in (("pictures", 8, "drawn together"), ("steps", 10, "of the sampler"),
                                 ("size", 128, "in pixels")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.pictures, args.steps, args.size, args.repeats, args.threads) < 1 or args.size % 16 or args.size > 128:
        parser.error("all must be at least 1, and --size a multiple of 16 up to 128")
    torch.set_num_threads(args.threads)
    paths = make_paths(args)
    if args.profile:
        return timing.profile(paths["ours"])
    gap = float((paths["diffusers"]() - paths["ours"]()).abs().max())
    seconds = timing.in_turn(paths, args.repeats)
    flop, rate = timing.flop_of(paths["ours"]), timing.matmul_rate()
    row = timing.row(f"{args.pictures} pictures of {args.size} px, {args.steps} steps, guidance 4.5",
                     f"diffusers {diffusers.__version__}", *seconds.values(),
                     share=timing.share(flop, seconds["ours"], rate, "the matmul rate"))
    if timing.usual(parser, args):
        row.asked = "ratio ≥ 1.05"
    note = (f"{flop / 1e9:,.0f} GFLOP; matmul rate {rate / 1e9:,.0f} GFLOP/s. Greatest difference of a pixel: {gap:.2f} "
            f"of 255.")
    return timing.show([row], args, note, gap <= 2)


if __name__ == "__main__":
    sys.exit(main())

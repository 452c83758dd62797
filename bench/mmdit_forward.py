"""The MMDiT's forward pass against diffusers, and against the matrix products that it cannot do without.

    python -m bench.mmdit_forward  # two minutes on 2 idle cores, 9 GB
    python -m bench.mmdit_forward --blocks 2 --heads 2 --latent 8 --text 5 --context 32  # a second

Random weights of SD3.5-Medium's width in `--blocks` blocks, the last one included, float32, on the CPU. Both get the same
weights, through diffusers' layout, and their outputs are compared; then they take turns in one process with the products
alone: torch's F.linear at every shape that a pass has. Ours is timed with its weights laid out, as sample.py has them for
all steps of a picture (the copy is made before), and as they lie. The share is that of the products' own speed which ours
reaches with all it does, attention included: its FLOP are counted with the linear layers'. The machine must be idle.
"""

import copy
import statistics
import sys

import diffusers
import torch
import torch.nn.functional as F

import mmdit
from bench import timing
from parts import layouts, ops


def make_models(args):
    """(ours, diffusers' with the same random weights)."""
    torch.manual_seed(0)
    config = mmdit.MMDiTConfig(depth=args.blocks, heads=args.heads, dual_blocks=tuple(range(args.blocks - 1)),
                               context_dim=args.context, positions=192)
    ours = mmdit.MMDiT(config).eval()
    for p in ours.parameters():
        p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.normal_(0.5, 0.1)
    ours.pos_embed.normal_()
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=config.sample_size, patch_size=config.patch, in_channels=config.channels, num_layers=config.depth,
        attention_head_dim=config.head_dim, num_attention_heads=config.heads, joint_attention_dim=config.context_dim,
        caption_projection_dim=config.width, pooled_projection_dim=config.pooled_dim, out_channels=config.channels,
        pos_embed_max_size=config.positions, dual_attention_layers=config.dual_blocks, qk_norm="rms_norm").eval()
    state = {name: torch.cat(list(parts)) for name, parts in layouts.mmdit_views(ours).items()}
    theirs.load_state_dict(state)
    return ours, theirs


def products_of(model, inputs):
    """A function that computes the linear layers of one pass and nothing else, on random numbers of their shapes."""
    shapes, hooks = [], []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            hooks.append(layer.register_forward_hook(
                lambda layer, given, out: shapes.append((out.numel() // out.shape[-1], layer))))
    model(*inputs)
    for hook in hooks:
        hook.remove()
    rows = {(n, layer.in_features): torch.randn(n, layer.in_features) for n, layer in shapes}

    def products():
        for n, layer in shapes:
            F.linear(rows[n, layer.in_features], layer.weight, layer.bias)

    return products


def add_arguments(parser, text=333):
    for name, default, about in (
            ("blocks", 4, "of the model; all but the last have dual attention"), ("heads", 24, "of 64 channels"),
            ("latent", 64, "side, an eighth of the picture's"), ("text", text, "tokens"),
            ("context", 4096, "width of the text"), ("batch", 2, "pictures")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} (default: %(default)s)")


def checked(parser, argv):
    args = parser.parse_args(argv)
    if min(x for x in vars(args).values() if type(x) is int) < 1 or args.blocks < 2 or args.latent % 2:
        parser.error("all must be at least 1, --blocks at least 2 and --latent even")
    torch.set_num_threads(args.threads)
    return args


def make_inputs(args, config):
    """(latents, timestep, context, pooled) as MMDiT.forward takes them."""
    B = args.batch
    return (torch.randn(B, config.channels, args.latent, args.latent), torch.full((B,), 500.0),
            torch.randn(B, args.text, args.context), torch.randn(B, config.pooled_dim))


def work(args):
    return (f"{args.blocks} blocks of width {64 * args.heads}, {8 * args.latent} px: {args.latent**2 // 4:,} + {args.text} "
            f"tokens, batch {args.batch}")


@torch.no_grad()
def main(argv=None):
    parser = timing.make_parser(__doc__)
    add_arguments(parser)
    args = checked(parser, argv)
    ours, theirs = make_models(args)
    inputs = latents, timestep, context, pooled = make_inputs(args, ours.config)
    laid_out = copy.deepcopy(ours)
    if args.profile:
        with ops.fast_linears(laid_out):
            return timing.profile(lambda: laid_out(*inputs))
    products = products_of(ours, inputs)
    flop, linear = timing.flop_of(lambda: ours(*inputs)), timing.flop_of(products)
    paths = {"diffusers": lambda: theirs(latents, context, pooled, timestep, return_dict=False)[0],
             "laid out": lambda: laid_out(*inputs), "as they lie": lambda: ours(*inputs), "products": products}
    with ops.fast_linears(laid_out):
        outputs = [paths[name]() for name in list(paths)[:3]]  # the first pass makes the copies
        seconds = timing.in_turn(paths, args.repeats)
    rows, rate = [], linear / statistics.median(seconds["products"])
    for name, about in (("laid out", ""), ("as they lie", ", weights as for training")):
        share = timing.share(flop, seconds[name], rate, "F.linear at its shapes")
        rows.append(timing.row(f"MMDiT forward{about}, {work(args)}", f"diffusers {diffusers.__version__}",
                               seconds["diffusers"], seconds[name], share=share))
    if timing.usual(parser, args):
        rows[0].asked = "ratio ≥ 1.05, share ≥ 0.9"
    gap = max(float((out - outputs[0]).abs().max() / outputs[0].abs().max()) for out in outputs[1:])
    note = (f"{flop / 1e9:,.0f} GFLOP, of which {linear / 1e9:,.0f} in linear layers, which alone ran at {rate / 1e9:,.0f} "
            f"GFLOP/s. Greatest difference to diffusers, of its greatest value: {gap:.1e}.")
    return timing.show(rows, args, note, gap < 1e-4)


if __name__ == "__main__":
    sys.exit(main())

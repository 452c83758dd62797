"""Draw cases by any method from its published weights: ours, and those of the paper's tables.

    python -m evaluation draw --method flux --cases cases.jsonl --out pictures/FLUX
    torchrun --nproc-per-node 8 -m evaluation draw --method sd35-large --cases cases.jsonl --out …
    python -m evaluation draw --method emoticrafter --weights FILE --cases cases.jsonl --out …
    python -m evaluation draw --method emoedit --weights FILE --sources DIR --cases … --out …

Each picture is OUT/<id>.png, as `python -m evaluation run --images OUT` and the rating page read
them; several processes share the cases, and the same command goes on with those that are missing.
Methods that take a text get the target as words (--form), EmoEdit the class, EmotiCrafter the
numbers. EmoEdit changes a picture: the dataset's own, which the cases name, or those of --sources,
such as `--method sd35 --form neutral` has drawn. OUT/draw.json says how it was done, and how long a
picture took.
"""

import shlex
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

import data
from evaluation.cases import digest_of, digest_of_files, load_cases, pictures_of, seeds_of
from parts import cli, hub, lora, pipeline, weights
from parts.cli import UserError, integer, number
from parts.files import (
    append_rows,
    claim,
    open_picture,
    read_json,
    read_records,
    save_png,
    write_json,
)
from parts.pipeline import PAPER, TINY, load_generator, to_images

NEUTRAL = "neutral"  # does not tell the target
FORMS = data.TARGET_FORMS | {NEUTRAL: lambda prompt, v, a: prompt}


# --------------------------------------------------------------------------------------------------
# The methods


@dataclass(frozen=True)
class Method:
    """How a method is loaded and what it gets."""
    model: str  # folder or hub id of its generator
    load: object  # (args, device) -> an object with `draw`, as those of baselines/ have it
    form: str = "words"  # how the prompt tells the target, unless --form says otherwise
    weights: bool = False  # has a file of its own beside the generator: --weights
    edits: bool = False  # changes a picture that is there


class OurGenerator:
    """A generator of ours in the form of those of baselines/."""

    def __init__(self, args, device):
        hub.fetch(pipeline.files_of_generator(args.model, adapter=args.adapter))
        self.generator = load_generator(args.model, device, adapter=args.adapter,
                                        encoders=args.encoders)
        self.size = 128 if Path(args.model).resolve() == TINY else 512
        self.steps = 25
        self.guidance = 4.5

    def draw(self, cases, seeds, size=None, steps=None, guidance=None, progress=iter):
        prompts = [case.prompt for case in cases]
        return self.generator.draw(prompts, seeds, size or self.size, steps or self.steps,
                                   self.guidance if guidance is None else guidance,
                                   progress=progress)

    @property
    def network(self):
        return self.generator.mmdit


def load_flux(args, device):
    from baselines.flux import Flux, memory
    if device.type == "cuda":
        plan = memory(encoders=args.encoders, offload=args.offload)
        cli.say(f"FLUX.1's weights in bfloat16: on the GPU {plan['encoding']:.1f} GiB while prompts"
                f" are encoded and {plan['drawing']:.1f} while pictures are drawn, in the host's "
                f"memory {plan['host']:.1f}; --encoders leave and --offload need less of the GPU")
    return Flux.from_pretrained(args.model, device, encoders=args.encoders, offload=args.offload)


def load_sdxl(args, device):
    from baselines.unet import SDXL
    return SDXL.from_pretrained(args.model, device)


def load_emoticrafter(args, device):
    from baselines.emoticrafter import EmotiCrafter
    return EmotiCrafter.from_pretrained(args.weights, device, sdxl=args.model)


def load_emoedit(args, device):
    from baselines.emoedit import EmoEdit
    return EmoEdit.from_pretrained(args.weights, device, editor=args.model, encoder=args.clip)


METHODS = {
    "ours": Method(PAPER, OurGenerator, "numbers"),
    "sd35": Method(PAPER, OurGenerator),
    "sd35-large": Method("stabilityai/stable-diffusion-3.5-large", OurGenerator),
    "flux": Method("black-forest-labs/FLUX.1-dev", load_flux),
    "flux-schnell": Method("black-forest-labs/FLUX.1-schnell", load_flux),
    "sdxl": Method("stabilityai/stable-diffusion-xl-base-1.0", load_sdxl),
    "emoticrafter": Method("stabilityai/stable-diffusion-xl-base-1.0", load_emoticrafter,
                           NEUTRAL, weights=True),
    "emoedit": Method("timbrooks/instruct-pix2pix", load_emoedit, NEUTRAL, weights=True,
                      edits=True),
}


# --------------------------------------------------------------------------------------------------
# The cases as a method gets them


def cases_of(cases, form, sources):
    """baselines' Cases, whose pictures are still paths. sources {id: path}."""
    from baselines.case import Case
    return [Case(FORMS[form](case.neutral, case.v, case.a), case.v, case.a, case.label,
                 sources.get(case.id)) for case in cases]


def find_sources(args, cases):
    """{id: path} of the pictures that an editor changes. UserError for missing ones."""
    ids = [case.id for case in cases]
    if args.sources:
        return dict(zip(ids, pictures_of(args.sources, cases), strict=True))
    missing = [case.id for case in cases if case.source is None or not case.source.is_file()]
    if missing:
        raise UserError(f"{args.cases}: {len(missing)} of {len(cases)} cases have no source, such "
                        f"as {missing[0]}; --method {args.method} changes a picture: give "
                        f"--sources DIR with <id>.png, or write the cases with `evaluation cases "
                        f"--data`")
    return {case.id: case.source for case in cases}


# --------------------------------------------------------------------------------------------------
# The program


def open_folder(args, command, cases, sources):
    """Write the facts of the run to OUT/draw.json. UserError if OUT has pictures of another one."""
    facts = {"command": command, "method": args.method, "model": args.model,
             "adapter": args.adapter, "weights": args.weights and str(args.weights),
             "sources": sources_told(args), "form": args.form, "size": args.size,
             "steps": args.sample_steps, "guidance": args.guidance, "seed": args.seed,
             "cases": str(args.cases), "cases_digest": digest_of(cases), "count": len(cases)}
    if sources:
        facts |= {"pictures": digest_of_files(sources.values()), "clip": args.clip}
    before = claim(args.out / "draw.json", facts, "run of evaluation draw")
    write_json(args.out / "draw.json", before | facts)


def add_facts(args, **facts):
    path = args.out / "draw.json"
    write_json(path, read_json(path) | facts)


def sources_told(args):
    """Where the pictures are from that an editor changes, for tables; None for other methods."""
    if not METHODS[args.method].edits:
        return None
    return str(args.sources) if args.sources else "the dataset's own pictures"


def draw(args, processes, command):
    # 1. the cases, and the folder that they are drawn into
    method = METHODS[args.method]
    check(args, method)
    cases = load_cases(args.cases)
    sources = find_sources(args, cases) if method.edits else {}
    given = cases_of(cases, args.form, sources)
    if processes.first:
        open_folder(args, command, cases, sources)
    processes.wait()
    # Shared before it is asked what is missing, which another process may be drawing by now.
    mine = [i for i in range(processes.rank, len(cases), processes.world)
            if not (args.out / f"{cases[i].id}.png").exists()]

    # 2. the pictures
    if mine:
        model = method.load(args, processes.device)
        if processes.first:
            add_facts(args, billions=weights.count_parameters(model.network) / 1e9)
        if args.encoders == "leave":
            own = model.generator if isinstance(model, OurGenerator) else model
            pipeline.encode_and_free(own, [given[i].prompt for i in mine])
    seeds = seeds_of(cases, args.seed)
    log = args.out / f"seconds_{processes.rank}.jsonl"
    with tqdm(total=len(mine), desc=args.method, unit="picture",
              disable=not processes.first) as bar:
        for start in range(0, len(mine), args.micro):
            part = mine[start:start + args.micro]
            opened = [with_picture(given[i]) for i in part]
            began = time.perf_counter()
            pixels = model.draw(
                opened, [seeds[i] for i in part], args.size, args.sample_steps, args.guidance,
                progress=partial(tqdm, desc="steps", leave=False, delay=2,
                                 disable=not processes.first))
            seconds = (time.perf_counter() - began) / len(part)
            for i, image in zip(part, to_images(pixels), strict=True):
                save_png(image, args.out / f"{cases[i].id}.png", prompt=given[i].prompt,
                         valence=cases[i].v, arousal=cases[i].a, seed=seeds[i],
                         model=args.method)
            append_rows(log, [{"id": cases[i].id, "seconds": seconds} for i in part])
            bar.update(len(part))
    processes.wait()

    # 3. what a picture took
    if processes.first:
        logs = sorted(args.out.glob("seconds_*.jsonl"))
        seconds = [record["seconds"] for path in logs for record in read_records(path)]
        each = sum(seconds) / max(1, len(seconds))
        add_facts(args, seconds=each)
        print(f"{args.out}: {len(cases)} pictures, {each:.2f} s each")
    processes.wait()
    return 0


def with_picture(case):
    """A case whose source, if it has one, is a PIL image."""
    return case if case.source is None else replace(case, source=open_picture(case.source))


def check(args, method):
    """Refuse flags that a method has no use for, and ask for those that it needs."""
    flags = {  # flag: (whether it was given, whether the method has a use for it)
        "weights": (args.weights is not None, method.weights),
        "sources": (args.sources is not None, method.edits),
        "adapter": (args.adapter is not None, args.method == "ours"),
        "encoders": (args.encoders != "gpu", method.load in (OurGenerator, load_flux)),
        "offload": (args.offload, method.load is load_flux)}
    for name, (given, useful) in flags.items():
        if given and not useful:
            raise UserError(f"--{name}: --method {args.method} has no use for it")
    if method.weights and args.weights is None:
        raise UserError(f"--method {args.method}: needs --weights FILE, the file that its authors "
                        f"publish; docs/paper.md says where")
    if args.adapter is not None:
        args.adapter = lora.adapter_in(args.adapter)


def parse_args(argv):
    parser = cli.parser(__doc__, prog="python -m evaluation draw")
    add = parser.add_argument
    add("--method", choices=METHODS, required=True, help=", ".join(METHODS), metavar="METHOD")
    add("--cases", type=Path, required=True, help="a file of `python -m evaluation cases`")
    add("--out", type=Path, required=True, help="folder of the pictures")
    add("--model", help="folder or hub id of the generator (default: the method's)")
    add("--weights", type=Path, help="file of EmotiCrafter's or EmoEdit's own network")
    add("--clip", default="openai/clip-vit-large-patch14",
        help="CLIP of EmoEdit (default: %(default)s)")
    add("--adapter", help="of --method ours: folder or hub id")
    add("--sources", type=Path, help="folder of the pictures that EmoEdit changes, <id>.png")
    add("--form", choices=FORMS, help="how the prompt tells the target (default: the method's)")
    add("--size", type=cli.picture_side, help="side in pixels (default: the method's)")
    add("--sample-steps", type=integer(1, 1000), help="of the sampler (default: the method's)")
    add("--guidance", type=number(0, 100), help="(default: the method's)")
    add("--micro", type=integer(1, 10_000), default=1, help="pictures at once (default: 1)")
    add("--encoders", choices=pipeline.ENCODERS, default="gpu", help=pipeline.ENCODERS_HELP)
    add("--offload", action="store_true", help="FLUX's blocks come to the GPU one by one")
    add("--seed", type=integer(0, 2**31), default=0, help="of the noise (default: 0)")
    add("--device", help="cpu or cuda (default: cuda if there is one)")
    args = parser.parse_args(argv)
    args.model = args.model or METHODS[args.method].model
    args.form = args.form or METHODS[args.method].form
    return args


def main(argv):
    # torch.distributed's checkpoints, which it imports, need what Windows lacks
    from parts.run import run_in_processes

    args = parse_args(argv)
    command = f"python -m evaluation draw {shlex.join(argv)}"
    return run_in_processes(partial(draw, command=command), args)

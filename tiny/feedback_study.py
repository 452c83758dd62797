"""Textual feedback in the miniature beside all that might explain it without looking at pictures.

    python -m tiny.feedback_study                    # 100 test cases, two generators, the records
    python -m tiny.feedback_study --cases 4 --split validation      # a quick look

A case is a neutral request with a target V and A, given as numbers in the first prompt. For each
generator, the base and the one after reward feedback (RF), a picture is chosen in eight ways:

- one picture of the first prompt, and one of the template that writes the target in words as well;
- the best of as many pictures as feedback draws, of either prompt;
- feedback: rounds 0..3 of `--n` pictures (feedback.refine), the best of all;
- blind feedback: the pictures are scored as ever, but the judge compares two blank ones, or two of
  another case; or it sees nothing, so that the scores it is told are those of blank pictures.

All start from the same noise, so round 0 is the same pictures. The judge chooses, and sees for it;
the meter and the examiner of content, which take no part, say how good the choice was. A killed
study goes on with the next case; the cases lie in tiny/cache/feedback_study (of validation in
tiny/cache/feedback_study_validation), then in docs/records/feedback.jsonl.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
import feedback
from evaluation import run as evaluation
from evaluation.cases import held_out_cases
from parts import cli, clip
from parts.files import append_rows, claim, compared, read_records, whole_records, write_json
from parts.pipeline import TINY, judge_of, load_generator, load_judge, to_images
from tiny import results, scenes
from tiny.examiner import Examiner
from tiny.judge_study import run_all, shown

STUDY = Path(__file__).resolve().parent / "cache" / "feedback_study"
GENERATORS = ("base", "RF")
ROUNDS = 4
SEED = 6  # of the cases
SIZE = 128
TABLE = "feedback"


# --------------------------------------------------------------------------------------------------
# Judges that do not look


@dataclass
class Blind:
    """A judge that sees other pictures than it is shown, always or only where it compares two."""
    judge: object  # of pipeline.judge_of
    pictures: list  # PIL images, in turn in place of a question's own
    comparing: bool  # only these questions; their scores are then those of the real pictures

    def __call__(self, conversations, *counts):
        return self.judge([self.hidden(each) for each in conversations], *counts)

    def expected_va(self, conversations, *thoughts):
        return self.judge.expected_va([self.hidden(each) for each in conversations], *thoughts)

    def hidden(self, conversation):
        system, user = conversation
        images = [part for part in user["content"] if part["type"] == "image"]
        if self.comparing and len(images) < 2:
            return conversation
        instead = [part | {"image": own} for part, own in zip(images, self.pictures)]
        return [system, user | {"content": instead + user["content"][len(images):]}]


# --------------------------------------------------------------------------------------------------
# One case


@dataclass
class Tools:
    """What draws and reads the pictures of every case."""
    draw: object  # (prompt, seeds) -> PIL images
    judge: object  # of pipeline.judge_of
    instruments: evaluation.Instruments
    n: int  # pictures a round
    readings: int | str  # how the judge is read


def figures(image, judgement, case, tools):
    """What meter, judge, examiner and CLIP say of the chosen picture, with the case's target."""
    # against the request, not the rewritten prompt: did the picture keep what was asked for?
    scores = evaluation.scores_of(tools.instruments, [image], [case])
    return {"id": case.id, "v": case.v, "a": case.a, "meter": list(scenes.measure_va(image)),
            "judge": None if judgement.v is None else list(judgement.va),
            **{name: float(values[0]) for name, values in scores.items()}}


def error(image, case):
    """|ΔV| + |ΔA| by the meter."""
    return float(np.abs(np.subtract(scenes.measure_va(image), (case.v, case.a))).sum())


def chosen(images, judgements, case, tools):
    """The figures of the picture that the judge finds nearest to the target."""
    losses = [judgement.distance(case.v, case.a) for judgement in judgements]
    best = losses.index(min(losses))
    return figures(images[best], judgements[best], case, tools)


def by_round(rounds, case):
    """What happened in each round of feedback."""
    best_errors = []
    for number in range(1, len(rounds) + 1):
        r, i = feedback.best_of(rounds[:number])
        best_errors.append(error(rounds[r].pictures[i].image, case))
    return {
        "round_errors": [float(np.mean([error(picture.image, case) for picture in r.pictures]))
                         for r in rounds],
        "best_errors": best_errors,
        "losses": [r.pictures[r.best].loss for r in rounds],
        "changed": [int(r.next_prompt != r.prompt) for r in rounds[:-1]],
        "prompts": [r.prompt for r in rounds],
    }


def once(draw):
    """draw(prompt, seeds) that draws a picture once, however often it is asked for."""
    drawn = {}

    def from_memory(prompt, seeds):
        missing = [seed for seed in seeds if (prompt, seed) not in drawn]
        if missing:
            drawn.update(zip([(prompt, seed) for seed in missing], draw(prompt, missing)))
        return [drawn[prompt, seed] for seed in seeds]

    return from_memory


def run_case(case, another, seed, tools):
    """{way of choosing: its picture's figures} of a case; another: the case shown in its place."""
    seeds = range(seed, seed + ROUNDS * tools.n)  # as feedback counts them
    draw = once(tools.draw)
    read = partial(feedback.judge_images, tools.judge, readings=tools.readings)

    # 1. pictures of one prompt: one, and the best of as many as feedback draws
    found = {}
    for name, form in (("", "numbers"), ("template, ", "both")):
        images = draw(data.TARGET_FORMS[form](case.neutral, case.v, case.a), seeds)
        judgements = read(images)
        found[f"{name}one picture"] = figures(images[0], judgements[0], case, tools)
        found[f"{name}best of as many"] = chosen(images, judgements, case, tools)

    # 2. feedback with each judge
    blank = [Image.new("RGB", (SIZE, SIZE), (128, 128, 128))] * 2
    prompt = data.with_numbers(another.neutral, another.v, another.a)
    strangers = draw(prompt, [seed + ROUNDS * tools.n, seed + ROUNDS * tools.n + 1])
    judges = {
        results.SEEING: tools.judge,
        "blind, compares blank pictures": Blind(tools.judge, blank, comparing=True),
        "blind, compares another case's": Blind(tools.judge, strangers, comparing=True),
        "blind, its scores too": Blind(tools.judge, blank, comparing=False),
    }
    for name, judge in judges.items():
        rounds = feedback.refine(case.neutral, case.v, case.a, draw, judge, ROUNDS, tools.n,
                                 seed=seed, readings=tools.readings)
        pictures = [picture for r in rounds for picture in r.pictures]
        images = [picture.image for picture in pictures]
        # Every picture is chosen by what the seeing judge says, also where it was blind till then.
        scored = judge is tools.judge or judge.comparing
        judgements = [picture.judgement for picture in pictures] if scored else read(images)
        found[name] = chosen(images, judgements, case, tools) | by_round(rounds, case)
    return found


def facts_of(args):
    """What cases depend on besides their number: no two of these may be mixed in a file."""
    flags = ("split", "n", "readings", "sample_steps")
    return {name: getattr(args, name) for name in flags} | {
        "judge": evaluation.stamp(args.judge), "adapter": evaluation.stamp(args.adapter)}


def run_cases(args):
    """One generator: append the missing cases to its file."""
    generator = load_generator(TINY, adapter=args.adapter if args.only == "RF" else None)

    def draw(prompt, seeds):
        pixels = generator.draw([prompt] * len(seeds), list(seeds), SIZE, args.sample_steps)
        return to_images(pixels)

    instruments = evaluation.Instruments(
        readers={}, scorer=clip.CLIP.from_pretrained(TINY / "clip"),
        other=clip.CLIP.from_pretrained(TINY / "other_clip"), examiner=Examiner.from_pretrained())
    model = load_judge(args.judge, "cpu", SIZE)
    judge = judge_of(model, max_new_tokens=feedback.REWRITE_LIMIT, progress=False)
    tools = Tools(draw, judge, instruments, args.n, args.readings)
    settings = args.out / args.only / "settings.json"
    write_json(settings, claim(settings, facts_of(args), STUDY.name))
    path = args.out / f"{args.only}.jsonl"
    done = len(whole_records(path))  # without the line that a kill cut short
    cases = held_out_cases(args.cases + 1, SEED, args.split)  # the last one is only shown
    for i in tqdm(range(done, args.cases), args.only, args.cases, initial=done):
        # no two cases share a picture's seed
        append_rows(path, [run_case(cases[i], cases[i + 1], i * 1000, tools)])


# --------------------------------------------------------------------------------------------------
# The program


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--cases", type=cli.integer(1, 10**6), default=100, help="(default: %(default)s)")
    add("--split", choices=("test", "validation"), default="test",
        help="whose cases; those of validation go to records of their own (default: %(default)s)")
    add("--n", type=cli.integer(2, 200), default=4,
        help="pictures a round (default: %(default)s)")
    add("--readings", type=cli.readings, default=8,
        help="how the judge is read (default: %(default)s)")
    add("--sample-steps", type=cli.integer(1, 1000), default=12,
        help="steps of the sampler (default: %(default)s)")
    add("--judge", type=Path, default=TINY / "judge", help="folder of the judge")
    add("--adapter", type=Path, default=TINY / "adapter", help="folder of the adapter of RF")
    add("--out", type=Path, help=f"folder of the study (default: {STUDY}, or {STUDY}_validation)")
    add("--jobs", type=cli.integer(1, 1000), default=2,
        help="runs at a time (default: %(default)s)")
    add("--only", choices=GENERATORS, help="run the cases of one generator, no table")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = STUDY if args.split == "test" else STUDY.with_name(f"{STUDY.name}_{args.split}")
    return args


def command_of(args, generator):
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in
             ("cases", "split", "n", "readings", "sample_steps", "judge", "adapter", "out")]
    return [sys.executable, "-m", "tiny.feedback_study", "--only", generator, *flags]


def study(args):
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only:
        return run_cases(args)
    # 1. a process for each generator whose cases are not complete
    files = {name: args.out / f"{name}.jsonl" for name in GENERATORS}
    for name in GENERATORS:
        compared(args.out / name / "settings.json", facts_of(args), STUDY.name)
    run_all([(args.out / name, [command_of(args, name)]) for name, file in files.items()
             if len(read_records(file)) < args.cases], args.jobs, "feedback")

    # 2. records, a row for each generator and way of choosing
    table = TABLE if args.split == "test" else f"{TABLE}_{args.split}"
    for name, file in files.items():
        cases = read_records(file)[:args.cases]
        for method in cases[0]:
            head = {"commands": [shown(command_of(args, name))]}
            records = [case[method] for case in cases]
            results.add_figures(table, f"{name}: {method}", head, records)
    for name in (table, f"{table}_pairs", f"{table}_rounds"):
        print(results.table_of(name), end="\n\n")


def main(argv=None):
    args = parse_args(argv)
    return cli.run_program(lambda: study(args))


if __name__ == "__main__":
    sys.exit(main())

"""How well a method hits valence and arousal, keeps to its prompt and looks (paper, section 4.2).

    python -m evaluation cases --out cases.jsonl       # what every method has to draw
    python -m evaluation draw --method flux --cases cases.jsonl --out DIR    # another method's
    python -m evaluation run --cases cases.jsonl       # draw, read and score one method's pictures
    python -m evaluation table out/evaluate/A out/evaluate/B --form 1    # the paper's tables
    python -m evaluation rate --cases cases.jsonl --images A=DIR --images B=DIR    # people rate
    python -m evaluation sheet --cases cases.jsonl --images A=DIR --images B=DIR   # side by side
    python -m evaluation values --cases cases.jsonl --human ratings.csv    # people and lexicon

Each of them explains itself with --help.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds: Ctrl-C ends in one line
    from parts import interrupts
    interrupts.catch()

import sys

from evaluation import cases, draw, figures, rate, run, tables
from parts import cli

PROGRAMS = {"cases": cases.main, "draw": draw.main, "run": run.main, "table": tables.main,
            "rate": rate.main, "sheet": figures.sheet_main, "values": figures.values_main}


def main(argv):
    parser = cli.parser(__doc__, prog="python -m evaluation", usage="%(prog)s PROGRAM [flags]")
    parser.add_argument("program", choices=PROGRAMS, metavar="PROGRAM", help=", ".join(PROGRAMS))
    program = parser.parse_args(argv[:1] or ["--help"]).program
    return PROGRAMS[program](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

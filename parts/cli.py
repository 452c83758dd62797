"""What every program shares towards the person who runs it: one error, one way to speak, flags.

    parser = cli.parser(__doc__)
    parser.add_argument("--n", type=cli.integer(1, 1000), default=1, help="pictures")
    cli.run_program(main_function, args)

Errors are one line on standard error that names the input, what was expected and what to do.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import torch

LONGEST_LINE = 3000  # characters of an error; what a file quotes in it may be a megabyte


class UserError(Exception):
    """Something the user can mend; the message is one line that says what and how.

    It may quote a stranger's file, so what a terminal would obey is left out here, once for all.
    """

    def __init__(self, message):
        if len(message) > LONGEST_LINE:  # the file stands at the beginning, the advice at the end
            message = f"{message[:LONGEST_LINE - 500]} … {message[-500:]}"
        super().__init__(printable(message))


def say(text):
    """Print to standard error, where progress and remarks go; standard output is for results."""
    print(*map(printable, text.split("\n")), sep="\n", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Flags


def parser(doc, **options):
    """An ArgumentParser that shows `doc` as it is and answers a mistake by one line and exit 2."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    # argparse's own answer prints the usage of all flags, which hides the one line that matters.
    made.error = stop_parsing
    return made


def stop_parsing(message):
    say(f"error: {message.removeprefix('argument ')}; see --help")
    sys.exit(2)


def number(low, high, kind=float):
    """An argparse type: a finite number in low..high."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which no comparison holds for, so it is refused below
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} in {low:,}..{high:,}, got {text}")
        return value
    return read


def integer(low, high):
    """An argparse type: a whole number in low..high."""
    return number(low, high, int)


def some_of(choices):
    """An argparse type: one or more of the choices, with commas between, as a tuple."""
    def read(text):
        values = tuple(part.strip() for part in text.split(","))
        if not set(values) <= set(choices):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}, got {text}")
        return values
    return read


def weights_of(names):
    """An argparse type: weights of some of the names, "a=1,b=0.5", as {"a": 1.0, "b": 0.5}."""
    def read(text):
        weights = {}
        for part in text.split(","):
            name, _, weight = part.partition("=")
            if name.strip() not in names:
                expected = ",".join(f"{each}=1" for each in names)
                raise argparse.ArgumentTypeError(f"expected e.g. {expected}, got {text}")
            weights[name.strip()] = number(0, 1000)(weight)
        return weights
    return read


def text(longest):
    """An argparse type: a text of 1 to `longest` characters."""
    def read(given):
        # else the shell passed other bytes, or it has what is more than text
        if not is_plain(given, longest):
            raise argparse.ArgumentTypeError(
                f"expected 1 to {longest:,} characters of UTF-8 text, without control characters "
                f"and <|tokens|>, got {len(given):,} characters")
        return given
    return read


def picture_side(text):
    """An argparse type: a side in pixels, which the models want as a multiple of 16."""
    side = integer(16, 4096)(text)
    if side % 16:
        raise argparse.ArgumentTypeError(f"expected a multiple of 16 in 16..4,096, got {text}")
    return side


STEPS_HELP = ("training steps; may be more when a run goes on: the learning rate then falls to its "
              "last value over the new number")


def training_parser(doc, settings, out):
    """A parser with the flags of both training programs and those of `settings`."""
    made = parser(doc)
    made.add_argument("--preset", choices=("tiny", "paper"), default="tiny",
                      help="defaults of the settings below")
    made.add_argument("--data", type=Path, default=Path("tiny/cache/dataset"),
                      help="dataset folder (default: %(default)s)")
    made.add_argument("--out", type=Path, default=Path(out),
                      help="folder of the run (default: %(default)s)")
    made.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    made.add_argument("--checkpointing", action="store_true",
                      help="recompute activations: less memory, slower")
    add_settings(made, settings)
    return made


def add_settings(made, settings):
    """Add a flag for each of {name: (paper's value, the miniature's, type, help)} to a parser.

    A tuple in place of a type holds the words to choose from. A help that begins with
    "[--other-name] " gives the flag that second name, by which other programs know it.
    """
    for name, (paper, tiny, kind, text) in settings.items():
        names = ["--" + name.replace("_", "-")]
        if text.startswith("["):
            other, text = text[1:].split("] ", 1)
            names.append(other)
        kind = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        defaults = f"(paper: {shown(paper)}, tiny: {shown(tiny)})"
        made.add_argument(*names, **kind, help=f"{text} {defaults}")


def shown(value):
    if isinstance(value, dict):
        value = tuple(f"{name}={part:g}" for name, part in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def parse_settings(made, settings, argv=None):
    """The arguments; what was not given has its preset's value."""
    return fill_settings(made.parse_args(argv), settings)


def fill_settings(args, settings):
    """Give the arguments that are None their preset's values."""
    for name, (paper, tiny, *_) in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, paper if args.preset == "paper" else tiny)
    return args


def device_of(wish):
    """The device that --device names; without one a GPU, if there is one. Raises UserError."""
    if wish is None:  # a person who names no device wants the fastest
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wish.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {wish}: this torch sees no GPU; use --device cpu")
    return wish


# --------------------------------------------------------------------------------------------------
# Programs and what they print


def run_program(work, stopped="stopped; the same command goes on where it was"):
    """The exit code of work(): 2 for what the user can mend, 130 for Ctrl-C, each with its line."""
    try:
        return work() or 0  # a program without an exit code of its own ended well
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0][:100]
        say(f"error: the GPU has too little memory ({reason}); try what the program has of "
            f"--checkpointing, a smaller --micro or --size, --encoders leave; or --device cpu")
        return 2
    except (UserError, OSError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say(stopped)
        return 130


def plain_text(text):
    """A text in one line, without what a terminal, a file or a tokenizer reads as more than text:
    control characters, halves of surrogate pairs, <|special tokens|>."""
    return " ".join(re.sub(r"<\|\w+\|>", " ", printable(text)).split())


def is_plain(text, longest):
    """Whether it is a text of 1 to `longest` characters that `plain_text` takes nothing away from,
    but for spaces."""
    fits = isinstance(text, str) and 0 < len(text) <= longest and not text.isspace()
    return fits and plain_text(text) == " ".join(text.split())


def printable(text):
    """A text in one line, with a space for every character that is more than a sign."""
    # isprintable is false for escapes, which could clear a screen, and for lone surrogates
    return "".join(ch if ch.isprintable() else " " for ch in text)


def markdown(rows):
    """A Markdown table of rows of texts, the first of them its head."""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- " * len(rows[0]) + "|")
    return "\n".join(lines)

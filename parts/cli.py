"""What every program shares towards the person who runs it: one error, one way to speak, flags.

    parser = cli.parser(__doc__)
    parser.add_argument("--n", type=cli.integer(1, 1000), default=1, help="pictures")
    cli.run_program(main_function, args)

Errors are one line on standard error that names the input, what was expected and what to do.
"""

import argparse
import codecs
import difflib
import errno
import math
import re
import shutil
import sys
import textwrap
from pathlib import Path

import torch

from parts import interrupts

ROOT = Path(__file__).resolve().parent.parent
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk, a quota or a file that is full
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


PLAIN = {"−": "-", "–": "-", "…": "...", "≤": "<=", "≥": ">=", "→": "->", "√": "sqrt ", "×": "x",
         "·": "*", "Δ": "d", "σ": "sigma", "α": "alpha", "β": "beta", "ε": "epsilon", "²": "2"}


def in_plain_letters(error):
    """How a character is printed that an output's encoding lacks, as of a pipe on Windows."""
    missing = error.object[error.start:error.end]
    return "".join(PLAIN.get(ch, "?") for ch in missing), error.end


def print_everywhere():
    """Let no print fail, whatever the encoding of standard output and standard error."""
    codecs.register_error("plain letters", in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's or a test's may be of another kind
            stream.reconfigure(errors="plain letters")


# --------------------------------------------------------------------------------------------------
# Flags


def parser(doc, **options):
    """A Parser that shows `doc` as it is above its flags."""
    print_everywhere()
    return Parser(description=doc, formatter_class=Lines, **options)


class Parser(argparse.ArgumentParser):
    """Answers a mistake by one line, with what was probably meant, and exit code 2."""

    def __init__(self, *args, add_help=True, **options):
        super().__init__(*args, add_help=False, **options)
        self.folded = {}  # {action: its help}, of flags that only --help-all explains
        if add_help:  # everybody knows it, so it takes no line of its own
            self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def fold(self, names):
        """Let --help only list the flags of these settings."""
        self.folded = {action: action.help for action in self._actions if action.dest in names}
        for action in self.folded:
            action.help = argparse.SUPPRESS
        flags = " ".join(action.option_strings[0] for action in self.folded)
        self.epilog = textwrap.fill(f"--help-all explains these too: {flags}", 98,
                                    break_on_hyphens=False)

    def parse_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        if self.folded and "--help-all" in args:
            for action, text in self.folded.items():
                action.help = text
            self.epilog = None
            self.print_help()
            self.exit()
        # argparse would first ask for a flag that is missing, perhaps the one that is misspelt.
        flags = list(self._option_string_actions)
        for word in args[:args.index("--")] if "--" in args else args:
            name = word.partition("=")[0]
            is_flag = re.match("-+[a-zA-Z]", name) and " " not in word
            if is_flag and not any(flag.startswith(name) for flag in flags):
                self.error(f"unrecognized argument {name}{meant(name, flags)}")
        return super().parse_args(args, namespace)

    def error(self, message):
        # argparse's own prints the usage of all flags, which hides the one line that matters.
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            message += meant(choice[1], [name.strip(" '") for name in choice[2].split(",")])
        say(f"error: {message.removeprefix('argument ')}; see --help")
        sys.exit(2)


def meant(word, known):
    """", did you mean …?" with the known word that is nearest to a misspelt one, if one is near."""
    near = difflib.get_close_matches(word, known, 1)
    return f", did you mean {near[0]}?" if near else ""


class Lines(argparse.RawDescriptionHelpFormatter):
    """A line for each flag: its first name, and its choices, if it has some, before its help."""

    def __init__(self, prog):
        columns = shutil.get_terminal_size((100, 0)).columns
        super().__init__(prog, max_help_position=26, width=columns)

    def add_usage(self, usage, actions, groups, prefix=None):
        # The flags stand below, in groups.
        words = [action.metavar or action.dest.upper() for action in actions
                 if not action.option_strings]
        usage = usage or " ".join(["%(prog)s", *words, "[flags]"])
        super().add_usage(usage, actions, groups, prefix)

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else f" {action.metavar or 'X'}"
        return action.option_strings[0] + value

    def _get_help_string(self, action):
        text = action.help
        if action.choices and action.metavar is None:
            text = f"{' or '.join(map(str, action.choices))}: {text}"
        return text


def number(low, high, kind=float):
    """An argparse type: a finite number in low..high."""
    def read(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):  # the latter for a number of hundreds of digits
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


def readings(text):
    """An argparse type: how the judge is read, as `feedback.judge_images` takes it."""
    return text if text in ("logits", "thought") else integer(1, 100)(text)


def text(longest):
    """An argparse type: a text of 1 to `longest` characters."""
    def read(given):
        # else the shell passed other bytes, or it has what is more than text
        if not is_plain(given, longest):
            got = "only spaces" if given.isspace() else f"{len(given):,} characters"
            raise argparse.ArgumentTypeError(
                f"expected 1 to {longest:,} characters of UTF-8 text, without control characters "
                f"and <|tokens|>, got {got}")
        return given
    return read


def picture_side(text):
    """An argparse type: a side in pixels, which the models want as a multiple of 16."""
    side = integer(16, 4096)(text)
    if side % 16:
        raise argparse.ArgumentTypeError(f"expected a multiple of 16 in 16..4,096, got {text}")
    return side


SMALL_JUDGE = "Qwen/Qwen2.5-VL-3B-Instruct"  # 8 GB, where the paper's has 17
PRESETS = ("tiny", "paper")
PRESET_HELP = "whose defaults to take (default: what fits --model)"
STEPS_HELP = ("training steps; may be more when a run goes on: the learning rate then falls to its "
              "last value over the new number")


def training_parser(doc, settings, out, groups, rare, presets=PRESETS):
    """A parser with the flags of both training programs and those of `settings`.

    groups: as for `add_settings`. rare: settings that --help only lists. presets: for --preset.
    """
    made = parser("\n\n".join(doc.split("\n\n")[:2]))  # the title and the commands
    made.add_argument("--preset", choices=presets, help=PRESET_HELP)
    made.add_argument("--data", type=Path, default=Path("tiny/cache/dataset"),
                      help="dataset folder (default: %(default)s)")
    made.add_argument("--out", type=Path, default=Path(out),
                      help="folder of the run (default: %(default)s)")
    made.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    made.add_argument("--checkpointing", action="store_true",
                      help="recompute activations: less memory, slower")
    made.add_argument("--tensorboard", action="store_true",
                      help="the log's figures for TensorBoard, too, in OUT/tensorboard")
    add_settings(made, settings, groups)
    made.fold(rare)
    return made


def add_settings(made, settings, groups=()):
    """Add a flag for each of {name: (paper's value, the miniature's, type, help)} to a parser.

    A tuple in place of a type holds the words to choose from. A help that begins with
    "[--other-name] " gives the flag that second name, by which other programs know it.
    groups: {name of a setting: title of the group that begins with it}.
    """
    target = made
    for name, (paper, tiny, kind, text) in settings.items():
        if name in groups:
            target = made.add_argument_group(groups[name])
        names = ["--" + name.replace("_", "-")]
        if text.startswith("["):
            other, text = text[1:].split("] ", 1)
            names.append(other)
        kind = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        defaults = f"default: {shown(paper)}"
        if paper != tiny:
            defaults = f"paper: {shown(paper)}, tiny: {shown(tiny)}"
        target.add_argument(*names, **kind, help=f"{text} ({defaults})")


def shown(value):
    if value is None:
        return "none"
    if isinstance(value, str):
        value = value.removeprefix(f"{ROOT}/")
    if isinstance(value, dict):
        value = tuple(f"{name}={part:g}" for name, part in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def device_of(wish):
    """The device that --device names; without one a GPU, if there is one. Raises UserError."""
    if wish is None:  # a person who names no device wants the fastest
        return "cuda" if torch.cuda.is_available() else "cpu"
    wish = wish.replace("gpu", "cuda")
    number = re.fullmatch(r"cpu|cuda(?::(\d+))?", wish)
    if not number:
        raise UserError(f"--device {wish}: expected cpu, or cuda for an NVIDIA or AMD GPU")
    if wish != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {wish}: this torch sees no GPU; use --device cpu")
    if number[1] and int(number[1]) >= torch.cuda.device_count():
        raise UserError(f"--device {wish}: this machine has {torch.cuda.device_count()} GPUs, "
                        f"counted from 0")
    return wish


# --------------------------------------------------------------------------------------------------
# Programs and what they print


def run_program(work, stopped="stopped; the same command goes on where it was"):
    """The exit code of work(): 2 for what the user can mend, 1 for a full disk, 130 for Ctrl-C,
    each with its line."""
    try:
        with interrupts.raised():
            return work() or 0  # a program without an exit code of its own ended well
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0][:100]
        say(f"error: the GPU has too little memory ({reason}); try what the program has of "
            f"--offload, --encoders leave or cpu, --no-t5, --judge {SMALL_JUDGE}, "
            f"--checkpointing, a smaller --micro or --size; or --device cpu")
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch has no kind of its own for memory that a CPU's allocator did not get
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        say("error: this machine has too little memory; try what the program has of "
            "--checkpointing, a smaller --micro or --size")
        return 2
    except OSError as error:
        path = Path(error.filename or "")
        if isinstance(error, (FileExistsError, NotADirectoryError)) and not error.filename2:
            for each in (path, *path.parents):
                if each.is_file():
                    say(f"error: {each}: a file stands where a folder is needed; give another")
                    return 2
        if error.errno not in FULL:
            say(f"error: {error}")
            return 2
        # of a copy the second name is that of the file to be written
        say(f"error: {error.filename2 or error.filename or 'a file'}: cannot be written "
            f"({error.strerror}); make room there, and give the same command again")
        return 1
    except UserError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say(stopped)
        return interrupts.STOPPED


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

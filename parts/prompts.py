"""Prompts as texts: values for their $names, a user's own in their place, what a rewrite lost."""

import argparse
import re
import string

from parts.cli import UserError, is_plain
from parts.files import endless_refused, parse_object

LONGEST_PROMPT = 2000  # characters, also of a caption; CLIP reads 77 tokens and T5 256
LONGEST_QUESTION = 20_000  # characters of a prompt to the judge
SMALL_WORDS = set(
    "a an and are as at away be by for from his her in inside into is it its near no of off on "
    "onto or our out over that the their there this through to under up upon very was were while "
    "who with without your".split())


def fill(template, /, **values):
    """A template with its $names replaced by values; numbers get two decimals, None "unknown"."""
    for name, value in values.items():
        if not isinstance(value, str):
            values[name] = "unknown" if value is None else f"{value:.2f}"
    # Template and not str.format, because prompts show JSON, whose braces format would read.
    return string.Template(template).substitute(values)


def load_prompts(path, prompts, values, needed):
    """{name: text} of a JSON file, to take the place of the prompts of these names.

    values: {name: the $names that its text may use}. needed: {name: what its text must have}.
    Raises UserError.
    """
    try:
        own = parse_object(endless_refused(path).read_bytes())
        unknown = own.keys() - prompts.keys()
        if unknown:
            raise ValueError(f"unknown prompt {min(unknown)!r}")
        for name, text in own.items():
            fill(text, **dict.fromkeys(values.get(name, ()), ""))
            used = [f"${each}" for each in string.Template(text).get_identifiers()]
            for part in needed.get(name, ()):
                if part not in (used if part.startswith("$") else text):
                    raise ValueError(f"{name!r} lacks {part}")
            if text and not is_plain(text, LONGEST_QUESTION):
                raise ValueError(f"{name} has control characters or <|tokens|>, or is too long")
    # No file, no JSON, no object, a text that is none, or a $name without a value.
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else repr(error)
        raise UserError(f"{path}: {reason}; expected JSON {{name: text}} with names of "
                        f"{', '.join(prompts)}, and in each text only the $values of the prompt "
                        f"that it replaces, $$ for a dollar") from error
    return own


def prompts_in(*known):
    """An argparse type: a file as `load_prompts` reads it. known: its prompts, values, needed."""
    def read(path):
        try:
            return load_prompts(path, *known)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return read


def content_words(text):
    """The words of a text, in lower case, but for articles, prepositions and the like. In scripts
    without spaces every character is a word."""
    # Kana and Chinese characters one by one, letters of other scripts in runs.
    words = re.findall(r"[぀-ヿ㐀-鿿]|[^\W\d_぀-ヿ㐀-鿿]+", text.lower())
    return [word for word in words if word not in SMALL_WORDS]


def lost_words(request, prompt):
    """The content words of a request that a prompt has lost; "horses" keeps "horse"."""
    # An ending may change in a rewrite ("sailing boats"), the thing that is named may not.
    kept = {stem(word) for word in content_words(prompt)}
    return [word for word in dict.fromkeys(content_words(request)) if stem(word) not in kept]


def stem(word):
    """A word without its ending."""
    return re.sub(r"(ing|ed|ly|y|e?s|e)$", "", word) if len(word) > 3 else word

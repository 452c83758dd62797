"""Captions by a vision-language model (§4.1): the questions, the reader of its answers, and asking
one by one, so that a run that was stopped or killed asks nothing a second time."""

import re

from tqdm import tqdm

import data
from feedback import Unusable, conversation
from parts.cli import plain_text
from parts.files import append_rows, open_picture, read_records, whole_records
from parts.pipeline import judge_of, load_judge
from parts.prompts import LONGEST_PROMPT, content_words, fill

SIDE = 512  # a picture of more than SIDE × SIDE pixels is shrunk before it is captioned
PROMPTS = {  # $name stands for a value of VALUES; wording is ours
    "caption_system": (
        "You describe pictures for someone who will draw them unseen. Answer with one English "
        "sentence and nothing else."),
    "caption": (
        "What does this picture show? Name the things, people and animals, what they do, the place "
        "and the time of day, in at most 30 words, as plain facts: no word for a feeling, a mood "
        "or a judgement."),
    "emotional_caption": (
        "This picture makes one feel $label; its mood is $mood. Describe it in at most 50 words, "
        "so that a picture drawn from them feels the same: the things, people and animals, the "
        "place, and what in the light, weather, colours, faces and composition carries the "
        "feeling."),
}
VALUES = {"emotional_caption": ("label", "mood", "v", "a")}
NEEDED = {"emotional_caption": ("$label",)}


def kinds_of(row):
    """The captions that a row has: an emotional one only for training (§4.1)."""
    return ("neutral", "emotional") if row["split"] == "train" else ("neutral",)


def ask(row, kind, folder, prompts=PROMPTS):
    """The conversation that asks for the caption `kind` of a row's picture in the folder."""
    text = fill(prompts["caption"])
    if kind == "emotional":
        valence, arousal, *_ = data.emotion_words(row["v"], row["a"]).split(", ")
        text = fill(prompts["emotional_caption"], label=row["label"],
                    mood=f"{valence}, {arousal}", v=row["v"], a=row["a"])
    image = open_picture(folder / row["image"])
    return conversation(prompts["caption_system"], [image], text)


def load_captioner(args, processes):
    """captioner(conversations) -> texts: the likeliest answers of a Qwen2.5-VL."""
    model = load_judge(args.captioner, processes.device, SIDE)
    return judge_of(model, args.micro, args.max_new_tokens, progress=False)


def write_answers(missing, captioner, prompts, args, processes):
    """Append the answers about [(row, kind)] to captions-<rank>.jsonl, a batch at a time."""
    path = args.out / f"captions-{processes.rank}.jsonl"
    whole_records(path)  # cuts off a line that a killed run left half-written
    bar = tqdm(total=len(missing), desc="captions", disable=not processes.first, dynamic_ncols=True)
    with bar:
        for start in range(0, len(missing), args.micro):
            batch = missing[start:start + args.micro]
            texts = captioner([ask(row, kind, args.out, prompts) for row, kind in batch])
            records = [{"id": row["id"], "kind": kind, "text": text}
                       for (row, kind), text in zip(batch, texts, strict=True)]
            append_rows(path, records)  # this batch is kept, whatever happens in the next
            bar.update(len(batch))


def read_answers(folder):
    """{(id, "neutral" or "emotional"): answer} of the files of all processes, however many."""
    answers = {}
    for path in sorted(folder.glob("captions-*.jsonl")):  # sorted: alike on every machine
        for record in read_records(path):
            answers[record["id"], record["kind"]] = record["text"]
    return answers


def read_caption(text):
    """The caption in an answer, as one line. Raises Unusable if no words remain, or too many.

    Thoughts, tags, code fences, lines that only announce the caption, a name in front of it
    ("Caption:") and quotes around it are left out.
    """
    text = re.sub(r"</?\w+>|```\w*|\*\*", " ", text.rsplit("</think>", 1)[-1])
    lines = [line.strip(" \t-*#>•") for line in text.splitlines()]
    said = " ".join(line for line in lines if not line.endswith(":"))  # "Here it is:"
    caption = unquoted(" ".join(said.split()))
    name = r"^([a-z]+ ){0,3}(caption|description|prompt|sentence) ?:"
    caption = plain_text(unquoted(re.sub(name, "", caption, flags=re.IGNORECASE)))
    if not content_words(caption) or len(caption) > LONGEST_PROMPT:
        raise Unusable(f"its caption has {len(caption):,} characters; expected words, at most "
                       f"{LONGEST_PROMPT:,} characters")
    return caption


def unquoted(text):
    """A text without the quotes around the whole of it."""
    text = text.strip()
    whole = re.fullmatch(r"""(["'`])(.+)\1|“(.+)”|«(.+)»""", text)
    inside = next((part for part in whole.groups()[1:] if part), "") if whole else ""
    # '"Stop" on one sign, "Go" on another' begins and ends with a quote, but is not in quotes
    return text if not inside or text[0] in inside else inside.strip()

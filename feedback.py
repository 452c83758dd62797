"""What the judge is asked, how its answers are read, and Algorithm 1 (EmoFeedback², sections 3.1, 3.3, appendices B and D).

    rounds = refine("a horse in the hills at noon", 7, 3, generate, judge)

Each round draws some pictures of a prompt, asks the judge for the valence V and arousal A of each (the loss is |ΔV| + |ΔA|),
shows it the best and the worst, and goes on with the prompt it writes. `generate` and `judge` are any callables, so that the
loop runs with a remote model as well. The wording of the prompts is ours; each says what the paper's Tables 8 and 9 make
it say. `load_prompts` puts a user's own in their place.
"""

import json
import math
import re
import statistics
import string
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data
from parts.cli import UserError

SCALES = "Valence goes from 1, very sad, to 9, very happy. Arousal goes from 1, very calm, to 9, very excited."
LOOK = "Look at the weather, the light, the background, the objects, the faces and the composition."
REWRITTEN = ('Write it in short phrases, richer than before in light, weather, surroundings, colours and composition, and '
             'keep every thing and place that the request names. Answer with one JSON object and nothing else: '
             '{"analysis": "", "optimized_prompt": ""}')
PROMPTS = {  # $name stands for a value; the values that a prompt may use are in VALUES
    "system": "You judge the emotion of pictures. First say what you see and what it does to the mood, between <think> and "
              "</think>. Then give the result between <answer> and </answer>. Use each tag once and write nothing else.",
    "regression": f"How does this picture feel? {LOOK} {SCALES} The answer is a JSON object with two numbers of two "
                  f'decimals: {{"valence": , "arousal": }}',
    "class": f"Which emotion does this picture show: {', '.join(data.EMOTIONS)}? {LOOK} The answer is a JSON object with "
             f'one of these words: {{"emotion_class": ""}}',
    "feedback_system": f"You know what gives a picture its emotion, and write prompts for a picture generator. {SCALES}",
    "compare": f"The generator drew two pictures of one prompt. The first came nearest to the wanted emotion, the second "
               f"least near. {LOOK} In the analysis compare them: what is strong and weak in each, and what in the first "
               f"must change, and which way, to come nearer. Then rewrite the prompt so that the next picture has these "
               f"changes. {REWRITTEN}\nThe request: $request. The prompt: $prompt. Wanted: valence $v, arousal $a. The "
               f"first picture: valence $best_v, arousal $best_a. The second: valence $worst_v, arousal $worst_a.",
    "rewrite": f"Write a prompt for a picture of a wanted emotion. Low valence and low arousal is gloomy, low valence and "
               f"high arousal threatening, high valence and low arousal serene, high valence and high arousal joyful. In "
               f"the analysis say which light, weather, surroundings, colours, composition, objects and faces such a "
               f"picture has. {REWRITTEN}\nThe request: $request. Wanted: valence $v, arousal $a.",
    "again": "Your last answer could not be used: $why. Write another.",
    "caption_system": "You describe pictures for someone who will draw them unseen. Answer with one English sentence and "
                      "nothing else.",
    "caption": "What does this picture show? Name the things, people and animals, what they do, the place and the time of "
               "day, in at most 30 words, as plain facts: no word for a feeling, a mood or a judgement.",
    "emotional_caption": "This picture makes one feel $label; its mood is $mood. Describe it in at most 50 words, so that a "
                         "picture drawn from them feels the same: the things, people and animals, the place, and what in "
                         "the light, weather, colours, faces and composition carries the feeling.",
}
VALUES = {"compare": ("request", "prompt", "v", "a", "best_v", "best_a", "worst_v", "worst_a"),
          "rewrite": ("request", "v", "a"), "again": ("why",), "emotional_caption": ("label", "mood", "v", "a")}
TASKS = ("regression", "class")
ANSWER_LIMIT = 256  # tokens of a judgement
REWRITE_LIMIT = 512  # tokens of an analysis with its prompt
TRIES = 3  # of a rewrite, before the prompt is kept as it is
LONGEST_PROMPT = 2000  # characters; CLIP reads 77 tokens and T5 256


class Unusable(Exception):
    """An answer of the judge cannot be used; the message says why."""


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def fill(name, values, text=None):
    """The prompt `name` (or a text in its place) with its $values. KeyError or ValueError for one that is not given."""
    return string.Template(PROMPTS[name] if text is None else text).substitute(values)


def load_prompts(path):
    """Put the texts of a JSON file {name: text} in place of PROMPTS. Raises UserError; then nothing is replaced."""
    try:
        own = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(own, dict) or not all(isinstance(text, str) for text in own.values()):
            raise ValueError("expected an object of texts")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; give a JSON file such as {{\"rewrite\": \"...\"}}") from error
    for name, text in own.items():
        if name not in PROMPTS:
            raise UserError(f"{path}: unknown prompt {name!r}; expected some of {', '.join(PROMPTS)}")
        known = VALUES.get(name, ())
        try:
            fill(name, dict.fromkeys(known, ""), text)
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: the prompt {name!r} has an unknown value ({error}); it may use "
                               f"{', '.join('$' + value for value in known) or 'none'}, and $$ for a dollar") from error
    PROMPTS.update(own)


def conversation(system, images, text):
    pictures = [{"type": "image", "image": image} for image in images]
    return [{"role": "system", "content": PROMPTS[system]},
            {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def ask(task, image):
    """The conversation that puts one of TASKS to the judge about a PIL image."""
    return conversation("system", [image], PROMPTS[task])


def ask_compare(request, prompt, v, a, best, worst, why=None):
    """The conversation that asks for an analysis and a better prompt. request: the user's neutral prompt. best, worst:
    (image, v, a), None for what could not be judged. why: what was wrong with the last answer."""
    said = [figure(x) for x in (*best[1:], *worst[1:])]
    values = dict(zip(VALUES["compare"], (request, prompt, figure(v), figure(a), *said)))
    return conversation("feedback_system", [best[0], worst[0]], fill("compare", values) + once_more(why))


def ask_rewrite(request, v, a, why=None):
    """The conversation that asks for a first prompt at (v, a), without any picture: the VA-change task of Table 9."""
    values = {"request": request, "v": figure(v), "a": figure(a)}
    return conversation("feedback_system", [], fill("rewrite", values) + once_more(why))


def ask_caption(image):
    """The conversation that asks for the neutral caption of a PIL image (section 4.1)."""
    return conversation("caption_system", [image], fill("caption", {}))


def ask_emotional_caption(image, label, v, a):
    """The conversation that asks for the emotional caption of a PIL image of a class, at (v, a) in words (section 4.1)."""
    mood = f"{data.VALENCE_WORDS[data.level(v, 7)][0]}, {data.AROUSAL_WORDS[data.level(a, 7)][0]}"
    values = {"label": label, "mood": mood, "v": figure(v), "a": figure(a)}
    return conversation("caption_system", [image], fill("emotional_caption", values))


def figure(x):
    return "unknown" if x is None else f"{x:.2f}"


def once_more(why):
    return "" if why is None else "\n" + fill("again", {"why": why})


# ---------------------------------------------------------------------------------------------------------------------
# Answers

NAME = r"""["'“]?[A-Za-z][\w -]{0,40}["'”]?\s*:"""
KEY = re.compile(rf"({NAME})\s*")
CLOSING = {quote: re.compile(rf"""(?<!\\){quote}(?=\s*(?:[}}\]]|,\s*(?:}}|{NAME}|["']?[\w -]*$)|$))""") for quote in "\"'"}
BARE = re.compile(r"[^,}\n]+(?=[,}\n])")
NUMBERS = {word: i for i, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), 1)}


def read_object(text, keys):
    """{key: value} of the JSON object in an answer of a language model. Raises Unusable if there is none with all `keys`.

    What such models write is read too: thoughts and other text around the object, code fences, commas before the end, single
    or no quotes, quotes within texts, other spellings of a key ("Optimised prompt"), an end that is missing. A value
    that breaks off counts as missing.
    """
    text = text.rsplit("</think>", 1)[-1]
    begin = text.find("{")
    if begin < 0:
        raise Unusable("it has no JSON object")
    try:
        pairs = json.JSONDecoder().raw_decode(text, begin)[0].items()
    except (ValueError, RecursionError):
        pairs = loose_pairs(text[begin + 1:])
    found = {}
    for name, value in pairs:
        name = re.sub(r"[^a-z]+", "_", name.lower().replace("optimised", "optimized")).strip("_")
        found |= {key: value for key in keys if key in name}
    missing = [key for key in keys if key not in found]
    if missing:
        raise Unusable(f"its JSON object {'breaks off' if '}' not in text[begin:] else 'is broken'}: no {missing[0]}")
    return found


def loose_pairs(text):
    """[(name, value)] of the inside of what nearly is a JSON object."""
    pairs, at = [], 0
    while name := KEY.search(text, at):
        begin = name.end()
        if text[begin:begin + 1] in CLOSING:
            end = CLOSING[text[begin]].search(text, begin + 1)
            if end is None:
                break
            value, at = text[begin + 1:end.start()], end.end()
            value = re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), value, flags=re.DOTALL)
        else:
            end = BARE.match(text, begin)
            if end is None:
                break
            value, at = end[0].strip(), end.end()
        pairs.append((name[1], value))
    return pairs


def as_number(value):
    """A value of an answer as a float: 6.2, "6.2", "6.2 of 9", "seven". Raises Unusable unless it lies in 1..9."""
    text = str(value).strip().lower()
    said = re.match(r"[+-]?\d+(\.\d+)?", text)
    number = float(said[0]) if said else NUMBERS.get(text, math.nan)
    if isinstance(value, bool) or not data.VA_MIN <= number <= data.VA_MAX:
        raise Unusable(f"{text[:40]!r} is no number in 1..9")
    return number


def as_text(value):
    """A value of an answer as one text; a list or an object of texts is joined."""
    if isinstance(value, dict):
        value = [f"{name}: {as_text(part)}" for name, part in value.items()]
    return " ".join((" ".join(map(as_text, value)) if isinstance(value, list) else str(value)).split())


def read_scores(text):
    """(v, a) of an answer to the question `regression`. Raises Unusable."""
    found = read_object(text, ("valence", "arousal"))
    return as_number(found["valence"]), as_number(found["arousal"])


def read_emotion(text):
    """The class of an answer to the question `class`, in lower case. Raises Unusable."""
    return as_text(read_object(text, ("emotion_class",))["emotion_class"]).lower()


def read_rewrite(text, request):
    """(analysis, prompt) of an answer to `compare` or `rewrite`. Raises Unusable, also if the prompt lost the request's
    subject (see `lost_words`)."""
    found = read_object(text, ("analysis", "optimized_prompt"))
    analysis, prompt = as_text(found["analysis"]), as_text(found["optimized_prompt"])
    if not content_words(prompt) or len(prompt) > LONGEST_PROMPT:
        raise Unusable(f"its prompt has {len(prompt):,} characters; expected words, at most {LONGEST_PROMPT:,} characters")
    lost, words = lost_words(request, prompt), content_words(request)
    if len(lost) > len(words) / 4:
        raise Unusable(f"its prompt lost {', '.join(lost)}")
    return analysis, prompt


def read_caption(text):
    """The caption in an answer, as one line: without thoughts, tags, code fences and lines that only announce it, without a
    name in front ("Caption:") and quotes around it. Raises Unusable if no words remain, or too many."""
    text = re.sub(r"</?\w+>|```\w*|\*\*", " ", text.rsplit("</think>", 1)[-1])
    lines = [line.strip(" \t-*#>•") for line in text.splitlines()]
    caption = unquoted(" ".join(" ".join(line for line in lines if not line.endswith(":")).split()))
    caption = unquoted(re.sub(r"^([a-z]+ ){0,3}(caption|description|prompt|sentence) ?:", "", caption, flags=re.I))
    if not content_words(caption) or len(caption) > LONGEST_PROMPT:
        raise Unusable(f"its caption has {len(caption):,} characters; expected words, at most {LONGEST_PROMPT:,} characters")
    return caption


def unquoted(text):
    """A text without the quotes around the whole of it."""
    text = text.strip()
    whole = re.fullmatch(r"""(["'`])(.+)\1|“(.+)”|«(.+)»""", text)
    inside = next((part for part in whole.groups()[1:] if part), "") if whole else ""
    return text if not inside or text[0] in inside else inside.strip()


SMALL_WORDS = set("a an and are as at away be by for from his her in inside into is it its near no of off on onto or our "
                  "out over that the their there this through to under up upon very was were while who with without "
                  "your".split())


def content_words(text):
    """The words of a text that carry its meaning, in lower case: all but articles, prepositions and the like. In scripts
    without spaces every character is a word."""
    words = re.findall(r"[぀-ヿ㐀-鿿]|[^\W\d_぀-ヿ㐀-鿿]+", text.lower())
    return [word for word in words if word not in SMALL_WORDS]


def lost_words(request, prompt):
    """The content words of a request which a rewritten prompt has lost. Endings do not count: "horses" keeps "horse". A
    rewrite that loses more than a quarter of them has lost its subject: with at most three words, any one."""
    def stem(word):
        return re.sub(r"(ing|ed|ly|y|e?s|e)$", "", word) if len(word) > 3 else word

    kept = {stem(word) for word in content_words(prompt)}
    return [word for word in dict.fromkeys(content_words(request)) if stem(word) not in kept]


@dataclass(frozen=True)
class Judgement:
    """What the judge says of one picture; None where its answer could not be read."""
    v: float | None
    a: float | None
    emotion: str | None
    reasoning: str

    @property
    def va(self):
        """(v, a), NaN where the answer could not be read."""
        return (math.nan, math.nan) if self.v is None else (self.v, self.a)

    def distance(self, v, a):
        """|V̂ − V| + |Â − A|, 0..16; 16 if the answer could not be read."""
        return 16.0 if self.v is None else abs(self.v - v) + abs(self.a - a)


def judge_images(judge, images, tasks=TASKS, readings=1):
    """Judgement of each PIL image: valence, arousal, emotion class, and the reasoning of the first answer.

    judge: as in `refine`. tasks: the questions to ask, all pictures at once; what is not asked is None. readings: answers to
    `regression` for each picture, the likeliest and further ones, whose mean is its valence and arousal: a trained judge
    says few different numbers, and many pictures of one prompt would tie.
    """
    found, thoughts = [{"regression": [], "class": []} for _ in images], []
    for task in tasks:
        asked = [ask(task, image) for image in images]
        texts = judge(asked)
        thoughts = thoughts or [text.split("</think>")[0].removeprefix("<think>").strip() for text in texts]
        places = list(range(len(images)))
        if task == "regression" and readings > 1:
            texts = texts + judge(asked, 1, readings - 1)
            places += [i for i in places for _ in range(readings - 1)]
        for i, text in zip(places, texts, strict=True):
            try:
                found[i][task].append(read_scores(text) if task == "regression" else read_emotion(text))
            except Unusable:
                continue  # None says so, if all are
    out = []
    for seen, thought in zip(found, thoughts, strict=True):
        v, a = map(statistics.mean, zip(*seen["regression"])) if seen["regression"] else (None, None)
        out.append(Judgement(v, a, next(iter(seen["class"]), None), thought))
    return out


def judge_of(model, batch=32, max_new_tokens=ANSWER_LIMIT, progress=tqdm):
    """A QwenVL as the callable that `refine` asks: judge(conversations, attempt=0, n=1) -> list of texts, n for each.

    All conversations of a call are answered in one batched generation (several for more than `batch` answers), by the
    likeliest tokens; further attempts at the same question are drawn at temperature 0.7, each from its own seed.
    """
    def judge(conversations, attempt=0, n=1):
        texts, share = [], max(1, batch // n)
        for start in progress(range(0, len(conversations), share), desc="asking the judge", leave=False):
            answers = model.generate(
                conversations[start:start + share], n, max_new_tokens, temperature=0.7 if attempt else 0.0,
                generator=torch.Generator().manual_seed(attempt), progress=partial(progress, desc="tokens", leave=False))
            texts += [completion.text for each in answers for completion in each]
        return texts

    return judge


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


@dataclass(frozen=True)
class Picture:
    image: object  # PIL
    seed: int
    judgement: Judgement
    loss: float  # |V̂ − V| + |Â − A|; 16 if the judge's answer could not be read


@dataclass(frozen=True)
class Round:
    """One round of Algorithm 1: a prompt, its pictures, and what the judge made of them."""
    prompt: str
    pictures: list[Picture]
    analysis: str | None  # None in the last round
    next_prompt: str | None
    note: str  # why the prompt was kept, if it was
    seconds: dict  # of "draw", "judge", "rewrite"

    @property
    def best(self):
        """Place of the picture of least loss."""
        return min(range(len(self.pictures)), key=lambda i: self.pictures[i].loss)

    @property
    def worst(self):
        return max(range(len(self.pictures)), key=lambda i: self.pictures[i].loss)


def best_of(rounds):
    """(round, place) of the picture of least loss of all rounds. Among equals a later round's: a judge says few different
    numbers, and a later prompt has been improved."""
    return min(((r, round.best) for r, round in enumerate(rounds)),
               key=lambda at: (rounds[at[0]].pictures[at[1]].loss, -at[0]))


def rewritten(judge, request, question):
    """(analysis, prompt, note): what the judge answers to question(why), asked up to TRIES times; (None, None, note) if no
    answer can be used."""
    why = None
    for attempt in range(TRIES):
        try:
            return *read_rewrite(judge([question(why)], attempt)[0], request), ""
        except Unusable as error:
            why = str(error)
    return None, None, f"{TRIES} answers could not be used, the last because {why}; the prompt is kept"


def refine(prompt, v, a, generate, judge, rounds=3, images_per_round=8, rewrite=False, tolerance=0.0, seed=0, start=None,
           readings=1, report=None):
    """Algorithm 1 (appendix B.3): draw, judge, compare best and worst, rewrite the prompt -> list of Round.

    prompt: the request, without emotion. v, a: the target, 1..9. generate(prompt, seeds) -> list of PIL images, one a seed;
    a round has `images_per_round`, and no seed comes twice. judge(conversations, attempt) -> list of texts, one a
    conversation (a list of messages as in qwen_vl.chat_text); attempt counts from 0 how often a question was asked; with
    readings > 1 also judge(conversations, attempt, n), n texts a conversation, one after another. start:
    the first round's prompt (default: the request with the target in words); rewrite: the judge's VA-change rewrite of the
    request instead. The loop ends early when a picture's loss is at most `tolerance` (0..16). readings: answers of the judge
    for each picture, as in `judge_images`. report(round) is called after each. The answer is the best picture of all rounds:
    `best_of`. Without a judge (None) one round can be drawn. Raises ValueError for settings out of range.
    """
    v, a = data.check_va(v, a)
    if rounds < 1 or readings < 1 or images_per_round < 1 + (rounds > 1):
        raise ValueError(f"expected rounds, readings and images_per_round >= 1, images_per_round >= 2 if there is more than "
                         f"one round, for best and worst to differ; got {rounds}, {readings} and {images_per_round}")
    text, note, out = start or data.with_words(prompt, v, a), "", []
    clock = time.perf_counter()

    def lap():
        nonlocal clock
        before, clock = clock, time.perf_counter()
        return clock - before

    if rewrite:
        _, first, note = rewritten(judge, prompt, partial(ask_rewrite, prompt, v, a))
        text = first or text
    before = lap()
    for number in range(rounds):
        seeds = list(range(seed + number * images_per_round, seed + (number + 1) * images_per_round))
        images = generate(text, seeds)
        seconds = {"draw": lap()}
        judgements = [Judgement(None, None, None, "")] * len(images)
        if judge is not None:
            judgements = judge_images(judge, images, ("regression",), readings)
        seconds["judge"] = lap()
        pictures = [Picture(*drawn, drawn[-1].distance(v, a)) for drawn in zip(images, seeds, judgements, strict=True)]
        now = Round(text, pictures, None, None, note, {**seconds, "rewrite": before})
        if number + 1 < rounds and pictures[now.best].loss > tolerance:
            ends = [(pictures[i].image, pictures[i].judgement.v, pictures[i].judgement.a) for i in (now.best, now.worst)]
            analysis, better, failed = rewritten(judge, prompt, partial(ask_compare, prompt, text, v, a, *ends))
            now = replace(now, analysis=analysis, next_prompt=better or text, note="; ".join(filter(None, (note, failed))),
                          seconds={**seconds, "rewrite": before + lap()})
        out.append(now)
        if report is not None:
            report(now)
        if now.next_prompt is None:
            break
        text, note, before = now.next_prompt, "", 0.0
        lap()
    return out

"""Every prompt sent to the judge, the one reader of its answers, and Algorithm 1 (EmoFeedback²).

    rounds = refine("a horse in the hills at noon", 7, 3, generate, judge)

Each round draws pictures of a prompt, asks the judge for the valence V and arousal A of each (the
loss is |ΔV| + |ΔA|), shows it the best and the worst, and goes on with the prompt it writes.
`generate` and `judge` are any callables, so that the loop runs with a remote model as well. The
wording of the prompts is ours; they ask for what the paper's Tables 8 and 9 (appendix D) ask for.
In the comments the letters are Algorithm 1's: t_i a prompt, v_i its pictures, G the generator, M(P)
the judge asked P.
"""

import json
import math
import re
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial

import data
from parts.cli import plain_text
from parts.files import parse_json
from parts.prompts import LONGEST_PROMPT, content_words, fill, lost_words, prompts_in
from parts.ranking import UNREADABLE, rank

SCALES = ("Valence goes from 1, very sad, to 9, very happy. Arousal goes from 1, very calm, to 9, "
          "very excited.")
LOOK = "Look at the weather, the light, the background, the objects, the faces and the composition."
REWRITTEN = (
    "Write it in short phrases, richer than before in light, weather, surroundings, colours and "
    "composition, and keep every thing and place that the request names. Answer with one JSON "
    'object and nothing else: {"analysis": "", "optimized_prompt": ""}')
PROMPTS = {  # $name stands for a value of VALUES
    "system": (
        "You judge the emotion of pictures. First say what you see and what it does to the mood, "
        "between <think> and </think>. Then give the result between <answer> and </answer>. Use "
        "each tag once and write nothing else."),
    "regression": (
        f"How does this picture feel? {LOOK} {SCALES} The answer is a JSON object with two numbers "
        'of two decimals: {"valence": , "arousal": }'),
    "class": (
        f"Which emotion does this picture show: {', '.join(data.EMOTIONS)}? {LOOK} The answer is a "
        'JSON object with one of these words: {"emotion_class": ""}'),
    "feedback_system": (
        "You know what gives a picture its emotion, and write prompts for a picture generator. "
        + SCALES),
    "compare": (
        "The generator drew two pictures of one prompt. The first came nearest to the wanted "
        f"emotion, the second least near. {LOOK} In the analysis compare them: what is strong and "
        "weak in each, and what in the first must change, and which way, to come nearer. Then "
        f"rewrite the prompt so that the next picture has these changes. {REWRITTEN}\n"
        "The request: $request. The prompt: $prompt. Wanted: valence $v, arousal $a. The first "
        "picture: valence $best_v, which is $v_miss, arousal $best_a, which is $a_miss. The "
        "second: valence $worst_v, arousal $worst_a."),
    "rewrite": (
        "Write a prompt for a picture of a wanted emotion. Low valence and low arousal is gloomy, "
        "low valence and high arousal threatening, high valence and low arousal serene, high "
        "valence and high arousal joyful. In the analysis say which light, weather, surroundings, "
        f"colours, composition, objects and faces such a picture has. {REWRITTEN}\n"
        "The request: $request. Wanted: valence $v, arousal $a."),
    "again": "Your last answer could not be used: $why. Write another.",
}
VALUES = {
    "compare": ("request", "prompt", "v", "a", "best_v", "best_a", "worst_v", "worst_a", "v_miss",
                "a_miss"),
    "rewrite": ("request", "v", "a"), "again": ("why",),
}
KEYS = {"regression": ("valence", "arousal"), "class": ("emotion_class",)}  # of an answer
ADVICE = ("analysis", "optimized_prompt")
TASKS = tuple(KEYS)
QUESTIONS = prompts_in(PROMPTS, VALUES, KEYS | {  # type of --questions; what a text must hold
    "compare": ("$prompt", "$v", "$a", *ADVICE), "rewrite": ("$request", "$v", "$a", *ADVICE),
    "again": ("$why",)})
ANSWER_LIMIT = 512  # tokens of a judgement, in the judge's training and wherever it is read
REWRITE_LIMIT = 512  # tokens of an analysis with its prompt
TRIES = 3  # of a rewrite, before the prompt is kept as it is


# --------------------------------------------------------------------------------------------------
# Questions


def conversation(system, images, text):
    """Messages as parts/chat.py reads them. system: a template without $names."""
    content = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": text})
    return [{"role": "system", "content": fill(system)}, {"role": "user", "content": content}]


def ask(task, image):
    """The conversation that puts one of TASKS to the judge about a PIL image."""
    return conversation(PROMPTS["system"], [image], fill(PROMPTS[task]))


def ask_compare(request, prompt, v, a, best, worst, why=None):
    """The conversation that asks for an analysis and a better prompt.

    request: the neutral prompt. best, worst: (image, v, a). why: what the last answer lacked.
    """
    text = fill(PROMPTS["compare"], request=request, prompt=prompt, v=v, a=a,
                best_v=best[1], best_a=best[2], worst_v=worst[1], worst_a=worst[2],
                v_miss=miss(best[1], v), a_miss=miss(best[2], a))
    return conversation(PROMPTS["feedback_system"], [best[0], worst[0]], text + once_more(why))


def miss(judged, wanted):
    """By how much a judged value misses the wanted one, in words: judges are poor at sums."""
    if judged is None:
        return "unknown"
    off = round(judged - wanted, 1)
    return f"{abs(off):.1f} too {'high' if off > 0 else 'low'}" if off else "right"


def ask_rewrite(request, v, a, why=None):
    """The conversation that asks for a first prompt at (v, a): the VA-change task of Table 9."""
    text = fill(PROMPTS["rewrite"], request=request, v=v, a=a)
    return conversation(PROMPTS["feedback_system"], [], text + once_more(why))


def once_more(why):
    return "" if why is None else "\n" + fill(PROMPTS["again"], why=why)


# --------------------------------------------------------------------------------------------------
# The reader of the judge's answers

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
ANY_TAG = re.compile("(" + "|".join(TAGS) + ")")
LONGEST_ANSWER = 20_000  # characters; a longer answer is refused unread
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Unusable(Exception):
    """An answer cannot be used; the message tells the judge, or the user, why."""


def read_answer(text, task, strict=True):
    """What an answer to one of TASKS says: (v, a) in 1..9, or a class of data.EMOTIONS, else None.

    strict: the form that training rewards, `strict_object` with exactly the task's keys and with
    JSON numbers, so that an answer cannot hedge. Not strict: what general models write too, an
    object anywhere after their thoughts, more keys, numbers as texts ("7.2", "seven").
    """
    answer = strict_object(text) if strict else first_object(text)
    keys = KEYS[task]
    if answer is None or not answer.keys() >= set(keys) or (strict and len(answer) > len(keys)):
        return None
    if task == "class":
        name = str(answer["emotion_class"]).strip().lower()
        return name if name in data.EMOTIONS else None
    scores = tuple(as_score(answer[key], strict) for key in keys)
    return None if None in scores else scores


def strict_object(text):
    """The JSON object of `<think>…</think><answer>{…}</answer>` as a dict, else None; never raises.

    Each tag stands once in the whole text, in this order, with only white space outside the two
    blocks. The thought may be empty; the JSON has no NaN, no Infinity and no key twice.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    pieces = ANY_TAG.split(text)  # texts and tags in turn
    if pieces[1::2] != TAGS or (pieces[0] + pieces[4] + pieces[8]).strip():
        return None
    try:
        answer = parse_json(pieces[6])
    except (ValueError, RecursionError):  # also for thousands of digits, and for deep nesting
        return None
    return answer if isinstance(answer, dict) else None


def first_object(text):
    """The first JSON object after the thoughts of an answer, as a dict, else None; never raises."""
    text = text.rsplit("</think>", 1)[-1]
    if "{" not in text:
        return None
    try:
        # strict=False: language models write line breaks within a JSON text as they are.
        return json.JSONDecoder(strict=False).raw_decode(text, text.index("{"))[0]
    except (ValueError, RecursionError):
        return None


def as_score(value, strict=True):
    """A JSON value as a float in 1..9, or None. Not strict: texts that begin with a number too."""
    if isinstance(value, str) and not strict:
        word = value.strip().lower()
        digits = re.match(r"\d+(\.\d+)?", word)
        if digits:
            value = float(digits[0])
        elif word in NUMBERS:
            value = NUMBERS.index(word) + 1
    # isinstance would let true and false in, which are integers to Python.
    if type(value) not in (int, float) or not data.VA_MIN <= value <= data.VA_MAX:
        return None
    return float(value)


def read_rewrite(text, request):
    """(analysis, prompt) of an answer to `compare` or `rewrite`. Raises Unusable, also for a prompt
    that lost the request's subject: more than a quarter of its words."""
    answer = first_object(text)
    if answer is None:
        raise Unusable("it has no JSON object" if "{" not in text else "its JSON object is broken")
    said = [answer.get(key) for key in ADVICE]
    if not all(isinstance(part, str) for part in said):
        raise Unusable("its JSON object needs two texts, analysis and optimized_prompt")
    analysis, prompt = map(plain_text, said)
    if not content_words(prompt) or len(prompt) > LONGEST_PROMPT:
        raise Unusable(f"its prompt has {len(prompt):,} characters; expected words, at most "
                       f"{LONGEST_PROMPT:,} characters")
    lost = lost_words(request, prompt)
    if len(lost) > len(content_words(request)) / 4:
        raise Unusable(f"its prompt lost {', '.join(lost)}")
    return analysis, prompt


# --------------------------------------------------------------------------------------------------
# Algorithm 1: pictures are judged, and the prompt is rewritten


@dataclass(frozen=True)
class Judgement:
    """What the judge says of one picture; None where its answer could not be read."""
    v: float | None = None
    a: float | None = None
    emotion: str | None = None
    reasoning: str = ""

    @property
    def va(self):
        """(v, a), NaN where the answer could not be read."""
        return (math.nan, math.nan) if self.v is None else (self.v, self.a)

    def distance(self, v, a):
        """|V̂ − V| + |Â − A|, 0..16; 16 if the answer could not be read."""
        return UNREADABLE if self.v is None else abs(self.v - v) + abs(self.a - a)


def judge_images(judge, images, readings=1, strict=False):
    """The Judgement of each PIL image, without its emotion. Without a judge (None) all are empty.

    readings: answers for each picture, whose mean counts: a trained judge says few different
    numbers, so many pictures of one prompt would tie. Or "logits", the expected value of the digits
    without writing a thought, or "thought", the same after its thought, for which the judge must be
    one of pipeline.judge_of. strict: see `read_answer`; for rewards, True.
    """
    if judge is None:
        return [Judgement()] * len(images)
    questions = [ask("regression", image) for image in images]
    if readings == "logits":
        return [Judgement(v, a) for v, a in judge.expected_va(questions)]
    texts = [[text] for text in judge(questions)]  # of each image
    if readings != "thought" and readings > 1:
        # attempt 0 above is the likeliest answer; attempt 1 draws others, at a temperature
        for number, text in enumerate(judge(questions, 1, readings - 1)):
            texts[number // (readings - 1)].append(text)
    judgements = []
    for own in texts:
        pairs = [read_answer(text, "regression", strict) for text in own]
        pairs = [pair for pair in pairs if pair is not None]
        v, a = map(statistics.mean, zip(*pairs)) if pairs else (None, None)
        reasoning = plain_text(own[0].split("</think>")[0].removeprefix("<think>"))
        judgements.append(Judgement(v, a, None, reasoning))
    if readings == "thought":
        expected = judge.expected_va(questions, [said.reasoning for said in judgements])
        # what could not be read is no answer, whatever its digits might have been
        return [said if said.v is None else replace(said, v=v, a=a)
                for said, (v, a) in zip(judgements, expected, strict=True)]
    return judgements


def judge_emotion(judge, image):
    """The class of data.EMOTIONS that the judge sees in a PIL image, or None."""
    return read_answer(judge([ask("class", image)])[0], "class", strict=False)


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
    best: int  # index of the picture of least loss
    worst: int
    analysis: str | None  # None in the last round
    next_prompt: str | None
    note: str  # why the prompt was kept, if it was
    seconds: dict  # of "draw", "judge", "rewrite"


@dataclass(frozen=True)
class RefineOptions:
    """The less usual settings of `refine_rounds`."""
    rewrite: bool = False  # the judge's VA-change rewrite of the request is the first prompt
    tolerance: float = 0.0  # no further round once a picture's loss, 0..16, is at most this
    seed: int = 0  # of the first picture; the next ones count up, over all rounds
    form: str = "numbers"  # of the target in the first prompt, of data.TARGET_FORMS
    start: str | None = None  # the first prompt, in place of the request with the target
    readings: int | str = 1  # how the judge is read, as in `judge_images`


def refine(prompt, v, a, generate, judge, rounds=3, images_per_round=8, **options):
    """The list of all rounds of `refine_rounds`; options: fields of RefineOptions by name."""
    options = RefineOptions(**options)
    return list(refine_rounds(prompt, v, a, generate, judge, rounds, images_per_round, options))


def refine_rounds(prompt, v, a, generate, judge, rounds=3, images_per_round=8, options=None):
    """Algorithm 1 (appendix B.3): yields each Round when it is finished.

    prompt: the request, without emotion. v, a: the target, 1..9. generate(prompt, seeds) -> list of
    PIL images, one a seed. judge(conversations, attempt) -> list of texts, one a conversation (a
    list of messages); attempt counts from 0 how often a question was asked; with readings > 1 also
    judge(conversations, attempt, n), n texts a conversation, one after another. Without a judge
    (None) one round can be drawn. The result is a picture of the rounds, `best_of`. Raises
    ValueError for settings out of range.
    """
    options = options or RefineOptions()
    v, a = data.check_va(v, a)
    fewest = 2 if rounds > 1 else 1  # best and worst must differ to be compared
    answers = options.readings if isinstance(options.readings, int) else 1
    if rounds < 1 or answers < 1 or images_per_round < fewest:
        raise ValueError(f"expected rounds and readings >= 1 and images_per_round >= {fewest}, got "
                         f"{rounds}, {answers} and {images_per_round}")
    text = options.start or data.TARGET_FORMS[options.form](prompt, v, a)
    note = ""
    rewrite_seconds = 0.0
    if options.rewrite:
        question = partial(ask_rewrite, prompt, v, a)
        (_, first, note), rewrite_seconds = timed(ask_for_prompt, judge, prompt, question)
        text = first or text

    for number in range(rounds):
        # 1. Lines 5 and 11: v_i = G(t_i), a batch of pictures of the prompt.
        start = options.seed + number * images_per_round
        seeds = list(range(start, start + images_per_round))
        images, draw_seconds = timed(generate, text, seeds)

        # 2. Line 7, equation 3, the loss: M(P_loss) reads V and A, whose errors are added up.
        judgements, judge_seconds = timed(judge_images, judge, images, options.readings)
        losses = [judgement.distance(v, a) for judgement in judgements]
        pictures = [Picture(*own) for own in zip(images, seeds, judgements, losses, strict=True)]

        # 3. Line 8: the best and the worst picture.
        best = losses.index(min(losses))
        worst = losses.index(max(losses))
        if worst == best:  # all are alike: still two pictures are compared
            worst = len(losses) - 1
        last = number + 1 == rounds or losses[best] <= options.tolerance

        # 4. Line 9, equation 4, the gradient, and line 10, equation 5, the update: one answer holds
        #    both, M(P_grad) as its analysis and t_{i+1} = M(P_update) as its prompt.
        analysis = next_prompt = None
        if not last:
            ends = [(images[i], judgements[i].v, judgements[i].a) for i in (best, worst)]
            question = partial(ask_compare, prompt, text, v, a, *ends)
            (analysis, better, failed), seconds = timed(ask_for_prompt, judge, prompt, question)
            next_prompt = better or text
            note = "; ".join(filter(None, (note, failed)))
            rewrite_seconds += seconds
        seconds = {"draw": draw_seconds, "judge": judge_seconds, "rewrite": rewrite_seconds}
        yield Round(text, pictures, best, worst, analysis, next_prompt, note, seconds)
        if last:
            return
        text = next_prompt
        note = ""
        rewrite_seconds = 0.0


def ask_for_prompt(judge, request, question):
    """(analysis, prompt, note): the judge's answer to question(why), which is asked up to TRIES
    times; (None, None, note) if no answer can be used."""
    why = None
    for attempt in range(TRIES):
        try:
            return *read_rewrite(judge([question(why)], attempt)[0], request), ""
        except Unusable as error:
            why = str(error)
    return None, None, f"{TRIES} answers were unusable, the last because {why}; the prompt is kept"


def timed(work, *args):
    """(work(*args), the seconds it took)."""
    started = time.perf_counter()
    result = work(*args)
    return result, time.perf_counter() - started


def best_of(rounds, result="best"):
    """(index of the round, index in it) of the result: of all rounds the picture that comes first
    by `rank`, or "last", the best of the last round, as Algorithm 1 returns v_I."""
    if result == "last":
        return len(rounds) - 1, rounds[-1].best
    places = [(r, i) for r, each in enumerate(rounds) for i in range(len(each.pictures))]
    return min(places, key=lambda at: rank(rounds[at[0]].pictures[at[1]].loss, *at))

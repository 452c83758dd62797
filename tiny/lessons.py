"""What the miniature judge is taught before GRPO: answers in words, written from a scene's facts.

Every judgement says what is in the picture and how it looks, then the result. The figures of
valence and arousal are not those the scene was drawn with: they are drawn, anew for each answer,
from the lexicon's Gaussians of the scene's emotion class, as the paper labels its pictures (§4.1).
So the judge learns to see a mood and to put it into words, the form of an answer, and a vague idea
of the values: what number belongs to what it sees is left to GRPO.

Feedback is taught from two scenes with the same things in them, which stand for two pictures of
one prompt, and a wished emotion: what tells the two apart, what the better one lacks, and a prompt
that makes up for it. GRPO does not touch it.
"""

import json
from dataclasses import dataclass

import numpy as np

import data
from tiny import scenes

DESCRIBE = "What is in this picture?"
PROMPT_SPREAD = 0.8  # how far a generator's pictures lie, in the mean, from what its prompt says
WISH_SPREAD = 1.2  # how far the wish lies from the better picture, or it lies anywhere
JUDGE_SPREAD = 0.8  # how far judged values lie from a picture's own
GAIN = 0.7  # share of what the better picture misses that new words make up for; the rest is chance


# --------------------------------------------------------------------------------------------------
# Judgements


def mood(v, a):
    """The words of (v, a), one of seven on either scale."""
    return data.VALENCE_WORDS[data.level(v, 7)][0], data.AROUSAL_WORDS[data.level(a, 7)][0]


def thought(scene, v, a):
    """Two sentences: what is in the picture and how it looks; and how that feels.

    Nothing in it is left to chance: in GRPO every token that was drawn at random adds noise to the
    gradient.
    """
    seen = scenes.facts(scene, v, a)
    valence, arousal = mood(v, a)  # the first synonyms: seven levels, seven words
    content = f"{seen['subject']} {seen['place']} {seen['time']}"
    looks = f"{seen['weather']}, {seen['light']}"
    return f"{content}: {looks}. It feels {valence} and {arousal}."


def answer(task, scene, v, a, rng):
    """A full answer to the question `task` about a scene drawn at (v, a)."""
    emotion = data.nearest_emotion(v, a)
    if task == "regression":
        drawn = data.draw_va(emotion, rng)
        result = f'{{"valence": {drawn[0]:.2f}, "arousal": {drawn[1]:.2f}}}'
    else:
        result = json.dumps({"emotion_class": emotion})  # this label is exact
    return f"<think>{thought(scene, v, a)}</think><answer>{result}</answer>"


# --------------------------------------------------------------------------------------------------
# Feedback


@dataclass(frozen=True)
class Comparison:
    """A question `compare`, all but its pictures, and what answers it."""
    request: str
    prompt: str  # that both pictures were drawn of
    wish: tuple[float, float]
    best: tuple[float, float]  # judged values
    worst: tuple[float, float]
    order: int  # 1 if the first of the two rows is the better picture, -1 if the second
    answer: str
    brief: str  # the answer without what only the pictures show


def on_scale(values):
    return tuple(float(x) for x in np.clip(values, data.VA_MIN, data.VA_MAX))


def shaken(va, sd, rng):
    """(V, A) with Gaussian noise, kept on the scale."""
    return on_scale([x + rng.normal(0, sd) for x in va])


def comparison(one, other, rng):
    """The Comparison of two (scene, v, a) rows that show the same things.

    The prompt had no mood, figures, or words that missed the pictures by as much as a generator's
    bias; the new one corrects those words by what the better picture missed. In half of the cases
    the pictures miss the request's subject and time of day: these must be read, not seen.
    """
    # 1. the wish, and which of the two pictures is nearer to it
    if rng.random() < 0.5:
        wish = shaken(one[1:], WISH_SPREAD, rng)
    else:
        wish = on_scale(rng.uniform(data.VA_MIN, data.VA_MAX, 2))
    losses = [np.abs(np.subtract(row[1:], wish)).sum() for row in (one, other)]
    order = 1 if losses[0] <= losses[1] else -1
    (scene, *seen), (_, *seen_other) = (one, other)[::order]

    # 2. the request, and the prompt that both pictures were drawn of
    if rng.random() < 0.5:
        scene = scenes.with_other_words(scene, rng)
    request = scenes.neutral_caption(scene)
    kind = rng.random()
    better = wish  # what the new prompt should say
    if kind < 0.1:
        prompt = request
    elif kind < 0.35:
        prompt = data.with_numbers(request, *wish)
    else:
        meant = shaken(seen, PROMPT_SPREAD, rng)
        if kind < 0.6:
            prompt = scenes.emotional_caption(scene, *meant, rng)
        else:
            prompt = rich_prompt(scene, *meant)
        better = on_scale(np.add(meant, GAIN * np.subtract(wish, seen)))

    # 3. the answer
    lacks = lack(scene, seen, wish)
    text = rich_prompt(scene, *better)
    first = look(scene, *seen, "The first")
    second = look(scene, *seen_other, "The second")
    return Comparison(
        request, prompt, wish,
        best=shaken(seen, JUDGE_SPREAD, rng),
        worst=shaken(seen_other, JUDGE_SPREAD, rng),
        order=order,
        answer=advice(f"{first} {second} {lacks}", text),
        brief=advice(lacks, text),
    )


def advice(analysis, prompt):
    return json.dumps({"analysis": analysis, "optimized_prompt": prompt})


def look(scene, v, a, which):
    """How one of two pictures looks and feels, in a sentence."""
    seen = scenes.facts(scene, v, a)
    return f"{which} has {seen['weather']} and {seen['light']}: {' and '.join(mood(v, a))}."


def lack(scene, seen, wish):
    """What the better picture lacks, in two sentences: how far it is off, and what is wanted."""
    v_off = amount(seen[0] - wish[0], "sad", "pleasant")
    a_off = amount(seen[1] - wish[1], "calm", "excited")
    wanted = scenes.facts(scene, *wish)
    return (f"Wanted is {' and '.join(mood(*wish))}: the first is {v_off} and {a_off}. It needs "
            f"{wanted['weather']}, {wanted['light']}, {wanted['colour']}.")


def amount(difference, low, high):
    """How far a picture is off on one scale, in words."""
    size = abs(difference)
    word = low if difference < 0 else high
    if size < 0.5:
        return f"{word} enough"
    return f"{'a little' if size < 1.5 else 'much'} too {word}"


def rich_prompt(scene, v, a):
    """The scene's request with the words of (v, a) and what such a mood puts in the picture."""
    seen = scenes.facts(scene, v, a)
    words = data.with_words(scenes.neutral_caption(scene), v, a)
    return f"{words}, {seen['weather']}, {seen['light']}"


def rewrite(scene, wish):
    """The answer to the question `rewrite` about a scene and a wish."""
    seen = scenes.facts(scene, *wish)
    analysis = (f"Wanted is a {' and '.join(mood(*wish))} picture: {seen['weather']}, "
                f"{seen['light']}, {seen['colour']}, {seen['motion']}.")
    return advice(analysis, rich_prompt(scene, *wish))

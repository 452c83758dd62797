"""What the miniature judge is taught before GRPO: answers in words, written from a scene's facts.

It learns what a general judge knows: to describe a picture, to name its emotion, and the form of an
answer. Every judgement says what is in the picture and how it looks, then the result. The figures
of valence and arousal are not those the scene was drawn with: they are drawn, anew for each answer,
from the lexicon's Gaussians of the scene's emotion class, as the paper labels its pictures (§4.1).
No word of a judgement stands for a level of either scale: what number belongs to what it sees is
left to GRPO. (The prompts of feedback, below, have numbers beside graded words.)

Feedback is taught from two scenes with the same things in them, which stand for two pictures of
one prompt, and a wished emotion: how each looks, by how much the better one misses the wish by its
scores, and a prompt, in graded words and numbers, that asks for as much more. The small sum is
written out, since so small a model has no other place to do it.
"""

import json
from dataclasses import dataclass

import numpy as np

import data
from tiny import scenes

DESCRIBE = "What is in this picture?"
PROMPT_SPREAD = 0.8  # how far a generator's pictures lie, in the mean, from what its prompt says
WISH_SPREAD = 1.2  # how far the wish lies from the better picture, or it lies anywhere
JUDGE_SPREAD = 0.5  # how far judged values lie from a picture's own
THOUGHTLESS = 0.15  # share of the judgements without a thought: an answer may be asked for at once


# --------------------------------------------------------------------------------------------------
# Judgements


def thought(scene, v, a):
    """What is in the picture and how it looks, in a sentence.

    Nothing in it is left to chance: in GRPO every token that was drawn at random adds noise to the
    gradient.
    """
    seen = scenes.facts(scene, v, a)
    content = f"{seen['subject']} {seen['place']} {seen['time']}"
    return f"{content}: {seen['weather']}, {seen['light']}."


def description(scene, v, a):
    """All that can be said of a picture, the answer to DESCRIBE.

    A general judge has eyes for fine differences, from descriptions of more than its answers hold.
    """
    seen = scenes.facts(scene, v, a)
    brightness, saturation = scenes.targets(v, a)
    return (f"{thought(scene, v, a)} It has {seen['colour']}, and {seen['motion']}. Its brightness "
            f"is {100 * brightness:.0f}, its colourfulness {100 * saturation:.0f} of 100.")


def answer(task, scene, v, a, rng):
    """A full answer to the question `task` about a scene drawn at (v, a)."""
    emotion = data.nearest_emotion(v, a)
    if task == "regression":
        drawn = data.draw_va(emotion, rng)
        result = f'{{"valence": {drawn[0]:.2f}, "arousal": {drawn[1]:.2f}}}'
    else:
        result = json.dumps({"emotion_class": emotion})  # this label is exact
    thinks = "" if rng.random() < THOUGHTLESS else thought(scene, v, a)
    return f"<think>{thinks}</think><answer>{result}</answer>"


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

    The prompt had no mood, or words, figures or both, which missed the pictures by as much as a
    generator's bias; the new one corrects them by what the better picture shows. In half of the
    cases the pictures miss the request's subject and time of day: these must be read, not seen.
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
    meant = shaken(seen, PROMPT_SPREAD, rng)  # what the prompt said
    kind = rng.random()
    if kind < 0.1:
        prompt = request
    elif kind < 0.4:
        prompt = data.with_numbers(request, *meant)
    elif kind < 0.6:
        prompt = scenes.emotional_caption(scene, *meant, rng)
    else:
        prompt = data.with_both(request, *meant)

    # 3. the answer, whose analysis and prompt agree with the scores that the question gives
    best = shaken(seen, JUDGE_SPREAD, rng)
    # a prompt without figures is taken to ask for the wish
    asked = meant if f"valence {meant[0]:.1f}" in prompt else wish
    said, better = sums(best, wish, asked)
    wanted = scenes.facts(scene, *better)
    said += f" It needs {wanted['weather']}, {wanted['light']}, {wanted['colour']}."
    text = data.with_both(request, *better)
    first = look(scene, *seen, "The first")
    second = look(scene, *seen_other, "The second")
    return Comparison(
        request, prompt, wish, best,
        worst=shaken(seen_other, JUDGE_SPREAD, rng),
        order=order,
        answer=advice(f"{first} {second} {said}", text),
        brief=advice(said, text),
    )


def sums(judged, wish, asked):
    """(sentences, (V, A)): by how much the better picture misses the wish, as the question says it,
    and what to ask for in place of the (V, A) that its prompt asked for; all to a tenth."""
    asked = [round(x, 1) for x in asked]
    off = [round(x - y, 1) for x, y in zip(judged, wish, strict=True)]
    better = on_scale(np.subtract(asked, off))
    return (f"The first is {amount(off[0], 'sad', 'pleasant')}, and "
            f"{amount(off[1], 'calm', 'excited')}. "
            f"In place of valence {asked[0]:.1f} ask for {better[0]:.1f}, "
            f"in place of arousal {asked[1]:.1f} for {better[1]:.1f}."), better


def advice(analysis, prompt):
    return json.dumps({"analysis": analysis, "optimized_prompt": prompt})


def look(scene, v, a, which):
    """How one of two pictures looks, in a sentence."""
    seen = scenes.facts(scene, v, a)
    return f"{which} has {seen['weather']} and {seen['light']}."


def amount(off, low, high):
    """How far a picture is off on one scale, in words and to a tenth."""
    size = abs(off)
    if size == 0:
        return f"neither too {low} nor too {high}"
    grade = "barely" if size < 0.4 else "a little" if size < 1.2 else "much"
    return f"{grade} too {low if off < 0 else high}, by {size:.1f}"


def rewrite(scene, wish):
    """The answer to the question `rewrite` about a scene and a wish."""
    seen = scenes.facts(scene, *wish)
    analysis = (f"Such a picture has {seen['weather']}, {seen['light']}, {seen['colour']}, "
                f"{seen['motion']}.")
    return advice(analysis, data.with_both(scenes.neutral_caption(scene), *wish))

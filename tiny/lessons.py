"""What the miniature judge is taught before GRPO: answers in words, written from the facts of a scene.

Every answer says what is in the picture and how it looks, then the result. The figures of valence and arousal are not
those the scene was drawn with: they are drawn, anew for each answer, from the lexicon's Gaussians of the scene's
emotion class, as the paper labels its pictures (section 4.1). So the judge learns to see a mood and to put it into words,
the form of an answer, and a vague idea of the values: what number belongs to what it sees is left to GRPO.
"""

import json

import data
from tiny import scenes

DESCRIBE = "What is in this picture?"


def thought(scene, v, a):
    """Two sentences: what is in the picture and how it looks; and how that feels, in one of seven words of either scale.

    Nothing in it is left to chance: in GRPO every token that was drawn at random adds noise to the gradient.
    """
    seen = scenes.facts(scene, v, a)
    valence, arousal = data.VALENCE_WORDS[data.level(v, 7)][0], data.AROUSAL_WORDS[data.level(a, 7)][0]
    return (f"{seen['subject']} {seen['place']} {seen['time']}: {seen['weather']}, {seen['light']}. "
            f"It feels {valence} and {arousal}.")


def answer(task, scene, v, a, rng):
    """A full answer to the question `task` about a scene drawn at (v, a)."""
    emotion = data.nearest_emotion(v, a)
    if task == "regression":
        drawn = data.draw_va(emotion, rng)
        result = f'{{"valence": {drawn[0]:.2f}, "arousal": {drawn[1]:.2f}}}'
    else:
        result = json.dumps({"emotion_class": emotion})
    return f"<think>{thought(scene, v, a)}</think><answer>{result}</answer>"

"""What the judge is asked, and how its answers are used (EmoFeedback², section 3.1 and appendix D).

The wording is ours; each prompt says what the paper's Table 8 makes it say: the task, the scales with their meaning at
both ends, what to look at, and the exact JSON keys. Left out here: comparing pictures and rewriting prompts.
"""

import math
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

import data
import grpo

LOOK = "Look at the weather, the light, the background, the objects, the faces and the composition."
PROMPTS = {
    "system": "You judge the emotion of pictures. First say what you see and what it does to the mood, between <think> and "
              "</think>. Then give the result between <answer> and </answer>. Use each tag once and write nothing else.",
    "regression": f"How does this picture feel? {LOOK} Valence goes from 1, very sad, to 9, very happy. Arousal goes from "
                  f"1, very calm, to 9, very excited. The answer is a JSON object with two numbers of two decimals: "
                  f'{{"valence": , "arousal": }}',
    "class": f"Which emotion does this picture show: {', '.join(data.EMOTIONS)}? {LOOK} The answer is a JSON object with "
             f'one of these words: {{"emotion_class": ""}}',
}
TASKS = ("regression", "class")
ANSWER_LIMIT = 256  # tokens


def ask(task, image):
    """The conversation that puts one of TASKS to the judge about a PIL image."""
    return [{"role": "system", "content": PROMPTS["system"]},
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": PROMPTS[task]}]}]


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


def judge_images(model, images, batch=32, max_new_tokens=ANSWER_LIMIT, progress=tqdm, tasks=TASKS):
    """Judgement of each PIL image: valence, arousal, emotion class, and the reasoning of the first answer (greedy).

    tasks: the questions to ask; what is not asked is None.
    """
    texts = {task: [] for task in tasks}
    for task in tasks:
        for start in progress(range(0, len(images), batch), desc=f"judging ({task})", leave=False):
            prompts = [ask(task, image) for image in images[start:start + batch]]
            answers = model.generate(prompts, max_new_tokens=max_new_tokens, temperature=0,
                                     progress=partial(progress, desc="tokens", leave=False))
            texts[task] += [answer[0].text for answer in answers]
    out = []
    for i in range(len(images)):
        regression, emotion = (texts[task][i] if task in texts else "" for task in TASKS)
        v, a = grpo.read_va(grpo.parse_answer(regression)) or (None, None)
        thought = (regression or emotion).split("</think>")[0].removeprefix("<think>").strip()
        out.append(Judgement(v, a, grpo.read_emotion(grpo.parse_answer(emotion)), thought))
    return out

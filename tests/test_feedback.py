"""What the judge is asked, and how its answers are used."""

from types import SimpleNamespace

import pytest
from PIL import Image

import data
import feedback
import qwen_vl

PICTURE = Image.new("RGB", (64, 64))


@pytest.mark.parametrize("task", feedback.TASKS)
def test_a_question_shows_the_picture_and_says_task_scales_and_keys(task):
    conversation = feedback.ask(task, PICTURE)
    text = qwen_vl.chat_text(conversation)
    assert text.count("<|image_pad|>") == 1 and conversation[1]["content"][0]["image"] is PICTURE
    for word in ("weather", "light", "background", "objects", "faces", "composition", "JSON"):
        assert word in text
    wanted = ('"valence"', '"arousal"', "1, very sad", "9, very happy", "1, very calm", "9, very excited", "two decimals")
    assert all(word in text for word in (wanted if task == "regression" else ('"emotion_class"', *data.EMOTIONS)))


class Scripted:
    """A judge with given answers, which remembers how many pictures it was asked about at once."""

    def __init__(self, answers):
        self.answers, self.batches = answers, []

    def generate(self, messages, **settings):
        assert settings["temperature"] == 0
        self.batches.append(len(messages))
        tasks = ["regression" if "valence" in m[1]["content"][1]["text"] else "class" for m in messages]
        return [[SimpleNamespace(text=self.answers[task].pop(0))] for task in tasks]


def test_judgements_hold_values_class_and_reasoning_and_none_where_an_answer_is_unreadable():
    judge = Scripted({
        "regression": ['<think> fog </think><answer>{"valence": 2.5, "arousal": 3}</answer>', "I feel nothing",
                       '<think>sun</think><answer>{"valence": 20, "arousal": 3}</answer>'],
        "class": ['<think>x</think><answer>{"emotion_class": "sadness"}</answer>', "",
                  '<think>x</think><answer>[]</answer>']})
    first, second, third = feedback.judge_images(judge, [PICTURE] * 3, batch=2)
    assert first == feedback.Judgement(2.5, 3.0, "sadness", "fog")
    assert (second.v, second.a, second.emotion, second.reasoning) == (None, None, None, "I feel nothing")
    assert (third.v, third.emotion, third.reasoning) == (None, None, "sun")
    assert judge.batches == [2, 1, 2, 1]
    assert first.distance(3, 5) == 2.5 and second.distance(3, 5) == 16

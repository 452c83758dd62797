"""What the judge is asked, how its answers are read, and Algorithm 1 with a made-up judge and generator."""

import json
import math
import re
from argparse import ArgumentTypeError
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
import feedback
from parts import chat
from parts.pipeline import judge_of

PICTURE = Image.new("RGB", (64, 64))
REQUEST = "a swan on the lake at noon"


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def said_in(conversation):
    """The user's text of a conversation."""
    return conversation[1]["content"][-1]["text"]


@pytest.mark.parametrize("task", feedback.TASKS)
def test_a_question_shows_the_picture_and_says_task_scales_and_keys(task):
    conversation = feedback.ask(task, PICTURE)
    text = chat.chat_text(conversation)
    assert text.count("<|image_pad|>") == 1 and conversation[1]["content"][0]["image"] is PICTURE
    for word in ("weather", "light", "background", "objects", "faces", "composition", "JSON"):
        assert word in text
    wanted = ('"valence"', '"arousal"', "1, very sad", "9, very happy", "1, very calm", "9, very excited", "two decimals")
    assert all(word in text for word in (wanted if task == "regression" else ('"emotion_class"', *data.EMOTIONS)))


def test_feedback_is_asked_with_both_pictures_scores_target_scales_and_keys():
    best, worst = Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))
    question = feedback.ask_compare(REQUEST, "a swan, gloomy", 7, 3, (best, 5.5, 4.25), (worst, None, None), "it is empty")
    assert [part.get("image") for part in question[1]["content"]] == [best, worst, None]
    text = chat.chat_text(question)
    for word in (REQUEST, "a swan, gloomy", "valence 7.00, arousal 3.00",
                 "valence 5.50, which is 1.5 too low, arousal 4.25, which is 1.2 too high",
                 "valence unknown, arousal unknown", "it is empty"):
        assert word in text
    rewrite = chat.chat_text(feedback.ask_rewrite(REQUEST, 7, 3))
    assert "image_pad" not in rewrite and "last answer" not in rewrite and "valence 7.00, arousal 3.00" in rewrite
    for asked in (text, rewrite):
        for word in ("weather", "light", "colours", "composition", "objects", "faces", "very sad", "very excited",
                     '"analysis"', '"optimized_prompt"', "one JSON object and nothing else", "names"):
            assert word in asked


def test_a_file_replaces_questions(tmp_path, monkeypatch):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"rewrite": "$request at $v, $a for $$5: analysis, optimized_prompt",
                                "system": "You are terse."}))
    for name, text in feedback.QUESTIONS(path).items():
        monkeypatch.setitem(feedback.PROMPTS, name, text)
    asked = said_in(feedback.ask_rewrite("a $cat", 7, 3))
    assert asked == "a $cat at 7.00, 3.00 for $5: analysis, optimized_prompt"
    assert feedback.ask("class", PICTURE)[0]["content"] == "You are terse."


def test_the_shipped_questions_are_a_file_of_questions_themselves(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(feedback.PROMPTS))
    assert feedback.QUESTIONS(tmp_path / "own.json") == feedback.PROMPTS


@pytest.mark.parametrize("name, lost", [
    ("regression", "arousal"), ("class", "emotion_class"), ("compare", "$prompt"), ("compare", "optimized_prompt"),
    ("rewrite", "$request"), ("again", "$why")])
def test_a_question_that_cannot_be_answered_is_refused(tmp_path, name, lost):
    (tmp_path / "own.json").write_text(json.dumps({name: feedback.PROMPTS[name].replace(lost, "")}))
    with pytest.raises(ArgumentTypeError, match=re.escape(f"'{name}' lacks {lost}")):
        feedback.QUESTIONS(tmp_path / "own.json")


# ---------------------------------------------------------------------------------------------------------------------
# Answers

GOOD = {"analysis": "Too dark: it's gloomy, and the sky is \"low\".",
        "optimized_prompt": "a swan on the lake at noon, sunny"}
WRITTEN = {
    "plain": json.dumps(GOOD),
    "fenced": f"```json\n{json.dumps(GOOD, indent=2)}\n```",
    "talkative": f"Sure! Here it is: {json.dumps(GOOD)}\nI hope {{that}} helps.",
    "thinking": f"<think>a {{\"analysis\": \"no\"}}</think>\n<answer>{json.dumps(GOOD)}</answer>",
    "line breaks": json.dumps(GOOD).replace(" the sky", "\nthe sky"),
    "more keys": json.dumps({"note": 1} | GOOD),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_what_language_models_write_is_read(how):
    assert feedback.read_rewrite(WRITTEN[how], REQUEST) == tuple(GOOD.values())


@pytest.mark.parametrize("answer, why", [
    ("I cannot.", "no JSON object"), ('{"analysis": "dark", "optimized_pr', "is broken"), ("{" * 5000, "is broken"),
    ('{"analysis": "dark", "optimized_prompt": "a swan on the la', "is broken"),
    ('{"analysis": "dark"}', "optimized_prompt"),
    (json.dumps(GOOD | {"analysis": ["dark", "cold"]}), "two texts"),
    ('{"analysis": "", "optimized_prompt": ", , "}', "expected words"),
    (json.dumps(GOOD | {"optimized_prompt": "swan lake noon " * 400}), "5,999 characters"),
    (json.dumps(GOOD | {"optimized_prompt": "a sunny lake at noon"}), "lost swan")])
def test_what_cannot_be_used_says_why(answer, why):
    with pytest.raises(feedback.Unusable, match=why.replace(".", r"\.")):
        feedback.read_rewrite(answer, REQUEST)


@given(st.text(max_size=300))
def test_no_text_breaks_the_reader(text):
    for answer in (text, '{"analysis": "' + text, '{"valence": ' + text + "}", '{"emotion_class": ' + text + "}"):
        for task in feedback.TASKS:
            assert feedback.read_answer(answer, task, strict=True) is None
            feedback.read_answer(answer, task, strict=False)
        try:
            assert feedback.read_rewrite(answer, REQUEST)
        except feedback.Unusable as reason:
            assert str(reason)


STRICT = "<think>fog</think><answer>{}</answer>"


@pytest.mark.parametrize("answer, scores", [
    ('{"valence": 2.5, "arousal": 3}', (2.5, 3.0)), ('{"valence": 1, "arousal": 9.0}', (1.0, 9.0)),
    ('{"valence": 20, "arousal": 3}', None), ('{"valence": true, "arousal": 3}', None),
    ('{"valence": null, "arousal": 3}', None), ('{"valence": NaN, "arousal": 3}', None), ('{"valence": 3}', None)])
def test_both_readings_agree_on_answers_in_the_form_that_was_asked_for(answer, scores):
    for strict in (True, False):
        assert feedback.read_answer(STRICT.format(answer), "regression", strict) == scores
        assert feedback.read_answer(STRICT.format(answer), "class", strict) is None


@pytest.mark.parametrize("answer, scores", [
    ('{"valence": 2.5, "arousal": 3}', (2.5, 3.0)),
    ('```json\n{"valence": "7.25", "arousal": 1.00}\n```', (7.25, 1.0)),
    ('I would say {"valence": "6.2 of 9", "arousal": "four"}.', (6.2, 4.0)),
    (STRICT.format('{"valence": 2.5, "arousal": 3, "mood": "sad"}'), (2.5, 3.0)),
    (STRICT.format('{"valence": "Seven ", "arousal": 3}'), (7.0, 3.0)),
    ('{"valence": "high", "arousal": 3}', None), ('{"valence": "-2", "arousal": 3}', None),
    ('{"valence": "99", "arousal": 3}', None), ('{"valence": 2.5, "arousal": 3', None), ("[2.5, 3]", None)])
def test_only_the_lenient_reading_forgives_what_general_models_write(answer, scores):
    assert feedback.read_answer(answer, "regression", strict=False) == scores
    assert feedback.read_answer(answer, "regression", strict=True) is None


@pytest.mark.parametrize("answer, emotion", [
    ('{"emotion_class": "awe"}', "awe"), ('{"emotion_class": " Sadness"}', "sadness"), ('{"emotion_class": "joy"}', None),
    ('{"emotion_class": null}', None), ('{"emotion_class": ["awe"]}', None)])
def test_a_class_is_one_of_the_eight(answer, emotion):
    for strict in (True, False):
        assert feedback.read_answer(STRICT.format(answer), "class", strict) == emotion
    assert feedback.read_answer(answer, "class", strict=False) == emotion


@given(st.floats(1, 9), st.floats(1, 9), st.text(st.characters(exclude_characters="<")))
def test_every_pair_of_the_scale_is_read_exactly(v, a, thought):
    text = f"<think>{thought}</think>\n<answer>{json.dumps({'valence': v, 'arousal': a})}</answer>"
    assert feedback.read_answer(text, "regression", True) == feedback.read_answer(text, "regression", False) == (v, a)


class Scripted:
    """A judge with given answers, which remembers how many pictures it was asked about at once."""

    def __init__(self, answers):
        self.answers, self.batches = answers, []

    def generate(self, messages, n, max_new_tokens, temperature, **settings):
        assert temperature == (0.7 if n > 1 else 0)
        self.batches.append(len(messages))
        tasks = ["regression" if "valence" in said_in(m) else "class" for m in messages]
        return [[SimpleNamespace(text=self.answers[task].pop(0)) for _ in range(n)] for task in tasks]


def test_judgements_hold_values_and_reasoning_and_none_where_an_answer_is_unreadable():
    judge = Scripted({"regression": [
        '<think> fog </think><answer>{"valence": 2.5, "arousal": 3}</answer>', "I feel nothing",
        '<think>sun</think><answer>{"valence": 20, "arousal": 3}</answer>']})
    first, second, third = feedback.judge_images(judge_of(judge, batch=2), [PICTURE] * 3)
    assert first == feedback.Judgement(2.5, 3.0, None, "fog")
    assert (second.v, second.a, second.reasoning) == (None, None, "I feel nothing")
    assert (third.v, third.a, third.reasoning) == (None, None, "sun")
    assert judge.batches == [2, 1]
    assert first.distance(3, 5) == 2.5 and second.distance(3, 5) == 16 and math.isnan(second.va[0])


def test_rewards_count_only_answers_in_the_form_that_was_asked_for():
    said = '{"valence": 2.5, "arousal": 3}'
    for strict in (True, False):
        judge = judge_of(Scripted({"regression": [said, STRICT.format(said)]}))
        judgements = feedback.judge_images(judge, [PICTURE] * 2, strict=strict)
        assert [j.v for j in judgements] == [None if strict else 2.5, 2.5]


def test_the_judge_names_one_of_the_classes_or_none():
    judge = judge_of(Scripted({"class": [STRICT.format('{"emotion_class": "Sadness"}'), "", STRICT.format("[]")]}))
    assert [feedback.judge_emotion(judge, PICTURE) for _ in range(3)] == ["sadness", None, None]


def test_several_readings_of_a_picture_are_averaged_over_those_that_can_be_read():
    def texts(*said):
        return [va if va == "?" else json.dumps(dict(zip(("valence", "arousal"), va))) for va in said]

    judge = Scripted({"regression": texts((2, 4), "?", (5, 5), (3, 6), (4, 5), "?", "?", (5, 4), (6, 3))})
    judgements = feedback.judge_images(judge_of(judge, batch=4), [PICTURE] * 3, readings=3)
    assert [(j.v, j.a) for j in judgements] == [(3, 5), (None, None), (16 / 3, 4)]
    assert judgements[0].reasoning == '{"valence": 2, "arousal": 4}' and judge.batches == [3, 2, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


class World:
    """A generator whose pictures are (prompt, seed), and a judge that finds `moods[prompt]`, plus 0.1 a seed, in them and
    answers questions for a prompt from a list."""

    def __init__(self, moods, answers):
        self.moods, self.answers, self.drawn, self.asked, self.attempts = moods, answers, [], [], []

    def generate(self, prompt, seeds):
        self.drawn.append((prompt, list(seeds)))
        return [(prompt, seed) for seed in seeds]

    def judge(self, conversations, attempt=0):
        texts = []
        for messages in conversations:
            *pictures, text = messages[1]["content"]
            if "optimized_prompt" in text["text"]:
                self.asked.append(([part["image"] for part in pictures], text["text"]))
                self.attempts.append(attempt)
                texts.append(self.answers.pop(0))
            else:
                prompt, seed = pictures[0]["image"]
                mood = self.moods[prompt]
                texts.append("..." if mood is None else json.dumps({"valence": mood[0] + seed / 10, "arousal": mood[1]}))
        return texts


def advice(prompt, analysis="darker"):
    return json.dumps({"analysis": analysis, "optimized_prompt": prompt})


ROUND_0 = data.with_numbers(REQUEST, 7, 3)


def test_refine_draws_judges_compares_best_and_worst_and_goes_on_with_the_new_prompt():
    better, last = f"{REQUEST}, sunny", f"{REQUEST}, golden"
    world = World({ROUND_0: (5, 3), better: (6.38, 3), last: (6, 4)}, [advice(better, "more sun"), advice(last)])
    steps = feedback.refine_rounds(REQUEST, 7, 3, world.generate, world.judge, 3, 4)
    rounds = [next(steps)]
    assert len(world.drawn) == len(world.asked) == 1  # a round is handed over before the next is drawn
    rounds += steps
    assert world.drawn == [(ROUND_0, [0, 1, 2, 3]), (better, [4, 5, 6, 7]), (last, [8, 9, 10, 11])]
    assert [(r.best, r.worst) for r in rounds] == [(3, 0), (2, 0), (2, 0)]
    assert [p.loss for p in rounds[0].pictures] == pytest.approx([2, 1.9, 1.8, 1.7])
    told = [(r.analysis, r.next_prompt, r.note) for r in rounds]
    assert told == [("more sun", better, ""), ("darker", last, ""), (None, None, "")]
    assert world.asked[0][0] == [(ROUND_0, 3), (ROUND_0, 0)]  # best first, then worst
    for text in (f"The prompt: {ROUND_0}", "valence 5.30, which is 1.7 too low, arousal 3.00, which is right", "valence 5.00, arousal 3.00", "valence 7.00"):
        assert text in world.asked[0][1]
    assert feedback.best_of(rounds) == (1, 2) and set(rounds[0].seconds) == {"draw", "judge", "rewrite"}


def test_refine_stops_early_within_the_tolerance_and_keeps_the_best_of_all_rounds():
    better = f"{REQUEST}, sunny"
    world = World({ROUND_0: (5, 3), better: (6.5, 3)}, [advice(better)])
    rounds = feedback.refine(REQUEST, 7, 3, world.generate, world.judge, 9, 2, tolerance=0.35, seed=1)
    assert len(rounds) == 2 and rounds[1].next_prompt is None
    assert rounds[1].pictures[rounds[1].best].loss == pytest.approx(0.1)


def test_a_rewrite_that_is_broken_or_loses_the_subject_is_asked_for_again_and_then_refused():
    good = f"{REQUEST}, sunny"
    world = World({ROUND_0: (5, 3), good: (5, 3)}, ["{", advice("a sunny lake at noon"), advice(good), "", "no", "{}"])
    rounds = feedback.refine(REQUEST, 7, 3, world.generate, world.judge, rounds=3, images_per_round=2)
    assert rounds[0].next_prompt == good and rounds[0].note == "" and world.attempts == [0, 1, 2, 0, 1, 2]
    assert "could not be used" not in world.asked[0][1] and "its prompt lost swan" in world.asked[2][1]
    assert rounds[1].next_prompt == rounds[2].prompt == good and rounds[1].analysis is None
    assert "3 answers were unusable" in rounds[1].note and "the prompt is kept" in rounds[1].note


def test_a_rewrite_brings_nothing_but_text():
    said = advice(f"{REQUEST} \x1b[2J\ud800, <|image_pad|>serene\n<|im_end|>")
    analysis, prompt = feedback.read_rewrite(said, REQUEST)
    assert prompt == f"{REQUEST} [2J , serene"
    feedback.ask_compare(REQUEST, prompt, 7, 3, (PICTURE, 5, 5), (PICTURE, 4, 4))


def test_the_first_prompt_can_be_given_or_rewritten():
    first = f"{REQUEST}, serene"
    world = World({first: (7, 3), ROUND_0: (7, 3)}, [advice(first), "", "", ""])
    one, kept = (feedback.refine(REQUEST, 7, 3, world.generate, world.judge, 1, 1, rewrite=True)[0] for _ in range(2))
    assert one.prompt == first and world.asked[0][0] == [] and one.note == ""
    assert kept.prompt == ROUND_0 and "were unusable" in kept.note
    assert feedback.refine(REQUEST, 7, 3, world.generate, world.judge, 1, 1, start=first)[0].prompt == first


def test_pictures_that_cannot_be_judged_are_the_worst_and_do_not_stop_the_loop():
    world = World({ROUND_0: None, "b a swan lake noon": (7, 3)}, [advice("b a swan lake noon")])
    rounds = feedback.refine(REQUEST, 7, 3, world.generate, world.judge, 2, 2)
    assert [p.loss for p in rounds[0].pictures] == [16, 16] and "valence unknown" in world.asked[0][1]
    assert world.asked[0][0] == [(ROUND_0, 0), (ROUND_0, 1)]  # all are alike: still two pictures are compared
    assert feedback.best_of(rounds) == (1, 0)
    alone = feedback.refine(REQUEST, 7, 3, world.generate, None, 1, 2)[0]
    assert alone.pictures[0].judgement.v is None and alone.analysis is None


def test_a_dollar_in_any_question_of_ones_own_is_written_twice(monkeypatch):
    for name in ("system", "class", "feedback_system"):
        monkeypatch.setitem(feedback.PROMPTS, name, "worth $$5")
    image = Image.new("RGB", (8, 8))
    questions = [feedback.ask("class", image), feedback.ask_rewrite(REQUEST, 7, 3),
                 feedback.ask_compare(REQUEST, REQUEST, 7, 3, (image, 5, 5), (image, 4, 4))]
    said = str(questions)
    assert said.count("worth $5") == 4 and "$$" not in said


def test_among_pictures_of_equal_loss_that_of_the_latest_round_is_the_best():
    better = f"{REQUEST}, sunny"
    world = World({ROUND_0: (6, 3), better: (5.8, 3)}, [advice(better)])
    rounds = feedback.refine(REQUEST, 7, 3, world.generate, world.judge, 2, 2)
    assert rounds[0].pictures[1].loss == pytest.approx(0.9) and rounds[1].pictures[1].loss == pytest.approx(0.9)
    equal = [replace(r, pictures=[replace(p, loss=1.0) for p in r.pictures], best=0) for r in rounds]
    assert feedback.best_of(equal) == (1, 0)


def test_the_result_is_the_best_picture_of_all_rounds_or_of_the_last():
    worse = f"{REQUEST}, sunny"
    world = World({ROUND_0: (7.5, 3), worse: (5, 3)}, [advice(worse)])
    rounds = feedback.refine(REQUEST, 7, 3, world.generate, world.judge, 2, 2)
    assert feedback.best_of(rounds) == (0, 0) and feedback.best_of(rounds, "last") == (1, rounds[1].best)
    assert rounds[1].pictures[rounds[1].best].loss > rounds[0].pictures[0].loss


@pytest.mark.parametrize("settings", [
    {"rounds": 0}, {"rounds": 2, "images_per_round": 1}, {"images_per_round": 0}, {"v": 12}, {"readings": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="expected|1..9"):
        feedback.refine(**{"prompt": REQUEST, "v": 7, "a": 3, "generate": None, "judge": None, **settings})


def test_a_loss_of_exactly_the_tolerance_is_good_enough():
    world = World({ROUND_0: (7, 3)}, [])
    rounds = feedback.refine(REQUEST, 7, 3, world.generate, world.judge, 3, 2)  # the tolerance is 0, and so is the first loss
    assert len(rounds) == 1 and rounds[0].next_prompt is None


def test_all_pictures_are_answered_for_from_one_seed_that_is_the_attempts():
    seen = []

    def generate(questions, n, limit, temperature, generator, progress):
        seen.append([each.initial_seed() for each in generator])
        return [[SimpleNamespace(text="")] * n for _ in questions]

    judge = judge_of(SimpleNamespace(generate=generate), progress=False)
    judge(["question"] * 3)
    judge(["question"] * 3, 2, 4)
    assert seen == [[0, 0, 0], [2, 2, 2]]

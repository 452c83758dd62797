"""Texts with values, a user's own in their place, and the words that a rewrite lost."""

import pytest

from parts.cli import UserError
from parts.prompts import fill, load_prompts, lost_words

PROMPTS = {"compare": "", "rewrite": "$request at $v", "class": ""}
VALUES = {"rewrite": ("request", "v", "a")}
NEEDED = {"rewrite": ("$request", "$v"), "class": ("emotion_class",)}


def test_numbers_have_two_decimals_and_dollars_of_values_stay():
    assert fill("$name: $v, $a, $$5", name="a $cat", v=7, a=None) == "a $cat: 7.00, unknown, $5"


def test_a_file_has_the_texts_that_it_names(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('{"rewrite": "${request}, valence $v, $$5", "compare": ""}')
    assert load_prompts(path, PROMPTS, VALUES, NEEDED) == {"rewrite": "${request}, valence $v, $$5", "compare": ""}


@pytest.mark.parametrize("text, message", [
    ("{", "Expecting"), ("[]", "expected JSON"), ('{"compare": 3}', "expected JSON"),
    ('{"poem": ""}', "unknown prompt 'poem'"),
    ('{"rewrite": "$request $v $best_v"}', "best_v"), ('{"class": "$"}', "Invalid placeholder"), (None, "No such file"),
    ('{"rewrite": "$request at V {v}"}', "'rewrite' lacks $v"), ('{"class": "Which emotion?"}', "'class' lacks emotion_class"),
])
def test_a_bad_file_of_prompts_is_refused(text, message, tmp_path):
    path = tmp_path / "prompts.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="prompts.json") as refused:
        load_prompts(path, PROMPTS, VALUES, NEEDED)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("request_, prompt, lost", [
    ("a swan on the lake at noon", "At noon, swans on a misty lake", []),
    ("a swan on the lake at noon", "a boat on the lake", ["swan", "noon"]),
    ("a person walks away from a large fire", "A person walking away from a large, raging fire at dusk", []),
    ("two horses", "a horse", ["two"]), ("湖上的天鹅", "宁静湖上的白天鹅", []),
    ("湖上的天鹅", "宁静的森林", ["湖", "上", "天", "鹅"]),
])
def test_lost_words_are_those_that_carry_meaning(request_, prompt, lost):
    assert lost_words(request_, prompt) == lost

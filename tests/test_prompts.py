"""Texts with values, a user's own in their place, and the words that a rewrite lost."""

import pytest

from parts.cli import UserError
from parts.prompts import fill, load_prompts, lost_words

PROMPTS = {"compare": "", "rewrite": "$request at $v", "class": ""}
VALUES = {"rewrite": ("request", "v", "a")}


def test_numbers_have_two_decimals_and_dollars_of_values_stay():
    assert fill("$name: $v, $a, $$5", name="a $cat", v=7, a=None) == "a $cat: 7.00, unknown, $5"


def test_a_file_replaces_the_texts_that_it_names(tmp_path):
    path, prompts = tmp_path / "prompts.json", dict(PROMPTS)
    path.write_text('{"rewrite": "$request, arousal $a, $$5"}')
    load_prompts(path, prompts, VALUES)
    assert prompts == PROMPTS | {"rewrite": "$request, arousal $a, $$5"}


@pytest.mark.parametrize("text, message", [
    ("{", "Expecting"), ("[]", "expected JSON"), ('{"compare": 3}', "expected JSON"),
    ('{"poem": ""}', "unknown prompt 'poem'"),
    ('{"rewrite": "$request $best_v"}', "best_v"), ('{"class": "$"}', "Invalid placeholder"), (None, "No such file"),
])
def test_a_bad_file_of_prompts_is_refused_and_changes_nothing(text, message, tmp_path):
    path, before = tmp_path / "prompts.json", dict(PROMPTS)
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="prompts.json") as refused:
        load_prompts(path, PROMPTS, VALUES)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert before == PROMPTS


@pytest.mark.parametrize("request_, prompt, lost", [
    ("a swan on the lake at noon", "At noon, swans on a misty lake", []),
    ("a swan on the lake at noon", "a boat on the lake", ["swan", "noon"]),
    ("a person walks away from a large fire", "A person walking away from a large, raging fire at dusk", []),
    ("two horses", "a horse", ["two"]), ("湖上的天鹅", "宁静湖上的白天鹅", []),
    ("湖上的天鹅", "宁静的森林", ["湖", "上", "天", "鹅"]),
])
def test_lost_words_are_those_that_carry_meaning(request_, prompt, lost):
    assert lost_words(request_, prompt) == lost

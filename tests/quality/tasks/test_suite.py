"""Generated prompts: the same again, as long as asked for, and with the answer in them."""

import re
from collections import Counter

import pytest

from vllm_s2o.quality.tasks import haystack, retrieval, suite
from vllm_s2o.quality.tasks.prompt import Framing, TaskError, longest
from vllm_s2o.quality.tasks.suite import TASKS, prompt

LENGTH = 8000
"""In bytes, which are the tokens here: the examples of cwe alone take 5,000."""


def text(tokenizer, made) -> str:
    return tokenizer.decode(made.ids)


def expected(made) -> list[str]:
    return made.score.keywords["expected"]


def test_the_tasks_are_rulers_that_need_no_download():
    assert TASKS == (
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe",
    )  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_the_same_again_and_no_other_one(framing, task):
    made = prompt(task, LENGTH, 0, framing)
    again = prompt(task, LENGTH, 0, framing)
    assert (again.ids, expected(again)) == (made.ids, expected(made))
    others = [prompt(task, LENGTH, 1, framing), prompt(task, LENGTH, 0, framing, seed=1)]
    for other in others:
        assert other.ids != made.ids and expected(other) != expected(made)


@pytest.mark.parametrize("length", [LENGTH, 2 * LENGTH])
@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_fill_the_length(framing, task, length):
    """But for less than one unit: a word, a sentence of noise, a needle, or a word of a list three times."""
    unit = {"niah_multikey_2": 80, "niah_multikey_3": 120, "niah_single_1": 110, "vt": 110, "cwe": 60}.get(task, 70)
    for index in range(3):
        made = prompt(task, length, index, framing)
        assert (made.task, made.length, made.index) == (task, length, index)
        assert length - unit < len(made.ids) + made.room <= length


@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_holds_the_answer_and_the_question_comes_last(framing, tokenizer, task):
    made = prompt(task, LENGTH, 2, framing)
    said = text(tokenizer, made)
    assert said.startswith("<user>") and "</user><assistant>" in said
    assert made.score(" ".join(expected(made)).lower()) == 1 and made.score("nothing") == 0
    for value in expected(made):
        assert value in said
        assert value not in said.partition("</user>")[2], "the beginning of the answer must not tell it"


@pytest.mark.parametrize("task, form", retrieval.TASKS.items())
def test_needles(framing, tokenizer, task, form):
    said = text(tokenizer, prompt(task, LENGTH, 1, framing))
    found = re.findall(r"One of the secret (\w+)s of (\S+) is (\S+)\.", said)
    kind = "number" if form.values == "numbers" else "code"
    assert {name for name, _, _ in found} == {kind}
    keys = Counter(key for _, key, _ in found)
    if form.inside == "needles":
        assert len(keys) > 30 and set(keys.values()) == {1}
    else:
        assert len(keys) == form.hidden and set(keys.values()) == {form.each}
    assert len({value for _, _, value in found}) == len(found)
    (asked,) = re.findall(r"secret \w+ of ([^?]+) in the text above\?", said.split("\n\n")[-1])
    assert len(re.split(", | and ", asked)) == form.asked and set(re.split(", | and ", asked)) <= set(keys)
    right = {value for _, key, value in found if key in re.split(", | and ", asked)}
    assert right == set(expected(prompt(task, LENGTH, 1, framing)))


def test_needles_stand_between_sentences_and_anywhere(framing, tokenizer):
    depths = []
    for index in range(20):
        said = text(tokenizer, prompt("niah_single_2", LENGTH, index, framing))
        before, _, after = said.partition("One of the secret numbers of")
        assert before.rstrip()[-1] in ".?!" or len(after) < 400, "the last sentence of the text may be cut"
        depths.append(len(before) / len(said))
    assert min(depths) < 0.2 and max(depths) > 0.8


def test_variables_are_one_chain_in_order(framing, tokenizer):
    made = prompt("vt", LENGTH, 0, framing)
    said = text(tokenizer, made)
    number = re.search(r"have the value (\d+) in the text above\? Name all of them\.</user>", said)[1]
    steps = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", said)
    names = [name for name, _ in steps]
    assert names == expected(made) and [source for _, source in steps] == [number, *names[:-1]]
    assert len(re.findall(r"VAR [A-Z]{3} = ", said)) == 5, "the example's"
    assert said.endswith(f"5 variables have the value {number} in the text:")


@pytest.mark.parametrize("length, often, seldom", [(4000, 6, 1), (LENGTH, 30, 3), (250_000, 30, 3)])
def test_common_words_are_the_most_common(framing, tokenizer, length, often, seldom):
    """In a list that is longer than all words that are known, too."""
    made = prompt("cwe", length, 0, framing)
    assert length - 100 < len(made.ids) + made.room <= length
    words = re.findall(r"\d+\. ([a-z-]+)", text(tokenizer, made).split("\n\n")[-2])
    counts = Counter(words).most_common()
    assert {word for word, _ in counts[:10]} == set(expected(made))
    assert {count for _, count in counts[:10]} == {often} and {count for _, count in counts[10:]} == {seldom}


def test_frequent_words_are_the_most_frequent(framing, tokenizer):
    made = prompt("fwe", LENGTH, 0, framing)
    words = text(tokenizer, made).split("\n\n")[1].split()
    (dots, most), *counts = Counter(words).most_common()
    assert dots == "..." and [word for word, _ in counts[:3]] == expected(made)
    assert counts[0][1] == pytest.approx(most / 4, rel=0.15), "shares of 1 / rank²"
    assert counts[3][1] < counts[2][1]


def test_the_text_is_the_held_out_part_and_words_are_plain():
    assert len(haystack.words()) > 100_000 and max(map(len, haystack.words())) <= haystack.LONGEST_WORD
    words = haystack.vocabulary()
    assert len(words) > 2000 and all(re.fullmatch("[a-z]{4,9}", word) for word in words)
    start = len(haystack.words()) - 1
    assert haystack.text(start, 2) == [haystack.words()[-1], haystack.words()[0]]


def test_a_needle_goes_behind_the_sentence_that_it_falls_into():
    words = ["One", "two.", "Three", "four.", "Five", "six."]
    assert haystack.hide(words, ["A.", "B."], [0.2, 0.9]) == "One two. A. Three four. Five six. B."
    assert haystack.hide(words, ["A."], [0.0]).startswith("A. One")
    assert haystack.hide([], ["A."], [0.5]) == "A."


@pytest.mark.parametrize("unit", [1, 7, 40])
def test_one_unit_more_would_be_too_long(unit):
    def build(units):
        return [0] * (10 + unit * units)

    for most in (10, 11, 50, 999, 4096):
        found = len(longest(build, most))
        assert found <= most < found + unit
    assert longest(build, 9) is None


def test_units_of_different_lengths_are_found_too():
    sizes = [1] * 50 + [400] + [1] * 2000
    assert len(longest(lambda units: [0] * sum(sizes[:units]), 300)) == 50
    assert len(longest(lambda units: [0] * sum(sizes[:units]), 700)) == 700


def test_a_text_that_does_not_grow_is_told_in_a_sentence():
    with pytest.raises(TaskError, match=r"^A text of \d+ units has no more than 50 tokens: it does not grow "):
        longest(lambda units: [0] * min(units, 50), 100)


def test_without_a_chat_template_the_text_is_plain(tokenizer):
    plain = Framing(tokenizer, chat=False)
    assert tokenizer.decode(plain.ids("Why?", "Because")) == "Why?\n\nBecause"


def test_bad_input_is_told_in_a_sentence(framing):
    with pytest.raises(TaskError, match=r"^There is no task qa: known are niah_single_1, .*, fwe\.$"):
        prompt("qa", LENGTH, 0, framing)
    with pytest.raises(TaskError, match=r"^The task cwe does not fit into 300 tokens: "):
        prompt("cwe", 300, 0, framing)
    assert suite.prompt("niah_single_1", 700, 0, framing).room == 36

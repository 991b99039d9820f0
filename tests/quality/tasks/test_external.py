"""InfiniteBench and LongBench v2: two samples of each file's format, and the publishers' rules."""

import json

import pytest

from vllm_s2o.quality.tasks import infinitebench, longbench
from vllm_s2o.quality.tasks.external import Question, cut
from vllm_s2o.quality.tasks.prompt import TaskError


def write(path, records, array=False):
    path.write_text(json.dumps(records) if array else "".join(json.dumps(record) + "\n" for record in records))
    return path


def sample(answer, options=(), asked="What is the pass key?", **more) -> dict:
    """As in InfiniteBench's files."""
    fields = {"id": 0, "context": "The grass grows. " * 200, "input": asked, "answer": answer, "options": list(options)}
    return fields | more


FUNCTIONS = ["load_all", "save_one", "parse", "close"]
INFINITEBENCH = {
    "passkey": (sample(["71432"]), " 71432.", "The key 9 is 71432."),
    "number_string": (sample(["7777000011"]), "7777000011", "777"),
    "kv_retrieval": (sample(["ab-12"]), ' "ab-12"}', "ab-123"),
    "math_find": (sample([8], asked="You should answer with only one number."), " 8, I think", "18"),
    "code_run": (sample([-3], asked="Please give me the value of func_1(4)."), "the value is: -3", "3"),
    "code_debug": (sample(["parse"], FUNCTIONS), " C. parse", "B"),
    "longbook_choice_eng": (sample(["Anna"], ["Bea", "Anna", "Cleo", "Dora"], asked="Who?"), " B", "A. Bea"),
    "longdialogue_qa_eng": (sample(["ACE", "ACE VENTURA"]), "Ace.", "Venturas"),
}


@pytest.mark.parametrize("name", INFINITEBENCH)
def test_two_samples_of_infinitebench(tmp_path, framing, tokenizer, name):
    record, right, wrong = INFINITEBENCH[name]
    file = infinitebench.open_file(write(tmp_path / f"{name}.jsonl", [record, record | {"context": "Short."}]))
    assert file.task == f"infinitebench_{name}" and len(file.records) == 2
    long, short = file.prompts(2000, [0, 1], framing)
    assert len(long.ids) + long.room == 2000 and "Short." in tokenizer.decode(short.ids)
    for prompt in (long, short):
        assert (prompt.score(right), prompt.score(wrong), prompt.score("")) == (1, 0, 0)
    for option in record["options"]:
        assert option in tokenizer.decode(short.ids)


@pytest.mark.parametrize(
    "name, record, answer, score",
    [
        ("passkey", sample("71432"), "key: 71432", 1),  # not in a list, and a number inside of text
        ("math_find", sample([2.5]), "2.5", 1),
        ("math_find", sample([2]), "2.5", 0),
        ("math_find", sample(["2"]), "It is 2", 1),
        ("code_run", sample([7], asked="What is func_9(2)?"), "7 because", 0),  # the last word counts
        ("code_run", sample([7], asked="What is func_9(2)?"), "`7`", 1),
        ("code_debug", sample(["parse"], FUNCTIONS), "C: it is", 1),
        ("code_debug", sample(["parse"], FUNCTIONS), "parse", 1),
        ("code_debug", sample(["parse"], FUNCTIONS), "option C", 1),
        ("longbook_choice_eng", sample(["b"], "abcd"), "The answer is: B", 1),
        ("longbook_choice_eng", sample(["b"], "abcd"), "The answer is C, not B", 0),
        ("longbook_choice_eng", sample(["b"], "abcd"), "I take B over A", 1),  # the first that is an option
        ("longbook_choice_eng", sample(["b"], "abcd"), "A, not B", 0),
        ("longbook_choice_eng", sample(["b"], "abcd"), "none", 0),
        ("longdialogue_qa_eng", sample(["ACE"]), "It's ace, I guess", 1),
    ],
)
def test_the_rules_of_infinitebench(tmp_path, framing, name, record, answer, score):
    (prompt,) = infinitebench.open_file(write(tmp_path / f"{name}.jsonl", [record])).prompts(3000, [0], framing)
    assert prompt.score(answer) == score


def question(answer="B", context="The grass grows. " * 200, **more) -> dict:
    """As in LongBench v2's file."""
    choices = {f"choice_{letter}": f"choice {letter.lower()}" for letter in "ABCD"}
    known = {"_id": "66f3", "domain": "Code", "sub_domain": "QA", "difficulty": "hard", "length": "short"}
    return known | {"question": "What grows?", "answer": answer, "context": context} | choices | more


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_two_samples_of_longbench(tmp_path, framing, tokenizer, array):
    path = write(tmp_path / "data.json", [question(), question("D", "Short.")], array)
    file = longbench.open_file(path)
    long, short = file.prompts(2000, [0, 1], framing)
    assert len(long.ids) + long.room == 2000
    said = tokenizer.decode(short.ids)
    assert "Short." in said and "What grows?" in said and "(D) choice d" in said and said.endswith("answer is (")
    assert [long.score(answer) for answer in ("B) choice b", "**B**", "A", "b", "")] == [1, 1, 0, 0, 0]
    assert short.score("D)") == 1 and short.score("no letter. The correct answer is (D)") == 1


def test_a_text_is_cut_in_its_middle(framing, tokenizer):
    asked = Question("Before.", "0123456789" * 100, "After.", "So")
    whole = cut(asked, framing, 10_000)
    assert "0123456789" * 100 in tokenizer.decode(whole)
    for most in (300, 301):
        said = tokenizer.decode(cut(asked, framing, most))
        assert len(said) == most
        left = said.split("\n\n")[1]
        half = len(left) // 2
        assert left == ("0123456789" * 100)[: len(left) - half] + ("0123456789" * 100)[-half:]
    assert cut(asked, framing, 20) is None


@pytest.mark.parametrize(
    "name, why",
    [
        ("longbook_sum_eng", "summaries are scored by ROUGE"),
        ("longbook_qa_eng", "free answers are scored by an F1 of their words"),
        ("longbook_qa_chn", "free answers are scored by an F1 of their characters"),
        ("math_calc", "an answer takes 30,000 tokens"),
    ],
)
def test_other_scores_are_refused_in_a_sentence(tmp_path, name, why):
    with pytest.raises(TaskError) as caught:
        infinitebench.open_file(tmp_path / f"{name}.jsonl")
    assert str(caught.value) == f"The task {name} of InfiniteBench is not scored here: {why}."


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "Cannot read {path}: No such file or directory."),
        (b"\xff\xfe", "{path} is no UTF-8 file."),
        (b"", "{path} holds no samples: they are JSON objects, one in each line or all in an array."),
        (b"[1, 2]", "{path} holds no samples: they are JSON objects, one in each line or all in an array."),
        (b"{oh no", "{path} holds neither JSON lines nor a JSON array: "),
    ],
)
@pytest.mark.parametrize(
    "opener, name", [(infinitebench.open_file, "passkey.jsonl"), (longbench.open_file, "data.json")]
)
def test_files_that_cannot_be_used_are_told_in_a_sentence(tmp_path, opener, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(TaskError) as caught:
        opener(path)
    assert str(caught.value).startswith(said.format(path=path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("math_find", {"answer": ["eight"]}),
        ("code_run", {"answer": ["none"]}),
        ("passkey", {"context": None}),
        ("kv_retrieval", {"context": ["a", "b"]}),
    ],
    ids=str,
)
def test_what_cannot_be_judged_is_told_before_it_is_asked(tmp_path, framing, name, wrong):
    file = infinitebench.open_file(write(tmp_path / f"{name}.jsonl", [INFINITEBENCH[name][0] | wrong]))
    with pytest.raises(TaskError, match=rf"^Sample 0 of infinitebench_{name} lacks a field, or has another one: "):
        list(file.prompts(4000, [0], framing))


def test_files_of_something_else_are_told_in_a_sentence(tmp_path, framing):
    with pytest.raises(TaskError, match=r"other\.jsonl is named after no task of InfiniteBench: known are passkey, "):
        infinitebench.open_file(write(tmp_path / "other.jsonl", [{}]))
    with pytest.raises(TaskError, match=r"holds no samples of LongBench v2: the first one has no field choice_A\."):
        longbench.open_file(write(tmp_path / "data.json", [sample(["1"])]))
    file = infinitebench.open_file(write(tmp_path / "passkey.jsonl", [sample(["1"]), {"context": "no question"}]))
    with pytest.raises(TaskError, match=r"^Sample 1 of infinitebench_passkey lacks a field, or has another one: "):
        list(file.prompts(2000, [0, 1], framing))
    with pytest.raises(TaskError, match=r"^Sample 0 of infinitebench_passkey does not fit into 50 tokens without any "):
        list(file.prompts(50, [0], framing))

"""Decision tasks: splits that never mix, balanced demonstrations, candidates, spans, skipping."""

import warnings
from collections import Counter
from dataclasses import replace

import pytest
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from spade_lens.tasks import DecisionTask, DecisionTemplate, Example, SkippedExamplesWarning
from spade_lens.tasks.decisions.template import LETTERS, WORDS

YES_NO = DecisionTemplate(
    example="{passage}Q: {question}?\nA:", labels=("no", "yes"), separator="\n\n"
)


def words_tokenizer(*words):
    """Words with their space before, as byte-level BPE writes them; else single characters.

    Every text comes back from its tokens, so that a test can look for what stands where.
    """
    pieces = [*words, "\n", " ", *(chr(c) for c in range(33, 127))]
    vocabulary = {piece: i + 2 for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, **vocabulary}, unk_token="<unk>"))
    known = "|".join(f"{word}(?![a-z])" for word in words) or "$^"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{known}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>"
    )


TOKENIZER = words_tokenizer(" no", " yes", " A", " B", " C", " D", " E", " cat", " dog", " bee")


def even(n=100, **how):
    rows = [{"question": f"is {i} even", "answer": 1 - i % 2} for i in range(n)]
    return DecisionTask.from_examples("even", rows, template=YES_NO, **how)


def questions(task, prompt):
    """The numbers asked about in a prompt, in order."""
    lines = [line for line in prompt.text.split("\n") if line.startswith("Q:")]
    return [int(line.split()[2]) for line in lines]


def numbers(examples):
    return {int(example.question.split()[1]) for example in examples}


def test_a_pool_is_split_by_the_fractions_and_nothing_is_lost_or_doubled():
    task = even()
    assert task.split_sizes() == {"train": 20, "calibration": 30, "test": 50}
    assert set.union(*map(numbers, task.splits.values())) == set(range(100))
    assert repr(task) == "DecisionTask('even', train 20, calibration 30, test 50)"


def test_the_split_depends_on_its_seed_and_not_on_the_name():
    assert even().splits == even().splits
    assert even().splits != even(split_seed=1).splits
    rows = [{"question": f"is {i} even", "answer": 1 - i % 2} for i in range(100)]
    assert DecisionTask.from_examples("other", rows, template=YES_NO).splits == even().splits


@pytest.mark.parametrize("split", ["calibration", "test"])
@pytest.mark.parametrize("seed", [0, 1])
def test_queries_are_of_the_split_and_demonstrations_of_train(split, seed):
    task = even()
    asked = []
    for prompt in task.prompts(TOKENIZER, 30, shots=6, seed=seed, split=split):
        *shown, query = questions(task, prompt)
        assert set(shown) <= numbers(task.splits["train"]) and len(set(shown)) == 6
        assert query in numbers(task.splits[split])
        asked.append(query)
    assert len(set(asked)) == 30


def test_a_query_of_train_is_not_among_its_own_demonstrations():
    task = even()
    for prompt in task.prompts(TOKENIZER, 20, shots=19, split="train"):
        *shown, query = questions(task, prompt)
        assert {*shown, query} == numbers(task.splits["train"])


@pytest.mark.parametrize("shots", [0, 1, 2, 5, 8])
def test_every_answer_is_shown_as_often_as_the_others(shots):
    rows = [{"question": f"is {i} big", "answer": int(i > 15)} for i in range(100)]
    task = DecisionTask.from_examples("big", rows, template=YES_NO)
    for prompt in task.prompts(TOKENIZER, 20, shots=shots):
        counts = Counter(prompt.text.split("\n").count(f"A: {label}") for label in ("no", "yes"))
        assert max(counts) - min(counts) <= shots % 2


def test_demonstrations_can_be_drawn_as_they_come():
    rows = [{"question": f"is {i} big", "answer": int(i > 5)} for i in range(200)]
    task = DecisionTask.from_examples("big", rows, template=YES_NO)
    shown = "".join(p.text for p in replace(task, balance=False).prompts(TOKENIZER, 50, shots=8))
    assert shown.count("A: yes") > 5 * shown.count("A: no")


def test_an_answer_that_runs_out_leaves_the_rest_to_the_others():
    train = [{"question": f"train {i}", "answer": int(i == 0)} for i in range(10)]
    other = [{"question": f"other {i}", "answer": i % 2} for i in range(10)]
    task = DecisionTask.from_examples("few", {"train": train, "test": other}, template=YES_NO)
    size = task.split_sizes()["train"]
    prompt = task.prompts(TOKENIZER, 1, shots=size)[0]
    assert prompt.text.count("A: ") == size
    with pytest.raises(ValueError, match=f"shots={size + 1}: the train split of task 'few' has"):
        task.prompts(TOKENIZER, 1, shots=size + 1)


def test_a_longer_run_begins_with_the_shorter_one_and_more_shots_extend_fewer():
    task = even()
    few, many = task.prompts(TOKENIZER, 5, shots=4), task.prompts(TOKENIZER, 50, shots=4)
    assert few == many[:5] != task.prompts(TOKENIZER, 5, shots=4, seed=1)
    for short, long in zip(few, task.prompts(TOKENIZER, 5, shots=6), strict=True):
        assert questions(task, long)[:4] == questions(task, short)[:4]
        assert questions(task, long)[-1] == questions(task, short)[-1]


def test_candidates_target_and_spans_are_where_they_should_be():
    task = even()
    no, yes = TOKENIZER(" no").input_ids[0], TOKENIZER(" yes").input_ids[0]
    for prompt in task.prompts(TOKENIZER, 10, shots=3):
        assert prompt.candidates == (no, yes)
        query = questions(task, prompt)[-1]
        assert prompt.target == (yes if query % 2 == 0 else no)
        assert prompt.answer == len(prompt) - 1
        assert [prompt.tokens[p] in (no, yes) for p in prompt.spans["labels"]] == [True] * 3
        assert prompt.tokens[0] == TOKENIZER.bos_token_id
        asked = TOKENIZER.decode([prompt.tokens[p] for p in prompt.spans["query"]])
        assert asked == f"Q: is {query} even"
        assert TOKENIZER.decode(prompt.tokens[1:]) == prompt.text


def test_a_query_span_holds_the_passage_and_the_options():
    rows = [
        {"question": f"{i}", "answer": i % 2, "options": ["cat", "dog"], "passage": f"Pets {i}."}
        for i in range(20)
    ]
    task = DecisionTask.from_examples("pets", rows, template=LETTERS)
    prompt = task.prompts(TOKENIZER, 1, shots=1)[0]
    asked = TOKENIZER.decode([prompt.tokens[p] for p in prompt.spans["query"]])
    assert asked.startswith("Pets ") and asked.endswith("A. cat\nB. dog\n")
    # Two options, so two of the five letters.
    assert TOKENIZER.convert_ids_to_tokens(list(prompt.candidates)) == [" A", " B"]


def test_a_question_with_more_options_does_not_teach_the_others_its_letter():
    rows = [
        {
            "question": f"q{i}",
            "answer": 4 if i % 2 else 1,
            "options": list("abcde" if i % 2 else "ab"),
        }
        for i in range(100)
    ]
    task = DecisionTask.from_examples("mixed", rows, template=LETTERS)
    for prompt in task.prompts(TOKENIZER, 40, shots=4):
        assert ("Answer: E" in prompt.text) == (len(prompt.candidates) == 5)


def test_words_are_decided_by_their_first_token():
    rows = [
        {"question": f"q{i}", "answer": i % 2, "options": ["cat nap", "dog days"]}
        for i in range(20)
    ]
    task = DecisionTask.from_examples("pets", rows, template=WORDS)
    for prompt in task.prompts(TOKENIZER, 10, shots=2):
        assert TOKENIZER.convert_ids_to_tokens(list(prompt.candidates)) == [" cat", " dog"]
        assert prompt.target in prompt.candidates
        # The last token of each label, as everywhere.
        labels = [TOKENIZER.decode([prompt.tokens[p]]) for p in prompt.spans["labels"]]
        assert set(labels) <= {"p", "s"} and len(labels) == 2


def test_options_that_begin_alike_are_passed_over_with_a_warning():
    rows = [
        {"question": f"q{i}", "answer": 0, "options": ["cat nap", "cat sat" if i % 2 else "dog"]}
        for i in range(40)
    ]
    task = DecisionTask.from_examples("pets", rows, template=WORDS)
    alike = sum(e.options[1] == "cat sat" for e in task.splits["test"])
    with pytest.warns(SkippedExamplesWarning, match=f"skipped {alike} questions with options"):
        prompts = task.prompts(TOKENIZER, 20 - alike, shots=0, seed=3)
        # All that can be asked are; a warning needs the last of them to come after the first alike.
    assert {len(set(p.candidates)) for p in prompts} == {2}
    with pytest.raises(ValueError, match=f"gives only {20 - alike} prompts; skipped: {alike}"):
        task.prompts(TOKENIZER, 20, shots=0)


def test_long_prompts_are_passed_over_with_a_count_and_never_cut():
    rows = [
        {"question": "x" * (60 if i % 4 == 0 else 6) + str(i), "answer": i % 2} for i in range(80)
    ]
    task = DecisionTask.from_examples("long", rows, template=YES_NO)
    whole = task.prompts(TOKENIZER, 40, shots=0)
    fitting = [prompt for prompt in whole if len(prompt) <= 40]
    assert 0 < len(fitting) < 40
    with pytest.warns(SkippedExamplesWarning, match="longer than max_tokens=40"):
        assert task.prompts(TOKENIZER, len(fitting), shots=0, max_tokens=40) == fitting
    with pytest.raises(ValueError, match=rf"gives only {len(fitting)} prompts; skipped: .*40"):
        task.prompts(TOKENIZER, 40, shots=0, max_tokens=40)


def test_nothing_is_warned_of_where_nothing_is_passed_over():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        even().prompts(TOKENIZER, 5, max_tokens=1000)


def test_labels_of_several_tokens_are_refused():
    template = replace(YES_NO, labels=("no", "maybe"))
    task = replace(even(), template=template)
    with pytest.raises(ValueError, match=r"'maybe' is not a single token but 6: .* Choose other"):
        task.prompts(TOKENIZER, 1)


def test_labels_that_become_one_token_are_refused():
    task = replace(even(), template=replace(YES_NO, labels=("\u00e9", "\u00e8")))
    tokenizer = words_tokenizer(" [\u00e9\u00e8]")  # both unknown
    with pytest.raises(ValueError, match="two of the labels"):
        task.prompts(tokenizer, 1)


def test_rates_are_those_of_the_split():
    rows = [
        {
            "question": f"q{i}",
            "answer": int(i % 10 == 0),
            "options": list("ab" if i % 2 else "abcd"),
        }
        for i in range(36)
    ]
    given = {"train": rows[:12], "calibration": rows[12:24], "test": rows[24:]}
    task = DecisionTask.from_examples("skewed", given, template=LETTERS)
    assert task.rates("test").majority == 11 / 12
    assert task.rates("test").chance == pytest.approx((1 / 2 + 1 / 4) / 2)
    with pytest.raises(ValueError, match="no split 'dev'; the splits are train, calibration, test"):
        task.rates("dev")


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"train": 10, "validation": 20, "test": 30}, (10, 20, 30)),
        ({"train": 10, "validation": 16}, (10, 6, 10)),
        ({"validation": 20, "test": 5}, (8, 12, 5)),
        ({"train": 50, "test": 5}, (20, 30, 5)),
        ({"calibration": 50, "test": 5}, (20, 30, 5)),
        ({"test": 100}, (20, 30, 50)),
        ({"train": 3, "calibration": 4, "validation": 5, "test": 6}, (3, 9, 6)),
    ],
)
def test_absent_splits_are_made_of_what_there_is(given, sizes):
    rows = {
        split: [{"question": f"{split} {i}", "answer": i % 2} for i in range(n)]
        for split, n in given.items()
    }
    task = DecisionTask.from_examples("given", rows, template=YES_NO)
    assert tuple(task.split_sizes().values()) == sizes
    for split in ("train", "test"):  # what is given and is not the pool stays what it is
        if split in given and given[split] == task.split_sizes()[split]:
            assert all(e.question.startswith(split) for e in task.splits[split])


def test_what_occurs_twice_is_kept_once_and_in_test_first():
    row = {"question": "twice", "answer": 0}
    others = [{"question": f"q{i}", "answer": i % 2} for i in range(12)]
    task = DecisionTask.from_examples(
        "twice",
        {
            "train": [row, *others[:4]],
            "calibration": [row, row, *others[4:8]],
            "test": [row, *others[8:]],
        },
        template=YES_NO,
    )
    assert task.dropped == 3
    assert [s for s, held in task.splits.items() if Example("twice", 0) in held] == ["test"]


def test_splits_that_mix_are_refused():
    splits = {
        "train": (Example("a", 0), Example("b", 1)),
        "calibration": (Example("c", 0),),
        "test": (Example("b", 0),),
    }
    with pytest.raises(ValueError, match="1 examples in both train and test, for instance 'b'"):
        DecisionTask("mixed", splits, YES_NO)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: even().prompts(TOKENIZER, 51), "holds 50 examples, and none is asked twice"),
        (lambda: even().prompts(TOKENIZER, 0), "n=0 was given; expected a whole number, 1 or more"),
        (lambda: even().prompts(TOKENIZER, 1, shots=-1), "shots=-1"),
        (lambda: even().prompts(TOKENIZER, 1, seed=-1), "seed=-1"),
        (lambda: even().prompts(TOKENIZER, 1, shots=21), "has 20 examples for demonstrations"),
        (lambda: even(2), "needs examples in each of the splits"),
        (lambda: even(0), "needs examples in each of the splits"),
        (lambda: even(fractions=(0.5, 0.5, 0.0)), "three positive numbers"),
        (
            lambda: DecisionTask.from_examples("x", {"dev": []}, template=YES_NO),
            r"splits \['dev'\]; expected train, calibration, test or validation",
        ),
        (
            lambda: DecisionTask.from_examples("x", [{"question": "q"}], template=YES_NO),
            "Task 'x', validation 0: No 'answer' among",
        ),
        (
            lambda: DecisionTask.from_examples(
                "x", [Example(f"q{i}", 2) for i in range(9)], template=YES_NO
            ),
            "has answer 2, but its choices are",
        ),
        (
            lambda: DecisionTask.from_examples(
                "x",
                [Example(f"q{i}", 1, options=("a", "b")) for i in range(9)],
                template=YES_NO,
            ),
            "does not show {options}",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Held-out text is held out: nothing in it stands in the training text, on any machine."""

from __future__ import annotations

import corpus
import pytest
from corpus import SHARED_RUN_WORDS, paragraphs, split_topics, word_runs

COMMON = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture(scope="module")
def python_split():
    return split_topics(corpus.python_topics())


def test_no_topic_is_on_both_sides(python_split):
    assert python_split.train
    assert python_split.held_out
    assert not set(python_split.train) & set(python_split.held_out)


def test_no_paragraph_and_no_run_of_words_is_on_both_sides(python_split):
    train_blocks, train_runs = set(), set()
    for text in python_split.train.values():
        train_blocks.update(" ".join(block.split()) for block in paragraphs(text))
        train_runs.update(run for run, _ in word_runs(paragraphs(text)))
    for name, text in python_split.held_out.items():
        assert not {" ".join(block.split()) for block in paragraphs(text)} & train_blocks, name
        assert not {run for run, _ in word_runs(paragraphs(text))} & train_runs, name


def test_the_removal_is_needed_and_leaves_enough(python_split):
    topics = corpus.python_topics()
    whole = sum(len(topics[name].split()) for name in python_split.held_out)
    left = sum(len(text.split()) for text in python_split.held_out.values())
    assert 2000 < left < 0.9 * whole
    assert sum(len(text.split()) for text in python_split.train.values()) > 30_000


def test_the_split_does_not_depend_on_the_order_of_the_topics(python_split):
    topics = corpus.python_topics()
    assert split_topics(dict(reversed(topics.items()))) == python_split


def test_equal_paragraphs_are_removed_whatever_their_line_breaks():
    topics = {f"topic {number}": f"only here {number}\n\nshared\nby  all" for number in range(10)}
    split = split_topics(topics, held_out_fraction=0.3)
    assert len(split.held_out) == 3
    assert all("shared" not in text and "only here" in text for text in split.held_out.values())
    assert sum("shared" in text for text in split.train.values()) == 1


def test_a_shared_run_takes_its_paragraphs_with_it_also_across_their_border():
    words = COMMON.split()
    across = " ".join(words[:4]) + "\n\n" + " ".join(words[4:])
    topics = {
        f"topic {number}": f"first {number}\n\n{across if number % 2 else COMMON}\n\nlast" for number in range(20)
    }
    split = split_topics(topics)
    runs = {run for text in split.held_out.values() for run, _ in word_runs(paragraphs(text))}
    assert not any(" ".join(run) in COMMON for run in runs)
    assert all(text.startswith("first") for text in split.held_out.values())


def test_removing_a_paragraph_does_not_make_neighbours_that_are_shared():
    words = COMMON.split()[:SHARED_RUN_WORDS]
    head, tail = " ".join(words[:4]), " ".join(words[4:])
    names = [f"topic {number}" for number in range(10)]
    (held_out_name,) = split_topics({name: name for name in names}, held_out_fraction=0.1).held_out
    topics = dict.fromkeys(names, f"{head} {tail}\n\nstop here")
    topics[held_out_name] = f"{head}\n\nstop here\n\n{tail}\n\nkept"
    split = split_topics(topics, held_out_fraction=0.1)
    assert split.held_out == {held_out_name: "kept"}


def test_a_topic_with_nothing_of_its_own_disappears():
    topics = {f"topic {number}": "the same text" for number in range(10)}
    assert split_topics(topics).held_out == {}


def test_indentation_and_line_breaks_inside_a_paragraph_stay():
    assert paragraphs("title\n\n   if x:\n       y\n \n\nend\n") == ["title", "   if x:\n       y", "end"]

"""The demo's data: recipes/tiny holds what make_data.py makes, and nothing held out is trained on."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "tiny"


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", FOLDER / "make_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shipped_files_are_what_the_script_makes(make_data: ModuleType) -> None:
    train, heldout = make_data.make()
    assert make_data.read(FOLDER / "train.jsonl") == train
    assert make_data.read(FOLDER / "heldout.jsonl") == heldout
    assert len(heldout) >= 200


def test_no_word_of_a_held_out_prompt_is_trained_on(make_data: ModuleType) -> None:
    train, heldout = make_data.make()
    assert make_data.check(train, heldout) > 100
    word = (make_data.tokens_of(heldout[0]["instruction"]) - make_data.phrase_words()).pop()
    with pytest.raises(ValueError, match=word):
        make_data.check([*train, {"instruction": f"Reverse the word {word}.", "output": "x"}], heldout)


@pytest.mark.parametrize(
    ("task", "word", "expected"),
    [
        ("reverse", "melon", "nolem"),
        ("capitals", "melon", "MELON"),
        ("dashes", "melon", "m-e-l-o-n"),
        ("twice", "melon", "melon melon"),
        ("last letter", "melon", "n"),
        ("sort", "melon", "elmno"),
    ],
)
def test_answers_are_right(make_data: ModuleType, task: str, word: str, expected: str) -> None:
    _, answer = make_data.WORD_TASKS[task]
    assert answer(word) == expected

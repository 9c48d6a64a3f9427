"""Writes train.jsonl and heldout.jsonl: small word tasks in the Alpaca format.

    python make_data.py            # writes both files beside this one, always the same bytes
    python make_data.py --check    # checks the files that lie there

No word that a held-out prompt is about occurs anywhere in train.jsonl, neither in an
instruction nor in an output. Training mixes real English words with made-up ones, so that a model
has to learn the tasks rather than the words; held-out prompts use real words alone.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20
TRAIN_RECORDS = 12_000
HELDOUT_PER_TASK = 50
HELDOUT_WORDS = 150
LETTERS = (2, 2, 3, 3, 4, 4, 5, 5)  # lengths of made-up words; real ones have up to the last
ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "z",
    "bl",
    "br",
    "ch",
    "cl",
    "cr",
    "dr",
    "fl",
    "gr",
    "pl",
    "sh",
    "sl",
    "st",
    "th",
    "tr",
]
CODAS = [
    "",
    "",
    *[
        "b",
        "ck",
        "d",
        "g",
        "k",
        "l",
        "ll",
        "m",
        "n",
        "nd",
        "ng",
        "nt",
        "p",
        "r",
        "rd",
        "rm",
        "s",
        "sh",
        "st",
        "t",
        "x",
    ],
]
REAL_WORD_SHARE = 0.5  # of the training words; the others are made up
MAX_OUTPUT = 15  # characters: with the end token an answer fills at most 16 bytes

Record = dict[str, str]


# Word tasks: the phrasings, in which {} stands for the word, and what the answer is.
WORD_TASKS: dict[str, tuple[tuple[str, ...], Callable[[str], str]]] = {
    "reverse": (
        ("Reverse the word {}.", "Write it backwards: {}."),
        lambda word: word[::-1],
    ),
    "capitals": (
        ("Write it in capitals: {}.", "Shout the word {}."),
        str.upper,
    ),
    "dashes": (
        ("Spell it with dashes: {}.", "Spell out the word {}."),
        "-".join,
    ),
    "twice": (
        ("Say it twice: {}.", "Repeat the word {}."),
        lambda word: f"{word} {word}",
    ),
    "last letter": (
        ("What is the last letter of {}?", "Name the last letter of {}."),
        lambda word: word[-1],
    ),
    "sort": (
        ("Sort the letters of {}.", "Put it in alphabetical order: {}."),
        lambda word: "".join(sorted(word)),
    ),
}
# How often each task comes up in training: the one that takes the longest to learn comes up more.
SHARES = dict.fromkeys(WORD_TASKS, 2) | {"sort": 5}


def tokens_of(text: str) -> set[str]:
    """The words of a text, in small letters."""
    return set(re.findall(r"[a-z]+", text.lower()))


def phrase_words() -> set[str]:
    """The words that the phrasings themselves are made of."""
    phrases = [phrase for group, _ in WORD_TASKS.values() for phrase in group]
    return tokens_of(" ".join(phrases))


def real_words() -> list[str]:
    """Common English words without those that the phrasings use themselves."""
    words = (HERE / "words.txt").read_text().split()
    return [word for word in words if len(word) <= LETTERS[-1] and word not in phrase_words()]


def made_up_word(rng: random.Random) -> str:
    """A pronounceable word such as "trobin"."""
    length = rng.choice(LETTERS)
    word = rng.choice("aeiou") if rng.random() < 0.2 else ""
    while len(word) < length:
        word += rng.choice(ONSETS) + rng.choice("aaeeeiioouy") + rng.choice(CODAS)
    return word[:length]


def word_record(task: str, word: str, rng: random.Random) -> Record:
    """One record of a word task with a phrasing drawn at random."""
    phrases, answer = WORD_TASKS[task]
    return {"instruction": rng.choice(phrases).format(word), "output": answer(word)}


def heldout_records(rng: random.Random, words: list[str]) -> Iterator[Record]:
    """Held-out prompts, task by task."""
    for task in WORD_TASKS:
        for word in rng.sample(words, HELDOUT_PER_TASK):
            yield word_record(task, word, rng) | {"task": task}


def train_records(rng: random.Random, heldout: set[str]) -> Iterator[Record]:
    """Training records without end, no two alike, none that mentions a held-out word."""
    real = [word for word in real_words() if word not in heldout]
    tasks = [task for task, share in SHARES.items() for _ in range(share)]
    seen: set[str] = set()
    while True:
        is_real = rng.random() < REAL_WORD_SHARE
        word = rng.choice(real) if is_real else made_up_word(rng)
        record = word_record(rng.choice(tasks), word, rng)
        if record["instruction"] in seen or tokens_of(" ".join(record.values())) & heldout:
            continue
        seen.add(record["instruction"])
        yield record


def make() -> tuple[list[Record], list[Record]]:
    """Both sets, (train, heldout), the same on every machine."""
    rng = random.Random(SEED)
    words = rng.sample(real_words(), HELDOUT_WORDS)
    heldout = list(heldout_records(rng, words))
    stream = train_records(rng, set(words))
    return [next(stream) for _ in range(TRAIN_RECORDS)], heldout


def check(train: list[Record], heldout: list[Record]) -> int:
    """How many words the held-out prompts are about; none of them is in training.

    Raises:
        ValueError: a word of a held-out prompt occurs in training.
    """
    asked = set().union(*(tokens_of(record["instruction"]) for record in heldout))
    operands = asked - phrase_words()
    trained = set().union(*(tokens_of(" ".join(record.values())) for record in train))
    if operands & trained:
        raise ValueError(f"held-out words in training: {sorted(operands & trained)}")
    too_long = [r for r in (*train, *heldout) if len(r["output"]) > MAX_OUTPUT]
    if too_long:
        raise ValueError(f"outputs over {MAX_OUTPUT} characters: {too_long[:3]}")
    return len(operands)


def read(path: Path) -> list[Record]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="check the files, write nothing")
    arguments = parser.parse_args()
    paths = HERE / "train.jsonl", HERE / "heldout.jsonl"
    if not arguments.check:
        for path, records in zip(paths, make(), strict=True):
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
    train, heldout = map(read, paths)
    count = check(train, heldout)
    print(f"{len(train)} training records, {len(heldout)} held-out prompts about {count} words,")
    print("none of which occurs in training")


if __name__ == "__main__":
    main()

"""Local tasks of lm-evaluation-harness of all three kinds of requests, with their data, in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

WORDS = ["wool", "monk", "cotton", "whale", "drum", "sugar", "plain", "frost"]


def write_task(folder: Path, name: str, records: list[dict[str, Any]], **config: Any) -> None:
    """Write NAME.yaml and its data NAME.jsonl."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.5},
        **config,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")


def metric(name: str, aggregation: str = "mean", higher_is_better: bool = True) -> list[dict[str, Any]]:
    """The list of one metric."""
    return [{"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}]


def write_tasks(folder: Path, count: int = 4) -> list[str]:
    """One task of each kind: answers to write, one of three choices, and texts to score."""
    folder.mkdir(exist_ok=True)
    words = WORDS[:count]
    write_task(
        folder,
        "tiny_write",
        [{"question": f"Reverse the word {word}.", "answer": word[::-1]} for word in words],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["e"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0},
        repeats=2,
        metric_list=metric("exact_match"),
        filter_list=[{"name": "first", "filter": [{"function": "take_first"}]}],
    )
    write_task(
        folder,
        "tiny_choose",
        [{"question": f"{word} is", "choices": [word[:3], word[::-1], "no"], "label": 0} for word in words],
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="label",
        metric_list=metric("acc") + metric("acc_norm"),
    )
    write_task(
        folder,
        "tiny_text",
        [{"text": f"{word} and {word}."} for word in words],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=metric("bits_per_byte", "bits_per_byte", False),
    )
    return ["tiny_write", "tiny_choose", "tiny_text"]

"""What the model writes at each evaluation, to the same few prompts: `samples.jsonl` and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unmask.evaluation.exact_match import Prompt
from unmask.generation.text import Completion

FILE = "samples.jsonl"


class Samples(TrainerCallback):
    """Answers a few prompts at every evaluation, and keeps what was written with its step.

    Args:
        prompts: the same at every evaluation.
        answer: generates their completions.
        together: whether every process has to generate, since each holds a part of the model alone.
        tensorboard: the callback that logs there, if any.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        answer: Callable[[Sequence[Prompt]], list[Completion]],
        together: bool = False,
        tensorboard: Any = None,
    ):
        self.prompts, self.answer, self.together, self.tensorboard = prompts, answer, together, tensorboard

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take out what a run that was cut off wrote after the checkpoint it goes on from."""
        if state.is_world_process_zero:
            file = Path(str(args.output_dir)) / FILE
            kept = [line for line in _lines(file) if state.global_step and _step(line) <= state.global_step]
            if kept or file.exists():
                file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not (state.is_world_process_zero or self.together):
            return
        completions = self.answer(self.prompts)
        if not state.is_world_process_zero:
            return
        file = Path(str(args.output_dir)) / FILE
        if any(_step(line) == state.global_step for line in _lines(file)[-len(self.prompts) :]):
            return  # the end of a run is evaluated once more
        both = list(zip(self.prompts, completions, strict=True))
        with file.open("a", encoding="utf-8") as opened:
            for prompt, completion in both:
                line = {
                    "step": state.global_step,
                    "prompt": prompt.text,
                    "completion": completion.text,
                    "expected": prompt.expected,
                }
                opened.write(json.dumps(line, ensure_ascii=False) + "\n")
        writer = getattr(self.tensorboard, "tb_writer", None)
        if writer is not None:
            for number, (prompt, completion) in enumerate(both, 1):
                text = f"{_quoted(prompt.text)}\n\n{_quoted(completion.text)}"
                writer.add_text(f"samples/{number}", text, state.global_step)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _step(line: str) -> float:
    """The step of a line; infinity where writing it was cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _quoted(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])

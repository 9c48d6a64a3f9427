"""Task files of our own for lm-evaluation-harness: `TaskManager(include_path=str(TASKS))`."""

from pathlib import Path

TASKS = Path(__file__).parent
"""The folder with the task files, whose classes are in `unmask.evaluation.code_tasks`."""

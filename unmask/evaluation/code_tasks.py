"""Code tasks of lm-evaluation-harness: answers are programs, and their tests are run in the sandbox.

The prompts and metrics are those of the harness's own tasks (whose scoring downloads code and runs programs with
little isolation). The task files in `unmask.evaluation.tasks` name these classes.
"""

from __future__ import annotations

import ast
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from unmask.data.files import read_records
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.evaluation.sandbox import Program, run, run_all


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimate without bias the chance that one of `k` answers is correct (Chen et al. 2021, arXiv:2107.03374).

    Examples:
        >>> pass_at_k(samples=4, correct=1, k=2)
        0.5
    """
    return 1 - comb(samples - correct, k) / comb(samples, k)


class CodeTask(ConfigurableTask):
    """A task whose answers are programs.

    Metadata of the harness's `TaskManager(metadata={...})` that it reads: `data` (a file of records, a name on the
    hub, or {task: either}; None: the data set of the task file), `repeats` (answers a problem), `k` (of pass@k;
    default 1 and `repeats`), and of the sandbox `seconds`, `megabytes`, `allow_unsandboxed`.

    The answers' outcomes are the filtered responses: [{"status": "passed", "detail": ""}, ...] of each problem.
    """

    FIELDS: Mapping[str, type]
    """What a record needs."""

    def __init__(self, config: dict[str, Any]) -> None:
        given = dict(config.get("metadata") or {})
        self._name = config["task"]
        data = given.get("data")
        self._data = data.get(self._name) if isinstance(data, Mapping) else data
        repeats = int(given.get("repeats", config.get("repeats", 1)))
        ks = given.get("k", sorted({1, repeats}))
        ks = [ks] if isinstance(ks, int) else ks
        if not 1 <= min(ks) <= max(ks) <= repeats:
            raise UnmaskError(
                f"{self._name}: k of pass@k is 1 to repeats, the answers a problem; got k={ks}, repeats={repeats}."
            )
        self._ks, self._checked = ks, False
        self._sandbox = {
            key: given[key] for key in ("seconds", "megabytes", "allow_unsandboxed") if key in given
        }
        metrics = [{"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in ks]
        config = {key: value for key, value in config.items() if key != "class"}
        # With `process_results` in its config the base class accepts metrics that it does not know.
        config |= {"repeats": repeats, "metric_list": metrics, "process_results": "pass@k"}
        super().__init__(config=config)

    @abstractmethod
    def program(self, doc: Mapping[str, Any], answer: str) -> Program:
        """The program of an answer, with its tests."""

    def docs(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The problems of a record."""
        yield dict(record)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Read the problems.

        Raises:
            UnmaskError: the data cannot be read, or a record lacks a field.
        """
        name, config_name = self._data, None
        if name is None:
            name, config_name = self.config.dataset_path, self.config.dataset_name
        assert name is not None  # the task files have one
        split = "train" if Path(name).is_file() else "test"  # a file has but one
        docs: list[dict[str, Any]] = []
        for record, where in read_records(name, split=split, config_name=config_name):
            for field, kind in self.FIELDS.items():
                if not isinstance(record.get(field), kind):
                    problem = f"must be of type {kind.__name__}" if field in record else "is missing"
                    raise UnmaskError(
                        f"{where}: {field!r} {problem}; {self._name} needs {', '.join(self.FIELDS)}."
                    )
            docs += self.docs({field: record[field] for field in self.FIELDS})
        self.dataset = {"test": datasets.Dataset.from_list(docs)}

    def construct_requests(self, doc: dict[str, Any], ctx: str | list[str], **kwargs: Any) -> Any:
        if not self._checked:  # before the first answer: can it be scored?
            run("", **self._sandbox)
            self._checked = True
        return super().construct_requests(doc, ctx, **kwargs)

    def apply_filters(self) -> list[Instance]:
        """Run the programs of all answers."""
        repeats = self.config.repeats
        if repeats > 1 and all(len(set(each.resps)) == 1 for each in self.instances):
            warnings.warn(
                f"{self._name}: the {repeats} answers to each problem are the same; set a temperature.",
                UnmaskWarning,
                stacklevel=2,
            )
        programs = [self.program(each.doc, answer) for each in self.instances for answer in each.resps]
        outcomes = iter(run_all(programs, **self._sandbox))
        for each in self.instances:
            found = [next(outcomes) for _ in each.resps]
            each.filtered_resps["sandbox"] = [{"status": one.status, "detail": one.detail} for one in found]
        return self.instances

    def process_results(
        self, doc: Mapping[str, Any], results: Sequence[list[dict[str, str]]]
    ) -> dict[str, float]:
        outcomes = results[0]
        correct = sum(outcome["status"] == "passed" for outcome in outcomes)
        return {f"pass@{k}": pass_at_k(len(outcomes), correct, k) for k in self._ks}


class HumanEval(CodeTask):
    """HumanEval and HumanEval+: the body of a function, given its head."""

    FIELDS = dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), str)

    def program(self, doc: Mapping[str, Any], answer: str) -> Program:
        if self.config.gen_prefix:  # the answer is in a block of code that the prefix opens
            answer = answer.partition("```")[0]
        tests = f"{helpers(doc['prompt'], doc['entry_point'])}\n{doc['test']}\ncheck({doc['entry_point']})"
        return Program(doc["prompt"] + answer, tests, names=(doc["entry_point"],))


class HumanEvalInfill(HumanEval):
    """HumanEval with a line of the canonical solution left out, each in turn (Bavarian et al. 2022, single-line)."""

    def docs(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        lines = record["canonical_solution"].split("\n")
        for number, line in enumerate(lines):
            if line.strip():
                before = "".join(f"{each}\n" for each in lines[:number])
                after = "".join(f"\n{each}" for each in lines[number + 1 :])
                yield {
                    **record,
                    "task_id": f"{record['task_id']}/L{number}",
                    "prompt": record["prompt"] + before,
                    "suffix": after,
                    "canonical_solution": line,
                    "head": record["prompt"],
                }

    def construct_requests(self, doc: dict[str, Any], ctx: str | list[str], **kwargs: Any) -> Any:
        request = super().construct_requests(doc, ctx, **kwargs)
        context, settings = request.arguments
        request.arguments = (context, {**settings, "suffix": doc["suffix"]})
        return request

    def program(self, doc: Mapping[str, Any], answer: str) -> Program:
        whole = super().program({**doc, "prompt": doc["head"]}, "")
        return whole._replace(solution=doc["prompt"] + answer + doc["suffix"])


class MBPP(CodeTask):
    """MBPP: a function from its description and three asserts."""

    FIELDS: Mapping[str, type] = {"task_id": int, "text": str, "code": str, "test_list": list}

    def docs(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if record["task_id"] in (2, 3, 4):
            raise UnmaskError(
                f"{self._name}: problem {record['task_id']} is an example in the prompt; "
                "give the test split alone (task_id 11 to 510)."
            )
        yield dict(record)

    def tests(self, doc: Mapping[str, Any]) -> str:
        return "\n".join(doc["test_list"][:3])

    def program(self, doc: Mapping[str, Any], answer: str) -> Program:
        body = parsed(doc["code"])
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = tuple(node.name for node in body if isinstance(node, kinds))
        return Program(answer, f"{source(imports)}\n{self.tests(doc)}", names or None)


class MBPPPlus(MBPP):
    """MBPP+: the tests of MBPP in the prompt, many more to pass (Liu et al. 2023, arXiv:2305.01210)."""

    FIELDS: Mapping[str, type] = {"task_id": int, "prompt": str, "code": str, "test_list": list, "test": str}

    def docs(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        yield dict(record)  # problems 2 to 4 are of this data set, and the harness scores them too

    def tests(self, doc: Mapping[str, Any]) -> str:
        return doc["test"]


def parsed(text: str) -> list[ast.stmt]:
    """The statements of code that a data set has; none if it is not code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError):
        return []


def source(body: Sequence[ast.stmt]) -> str:
    return "\n".join(map(ast.unparse, body))


def helpers(prompt: str, entry_point: str) -> str:
    """What a prompt defines but for its function: tests call it, and an answer that redefines it changes no test."""
    body = parsed(prompt) or parsed(f"{prompt}\n    pass\n")
    return source(
        [node for node in body if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)]
    )

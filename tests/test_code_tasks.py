"""Code tasks in the harness, on small files of the forms of HumanEval, HumanEval+, MBPP and MBPP+."""

from __future__ import annotations

import ast
import gzip
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from unmask.errors import UnmaskError, UnmaskWarning
from unmask.evaluation.code_tasks import pass_at_k
from unmask.evaluation.sandbox import Unsandboxed
from unmask.evaluation.tasks import TASKS

HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef total(numbers: List[int]) -> int:\n    """ Sum.\n    """\n',
        "entry_point": "total",
        "canonical_solution": "    result = 0\n    for number in numbers:\n        result += number\n\n"
        "    return result\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n"
        "    assert candidate([]) == 0\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": 'import math\n\ndef shift(s: str):\n    """ By one. """\n'
        '    return "".join(chr(ord(c) + 1) for c in s)\n\n\n'
        'def unshift(s: str):\n    """ Undo shift. """\n',
        "entry_point": "unshift",
        "canonical_solution": '    return "".join(chr(ord(c) - 1) for c in s)\n',
        "test": "def check(candidate):\n    assert math.sqrt(4) == 2\n    assert candidate(shift('abc')) == 'abc'\n",
    },
]
# As evalplus writes them: assertions of numpy, inputs and results in lists.
PLUS = """
import numpy as np

def assertion(out, exp, atol):
    exact_match = out == exp
    if not exact_match and atol != 0:
        np.testing.assert_allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match
"""
HUMANEVAL_PLUS = [
    {
        **HUMANEVAL[0],
        "test": PLUS
        + "\ndef check(candidate):\n    inputs = [[[1, 2]], [[-1]], [[0.1] * 3]]\n    results = [3, -1, 0.3]\n"
        "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 1e-6)\n",
    }
]
MBPP = [
    {
        "task_id": 11,
        "text": "Write a function to add.",
        "code": "import math\r\nclass Two:\r\n  value = 2\r\ndef sum(a, b):\r\n  return a + b",
        "test_list": [
            "assert sum(1, 2) == 3",
            "assert sum(0, 0) == 0",
            "assert math.isclose(sum(Two.value, 0.5), 2.5)",
        ],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
]
MBPP_PLUS = [
    {
        "task_id": 2,
        "prompt": "Write a function to add.",
        "code": "def add(a, b):\n  return a + b",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 4"],
        "test_imports": [],
        "test": PLUS + "\ninputs = [[1, 2], [-1, 5], [0.1, 0.2]]\nresults = [3, 4, 0.3]\n"
        "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(add(*inp), exp, 1e-6)\n",
    }
]
DATA = {
    "unmask_humaneval": HUMANEVAL,
    "unmask_humaneval_instruct": HUMANEVAL,
    "unmask_humaneval_infill": HUMANEVAL,
    "unmask_humaneval_plus": HUMANEVAL_PLUS,
    "unmask_mbpp": MBPP,
    "unmask_mbpp_plus": MBPP_PLUS,
}


class Scripted(LM):
    """Answers with a function of the request and its number."""

    def __init__(self, answer: Callable[[Instance, int], str]) -> None:
        super().__init__()
        self.answer, self.requests = answer, []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.requests = requests
        return [self.answer(request, number) for number, request in enumerate(requests)]

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def canonical(request: Instance, number: int) -> str:
    return request.doc.get("canonical_solution") or request.doc["code"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name, records in DATA.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
        found[name] = str(path)
    return found


def load(name: str, **metadata: Any) -> Any:
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata).load([name])


def evaluate(
    name: str, answer: Callable[[Instance, int], str], **metadata: Any
) -> tuple[Any, list[dict], list]:
    model = Scripted(answer)
    found: Any = lm_eval.evaluate(
        model, load(name, **metadata), confirm_run_unsafe_code=True, bootstrap_iters=0, log_samples=True
    )
    return found["results"][name], found["samples"][name], model.requests


@pytest.mark.parametrize("name", DATA)
def test_canonical_answers_score_1_and_broken_ones_0(name, files):
    results, samples, _ = evaluate(name, canonical, data=files)
    assert results["pass@1,sandbox"] == 1, [sample["filtered_resps"] for sample in samples]
    for answer in ("", "    return None\n", "    raise SystemExit(0)\n", "import os; os._exit(0)"):
        results, samples, _ = evaluate(name, lambda request, number, answer=answer: answer, data=files)
        assert results["pass@1,sandbox"] == 0, (answer, [sample["filtered_resps"] for sample in samples])


def test_a_sample_says_how_each_answer_ended(files):
    answers = [
        "    return sum(numbers)",
        "    return 3",
        "    return 1 / 0",
        "    import time; time.sleep(60)",
    ]
    settings = {"repeats": 4, "k": [1, 2], "seconds": 2}
    results, (first, second), _ = evaluate(
        "unmask_humaneval", lambda request, number: answers[number % 4], data=files, **settings
    )
    assert first["filtered_resps"] == [
        [
            {"status": "passed", "detail": ""},
            {"status": "wrong", "detail": "assert candidate([]) == 0"},
            {"status": "error", "detail": "ZeroDivisionError: division by zero"},
            {"status": "timeout", "detail": "it ran longer than 2 s"},
        ]
    ]
    assert first["pass@1"] == 0.25 and first["pass@2"] == 0.5 and second["pass@1"] == 0
    assert results["pass@1,sandbox"] == 0.125 and results["pass@2,sandbox"] == 0.25


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer():
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * correct + [False] * (n - correct), k))
                assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_plus_tests_run(files, tmp_path):
    """Right on the examples in the prompt, wrong on a test that only the plus file has."""
    of_humaneval = "    return 3 if numbers == [1, 2] else 0\n"
    assert evaluate("unmask_humaneval", lambda *_: of_humaneval, data=files)[1][0]["pass@1"] == 1
    assert evaluate("unmask_humaneval_plus", lambda *_: of_humaneval, data=files)[1][0]["pass@1"] == 0
    of_mbpp = "def add(a, b):\n    return abs(a) + abs(b)\n"
    base = tmp_path / "base.json"
    base.write_text(json.dumps([{**MBPP_PLUS[0], "task_id": 11, "text": MBPP_PLUS[0]["prompt"]}]))
    assert evaluate("unmask_mbpp", lambda *_: of_mbpp, data=str(base))[1][0]["pass@1"] == 1
    (sample,) = evaluate("unmask_mbpp_plus", lambda *_: of_mbpp, data=files)[1]
    assert sample["filtered_resps"] == [
        [{"status": "wrong", "detail": sample["filtered_resps"][0][0]["detail"]}]
    ]


def test_an_answer_cannot_redefine_what_its_tests_call(files):
    """`shift` is of the prompt; both as the identity would be right."""
    answer = "    return s\n\ndef shift(s):\n    return s\n"
    (_, sample) = evaluate("unmask_humaneval", lambda *_: answer, data=files)[1]
    assert sample["filtered_resps"][0][0]["status"] == "wrong"


def test_infill_leaves_out_each_line_in_turn(files):
    _, samples, requests = evaluate("unmask_humaneval_infill", canonical, data=files)
    lines = [
        line for record in HUMANEVAL for line in record["canonical_solution"].split("\n") if line.strip()
    ]
    assert [request.doc["canonical_solution"] for request in requests] == lines and len(lines) == 5
    whole = {record["prompt"] + record["canonical_solution"] for record in HUMANEVAL}
    for request in requests:
        context, settings = request.args
        assert context + canonical(request, 0) + settings["suffix"] in whole
        assert context == request.doc["prompt"] and settings["gap"] == "1-32"
    assert [sample["doc"]["task_id"] for sample in samples][:2] == ["HumanEval/0/L0", "HumanEval/0/L1"]
    answer = {"HumanEval/0/L0": "    result = sum([0])", "HumanEval/0/L1": "    for number in [1]:"}
    _, samples, _ = evaluate(
        "unmask_humaneval_infill", lambda request, _: answer.get(request.doc["task_id"], ""), data=files
    )
    assert [sample["pass@1"] for sample in samples] == [1, 0, 0, 0, 0]


def test_the_same_samples_in_every_run(files):
    first, again = (
        evaluate("unmask_humaneval", lambda *_: "    return {object()}", data=files)[1] for _ in range(2)
    )
    assert json.dumps(first) == json.dumps(again)


class Functions(yaml.SafeLoader):
    """Reads `!function name` as the name."""


Functions.add_constructor("!function", lambda loader, node: str(node.value))


def merged(path: Path) -> dict[str, Any]:
    config = yaml.load(path.read_text(), Functions)
    base = merged(path.parent / config.pop("include")) if "include" in config else {}
    return base | config


@pytest.mark.parametrize("name", [name for name in DATA if not name.endswith("infill")])
def test_prompts_and_settings_are_the_harness_own(name):
    theirs_name = name.removeprefix("unmask_")
    folder = Path(lm_eval.__file__).parent / "tasks" / theirs_name.split("_")[0]
    ours, theirs = merged(TASKS / f"{name}.yaml"), merged(folder / f"{theirs_name}.yaml")
    keys = {
        "dataset_path",
        "dataset_name",
        "doc_to_text",
        "doc_to_target",
        "target_delimiter",
        "gen_prefix",
        "test_split",
    }
    keys |= {"generation_kwargs", "num_fewshot", "output_type", "unsafe_code"}
    assert {key: ours.get(key) for key in keys} == {key: theirs.get(key) for key in keys}
    if "mbpp" in name:
        functions = {
            node.name: node
            for node in ast.parse((folder / "utils.py").read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        examples = functions["list_fewshot_samples"].body[-1]
        assert isinstance(examples, ast.Return) and examples.value is not None
        assert ours["fewshot_config"]["samples"] == ast.literal_eval(examples.value)
        assert ours["fewshot_config"]["sampler"] == theirs["fewshot_config"]["sampler"]


def test_the_prompt_of_mbpp_has_three_examples(files):
    (request,) = evaluate("unmask_mbpp", canonical, data=files)[2]
    assert request.args[0].count("[BEGIN]") == 4 and request.args[0].count("[DONE]") == 3
    assert request.args[0].endswith("assert math.isclose(sum(Two.value, 0.5), 2.5)\n[BEGIN]\n")


def test_code_runs_only_when_it_was_allowed(files, tmp_path):
    tasks = load("unmask_humaneval", data=files)
    assert tasks["tasks"]["unmask_humaneval"].UNSAFE_CODE
    model = Scripted(canonical)
    with pytest.raises(ValueError, match="unsafe"):
        lm_eval.evaluate(model, tasks, bootstrap_iters=0)
    assert model.requests == []


def test_a_sandbox_that_cannot_isolate_is_known_before_the_first_answer(files, monkeypatch):
    def unsandboxed(program: Any, **settings: Any) -> None:
        assert settings == {"seconds": 3, "allow_unsandboxed": False}
        raise Unsandboxed("no namespaces")

    monkeypatch.setattr("unmask.evaluation.code_tasks.run", unsandboxed)
    model = Scripted(canonical)
    tasks = load("unmask_humaneval", data=files, seconds=3, allow_unsandboxed=False)
    with pytest.raises(Unsandboxed):
        lm_eval.evaluate(model, tasks, confirm_run_unsafe_code=True, bootstrap_iters=0)
    assert model.requests == []


def test_bad_data_and_settings_are_one_line(tmp_path, files):
    def refused(text: str, name: str = "unmask_humaneval", **metadata: Any) -> None:
        with pytest.raises(UnmaskError) as caught:
            load(name, **metadata)
        assert text in str(caught.value) and "\n" not in str(caught.value)

    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(HUMANEVAL[0]) + "\n{broken\n")
    refused("broken.jsonl line 2: not valid JSON", data=str(broken))
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text(
        json.dumps({key: value for key, value in HUMANEVAL[0].items() if key != "test"}) + "\n"
    )
    refused("'test' is missing", data=str(lacking))
    refused("'task_id' must be of type int", name="unmask_mbpp", data=files["unmask_humaneval"])
    shown = tmp_path / "shown.jsonl"
    shown.write_text(json.dumps({**MBPP[0], "task_id": 3}) + "\n")
    refused("problem 3 is an example in the prompt", name="unmask_mbpp", data=str(shown))
    refused("got k=[10], repeats=1", data=files, k=[10])
    refused("openai/openai_humaneval: no such local file or folder")
    refused("no such", data=str(tmp_path / "missing.jsonl"))


def test_answers_that_are_all_the_same_warn(files):
    with pytest.warns(UnmaskWarning, match="the 2 answers to each problem are the same; set a temperature"):
        evaluate("unmask_humaneval", canonical, data=files, repeats=2)

"""Tasks of lm-evaluation-harness on a diffusion model: the adapter, and `unmask eval`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from eval_tasks import WORDS, metric, write_task, write_tasks
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tiny import byte_model, run_cli
from transformers import PreTrainedTokenizerBase

from unmask.data.collate import collate
from unmask.data.encode import Example
from unmask.data.tokenizer import byte_tokenizer
from unmask.diffusion.likelihood import error_of_pairs, likelihood
from unmask.errors import UnmaskWarning
from unmask.evaluation.harness import UnmaskLM
from unmask.evaluation.questions import Question, find_open, greedy_matches, score_questions
from unmask.evaluation.run import EvalSettings, load_tasks
from unmask.generation.prompts import raw_example
from unmask.generation.text import complete

FEW: dict[str, Any] = {"draws": 8, "max_draws": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with a checkpoint and tasks."""
    place = tmp_path_factory.mktemp("eval")
    byte_model().save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    write_tasks(place / "tasks")
    return place


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model().eval()


def asked(kind: Any, *arguments: Any, document: int | None = 0) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("a task", document, 1))


def ids_of(text: str) -> list[int]:
    return list(text.encode())


# Likelihoods.


def test_log_likelihood_is_the_bound_found_by_enumeration(tokenizer: PreTrainedTokenizerBase) -> None:
    model = byte_model().double().eval()
    lm = UnmaskLM(model, tokenizer=tokenizer, draws=32)
    answers = lm.loglikelihood(
        [asked("loglikelihood", "one two", " ab"), asked("loglikelihood", "one", " c", document=1)]
    )
    for (found, is_greedy), text in zip(answers, ("one two| ab", "one| c"), strict=True):
        context, continuation = text.split("|")
        before, ids = ids_of(context), ids_of(continuation)
        size, expected = len(ids), 0.0
        for masked in product([False, True], repeat=size):
            if k := sum(masked):
                shown = [259 if hide else token for hide, token in zip(masked, ids, strict=True)]
                with torch.no_grad():
                    logits = model(torch.tensor([before + shown])).logits[0, len(before) :]
                nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none")
                expected += float((nll * torch.tensor(masked)).sum()) / (k * math.comb(size, k))
        assert found == pytest.approx(-expected, abs=1e-5)
        assert is_greedy is (greedy_alone(model, before, size) == ids)


def greedy_alone(model: Any, before: list[int], size: int) -> list[int]:
    """The most confident token first, by whole passes of the model."""
    ids = [*before, *[259] * size]
    for _ in range(size):
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0].softmax(dim=-1)
        probabilities[:, [256, 259]] = 0  # padding and the mask are never written
        confidence, best = probabilities.max(dim=-1)
        at = max((at for at, token in enumerate(ids) if token == 259), key=confidence.tolist().__getitem__)
        ids[at] = int(best[at])
    return ids[len(before) :]


@pytest.mark.parametrize("blocks", [{}, {"attention": "block_causal", "block_length": 3}], ids=str)
def test_what_greedy_decoding_writes_is_greedy(
    blocks: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = byte_model(**blocks).eval()
    before, examples = Example(ids_of("Say"), [True] * 3), []
    for size in (1, 2, 5):
        [written] = complete(model, tokenizer, [before], max_new_tokens=size)
        for change in (0, 1):
            ids = [*written.ids[:-1], (written.ids[-1] + change) % 250]
            examples.append(Example(before.input_ids + ids, before.src_mask + [False] * size))
    assert [same for same, _ in greedy_matches(model, tokenizer, examples)] == [True, False] * 3


def test_blocks_of_one_token_are_scored_exactly(tokenizer: PreTrainedTokenizerBase) -> None:
    model = byte_model(attention="block_causal", block_length=1).double().eval()
    lm = UnmaskLM(model, tokenizer=tokenizer, **FEW)
    requests = [asked("loglikelihood", "one", " two"), asked("loglikelihood", "one", " three")]
    (one, _), (other, _) = lm.loglikelihood(requests)
    for value, text in ((one, " two"), (other, " three")):
        before, total = ids_of("one"), 0.0
        for token in ids_of(text):
            source = torch.tensor([[True] * 3 + [False] * (len(before) - 2)])
            with torch.no_grad():
                logits = model(torch.tensor([[*before, 259]]), src_mask=source).logits[0, -1]
            total += float(torch.log_softmax(logits, dim=-1)[token])
            before.append(token)
        assert value == pytest.approx(total, abs=1e-5)
    assert [line["stderr"] for line in lm.details["a task", 0]] == [0, 0]


def question(words: list[str], seed: int = 0) -> Question:
    before = ids_of("A word:")
    examples = [Example(before + ids_of(word), [True] * len(before) + [False] * len(word)) for word in words]
    return Question(examples, [len(word) for word in words], seed)


def test_choices_share_their_draws(model: Any) -> None:
    """The error of a difference is smaller than that of independent draws, and is what repetition shows."""
    words = [" a long answer", " a long answes"]
    batch = collate(question(words).examples, pad_token_id=0)
    paired, apart = [], []
    for seed in range(40):
        found = likelihood(model, batch, num_samples=8, record_key=torch.tensor([seed, seed]))
        rows = found.draw_nll
        assert torch.allclose(rows.mean(dim=1), found.nll) and torch.allclose(
            error_of_pairs(rows), found.stderr
        )
        paired.append((float(rows[0].mean() - rows[1].mean()), float(error_of_pairs(rows[0] - rows[1]))))
        found = likelihood(model, batch, num_samples=8, record_key=torch.tensor([seed, seed + 1000]))
        apart.append(float(found.nll[0] - found.nll[1]))
    spread = torch.tensor([difference for difference, _ in paired]).std().item()
    assert spread < 0.7 * torch.tensor(apart).std().item()
    claimed = torch.tensor([error for _, error in paired]).square().mean().sqrt().item()
    assert claimed == pytest.approx(spread, rel=0.35)


def test_requests_of_one_question_have_one_seed(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    def seeds(*pairs: tuple[str, str], repeats: int = 1) -> list[int]:
        requests = [
            Instance("loglikelihood", {}, pair, index, metadata=("a task", 0, repeats))
            for index, pair in enumerate(pairs)
        ]
        lm = UnmaskLM(model, tokenizer=tokenizer, draws=2, max_draws=2)
        lm.loglikelihood([request for request in requests for _ in range(repeats)])
        return [one["seed"] for one in lm.details["a task", 0]]

    assert len(set(seeds(("Q", " a"), ("Q", " b"), ("Q", " c")))) == 1
    assert len(set(seeds(("Q one", " a"), ("Q two", " a")))) == 1  # choices of the context
    # The choices again without the question, as for mutual information: another question.
    first, second, third, fourth = seeds(("Q", " a"), ("Q", " b"), ("", " a"), ("", " b"))
    assert first == second != third == fourth
    first, second, third, fourth = seeds(("Q", " a"), ("Q", " b"), repeats=2)
    assert first == second != third == fourth


def test_undecided_questions_alone_get_more_draws(model: Any) -> None:
    close, clear = question([" a long answer", " a long answes"]), question([" a", " a very long answer"])
    both = score_questions(model, [close, clear], draws=8, max_draws=64)
    assert [len({bound.draws for bound in one.bounds}) for one in both] == [1, 1]
    assert both[1].bounds[1].draws == 8 and not any(both[1].open.values())
    assert both[0].bounds[0].draws == 64 or not any(both[0].open.values())
    assert both[0].bounds[0].draws > 8
    [twice] = score_questions(model, [question([" a long answer"] * 2)], draws=8, max_draws=64)
    assert twice.bounds[0] == twice.bounds[1] and twice.bounds[0].draws == 8
    [alone] = score_questions(model, [close], draws=8, max_draws=64)
    assert alone.bounds[0].nats == pytest.approx(both[0].bounds[0].nats, rel=1e-6)


def test_a_question_is_open_while_its_lead_is_within_the_error() -> None:
    lead, other = torch.tensor([10.0, 12.0] * 8), torch.tensor([11.0, 11.2] * 8)
    rows = torch.stack([lead, other])
    assert find_open(rows, [1, 1]) == {"acc": True, "acc_norm": True}
    assert find_open(torch.stack([lead, other + 5]), [1, 1]) == {"acc": False, "acc_norm": False}
    # Divided by its characters the second leads by far.
    assert find_open(rows, [1, 100]) == {"acc": True, "acc_norm": False}
    assert find_open(torch.stack([lead, lead]), [1, 1]) == {"acc": False, "acc_norm": False}  # a tie for ever


def test_rolling_windows_score_every_token_once(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "To be, or not to be."
    lm = UnmaskLM(model, tokenizer=tokenizer, max_length=8, **FEW)
    windows = lm.encoder.windows(text, 8)
    assert [len(window.input_ids) for window in windows] == [8, 8, 8]
    assert [window.supervised for window in windows] == [8, 8, 4]
    scored = [
        token
        for one in windows
        for token, given in zip(one.input_ids, one.src_mask, strict=True)
        if not given
    ]
    assert scored == ids_of(text)
    [value] = lm.loglikelihood_rolling([asked("loglikelihood_rolling", text)])
    [details] = lm.details["a task", 0]
    assert value == -details["nats"] and details["tokens"] == 20 and details["stderr"] > 0


# Generation.


def test_each_request_has_its_own_settings(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = UnmaskLM(model, tokenizer=tokenizer)
    settings: list[dict[str, Any]] = [
        {"until": [], "max_gen_toks": 5},
        {"until": ["\x00never"], "max_new_tokens": 9, "steps": 3},
        {"until": [], "max_tokens": 9, "temperature": 1.0, "do_sample": True, "policy": "random"},
        {
            "until": [],
            "max_gen_toks": 8,
            "threshold": 0.001,
            "do_sample": False,
            "temperature": 0.7,
            "top_p": 0.5,
        },
    ]
    texts = lm.generate_until(
        [asked("generate_until", "Say", one, document=i) for i, one in enumerate(settings)]
    )
    found = [lm.details["a task", index][0] for index in range(4)]
    assert [one["canvas"] for one in found] == [5, 9, 9, 8]
    assert found[1]["forward_passes"] <= 3 and found[3]["forward_passes"] == 1
    expected = [
        {"max_new_tokens": 5},
        {"max_new_tokens": 9, "steps": 3},
        {"max_new_tokens": 9, "temperature": 1.0, "policy": "random"},
        {"max_new_tokens": 8, "threshold": 0.001},
    ]
    for text, one, settings_of_one in zip(texts, found, expected, strict=True):
        [alone] = complete(
            model, tokenizer, [raw_example(tokenizer, "Say")], seed=one["seed"], **settings_of_one
        )
        assert text == alone.text
    # A stop string of one request is none of the others'.
    stop = texts[0][2]
    requests = [asked("generate_until", "Say", {"max_gen_toks": 5, "until": until}) for until in ([stop], [])]
    assert lm.generate_until(requests) == [texts[0].partition(stop)[0], texts[0]]


def test_settings_of_the_run_come_before_those_of_tasks(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = UnmaskLM(model, tokenizer=tokenizer, canvas=7, threshold=0.001)
    lm.generate_until([asked("generate_until", "Say", {"max_gen_toks": 20, "threshold": 1.0, "until": []})])
    [found] = lm.details["a task", 0]
    assert found["canvas"] == 7 and found["forward_passes"] == 1


def test_repeats_differ_and_nothing_depends_on_order(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    sampled = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    requests = [asked("generate_until", text, sampled) for text in ("Say", "Say", "Write", "Say")]
    one, two, other, three = UnmaskLM(model, tokenizer=tokenizer).generate_until(requests)
    assert len({one, two, three}) == 3
    shuffled = UnmaskLM(model, tokenizer=tokenizer, batch_size=1).generate_until([requests[2], *requests[:2]])
    assert shuffled == [other, one, two]
    assert UnmaskLM(model, tokenizer=tokenizer, seed=1).generate_until(requests[:1]) != [one]


def test_a_suffix_is_seen(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = UnmaskLM(model, tokenizer=tokenizer)
    kwargs = {"max_gen_toks": 4, "until": [], "suffix": "return b"}
    texts = lm.generate_until(
        [
            asked("generate_until", "def f():", {**kwargs, **more})
            for more in ({}, {"gap": "1-3"}, {"suffix": "xyz"})
        ]
    )
    details = lm.details["a task", 0]
    assert details[0]["tokens"] == 4 and details[1]["tokens"] <= 3 and texts[0] != texts[2]
    whole = torch.tensor([ids_of("def f():") + [0] * 4 + ids_of("return b")])
    gap = torch.zeros_like(whole, dtype=torch.bool)
    gap[0, 8:12] = True
    filled = model.infill(whole, gap).sequences[0, 8:12].tolist()
    assert texts[0] == tokenizer.decode(filled, skip_special_tokens=True)


def test_chat_prompts_and_prefills_are_those_of_training(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    lm = UnmaskLM(model, tokenizer=tokenizer)
    turns = [{"role": "user", "content": "Say <|im_end|>"}]
    text = lm.apply_chat_template(turns)
    assert text == "<|im_start|>user\nSay <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    ids = lm.encoder.context(text).input_ids
    assert ids[:7] == [257, *ids_of("user\nS")] and ids.count(258) == 1  # what the user wrote is text
    prefilled = lm.apply_chat_template([*turns, {"role": "assistant", "content": "Sure:"}], False)
    assert prefilled == text + "Sure:"
    assert lm.encoder.context(prefilled).input_ids == ids + ids_of("Sure:")
    assert lm.encoder.pair(text, " ab", "").input_ids == ids + ids_of(" ab")


# The harness.


def test_it_works_by_simple_evaluate(place: Path) -> None:
    asked = {
        "model": "unmask",
        "model_args": f"pretrained={place / 'model'},draws=4,max_draws=4,canvas=5",
        "tasks": ["tiny_write", "tiny_choose"],
        "task_manager": TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        "limit": 2,
        "apply_chat_template": True,
        "use_cache": str(place / "cache"),
    }
    found = cast(Any, simple_evaluate)(**asked, batch_size=3)
    again = cast(Any, simple_evaluate)(**asked, batch_size=1)  # partly from the cache
    assert found["results"] == again["results"] and found["samples"] == again["samples"]
    assert {"exact_match,first", "acc,none", "acc_norm,none"} <= {
        name for figures in found["results"].values() for name in figures
    }
    prompt = found["samples"]["tiny_write"][0]["arguments"][0][0]
    assert prompt.startswith("<|im_start|>user\nReverse the word wool.")
    assert list(place.glob("cache*.db"))


@pytest.mark.slow
def test_it_works_by_the_command_of_the_harness(place: Path) -> None:
    command = [
        *(sys.executable, "-m", "unmask.evaluation", "--model", "unmask", "--tasks", "tiny_choose"),
        *("--model_args", f"pretrained={place / 'model'},draws=4,max_draws=4", "--limit", "2"),
        *("--include_path", str(place / "tasks")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0 and "tiny_choose" in done.stdout and "acc_norm" in done.stdout, done.stderr


def test_the_harness_is_imported_by_its_users_alone() -> None:
    code = "import sys, unmask.cli; print('lm_eval' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


NAMES = "tiny_write,tiny_choose,tiny_text"


def command(place: Path, out: str) -> list[str]:
    """`-m unmask eval` as `evaluate_folder` runs it."""
    arguments = ["-m", "unmask", "eval", place / "model", "--tasks", NAMES, "--out", place / out]
    arguments += ["--include-path", place / "tasks", "--draws", "8", "--max-draws", "16"]
    return [str(argument) for argument in arguments]


def results_in(folder: Path) -> dict[str, bytes]:
    kept = {"timing.json", "requests.jsonl", "requests-1.jsonl"}
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in kept}


def evaluate_folder(place: Path, out: str, *more: str) -> dict[str, bytes]:
    """Run `unmask eval`; the files that are to be the same bytes."""
    said = run_cli(*command(place, out)[2:], *more)
    assert said.code == 0, said.err
    return results_in(place / out)


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, bytes]:
    return evaluate_folder(place, "whole")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_result_files_do_not_depend_on_the_batch_size(
    place: Path, whole: dict[str, bytes], batch_size: int
) -> None:
    files = evaluate_folder(place, f"batch-{batch_size}", "--batch-size", str(batch_size))
    assert files == whole and {"results.json", "samples_tiny_choose.jsonl"} <= set(files)


def test_an_interrupted_evaluation_resumes_to_the_same_files(place: Path, whole: dict[str, bytes]) -> None:
    lines = (place / "whole" / "requests.jsonl").read_bytes().splitlines(keepends=True)
    (place / "cut").mkdir()
    # Settings, some results, and half a line.
    (place / "cut" / "requests.jsonl").write_bytes(b"".join(lines[:12]) + lines[12][:20])
    assert evaluate_folder(place, "cut", "--resume") == whole
    after = (place / "cut" / "requests.jsonl").read_bytes().splitlines(keepends=True)
    assert after[:12] == lines[:12] and sorted(after) == sorted(lines)  # nothing is computed twice


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--seed", "1"), "seed was 0, now it would be 1;"),
        (("--canvas", "6"), 'canvas was "task", now it would be 6;'),
        (("--threshold", "0.5"), 'settings was {}, now it would be {"threshold": 0.5};'),
        (("--limit", "2"), "limit was null, now it would be 2;"),
    ],
    ids=str,
)
def test_a_resume_refuses_other_settings(
    place: Path, whole: dict[str, bytes], change: tuple[str, str], told: str
) -> None:
    said = run_cli(
        *("eval", place / "model", "--tasks", "tiny_write,tiny_choose,tiny_text", "--out", place / "whole"),
        *("--include-path", place / "tasks", "--draws", "8", "--max-draws", "16", "--resume", *change),
    )
    assert said.code == 2 and told in said.err
    assert (place / "whole" / "results.json").read_bytes() == whole["results.json"]


def test_a_folder_with_results_is_not_written_over(place: Path, whole: dict[str, bytes]) -> None:
    said = run_cli("eval", place / "model", "--tasks", "tiny_text", "--out", place / "whole")
    assert said.code == 2 and "exists already; --resume continues it, or name another folder." in said.err


def test_the_files_say_how_they_were_made(whole: dict[str, bytes]) -> None:
    results = json.loads(whole["results.json"])
    made = results["unmask"]
    assert made["canvas"] == "task" and made["decoding"]["tiny_write"]["max_new_tokens"] == 6
    assert made["decoding"]["tiny_write"]["policy"] == "maskgit_plus" and made["dtype"] == "float32"
    assert made["tasks"]["tiny_write"]["version"] == 1.5 and results["versions"]["tiny_write"] == 1.5
    assert made["bos"] == {"added": False, "token": None} and made["chat_template"] is None
    assert {"torch", "lm_eval", "unmask"} <= set(made["versions"])
    assert results["open"]["tiny_choose"].keys() == {"acc", "acc_norm"}
    for task, count in (("tiny_write", 8), ("tiny_choose", 12), ("tiny_text", 4)):
        samples = [json.loads(line) for line in whole[f"samples_{task}.jsonl"].splitlines()]
        requests = [one for line in samples for one in line["requests"]]
        assert len(requests) == count and all(one["forward_passes"] > 0 for one in requests)
        for name in ("tokens", "forward_passes"):
            assert results["cost"][task][name] == sum(line["cost"][name] for line in samples)
            assert results["cost"][task][name] == sum(one[name] for one in requests)
    choices = [json.loads(line) for line in whole["samples_tiny_choose.jsonl"].splitlines()]
    for line in choices:
        nats = [one["nats"] for one in line["requests"]]
        assert [-answer[0][0] for answer in line["resps"]] == nats and min(
            one["draws"] for one in line["requests"]
        ) >= 8
        assert line["acc"] == float(nats.index(min(nats)) == line["doc"]["label"])


def test_the_page_shows_the_items(place: Path, whole: dict[str, bytes]) -> None:
    page, card = whole["report.html"].decode(), whole["card.md"].decode()
    for word in WORDS[:4]:
        assert f"Reverse the word {word}." in page
    samples = [json.loads(line) for line in whole["samples_tiny_choose.jsonl"].splitlines()]
    for line in samples:
        for one in line["requests"]:
            assert f"{one['nats']:.3f} ± {one['stderr']:.3f} nats" in page
    assert page.count("the likeliest") == 4 and page.count("<article>") == 12 and "<script" not in page
    results = json.loads(whole["results.json"])
    accuracy = results["results"]["tiny_choose"]["acc,none"]
    assert f"| tiny_choose | 1.5 | acc | {accuracy:.4f} ± " in card and "canvas task" in card


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(place: Path, whole: dict[str, bytes]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run([*launch, *command(place, "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1
    assert results_in(place / "two") == whole
    shares = [file.read_bytes().count(b"\n") for file in sorted((place / "two").glob("requests*.jsonl"))]
    assert len(shares) == 2 and sum(shares) == 2 + 16 and min(shares) > 4
    # One process resumes what two have begun.
    (place / "begun").mkdir()
    (place / "begun" / "requests-1.jsonl").write_bytes((place / "two" / "requests-1.jsonl").read_bytes())
    assert evaluate_folder(place, "begun", "--resume") == whole


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_files(place: Path, whole: dict[str, bytes]) -> None:
    run, kept = [sys.executable, *command(place, "killed")], place / "killed" / "requests.jsonl"
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (kept.exists() and kept.read_bytes().count(b"\n") > 2):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 2 < kept.read_bytes().count(b"\n") < 17 and not (kept.parent / "results.json").exists()
    done = subprocess.run([*run, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results_in(place / "killed") == whole


# Bad input.


def test_examples_that_a_task_does_not_take_are_said(place: Path) -> None:
    settings = EvalSettings(["tiny_write"], num_fewshot=2)
    with pytest.warns(UnmaskWarning, match="tiny_write: it says num_fewshot: 0, so --num-fewshot has no"):
        load_tasks(settings, [place / "tasks"], False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tiny_writ"], "--tasks: unknown task 'tiny_writ'; did you mean 'tiny_write'?"),
        (
            ["--tasks", "tiny_write", "--canvas", "400"],
            "tiny_write document 0: a context of 22 tokens and 400",
        ),
        (
            ["--tasks", "tiny_write", "--canvas", "few"],
            "canvas must be a number of at least 1 or 'task'; got 'few'.",
        ),
        (["--tasks", "broken"], "task broken: broken.jsonl line 2: "),
        (["--tasks", "gone"], "its data file nowhere.jsonl does not exist."),
        (
            ["--tasks", "remote"],
            "task remote: its data org/name must be downloaded, and the hub cannot be reached",
        ),
        (
            ["--tasks", "coder"],
            "task coder: it runs code that the model writes; allow it: --allow-code-execution.",
        ),
        (
            ["--tasks", "coder", "--allow-code-execution"],
            "task coder: it runs code that the model writes without isolation; take one of our own",
        ),
        (["--tasks", "tiny_write", "--chat"], "the tokenizer has no chat template; evaluate without it."),
        (["--tasks", "tiny_write", "--draws", "7"], "draws must be an even number; got 7."),
        (
            ["--tasks", "tiny_write", "--policy", "treshold"],
            "the settings: unknown policy 'treshold'; did you mean",
        ),
        (["--tasks", "odd"], "task odd: unknown generation setting 'tresold'; did you mean 'threshold'?"),
        (["--tasks", "uncounted"], "task uncounted: unknown metric 'exakt_match'."),
        (["--tasks", "numbered"], "task numbered: until must be strings; got [5]."),
        (["--tasks", "endless"], "task endless: generation_kwargs: invalid literal for int()"),
        (["--tasks", "tiny_write", "--dtype", "float31"], "dtype: 'float31' is not a type of torch"),
        (["--tasks", "tiny_write", "--add-bos"], "add_bos: the tokenizer has no BOS token."),
    ],
)
def test_bad_input_is_one_line(place: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    tasks = place / "tasks"
    if not (tasks / "odd.yaml").exists():
        write = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "x"}
        for name in ("broken", "gone", "remote", "coder", "odd", "uncounted", "numbered", "endless"):
            write_task(tasks, name, [{"question": "a"}], metric_list=metric("exact_match"), **write)
        (tasks / "broken.jsonl").write_text('{"question": "a"}\n{"question": \n')
        for name, old, new in (
            ("gone", str(tasks / "gone.jsonl"), "nowhere.jsonl"),
            ("remote", "dataset_path: json", "dataset_path: org/name"),
            ("coder", "task: coder", "task: coder\nunsafe_code: true"),
            ("odd", "task: odd", "task: odd\ngeneration_kwargs: {until: [], tresold: 0.5}"),
            ("uncounted", "exact_match", "exakt_match"),
            ("numbered", "task: numbered", "task: numbered\ngeneration_kwargs: {until: 5}"),
            ("endless", "task: endless", "task: endless\ngeneration_kwargs: {until: [], max_gen_toks: all}"),
        ):
            file = tasks / f"{name}.yaml"
            file.write_text(file.read_text().replace(old, new))
    model = place / "model"
    if "--chat" in arguments:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None
        model = place / "without-template"
        byte_model().save_pretrained(model)
        tokenizer.save_pretrained(model)
    said = run_cli("eval", model, "--include-path", tasks, "--out", tmp_path, *arguments)
    assert said.code == 2 and said.err.splitlines()[-2].startswith("error: ") and message in said.err
    assert "Traceback" not in said.err and not any(tmp_path.iterdir())

"""A masked-diffusion model for lm-evaluation-harness: `UnmaskLM`.

Importing this module registers the name "unmask", so that `simple_evaluate(model="unmask", ...)` finds it. Its
answers do not depend on the batch size, the order of the requests or the number of processes: the seed of each
request is a hash of (seed of the run, context, number of its occurrence), and the figures of a likelihood are
rounded (see `UnmaskLM.digits`), because in float32 the last bits of a matrix product depend on its size.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from transformers import PreTrainedTokenizerBase

from unmask.data.encode import Example
from unmask.data.tokenizer import check_vocabulary, load_tokenizer
from unmask.errors import UnmaskError
from unmask.evaluation.journal import Journal, request_keys, request_seed
from unmask.evaluation.questions import Question, greedy_matches, score_questions
from unmask.evaluation.requests import Decoding, PromptEncoder, decoding_of
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.infill import Gap, infill_text
from unmask.generation.text import StopStrings, completions
from unmask.model.bf16 import place_for_inference
from unmask.model.checkpoint import load_model
from unmask.processes import rank_and_size
from unmask.progress import Bar

NOT_OF_GAPS = ("max_new_tokens", "min_new_tokens")  # settings that a gap decides


@dataclass(frozen=True)
class Asked:
    """One `generate_until` request."""

    example: Example
    context: str
    decoding: Decoding
    seed: int


DOING = {  # kind of request -> what it is to people
    "generate_until": "generating",
    "loglikelihood": "scoring choices",
    "loglikelihood_rolling": "scoring texts",
}


class UnmaskLM(LM):
    """A diffusion model that answers the three kinds of requests of lm-evaluation-harness.

    Args:
        pretrained: folder or hub name of a checkpoint, or a loaded model.
        tokenizer: that of a loaded model; by default the checkpoint's.
        batch_size: rows of a forward pass; changes no answer.
        device: by default the accelerator, if there is one.
        dtype: "float32", "bfloat16", ...; by default the checkpoint's.
        seed: of the run.
        canvas: "task" = the token limit of each request (`max_gen_toks`), or a number of tokens for all.
        draws: masks sampled for each likelihood, an even number.
        max_draws: the most that an undecided multiple-choice question gets; see `score_questions`.
        add_bos: put the tokenizer's BOS token before a context that no chat template made.
        max_length: window of `loglikelihood_rolling` in tokens; by default the model's positions.
        journal: keeps results; see `Journal`.
        **settings: fields of `DiffusionGenerationConfig` and `preset`, in place of the tasks' own.

    Attributes:
        details: (task, document) -> for each of its requests and repeats, in their order, what was found.

    Raises:
        UnmaskError: the checkpoint or a setting cannot be used.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int | str = 16,
        device: str | None = None,
        dtype: str | None = None,
        seed: int = 0,
        canvas: int | str = "task",
        draws: int = 64,
        max_draws: int = 1024,
        add_bos: bool = False,
        max_length: int | None = None,
        journal: Journal | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.batch_size = _whole("batch_size", batch_size, 1)
        self.canvas = canvas if canvas == "task" else _whole("canvas", canvas, 1)
        self.draws, self.max_draws = _whole("draws", draws, 2), _whole("max_draws", max_draws, 2)
        if self.draws % 2:
            raise UnmaskError(f"draws must be an even number; got {self.draws}.")
        self.seed, self.settings = seed, settings
        if "max_new_tokens" in settings:
            raise UnmaskError(
                "max_new_tokens: set canvas, a number of tokens or 'task', the limit of each task."
            )
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UnmaskError(f"dtype: {dtype!r} is not a type of torch, such as float32 or bfloat16.")
        self.name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
        if isinstance(pretrained, str):
            self.tokenizer = load_tokenizer(pretrained) if tokenizer is None else tokenizer
            self.model: Any = load_model(pretrained, dtype=None if dtype is None else getattr(torch, dtype))
            # The harness's command names cuda:0 unless told otherwise, and goes on without.
            named = device is not None and (torch.cuda.is_available() or not device.startswith("cuda"))
            self.model.to(device) if named else place_for_inference(self.model)
        elif tokenizer is None:
            raise UnmaskError("tokenizer: give that of the loaded model.")
        else:
            self.model, self.tokenizer = pretrained, tokenizer
        self.model.eval()
        check_vocabulary(self.tokenizer, self.model.config, self.name)
        positions: int = self.model.config.max_position_embeddings
        self.encoder = PromptEncoder(self.tokenizer, positions, add_bos, self.name)
        self.max_length = min(max_length or positions, positions)
        self.journal = journal or Journal()
        self.details: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
        self.own = DiffusionGenerationConfig.from_generic(self.model.generation_config)
        # The settings are checked before a task is loaded; what a task adds, when its requests come.
        decoding_of(self.own, {}, self.canvas, settings, "the settings")

    # What the harness asks of a model with a chat template.

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's cache of prompts."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in force."""
        return self.encoder.chat.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation up to its answer or, without a generation prompt, to the end of a prefill."""
        return self.encoder.render(chat_history, prefilled=not add_generation_prompt)

    # The three kinds of requests.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write the answer of each request under its own settings; see `decoding_of`."""
        arguments = [cast(Any, request.args) for request in requests]
        keys, asked = request_keys(arguments), []
        for request, (context, gen_kwargs), (_, occurrence) in zip(requests, arguments, keys, strict=True):
            where = _where(request)
            decoding = decoding_of(self.own, gen_kwargs, self.canvas, self.settings, where)
            example = self.encoder.context(context)
            self.encoder.check_length(len(example.input_ids), decoding.settings["max_new_tokens"], where)
            asked.append(Asked(example, context, decoding, request_seed(self.seed, context, occurrence)))
        found = self._run("generate_until", keys, asked, self._generate, disable_tqdm)
        for request, one, result in zip(requests, asked, found, strict=True):
            size = (
                one.decoding.gap
                if one.decoding.suffix is not None
                else one.decoding.settings["max_new_tokens"]
            )
            self._keep(request, {"seed": one.seed, "canvas": size, **result["details"]}, result["text"])
        return [result["text"] for result in found]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Bound log p(continuation | context) from below, in nats; and say whether greedy decoding writes it.

        The continuations of one question share their draws, and an undecided question gets more of them.
        """
        arguments = [cast(Any, request.args) for request in requests]
        groups = _questions(requests)
        keys = request_keys([arguments[index] for index in group] for group in groups)
        questions = []
        for group, (_, occurrence) in zip(groups, keys, strict=True):
            examples = [
                self.encoder.pair(arguments[index][0], arguments[index][1], _where(requests[index]))
                for index in group
            ]
            sizes = [len(arguments[index][1].strip()) for index in group]
            seed = request_seed(self.seed, arguments[group[0]][0], occurrence)
            questions.append(Question(examples, sizes, seed))
        found = self._run("loglikelihood", keys, questions, self._score, disable_tqdm)
        answers: dict[int, tuple[float, bool]] = {}
        for group, question, result in zip(groups, questions, found, strict=True):
            for index, bound, greedy in zip(group, result["bounds"], result["greedy"], strict=True):
                answers[index] = (-bound["nats"], greedy)
                open_ = {"open": result["open"]} if len(group) > 1 else {}
                self._keep(requests[index], {"seed": question.seed, **bound, **open_}, answers[index])
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Bound log p(text) from below, in nats; a long text in windows, see `PromptEncoder.windows`."""
        texts = [cast(Any, request.args)[0] for request in requests]
        keys, documents = request_keys(texts), []
        for text, (_, occurrence) in zip(texts, keys, strict=True):
            windows = enumerate(self.encoder.windows(text, self.max_length))
            seed = request_seed(self.seed, text, occurrence)
            documents.append(
                [Question([one], [len(text)], request_seed(seed, text, number)) for number, one in windows]
            )
        found = self._run("loglikelihood_rolling", keys, documents, self._score_texts, disable_tqdm)
        for request, result in zip(requests, found, strict=True):
            self._keep(request, result, -result["nats"])
        return [-result["nats"] for result in found]

    # From requests to results, some at a time.

    def _generate(self, asked: list[Asked]) -> Iterator[tuple[int, dict[str, Any]]]:
        written = [index for index, one in enumerate(asked) if one.decoding.suffix is None]
        each = [
            {**one.decoding.settings, "stop": one.decoding.stop, "seed": one.seed}
            for one in (asked[index] for index in written)
        ]
        examples = [asked[index].example for index in written]
        for number, done in completions(
            self.model, self.tokenizer, examples, each=each, batch_size=self.batch_size
        ):
            details = {"tokens": len(done.ids), "forward_passes": done.num_forwards}
            yield written[number], {"text": done.text, "details": details}
        for index, one in enumerate(asked):
            if one.decoding.suffix is not None:
                yield index, self._infill(one)

    def _infill(self, one: Asked) -> dict[str, Any]:
        low, _, high = one.decoding.gap.partition("-")
        parts = [one.context, Gap(int(low), int(high or low)), one.decoding.suffix or ""]
        settings = {name: value for name, value in one.decoding.settings.items() if name not in NOT_OF_GAPS}
        done = infill_text(
            self.model,
            self.tokenizer,
            [part for part in parts if part],
            batch_size=self.batch_size,
            seed=one.seed,
            **settings,
        )
        text = done.parts[bool(one.context)]
        details = {"tokens": done.tried[0][0][0], "forward_passes": done.num_forwards}
        return {"text": StopStrings(self.tokenizer, one.decoding.stop).cut(text), "details": details}

    def _score(self, questions: list[Question]) -> Iterator[tuple[int, dict[str, Any]]]:
        sizes = {"draws": self.draws, "max_draws": self.max_draws}
        scored = score_questions(self.model, questions, batch_size=self.batch_size, **sizes)
        examples = [example for question in questions for example in question.examples]
        greedy = iter(greedy_matches(self.model, self.tokenizer, examples, self.batch_size))
        for index, one in enumerate(scored):
            bounds, written = [self._figures(asdict(bound)) for bound in one.bounds], []
            for bound in bounds:
                is_greedy, forward_passes = next(greedy)
                bound["forward_passes"] += forward_passes
                written.append(is_greedy)
            yield index, {"bounds": bounds, "greedy": written, "open": one.open}

    def _score_texts(self, documents: list[list[Question]]) -> Iterator[tuple[int, dict[str, Any]]]:
        windows = iter(
            score_questions(
                self.model,
                [window for windows in documents for window in windows],
                draws=self.draws,
                max_draws=self.draws,
                batch_size=self.batch_size,
            )
        )
        for index, document in enumerate(documents):
            parts = [asdict(next(windows).bounds[0]) for _ in document]
            whole = {name: sum(part[name] for part in parts) for name in ("nats", "tokens", "forward_passes")}
            error = sum(part["stderr"] ** 2 for part in parts) ** 0.5
            yield index, self._figures({**whole, "stderr": error, "draws": self.draws})

    # Keeping results.

    def _figures(self, bound: dict[str, Any]) -> dict[str, Any]:
        return {name: round(x, self.digits) if isinstance(x, float) else x for name, x in bound.items()}

    @property
    def digits(self) -> int:
        """Decimals of nats that are returned: fewer than float32 has, so that a batch of another size, which
        changes the last bits, does not change them."""
        return 9 if self.model.dtype == torch.float64 else 3

    def _keep(self, request: Instance, details: dict[str, Any], answer: Any) -> None:
        self.details[request.task_name, request.doc_id].append({"request": request.idx, **details})
        self.cache_hook.add_partial(request.request_type, request.args, answer)

    def _run(
        self,
        kind: str,
        keys: Sequence[tuple[str, int]],
        items: list[Any],
        compute: Any,
        quiet: bool,
    ) -> list[dict[str, Any]]:
        names = [json.dumps([kind, *key], ensure_ascii=False) for key in keys]
        at_once = 4 * self.batch_size
        if quiet:
            return self.journal.results(names, items, compute, at_once)
        what, share = DOING[kind], len(items) / rank_and_size()[1]
        with Bar(what, share, "requests") as advance:
            return self.journal.results(names, items, compute, at_once, advance)


def _where(request: Instance) -> str:
    return "a request" if request.doc_id is None else f"{request.task_name} document {request.doc_id}"


def _questions(requests: Sequence[Instance]) -> list[list[int]]:
    """Indices of the requests of each question: the continuations of one context of a document, or where no
    context occurs twice, the contexts of one continuation. Repeats of a request are questions of their own."""
    repeats: Counter[Any] = Counter()
    contexts = Counter((request.task_name, request.doc_id, request.args[0]) for request in requests)
    questions: dict[Any, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        if request.doc_id is None:
            questions[index] = [index]
            continue
        document, context = (request.task_name, request.doc_id), request.args[0]
        shared = contexts[(*document, context)] > (request.repeats or 1)
        questions[(*document, context if shared else None, repeats[(*document, request.idx)])].append(index)
        repeats[(*document, request.idx)] += 1
    return list(questions.values())


def _whole(name: str, value: int | str, least: int) -> int:
    """A whole number that may come as text, from `--model_args`."""
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least or isinstance(value, float):
        allowed = " or 'task'" if name == "canvas" else ""
        raise UnmaskError(f"{name} must be a number of at least {least}{allowed}; got {value!r}.")
    return number


register_model("unmask")(UnmaskLM)

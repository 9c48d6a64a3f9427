"""Settings of `generate`, saved with the model as `generation_config.json`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

from transformers import GenerationConfig

from unmask.errors import UnmaskError
from unmask.generation.policy import ADAPTIVE, POLICIES, RANKED, REMASK, Policy, Ranked, Remask, ancestral

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Settings that only some policies take: name -> policies, default.
_OF_POLICY: dict[str, tuple[tuple[str, ...], float]] = {
    "alg_temp": (("maskgit_plus", "topk_margin", "entropy"), 0.0),
    "threshold": (("threshold",), 0.9),
    "factor": (("factor",), 1.0),
    "entropy_bound": (("entropy_bound",), 0.1),
    "eta": (tuple(REMASK), 0.1),
}
# Settings of transformers that have another name here.
_ELSEWHERE = {
    "max_length": "set max_new_tokens, the length of the canvas",
    "num_return_sequences": "repeat the prompt with a seed for each row, or use the command's --samples",
    "stop_strings": "use the command's --stop, or stopping_criteria",
    "do_sample": "set temperature above 0",
}


class DiffusionGenerationConfig(GenerationConfig):
    """Settings of masked-diffusion generation.

    Raises:
        UnmaskError: an unknown setting, one out of range, or one that has no effect with the others.
    """

    max_new_tokens: int = 128  # length of the canvas, in tokens
    min_new_tokens: int = 0  # no end token among the first so many tokens of a response
    # Denoising steps at most, over which the tokens are spread evenly; divided over the blocks in proportion
    # to their tokens, at least one each. None = one token per step, or as many as an adaptive policy commits.
    steps: int | None = None
    # Blocks of so many tokens are completed one after another (semi-autoregressive). None = the block length
    # of a block-causal model, and the whole canvas of a bidirectional one.
    block_length: int | None = None
    # "fixed" = a bidirectional model sees all masks of the canvas from the start; "growing" = those up to the
    # end of the current block, so that the canvas grows until an end token is written.
    canvas: str = "fixed"
    # Which positions to commit: a name of `unmask.generation.policy.POLICIES`, or a function from a
    # `Proposal` to positions; None = what `threshold`, `factor`, `entropy_bound` or `eta` imply, or
    # "maskgit_plus".
    policy: str | Callable[..., Any] | None = None
    alg_temp: float | None = None  # temperature of the order, for maskgit_plus, topk_margin, entropy
    threshold: float | None = None  # probability in (0, 1]
    factor: float | None = None
    entropy_bound: float | None = None  # nats
    eta: float | None = None  # strength of remasking, in (0, 1]
    temperature: float = 0.0  # 0 = the most likely token; 1 = the model's own distribution
    top_k: int | None = None  # sample among the k most likely tokens
    top_p: float | None = None  # sample among the fewest tokens whose probabilities reach p
    # Classifier-free guidance w: logits are u + (1 + w)(c - u), u those with the prompt masked (LLaDA,
    # arXiv:2502.09992, app. A.2). Doubles the forward passes; 0 = none.
    guidance_scale: float = 0.0
    seed: int | list[int] = 0  # one number, or one for each row; a row draws as if it were alone
    use_cache: bool = True  # a block-causal model keeps keys and values of completed blocks, which is exact
    # For bidirectional models: "prefix" computes the positions from the current block on, with keys and
    # values of the others from the start of the block; "dual" the current block alone (Fast-dLLM,
    # arXiv:2505.22618). Changes answers.
    approximate_cache: str | None = None
    refresh_interval: int | None = None  # steps after which that cache is recomputed; None = once per block
    check_cache: bool = False  # also run every forward pass exactly and report `disagreement`
    return_trace: bool = False  # also return commit steps, confidence, entropy and the canvas after each step
    return_dict_in_generate: bool = True  # a `DiffusionGenerationOutput`; False = the ids alone
    mask_token_id: int | None = None  # None = that of the model's config
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None  # one id or several that end a response
    pad_token_id: int | None = None  # fills the canvas after the end; None = the first end token
    suppress_tokens: list[int] | None = None  # never generated, like the mask token

    def __init__(self, **kwargs: Any):
        # Not the parent's: most of its settings have no effect here, and would be accepted in silence.
        for name in SETTINGS:
            setattr(self, name, kwargs.pop(name, getattr(type(self), name)))
        kwargs.pop("do_sample", None)  # written for stock readers alone, see to_diff_dict
        for name in ("_commit_hash", "_from_model_config", "transformers_version"):
            setattr(self, name, kwargs.pop(name, None))
        _refuse_unknown(kwargs)
        self.validate()

    def set(self, **settings: Any) -> None:
        """Change settings and check the result."""
        _refuse_unknown(name for name in settings if name not in SETTINGS)
        vars(self).update(settings)
        self.validate()

    def validate(self, **_: Any) -> None:
        """Check every setting against its range, and those that depend on one another."""
        longest = self.max_new_tokens
        self._check("max_new_tokens", "a positive integer", lambda x: _is_integer(x) and x >= 1)
        for name, low in (("min_new_tokens", 0), ("steps", 1)):
            wanted = f"an integer from {low} to max_new_tokens = {longest}"
            self._check(name, wanted, lambda x, low=low: _is_integer(x) and low <= x <= longest)
        for name in ("block_length", "top_k", "refresh_interval"):
            self._check(name, "a positive integer", lambda x: _is_integer(x) and x >= 1)
        for name in ("temperature", "guidance_scale", "alg_temp", "entropy_bound"):
            self._check(name, "a number, 0 or more", lambda x: _is_number(x) and 0 <= x < math.inf)
        for name in ("top_p", "threshold", "eta"):
            self._check(name, "a number above 0, at most 1", lambda x: _is_number(x) and 0 < x <= 1)
        self._check("factor", "a number above 0", lambda x: _is_number(x) and 0 < x < math.inf)
        self._check("canvas", "fixed or growing", lambda x: x in ("fixed", "growing"))
        self._check("approximate_cache", "prefix or dual", lambda x: x in ("prefix", "dual"))
        self._check("check_cache", "True or False", lambda x: isinstance(x, bool))
        seeds = self.seed if isinstance(self.seed, Sequence) else [self.seed]
        if not all(_is_integer(seed) and -(2**63) <= seed < 2**63 for seed in seeds):
            raise UnmaskError(f"seed must be an integer of at most 64 bits; got {self.seed}.")
        wanted = "the name of a policy or a function"
        self._check("policy", wanted, lambda x: isinstance(x, str) or callable(x))
        if isinstance(self.policy, str) and self.policy not in POLICIES:
            near = difflib.get_close_matches(self.policy, POLICIES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(POLICIES)}."
            raise UnmaskError(f"unknown policy {self.policy!r}; {hint}")
        for name, (policies, _default) in _OF_POLICY.items():
            if getattr(self, name) is not None and self.policy_name not in policies:
                raise UnmaskError(
                    f"{name} has no effect with policy {self.policy_name!r}; remove one of them."
                )
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise UnmaskError(f"{name} has no effect at temperature 0; set a temperature above 0.")
        for name in ("refresh_interval", "check_cache"):
            if getattr(self, name) and self.approximate_cache is None:
                raise UnmaskError(f"{name} has no effect without approximate_cache; set it or remove {name}.")

    def _check(self, name: str, expected: str, is_right: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not (value is None and getattr(type(self), name) is None) and not is_right(value):
            raise UnmaskError(f"{name} must be {expected}; got {value!r}.")

    @property
    def policy_name(self) -> str:
        """The policy's name: the one set, or the one that the other settings imply."""
        if self.policy is not None:
            return self.policy if isinstance(self.policy, str) else "a function"
        implied = [name for name in ADAPTIVE if getattr(self, name) is not None]
        return implied[0] if implied else "remdm_cap" if self.eta is not None else "maskgit_plus"

    @property
    def is_random(self) -> bool:
        """Whether another seed may give another answer."""
        random = callable(self.policy) or self.policy_name in ("random", "origin", *REMASK)
        return random or self.temperature > 0 or bool(self.alg_temp)

    def make_policy(self) -> Policy:
        """Make the policy's function."""
        if callable(self.policy):
            return self.policy
        name = self.policy_name

        def value(setting: str) -> float:
            return _OF_POLICY[setting][1] if getattr(self, setting) is None else getattr(self, setting)

        if name in RANKED:
            return Ranked(RANKED[name], value("alg_temp"))
        if name in ADAPTIVE:
            return ADAPTIVE[name](value(name))
        return ancestral if name == "origin" else Remask(REMASK[name], value("eta"))

    @property
    def eos_token_ids(self) -> list[int]:
        """The end tokens as a list, empty when there is none."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    def to_diff_dict(self) -> dict[str, Any]:
        """List what differs from the defaults: what is written to `generation_config.json`."""
        defaults, values = type(self)().to_dict(), self.to_dict()
        changed = {name: value for name, value in values.items() if value != defaults.get(name)}
        if callable(changed.get("policy")):
            raise UnmaskError("policy: a function cannot be saved; give the name of a policy.")
        if self.temperature > 0:
            changed["do_sample"] = True  # or transformers warns that the temperature has no effect
        return {**changed, "transformers_version": values["transformers_version"]}

    @classmethod
    def from_generic(cls, config: GenerationConfig) -> DiffusionGenerationConfig:
        """Read a stock config; from one of an autoregressive model only the special tokens are taken."""
        if isinstance(config, cls):
            return config
        values = config.to_dict()
        names = TOKEN_IDS if values.get("mask_token_id") is None else SETTINGS
        return cls(**{name: values[name] for name in names if values.get(name) is not None})

    @classmethod
    def from_model_config(cls, model_config: Any) -> DiffusionGenerationConfig:
        """Take the special tokens from a model's config."""
        return cls(**{name: getattr(model_config, name, None) for name in (*TOKEN_IDS, "mask_token_id")})


SETTINGS = tuple(DiffusionGenerationConfig.__annotations__)


def _refuse_unknown(names: Iterable[str]) -> None:
    for name in names:
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        hint = f"; {_ELSEWHERE[name]}." if name in _ELSEWHERE else hint
        raise UnmaskError(f"unknown generation setting {name!r}{hint}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

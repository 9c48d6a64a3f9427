"""What `generate` can be told, saved with the model as `generation_config.json`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

from transformers import GenerationConfig

from unmask.errors import UnmaskError
from unmask.generation.policy import (
    ADAPTIVE,
    POLICIES,
    RANKED,
    REMASK,
    Draft,
    Move,
    Policy,
    Ranked,
    Remask,
    ancestral,
)

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CANVASES = ("fixed", "growing")
_CACHES = ("prefix", "dual")
# Settings that one policy, or one kind of them, takes: name -> policies, default.
_OF_POLICY: dict[str, tuple[tuple[str, ...], float]] = {
    "alg_temp": (("maskgit_plus", "topk_margin", "entropy"), 0.0),
    "threshold": (("threshold",), 0.9),
    "factor": (("factor",), 1.0),
    "entropy_bound": (("entropy_bound",), 0.1),
    "eta": (tuple(REMASK), 0.1),
}
# What users of transformers look for, and where it is here.
_ELSEWHERE = {
    "max_length": "set max_new_tokens, the length of the canvas",
    "num_return_sequences": "repeat the prompt with a seed for each row, or use the command's --samples",
    "stop_strings": "use the command's --stop, or stopping_criteria",
    "do_sample": "set temperature above 0",
}


class DiffusionGenerationConfig(GenerationConfig):
    """Settings of masked-diffusion generation.

    Args:
        max_new_tokens: length of the canvas, in tokens.
        min_new_tokens: no end token among the first so many tokens of a response.
        steps: forwards spent on the canvas at most; None lets every forward commit one token, or as many as
            an adaptive policy dares. Tokens are spread evenly over the steps. With blocks the steps are
            shared out over them in proportion to their tokens, at least one each.
        block_length: tokens of a block; blocks are finished one after another (semi-autoregressive). None =
            that of a block-causal model, and the whole canvas of a bidirectional one.
        canvas: "fixed" = a bidirectional model sees all masks of the canvas from the start; "growing" = those
            up to the end of the current block, so that the canvas grows until an end token stands in it.
        policy: which positions to commit, see `unmask.generation.policy`: the ranked "maskgit_plus" (the most
            confident first; the default), "topk_margin", "entropy", "left_to_right", "random"; "origin", the
            ancestral sampler; the adaptive "threshold", "factor" and "entropy_bound"; "remdm_cap",
            "remdm_rescale" and "remdm_confidence", which mask tokens again; or a function from a `Draft` to
            positions. None = what the settings below imply.
        alg_temp: temperature of the order of policies "maskgit_plus", "topk_margin" and "entropy"; 0 is
            strict.
        threshold: of policy "threshold": commit what is at least so probable, in (0, 1].
        factor: of policy "factor".
        entropy_bound: of policy "entropy_bound", in nats.
        eta: strength of remasking, in (0, 1].
        temperature: 0 commits the most likely token; 1 samples from the model's own distribution.
        top_k: sample among the k most likely tokens; at a temperature above 0 alone.
        top_p: sample among the fewest tokens of so much probability; at a temperature above 0 alone.
        guidance_scale: classifier-free guidance w: logits are u + (1 + w)(c - u), where u has the
            prompt masked (LLaDA, arXiv:2502.09992, app. A.2); doubles the forwards; 0 = none.
        seed: makes sampling reproducible; one number, or one for each row. A row draws as if it were alone.
        use_cache: whether a block-causal model keeps the keys and values of finished blocks, which is exact.
        approximate_cache: for bidirectional models, whose earlier tokens see later ones: "prefix" computes
            the positions from the current block on, against keys and values of the others from when the
            block began; "dual" the current block alone (Fast-dLLM, arXiv:2505.22618). Changes answers.
        refresh_interval: steps after which the approximate cache is computed anew within a block; None = once
            a block.
        check_cache: also run every forward exactly and report in `disagreement` how often the approximate one
            would have written another token.
        return_trace: also return for every token the step that committed it, its confidence and entropy, and
            the canvas after each step.
        return_dict_in_generate: return a `DiffusionGenerationOutput`, not the ids alone.
        mask_token_id: the mask token; that of the model's config by default.
        eos_token_id: one id or several that end a response.
        pad_token_id: what stands after the end of a response; the first end token by default.
        suppress_tokens: ids never generated, beside the mask token: padding, and ids without a token.

    Raises:
        UnmaskError: an unknown setting, one out of its range, or one that has no effect beside the others.
    """

    def __init__(self, **kwargs: Any):
        # The parent's __init__ is not called: most of its settings mean nothing here, and one that is
        # accepted and ignored would mislead.
        self.max_new_tokens: int = kwargs.pop("max_new_tokens", 128)
        self.min_new_tokens: int = kwargs.pop("min_new_tokens", 0)
        self.steps: int | None = kwargs.pop("steps", None)
        self.block_length: int | None = kwargs.pop("block_length", None)
        self.canvas: str = kwargs.pop("canvas", "fixed")
        self.policy: str | Callable[[Draft], Any] | None = kwargs.pop("policy", None)
        self.alg_temp: float | None = kwargs.pop("alg_temp", None)
        self.threshold: float | None = kwargs.pop("threshold", None)
        self.factor: float | None = kwargs.pop("factor", None)
        self.entropy_bound: float | None = kwargs.pop("entropy_bound", None)
        self.eta: float | None = kwargs.pop("eta", None)
        self.temperature: float = kwargs.pop("temperature", 0.0)
        self.top_k: int | None = kwargs.pop("top_k", None)
        self.top_p: float | None = kwargs.pop("top_p", None)
        self.guidance_scale: float = kwargs.pop("guidance_scale", 0.0)
        self.seed: int | list[int] = kwargs.pop("seed", 0)
        self.use_cache: bool = kwargs.pop("use_cache", True)
        self.approximate_cache: str | None = kwargs.pop("approximate_cache", None)
        self.refresh_interval: int | None = kwargs.pop("refresh_interval", None)
        self.check_cache: bool = kwargs.pop("check_cache", False)
        self.return_trace: bool = kwargs.pop("return_trace", False)
        self.return_dict_in_generate: bool = kwargs.pop("return_dict_in_generate", True)
        self.mask_token_id: int | None = kwargs.pop("mask_token_id", None)
        self.bos_token_id: int | None = kwargs.pop("bos_token_id", None)
        self.eos_token_id: int | list[int] | None = kwargs.pop("eos_token_id", None)
        self.pad_token_id: int | None = kwargs.pop("pad_token_id", None)
        self.suppress_tokens: list[int] | None = kwargs.pop("suppress_tokens", None)
        kwargs.pop("do_sample", None)  # written for stock readers alone, see to_diff_dict
        for name in ("_commit_hash", "_from_model_config", "transformers_version"):
            setattr(self, name, kwargs.pop(name, None))
        self._refuse_unknown(kwargs)
        self.validate()

    def set(self, **settings: Any) -> None:
        """Change settings and check the result."""
        self._refuse_unknown(name for name in settings if name not in vars(self))
        vars(self).update(settings)
        self.validate()

    def validate(self, **_: Any) -> None:
        """Check every setting against its range, and those that need one another."""
        if not _is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise UnmaskError(f"max_new_tokens must be a positive integer; got {self.max_new_tokens}.")
        if not _is_integer(self.min_new_tokens) or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UnmaskError(
                f"min_new_tokens must be an integer from 0 to max_new_tokens = {self.max_new_tokens};"
                f" got {self.min_new_tokens}."
            )
        if self.steps is not None and not (
            _is_integer(self.steps) and 1 <= self.steps <= self.max_new_tokens
        ):
            raise UnmaskError(
                f"steps must be an integer from 1 to max_new_tokens = {self.max_new_tokens};"
                f" got {self.steps}."
            )
        for name in ("block_length", "top_k", "refresh_interval"):
            value = getattr(self, name)
            if value is not None and (not _is_integer(value) or value < 1):
                raise UnmaskError(f"{name} must be a positive integer; got {value}.")
        if self.canvas not in _CANVASES:
            raise UnmaskError(f"canvas must be {' or '.join(_CANVASES)}; got {self.canvas!r}.")
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise UnmaskError(f"temperature must be a number, 0 or more; got {self.temperature}.")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UnmaskError(f"top_p must be a number above 0, at most 1; got {self.top_p}.")
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise UnmaskError(f"{name} has no effect at temperature 0; set a temperature above 0.")
        if not (_is_number(self.guidance_scale) and 0 <= self.guidance_scale < math.inf):
            raise UnmaskError(f"guidance_scale must be a number, 0 or more; got {self.guidance_scale}.")
        for seed in self.seed if isinstance(self.seed, Sequence) else [self.seed]:
            if not _is_integer(seed) or not -(2**63) <= seed < 2**63:
                raise UnmaskError(f"seed must be an integer of at most 64 bits; got {seed}.")
        self._validate_policy()
        self._validate_cache()

    def _validate_policy(self) -> None:
        if not (self.policy is None or isinstance(self.policy, str) or callable(self.policy)):
            raise UnmaskError(f"policy must be the name of a policy or a function; got {self.policy!r}.")
        name = self.policy_name
        if isinstance(self.policy, str) and name not in POLICIES:
            near = difflib.get_close_matches(name, POLICIES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(POLICIES)}."
            raise UnmaskError(f"unknown policy {name!r}; {hint}")
        for setting, (policies, _) in _OF_POLICY.items():
            value = getattr(self, setting)
            if value is None:
                continue
            if name not in policies:
                raise UnmaskError(f"{setting} has no effect with policy {name!r}; remove one of them.")
            unit = setting in ("threshold", "eta")
            zero = setting in ("alg_temp", "entropy_bound")
            if not (
                _is_number(value)
                and (value >= 0 if zero else value > 0)
                and value < math.inf
                and (value <= 1 or not unit)
            ):
                wanted = "above 0, at most 1" if unit else "0 or more" if zero else "above 0"
                raise UnmaskError(f"{setting} must be a number {wanted}; got {value}.")

    def _validate_cache(self) -> None:
        if self.approximate_cache is not None and self.approximate_cache not in _CACHES:
            raise UnmaskError(
                f"approximate_cache must be {' or '.join(_CACHES)}; got {self.approximate_cache!r}."
            )
        if not isinstance(self.check_cache, bool):
            raise UnmaskError(f"check_cache must be True or False; got {self.check_cache!r}.")
        for name in ("refresh_interval", "check_cache"):
            if getattr(self, name) and self.approximate_cache is None:
                raise UnmaskError(f"{name} has no effect without approximate_cache; set it or remove {name}.")

    @property
    def policy_name(self) -> str:
        """The policy's name: the one given, or the one that the settings imply."""
        if self.policy is not None:
            return self.policy if isinstance(self.policy, str) else "a function"
        for name in ADAPTIVE:
            if getattr(self, name) is not None:
                return name
        return "remdm_cap" if self.eta is not None else "maskgit_plus"

    @property
    def is_random(self) -> bool:
        """Whether another seed may give another answer."""
        random = callable(self.policy) or self.policy_name in ("random", "origin", *REMASK)
        return random or self.temperature > 0 or bool(self.alg_temp)

    def make_policy(self) -> Policy | Callable[[Draft], Move]:
        """Make the policy's function."""
        if callable(self.policy):
            return self.policy
        name = self.policy_name

        def of(setting: str) -> float:
            value = getattr(self, setting)
            return _OF_POLICY[setting][1] if value is None else value

        if name in RANKED:
            return Ranked(RANKED[name], of("alg_temp"))
        if name in ADAPTIVE:
            return ADAPTIVE[name](of(name))
        return ancestral if name == "origin" else Remask(REMASK[name], of("eta"))

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        for name in names:
            if name in _ELSEWHERE:
                raise UnmaskError(f"unknown generation setting {name!r}; {_ELSEWHERE[name]}.")
            near = difflib.get_close_matches(name, [known for known in vars(self) if known[0] != "_"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UnmaskError(f"unknown generation setting {name!r}{hint}")

    def to_diff_dict(self) -> dict[str, Any]:
        """List what differs from the defaults: what is written to `generation_config.json`."""
        defaults = type(self)().to_dict()
        values = self.to_dict()
        changed = {name: value for name, value in values.items() if value != defaults.get(name)}
        if callable(changed.get("policy")):
            raise UnmaskError("policy: a function cannot be saved; give the name of a policy.")
        if self.temperature > 0:
            changed["do_sample"] = True  # or transformers warns that the temperature has no effect
        return {**changed, "transformers_version": values["transformers_version"]}

    @property
    def eos_token_ids(self) -> list[int]:
        """The end tokens as a list, empty when there is none."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    @classmethod
    def from_generic(cls, config: GenerationConfig) -> DiffusionGenerationConfig:
        """Read a stock config; of one made for an autoregressive model only the special tokens hold."""
        if isinstance(config, cls):
            return config
        values = config.to_dict()
        if values.get("mask_token_id") is None:
            return cls(**{name: values.get(name) for name in _TOKEN_IDS})
        known = vars(cls())
        return cls(**{name: values[name] for name in known if values.get(name) is not None})

    @classmethod
    def from_model_config(cls, model_config: Any) -> DiffusionGenerationConfig:
        """Take the special tokens from a model's config."""
        names = (*_TOKEN_IDS, "mask_token_id")
        return cls(**{name: getattr(model_config, name, None) for name in names})


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""Settings of `generate`, saved with the model as `generation_config.json`."""

import copy
import difflib
from functools import partial
from typing import Annotated, Any, Literal, Self, cast

from pydantic import ConfigDict, Field, ValidationError, create_model
from transformers import GenerationConfig

from unmask.errors import UnmaskError
from unmask.formats import TOKEN_IDS
from unmask.generation.policy import (
    ADAPTIVE,
    FIGURES,
    POLICIES,
    RANKED,
    REMASK,
    Policy,
    ancestral,
    ranked,
    remask,
)

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Guidance = Annotated[float, Field(ge=0, le=1000)]  # more would overflow the logits, and nobody uses it
Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]

_METADATA = ("_commit_hash", "_from_model_config", "transformers_version")
# Settings that only some policies take: name -> policies, default.
_OF_POLICY: dict[str, tuple[tuple[str, ...], float]] = {
    "alg_temp": (("maskgit_plus", "topk_margin", "entropy"), 0.0),
    "threshold": (("threshold",), 0.9),
    "factor": (("factor",), 1.0),
    "entropy_bound": (("entropy_bound",), 0.1),
    "eta": (REMASK, 0.1),
}
# Settings of transformers that have another name here.
_ELSEWHERE = {
    "max_length": "set max_new_tokens, the length of the canvas",
    "num_return_sequences": "repeat the prompt with a seed for each row, or use the command's --samples",
    "stop_strings": "pass stopping_criteria, or use the command's --stop",
    "num_beams": "a canvas is not searched by beams",
    "repetition_penalty": "pass a logits_processor, such as transformers' RepetitionPenaltyLogitsProcessor",
}
# Published settings, by model (docs/checkpoints.md).
PRESETS: dict[str, dict[str, Any]] = {
    "coda": {"max_new_tokens": 768, "policy": "entropy", "temperature": 0.1, "top_p": 0.9},
    "dream": {"max_new_tokens": 256, "policy": "entropy", "temperature": 0.1, "top_p": 0.9},
    "llada": {"max_new_tokens": 512, "defer_end": True},
    "llada-blocks": {"max_new_tokens": 256, "block_length": 8, "defer_end": True},
    "llada-1.5": {"max_new_tokens": 256, "block_length": 16},
    "sdar": {},
    "sdar-dynamic": {"threshold": 0.85},
    "fast-dllm-v2": {"threshold": 0.9, "sub_block_length": 8, "first_token_alone": True},
    "a2d": {"max_new_tokens": 256},
}
_ORDERED = ("left_to_right", "random")  # policies that do not ask for the model's confidence
# What a preset leaves as it is: the tokens of the model, and how results are returned.
_NOT_OF_PRESETS = ("seed", "use_cache", "return_trace", "return_dict_in_generate")
# What a stock config may say without an effect here: it says that something is not to be done.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


class DiffusionGenerationConfig(GenerationConfig):
    """Settings of masked-diffusion generation.

    Raises:
        UnmaskError: an unknown setting, one out of range, or one that has no effect with the others.
    """

    max_new_tokens: Positive = 128
    """Length of the canvas, in tokens."""
    min_new_tokens: Count = 0
    """No end token among the first so many tokens of a response."""
    steps: Positive | None = None
    """Denoising steps at most, over which the tokens are spread evenly; divided over the blocks in proportion
    to their tokens, at least one each. None = one token per step, or as many as an adaptive policy
    commits."""
    block_length: Positive | None = None
    """Blocks of so many tokens are completed one after another (semi-autoregressive). None = the block length
    of a block-causal model, and the whole canvas of a bidirectional one."""
    canvas: Literal["fixed", "growing"] = "fixed"
    """"fixed" = a bidirectional model sees all masks of the canvas from the start; "growing" = those up to
    the end of the current block, so that the canvas grows until an end token is written."""
    sub_block_length: Positive | None = None
    """Within a block, so many positions are completed one group after another, left to right (Fast-dLLM v2);
    each group takes a step at least, also beyond `steps`."""
    first_token_alone: bool = False
    """The first token of a block is committed alone before the others; not in a block that a prompt
    begins."""
    defer_end: bool = False
    """End tokens are committed last in their block, whatever their confidence (LLaDA)."""
    policy: Any = None
    """Which positions to commit: a name of `unmask.generation.policy.POLICIES`, or a function, see `Policy`
    there; None = what `threshold`, `factor`, `entropy_bound` or `eta` imply, or "maskgit_plus"."""
    alg_temp: Amount | None = None
    """Temperature of the order, for maskgit_plus, topk_margin, entropy."""
    threshold: Share | None = None
    """Probability from which a token is committed (policy "threshold")."""
    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Bound of the policy "factor"."""
    entropy_bound: Amount | None = None
    """Bound on the summed entropies of a step, in nats (policy "entropy_bound")."""
    eta: Share | None = None
    """Strength of remasking (policies "remdm_...")."""
    temperature: Amount = 0.0
    """0 = the most likely token; 1 = the model's own distribution."""
    top_k: Positive | None = None
    """Sample among the k most likely tokens."""
    top_p: Share | None = None
    """Sample among the fewest tokens whose probabilities reach p."""
    guidance_scale: Guidance = 0.0
    """Classifier-free guidance w: logits are u + (1 + w)(c - u), u those with the prompt masked (LLaDA,
    arXiv:2502.09992, app. A.2). Doubles the forward passes; 0 = none."""
    seed: Seed | list[Seed] = 0
    """One number, or one for each row; a row draws as if it were alone."""
    use_cache: bool = True
    """A block-causal model keeps keys and values of completed blocks, which is exact."""
    approximate_cache: Literal["prefix", "dual"] | None = None
    """For bidirectional models: "prefix" computes the positions from the current block on, with keys and
    values of the others from the start of the block; "dual" the current block alone (Fast-dLLM,
    arXiv:2505.22618). Changes answers."""
    refresh_interval: Positive | None = None
    """Steps until that cache is recomputed; None = once per block."""
    return_trace: bool = False
    """Also return commit steps, confidence, entropy and the canvas after each step."""
    return_dict_in_generate: bool = True
    """True = a `DiffusionGenerationOutput`; False = the ids alone."""
    mask_token_id: Count | None = None
    """None = that of the model's config."""
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    """One id or several that end a response."""
    pad_token_id: int | None = None
    """Fills the canvas after the end; None = the first end token."""
    suppress_tokens: list[int] | None = None
    """Never generated, like the mask token."""
    unused_tokens: list[int] | None = None
    """Ids that have no token: never generated."""

    def __init__(self, **kwargs: Any):
        # Not the parent's: most of its settings have no effect here, and would be accepted in silence.
        for name in SETTINGS:
            setattr(self, name, getattr(type(self), name))
        for name in _METADATA:
            setattr(self, name, kwargs.pop(name, None))
        self.set(**kwargs)

    def set(self, **settings: Any) -> None:
        """Change settings and check the result.

        `preset` sets all settings of decoding to published ones, a name of `PRESETS`; others override it.
        Of transformers' own, `do_sample` sets the temperature: False to 0, True to 1 unless it is above 0.
        """
        settings = {k: v for k, v in settings.items() if k not in _NEUTRAL or v != _NEUTRAL[k]}
        given = dict(settings)
        if (preset := settings.pop("preset", None)) is not None:
            settings = {**_preset(preset), **settings}
        if given.get("temperature") == 0:  # what else was set for sampling goes with it
            settings |= {name: None for name in ("top_k", "top_p") if name not in given}
        if (policy := given.get("policy")) is not None:  # and what was set for another policy
            settings |= {
                name: None for name, (of, _) in _OF_POLICY.items() if name not in given and policy not in of
            }
            if policy not in (*RANKED, *ADAPTIVE) or policy in _ORDERED:
                fixed = {"defer_end": False}
                if policy not in _ORDERED:
                    fixed |= {"sub_block_length": None, "first_token_alone": False}
                settings |= {name: value for name, value in fixed.items() if name not in given}
        sampled = settings.pop("do_sample", None)
        if sampled is False:
            settings |= {"temperature": 0.0, "top_k": None, "top_p": None}
        elif sampled and not settings.get("temperature", self.temperature):
            settings["temperature"] = 1.0
        for name in settings:
            if name not in SETTINGS:
                near = difflib.get_close_matches(name, SETTINGS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "remove it."
                hint = f"{_ELSEWHERE[name]}." if name in _ELSEWHERE else hint
                raise UnmaskError(f"unknown generation setting {name!r}; {hint}")
        vars(self).update(settings)
        self.validate()

    def validate(self, **_: Any) -> None:
        """Check every setting against its range, and those that depend on one another."""
        try:
            _Ranges.model_validate({name: getattr(self, name) for name in SETTINGS})
        except ValidationError as error:
            first = error.errors()[0]
            wanted = first["msg"].replace("Input should", "must")
            raise UnmaskError(f"{first['loc'][0]} {wanted}; got {first['input']!r}.") from error
        for name in ("min_new_tokens", "steps"):
            if (value := getattr(self, name) or 0) > self.max_new_tokens:
                raise UnmaskError(
                    f"{name} must be at most max_new_tokens = {self.max_new_tokens}; got {value}."
                )
        if not callable(self.policy) and self.policy not in (None, *POLICIES):
            near = difflib.get_close_matches(str(self.policy), POLICIES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"a function, or one of {', '.join(POLICIES)}."
            raise UnmaskError(f"unknown policy {self.policy!r}; {hint}")
        for name, (policies, _default) in _OF_POLICY.items():
            if getattr(self, name) is not None and self.policy_name not in policies:
                raise UnmaskError(
                    f"{name} has no effect with policy {self.policy_name!r}; remove one of them."
                )
        for name in ("sub_block_length", "first_token_alone", "defer_end"):
            if getattr(self, name) and self.policy_name in ("origin", *REMASK):
                raise UnmaskError(f"{name} does not go with policy {self.policy_name!r}; remove one of them.")
        if self.defer_end and self.policy_name in _ORDERED:
            raise UnmaskError(
                f"defer_end has no effect with policy {self.policy_name!r}; remove one of them."
            )
        for name, needed, there in (
            ("top_k", "a temperature above 0", self.temperature > 0),
            ("top_p", "a temperature above 0", self.temperature > 0),
            ("refresh_interval", "approximate_cache", self.approximate_cache is not None),
        ):
            if getattr(self, name) and not there:
                raise UnmaskError(f"{name} has no effect without {needed}; set it or remove {name}.")

    @property
    def policy_name(self) -> str:
        """The policy's name: the one set, or the one that the other settings imply."""
        if self.policy is not None:
            return self.policy if isinstance(self.policy, str) else "a function"
        implied = [name for name in (*ADAPTIVE, "eta") if getattr(self, name) is not None]
        return "maskgit_plus" if not implied else "remdm_cap" if implied[0] == "eta" else implied[0]

    @property
    def figures(self) -> frozenset[str]:
        """What the policy and the trace ask of the model besides its tokens."""
        if callable(self.policy):
            return frozenset({"confidence", "margin", "entropy"})
        asked = {FIGURES[self.policy_name]} if self.policy_name in FIGURES else set[str]()
        return frozenset(asked | {"confidence", "entropy"} if self.return_trace else asked)

    @property
    def is_random(self) -> bool:
        """Whether another seed may give another answer."""
        random = callable(self.policy) or self.policy_name in ("random", "origin", *REMASK)
        return random or self.temperature > 0 or bool(self.alg_temp)

    def make_policy(self) -> Policy:
        """Make the policy's function."""
        if callable(self.policy):
            return cast(Policy, self.policy)
        name = self.policy_name
        own = {key: default for key, (policies, default) in _OF_POLICY.items() if name in policies}
        own |= {key: getattr(self, key) for key in own if getattr(self, key) is not None}
        if name in RANKED:
            return partial(ranked, score=RANKED[name], **own)
        if name in ADAPTIVE:
            return partial(ADAPTIVE[name], **own)
        return partial(remask, kind=name, **own) if name in REMASK else ancestral

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
        # Said even where they are the defaults, or transformers' pipeline would take its own.
        said = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        return {**said, **changed, "transformers_version": values["transformers_version"]}

    def updated(self, config: GenerationConfig | None, **settings: Any) -> Self:
        """Return a copy with what a stock config says, or that config if it is of this class, and settings."""
        if isinstance(config, DiffusionGenerationConfig):
            made, said = copy.deepcopy(cast(Self, config)), {}
        else:
            made, said = copy.deepcopy(self), {} if config is None else config.to_diff_dict()
        said = {name: value for name, value in said.items() if name not in _METADATA}
        made.set(**{**said, **settings})
        return made

    @classmethod
    def from_generic(cls, config: GenerationConfig) -> Self:
        """Read a stock config; from one of an autoregressive model only the special tokens are taken."""
        if isinstance(config, cls):
            return config
        values = config.to_dict()
        names = TOKEN_IDS if values.get("mask_token_id") is None else SETTINGS
        return cls(**{name: values[name] for name in names if values.get(name) is not None})

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """Take the special tokens from a model's config."""
        return cls(**{name: getattr(model_config, name, None) for name in (*TOKEN_IDS, "mask_token_id")})


SETTINGS = tuple(DiffusionGenerationConfig.__annotations__)


def _preset(name: str) -> dict[str, Any]:
    """All settings of decoding, as a preset has them."""
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(PRESETS)}."
        raise UnmaskError(f"unknown preset {name!r}; {hint}")
    kept = {*_NOT_OF_PRESETS, *(setting for setting in SETTINGS if setting.endswith(("token_id", "_tokens")))}
    kept -= {"max_new_tokens", "min_new_tokens"}
    defaults = {name: getattr(DiffusionGenerationConfig, name) for name in SETTINGS if name not in kept}
    return {**defaults, **PRESETS[name]}


_FIELDS: Any = {name: (kind, ...) for name, kind in DiffusionGenerationConfig.__annotations__.items()}
_Ranges = create_model("_Ranges", __config__=ConfigDict(strict=True), **_FIELDS)

"""What `generate` can be told, saved with the model as `generation_config.json`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig

from unmask.errors import UnmaskError

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class DiffusionGenerationConfig(GenerationConfig):
    """Settings of masked-diffusion generation.

    Args:
        max_new_tokens: length of the canvas, in tokens.
        steps: forwards spent on the canvas at most; None commits one token a forward. Tokens are spread
            evenly over the steps, so `max_new_tokens / steps` of them are committed at a time. A
            block-causal model fills the canvas block by block (`config.block_length` tokens each): its
            steps are shared out over the blocks, at least one each.
        temperature: 0 commits the most likely token; 1 samples from the model's own distribution.
        seed: makes sampling at a temperature above 0 reproducible; each row of a batch draws as if it
            were alone.
        return_trace: also return for every token the step that committed it and its confidence.
        return_dict_in_generate: return a `DiffusionGenerationOutput`, not the ids alone.
        mask_token_id: the mask token; that of the model's config by default.
        eos_token_id: one id or several that end a response.
        pad_token_id: what stands after the end of a response; the first end token by default.
        suppress_tokens: ids never generated, beside the mask token: padding, and ids without a token.

    Raises:
        UnmaskError: an unknown setting, or one out of its range.
    """

    def __init__(self, **kwargs: Any):
        # The parent's __init__ is not called: most of its settings mean nothing here, and one that is
        # accepted and ignored would mislead.
        self.max_new_tokens: int = kwargs.pop("max_new_tokens", 128)
        self.steps: int | None = kwargs.pop("steps", None)
        self.temperature: float = kwargs.pop("temperature", 0.0)
        self.seed: int = kwargs.pop("seed", 0)
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
        """Check every setting against its range."""
        if not _is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise UnmaskError(f"max_new_tokens must be a positive integer; got {self.max_new_tokens}.")
        if self.steps is not None and not (
            _is_integer(self.steps) and 1 <= self.steps <= self.max_new_tokens
        ):
            raise UnmaskError(
                f"steps must be an integer from 1 to max_new_tokens = {self.max_new_tokens};"
                f" got {self.steps}."
            )
        if not 0 <= self.temperature < math.inf:
            raise UnmaskError(f"temperature must be a number, 0 or more; got {self.temperature}.")
        if not _is_integer(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise UnmaskError(f"seed must be an integer of at most 64 bits; got {self.seed}.")

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        for name in names:
            near = difflib.get_close_matches(name, [known for known in vars(self) if known[0] != "_"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UnmaskError(f"unknown generation setting {name!r}{hint}")

    def to_diff_dict(self) -> dict[str, Any]:
        """List what differs from the defaults: what is written to `generation_config.json`."""
        defaults = type(self)().to_dict()
        values = self.to_dict()
        changed = {name: value for name, value in values.items() if value != defaults.get(name)}
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


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""What an optimizer step minimises (`Objective`), and how that changes over a run (`Curriculum`).

The parts of a curriculum are those of published pipelines: probabilities that rise linearly or by a table of
epochs, block sizes in phases, and a source that becomes context little by little (Chen et al., CoDA,
arXiv:2510.03270); attention that opens from causal to bidirectional (Gong et al., DiffuLLaMA,
arXiv:2410.17891).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from unmask.errors import UnmaskError

Schedule = Literal["linear", "cosine"]
LossPreset = Literal["elbo", "llada", "coda", "diffullama", "uniform", "cart"]
PROBABILITIES = ("prefix_probability", "truncate_probability", "block_masking_probability")


@dataclass(frozen=True)
class Objective:
    """The settings of the forward process and of the loss; the defaults are the plain negative ELBO.

    "Document" is a row of the batch, or each of the documents packed into it.

    Attributes:
        eps: smallest masking rate t that is drawn, in (0, 1).
        schedule: how t follows from a uniform s: "linear", t = s, or "cosine", t = sin(pi s / 2).
        source_share: leading share of a document's source tokens that is context; the rest of them may be
            masked and is learnt. 1 conditions on the whole instruction.
        prefix_probability: S1. Share of the documents in which a random number of the first maskable
            tokens, at least one and not all, becomes context.
        truncate_probability: S2. Share of the documents that are cut after a random number of maskable
            tokens, at least one and not all; what is cut off becomes padding. Never both S1 and S2.
        block_masking_probability: S3. Share of the documents that are masked in cells of several tokens.
        mask_block_sizes: sizes of these cells, in tokens; each such document draws one of them.
        complementary: every sample is denoised twice, the second time with the other tokens masked.
        loss: preset, see `unmask.diffusion.loss.PRESETS`.
        future_share: share of the later tokens that each token attends to: 1 = bidirectional, 0 = causal.

    Raises:
        UnmaskError: a value out of its range, or two that contradict each other.
    """

    eps: float = 1e-3
    schedule: Schedule = "linear"
    source_share: float = 1.0
    prefix_probability: float = 0.0
    truncate_probability: float = 0.0
    block_masking_probability: float = 0.0
    mask_block_sizes: tuple[int, ...] = ()
    complementary: bool = False
    loss: LossPreset = "elbo"
    future_share: float = 1.0

    def __post_init__(self) -> None:
        shares = [field.name for field in fields(self) if field.name.endswith(("_probability", "_share"))]
        sizes, twice = self.mask_block_sizes, self.complementary
        either = self.prefix_probability + self.truncate_probability
        for name, fits, expected in (
            *((name, 0 <= getattr(self, name) <= 1, "in [0, 1]") for name in shares),
            ("eps", 0 < self.eps < 1, "above 0 and below 1: the loss divides by rates t down to it"),
            ("schedule", self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}"),
            ("loss", self.loss in get_args(LossPreset), f"one of {', '.join(get_args(LossPreset))}"),
            ("truncate_probability", either <= 1, "at most 1 - prefix_probability"),
            ("mask_block_sizes", all(size >= 2 for size in sizes), "2 or more"),
            ("mask_block_sizes", sizes or not self.block_masking_probability, "set for block masking"),
            (
                "schedule",
                not twice or self.schedule == "linear",
                "linear for complementary masks of rate 1 - t",
            ),
            ("eps", not twice or self.eps < 0.5, "below 0.5 for complementary masks: t is in [eps, 1 - eps]"),
            (
                "loss",
                not twice or self.loss != "diffullama",
                "another for complementary masks: they cover all",
            ),
        ):
            if not fits:
                raise UnmaskError(f"{name} must be {expected}; got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Curriculum:
    """The objective of every optimizer step, as a pure function of the step: a resumed run needs no state.

    A table has one value an epoch, and its last value stays.

    Attributes:
        objective: what never changes: noise schedule, complementary masks, loss preset. Its other fields are
            replaced by what follows.
        noise_eps: table of `Objective.eps`.
        prefix_probability: table of S1.
        truncate_probability: table of S2.
        block_masking_probability: table of S3.
        mask_block_sizes: phases, each the sizes (tokens) of the cells of S3; they take equal parts of
            `schedule_steps`, and the last one stays.
        schedule_type: "constant", or "linear": the three probabilities rise from 0 at step 0 to their value
            at `schedule_steps`, and stay.
        schedule_steps: length of phases and rise, in optimizer steps.
        source_steps: optimizer steps over which `source_share` grows from 0 to 1; 0 = it is 1 throughout.
        attention_annealing_steps: the same for `future_share`: from causal to bidirectional attention.

    Raises:
        UnmaskError: a value out of its range, in whatever step.

    Examples:
        >>> curriculum = Curriculum(prefix_probability=(0.2,), schedule_type="linear", schedule_steps=10)
        >>> [curriculum.at(step, epoch=0).prefix_probability for step in (0, 5, 10, 99)]
        [0.0, 0.1, 0.2, 0.2]
    """

    objective: Objective = field(default_factory=Objective)
    noise_eps: tuple[float, ...] = (1e-3,)
    prefix_probability: tuple[float, ...] = (0.0,)
    truncate_probability: tuple[float, ...] = (0.0,)
    block_masking_probability: tuple[float, ...] = (0.0,)
    mask_block_sizes: tuple[tuple[int, ...], ...] = ()
    schedule_type: Literal["constant", "linear"] = "constant"
    schedule_steps: int = 1
    source_steps: int = 0
    attention_annealing_steps: int = 0

    def __post_init__(self) -> None:
        # Every objective is checked now: before `schedule_steps` probabilities are only smaller.
        for epoch in range(max(map(len, self.tables.values()))):
            full = self.at(self.schedule_steps, epoch)
            for phase in self.mask_block_sizes:
                replace(full, mask_block_sizes=phase)

    @property
    def tables(self) -> dict[str, tuple[float, ...]]:
        """The settings with one value an epoch."""
        return {name: getattr(self, name) for name in ("noise_eps", *PROBABILITIES)}

    def at(self, step: int, epoch: int) -> Objective:
        """Make the objective of an optimizer step: `step` were done before it, in `epoch`, both from 0."""
        rise = _share(step, self.schedule_steps if self.schedule_type == "linear" else 0)
        values = {name: table[min(epoch, len(table) - 1)] for name, table in self.tables.items()}
        phases = len(self.mask_block_sizes)
        phase = min(step * phases // self.schedule_steps, phases - 1)
        return replace(
            self.objective,
            eps=values["noise_eps"],
            **{name: rise * values[name] for name in PROBABILITIES},
            mask_block_sizes=self.mask_block_sizes[phase] if phases else (),
            source_share=_share(step, self.source_steps),
            future_share=_share(step, self.attention_annealing_steps),
        )

    def state(self, objective: Objective) -> dict[str, float]:
        """Name what one of its objectives has of the things this curriculum sets; {} for the plain bound."""
        changing = {
            **{name: any(getattr(self, name)) for name in PROBABILITIES},
            "source_share": self.source_steps,
            "future_share": self.attention_annealing_steps,
        }
        state = {name: getattr(objective, name) for name, is_set in changing.items() if is_set}
        if len(set(self.noise_eps)) > 1:
            state["noise_eps"] = objective.eps
        if any(self.block_masking_probability):
            state["largest_mask_block"] = float(max(objective.mask_block_sizes))
        return state


def _share(step: int, steps: int) -> float:
    """The share of `steps` that is over; all of none."""
    return min(1.0, step / steps) if steps else 1.0

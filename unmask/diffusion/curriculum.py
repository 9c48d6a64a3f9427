"""The curriculum: the objective of every optimizer step, as a pure function of the step.

Nothing is saved and nothing is counted: a resumed run asks for the steps that are left. The parts are those
of published pipelines: probabilities that rise linearly or by a table of epochs, block sizes in phases, and
a source that becomes context little by little (Chen et al., CoDA, arXiv:2510.03270); attention that opens
from causal to bidirectional (Gong et al., DiffuLLaMA, arXiv:2410.17891).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from unmask.diffusion.objective import Objective
from unmask.errors import UnmaskError


@dataclass(frozen=True)
class Curriculum:
    """What changes over a run; `at` makes an `Objective` of it.

    A table has one value an epoch, and its last value stays.

    Attributes:
        objective: what never changes: noise schedule, complementary masks, loss preset. Its other fields are
            replaced by what follows.
        noise_eps: table of the smallest masking rate drawn, in (0, 1).
        prefix_probability: table of S1, in [0, 1].
        truncate_probability: table of S2, in [0, 1].
        block_masking_probability: table of S3, in [0, 1].
        mask_block_sizes: phases, each the sizes (tokens) of the cells of S3; they take equal parts of
            `schedule_steps`, and the last one stays.
        schedule_type: "constant", or "linear": the three probabilities rise from 0 at step 0 to their value
            at `schedule_steps`, and stay.
        schedule_steps: length of phases and rise, in optimizer steps.
        source_steps: optimizer steps over which the context share of the source grows from 0 to 1; 0 = it is
            1 throughout.
        attention_annealing_steps: optimizer steps over which the visible share of the future grows from 0
            (causal) to 1 (bidirectional); 0 = it is 1 throughout.

    Raises:
        UnmaskError: a value out of its range, an empty table or phase, or phases out of order.

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
        for name in ("noise_eps", *PROBABILITIES):
            if not getattr(self, name):
                raise UnmaskError(f"{name} must have a value for at least one epoch; got none.")
        for name, least in (("schedule_steps", 1), ("source_steps", 0), ("attention_annealing_steps", 0)):
            if getattr(self, name) < least:
                raise UnmaskError(f"{name} must be {least} or more; got {getattr(self, name)}.")
        largest = 0
        for phase in self.mask_block_sizes:
            if not phase or max(phase) < largest:
                raise UnmaskError(
                    "mask_block_sizes must have at least one size in each phase, and the largest of a phase"
                    f" must not be below that of the phase before; got {self.mask_block_sizes}."
                )
            largest = max(phase)
            replace(self.objective, mask_block_sizes=phase)  # checks the sizes
        # Every objective is checked now: before `schedule_steps` probabilities are only smaller.
        for epoch in range(max(map(len, self.tables.values()))):
            self.at(self.schedule_steps, epoch)

    @property
    def tables(self) -> dict[str, tuple[float, ...]]:
        """The settings with one value an epoch."""
        return {name: getattr(self, name) for name in ("noise_eps", *PROBABILITIES)}

    def at(self, step: int, epoch: int) -> Objective:
        """Make the objective of an optimizer step.

        Args:
            step: optimizer steps done before it: the first step is 0.
            epoch: epoch the step lies in, from 0.
        """
        rise = _share(step, self.schedule_steps if self.schedule_type == "linear" else 0)
        phases = len(self.mask_block_sizes)
        phase = min(step * phases // self.schedule_steps, phases - 1)
        return replace(
            self.objective,
            eps=_entry(self.noise_eps, epoch),
            **{name: rise * _entry(getattr(self, name), epoch) for name in PROBABILITIES},
            mask_block_sizes=self.mask_block_sizes[phase] if phases else (),
            source_share=_share(step, self.source_steps),
            future_share=_share(step, self.attention_annealing_steps),
        )

    def state(self, objective: Objective) -> dict[str, float]:
        """Name what one of its objectives has of the things this curriculum sets; {} for the plain bound."""
        names = [name for name in PROBABILITIES if any(getattr(self, name))]
        names += ["source_share"] if self.source_steps else []
        names += ["future_share"] if self.attention_annealing_steps else []
        state = {name: getattr(objective, name) for name in names}
        if len(set(self.noise_eps)) > 1:
            state["noise_eps"] = objective.eps
        if any(self.block_masking_probability):
            state["largest_mask_block"] = float(max(objective.mask_block_sizes))
        return state


PROBABILITIES = ("prefix_probability", "truncate_probability", "block_masking_probability")


def _share(step: int, steps: int) -> float:
    """The share of `steps` that is over; all of none."""
    return min(1.0, step / steps) if steps else 1.0


def _entry(table: tuple[float, ...], epoch: int) -> float:
    return table[min(epoch, len(table) - 1)]

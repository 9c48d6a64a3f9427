"""A moving average of the weights, which is evaluated and left in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from unmask.data.hub import first_line
from unmask.errors import UnmaskError

FILE = "ema.safetensors"  # in a checkpoint: the whole average, whatever the number of processes


class WeightAverage(TrainerCallback):
    """The exponential moving average of the weights that learn.

    It starts as the weights of the first step, and each optimizer step makes it
    `decay * average + (1 - decay) * weights`, in float32 at least. It looks back over about
    `1 / (1 - decay)` steps. Each process averages its own shards.

    Args:
        trainer: whose model is averaged; add the average to its callbacks, and to its `also_saved`.
        decay: share of the average that a step keeps, in (0, 1).
    """

    def __init__(self, trainer: Trainer, decay: float):
        self.trainer = trainer
        self.decay = decay
        self.average: dict[str, Tensor] = {}  # this process's part, by the name of the parameter
        self._learning: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not self.average:  # or a checkpoint has been loaded
            self._start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        update = get_ema_multi_avg_fn(self.decay)
        for average, weights in zip(self.average.values(), self._learning.values(), strict=True):
            # One by one: of all at once the copies in float32 could be as large as the model.
            update([average], [_own(weights).to(average.dtype)], None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the weights, for an evaluation, and take it out again."""
        if not self.average:
            yield
            return
        weights = {name: _own(learning).clone() for name, learning in self._learning.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(weights)

    def settle(self) -> None:
        """Leave the average, of the best step where that is kept, in the place of the weights for good."""
        best = self.trainer.state.best_model_checkpoint if self.trainer.args.load_best_model_at_end else None
        if best is not None:
            self.load(Path(best))
        if self.average:
            self._put(self.average)
            self.average, self._learning = {}, {}

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint; called on every process."""
        whole: dict[str, Tensor] = {}
        for name, average in self.average.items():
            learning = self._learning[name]
            if isinstance(learning, DTensor):
                average = _sharded(average, learning).full_tensor()
            if self.trainer.is_world_process_zero():
                whole[name] = average.cpu()
        if self.trainer.is_world_process_zero():
            save_file(whole, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read the average from a checkpoint; called on every process.

        Raises:
            UnmaskError: the checkpoint has none, or one of other weights.
        """
        self._start()
        file = folder / FILE
        try:
            with safe_open(file, framework="pt") as opened:
                if set(opened.keys()) != set(self.average):
                    raise ValueError("it holds other weights than those that learn")
                for name, average in self.average.items():
                    whole, learning = opened.get_tensor(name), self._learning[name]
                    if isinstance(learning, DTensor):
                        mesh, placements = learning.device_mesh, learning.placements
                        whole = whole.to(average.device)
                        whole = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
                    average.copy_(whole)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise UnmaskError(
                f"ema.decay: the average cannot be read from {file}: {first_line(error)}; go on without"
                " ema.decay, or from a checkpoint of a run that had it."
            ) from error

    def _start(self) -> None:
        self._reshard()
        parameters = cast(Any, self.trainer.model).named_parameters()
        self._learning = {name: weights for name, weights in parameters if weights.requires_grad}
        self.average = {
            name: _own(weights).to(torch.promote_types(weights.dtype, torch.float32), copy=True)
            for name, weights in self._learning.items()
        }

    def _put(self, values: dict[str, Tensor]) -> None:
        self._reshard()
        with torch.no_grad():
            for name, value in values.items():
                _own(self._learning[name]).copy_(value)

    def _reshard(self) -> None:
        # FSDP leaves some weights gathered after an evaluation, and would go on with them.
        for module in cast(Any, self.trainer.model).modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _own(weights: Tensor) -> Tensor:
    """This process's part of a weight, sharing its memory."""
    weights = weights.detach()
    return weights.to_local() if isinstance(weights, DTensor) else weights


def _sharded(part: Tensor, like: DTensor) -> DTensor:
    """A process's part as one of the shards that `like` has."""
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )

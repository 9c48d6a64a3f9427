"""transformers.Trainer with checkpoints that are whole or not there, and nothing in them that runs."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from unmask.data.hub import first_line
from unmask.data.prepare import tokenizer_fingerprint as fingerprint
from unmask.training.dataset import ignore_stop_signals
from unmask.errors import UnmaskError
from unmask.training.checkpoints import (
    PARTIAL,
    PREFIX,
    STATE,
    AlsoSaved,
    Manifest,
    put_in_place,
    rotate,
    write_manifest,
)


class SavingTrainer(Trainer):
    """A `Trainer` that writes each checkpoint aside, with a manifest, and moves it to its place.

    A checkpoint that cannot be written leaves the earlier ones as they are. `also_saved` goes into each of
    them. It also keeps, for the newest optimizer step, what tells whether it is sound: the losses of the
    micro-batches of this process with their sample ids, and the norm of the gradient.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.also_saved: list[AlsoSaved] = []
        self.micro_losses: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.args.gradient_accumulation_steps)
        self.grad_norm: Any = 0.0
        self.skipped_steps = 0  # of the whole run

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the number of steps left out if there are any."""
        if "loss" in logs and self.skipped_steps:
            logs["skipped_steps"] = self.skipped_steps
        super().log(logs, start_time)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return the loader of the evaluation data."""
        return shielded(super().get_eval_dataloader(*args, **kwargs))

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of a micro-batch and its gradient."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.micro_losses.append((loss, inputs["sample_ids"]))
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self.grad_norm

    def load(self, checkpoint: str) -> None:
        """Load weights and state of a checkpoint that leaves no step to take."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        self._load_also_saved(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _named(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _named(checkpoint):
                super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        scheduler = cast(Any, self.lr_scheduler)
        wanted = _settings(cast(Any, self.optimizer)), list(scheduler.base_lrs)
        with _named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        self._set_again(*wanted)
        self._load_also_saved(checkpoint)

    def _set_again(self, settings: list[dict[str, Any]], base_lrs: list[float]) -> None:
        """Give the optimizer the recipe's settings again, for those that `resume.allow` lets differ."""
        groups, scheduler = cast(Any, self.optimizer).param_groups, cast(Any, self.lr_scheduler)
        for group, wanted in zip(groups, settings, strict=True):
            group.update({name: value for name, value in wanted.items() if name in group})
        if base_lrs != scheduler.base_lrs:
            scheduler.base_lrs, lambdas = base_lrs, scheduler.lr_lambdas
            rates = [base * rate(scheduler.last_epoch) for base, rate in zip(base_lrs, lambdas, strict=True)]
            for group, base, rate in zip(groups, base_lrs, rates, strict=True):
                group["initial_lr"], group["lr"] = base, rate
            scheduler._last_lr = rates

    def _load_also_saved(self, checkpoint: str) -> None:
        for part in self.also_saved:
            part.load(Path(checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, out = self.state.global_step, Path(cast(str, self.args.output_dir))
        place = out / f"{PREFIX}{step}"
        aside = out / PARTIAL / place.name
        self.store_flos()
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(place)
        self._together(place, lambda: self._write(aside))
        for part in self.also_saved:
            self._together(place, lambda part=part: part.save(aside))
        self._together(place, lambda: self._finish(aside, place))

    def _write(self, aside: Path) -> None:
        """What `Trainer` writes, but for the arguments, a pickle that nothing reads."""
        aside.mkdir(parents=True, exist_ok=True)
        folder = str(aside)
        self.save_model(folder, _internal_call=True)
        self._save_optimizer_and_scheduler(folder)
        self._save_scaler(folder)
        self._save_rng_state(folder)
        if self.args.should_save:
            (aside / "training_args.bin").unlink(missing_ok=True)
            cast(Any, self.accelerator.unwrap_model(cast(Any, self.model))).config.save_pretrained(folder)
            parts: list[Any] = [*self.callback_handler.callbacks, self.control]
            exported = TrainerState(
                stateful_callbacks=cast(Any, [p for p in parts if isinstance(p, ExportableState)])
            )
            self.state.stateful_callbacks = exported.stateful_callbacks
            self.state.save_to_json(str(aside / STATE))

    def _finish(self, aside: Path, place: Path) -> None:
        """Make the manifest, and put the checkpoint in its place."""
        if not self.args.should_save:
            return
        tokenizer = cast(Any, self.processing_class)
        manifest = Manifest(
            step=self.state.global_step,
            processes=self.args.world_size,
            tokenizer_sha256=None if tokenizer is None else fingerprint(tokenizer),
        )
        write_manifest(aside, manifest)
        put_in_place(aside, place)
        rotate(place.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _together(self, place: Path, write: Callable[[], None]) -> None:
        """Do a part of a checkpoint on every process; what fails on one fails on all of them."""
        failed: BaseException | None = None
        try:
            write()
        except (Exception, CheckpointException) as error:
            if not _is_failed_write(error):
                raise
            failed = error
        said = None if failed is None else _reason(_inner(failed))
        found = gather_object([said]) if self.args.world_size > 1 else [said]
        reasons = [reason for reason in found if reason is not None]
        if reasons:
            if self.args.should_save:
                shutil.rmtree(place.parent / PARTIAL, ignore_errors=True)
            raise UnmaskError(
                f"{place}: could not be written: {reasons[0]}; earlier checkpoints are as they were:"
                " make room and go on with resume_from_checkpoint=auto."
            ) from failed


def shielded(loader: DataLoader) -> DataLoader:
    """A loader whose workers outlive a signal that is meant for the process that trains."""
    base = getattr(loader, "base_dataloader", loader)  # of accelerate's
    before = base.worker_init_fn
    if base.num_workers and not isinstance(before, _Shielded):
        base.worker_init_fn = _Shielded(before)
    return loader


class _Shielded:
    def __init__(self, before: Callable[[int], None] | None):
        self.before = before

    def __call__(self, worker: int) -> None:
        ignore_stop_signals(worker)
        if self.before is not None:
            self.before(worker)


def _settings(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each group that a recipe decides and training does not change."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        for group in optimizer.param_groups
    ]


@contextmanager
def _named(checkpoint: str) -> Iterator[None]:
    """Say which checkpoint it is that cannot be resumed from."""
    try:
        yield
    except (
        *(OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError),
        *(UnpicklingError, EOFError, CheckpointException),
    ) as error:
        if isinstance(error, UnmaskError):
            raise
        reason = _inner(error)
        # torch's words for a pickle that names code are long, and advise to run it.
        said = "holds code" if "weights_only" in str(reason) else first_line(reason).removesuffix(":")
        raise UnmaskError(
            f"resume_from_checkpoint: {checkpoint} cannot be loaded: {said}; it may be damaged,"
            " or of another model or optimizer than the recipe's."
        ) from error


def _inner(error: BaseException) -> BaseException:
    """The first of the errors that a sharded checkpoint reports together."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def _reason(error: BaseException) -> str:
    # What torch's zip writer says means nothing to a reader.
    zipped = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return "a file could not be written to its end, as on a full disk" if zipped else first_line(error)


def _is_failed_write(error: BaseException) -> bool:
    error = _inner(error)
    # torch.save speaks of a full disk in a RuntimeError with the words of its zip writer.
    words = ("write", "inline_container", "iostream")
    return isinstance(error, OSError | SafetensorError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )

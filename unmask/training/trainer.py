"""transformers.Trainer with the diffusion loss, its one normaliser, keyed noise and an exact evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from unmask.data.hub import first_line
from unmask.data.stream import RecordStream, StreamLoader
from unmask.diffusion.curriculum import Curriculum
from unmask.diffusion.loss import loss_divisor
from unmask.diffusion.noise import document_strata, example_seeds, low_discrepancy
from unmask.diffusion.objective import Objective
from unmask.errors import UnmaskError
from unmask.model.inputs import IGNORED
from unmask.training.callbacks import SHARE

POSITION = "data_position_{}.json"  # in a checkpoint: where each process stands in the stream
EVALUATION_EPOCH = -1  # evaluation noise is that of an epoch that training never reaches


TimeSampling = Literal["independent", "low_discrepancy"]


class DiffusionTrainer(Trainer):
    """Train a masked-diffusion model on batches of `unmask.data.collate`.

    What it changes in `Trainer`:
      - the loss: what the curriculum's objective says for the step, a weighted sum over masked tokens. Its
        divisor is that of the whole optimizer step, over all micro-batches and processes: by default the
        number of supervised tokens (nats per supervised token);
      - the noise of a sample, alone in its row or packed with others, is a function of (seed, sample id,
        epoch) alone, or with low discrepancy also of the sample's place in the optimizer step;
      - the evaluation loss is the bound (preset "elbo") in nats per supervised token over the whole
        evaluation set, whatever objective is trained: plain masks, the whole source as context, attention
        as the checkpoint will have it. Its noise never changes, so two evaluations of one model agree to
        the bit, and those of runs with other curricula compare;
      - a checkpoint that cannot be written leaves the earlier ones as they are.

    With a `RecordStream` as train_dataset each process reads its own part of it, and a checkpoint holds each
    process's position; `args` then needs `ignore_data_skip=True`. Where the stream ends, on whichever
    process, so does the run, without an incomplete last step.

    Args:
        training_mode: "pretrain" or "sft", as in the model's `forward`.
        curriculum: the objective of each step; by default the plain bound with the config's `noise_eps`.
        time_sampling: "independent", or "low_discrepancy": the masking rates of an optimizer step are
            spread evenly over its rows, and over the samples of each packed row.
        Others as in `transformers.Trainer`; every example needs a sample id, and `args` needs
        `remove_unused_columns=False`.
    """

    # The loss is normalised over the optimizer step by us: Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        training_mode: str = "pretrain",
        curriculum: Curriculum | None = None,
        time_sampling: TimeSampling = "independent",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.training_mode = training_mode
        eps = cast(Any, self.model).config.noise_eps
        self.curriculum = Curriculum(noise_eps=(eps,)) if curriculum is None else curriculum
        self.time_sampling = time_sampling
        self.evaluated = Objective(eps=eps)
        self.loader: StreamLoader | None = None  # of a stream
        self.model_accepts_loss_kwargs = True  # what older versions read instead of the attribute above

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """Take the micro-batches of one optimizer step, seed their noise, and count the step's divisor."""
        batches: list[dict[str, Any]] = []
        counted = [] if self.loader is None else [list(pair) for pair in self.loader.counts]
        taken = 0  # samples of this step in the micro-batches before, over all processes
        for batch in islice(epoch_iterator, num_batches):
            # At once: what `_repeated` asks for is true of the newest batch.
            rows, processes = len(batch["input_ids"]), self.accelerator.num_processes
            repeated = self._repeated(rows)
            row = torch.arange(rows, device=batch["input_ids"].device)
            place = taken + rows * self.accelerator.process_index + row
            batches.append({**self._labelled(batch, repeated), "place": place})
            # A stream counts the passes over each of its sources by itself.
            own, epoch = batch.get("epochs"), self._epoch
            epochs = epoch if own is None else torch.where(own < 0, epoch, own)
            batches[-1]["noise_seed"] = self._seeds(batch, epochs)
            taken += rows * processes - repeated
        for batch in batches:
            batch["total"] = taken
        if self.loader is not None and self._ended(len(batches) < num_batches):
            # An incomplete step is left out: some process may have nothing for it.
            self.loader.counts = counted
            self.control.should_training_stop = True
            return [], None
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        divisors = [self._divisor(batch, self._objective) for batch in batch_samples]
        divisor = torch.stack(divisors).sum().to(device)
        return cast(Tensor, self.accelerator.gather(divisor)).sum() if self.args.world_size > 1 else divisor

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the share of the optimizer step's loss that this micro-batch contributes."""
        outputs = self._denoise(model, inputs, self._objective, num_items_in_batch)
        # Gradients are averaged over processes, and the divisor already counts all of them.
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training data; of a stream one for this process alone."""
        if not isinstance(self.train_dataset, RecordStream):
            return super().get_train_dataloader()
        self.loader = StreamLoader(
            self.train_dataset,
            cast(Any, self.data_collator),
            batch_size=self._train_batch_size,
            workers=self.args.dataloader_num_workers,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            device=self.args.device,
        )
        return cast(DataLoader, self.loader)

    def _ended(self, here: bool) -> bool:
        """Whether the stream has ended on any process."""
        assert self.loader is not None
        if self.loader.stream.mixture.endless or self.args.world_size == 1:
            return here
        flag = torch.tensor([here], device=self.args.device)
        return bool(cast(Tensor, self.accelerator.gather(flag)).any())

    def source_counts(self) -> list[list[int]]:
        """Count the examples and tokens of each source trained on by all processes; [] without a stream."""
        if self.loader is None:
            return []
        counts = torch.tensor(self.loader.counts, device=self.args.device)
        return cast(Tensor, self.accelerator.reduce(counts)).tolist()

    def left_out(self) -> list[str]:
        """Say which records of a stream were dropped or skipped by all processes, and why."""
        total: dict[tuple[str, str], tuple[int, str]] = {}
        here = {} if self.loader is None else self.loader.left_out
        for one in gather_object([here]) if self.args.world_size > 1 else [here]:
            for key, (count, where) in one.items():
                before, first = total.get(key, (0, where))
                total[key] = (before + count, first)
        return [f"{n:,} {kind}: {reason} (first: {where})" for (kind, reason), (n, where) in total.items()]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with each source's share of the tokens so far where there are several."""
        if "loss" in logs and self.loader is not None and len(self.loader.counts) > 1:
            tokens = [tokens for _, tokens in self.source_counts()]
            for source, of_source in zip(self.loader.stream.mixture.sources, tokens, strict=True):
                logs[SHARE + source.label] = of_source / max(1, sum(tokens))
        super().log(logs, start_time)

    # Both change only after the last micro-batch of a step.
    @property
    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    @property
    def _objective(self) -> Objective:
        return self.curriculum.at(self.state.global_step, self._epoch)

    def _denoise(
        self, model: Any, batch: dict[str, Any], objective: Objective, divisor: Tensor | int | None
    ) -> Any:
        return model(**self._arguments(batch, objective), divisor=divisor, return_logits=False)

    def _divisor(self, batch: dict[str, Any], objective: Objective) -> Tensor:
        """What a batch adds to the divisor of its optimizer step."""
        model = cast(Any, self.accelerator.unwrap_model(cast(Any, self.model)))
        arguments = self._arguments(batch, objective)
        # Repeated rows are no tokens either: a preset may divide by all tokens, prompts included.
        arguments["attention_mask"] = batch["attention_mask"] * (batch["labels"] != IGNORED)
        return loss_divisor(model.draw_noise(**arguments), objective)

    def _arguments(self, batch: dict[str, Any], objective: Objective) -> dict[str, Any]:
        """What `forward` and `draw_noise` are called with alike."""
        strata = None
        # Made only now: a float in the batch would be cast to the model's type by DeepSpeed.
        if self.time_sampling == "low_discrepancy" and "place" in batch:
            strata = low_discrepancy(
                self.args.seed, self.state.global_step, batch["place"], total=batch["total"]
            )
            if batch["noise_seed"].dim() == 2:
                strata = document_strata(strata, batch["noise_seed"].shape[1])
        return {
            "input_ids": batch["input_ids"],
            "labels": batch["labels"],
            "attention_mask": batch["attention_mask"],
            "src_mask": batch["src_mask"] if self.training_mode == "sft" else None,
            "training_mode": self.training_mode,
            "noise_seed": batch["noise_seed"],
            "strata": strata,
            "objective": objective,
            "segment_ids": batch.get("segment_ids"),
        }

    def _seeds(self, batch: dict[str, Tensor], epoch: Tensor | int) -> Tensor:
        return example_seeds(self.args.seed, batch["sample_ids"], epoch)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the loss over the whole set: one sum over one count, whatever the batch size."""
        model = self._wrap_model(cast(Any, self.model), training=False, dataloader=dataloader)
        model.eval()
        total = torch.zeros(3, dtype=torch.float64, device=self.args.device)  # loss, tokens, samples
        for batch in dataloader:
            batch = cast(dict[str, Any], self._prepare_inputs(batch))
            batch = self._labelled(batch, self._repeated(len(batch["input_ids"])))
            batch["noise_seed"] = self._seeds(batch, EVALUATION_EPOCH)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self._denoise(model, batch, self.evaluated, divisor=1).loss
            count = self._divisor(batch, self.evaluated)
            learnt = (batch["labels"] != IGNORED).any(dim=1)
            samples = (learnt * (batch["sample_ids"].view(len(learnt), -1) >= 0).sum(dim=1)).sum()
            total += torch.stack([loss.double(), count.double(), samples.double()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        total = cast(Tensor, self.accelerator.reduce(total))
        metrics = {f"{metric_key_prefix}_loss": (total[0] / total[1].clamp(min=1)).item()}
        return EvalLoopOutput(None, None, metrics, num_samples=int(total[2]))  # type: ignore[arg-type]

    def _repeated(self, rows: int) -> int:
        """Count the rows of the newest batch, of all processes, that only repeat others.

        They make the last batch of an epoch even over the processes; counted, they would make the run
        depend on the number of processes. They are the last ones.
        """
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes == 1 or not state.end_of_dataloader:
            return 0
        # Not accelerate's own `remainder`, which is wrong in an epoch that a resumed run enters midway.
        examples = len(cast(Any, state.active_dataloader).dataset)
        return -examples % (rows * processes)

    def _labelled(self, batch: dict[str, Tensor], repeated: int) -> dict[str, Any]:
        """Add labels: the ids, but nothing to learn in the last `repeated` rows over all processes."""
        ids = batch["input_ids"]
        if not repeated:
            return {**batch, "labels": ids}
        row = torch.arange(len(ids), device=ids.device) + len(ids) * self.accelerator.process_index
        learnt = row < len(ids) * self.accelerator.num_processes - repeated
        return {**batch, "labels": ids.masked_fill(~learnt[:, None], IGNORED)}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _named(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.loader is not None:
            self._load_position(Path(checkpoint))

    def _load_position(self, checkpoint: Path) -> None:
        assert self.loader is not None
        saved = len(list(checkpoint.glob(POSITION.format("*"))))
        processes = self.accelerator.num_processes
        if saved != processes:
            raise UnmaskError(
                f"resume_from_checkpoint: {checkpoint} holds positions in the stream of {saved} processes;"
                f" this run has {processes}: start as many."
            )
        file = checkpoint / POSITION.format(self.accelerator.process_index)
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            self.loader.load(state, str(file))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnmaskError(
                f"resume_from_checkpoint: {file} cannot be read: {first_line(error)}; name an earlier"
                " checkpoint."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.loader is not None:
            file = Path(output_dir) / POSITION.format(self.accelerator.process_index)
            file.write_text(json.dumps(self.loader.state()), encoding="utf-8")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if not _is_failed_write(error):
                raise
            raise UnmaskError(
                f"{folder}: could not be written: {first_line(error)}; earlier checkpoints are as they were:"
                " make room and go on with resume_from_checkpoint=auto."
            ) from error


@contextmanager
def _named(checkpoint: str | None) -> Iterator[None]:
    """Say which checkpoint it is that cannot be resumed from."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError, UnpicklingError, EOFError) as error:
        raise UnmaskError(
            f"resume_from_checkpoint: {checkpoint} cannot be loaded: {first_line(error)}; it may be damaged,"
            " or of another model or optimizer than the recipe's."
        ) from error


def _is_failed_write(error: BaseException) -> bool:
    # torch.save speaks of a full disk in a RuntimeError with the words of its zip writer.
    words = ("write", "inline_container", "iostream")
    return isinstance(error, OSError | SafetensorError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )

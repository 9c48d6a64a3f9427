"""transformers.Trainer with the diffusion loss, its one normaliser, keyed noise and an exact evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, Literal, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from unmask.training.dataset import RecordStream, StreamLoader
from unmask.diffusion.curriculum import Curriculum
from unmask.diffusion.loss import loss_divisor
from unmask.diffusion.noise import Drawn, document_strata, example_seeds, low_discrepancy
from unmask.diffusion.objective import Objective
from unmask.model.inputs import IGNORED
from unmask.training.accounting import Accounting
from unmask.training.callbacks import SHARE
from unmask.training.ema import WeightAverage
from unmask.training.held_out import HeldOutSums, exact_masks
from unmask.training.optimizer import MuonWithAdamW, muon_groups
from unmask.training.position import StreamPosition
from unmask.training.saving import SavingTrainer, shielded

CURRICULUM = "curriculum/"  # before what is logged of its state
EVALUATION_EPOCH = -1  # evaluation noise is that of an epoch that training never reaches


TimeSampling = Literal["independent", "low_discrepancy"]


class DiffusionTrainer(SavingTrainer):
    """Train a masked-diffusion model on batches of `unmask.data.collate`.

    What it changes in `Trainer`:
      - the loss: what the curriculum's objective says for the step, a weighted sum over masked tokens. Its
        divisor is that of the whole optimizer step, over all micro-batches and processes: by default the
        number of supervised tokens (nats per supervised token);
      - the noise of a sample, alone in its row or packed with others, is a function of (seed, sample id,
        epoch) alone, or with low discrepancy also of the sample's place in the optimizer step;
      - the evaluation loss is the bound (preset "elbo") in nats per supervised token over the whole
        evaluation set, whatever objective is trained: plain masks, the whole source as context, attention
        as the checkpoint will have it. Its noise never changes (see `unmask.training.held_out`), so two
        evaluations of one model agree to the bit, and those of runs with other curricula compare;
      - the log has the useful work done, the time it took, and the state of the curriculum;
      - its checkpoints are those of `SavingTrainer`.

    With a `RecordStream` as train_dataset each process reads its own part of it, and a checkpoint holds each
    process's position; `args` then needs `ignore_data_skip=True`. Where the stream ends, on whichever
    process, so does the run, without an incomplete last step.

    Args:
        training_mode: "pretrain" or "sft", as in the model's `forward`.
        curriculum: the objective of each step; by default the plain bound with the config's `noise_eps`.
        time_sampling: "independent", or "low_discrepancy": the masking rates of an optimizer step are
            spread evenly over its rows, and over the samples of each packed row.
        eval_sources: names of the sources of the evaluation set, whose losses are logged one by one too.
        muon: train the hidden layers' matrices with Muon and the rest with the AdamW that `args` describes.
        ema_decay: keep an average of the weights, which is evaluated in their place; None = none.
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
        eval_sources: Sequence[str] = (),
        muon: bool = False,
        ema_decay: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.training_mode = training_mode
        eps = cast(Any, self.model).config.noise_eps
        self.curriculum = Curriculum(noise_eps=(eps,)) if curriculum is None else curriculum
        self.time_sampling = time_sampling
        self.evaluated = Objective(eps=eps)
        self.trained = self.evaluated  # what the newest optimizer step was trained on
        self.eval_sources = eval_sources
        dtype = torch.bfloat16 if self.args.bf16 else next(cast(Any, self.model).parameters()).dtype
        self.accounting = Accounting(self.model, self.accelerator, dtype)
        self.add_callback(self.accounting)
        self.muon = muon
        self.average = WeightAverage(self, ema_decay) if ema_decay is not None else None
        if self.average is not None:
            self.add_callback(self.average)
            self.also_saved.append(self.average)
        self.loader: StreamLoader | None = None  # of a stream
        self.data_ended = False  # whether a stream ended the run
        self.also_saved.append(StreamPosition(self))
        self.model_accepts_loss_kwargs = True  # what older versions read instead of the attribute above

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """Make the optimizer that the arguments name, or Muon with AdamW."""
        if self.muon and self.optimizer is None:
            model = cast(torch.nn.Module, args[0] if args else self.model)
            decayed = self.get_decay_parameter_names(model)
            settings = self.args
            self.optimizer = MuonWithAdamW(
                muon_groups(model, decayed, settings.weight_decay),
                lr=settings.learning_rate,
                betas=(settings.adam_beta1, settings.adam_beta2),
                eps=settings.adam_epsilon,
            )
        return cast(torch.optim.Optimizer, super().create_optimizer(*args))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | None]:
        """Take the micro-batches of one optimizer step, seed their noise, and count the step's divisor."""
        self.accounting.mark("other")
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
            self.control.should_training_stop = self.data_ended = True
            return [], None
        divisor = self._get_num_items_in_batch(batches, device)
        self.accounting.mark("data")
        return batches, divisor

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        objective, divisors = self._objective, []
        self.trained = objective
        for batch in batch_samples:
            drawn = self._drawn(batch, objective)
            divisors.append(loss_divisor(drawn, objective))
            in_documents = "segment_ids" in batch and drawn.block is None and objective.future_share == 1
            flat = in_documents and not self.args.torch_compile
            self.accounting.count(drawn, 2 if objective.complementary else 1, flat)
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
        self.accounting.mark("data")  # its way to the device
        outputs = self._denoise(model, inputs, self._objective, num_items_in_batch)
        # Gradients are averaged over processes, and the divisor already counts all of them.
        loss = outputs.loss * self.accelerator.num_processes
        self.accounting.mark("forward")
        return (loss, outputs) if return_outputs else loss

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Finish, but do not delete: Trainer would keep the best checkpoint alone of `save_total_limit` 1,
        and a run goes on from its last one."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of a micro-batch and its gradient."""
        loss = super().training_step(*args, **kwargs)
        self.accounting.mark("backward")
        return loss

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training data; of a stream one for this process alone."""
        if not isinstance(self.train_dataset, RecordStream):
            return shielded(super().get_train_dataloader())
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
        """Log, with each source's share of the tokens so far where there are several, the state of the
        curriculum, and what the accounting says."""
        if "loss" in logs and self.loader is not None and len(self.loader.counts) > 1:
            tokens = [tokens for _, tokens in self.source_counts()]
            for source, of_source in zip(self.loader.stream.mixture.sources, tokens, strict=True):
                logs[SHARE + source.label] = of_source / max(1, sum(tokens))
        if "loss" in logs:
            state = self.curriculum.state(self.trained)
            logs.update({CURRICULUM + name: value for name, value in state.items()})
            logs.update(self.accounting.report().logs())
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

    def _drawn(self, batch: dict[str, Any], objective: Objective) -> Drawn:
        """What is masked in a batch."""
        model = cast(Any, self.accelerator.unwrap_model(cast(Any, self.model)))
        arguments = self._arguments(batch, objective)
        # Repeated rows are no tokens either: a preset may divide by all tokens, prompts included.
        arguments["attention_mask"] = batch["attention_mask"] * (batch["labels"] != IGNORED)
        return model.draw_noise(**arguments)

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
        model = cast(Any, self.accelerator.unwrap_model(cast(Any, self.model)))
        model.eval()
        if "masked_nll" not in vars(model):  # of a model that is divided, gather the weights for it too
            register_fsdp_forward_method(model, "masked_nll")
        sums = HeldOutSums(self.eval_sources, self.args.device)
        for batch in dataloader:
            batch = cast(dict[str, Any], self._prepare_inputs(batch))
            batch = self._labelled(batch, self._repeated(len(batch["input_ids"])))
            batch["noise_seed"] = self._seeds(batch, EVALUATION_EPOCH)
            drawn = self._drawn(batch, self.evaluated)
            masks = exact_masks(drawn, batch["sample_ids"], self.args.seed)
            arguments = self._arguments(batch, self.evaluated)
            shown = {name: arguments[name] for name in ("attention_mask", "src_mask", "segment_ids")}
            with torch.no_grad(), self.accelerator.autocast():
                nll = model.masked_nll(batch["input_ids"], masks.is_masked, **shown)
            sums.add(masks, nll, drawn, batch["sample_ids"])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics, samples = sums.metrics(self.accelerator, metric_key_prefix)
        return EvalLoopOutput(None, None, metrics, num_samples=samples)  # type: ignore[arg-type]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute, log and return the held-out losses."""
        self.accounting.mark("other")
        with nullcontext() if self.average is None else self.average.in_place():
            metrics = super().evaluate(*args, **kwargs)
        self.accounting.mark("evaluation")
        return metrics

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.accounting.mark("other")
        super()._save_checkpoint(model, trial)
        self.accounting.mark("save")

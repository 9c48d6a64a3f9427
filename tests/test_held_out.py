"""The held-out loss: unbiased, the same however it is computed, and of a low variance."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import SEED, make_examples, make_trainer, with_everything
from tiny import tiny_model

from unmask.data.collate import collate
from unmask.data.encode import SOURCE_BIT, Example
from unmask.data.collate import pack
from unmask.diffusion.keyed import STREAM_MASK, STREAM_STRATA, keyed_hash
from unmask.diffusion.likelihood import likelihood
from unmask.diffusion.noise import Drawn, example_seeds
from unmask.training.dataset import ExampleDataset
from unmask.training.held_out import Masks, exact_masks
from unmask.training.trainer import EVALUATION_EPOCH


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage as it starts, which takes 0.4 s for all that the libraries hold."""
    gc.freeze()
    yield
    gc.unfreeze()


def plain_masks(example: Example, mode: str, seed: int = SEED) -> tuple[list[int], float]:
    """Which tokens of a sample are masked, and the share k/n: number by number in Python."""
    may = [i for i, source in enumerate(example.src_mask) if mode == "pretrain" or not source]
    if not may:
        return [], 1.0
    start = keyed_hash(torch.tensor(seed), STREAM_STRATA).item()
    turn = (example.sample_id * 0x9E3779B97F4A7C15 + int(start)) % 2**64
    k = 1 + math.floor(len(may) * (turn >> 24) / 2**40)
    own = example_seeds(seed, torch.tensor(example.sample_id), EVALUATION_EPOCH)
    chosen = sorted(may, key=lambda i: keyed_hash(own, STREAM_MASK, i).item())[:k]
    return sorted(chosen), k / len(may)


def plain_held_out(
    model: Any, examples: Sequence[Example], mode: str = "sft", seed: int = SEED
) -> dict[str, float]:
    """The loss and its standard error, sample by sample without padding."""
    model.eval()
    bounds, counts = [], []
    for example in examples:
        masked, share = plain_masks(example, mode, seed)
        if not masked:
            continue
        ids = torch.tensor(example.input_ids)
        noisy = ids.clone()
        noisy[masked] = model.config.mask_token_id
        with torch.no_grad():
            log_p = model(noisy[None]).logits[0].double().log_softmax(dim=-1)
        bounds.append(sum(-log_p[i, ids[i]].item() for i in masked) / share)
        counts.append(len(example.src_mask) if mode == "pretrain" else example.src_mask.count(False))
    loss = sum(bounds) / sum(counts)
    squares = sum((b - loss * n) ** 2 for b, n in zip(bounds, counts, strict=True))
    return {"loss": loss, "stderr": math.sqrt(squares * len(bounds) / (len(bounds) - 1)) / sum(counts)}


@pytest.mark.parametrize("mode", ["sft", "pretrain"])
@pytest.mark.parametrize("shift", [False, True])
def test_the_loss_equals_a_recomputation(tmp_path: Path, mode: str, shift: bool) -> None:
    model = tiny_model(logit_shift=shift)
    metrics = make_trainer(tmp_path, model=model, mode=mode, held_out=20).evaluate()
    plain = plain_held_out(model, make_examples(20, 1000), mode)
    assert metrics["eval_loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert metrics["eval_loss_stderr"] == pytest.approx(plain["stderr"], rel=1e-6)


@pytest.mark.parametrize("other", [{"micro": 1}, {"micro": 5}, {"collation": {"padding_side": "left"}}])
def test_batches_and_padding_change_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    model = tiny_model()
    one = make_trainer(tmp_path, model=model, held_out=20).evaluate()
    two = make_trainer(tmp_path, model=model, held_out=20, **other).evaluate()
    names = [name for name in one if "loss" in name or "by_t" in name]
    assert len(names) > 6
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-6)


@pytest.mark.parametrize("fields", [{}, {"attention": "block_causal", "block_length": 2}], ids=str)
def test_packed_rows_have_the_loss_of_their_samples(tmp_path: Path, fields: dict[str, Any]) -> None:
    model, examples = tiny_model(**fields), make_examples(20, 1000)
    trainer = make_trainer(tmp_path, model=model)
    alone = trainer.evaluate(ExampleDataset(examples))
    packed = trainer.evaluate(ExampleDataset(list(pack(examples, 20))))
    names = [name for name in alone if "loss" in name or "by_t" in name]
    assert len(names) > 3
    assert {name: packed[name] for name in names} == pytest.approx(
        {name: alone[name] for name in names}, rel=1e-6
    )


@pytest.mark.parametrize("settings", [{}, {"time_sampling": "low_discrepancy"}], ids=str)
def test_it_is_the_plain_bound_whatever_is_trained(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = tiny_model()
    curriculum = with_everything(loss="coda", complementary=True)
    trainer = make_trainer(
        tmp_path, model=model, curriculum=curriculum, steps=1, learning_rate=0.0, **settings
    )
    expected = plain_held_out(model, make_examples(7, 1000))["loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def masks(
    count: int, seed: int, size: int = 6, model: Any = None, ids: Sequence[int] | None = None
) -> tuple[Masks, Drawn]:
    """The masks of `count` samples, one token of source and `size` others each."""
    tokens, source = list(range(2, 3 + size)), [True] + [False] * size
    examples = [Example(tokens, source, number) for number in ids or range(count)]
    batch = collate(examples, pad_token_id=0)
    model = model or tiny_model()
    drawn = model.draw_noise(
        batch["input_ids"],
        src_mask=batch["src_mask"],
        training_mode="sft",
        noise_seed=example_seeds(seed, batch["sample_ids"], EVALUATION_EPOCH),
    )
    return exact_masks(drawn, batch["sample_ids"], seed), drawn


def test_shares_are_spread_evenly_over_the_samples() -> None:
    found, _ = masks(60, seed=3)
    assert found.is_masked.sum(dim=1).equal(found.k[:, 1])
    assert (found.size[:, 1:] == 6).all() and not found.is_masked[:, 0].any()
    assert (found.k[:, 1].bincount()[1:] - 10).abs().max() <= 2  # each k ten times, but for the ends


def test_over_sample_ids_each_number_and_each_set_is_equally_likely() -> None:
    ids = torch.randint(0, 2**39, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    found, _ = masks(900, seed=0, size=3, ids=ids)
    sets = found.is_masked[:, 1:].long() @ torch.tensor([1, 2, 4])
    # k = 1, 2, 3 with a third each; the sets of one or two tokens with a ninth each.
    expected = torch.tensor([0, 1, 1, 1, 1, 1, 1, 3]) * 100.0
    statistic = ((sets.bincount(minlength=8) - expected) ** 2 / expected.clamp(min=1)).sum()
    assert statistic < 35  # chi-square of 6 degrees of freedom, 1 in 200,000


def test_blocks_of_a_sample_have_shares_of_their_own() -> None:
    model = tiny_model(attention="block_causal", block_length=3)
    found, drawn = masks(40, seed=1, model=model)
    assert drawn.block is not None
    for block in drawn.block[0, 1:].unique():
        inside = drawn.block[0] == block
        inside[0] = False
        assert (found.size[:, inside] == 3).all()
        k = found.k[:, inside]
        assert found.is_masked[:, inside].sum(dim=1).equal(k[:, 0])
        assert (k[:, 0].bincount()[1:] - 40 / 3).abs().max() <= 3
    assert (found.k[:, 1] != found.k[:, 4]).any()


def test_the_loss_estimates_the_bound_and_varies_little(tmp_path: Path) -> None:
    """Against all sets of masked tokens, and against masks drawn as in training."""
    model = tiny_model()
    examples = [Example([5 + i % 9, 7, 2 + i % 5, 11, 3], [True] + [False] * 4, i) for i in range(12)]
    exact = likelihood(model, collate(examples, pad_token_id=0), num_samples=16).total()
    assert exact.stderr == 0
    truth = exact.nats_per_token().value.item()
    trainer = make_trainer(tmp_path, model=model, micro=12)
    found, noisy = [], []
    for seed in range(60):
        trainer.args.seed = seed
        found.append(trainer.evaluate(ExampleDataset(examples))["eval_loss"])
        batch = collate(examples, pad_token_id=0)
        seeds = example_seeds(seed, batch["sample_ids"], EVALUATION_EPOCH)
        with torch.no_grad():
            out = model(
                batch["input_ids"],
                labels=batch["input_ids"],
                src_mask=batch["src_mask"],
                training_mode="sft",
                noise_seed=seeds,
                return_logits=False,
            )
        noisy.append(out.loss.item())
    losses, others = torch.tensor(found), torch.tensor(noisy)
    assert abs(losses.mean() - truth) < 5 * losses.std() / len(losses) ** 0.5
    assert losses.var() < others.var() / 4


def test_losses_by_source_and_by_level_add_up_to_the_loss(tmp_path: Path) -> None:
    model = tiny_model()
    examples = make_examples(12, 1000)
    for number, example in enumerate(examples):
        example.sample_id |= (number % 2) << SOURCE_BIT
    trainer = make_trainer(tmp_path, model=model)
    trainer.eval_sources = ["even.jsonl", "odd.jsonl"]
    metrics = trainer.evaluate(ExampleDataset(examples))
    assert metrics["eval_loss"] == pytest.approx(plain_held_out(model, examples)["loss"], rel=1e-6)
    for start, name in enumerate(trainer.eval_sources):
        expected = plain_held_out(model, examples[start::2])["loss"]
        assert metrics[f"eval_loss_{name}"] == pytest.approx(expected, rel=1e-6)
    # By level: the mean nll of what was masked, from one model call a sample.
    levels: dict[str, list[float]] = {}
    for example in examples:
        masked, share = plain_masks(example, "sft")
        ids = torch.tensor(example.input_ids)
        noisy = ids.clone()
        noisy[masked] = model.config.mask_token_id
        with torch.no_grad():
            log_p = model(noisy[None]).logits[0].log_softmax(dim=-1)
        name = f"{(math.ceil(share * 10 - 1e-9) - 0.5) / 10:.2f}"
        levels.setdefault(name, []).extend(-log_p[i, ids[i]].item() for i in masked)
    expected = {f"eval_by_t/{t}": sum(values) / len(values) for t, values in levels.items() if values}
    assert {name: x for name, x in metrics.items() if "by_t" in name} == pytest.approx(expected, rel=1e-6)


def test_one_source_is_not_named(tmp_path: Path) -> None:
    metrics = make_trainer(tmp_path).evaluate()
    assert {name for name in metrics if "loss" in name} == {"eval_loss", "eval_loss_stderr"}

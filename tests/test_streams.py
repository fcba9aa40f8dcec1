"""Streams against tables: the same rows in the same order train, log, evaluate and resume alike."""

import random
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from stream_run import CASES, EMPTY, as_stream, rows_with_gaps
from tiny import tiny_model, tiny_trainer
from torch.testing import assert_close
from transformers import TrainerCallback

from tide_hf.data import (
    DistillationCollator,
    PreparationRecord,
    RowPreparation,
    RowStream,
    StreamLoader,
    prepare_dataset,
    row_key,
    write_prepared,
)
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.diffusion import Counts


def preparation() -> RowPreparation:
    tokenizer = build_tokenizer()
    return RowPreparation(tokenizer, None, 16, 16, 4, mask_token_id=tokenizer.mask_token_id)


def history(trainer) -> list[dict]:
    """What was logged, without times; a stream cannot know which share of a pass is over."""
    timed = ("runtime", "per_second", "flos")
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in timed) and name != "epoch"}
        for entry in trainer.state.log_history
    ]


# -- the key of a row -------------------------------------------------------------------------------------------------


def test_a_row_has_one_key_wherever_it_is_read():
    """Catches keys that follow from where a row stands: in a table, another order, a shard, a stream, a part."""
    rows = rows_with_gaps(9)
    table, _ = prepare_dataset(Dataset.from_list(rows), preparation())
    keys = table["row_key"][:]
    assert len(set(keys)) == 9
    backwards, _ = prepare_dataset(Dataset.from_list(rows[::-1]), preparation())
    assert backwards["row_key"][:] == keys[::-1]
    streamed, _ = prepare_dataset(as_stream(rows, 4), preparation())
    assert [row["row_key"] for row in streamed] == keys
    assert [row["row_key"] for row in RowStream(as_stream(rows, 2), preparation())] == keys


def test_row_key_is_a_hash_of_tokens_and_labels():
    """Catches a key that ignores what is trained on, that two columns can trade numbers, or that changes by version:
    prepared datasets on disk would draw other noise."""
    assert row_key([1, 2, 3], [-100, 2, 3]) == -2456045214900947487
    others = [row_key([1, 2, 3], [-100, -100, 3]), row_key([2, 1, 3], [-100, 2, 3]), row_key([-100, 2, 3], [1, 2, 3])]
    assert len({row_key([1, 2, 3], [-100, 2, 3]), *others}) == 4
    assert all(-(2**63) <= key < 2**63 for key in others)


def test_equal_rows_draw_noise_of_their_own(tmp_path):
    """Catches a dataset of few different rows, or an oversampled one, trained under a few draws only; and a stream or
    a prepared dataset that numbers its equal rows differently from the table."""
    different = list(sorting_rows(3, seed=0))
    rows = [different[index] for index in (0, 1, 0, 0, 2, 1, 0)]
    table, _ = prepare_dataset(Dataset.from_list(rows), preparation())
    keys = table["row_key"][:]
    assert len(set(keys)) == 7 and table.column_names[0] == "row_key"
    assert keys[0] == row_key(table[0]["input_ids"], table[0]["labels"])
    assert PreparationRecord.read(table) == PreparationRecord.of(preparation())
    loader = StreamLoader(RowStream(as_stream(rows, 2), preparation()), DistillationCollator(0), 2)
    assert [key for batch in loader for key in batch["row_key"].tolist()] == keys
    written = write_prepared({"train": Dataset.from_list(rows)}, preparation(), tmp_path / "out", rows_per_part=3)
    assert written["train"]["row_key"][:] == keys
    again = StreamLoader(RowStream(written["train"].to_iterable_dataset()), DistillationCollator(0), 2)
    assert [key for batch in again for key in batch["row_key"].tolist()] == keys


# -- windows ----------------------------------------------------------------------------------------------------------


class Lockstep:
    """`gather` of several threads that stand for processes."""

    def __init__(self, num_processes: int):
        self.parts, self.barrier = [None] * num_processes, threading.Barrier(num_processes, timeout=20)

    def of(self, index: int):
        def gather(part: list) -> list:
            self.parts[index] = part
            self.barrier.wait()
            everything = [item for own in self.parts for item in own]
            self.barrier.wait()
            return everything

        return gather


def run_processes(num_processes: int, work) -> list:
    """Results of `work(index, gather)` in as many threads; an exception stands as the result."""
    lockstep, results = Lockstep(num_processes), [None] * num_processes

    def run(index):
        try:
            results[index] = work(index, lockstep.of(index))
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a process waits for ever"
    return results


@pytest.mark.parametrize("case", range(24))
def test_windows_are_those_of_a_sequential_table(case):
    """Catches rows lost, doubled, reordered or left to the next window, for random numbers of rows, dropped rows,
    shards, processes, rows per batch and batches per step; and processes with unequal numbers of batches."""
    draw = random.Random(case)
    rows = [
        EMPTY if draw.random() < 0.25 else row for row in sorting_rows(draw.randint(1, 40), seed=case, wrong=0.3)
    ] + list(sorting_rows(1, seed=100))
    num_processes, batch_size, accumulation = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 3)
    num_shards, drop_last, num_passes = draw.randint(1, min(5, len(rows))), draw.random() < 0.3, 2
    expected, _ = prepare_dataset(Dataset.from_list(rows), preparation())
    expected = expected["row_key"][:]
    if drop_last:
        expected = expected[: len(expected) // (batch_size * num_processes) * batch_size * num_processes]

    def work(index, gather):
        loader = StreamLoader(
            RowStream(as_stream(rows, num_shards), preparation()), DistillationCollator(0), batch_size, accumulation,
            num_processes, index, gather, drop_last,
        )  # fmt: skip
        passes = []
        for epoch in range(num_passes):
            loader.set_epoch(epoch)
            passes.append([batch["row_key"][(batch["labels"] != -100).any(1)].tolist() for batch in loader])
        return passes

    results = run_processes(num_processes, work)
    for epoch in range(num_passes):
        batches = [result[epoch] for result in results]
        assert len({len(own) for own in batches}) == 1
        assert len(batches[0]) % accumulation == 0
        assert [key for together in zip(*batches, strict=True) for own in together for key in own] == expected
        full = [sum(map(len, together)) for together in zip(*batches, strict=True)]
        assert all(later <= earlier for earlier, later in pairwise(full)), "only the last window may be short"


def test_an_error_of_one_process_reaches_all():
    """Catches processes that wait for ever for one that failed to read its rows."""

    def rows(index):
        yield sorting_rows(1, seed=0)[0]
        if index:
            raise OSError("the connection was reset")

    def work(index, gather):
        stream = RowStream(IterableDataset.from_generator(rows, gen_kwargs={"index": index}), preparation())
        return list(StreamLoader(stream, DistillationCollator(0), 1, 1, 2, index, gather))

    for result in run_processes(2, work):
        assert isinstance(result, OSError) and "connection was reset" in str(result)


@pytest.mark.slow
def test_workers_prepare_in_order():
    """Catches rows of parallel workers in another order, read twice, or not at all."""
    rows = rows_with_gaps(21)
    batches = []
    for options in ({}, {"num_workers": 3}, {"num_workers": 2, "start_method": "spawn", "persistent_workers": True}):
        stream = RowStream(as_stream(rows, 3), preparation())
        loader = StreamLoader(stream, DistillationCollator(0), 4, 2, **options)
        batches += [[batch["row_key"].tolist() for batch in loader] for _ in range(2)]
        assert stream.report.num_kept == 21 and stream.report.dropped == {"no assistant message": 7}
        assert (loader._pool is not None) == ("persistent_workers" in options)
    assert all(other == batches[0] for other in batches)


def test_an_unordered_stream_is_refused(tmp_path):
    """Catches an order of workers that is asked for and not given."""
    with pytest.raises(ValueError, match="dataloader_in_order=False"):
        tiny_trainer(tmp_path, rows=as_stream(rows_with_gaps(6)), dataloader_in_order=False).train()


@pytest.mark.parametrize("num_windows", [0, 1, 4, 5, 6, 10, 13])
def test_seek_goes_where_the_run_stood(num_windows):
    """Catches a resume that starts a pass anew, skips into the wrong one, or finds an empty one at its edge."""
    rows = rows_with_gaps(17)  # five windows of 2 × 2

    def loader():
        return StreamLoader(RowStream(as_stream(rows, 2), preparation()), DistillationCollator(0), 2, 2)

    uninterrupted = []
    whole = loader()
    for epoch in range(4):
        whole.set_epoch(epoch)
        batches = [batch["row_key"].tolist() for batch in whole]
        uninterrupted += [(epoch, batches[start : start + 2]) for start in range(0, len(batches), 2)]
    resumed = loader()
    epoch, done = resumed.seek(num_windows)
    assert (epoch, done) == divmod(num_windows, 5)
    found = []
    for number in range(epoch, 4):
        resumed.set_epoch(number)
        batches = [batch["row_key"].tolist() for batch in resumed]
        found += [(number, batches[start : start + 2]) for start in range(0, len(batches), 2)]
    assert found == uninterrupted[num_windows:]


def test_stream_that_is_split_already_is_refused():
    """Catches half of the rows read by nobody."""
    with pytest.raises(ValueError, match="split over processes already"):
        RowStream(split_dataset_by_node(as_stream(rows_with_gaps(6), 2), rank=0, world_size=2))


def test_stream_without_a_row_that_trains_is_refused(tmp_path):
    """Catches a run that ends at step 0 as if it had trained."""
    trainer = tiny_trainer(tmp_path, rows=as_stream([EMPTY] * 5))
    with pytest.raises(ValueError, match="No row of the stream is left to train on: 0 of 5 rows kept"):
        trainer.train()


# -- whole runs -------------------------------------------------------------------------------------------------------


def both(tmp_path, rows, num_shards=1, **options):
    """A run on the table of the rows, and one on a stream of them."""
    options = {"train_sampling_strategy": "sequential", "teacher": tiny_model(1), **options}
    kwargs = options.pop("trainer_kwargs", {})
    held_out = rows_with_gaps(7, seed=11)
    runs = []
    for kind, make in (("table", Dataset.from_list), ("stream", lambda given: as_stream(given, num_shards))):
        trainer = tiny_trainer(
            tmp_path / kind, rows=make(rows), trainer_kwargs={"eval_dataset": make(held_out), **kwargs}, **options
        )
        trainer.train()
        runs.append(trainer)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_rows", "num_shards", "options"),
    [
        (16, 4, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}),
        (10, 1, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}),
        (13, 2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_drop_last": True}),
        (9, 3, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "dataloader_num_workers": 2}),
    ],
)
def test_stream_trains_logs_and_evaluates_as_the_table(tmp_path, num_rows, num_shards, options):
    """Catches noise of another pass, what is left over at the end of a pass joined to the next one, empty windows
    that count as steps, and rows that are missing or doubled, over three passes."""
    windows = -(-num_rows // (options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]))
    if options.get("dataloader_drop_last"):
        windows = 3
    table, stream = both(
        tmp_path, rows_with_gaps(num_rows), num_shards, max_steps=3 * windows, eval_strategy="steps", eval_steps=2,
        logging_steps=2, eval_noise_levels=[0.5], **options,
    )  # fmt: skip
    assert stream._pass == table._pass == 2
    assert len(history(table)) > 4
    for ours, theirs in zip(history(stream), history(table), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-9), name
    assert_close(stream.model.state_dict(), table.model.state_dict(), rtol=1e-12, atol=1e-12)
    for name in ("train", "eval"):
        assert vars(stream.preparation_reports[name]) == vars(table.preparation_reports[name])
    cards = [
        [(result.metric, result.num_samples) for result in trainer.run_record.results]
        for trainer in (stream, table)
        if trainer.create_model_card() is None
    ]
    assert cards[0] == cards[1] and cards[0]


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 7])
def test_stream_resumes_exactly(tmp_path, step):
    """Catches a resumed stream that reads other rows or noise: within the first pass of three steps, at its end, and
    in the third."""
    options = {
        "rows": as_stream(rows_with_gaps(10), 2), "teacher": tiny_model(1), "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_steps": 9,
    }  # fmt: skip
    whole = tiny_trainer(tmp_path / "whole", **options)
    whole.train()
    options |= {"save_strategy": "steps", "save_steps": step}
    tiny_trainer(tmp_path / "cut", **options, trainer_kwargs={"callbacks": [_StopAt(step)]}).train()
    resumed = tiny_trainer(tmp_path / "cut", model=tiny_model(5), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    kept = [{**entry, "epoch": whole.state.log_history[index]["epoch"]} for index, entry in enumerate(history(whole))]
    assert history(resumed)[:-1] == history(whole)[:-1] and len(kept) == 10
    assert [entry["epoch"] for entry in resumed.state.log_history[:-1]] == [
        entry["epoch"] for entry in whole.state.log_history[:-1]
    ]


def test_shuffled_stream_changes_order_from_pass_to_pass(tmp_path):
    """Catches a stream whose passes are all shuffled alike, or a resume that does not repeat the shuffle."""
    rows = as_stream(rows_with_gaps(12), 3).shuffle(seed=1, buffer_size=8)
    loader = StreamLoader(RowStream(rows, preparation()), DistillationCollator(0), 4, 1)
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append([key for batch in loader for key in batch["row_key"].tolist()])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    epoch, done = loader.seek(4)
    assert (epoch, done) == (1, 1)
    assert [key for batch in loader for key in batch["row_key"].tolist()] == orders[1][4:]


def test_noise_follows_the_pass_when_an_epoch_is_cut_short(tmp_path):
    """Catches a pass inferred from `state.epoch`, which stays behind where a callback ends an epoch early."""

    class CutShort(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    trainer = tiny_trainer(tmp_path, trainer_kwargs={"callbacks": [CutShort()]}, max_steps=4, num_train_epochs=4)
    passes, noise = [], trainer._noise
    trainer._noise = lambda batch, epoch: passes.append(epoch) or noise(batch, epoch)
    trainer.train()
    assert passes == [0, 1, 2, 3][: len(passes)] and len(passes) >= 2


def test_weightless_rows_change_nothing(tmp_path):
    """Catches a repeated or stand-in row that reaches a term, a count or a gradient."""
    trainer = tiny_trainer(tmp_path, teacher=tiny_model(1), loss_normalization="sequence")
    trainer.state.max_steps = 10
    rows = [trainer.train_dataset[index] for index in range(3)]
    results = []
    for given in (rows, [*rows, trainer.data_collator.empty_row()]):
        trainer.model.zero_grad()
        (batch,), _ = trainer.get_batch_samples(iter([trainer.data_collator(given)]), 1, torch.device("cpu"))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        results.append((loss.detach(), tuple(batch.counts), [p.grad.clone() for p in trainer.model.parameters()]))
    assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    alone = trainer._noise(trainer.data_collator([trainer.data_collator.empty_row()]), 0)
    assert not any(int(count) for count in alone.counts)
    assert trainer.compute_loss(trainer.model, replace(alone, counts=Counts(*results[0][1]))) == 0


@pytest.mark.slow
def test_processes_see_each_row_once(tmp_path):
    """Catches streams that hang, lose or double rows over two processes, whatever their shards; and rows of a table
    that are repeated to fill a batch and count: ten rows in steps of eight, five rows to evaluate."""
    runs = []
    for world_size, accumulation in ((1, 1), (2, 2)):
        output = tmp_path / str(world_size)
        output.mkdir()
        script = [str(Path(__file__).parent / "stream_run.py"), str(output), str(world_size), str(accumulation)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29650"]
        subprocess.run([*(launcher if world_size > 1 else [sys.executable]), *script], check=True, timeout=400)
        runs.append(torch.load(output / "result.pt", weights_only=False))
    for results in runs:
        for name in CASES:
            expected = runs[0]["idlm table" if "idlm" in name else "table"]
            assert_close(results[name]["weights"], expected["weights"], rtol=1e-7, atol=1e-9, msg=name)
            for ours, theirs in zip(results[name]["logs"], expected["logs"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5), name
            assert results[name]["metrics"] == pytest.approx(expected["metrics"], rel=1e-6), name

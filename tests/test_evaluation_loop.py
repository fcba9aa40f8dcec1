"""What evaluation reports and predicts, against naive loops over rows and positions; what it does not depend on."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from test_trainer import naive_logits
from tiny import tiny_model, tiny_trainer
from torch.testing import assert_close

from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.diffusion import row_uniforms
from tide_hf.training.measuring import fill_positions

PAIRS = ("12", "34", "56", "78", "89", "01")
NUMBERS = ("loss", "ce", "ce_answer", "distill", "nll_0.3")


def trainer_with_rows(tmp_path, num_rows=6, teacher=None, **options):
    """A trainer that evaluates sorting rows, with fill behind every answer."""
    kwargs = options.pop("trainer_kwargs", {})
    rows = sorting_rows(num_rows, seed=5)
    return tiny_trainer(tmp_path, teacher=teacher, trainer_kwargs={"eval_dataset": rows, **kwargs}, **options)


def across_tokenizers(tmp_path, with_teacher=True, **options):
    """A student that reads digit by digit, and a teacher that reads pairs: chunks of two student tokens."""
    digits, pairs = build_tokenizer(), build_tokenizer(PAIRS)
    kwargs = {"teacher_processing_class": pairs} if with_teacher else {}
    teacher = tiny_model(1, vocab_size=len(pairs)) if with_teacher else None
    options = {"preset": "calm" if with_teacher else "ce", "model": tiny_model(0, vocab_size=len(digits)), **options}
    return trainer_with_rows(
        tmp_path, teacher=teacher, trainer_kwargs={"processing_class": digits, **kwargs}, **options
    )


def masked_rows(trainer, t: float | None = None):
    """Of each evaluated row: clean ids, labels, masked positions and t, drawn a second time, token by token."""
    rows = [trainer.eval_dataset[index] for index in range(len(trainer.eval_dataset))]
    batch = trainer.data_collator(rows)
    uniforms = row_uniforms(trainer.args.seed, None, batch["row_key"].tolist(), batch["labels"].shape[1])
    for row, time, mask in zip(rows, uniforms[0], uniforms[1], strict=True):
        clean, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        drawn = 1e-3 + (1 - 1e-3) * float(time) if t is None else t
        yield clean, labels, (mask[: len(clean)] < drawn) & (labels != -100), drawn


def naive_denoising(trainer) -> dict[str, float]:
    """ce, ce_answer and nll_0.3 by loops over positions."""
    eos, mask_id = build_tokenizer().eos_token_id, trainer.model.config.mask_token_id
    ce = answer = nll = 0.0
    num_trained = num_answer = num_masked = 0
    for t in (None, 0.3):
        for clean, labels, masked, time in masked_rows(trainer, t):
            with torch.no_grad():
                z = naive_logits(trainer.model, torch.where(masked, mask_id, clean), clean, 4)
            end = len(clean)
            while end > 1 and labels[end - 1] == eos == labels[end - 2]:
                end -= 1  # the first EOS of the run ends the answer
            for i in range(len(clean)):
                value = -F.log_softmax(z[i], -1)[clean[i]].item()
                if t is None:
                    num_trained += labels[i] != -100
                    num_answer += labels[i] != -100 and i < end
                    ce += value / time if masked[i] else 0
                    answer += value / time if masked[i] and i < end else 0
                elif masked[i]:
                    nll, num_masked = nll + value, num_masked + 1
    return {
        "eval_ce": float(ce / num_trained),
        "eval_ce_answer": float(answer / num_answer),
        "eval_nll_0.3": nll / num_masked,
    }


@pytest.mark.parametrize("kind", ["alone", "shared", "chunks"])
def test_denoising_numbers_equal_naive_ones(tmp_path, kind):
    """Catches fill counted as answer, masks that a teacher's chunks complete, and weights of another normalisation."""
    options = {"eval_noise_levels": [0.3], "max_length": 32}
    if kind == "chunks":
        trainer = across_tokenizers(tmp_path, **options)
        assert any(ids.count(c) > 1 for ids in trainer.eval_dataset["chunk_ids"] for c in range(7)), "of two tokens"
    else:
        trainer = trainer_with_rows(tmp_path, teacher=tiny_model(1) if kind == "shared" else None, **options)
    expected = naive_denoising(trainer)
    metrics = trainer.evaluate()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert expected["eval_ce"] != pytest.approx(expected["eval_ce_answer"], rel=1e-3), "the rows have fill"


@pytest.mark.parametrize("normalization", ["token", "sequence", "batch"])
def test_denoising_numbers_do_not_depend_on_a_teacher(tmp_path, normalization):
    """Catches eval_ce and eval_nll that differ for the same student because a run has a teacher, and chunks."""
    metrics = [
        across_tokenizers(
            tmp_path / str(with_teacher), with_teacher, eval_noise_levels=[0.3], loss_normalization=normalization
        ).evaluate()
        for with_teacher in (True, False)
    ]
    for name in ("eval_ce", "eval_ce_answer", "eval_nll_0.3"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-6), name
    assert "eval_distill" in metrics[0] and "eval_distill" not in metrics[1]


@pytest.mark.parametrize("normalization", ["expected", "none"])
@pytest.mark.parametrize("chunks", [False, True])
def test_evaluation_of_tidal_stands_still_with_the_weights(tmp_path, chunks, normalization):
    """Catches a held-out loss that follows λ: load_best_model_at_end would take the earliest checkpoint."""
    options = {"preset": "tide-shared", "tidal_normalization": normalization}
    if chunks:
        trainer = across_tokenizers(tmp_path, **options)
    else:
        trainer = trainer_with_rows(tmp_path, teacher=tiny_model(1), **options)
    assert trainer.objective.tidal
    found = []
    for step in (0, 5, 10):
        trainer.state.global_step, trainer.state.max_steps = step, 10
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == found[1] == found[2]


def test_evaluated_distillation_is_the_divergence_to_the_teacher(tmp_path):
    """Catches ω, λ or TIDAL's scale left in the reported divergence: TIDAL reports what forward KL reports."""
    options = {"teacher": tiny_model(1), "comp_demo": False, "ce_weight": 0.5, "distill_weight": 3.0}
    tidal = trainer_with_rows(tmp_path / "a", preset="tide-shared", **options).evaluate()
    plain = trainer_with_rows(tmp_path / "b", preset="kl", **options).evaluate()
    assert tidal["eval_distill"] == pytest.approx(plain["eval_distill"], rel=1e-6)
    assert tidal["eval_loss"] == pytest.approx(0.5 * tidal["eval_ce"] + 3 * tidal["eval_distill"], rel=1e-6)


def test_distillation_keeps_its_completed_chunks(tmp_path):
    """Catches a chunk term of half-masked chunks: a naive CALM over chunks that are masked whole on both sides."""
    trainer = across_tokenizers(tmp_path, max_length=16)
    student, teacher = trainer.model, trainer.teacher
    values = []
    for row, (clean, labels, masked, _) in zip(trainer.eval_dataset, masked_rows(trainer), strict=True):
        chunk, teacher_chunk = torch.tensor(row["chunk_ids"]), torch.tensor(row["teacher_chunk_ids"])
        hit = {int(c) for c in chunk[masked] if c >= 0}
        whole = masked | (torch.tensor([int(c) in hit for c in chunk]) & (labels != -100))
        teacher_clean = torch.tensor(row["teacher_input_ids"])
        hidden = torch.tensor([int(c) in hit for c in teacher_chunk])
        log_p = []
        for network, ids, mask in ((student, clean, whole), (teacher, teacher_clean, hidden)):
            with torch.no_grad():
                z = naive_logits(network, torch.where(mask, network.config.mask_token_id, ids), ids, 4)
            log_p.append(F.log_softmax(z, -1).gather(-1, ids[:, None]).squeeze(-1))
        for c in hit:
            p_s, p_t = (
                float((values_L[chunks == c].sum() / 2.0).exp().clamp(1e-7, 1 - 2.0**-23))
                for values_L, chunks in zip(log_p, (chunk, teacher_chunk), strict=True)
            )
            values.append(-(p_t * math.log(p_s) + (1 - p_t) * math.log1p(-p_s)))
    assert trainer.evaluate()["eval_distill"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_fill_is_what_follows_the_first_eos_of_the_end():
    """Catches an answer's own EOS counted as fill, EOS inside a conversation, and padding."""
    labels = torch.tensor([[-100, 7, 9, 9, 9], [9, 9, 7, 9, -100], [-100, 9, -100, 7, -100], [7, 9, 9, -100, -100]])
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    found = fill_positions(labels, valid, 9).nonzero().tolist()
    assert found == [[0, 3], [0, 4], [3, 2]]
    assert not fill_positions(labels, valid, None).any()


def test_rows_that_weigh_nothing_are_not_counted(tmp_path):
    """Catches a row that only fills a batch counted among the rows, the tokens, or the predictions."""
    plain = trainer_with_rows(tmp_path / "a", teacher=tiny_model(1), eval_noise_levels=[0.3])
    rows = plain.eval_dataset
    empty = rows.select([0, 1]).map(lambda row: {"labels": [-100] * len(row["labels"])})
    empty = empty.cast(rows.features)
    filled = trainer_with_rows(
        tmp_path / "b",
        teacher=tiny_model(1),
        eval_noise_levels=[0.3],
        trainer_kwargs={"eval_dataset": concatenate_datasets([rows, empty])},
    )
    for normalization in ("token", "sequence", "batch"):
        for trainer in (plain, filled):
            trainer.args.loss_normalization = normalization
        one, other = plain.predict(rows), filled.predict(filled.eval_dataset)
        for name in NUMBERS:
            assert other.metrics[f"test_{name}"] == pytest.approx(one.metrics[f"test_{name}"], rel=1e-5), name
        assert len(other.predictions) == len(one.predictions) == 6


# -- predictions ------------------------------------------------------------------------------------------------------


def naive_predictions(trainer):
    """Argmax and true token at the masked positions of each row, −100 elsewhere."""
    width = max(len(ids) for ids in trainer.eval_dataset["input_ids"])
    found = {"predictions": [], "label_ids": []}
    for clean, _, masked, _ in masked_rows(trainer):
        with torch.no_grad():
            noised = torch.where(masked, trainer.model.config.mask_token_id, clean)
            best = naive_logits(trainer.model, noised, clean, 4).argmax(-1)
        for name, values in (("predictions", best), ("label_ids", clean)):
            row = torch.where(masked, values, -100).tolist()
            found[name].append(row + [-100] * (width - len(row)))
    return {name: np.array(rows) for name, rows in found.items()}


def accuracy(predicted) -> dict[str, float]:
    """A metric as people write it, and what it was given."""
    known = predicted.label_ids != -100
    return {"accuracy": float((predicted.predictions == predicted.label_ids)[known].mean())}


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("size", [6, 4])
def test_predictions_equal_naive_ones(tmp_path, monkeypatch, with_teacher, size):
    """Catches predictions of other positions, rows or masks, and labels that do not belong to them."""
    monkeypatch.setattr("tide_hf.training.measuring.SLICE_LOGITS", 64)  # a few positions at a time
    trainer = trainer_with_rows(
        tmp_path,
        teacher=tiny_model(1) if with_teacher else None,
        eos_fill="none",
        per_device_eval_batch_size=size,
        trainer_kwargs={"compute_metrics": accuracy},
    )
    expected = naive_predictions(trainer)
    output = trainer.predict(sorting_rows(6, seed=5))
    assert np.array_equal(output.label_ids, expected["label_ids"])
    assert np.array_equal(output.predictions, expected["predictions"])
    known = expected["label_ids"] != -100
    assert output.metrics["test_accuracy"] == (expected["predictions"] == expected["label_ids"])[known].mean()
    assert trainer.evaluate()["eval_accuracy"] == output.metrics["test_accuracy"]
    assert output.metrics["test_ce"] == pytest.approx(trainer.evaluate()["eval_ce"], rel=1e-6)


def test_logits_are_preprocessed_a_slice_at_a_time(tmp_path, monkeypatch):
    """Catches a preprocess that is never called, is called with all logits at once, or whose result is lost."""
    monkeypatch.setattr("tide_hf.training.measuring.SLICE_LOGITS", 64)
    seen = []

    def preprocess(logits, labels):
        seen.append(tuple(logits.shape))
        return torch.stack([logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1), labels.double()], -1)

    def likelihood(predicted):
        return {"nll": -float(predicted.predictions[..., 0][predicted.label_ids != -100].sum())}

    trainer = trainer_with_rows(
        tmp_path,
        ce_weighting="uniform",
        trainer_kwargs={"preprocess_logits_for_metrics": preprocess, "compute_metrics": likelihood},
    )
    metrics = trainer.evaluate()
    num_trained = sum(label != -100 for row in trainer.eval_dataset["labels"] for label in row)
    assert metrics["eval_nll"] / num_trained == pytest.approx(metrics["eval_ce"], rel=1e-5)
    assert {shape[1] for shape in seen} == {15} and max(shape[0] for shape in seen) <= 4 and len(seen) > 3
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert (
        predictions.shape == (6, 16, 2)
        and (predictions[..., 1] == trainer.predict(trainer.eval_dataset).label_ids).all()
    )
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.sum()
    with pytest.raises(ValueError, match="returned \\(\\); expected a tensor with one entry per position"):
        trainer.evaluate()


def test_nothing_is_predicted_unless_asked_for(tmp_path):
    """Catches logits made for nobody: evaluation without metrics, and prediction_loss_only."""
    calls = []
    kwargs = {"preprocess_logits_for_metrics": lambda logits, labels: calls.append(0) or labels}
    trainer_with_rows(tmp_path, trainer_kwargs=kwargs).evaluate()
    kwargs["compute_metrics"] = accuracy
    metrics = trainer_with_rows(tmp_path, prediction_loss_only=True, trainer_kwargs=kwargs).evaluate()
    assert not calls and "eval_accuracy" not in metrics
    assert "eval_accuracy" in trainer_with_rows(tmp_path, trainer_kwargs=kwargs).evaluate() and calls


@pytest.mark.parametrize(
    "options",
    [
        {"eval_accumulation_steps": 1},
        {"eval_do_concat_batches": False},
        {"batch_eval_metrics": True},
        {"include_for_metrics": ["inputs"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_predictions_are_kept_as_transformers_keeps_them(tmp_path, options):
    """Catches settings of the evaluation loop that are accepted and not read."""
    given, finished = [], []

    def metrics(predicted, compute_result=True):
        given.append(predicted)
        finished.append(compute_result)
        return {"batches": float(len(given))}

    trainer = trainer_with_rows(
        tmp_path, per_device_eval_batch_size=4, trainer_kwargs={"compute_metrics": metrics}, **options
    )
    rows = trainer.eval_dataset
    found = trainer.evaluate()
    plain = naive_predictions(trainer)["label_ids"]
    if options.get("batch_eval_metrics"):
        assert finished == [False, True] and found["eval_batches"] == 2
        assert np.array_equal(torch.cat([part.label_ids for part in given]).numpy(), plain)
        assert trainer.predict(rows).label_ids.shape == plain.shape
        return
    (predicted,) = given
    if options.get("eval_do_concat_batches") is False:
        assert [len(part) for part in predicted.label_ids] == [4, 2]
        assert np.array_equal(np.concatenate(predicted.label_ids), plain)
        return
    assert isinstance(predicted.predictions, np.ndarray) and np.array_equal(predicted.label_ids, plain)
    if "include_for_metrics" in options:
        assert predicted.inputs.tolist() == [ids + [-100] * (16 - len(ids)) for ids in rows["input_ids"]]
    else:
        assert predicted.inputs is None


# -- rows given later -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_teacher", [False, True])
def test_rows_given_later_are_prepared_as_the_constructor_does(tmp_path, with_teacher):
    """Catches raw rows that reach the step, and rows prepared without the teacher's side."""
    teacher = tiny_model(1) if with_teacher else None
    rows, others = sorting_rows(6, seed=5), sorting_rows(5, seed=8)
    trainer = trainer_with_rows(tmp_path, teacher=teacher, trainer_kwargs={"eval_dataset": {"a": rows, "b": others}})
    names = ["loss", "ce", "ce_answer", *(["distill"] if with_teacher else [])]
    own = trainer.evaluate()
    later = trainer.evaluate({"a": rows, "b": others.to_iterable_dataset()})
    single, test = trainer.evaluate(rows), trainer.predict(others).metrics
    for name in names:
        assert own[f"eval_a_{name}"] == later[f"eval_a_{name}"] == single[f"eval_{name}"]
        assert own[f"eval_b_{name}"] == later[f"eval_b_{name}"] == test[f"test_{name}"]
        assert trainer.evaluate("b", metric_key_prefix="x")[f"x_{name}"] == own[f"eval_b_{name}"]
    assert own["eval_a_loss"] != own["eval_b_loss"]
    with pytest.raises(ValueError, match=r"no eval_dataset named 'c'; the constructor was given a, b by name"):
        trainer.evaluate("c")
    for wrong in ([1, 2], rows.to_list()):
        with pytest.raises(ValueError, match=r"has the type list; expected a datasets\.Dataset"):
            trainer.evaluate(wrong)
        with pytest.raises(ValueError, match=r"has the type list; expected a datasets\.Dataset"):
            trainer.evaluate({"a": wrong})
        with pytest.raises(ValueError, match=r"has the type list; expected a datasets\.Dataset"):
            trainer.predict(wrong)


def test_rows_given_later_are_evaluated_with_persistent_workers_too(tmp_path):
    """Catches transformers' cache of data loaders, which takes any rows given later for the first ones."""
    rows, others = sorting_rows(6, seed=5), sorting_rows(5, seed=8)
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    plain = [trainer_with_rows(tmp_path).evaluate(part)["eval_loss"] for part in (rows, others)]
    trainer = trainer_with_rows(tmp_path, **options)
    order = [None, others, rows, others, None]
    found = [trainer.evaluate(part)["eval_loss"] for part in order]
    assert found == [plain[0], plain[1], plain[0], plain[1], plain[0]]


@pytest.mark.slow
def test_streams_evaluate_like_tables(tmp_path):
    """Catches predictions or counts that need a length."""
    trainer = trainer_with_rows(tmp_path, trainer_kwargs={"compute_metrics": accuracy}, per_device_eval_batch_size=4)
    rows = sorting_rows(6, seed=5)
    table, stream = trainer.predict(rows), trainer.predict(rows.to_iterable_dataset())
    assert_close(stream.predictions, table.predictions)
    for name in ("loss", "ce_answer", "accuracy"):
        assert stream.metrics[f"test_{name}"] == pytest.approx(table.metrics[f"test_{name}"], rel=1e-6)


def test_no_rows_and_a_token_beyond_the_embedding(tmp_path):
    """Catches "index out of range in self" deep in the embedding."""
    trainer = trainer_with_rows(tmp_path)
    row = {**trainer.eval_dataset[0]}
    row["input_ids"] = [*row["input_ids"][:-1], 99]
    wrong = Dataset.from_list([row], features=trainer.eval_dataset.features)
    with pytest.raises(ValueError, match=r"the token id 99, and the network's embedding has 15 rows, ids 0 to 14"):
        trainer.evaluate(wrong)

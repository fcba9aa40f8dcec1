"""Every argument of transformers' Trainer is used, or refused by name; so is what is given late, or makes no sense."""

import inspect
from dataclasses import fields

import pytest
import torch
from datasets import Dataset, DatasetDict
from few_step_run import tiny_few_step
from peft import LoraConfig
from tiny import tiny_model, tiny_trainer
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from tide_hf import IDLMConfig, IDLMTrainer, TIDEConfig, TIDETrainer, UniformIDLMTrainer
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.few_step.config import _REFUSED_OPTIMIZERS
from tide_hf.training import arguments

CONFIGS = {"tide": TIDEConfig, "idlm": IDLMConfig}


def config(kind: str, tmp_path, **values):
    """A configuration that suits any machine."""
    return CONFIGS[kind](output_dir=str(tmp_path), use_cpu=True, report_to=[], **values)


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# -- the tables -------------------------------------------------------------------------------------------------------


def listed_once(known: set[str], *tables) -> None:
    """Every name stands in exactly one table."""
    for name in known:
        assert sum(name in table for table in tables) == 1, name


def test_every_training_argument_is_in_the_table():
    """Catches a field of the installed transformers that is accepted and not read."""
    known = {field.name for field in fields(TrainingArguments)}
    tables = (arguments.USED, arguments.IN_PART, arguments.UNUSED, arguments.REFUSED)
    listed_once(known, *tables)
    late = arguments.AT_CONSTRUCTION | arguments.BY_THE_OPTIMIZER | arguments.BY_THE_HUB
    assert late <= known and set().union(*map(set, tables)) <= known, "names that this transformers does not have"
    assert set(TIDEConfig.REFUSED) | set(IDLMConfig.REFUSED) <= arguments.USED | arguments.IN_PART
    parts = set(inspect.signature(AcceleratorConfig).parameters)
    listed_once(parts, arguments.ACCELERATOR_CONFIG_USED, arguments.ACCELERATOR_CONFIG_REFUSED)


def test_every_argument_of_trainer_is_in_the_table():
    """Catches an argument of the installed Trainer, or of its methods, that is accepted and not read."""
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    listed_once(known, arguments.TRAINER_USED, arguments.TRAINER_REFUSED)
    of_methods = set()
    for method in (Trainer.train, Trainer.evaluate, Trainer.predict):
        of_methods |= set(inspect.signature(method).parameters) - {"self"}
    listed_once(of_methods, arguments.METHODS_USED, arguments.METHODS_REFUSED)
    for trainer in (TIDETrainer, IDLMTrainer):
        for name in ("evaluate", "predict"):
            own, theirs = (set(inspect.signature(getattr(cls, name)).parameters) for cls in (trainer, Trainer))
            assert own == theirs or (trainer is IDLMTrainer and name == "predict")


NOT_DEFAULT = {
    "average_tokens_across_devices": False,
    "eval_use_gather_object": True,
    "label_names": ["answers"],
    "length_column_name": "num_tokens",
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "auto_find_batch_size": True,
    "debug": "underflow_overflow",
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "prediction_loss_only": True,
    "batch_eval_metrics": True,
    "include_for_metrics": ["inputs"],
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
}


@pytest.mark.parametrize("kind", ["tide", "idlm"])
def test_refused_training_arguments_are_refused_by_name(tmp_path, kind):
    """Catches a refused field that passes; also where it is assigned after the configuration was made."""
    names = {*arguments.UNUSED, *arguments.REFUSED, *CONFIGS[kind].REFUSED} - arguments.IN_PART
    assert names <= set(NOT_DEFAULT), "the test needs a value for each"
    for name in sorted(names):
        with pytest.raises(ValueError, match=rf"^{name}="):
            config(kind, tmp_path, **{name: NOT_DEFAULT[name]})
        args = config(kind, tmp_path)
        setattr(args, name, NOT_DEFAULT[name])
        make = tiny_trainer if kind == "tide" else tiny_few_step
        trainer = make(tmp_path)
        setattr(trainer.args, name, NOT_DEFAULT[name])
        with pytest.raises(ValueError, match=rf"^{name}="):
            trainer.train()
        with pytest.raises(ValueError, match=rf"^{name}="):
            TIDETrainer(tiny_model(), args=args) if kind == "tide" else IDLMTrainer(tiny_model(), args=args)


def test_a_field_that_the_table_does_not_know_is_refused(tmp_path, monkeypatch):
    """Catches a field of a newer transformers that is accepted and not read."""
    monkeypatch.setattr(arguments, "USED", arguments.USED - {"warmup_steps"})
    config("tide", tmp_path)
    with pytest.raises(ValueError, match=r"warmup_steps=3 is a training argument that this version .* does not know"):
        config("tide", tmp_path, warmup_steps=3)


@pytest.mark.parametrize("name", sorted(arguments.ACCELERATOR_CONFIG_REFUSED))
def test_refused_parts_of_the_accelerator_config(tmp_path, name):
    """Catches settings of accelerate's data loaders that nobody reads, or that hang several processes."""
    value = arguments.ACCELERATOR_CONFIG_REFUSED[name][0]
    with pytest.raises(ValueError, match=rf"accelerator_config\.{name}={value} is refused"):
        config("tide", tmp_path, accelerator_config={name: value})
    config("tide", tmp_path, accelerator_config={"use_seedable_sampler": False})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"include_for_metrics": ["loss"]}, r"include_for_metrics=\['loss'\] is refused"),
        ({"optim_target_modules": ["q_proj"]}, r"optim_target_modules=\['q_proj'\] is only read by the GaLore"),
        ({"parallelism_config": object()}, "parallelism_config is refused"),
    ],
)
def test_values_that_are_read_in_part(tmp_path, values, message):
    """Catches a value of a field that is otherwise read."""
    with pytest.raises(ValueError, match=message):
        config("tide", tmp_path, **values)


@pytest.mark.parametrize("kind", ["tide", "idlm"])
def test_refused_arguments_of_trainer_are_refused_by_name(tmp_path, kind):
    """Catches arguments of Trainer that are accepted and not read."""
    make, cls = (tiny_trainer, TIDETrainer) if kind == "tide" else (tiny_few_step, IDLMTrainer)
    args = make(tmp_path).args
    for name in sorted({*arguments.TRAINER_REFUSED, *cls.REFUSED_ARGUMENTS}):
        value = (object(), None) if name == "optimizers" else object()
        with pytest.raises(ValueError, match=rf"^{cls.__name__} takes no {name}: "):
            cls(tiny_model(), args=args, **{name: value})
        cls(
            tiny_model(),
            args=args,
            processing_class=build_tokenizer(),
            **{name: (None, None) if name == "optimizers" else None},
        )
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokenizer'"):
        cls(tiny_model(), args=args, tokenizer=build_tokenizer())


def test_refused_arguments_of_methods_are_refused_by_name(tmp_path):
    """Catches keys to ignore that nobody ignores, trials that nobody reads, and what IDLM cannot predict."""
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"eval_dataset": sorting_rows(4, seed=5)})
    for call in (
        lambda: trainer.train(trial={"learning_rate": 1.0}),
        lambda: trainer.train(ignore_keys_for_eval=["loss"]),
        lambda: trainer.evaluate(ignore_keys=["loss"]),
        lambda: trainer.predict(sorting_rows(4, seed=5), ignore_keys=["loss"]),
    ):
        with pytest.raises(ValueError, match=r"^(trial|ignore_keys|ignore_keys_for_eval)=.* is refused"):
            call()
    with pytest.raises(ValueError, match="hyperparameter_search needs model_init"):
        trainer.hyperparameter_search()
    with pytest.raises(ValueError, match=r"IDLMTrainer .* has no predictions"):
        tiny_few_step(tmp_path).predict(sorting_rows(4, seed=5))


# -- what the table says is used --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2, "dataloader_in_order": True},
        {"torch_empty_cache_steps": 1, "skip_memory_metrics": False},
        {"full_determinism": False, "data_seed": 42},
        {"logging_nan_inf_filter": False, "eval_delay": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_of_the_machine_change_nothing(tmp_path, options):
    """Catches settings of memory and loading that break the step, or change what is trained."""
    plain = tiny_trainer(tmp_path / "a", teacher=tiny_model(1))
    other = tiny_trainer(tmp_path / "b", teacher=tiny_model(1), **options)
    plain.train()
    other.train()
    assert losses_of(other) == pytest.approx(losses_of(plain), rel=1e-6)
    if "activation_checkpointing" in options:
        assert other.model.is_activation_checkpointing


@pytest.mark.slow
def test_compiled_students_train_alike(tmp_path):
    """Catches a compiled forward that keeps the first batch's objective."""
    plain, other = tiny_trainer(tmp_path), tiny_trainer(tmp_path, torch_compile_backend="eager")
    plain.train()
    other.train()
    assert losses_of(other) == pytest.approx(losses_of(plain), rel=1e-6)


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential", "batch_rebalance"])
def test_sampling_strategies_are_honoured(tmp_path, strategy):
    """Catches an order of rows that is asked for and not used."""
    short, long = sorting_rows(8, seed=3).to_list(), sorting_rows(8, seed=4).to_list()
    rows = Dataset.from_list([row for pair in zip(short, long, strict=True) for row in
                              (pair[0], {"messages": pair[1]["messages"] * 2})])  # fmt: skip
    options = {"train_sampling_strategy": strategy, "gradient_accumulation_steps": 2, "max_length": 32}
    trainer = tiny_trainer(tmp_path, rows=rows, eos_fill="none", max_steps=1, **options)
    lengths, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: lengths.append([len(row["input_ids"]) for row in rows]) or collate(rows)
    trainer.train()
    assert sum(map(len, lengths)) == 16
    all_lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert len(set(all_lengths)) > 1
    if strategy == "sequential":
        assert [length for batch in lengths for length in batch] == all_lengths
    elif strategy == "group_by_length":
        assert lengths[0] == sorted(lengths[0], reverse=True) and lengths[0][0] == max(all_lengths)
    else:
        assert len(lengths[0]) != len(lengths[1]) and len(set(min(lengths, key=len))) == 1, "long rows alone"


def test_evaluation_in_half_precision(tmp_path):
    """Catches bf16_full_eval that is accepted and not read."""
    rows = {"eval_dataset": sorting_rows(6, seed=5)}
    options = {"model": tiny_model(dtype=torch.float32), "trainer_kwargs": rows}
    trainer = tiny_trainer(tmp_path, bf16_full_eval=True, **options)
    found = trainer.evaluate()
    assert trainer.model.dtype == torch.bfloat16
    expected = tiny_trainer(tmp_path, model=tiny_model(dtype=torch.float32).bfloat16(), trainer_kwargs=rows).evaluate()
    assert found["eval_ce"] == expected["eval_ce"]
    exact = tiny_trainer(tmp_path, model=tiny_model(dtype=torch.float32), trainer_kwargs=rows).evaluate()
    assert found["eval_ce"] != exact["eval_ce"] and found["eval_ce"] == pytest.approx(exact["eval_ce"], rel=0.05)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("ce", False), ("eval_nll_0.5", False), ("eval_a_ce_answer", False), ("distill", False), ("accuracy", None)],
)
def test_own_metrics_are_the_smaller_the_better(tmp_path, metric, expected):
    """Catches load_best_model_at_end that keeps the worst checkpoint, for transformers takes "ce" for a score."""
    args = config("tide", tmp_path, metric_for_best_model=metric)
    assert args.greater_is_better is (True if expected is None else expected)
    assert config("tide", tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better


@pytest.mark.slow
def test_the_best_model_is_the_one_with_the_least_ce(tmp_path):
    """Catches a best checkpoint that is not the best: a learning rate that ruins the student after two steps."""
    trainer = tiny_trainer(
        tmp_path, metric_for_best_model="ce", load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, eval_on_start=True, max_steps=4, learning_rate=0.3,
        trainer_kwargs={"eval_dataset": sorting_rows(6, seed=5)},
    )  # fmt: skip
    trainer.train()
    found = {e["step"]: e["eval_ce"] for e in trainer.state.log_history if "eval_ce" in e}
    assert set(found) == {0, 1, 2, 3, 4}
    saved = {step: value for step, value in found.items() if step}
    assert trainer.state.best_metric == min(saved.values())
    assert trainer.evaluate()["eval_ce"] == pytest.approx(min(saved.values()), rel=1e-5)


@pytest.mark.parametrize("kind", ["tide", "idlm"])
def test_input_tokens_are_those_the_student_is_run_on(tmp_path, kind):
    """Catches counts of another network's input, and padding counted as tokens or EOS as padding."""
    make = tiny_trainer if kind == "tide" else tiny_few_step
    counts = {}
    for which in ("all", "non_padding"):
        trainer = make(tmp_path, include_num_input_tokens_seen=which, max_steps=1, seed=1)
        streams, forward = [], trainer.model.model.forward
        trainer.model.model.forward = lambda *a, f=forward, s=streams, **k: (
            s.append(k["input_ids"].shape) or f(*a, **k)
        )
        trainer.train()
        counts[which] = trainer.state.num_input_tokens_seen
        shape = streams[-1]  # the student's last forward is that of its own step
        assert which != "all" or counts["all"] == shape[0] * shape[1]
    assert 0 < counts["non_padding"] < counts["all"]


@pytest.mark.slow
def test_out_of_memory_begins_with_empty_logs(tmp_path):
    """Catches terms of steps that were thrown away in the logs of the run with smaller batches."""
    trainer = tiny_trainer(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=16, learning_rate=0.0)
    compute_loss, failures = trainer.compute_loss, [False, True]

    def fails_once(model, inputs, **kwargs):
        loss = compute_loss(model, inputs, **kwargs)
        if failures and failures.pop(0):
            raise RuntimeError("CUDA out of memory.")
        return loss

    trainer.compute_loss = fails_once
    trainer.train()
    assert not failures and trainer._train_batch_size < 16
    logged = [entry for entry in trainer.state.log_history if "ce" in entry]
    for entry in logged:
        assert entry["ce"] == pytest.approx(entry["loss"], rel=1e-5)


@pytest.mark.parametrize("given", ["optimizers", "optimizer_cls_and_kwargs"])
def test_optimizers_of_the_caller(tmp_path, given):
    """Catches an optimizer that is given and not used, or that holds the frozen base of an adapter."""
    model = tiny_model(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kwargs = {"optimizers": (optimizer, None)}
    if given != "optimizers":
        kwargs = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})}
    trainer = tiny_trainer(tmp_path, model=model, max_steps=1, trainer_kwargs=kwargs)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert trainer.state.log_history[0]["learning_rate"] == 0.5
    if given == "optimizers":
        kwargs = {"optimizers": (optimizer, None), "peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")}
        with pytest.raises(ValueError, match=r"of the optimizer's \d+ parameters are not trained by this run"):
            tiny_trainer(tmp_path, model=model, trainer_kwargs=kwargs)


@pytest.mark.slow
def test_optimizers_that_the_fake_cannot_have(tmp_path):
    """Catches an optimizer that reaches the student alone, and a name that fails once everything is loaded."""
    plain = {"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"}
    assert plain <= {name.value for name in OptimizerNames}
    for name in OptimizerNames:
        if name.value.startswith(_REFUSED_OPTIMIZERS):
            with pytest.raises(ValueError, match=f"The fake cannot be trained with optim='{name.value}'"):
                config("idlm", tmp_path, optim=name.value)
            config("idlm", tmp_path, optim=name.value, fake_optim="sgd")
    for name in plain - {"adamw_torch_fused"}:
        trainer = tiny_few_step(tmp_path, fake_optim=name, max_steps=1)
        trainer.train()
        assert name.replace("adamw_torch", "adamw") in type(trainer.fake_training.optimizer.optimizer).__name__.lower()
    for schedule in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(ValueError, match=f"The fake cannot follow lr_scheduler_type='{schedule}'"):
            config("idlm", tmp_path, fake_lr_scheduler_type=schedule)
    with pytest.raises(ValueError, match="sgdd"):
        config("idlm", tmp_path, fake_optim="sgdd")


@pytest.mark.slow
def test_activation_checkpointing_reaches_the_fake(tmp_path):
    """Catches a setting that saves the memory of one of two networks."""
    plain, other = tiny_few_step(tmp_path), tiny_few_step(tmp_path, gradient_checkpointing=True)
    plain.train()
    other.train()
    assert other.model.is_activation_checkpointing and other.fake.is_activation_checkpointing
    assert losses_of(other) == pytest.approx(losses_of(plain), rel=1e-5, abs=1e-6)


# -- a checkpoint's own settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tide", "idlm"])
def test_a_checkpoint_keeps_its_own_settings(tmp_path, kind):
    """Catches defaults of a run that are written over what a checkpoint says: schedule, blocks, cache, token ids."""
    make = tiny_trainer if kind == "tide" else tiny_few_step
    model = tiny_model(noise_schedule="cosine", use_cache=True, dtype=torch.float32)
    model.generation_config.block_size, model.generation_config.eos_token_id = 8, [3, 4]
    trainer = make(tmp_path / "own", model=model)
    assert trainer.noising.schedule == trainer.objective.schedule == "cosine"
    trainer.train()
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert (saved.config.noise_schedule, saved.config.use_cache, saved.config.block_size) == ("cosine", True, 4)
    assert saved.generation_config.block_size == 8 and {3, 4} <= set(saved.generation_config.eos_token_id)
    assert saved.config.mask_token_id == model.config.mask_token_id

    given = make(tmp_path / "given", model=tiny_model(noise_schedule="cosine"), schedule="linear", block_size=8)
    assert given.model.config.noise_schedule == given.noising.schedule == given.objective.schedule == "linear"
    assert given.model.config.block_size == given.model.generation_config.block_size == 8


@pytest.mark.slow
def test_a_cosine_student_is_trained_with_its_own_weights(tmp_path):
    """Catches an own schedule that reaches the record and not the loss."""
    found = [
        tiny_trainer(tmp_path / str(index), model=tiny_model(noise_schedule=own), schedule=given)
        for index, (own, given) in enumerate([("cosine", None), ("linear", "cosine"), ("linear", None)])
    ]
    for trainer in found:
        trainer.train()
    assert losses_of(found[0]) == losses_of(found[1]) != losses_of(found[2])


def test_a_few_step_student_forgets_other_ways_of_decoding(tmp_path):
    """Catches a student made for two steps that is saved with its teacher's threshold, which would decide instead."""
    model = tiny_model()
    model.generation_config.confidence_threshold, model.generation_config.top_k = 0.9, 5
    settings = tiny_few_step(tmp_path, model=model).model.generation_config
    assert (settings.confidence_threshold, settings.top_k, settings.steps_per_block) == (None, None, 2)


# -- changes after construction ---------------------------------------------------------------------------------------


def changed_run(tmp_path, make, before: dict, after: dict):
    """Losses of a run whose arguments were changed after the trainer was made, and of one that began with them."""
    changed = make(tmp_path / "changed", **before)
    for name, value in after.items():
        setattr(changed.args, name, value)
    changed.train()
    fresh = make(tmp_path / "fresh", **{**before, **after})
    fresh.train()
    return losses_of(changed), losses_of(fresh), changed, fresh


@pytest.mark.slow
@pytest.mark.parametrize(
    "after",
    [
        {"distill_weight": 3.0},
        {"temperature": 1.0},
        {"preset": "kl"},
        {"ce_weight": 0.0},
        {"distill_weight": 0.0},
        {"tidal": False, "divergence": "jsd"},
        {"comp_demo": False},
        {"schedule": "cosine"},
        {"time_epsilon": 0.1},
        {"loss_normalization": "sequence"},
        {"learning_rate": 1e-3},
        {"optim": "sgd"},
        {"weight_decay": 0.5},
        {"per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 2},
        {"max_steps": 2},
        {"lr_scheduler_type": "linear"},
        {"gradient_checkpointing": True},
        {"seed": 7},
    ],
    ids=lambda after: ", ".join(f"{name}={value}" for name, value in after.items()),
)
def test_changed_arguments_are_honoured(tmp_path, after):
    """Catches an argument changed between construction and training that the run does not follow."""

    def make(folder, **options):
        return tiny_trainer(folder, teacher=tiny_model(1), train_sampling_strategy="sequential", **options)

    changed, fresh, trainer, other = changed_run(tmp_path, make, {}, after)
    assert changed == pytest.approx(fresh, rel=1e-6)
    assert trainer.objective == other.objective and trainer.noising == other.noising
    assert trainer.model.is_activation_checkpointing == ("gradient_checkpointing" in after)
    if "schedule" in after:
        assert trainer.model.config.noise_schedule == "cosine"
    assert trainer.run_record.objective == other.run_record.objective
    trainer.create_model_card()
    assert trainer.run_record.objective == trainer.objective.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    "after",
    [
        {"num_steps": 1, "student_times": "grid"},
        {"fake_learning_rate": 1e-4},
        {"fake_steps_per_student_step": 2},
        {"learning_rate": 1e-4},
        {"schedule": "cosine"},
        {"time_epsilon": 0.1},
        {"head_slice_size": 3},
        {"stratified_times": False},
        {"fake_max_grad_norm": 0.1},
    ],
    ids=lambda after: next(iter(after)),
)
def test_changed_arguments_are_honoured_by_both_networks(tmp_path, after):
    """Catches an argument changed before training that the student or the fake does not follow."""
    changed, fresh, trainer, other = changed_run(
        tmp_path, tiny_few_step, {"train_sampling_strategy": "sequential"}, after
    )
    assert changed == pytest.approx(fresh, rel=1e-6, abs=1e-7)
    fakes = [[e["fake_loss"] for e in t.state.log_history if "fake_loss" in e] for t in (trainer, other)]
    assert fakes[0] == pytest.approx(fakes[1], rel=1e-6)
    assert trainer.objective == other.objective
    settings = trainer.model.generation_config
    assert settings.steps_per_block == trainer.args.num_steps
    for name in ("learning_rate", "fake_learning_rate"):
        with pytest.raises(ValueError, match=f"{name} from"):
            setattr(trainer.args, name, 0.5)
            trainer.train()
        setattr(trainer.args, name, trainer._args_before[name])


def test_evaluation_follows_changed_arguments(tmp_path):
    """Catches an evaluation of the objective that was given first."""
    rows = {"eval_dataset": sorting_rows(6, seed=5)}
    trainer = tiny_trainer(tmp_path, teacher=tiny_model(1), trainer_kwargs=rows)
    trainer.evaluate()
    trainer.args.distill_weight, trainer.args.eval_noise_levels = 3.0, [0.25]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_ce"] + 3 * metrics["eval_distill"])
    assert "eval_nll_0.25" in metrics


@pytest.mark.slow
def test_a_second_training_follows_a_changed_learning_rate(tmp_path):
    """Catches an optimizer of the first training that keeps its learning rate."""
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.args.learning_rate = 0.125
    trainer.train()
    assert [e["learning_rate"] for e in trainer.state.log_history if "loss" in e] == [0.125, 0.125]
    given = torch.optim.SGD((model := tiny_model()).parameters(), lr=0.5)
    trainer = tiny_trainer(tmp_path, model=model, trainer_kwargs={"optimizers": (given, None)})
    trainer.args.learning_rate = 0.125
    with pytest.raises(ValueError, match=r"learning_rate from 0\.01 to 0\.125"):
        trainer.train()


@pytest.mark.parametrize("kind", ["tide", "idlm"])
def test_changes_that_cannot_be_honoured_are_refused(tmp_path, kind):
    """Catches a field, of this library or of transformers, whose change after construction is ignored."""
    make, cls = (tiny_trainer, TIDETrainer) if kind == "tide" else (tiny_few_step, IDLMTrainer)
    trainer = make(tmp_path)
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(CONFIGS[kind])} - inherited
    later = {"max_length": 32, "eos_fill": "none", "trained_turns": "last", "block_size": 8, "mask_token_id": 3,
             "alignment": "chunk", "teacher_max_length": 32, "teacher_dtype": "float32", "bf16": True,
             "teacher_context": "native", "shared_vocab_size": 4, "torch_compile": True,
             "push_to_hub": True}  # fmt: skip
    assert own >= cls.LIVE | cls.RESOLVED
    for name, value in later.items():
        if not hasattr(trainer.args, name):
            continue
        before = getattr(trainer.args, name)
        setattr(trainer.args, name, value)
        for call in (trainer.train, lambda: trainer.evaluate(sorting_rows(2, seed=1))):
            with pytest.raises(ValueError, match=f"changed after the trainer was made: {name} from"):
                call()
        setattr(trainer.args, name, before)
    trainer.args.learning_rate = float("nan") if kind == "idlm" else 1e-3
    trainer.args.max_length = 16
    if kind == "tide":
        trainer.args.temperature = -1.0
    with pytest.raises(ValueError, match="is out of range"):
        trainer.train()


def test_distillation_cannot_be_asked_for_without_a_teacher(tmp_path):
    """Catches a changed preset that fails in the step."""
    trainer = tiny_trainer(tmp_path)
    trainer.args.preset = "kl"
    with pytest.raises(ValueError, match="ask for distillation, but this trainer was made without a teacher"):
        trainer.train()


# -- limits -----------------------------------------------------------------------------------------------------------

# field -> values that mean something although they look odd, of which the documentation says what
MEANINGFUL = {
    "suffix_mask_fraction": (0, 0.5),
    "learning_rate": (0,),
    "weight_decay": (0,),
    "max_grad_norm": (0,),
    "warmup_steps": (0,),
    "fake_learning_rate": (0,),
    "fake_weight_decay": (0,),
    "fake_max_grad_norm": (0,),
    "fake_warmup_steps": (0,),
    "ema_decay": (0,),
    "ce_weight": (0,),
    "distill_weight": (0,),
    "lambda_init": (0,),
    "lambda_max": (0,),
    "demo_ratio": (0,),
    "on_policy_fraction": (0,),
    "mask_token_id": (0,),
    "teacher_mask_token_id": (0,),
}


@pytest.mark.parametrize("kind", ["tide", "idlm"])
def test_numbers_without_sense_are_refused(tmp_path, kind):
    """Catches a number that makes no sense, or is none, and reaches the run: every numeric field of our own."""
    numeric = {}
    for cls in CONFIGS[kind].__mro__:
        if cls not in TrainingArguments.__mro__:
            for name, annotation in inspect.get_annotations(cls).items():
                if any(part in str(annotation) for part in ("int", "float")) and not (
                    any(part in str(annotation) for part in ("list", "Literal"))
                ):
                    numeric[name] = str(annotation)
    assert len(numeric) >= 15 and {"max_length", "time_epsilon"} <= set(numeric)
    for name, annotation in numeric.items():
        for value in (-4, -0.5, 0, float("nan"), float("inf"), -float("inf"), "3", True, [1]):
            if value == 0 and value is not True and name in MEANINGFUL and not isinstance(value, (str, list)):
                continue
            with pytest.raises(ValueError, match=name):
                config(kind, tmp_path, **{name: value})
        if "None" not in annotation:
            with pytest.raises(ValueError, match=rf"{name}=None has the type NoneType; expected (int|float)"):
                config(kind, tmp_path, **{name: None})
        for value in MEANINGFUL.get(name, ()):
            assert getattr(config(kind, tmp_path, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tidal": "yes"}, "tidal='yes' has the type str; expected bool or None"),
        ({"comp_demo": 1}, "comp_demo=1 has the type int; expected bool or None"),
        ({"teacher_load_in_4bit": "true"}, "teacher_load_in_4bit='true' has the type str"),
        ({"eval_noise_levels": 0.5}, "eval_noise_levels=0.5 has the type float; expected list or None"),
        ({"eval_noise_levels": ["0.5"]}, "eval_noise_levels must lie in"),
        ({"eval_noise_levels": [0.5, 0.5]}, "two levels under the same name"),
        ({"model_init_kwargs": "dtype=float32"}, "model_init_kwargs='dtype=float32' is not a dictionary"),
        ({"preset": 3}, "preset=3 is not known; choose one of tide-shared"),
        ({"eos_fill": None}, "eos_fill=None is not known; choose one of none, block, end"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, values, message):
    """Catches a value of another type that is true, or equal to something, by accident."""
    with pytest.raises(ValueError, match=message):
        config("tide", tmp_path, **values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "ce", "ce_weight": 0.0}, r"ce_weight=0 and no distillation term"),
        ({"ce_weight": 0.0, "distill_weight": 0.0}, r"ce_weight=0 and no distillation term"),
        ({"lambda_init": 0.0, "lambda_max": 0.0}, "make TIDAL's target the student itself"),
        ({"lambda_max": 0.0, "lambda_axes": "time"}, "make TIDAL's target the student itself"),
        ({"shared_vocab_size": 16}, "shared_vocab_size=16 is more than the 15 ids"),
        ({"teacher_dtype": "bfloat16"}, "teacher_dtype: only used to load a teacher by name"),
        ({"model_init_kwargs": {"dtype": "float32"}}, "the model is given as an instance"),
        ({"eval_strategy": "steps"}, r"eval_strategy='steps' asks for evaluation, but there is no eval_dataset"),
        ({"eval_on_start": True}, "eval_on_start=True asks for evaluation"),
        ({"trainer_kwargs": {"eval_dataset": {}}}, r"eval_dataset=\{\} asks for evaluation"),
        ({"trainer_kwargs": {"processing_class": "gpt2"}}, "processing_class has the type str; expected a tokenizer"),
        (
            {"trainer_kwargs": {"teacher_processing_class": 3}},
            "teacher_processing_class has the type int; expected a tok",
        ),
        ({"model": None, "teacher": 3}, "teacher has the type int; expected a name"),
        ({"rows": [{"text": "1"}]}, r"train_dataset has the type list; expected a datasets\.Dataset .*from_list"),
        (
            {"rows": DatasetDict(train=sorting_rows(2, seed=0))},
            "train_dataset has the type DatasetDict.*: give one of .*'train'",
        ),
        ({"rows": {"a": sorting_rows(2, seed=0)}}, "train_dataset has the type dict.*'a'"),
        ({"rows": torch.utils.data.TensorDataset(torch.ones(2))}, "train_dataset has the type TensorDataset"),
        ({"rows": print}, "positional arguments are in another order than those of transformers"),
        ({"trainer_kwargs": {"eval_dataset": {"x": [1]}}}, r"eval_dataset\['x'\] has the type list"),
    ],
)
def test_what_cannot_train_is_refused(tmp_path, options, message):
    """Catches a run that starts although it cannot train what was asked for, or fails with another library's words."""
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **{"teacher": tiny_model(1), **options})


def test_models_and_arguments_of_another_kind_are_refused(tmp_path):
    """Catches the positional order of Trainer, plain TrainingArguments, and something that is not a model."""
    args = config("tide", tmp_path, preset="ce")
    with pytest.raises(ValueError, match="order is model, teacher, args, train_dataset"):
        TIDETrainer(tiny_model(), args, None, sorting_rows(2, seed=0))
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for cls, wrong in ((TIDETrainer, plain), (IDLMTrainer, plain), (IDLMTrainer, args)):
        with pytest.raises(ValueError, match=f"{cls.__name__} expects args to be a {cls.CONFIG.__name__}"):
            cls(tiny_model(), args=wrong)
    with pytest.raises(ValueError, match="model is a NoneType"):
        TIDETrainer(None, args=args)
    with pytest.raises(ValueError, match="train_dataset has the type DataCollator"):
        IDLMTrainer(tiny_model(), config("idlm", tmp_path), DataCollator())


class DataCollator:
    """What stands third among Trainer's positional arguments."""

    def __call__(self, rows):
        return rows


def test_a_teacher_that_moves_with_the_student_is_refused(tmp_path):
    """Catches a student distilled from itself: the same object, shared tensors, or the base an adapter changes."""
    model = tiny_model(dtype=torch.float32)
    other = tiny_model(1, dtype=torch.float32)
    other.model.embed_tokens.weight = model.model.embed_tokens.weight
    for teacher in (model, other):
        with pytest.raises(ValueError, match="Teacher and student share parameters"):
            tiny_trainer(tmp_path, model=model, teacher=teacher)
    lora = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")}
    with pytest.raises(ValueError, match="Teacher and student share parameters"):
        tiny_trainer(tmp_path, model=model, teacher=model, trainer_kwargs=lora)
    assert all(value.requires_grad for value in model.parameters()), "nothing was frozen on the way"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, side):
    """Catches "index out of range in self": a tokenizer whose ids reach beyond the embedding."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<new>"])
    kwargs = {"processing_class" if side == "student" else "teacher_processing_class": tokenizer}
    with pytest.raises(ValueError, match=rf"The {side}'s tokenizer has the token '<new>' with id 15, .* has 15 rows"):
        tiny_trainer(tmp_path, teacher=tiny_model(1), trainer_kwargs=kwargs)


def test_fields_of_the_other_kind_of_few_step_model_are_refused(tmp_path):
    """Catches settings that one of the two few-step trainers does not read."""
    with pytest.raises(ValueError, match=r"IDLMTrainer does not read input_temperature=0\.5"):
        tiny_few_step(tmp_path, input_temperature=0.5)
    for name, value in (("schedule", "cosine"), ("time_epsilon", 0.1), ("block_size", 4), ("head_slice_size", 8)):
        args = config("idlm", tmp_path, **{name: value})
        with pytest.raises(ValueError, match=f"UniformIDLMTrainer does not read {name}="):
            UniformIDLMTrainer(tiny_model(), args)


def test_reports_of_datasets_do_not_overwrite_one_another(tmp_path):
    """Catches an eval_dataset named "train" whose report stands in the card as that of the training rows."""
    rows = {"train": sorting_rows(3, seed=1), "b": sorting_rows(2, seed=2)}
    reports = tiny_trainer(tmp_path, trainer_kwargs={"eval_dataset": rows}).preparation_reports
    assert {name: report.num_rows for name, report in reports.items()} == {"train": 16, "eval_train": 3, "b": 2}


def test_callbacks_see_the_rows_that_are_evaluated(tmp_path):
    """Catches callbacks that are given no data loader, and events that do not fire."""
    seen = []

    class Watch(TrainerCallback):
        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            seen.append(eval_dataloader)

        def on_predict(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["test_ce"])

    trainer = tiny_trainer(tmp_path, trainer_kwargs={"callbacks": [Watch()]})
    trainer.predict(sorting_rows(4, seed=1))
    assert len(seen) == 2 and seen[0] is not None
    assert_close(torch.tensor(seen[1]), torch.tensor(trainer.evaluate(sorting_rows(4, seed=1))["eval_ce"]))

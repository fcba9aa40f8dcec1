"""IDLMTrainer: transformers.Trainer that turns a diffusion LM into a few-step student by inverse distillation.

Trainer's own loop trains the student. Before each of its steps the fake network takes its updates, on the same rows
with noise of their own.
"""

import math
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data import DistillationCollator
from ..diffusion import Record, row_uniforms
from ..models.generation_config_tide import RULE_FIELDS
from ..training.arguments import BY_THE_OPTIMIZER, changed_since, refuse_changes, refuse_unread
from ..training.base import DiffusionTrainer, load_student, pad_token_id
from ..training.nonfinite import StepGuard
from ..training.plan import RunPlan, resolve_plan
from .config import IDLMConfig, InverseObjective
from .fake import FakeTraining
from .networks import WeightAverage, restore, three_networks, total_weight, trained, whole
from .noising import ByRow, Draws, InverseNoising, stratified_times
from .step import InverseStep

logger = logging.get_logger(__name__)
STATE_FILE = "few_step_state.pt"
OF_THE_FAKES_OPTIMIZER = frozenset({"fake_learning_rate", "fake_optim", "fake_weight_decay"})


class IDLMTrainer(DiffusionTrainer):
    """Distils a masked diffusion LM into a student that needs fewer denoising steps (IDLM, arXiv 2602.19066).

    Full-sequence and block students; prompts stay clean, the loss is over answer positions, and a block's prefix is
    the row's own text. What is saved is the moving average of the student, or the student (`save_weights`); its
    generation config decodes as the student was trained to: `num_steps` calls, random order, temperature 1.

    Args:
        model (`str` or `PreTrainedModel`): the diffusion LM that becomes teacher, fake and student: an instance, a Hub
            name or a folder.
        args ([`IDLMConfig`], *optional*): all settings.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`): rows as [`TIDETrainer`] takes them.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the tokenizer; from `model` by default.
        peft_config (`peft.PeftConfig`, *optional*): trains two adapters over one frozen base, which is the teacher.
        kwargs: callbacks; other arguments of [`~transformers.Trainer`] would reach only one of the two networks, or
            neither, and are refused.

    Attributes:
        teacher, fake (`PreTrainedModel`): the other two networks; `model` is the student.
        fake_training ([`FakeTraining`]): the fake's optimizer, schedule and wrapped network.
        plan ([`~tide_hf.training.plan.RunPlan`]): what the run feeds its networks, and its objective.
        ema ([`WeightAverage`], *optional*): from the start of training on.

    Raises:
        ValueError: for a combination that cannot train, with what to do.
    """

    CONFIG = IDLMConfig
    LIVE = DiffusionTrainer.LIVE | {
        *("stratified_times", "fake_steps_per_student_step", "ema_decay", "save_weights"),
        *("fake_lr_scheduler_type", "fake_warmup_steps", "fake_max_grad_norm", *OF_THE_FAKES_OPTIMIZER),
    }
    RESOLVED = frozenset(
        {"schedule", "time_epsilon", "num_steps", "student_times", "input_temperature", "head_slice_size"}
    )
    UNREAD = {"input_temperature": "the inputs of a masked model are tokens"}  # noqa: RUF012
    REFUSED_ARGUMENTS = {  # noqa: RUF012
        **dict.fromkeys(
            ("compute_metrics", "preprocess_logits_for_metrics"),
            "it evaluates losses between three networks and has no predictions; score the answers that the student "
            "generates",
        ),
        **dict.fromkeys(
            ("optimizers", "optimizer_cls_and_kwargs"),
            "it would reach the student alone; set optim, optim_args and the fake_… fields for both networks",
        ),
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: IDLMConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        args = IDLMConfig() if args is None else args
        self._check_given(args, kwargs, train_dataset, eval_dataset)
        model, processing_class, revision = load_student(model, args, processing_class)
        self._refuse_other_diffusion_types(model)
        config, decide = model.config, partial(self._decide_objective, args)
        plan = resolve_plan(args, config, processing_class, decide=decide)
        self._configure_student(model, args, processing_class, plan)
        self.noising, self.inverse = self._make_step(plan, config, args)
        model, self.fake, self.teacher = three_networks(model, peft_config, revision, args.seed)
        self.fake_training, self.ema = FakeTraining(self.fake, args), None
        self._fake_batches = []  # noised, one list of micro-batches per update
        set_seed(args.seed)
        super().__init__(
            model,
            args,
            plan,
            train_dataset,
            eval_dataset,
            data_collator=DistillationCollator(pad_token_id(processing_class), vocab_size=config.vocab_size),
            processing_class=processing_class,
            **kwargs,
        )
        self._refuse_engines()
        self.teacher.to(self.args.device)
        self.fake.to(self.args.device)
        self.add_callback(_AverageWeights(self))

    def _configure_student(self, model, args, tokenizer, plan: RunPlan) -> None:
        """Also lets it decode as it is trained to."""
        super()._configure_student(model, args, tokenizer, plan)
        settings = model.generation_config
        # whatever its start was decoded with
        for name in (*RULE_FIELDS, "editing_threshold", "max_editing_steps", "top_k", "top_p"):
            setattr(settings, name, None)
        settings.steps_per_block, settings.remasking = args.num_steps, "random"
        settings.temperature, settings.do_sample = 1.0, True

    @staticmethod
    def _decide_objective(args, alignment: str, schedule: str) -> InverseObjective:
        """What the run optimises."""
        names = {field.name for field in fields(InverseObjective)} - {"schedule"}
        return InverseObjective(schedule=schedule, **{name: getattr(args, name) for name in names})

    def _resolve_again(self) -> None:
        """Makes plan, noise and step again from changed arguments."""
        model = self.accelerator.unwrap_model(self.model)
        refuse_unread(self.args, self.UNREAD, type(self).__name__)
        self.plan = replace(self.plan, schedule=self.args.schedule or self.plan.schedule)
        self._configure_student(model, self.args, self.processing_class, self.plan)
        self.noising, self.inverse = self._make_step(self.plan, model.config, self.args)

    def _honour_changes(self) -> None:
        changed = changed_since(self.args, self._args_before)
        if self.fake_training.optimizer is not None:
            refuse_changes(changed & (OF_THE_FAKES_OPTIMIZER | BY_THE_OPTIMIZER), self.args, self._args_before)
        super()._honour_changes()
        if changed:
            objective = self._decide_objective(self.args, self.plan.alignment, self.plan.schedule)
            self._take(replace(self.plan, objective=objective), self.args)

    def _make_step(self, plan: RunPlan, config, args) -> tuple[InverseNoising, InverseStep]:
        """What noises a micro-batch, and what computes its two losses."""
        grid = args.num_steps if args.student_times == "grid" else None
        noising = InverseNoising(plan.student, plan.schedule, args.time_epsilon, grid)
        return noising, InverseStep(config.mask_token_id, args.head_slice_size, plan.student.causal)

    def _refuse_engines(self) -> None:
        """Refuses engines that cannot run two optimizers here."""
        kind, plugin = self.accelerator.distributed_type, getattr(self.accelerator.state, "fsdp_plugin", None)
        if kind == DistributedType.DEEPSPEED:
            raise ValueError(
                "DeepSpeed runs one network and one optimizer per engine, but inverse distillation trains two: use "
                "FSDP (fsdp_version: 2) to shard, or plain data parallelism."
            )
        if kind == DistributedType.FSDP and plugin.fsdp_version != 2:
            raise ValueError("Inverse distillation shards with FSDP2: set fsdp_version: 2 in the accelerate config.")
        if kind == DistributedType.FSDP and isinstance(self.fake, PeftModel):
            raise ValueError(
                "Two adapters and the teacher share the tensors of one base, which FSDP would shard for only one of "
                "them: train adapters with plain data parallelism, or whole networks (no peft_config) with FSDP."
            )

    # -- one step -----------------------------------------------------------------------------------------------------

    def _noise(self, batch, epoch: int | None, update: int, times: dict | None = None) -> Record:
        """One micro-batch, noised by draws keyed by (seed, epoch, row, update of the step)."""
        keys = batch["row_key"].tolist()
        draws = Draws.of_rows(self.args.seed, epoch, keys, batch["labels"].shape[1], update)
        if times is not None:
            draws = Draws(**{**vars(draws), **{name: values[keys] for name, values in times.items()}})
        return self.noising(batch, draws)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Noises all micro-batches of a step, for the fake's updates and last for the student's."""
        batches = self._next_batches(epoch_iterator, num_batches)
        if not batches:
            return [], None
        local = [key for batch in batches for key in batch["row_key"][(batch["labels"] != -100).any(1)].tolist()]
        everywhere = gather_object(local) if self.accelerator.num_processes > 1 else local
        num_rows = torch.tensor(float(max(len(everywhere), 1)))
        noised = []
        for update in range(self.args.fake_steps_per_student_step + 1):
            times = self._times(self._pass, everywhere, update) if self.args.stratified_times else None
            made = [self._noise(batch, self._pass, update, times) for batch in batches]
            noised.append([replace(batch, num_rows=num_rows) for batch in made])
        *self._fake_batches, student_batches = noised
        return student_batches, len(everywhere)

    def _times(self, epoch: int, row_keys: list[int], update: int) -> dict:
        """Evenly spread times for the rows of a global batch."""
        names = ("student_time", "time")
        draws = [row_uniforms(self.args.seed, epoch, row_keys, 0, stream=2 * update + i)[0] for i in range(2)]
        return {name: ByRow(row_keys, stratified_times(uniform)) for name, uniform in zip(names, draws, strict=True)}

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Updates the fake before the first micro-batch of a step; then trains the student."""
        updates, self._fake_batches = self._fake_batches, []
        for batches in updates:
            model.train()
            self.fake_training.update(batches, partial(self._fake_loss, model))
        return super().training_step(model, inputs, num_items_in_batch)

    def _fake_loss(self, model, batch) -> torch.Tensor:
        """L(f, q): the sum over the rows of a micro-batch, divided by the number of rows of the global batch."""
        batch = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            return self.inverse.fake_loss(model, self.fake_training.wrapped, batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """L(f*, q) − L(f, q): the sum over these rows, divided by the number of rows of the global batch."""
        loss = self.inverse.student_loss(model, self.teacher, self.fake_training.wrapped, inputs)
        loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _row_terms(self, batch):
        """L(f*, q) − L(f, q) per row."""
        batch = self._prepare_inputs(batch)
        networks = self.model_wrapped, self.teacher, self.fake_training.wrapped
        return {"loss": self.inverse.student_loss(*networks, batch, by_row=True)}

    def _fake_row_terms(self, batch):
        """L(f, q) per row."""
        batch = self._prepare_inputs(batch)
        networks = self.model_wrapped, self.fake_training.wrapped
        return {"fake_loss": self.inverse.fake_loss(*networks, batch, by_row=True)}

    def _weights_of_checkpoint(self):
        """Also the average and the fake."""
        parts = {"student": super()._weights_of_checkpoint(), "average": self.ema.average}
        parts["fake"] = trained(self.accelerator.unwrap_model(self.fake_training.wrapped))
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def log(self, logs, start_time=None):
        """Adds the fake's loss and gradient norm, means over its updates since the last log, and its learning rate."""
        if "loss" in logs:
            logs |= self.fake_training.pop_logs()
        elif "train_loss" in logs and self.fake_training.guard is not None:
            self.fake_training.guard.settle()
        super().log(logs, start_time)

    # -- set-up and resume --------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if self.args.gradient_checkpointing:
            self._checkpoint_activations_of_the_fake()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.fake_training.prepare(self.accelerator, max_steps, set(self.get_decay_parameter_names(self.fake)))
        fake = trained(self.accelerator.unwrap_model(self.fake_training.wrapped))
        self.fake_training.guard = StepGuard(self, "fake", fake, self.fake_training.optimizer, self._fake_row_terms)
        self.ema = WeightAverage(self.accelerator.unwrap_model(self.model), self.args.ema_decay)
        if resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint) / STATE_FILE)
        return prepared

    def _checkpoint_activations_of_the_fake(self) -> None:
        """As Trainer does for the student."""
        kwargs = dict(self.args.gradient_checkpointing_kwargs or {})
        parts = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
        enable = getattr(self.fake, "activation_checkpointing_enable", self.fake.gradient_checkpointing_enable)
        enable(kwargs or None, **parts)

    def _save_optimizer_and_scheduler(self, output_dir):
        """Also saves what Trainer does not: fake, its optimizer and schedule, the student and its average."""
        super()._save_optimizer_and_scheduler(output_dir)
        state = {
            "teacher_weight": total_weight(self.teacher),
            "student": whole(trained(self.accelerator.unwrap_model(self.model))),
            "ema": whole(self.ema.average),
            **self.fake_training.state_dict(),
        }
        if self.args.should_save:
            torch.save(state, Path(output_dir) / STATE_FILE)

    def _load_state(self, path: Path) -> None:
        """Resumes where a checkpoint was written.

        Raises:
            ValueError: if the checkpoint was not written by this trainer, or belongs to other networks.
        """
        if not path.is_file():
            raise ValueError(
                f"{path.parent} holds no {path.name}, so fake, student and average cannot be resumed: it was written "
                "by another trainer, or with save_only_model=True. Give a checkpoint of IDLMTrainer."
            )
        saved = torch.load(path, map_location="cpu", weights_only=True)
        weight = total_weight(self.teacher)
        if not math.isclose(weight, saved["teacher_weight"], rel_tol=1e-6):
            raise ValueError(
                f"The checkpoint {path.parent} was distilled from another teacher (its weights sum to "
                f"{saved['teacher_weight']:.8g}, this one's to {weight:.8g}): resume with the model the run started "
                "from."
            )
        restore(self.ema.weights, saved["student"], "student")
        restore(self.ema.average, saved["ema"], "average")
        self.fake_training.load_state_dict(saved)

    # -- saving -------------------------------------------------------------------------------------------------------

    def _saved_weights(self):
        """Inside, the student holds the weights to be saved and evaluated."""
        averaged = self.ema is not None and self.args.save_weights == "ema"
        return self.ema.applied() if averaged else nullcontext()

    def save_model(self, output_dir=None, _internal_call=False):
        """Saves the moving average of the student, or the student, as `args.save_weights` says."""
        with self._saved_weights():
            super().save_model(output_dir, _internal_call)

    def _load_best_model(self):
        """Drops the average: the best checkpoint already holds the weights to be saved."""
        super()._load_best_model()
        self.ema = None

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def predict(self, *args, **kwargs):
        """Refused: there are only losses, no predictions."""
        raise ValueError(
            "IDLMTrainer evaluates losses between three networks and has no predictions: evaluate(rows) gives the "
            "losses of any rows, and model.generate writes answers."
        )

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Means over rows, in nats, for the weights that are saved, under the same noise at every evaluation.

        Metrics: `loss`, L(f*, q) − L(f, q): 0 where the student's distribution is the teacher's, as far as the fake
        knows it; and `fake_loss`, L(f, q).
        """
        student = self.model_wrapped if self.ema is not None else self.model.to(self.args.device)
        fake = self.fake_training.wrapped
        modes = [(network, network.training) for network in (student, fake)]
        totals, num_rows = 0.0, 0
        self.callback_handler.eval_dataloader = dataloader
        with self._saved_weights():
            for network, _ in modes:
                network.eval()
            for batch in self._evaluation_batches(dataloader):
                # a row that only fills a batch, or stands in for a missing one, has no trained-on token
                counts_B = (batch["labels"] != -100).any(1).to(self.args.device)
                noised = replace(self._noise(batch, None, 0), num_rows=torch.ones(()))
                noised = self._prepare_inputs(noised)
                losses = [
                    self.inverse.student_loss(student, self.teacher, fake, noised, by_row=True),
                    self.inverse.fake_loss(student, fake, noised, by_row=True),
                ]
                rows = self.accelerator.gather(torch.stack(losses, 1))[self.accelerator.gather(counts_B)]
                totals, num_rows = totals + rows.double().sum(0), num_rows + len(rows)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        for network, was_training in modes:
            network.train(was_training)
        metrics = dict(zip(("loss", "fake_loss"), (totals / max(num_rows, 1)).tolist(), strict=True))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_rows)


class _AverageWeights(TrainerCallback):
    """Adds the student's weights after each optimizer step to their average."""

    def __init__(self, trainer: IDLMTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.ema.update(self.trainer.guard.bad)

"""Trainers of autoregressive models: each is refused with the reason, and a denoising loss of one's own is not."""

import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_fine_tuning import LORA, plain_trainer, random_rows, stack
from tiny import tiny_model
from transformers import AutoModelForCausalLM, Trainer
from uniform_run import tiny_uniform

from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.models.refusals import RefusesNextTokenTrainers

MASK = build_tokenizer().mask_token_id
SETTINGS = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
}
CHAT = sorting_rows(8, seed=1)
PROMPTS = Dataset.from_list([{"prompt": row["messages"][:1]} for row in CHAT])
PAIRS = Dataset.from_list(
    [{"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": row["messages"][1:]} for row in CHAT]
)
JUDGED = Dataset.from_list(
    [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "label": index % 2 == 0}
        for index, row in enumerate(CHAT)
    ]
)
GENERATING = {"num_generations": 4, "max_completion_length": 4}
REWARD = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
# name -> module, rows, configuration, further arguments
TRAINERS = {
    "GRPO": ("trl", PROMPTS, GENERATING, REWARD),
    "RLOO": ("trl", PROMPTS, GENERATING, REWARD),
    "DPO": ("trl", PAIRS, {}, {}),
    "KTO": ("trl", JUDGED, {}, {}),
    "Distillation": ("trl", PROMPTS, {}, {"teacher_model": None}),
    "CPO": ("trl.experimental.cpo", PAIRS, {}, {}),
    "ORPO": ("trl.experimental.orpo", PAIRS, {}, {}),
    "GKD": ("trl.experimental.gkd", CHAT, {"lmbda": 0.0, "max_length": 32}, {"teacher_model": None}),
    "OnlineDPO": ("trl.experimental.online_dpo", PROMPTS, {}, REWARD),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved student: some trainers load their reference by its name."""
    path = tmp_path_factory.mktemp("student")
    tiny_model(dtype=torch.float32).save_pretrained(path)
    return str(path)


def build(name: str, folder: str, tmp_path, model=None):
    """One of TRL's trainers around a student."""
    module, rows, settings, further = TRAINERS[name]
    module = importlib.import_module(module)
    further = {key: tiny_model(dtype=torch.float32) if value is None else value for key, value in further.items()}
    return getattr(module, f"{name}Trainer")(
        AutoModelForCausalLM.from_pretrained(folder) if model is None else model,
        args=getattr(module, f"{name}Config")(str(tmp_path), **SETTINGS, **settings),
        train_dataset=rows,
        processing_class=build_tokenizer(),
        **further,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(TRAINERS))
def test_trl_trainers_are_refused_when_they_are_built(name, folder, tmp_path):
    """Catches a student that is trained as if autoregressive, or refused after minutes and for another reason."""
    with pytest.raises(ValueError, match=r"scores the tokens of its input.*diffusion LM.*TIDETrainer"):
        build(name, folder, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["CPO", "ORPO", "GKD", "DPO", "KTO"])
def test_their_losses_are_refused_too(name, folder, tmp_path, monkeypatch):
    """Catches the same of a trainer that does not say its name, as those of other libraries."""
    monkeypatch.setattr(RefusesNextTokenTrainers, "add_model_tags", lambda *_: None)
    with pytest.raises(ValueError, match=r"input without a \[MASK\]|scores the next token"):
        build(name, folder, tmp_path).train()


def test_an_adapter_hides_nothing(folder, tmp_path):
    """Catches a student that is not recognised under PEFT's wrapper."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM", **LORA))
    with pytest.raises(ValueError, match="TRL's cpo trainer"):
        build("CPO", folder, tmp_path, adapted)


def tags_of_trl() -> dict[str, str]:
    """Name of every trainer of the installed TRL -> its own tag."""
    names = ["trl.trainer", *(f"trl.{module.name}" for module in pkgutil.iter_modules(trl.__path__))]
    for package in ("trl.trainer", "trl.experimental"):
        path = importlib.import_module(package).__path__
        names += [f"{package}.{module.name}" for module in pkgutil.iter_modules(path)]
    found = {}
    for name in names:
        try:
            module = importlib.import_module(name)
        except Exception:  # needs a package that is not installed
            continue
        for key in dir(module):
            tags = getattr(getattr(module, key, None), "_tag_names", None)
            if isinstance(tags, list) and "trl" in tags:
                found[key] = [tag for tag in tags if tag != "trl"]
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", [tiny_model(), tiny_uniform()], ids=["masked", "uniform"])
def test_every_trainer_of_the_installed_trl_is_known(model):
    """Catches a new trainer of TRL that a student would take for SFT's."""
    found = tags_of_trl()
    assert {"SFTTrainer", "GRPOTrainer", "GKDTrainer", "RewardTrainer"} <= found.keys()
    for name, tags in found.items():
        if tags == ["sft"]:
            model.add_model_tags(["trl", *tags])
            continue
        assert tags, name
        with pytest.raises(ValueError, match=f"TRL's {tags[0]} trainer"):
            model.add_model_tags(["trl", *tags])
    model.add_model_tags("diffusion")
    assert "diffusion" in model.model_tags
    model.accepts_foreign_loss = True
    model.add_model_tags(["trl", "grpo"])


# ---- a plain Trainer ----


def test_label_smoothing_is_refused(tmp_path):
    """Catches labels that a plain Trainer keeps to itself: the student learns to copy, at a loss that looks fine."""
    model = tiny_model(dtype=torch.float32)
    trainer = plain_trainer(model, random_rows(32, seed=5), tmp_path, max_steps=1, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"input without a \[MASK\].*smoothed labels.*TIDETrainer"):
        trainer.train()


def test_a_loss_function_of_others_is_refused(tmp_path):
    """Catches the same through compute_loss_func."""
    trainer = plain_trainer(tiny_model(dtype=torch.float32), random_rows(32, seed=5), tmp_path, max_steps=1)
    trainer.compute_loss_func = lambda outputs, labels, **_: F.cross_entropy(
        outputs.logits.flatten(0, 1), labels.flatten()
    )
    with pytest.raises(ValueError, match=r"input without a \[MASK\]"):
        trainer.train()


# ---- what is left alone ----


def own_loss(model, ids, masked):
    """A denoising loss as a user writes it."""
    logits = model(torch.where(masked, MASK, ids)).logits
    nll = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return (nll * masked).sum() / masked.numel()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_denoising_loss_of_the_users_own_passes(checkpointing):
    """Catches a refusal of honest work: also where the draw happened to mask nothing."""
    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, 10, (2, 8), generator=torch.Generator().manual_seed(0))
    for masked in (ids > 4, torch.zeros_like(ids, dtype=torch.bool)):
        model.zero_grad()
        own_loss(model, ids, masked).backward()
        gradient = model.lm_head.weight.grad
        assert gradient.isfinite().all() and gradient.any() == masked.any()


def test_reading_and_probing_a_student_pass():
    """Catches a refusal in eval mode, without gradients, without a mask id, and where the user insists."""
    ids = torch.randint(0, 10, (2, 8), generator=torch.Generator().manual_seed(0))
    model = tiny_model()
    model.eval()(ids).logits.logsumexp(-1).sum().backward()
    with torch.no_grad():
        assert not model.train()(ids).logits.requires_grad
    assert model(ids).logits.requires_grad, "never scored"
    scored = model(ids).logits.logsumexp(-1).sum()
    with pytest.raises(ValueError, match="without a"):
        scored.backward()
    model.accepts_foreign_loss = True
    model(ids).logits.logsumexp(-1).sum().backward()


def test_the_way_out_of_sft_remains(tmp_path):
    """Catches SFTTrainer's tags refused, with which the documented subclass would go."""
    model = tiny_model(dtype=torch.float32)
    model.add_model_tags(["trl", "sft"])
    assert model.model_tags == ["trl", "sft"]
    batch = stack(random_rows(2, seed=1))
    assert Trainer.compute_loss(plain_trainer(model, [], tmp_path), model.train(), batch).requires_grad

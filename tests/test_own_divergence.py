"""A divergence of a user's own, given to the trainer or put into the package as one file."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import Hellinger, tiny_model, tiny_trainer
from torch.testing import assert_close

import tide_hf
from tide_hf.losses import Divergence, parameter

PACKAGE = Path(tide_hf.__file__).parent


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def own(tmp_path, objective=None, **options):
    kwargs = {"objective": Hellinger() if objective is None else objective, **options.pop("trainer_kwargs", {})}
    return tiny_trainer(tmp_path, teacher=tiny_model(1), trainer_kwargs=kwargs, **options)


def test_it_is_what_trains(tmp_path):
    """Catches a given divergence that the preset's hides: the logged term is the equation, by hand."""
    trainer = own(tmp_path, Hellinger(factor=3.0), max_steps=1, comp_demo=False, temperature=1.0)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    noised = trainer._noise(batch, 0)
    with torch.no_grad():
        outputs = trainer._run_student(trainer.model, noised, trainer.objective)
    teacher = trainer.signal.logits(trainer.signal.hidden(noised.teacher))
    found = []

    def head_fn(hidden, weight):
        found.append(hidden.flatten(0, 1)[noised.student.asked] @ weight.T)
        return hidden.sum(), None

    from tide_hf.training.base import run_packed

    run_packed(trainer.model, noised.student, head_fn)
    expected = 0.0
    for student_z, teacher_z in zip(found[0][: len(teacher)], teacher, strict=True):
        overlap = (student_z.softmax(-1).sqrt() * teacher_z.softmax(-1).sqrt()).sum()
        expected += 3.0 * (1 - overlap.item()) / len(teacher)
    assert float(outputs.terms["distill"].sum()) == pytest.approx(expected, rel=1e-6) != 0


@pytest.mark.slow
def test_it_trains_under_accumulation_and_as_an_adapter(tmp_path):
    """Catches a divergence summed per micro-batch, and one that only whole models train with."""
    whole = own(tmp_path / "whole", per_device_train_batch_size=8)
    parts = own(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    adapter = own(tmp_path / "adapter", trainer_kwargs={"peft_config": lora}, learning_rate=0.1)
    for trainer in (whole, parts, adapter):
        trainer.train()
    assert logged(whole, "distill") == pytest.approx(logged(parts, "distill"), rel=1e-5)
    for ours, theirs in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    moved = [value for name, value in adapter.model.named_parameters() if "lora_B" in name]
    assert all((value != 0).any() for value in moved)


def test_it_stands_in_the_objective_and_the_card(tmp_path):
    """Catches a run whose card names the preset's divergence, and parameters that are not shown."""
    trainer = own(tmp_path, Hellinger(factor=3.0))
    objective = trainer.objective.to_dict()
    assert (objective["divergence"], objective["Hellinger_factor"]) == ("Hellinger", 3.0)
    assert not objective["tidal"] and objective["comp_demo"], "TIDAL has to be asked for, the teacher's views do not"
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "Hellinger_factor" in card and "forward_kl" not in card


def test_tidal_asks_for_a_forward_divergence(tmp_path):
    """Catches a mixed target under a divergence that it suppresses."""

    @dataclass(frozen=True)
    class Forward(Hellinger):
        direction = "forward"

    with pytest.raises(ValueError, match="forward divergences only, and 'Hellinger' is symmetric"):
        own(tmp_path, tidal=True)
    trainer = own(tmp_path, Forward(), tidal=True, max_steps=1)
    trainer.train()
    assert trainer.objective.tidal and logged(trainer, "distill")[0] > 0


@dataclass(frozen=True)
class _Total(Divergence):
    def values(self, log_student, log_target):
        return (log_student - log_target).abs().sum()


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("forward_kl", {}, "chosen by name, with divergence="),
        (Hellinger, {}, "is not a tide_hf.losses.Divergence: give an instance"),
        (Hellinger(), {"divergence": "jsd"}, "and divergence='jsd' both choose the divergence"),
        (Hellinger(), {"alignment": "chunk"}, "'Hellinger' compares token distributions"),
        (_Total(), {}, "'_Total' was given log-probabilities of shape .* and returned"),
        (Divergence(), {}, r"does not define values\(log_student, log_target\)"),
    ],
)
def test_what_cannot_train_is_refused(tmp_path, objective, options, message):
    """Catches a wrong object that is ignored, two answers to one question, and a value that is already summed."""
    trained = (ValueError, NotImplementedError)
    with pytest.raises(trained, match=message):
        own(tmp_path, objective, **options).train()


def test_parameters_out_of_range_are_refused():
    """Catches a divergence that divides by zero in the first step."""
    with pytest.raises(ValueError, match=r"Hellinger: factor=0.0 must lie in \(0, inf\)"):
        Hellinger(factor=0.0)

    @dataclass(frozen=True)
    class Free(Divergence):
        shift: float = 0.0
        power: float = parameter(1.0, "its power", 0, 4)

    assert Free(shift=-2.0).to_dict() == {"Free_shift": -2.0, "Free_power": 1.0}


NEW_FILE = '''
from dataclasses import dataclass

from ..divergence import Divergence, parameter


@dataclass(frozen=True)
class Alpha(Divergence):
    """Amari's α-divergence."""

    name = "alpha"
    order: float = parameter(0.5, "α of the α-divergence", 0, 1)

    def values(self, log_student, log_target):
        mixed = (self.order * log_target + (1 - self.order) * log_student).exp().sum(-1)
        return (1 - mixed) / (self.order * (1 - self.order))
'''
SCRIPT = """
import sys
from pathlib import Path
from trl import TrlParser
from tide_hf import TIDEConfig
from tiny import tiny_model, tiny_trainer

folder = sys.argv[1]
flags = ["--divergence", "alpha", "--alpha_order", "0.3", "--output_dir", folder, "--use_cpu", "true"]
(args,) = TrlParser((TIDEConfig,)).parse_args_and_config(flags)
assert (args.divergence, args.alpha_order) == ("alpha", 0.3), args
try:
    TIDEConfig(output_dir=folder, use_cpu=True, alpha_order=1.5)
except ValueError as error:
    assert "alpha_order=1.5 is out of range" in str(error), error
else:
    raise AssertionError("out of range")
trainer = tiny_trainer(
    folder, teacher=tiny_model(1), divergence="alpha", alpha_order=0.3, tidal=False, max_steps=1
)
trainer.train()
assert any(entry.get("distill", 0) > 0 for entry in trainer.state.log_history)
trainer.save_model()
card = Path(folder, "README.md").read_text()
assert "`alpha_order` | 0.3" in card and "| alpha |" in card, card
"""


@pytest.mark.slow
def test_a_new_divergence_is_one_file(tmp_path):
    """Catches a second place that has to know a divergence: one file in a copy of the package is a flag with a checked
    parameter, trains, and stands in the card."""
    shutil.copytree(PACKAGE, tmp_path / "tide_hf", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tide_hf" / "losses" / "divergences" / "alpha.py").write_text(NEW_FILE)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    # where the script runs comes first on its path
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

"""TIDEConfig and presets: what the paper's table says, what is refused and how, and the way through a command line."""

import dataclasses
import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from transformers import HfArgumentParser, TrainingArguments

from tide_hf import IDLMConfig, TIDEConfig
from tide_hf.commands.distill import parse_arguments
from tide_hf.losses import DIVERGENCES
from tide_hf.training.config import REGISTRIES, declared_types
from tide_hf.training.presets import PRESETS, resolve_objective, with_teacher

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tmp_path):
    """Builds a TIDEConfig that suits any machine."""

    def build(**values):
        return TIDEConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **values)

    return build


# -- presets ----------------------------------------------------------------------------------------------------------

# TIDE 2604.26951, table of hyperparameters, written out a second time
PAPER = {
    "temperature": 2.0,
    "lambda_init": 0.1,
    "lambda_max": 0.9,
    "lambda_growth": "cosine",
    "lambda_axes": "both",
    "timestep_weight": "midrange",
    "demo_ratio": 0.5,
    "ce_weight": 1.0,
    "distill_weight": 1.0,
    "tidal_normalization": "none",
    "tidal_scale": 1.0,
}


@pytest.mark.parametrize(
    ("preset", "alignment", "divergence", "tidal", "comp_demo"),
    [
        ("tide-shared", "token", "forward_kl", True, True),
        ("tide-shared", "chunk", "calm", True, True),
        ("tide-cross", "token", "reverse_kl", False, False),
        ("tide-cross", "chunk", "reverse_calm", False, False),
        ("kl", "token", "forward_kl", False, False),
        ("reverse-kl", "token", "reverse_kl", False, False),
        ("calm", "token", "calm", False, False),
        ("calm", "chunk", "calm", False, False),
        ("ce", "token", "none", False, False),
        ("ce", "chunk", "none", False, False),
    ],
)
def test_presets_equal_the_papers_table(config, preset, alignment, divergence, tidal, comp_demo):
    """Catches a preset that trains something else than the paper under the paper's name."""
    objective = resolve_objective(config(preset=preset), alignment).to_dict()
    expected = {"divergence": divergence, "tidal": tidal, "comp_demo": comp_demo, "alignment": alignment, **PAPER}
    assert {name: objective[name] for name in expected} == expected
    assert objective["schedule"] == "linear" and objective["ce_weighting"] == "schedule"
    assert resolve_objective(config(preset=preset), alignment).distills == (preset != "ce")


def test_default_is_the_papers_shared_run(config):
    """Catches another default objective, block or length for those who set nothing."""
    default = config()
    assert (default.preset, default.alignment, default.max_length, default.eos_fill) == (
        "tide-shared",
        "auto",
        512,
        "block",
    )
    assert default.remove_unused_columns is False


@pytest.mark.parametrize(
    "given",
    [
        {"divergence": "jsd", "tidal": False, "jsd_beta": 0.3},
        {"tidal": False},
        {"comp_demo": False},
        {"ce_weight": 0.0},
        {"distill_weight": 0.0},
        {"temperature": 1.0},
        {"lambda_init": 0.0},
        {"lambda_max": 0.0},
        {"lambda_growth": "linear"},
        {"lambda_axes": "time"},
        {"timestep_weight": "uniform"},
        {"demo_ratio": 0.0},
        {"schedule": "cosine"},
        {"ce_weighting": "uniform"},
        {"loss_normalization": "sequence"},
    ],
    ids=lambda given: ", ".join(f"{name}={value}" for name, value in given.items()),
)
def test_a_given_field_wins_over_the_preset(config, given):
    """Catches values that are false or 0 taken for "not given", and neighbours changed with them."""
    plain = resolve_objective(config(), "token").to_dict()
    changed = resolve_objective(config(**given), "token").to_dict()
    assert changed == plain | given != plain


def test_fields_alone_make_an_objective(config):
    """Catches preset=None falling back to some preset."""
    objective = resolve_objective(config(preset=None, divergence="jsd"), "token")
    assert (objective.preset, objective.divergence, objective.tidal) == (None, DIVERGENCES["jsd"](), False)
    with pytest.raises(ValueError, match=r"no preset is given.*divergence set: one of forward_kl"):
        resolve_objective(config(preset=None), "token")


def test_zero_weight_needs_no_teacher(config):
    """Catches a teacher loaded and run for a term of weight 0."""
    assert not resolve_objective(config(distill_weight=0.0), "token").distills


def test_ce_turns_tidal_and_compdemo_off(config):
    """Catches CompDemo's two teacher passes, or TIDAL's λ in the logs, without any distillation."""
    objective = resolve_objective(config(preset="ce", tidal=True, comp_demo=True), "token")
    assert (objective.tidal, objective.comp_demo, objective.distills) == (False, False, False)


def test_fields_without_a_part_in_the_objective_are_named(config, monkeypatch):
    """Catches a λ, a β or a temperature that is given and silently plays no part."""
    heard = []
    monkeypatch.setattr("tide_hf.training.presets.logger.warning", heard.append)
    resolve_objective(config(), "token")
    resolve_objective(config(preset="kl", temperature=3.0, tidal=False), "token")
    assert not heard
    resolve_objective(config(preset="kl", lambda_init=0.5, jsd_beta=0.3, demo_ratio=0.1), "token")
    assert all(text in heard[0] for text in ("lambda_init=0.5", "jsd_beta=0.3", "demo_ratio=0.1", "not used"))
    resolve_objective(config(preset="ce", tidal=True, temperature=3.0), "token")
    assert "tidal=True" in heard[1] and "temperature=3.0" in heard[1]


def test_expected_normalization_divides_by_the_average_strength(config):
    """Catches TIDAL at a twelfth of KL's strength where weight 1 was promised to mean the same."""
    objective = resolve_objective(config(tidal_normalization="expected"), "token")
    assert objective.tidal_scale == pytest.approx(1 / 0.0856, rel=1e-3)
    uniform = resolve_objective(config(tidal_normalization="expected", timestep_weight="uniform"), "token")
    assert 1 < uniform.tidal_scale < objective.tidal_scale, "the average is computed from the run's own settings"
    assert resolve_objective(config(preset="kl", tidal_normalization="expected"), "token").tidal_scale == 1


# -- refusals ---------------------------------------------------------------------------------------------------------


# every field with choices, written out a second time
KNOWN = {
    "preset": "tide-shared, tide-cross, kl, reverse-kl, calm, ar-kl, ar-calm, ce",
    "alignment": "auto, token, chunk",
    "divergence": "forward_kl, jsd, reverse_kl, bernoulli_reverse_kl, calm, reverse_calm, none",
    "ar_targets": "exact, all, annealed",
    "lambda_growth": "linear, cosine",
    "lambda_axes": "both, progress, time",
    "timestep_weight": "midrange, uniform",
    "tidal_normalization": "none, expected",
    "schedule": "linear, cosine",
    "ce_weighting": "schedule, uniform",
    "chunk_weighting": "paper, exact",
    "loss_normalization": "token, sequence, batch",
    "eos_fill": "none, block, end",
    "trained_turns": "all, last",
    "nonfinite": "stop, skip",
    "teacher_context": "paper, native",
    "teacher_dtype": "auto, float32, bfloat16, float16",
    "student_times": "uniform, grid",
    "save_weights": "ema, student",
    "rollout_states": "visited, random_mask",
    "rollout_order": "confidence, left_to_right",
}
# what else a field with choices needs to be read
NEEDED = {name: {"on_policy_fraction": 0.5} for name in ("rollout_states", "rollout_order")}
CONFIGS = (TIDEConfig, IDLMConfig)
CHOICES = [
    (cls, name)
    for cls in CONFIGS
    for name, kind in declared_types(cls).items()
    if any(get_origin(part) is Literal for part in (kind, *get_args(kind)))
]
each_choice = pytest.mark.parametrize(("cls", "name"), CHOICES, ids=lambda value: getattr(value, "__name__", value))


def test_the_fields_with_choices_are_known():
    """Catches a field of choices that the tests below pass over, since it is declared as any text."""
    assert {name for _, name in CHOICES} == set(KNOWN)


@each_choice
def test_unknown_choice_names_the_known_ones(cls, name, tmp_path):
    """Catches a typing error that trains something else, or fails only once everything is loaded."""
    values = {"output_dir": str(tmp_path), "use_cpu": True, **NEEDED.get(name, {})}
    with pytest.raises(ValueError) as error:
        cls(**values, **{name: "tidal"})
    assert str(error.value) == f"{name}='tidal' is not known; choose one of {KNOWN[name]}."
    args = cls(**values)
    setattr(args, name, "tidal")
    with pytest.raises(ValueError, match=f"{name}='tidal' is not known"):
        args.check()
    for choice in KNOWN[name].split(", "):
        assert getattr(cls(**values, **{name: choice}), name) == choice


@each_choice
@pytest.mark.parametrize("way", ["flag", "file"])
def test_unknown_choice_is_one_line_of_a_command_line(cls, name, way, tmp_path):
    """Catches a traceback, or a usage of two hundred flags, for a typing error on a command line or in a file."""
    path, needed = tmp_path / "run.yaml", NEEDED.get(name, {})
    lines = "".join(f"{field}: {value}\n" for field, value in needed.items()) + "use_cpu: true\n"
    flags = [part for field, value in needed.items() for part in (f"--{field}", str(value))]
    path.write_text(f"{name}: tidal\n{lines}")
    given = ["--use_cpu", *flags, f"--{name}", "tidal"] if way == "flag" else ["--config", str(path)]
    with pytest.raises(SystemExit) as stopped:
        parse_arguments("outputs", given, cls)
    message = stopped.value.code
    assert "\n" not in message and name in message and "'tidal'" in message
    assert all(choice in message for choice in KNOWN[name].split(", "))
    good = KNOWN[name].split(", ")[-1]
    path.write_text(f"{name}: {good}\n{lines}")
    given = ["--use_cpu", *flags, f"--{name}", good] if way == "flag" else ["--config", str(path)]
    assert getattr(parse_arguments("outputs", given, cls).training, name) == good


@pytest.mark.parametrize("name", sorted(REGISTRIES))
def test_a_registry_counts_as_it_stands(name, tmp_path, monkeypatch):
    """Catches choices frozen when the package was imported: what a program has added since would be refused."""
    monkeypatch.setitem(REGISTRIES[name][0], "mine", None)
    args = TIDEConfig(output_dir=str(tmp_path), use_cpu=True, **{name: "mine"})
    assert getattr(args, name) == "mine"
    args.check()
    assert getattr(parse_arguments("x", ["--use_cpu", f"--{name}", "mine"]).training, name) == "mine"
    with pytest.raises(ValueError, match=r"choose one of .*, mine\b"):
        TIDEConfig(output_dir=str(tmp_path), use_cpu=True, **{name: "yours"})


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs", "lr_scheduler_kwargs"])
def test_broken_json_names_its_field(name, config):
    """Catches "Expecting property name enclosed in double quotes", of which nobody knows which flag is meant."""
    with pytest.raises(ValueError, match=rf"{name}='{{dtype: 3}}' is not valid JSON: Expecting property name"):
        config(**{name: "{dtype: 3}"})


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("temperature", (0.0, -1.0, float("nan"), float("inf")), (0.1, 5.0)),
        ("ce_weight", (-0.1,), (0.0, 3.0)),
        ("distill_weight", (-0.1,), (0.0, 3.0)),
        ("lambda_init", (-0.1, 1.1), (0.0, 1.0)),
        ("lambda_max", (-0.1, 1.1), (0.0, 1.0)),
        ("demo_ratio", (-0.1, 1.1), (0.0, 1.0)),
        ("jsd_beta", (0.0, 1.0), (0.5,)),
        ("time_epsilon", (0.0, 1.0), (1e-3,)),
    ],
)
def test_numbers_out_of_range_are_refused(config, name, bad, good):
    """Catches NaN losses and silent sign changes from a number that makes no sense, and ends refused by mistake."""
    for value in bad:
        with pytest.raises(ValueError, match=rf"{name}={value} is out of range; it must lie in [\[(]"):
            config(**{name: value})
    for value in good:
        assert getattr(config(**{name: value}), name) == value


@pytest.mark.parametrize("level", [0.0, -0.1, 1.01])
def test_evaluation_noise_levels_out_of_range_are_refused(config, level):
    """Catches an evaluation of nothing (no position masked), reported as 0 nats."""
    with pytest.raises(ValueError, match=rf"eval_noise_levels must lie in \(0, 1\], got {level}"):
        config(eval_noise_levels=[0.5, level])
    assert config(eval_noise_levels=[0.5, 1.0]).eval_noise_levels == [0.5, 1.0]


@pytest.mark.parametrize("block_size", [33, 0, -8, 1024])
def test_block_that_does_not_fit_is_refused(config, block_size):
    """Catches full rows whose last block is shorter than any block the student will generate."""
    with pytest.raises(
        ValueError, match=rf"block_size={block_size} does not fit max_length=512.*multiple of the block size"
    ):
        config(block_size=block_size)
    assert config(block_size=32).block_size == 32


def test_removing_columns_is_refused(config):
    """Catches row_key, which keys the noise, dropped before the step."""
    with pytest.raises(ValueError, match=r"remove_unused_columns=True would drop row_key"):
        config(remove_unused_columns=True)


@pytest.mark.parametrize("divergence", ["reverse_kl", "reverse_calm", "bernoulli_reverse_kl"])
def test_tidal_with_a_reverse_objective_is_refused(config, divergence):
    """Catches an objective that suppresses its own self-selection late in training."""
    alignment = "token" if divergence == "reverse_kl" else "chunk"
    values = {"tidal": True, "divergence": divergence}
    with pytest.raises(ValueError, match=rf"forward divergences only, and '{divergence}' is reverse.*\(1−λ\) share"):
        resolve_objective(config(**values), alignment)
    ablation = config(**values, allow_reverse_tidal=True)
    if divergence == "reverse_calm":
        assert resolve_objective(ablation, alignment).tidal
    else:
        with pytest.raises(ValueError, match="forward divergences only"):
            resolve_objective(ablation, alignment)


def test_tidal_with_jsd_is_refused(config):
    """Catches a combination for which no target is defined."""
    with pytest.raises(ValueError, match="forward divergences only, and 'jsd' is symmetric"):
        resolve_objective(config(divergence="jsd"), "token")


@pytest.mark.parametrize("values", [{"preset": "kl"}, {"preset": "reverse-kl"}, {"divergence": "forward_kl"}])
def test_token_divergence_across_tokenizers_is_refused(config, values):
    """Catches distributions over two different vocabularies compared id by id."""
    with pytest.raises(ValueError, match=r"bernoulli_reverse_kl, calm, reverse_calm\.$"):
        resolve_objective(config(**values), "chunk")


# -- the way through files and command lines --------------------------------------------------------------------------

CHANGED = {
    "preset": "calm",
    "tidal": False,
    "temperature": 3.0,
    "eval_noise_levels": [0.1, 0.9],
    "model_init_kwargs": {"dtype": "bfloat16"},
    "block_size": 16,
    "learning_rate": 1e-3,
}


def test_configuration_survives_json(config):
    """Catches fields lost or changed between the run and the file that describes it."""
    before = config(**CHANGED)
    after = TIDEConfig(**json.loads(before.to_json_string()))
    names = [field.name for field in dataclasses.fields(TIDEConfig) if field.init]
    assert {name: before.to_dict()[name] for name in names} == {name: after.to_dict()[name] for name in names}
    assert {name: getattr(after, name) for name in CHANGED} == CHANGED
    for preset in PRESETS:
        assert TIDEConfig(**json.loads(config(preset=preset).to_json_string())).preset == preset


def test_every_knob_has_one_help_text():
    """Catches a flag that `--help` does not explain."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field for field in dataclasses.fields(TIDEConfig) if field.name not in inherited]
    assert len(own) > 30
    assert [field.name for field in own if not field.metadata.get("help")] == []


def test_flags_are_parsed(tmp_path):
    """Catches flags of another type than their field, above all optional booleans, lists and JSON."""
    flags = ["--preset", "tide-shared", "--tidal", "false", "--comp_demo", "true", "--temperature", "1.5", "--use_cpu"]
    flags += ["--eval_noise_levels", "0.1", "0.5", "--teacher_load_in_4bit", "--lambda_growth", "linear"]
    flags += ["--teacher_model_init_kwargs", '{"attn_implementation": "eager"}', "--mask_token_id", "7"]
    flags += ["--output_dir", str(tmp_path)]
    (parsed,) = HfArgumentParser(TIDEConfig).parse_args_into_dataclasses(flags)
    values = (parsed.tidal, parsed.comp_demo, parsed.temperature, parsed.eval_noise_levels, parsed.mask_token_id)
    assert values == (False, True, 1.5, [0.1, 0.5], 7)
    assert parsed.teacher_load_in_4bit is True and parsed.lambda_growth == "linear"
    assert parsed.teacher_model_init_kwargs == {"attn_implementation": "eager"}
    assert parsed.distill_weight is None and parsed.block_size is None


@pytest.fixture
def yaml_config(tmp_path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model_name_or_path: {tmp_path}
teacher_model_name_or_path: {tmp_path}
preset: calm
temperature: 3
time_epsilon: 1e-2
tidal: false
eval_noise_levels: [0.25, 1.0]
teacher_model_init_kwargs: {{attn_implementation: eager}}
use_cpu: true
learning_rate: 1e-3
max_steps: 7
output_dir: from_yaml
test_split_size: 0.5
datasets:
  - path: {tmp_path}
    split: train[:10%]
  - path: {tmp_path}
    answer_contains: python
"""
    )
    return path


def test_flags_win_over_the_file(yaml_config, tmp_path):
    """Catches a YAML file that overrides the command line, and its numbers and lists kept as text."""
    flags = ["--config", str(yaml_config), "--temperature", "5", "--max_steps=9"]
    arguments = parse_arguments("default", flags)
    training = arguments.training
    assert (training.preset, training.temperature, training.max_steps) == ("calm", 5.0, 9)
    assert (training.time_epsilon, training.learning_rate, training.tidal) == (0.01, 1e-3, False)
    assert training.eval_noise_levels == [0.25, 1.0]
    assert training.teacher_model_init_kwargs == {"attn_implementation": "eager"}
    assert training.output_dir == "from_yaml"
    assert arguments.model.model_name_or_path == arguments.script.teacher_model_name_or_path == str(tmp_path)
    parts = [(part.path, part.split, part.answer_contains) for part in arguments.mixture.datasets]
    assert parts == [(str(tmp_path), "train[:10%]", None), (str(tmp_path), "train", "python")]
    assert arguments.mixture.test_split_size == 0.5
    assert arguments.given == {"config", "temperature", "max_steps"}


def test_recipe_names_its_default_folder():
    """Catches runs of different recipes that write into one folder."""
    assert parse_arguments("outputs/here", ["--use_cpu"]).training.output_dir == "outputs/here"
    assert parse_arguments("outputs/here", ["--use_cpu", "--output_dir", "x"]).training.output_dir == "x"


def test_misspelled_setting_of_a_file_is_refused(tmp_path):
    """Catches a setting of a YAML file that nobody reads."""
    path = tmp_path / "run.yaml"
    path.write_text("temprature: 3\nuse_cpu: true\n")
    with pytest.raises(SystemExit, match="temprature"):
        parse_arguments("outputs", ["--config", str(path)])


# hyperparameters of TIDE (arXiv 2604.26951): file -> alignment, teacher, its length, divergence, TIDAL
CONFIGS_FOLDER = ROOT / "recipes" / "configs"
PAPER_RUNS = {
    "wedlm_to_qwen3": ("token", "tencent/WeDLM-8B-Instruct", 768, "forward_kl", True),
    "llada2_to_qwen3": ("chunk", "inclusionAI/LLaDA2.0-mini", 1024, "reverse_calm", False),
}


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_shipped_files_are_the_papers_runs(name, monkeypatch):
    """Catches a recipe's file that no longer parses, or that trains with another setting than the paper."""
    path = CONFIGS_FOLDER / f"{name}.yaml"
    monkeypatch.setattr("tide_hf.commands.distill.require_available", lambda models, datasets: None)
    arguments = parse_arguments("outputs", ["--config", str(path), "--bf16", "false", "--use_cpu"])
    alignment, teacher, teacher_length, divergence, tidal = PAPER_RUNS[name]
    training, objective = arguments.training, resolve_objective(arguments.training, alignment)
    assert arguments.model.model_name_or_path == "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"
    assert arguments.script.teacher_model_name_or_path == teacher
    assert (training.learning_rate, training.num_train_epochs) == (5e-5, 10)
    assert (training.max_length, training.teacher_max_length, training.block_size) == (512, teacher_length, 32)
    assert "bf16: true" in path.read_text().splitlines() and training.teacher_context == "paper"
    assert (objective.divergence.name, objective.tidal, objective.comp_demo) == (divergence, tidal, tidal)
    assert (objective.ce_weight, objective.distill_weight, objective.temperature) == (1, 1, 2)
    assert (objective.lambda_init, objective.lambda_max, objective.demo_ratio) == (0.1, 0.9, 0.5)
    assert {part.path.split("/")[0] for part in arguments.mixture.datasets} == {
        "allenai",
        "HuggingFaceTB",
        "OpenCoder-LLM",
    }


def test_the_run_with_an_autoregressive_teacher_is_one_that_may_start(monkeypatch):
    """Catches a file that names a combination which the library refuses, and one that looks as if it had been run."""
    monkeypatch.setattr("tide_hf.commands.distill.require_available", lambda models, datasets: None)
    path = CONFIGS_FOLDER / "qwen3_8b_to_qwen3_0.6b.yaml"
    training = parse_arguments("outputs", ["--config", str(path), "--bf16", "false", "--use_cpu"]).training
    objective = with_teacher(resolve_objective(training, "token"), training, autoregressive=True)
    assert (objective.on_policy_fraction, training.rollout_order) == (0.5, "left_to_right")
    assert (training.rollout_initial_tokens, training.rollout_max_new_tokens) == (100, 4000)
    assert (objective.temperature, training.learning_rate, training.block_size) == (1.0, 1e-5, 4)
    assert path.read_text().startswith("# Not run here")
    assert {*PAPER_RUNS, path.stem} == {file.stem for file in CONFIGS_FOLDER.glob("*.yaml")}

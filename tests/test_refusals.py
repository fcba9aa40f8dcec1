"""What a user can get wrong at every entry point: one line that names it, no traceback."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tiny import tiny_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from tide_hf.commands.refusals import refusing
from tide_hf.data import DataError
from tide_hf.demo.sorting import build_tokenizer, sorting_rows

RECIPES = Path(__file__).parents[1] / "recipes"
RUN = {"dataset_name": "{rows}", "output_dir": "{out}", "max_steps": "1", "max_length": "16", "report_to": "none"}
STUDENT = {"model_name_or_path": "{student}", **RUN}
TEACHER = {"teacher_model_name_or_path": "{teacher}"}
PREPARE = {name: value for name, value in STUDENT.items() if name not in ("max_steps", "report_to")}
# entry point -> its flags, which `broken` ones replace; None: its value stands alone
ENTRY_POINTS = {
    "chat": {"chat": None, "model": "{student}", "device": "cpu"},
    "dense_teacher": {**STUDENT, **TEACHER, "use_cpu": "true"},
    "moe_teacher": {**STUDENT, **TEACHER, "use_cpu": "true"},
    "sft_student": {**STUDENT, "use_cpu": "true"},
    "finetune_lora": {**STUDENT, "use_cpu": "true"},
    "few_step": {**STUDENT, "use_cpu": "true"},
    "prepare_data": {**PREPARE, **TEACHER},
    "export": {"model_name_or_path": "{student}", "output_dir": "{out}"},
    "convert_ar": {"model": "{autoregressive}", "folder": "{out}"},
    "show_denoising": {"model": "{student}"},
}
POSITIONAL = {"chat", "model", "folder"}
# a name that is not a model these commands can take -> what the line has to say
MODELS = {
    "/not/there": "'/not/there' is neither a folder nor a name on the Hub",
    "{empty}": "empty' holds no config.json",
    "{rows}": "rows.jsonl' holds no config.json",
    "nobody/nothing": "HF_HUB_OFFLINE is set and the model nobody/nothing is neither a local path nor in the cache",
    "{autoregressive}": "qwen3|Qwen3ForCausalLM|an autoregressive teacher reads the clean text",
    "{broken_config}": "broken_config/config.json' is not a valid JSON file",
    "{unknown_type}": "whatever",
    "{broken_weights}": "A file of weights cannot be read",
    "{no_weights}": "no file named model.safetensors.*no_weights",
    "{no_tokenizer}": "tokenizer",
}
# combinations in which nothing is wrong: preparation reads no weights, conversion is for autoregressive models (and
# refuses the broken ones, which are students, earlier)
TAKEN = {("prepare_data", given) for given in ("{broken_weights}", "{no_weights}", "{autoregressive}")}
TAKEN |= {
    ("convert_ar", given) for given in ("{autoregressive}", "{broken_weights}", "{no_weights}", "{no_tokenizer}")
}
# the same code as dense_teacher from here on
ALIKE = ("moe_teacher", "sft_student", "finetune_lora")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Good and broken models and rows, by the names that flags above stand for."""
    root = tmp_path_factory.mktemp("refusals")
    paths = {name: root / name for name in ("student", "teacher", "autoregressive", "empty")}
    for seed, name in enumerate(("student", "teacher")):
        tiny_model(seed=seed, hidden=16, dtype=torch.float32).save_pretrained(paths[name])
        build_tokenizer().save_pretrained(paths[name])
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=len(build_tokenizer()), num_hidden_layers=1, head_dim=8, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(paths["autoregressive"])
    build_tokenizer().save_pretrained(paths["autoregressive"])
    paths["empty"].mkdir()
    for name in ("broken_config", "unknown_type", "broken_weights", "no_weights", "no_tokenizer"):
        paths[name] = Path(shutil.copytree(paths["student"], root / name))
    (paths["broken_config"] / "config.json").write_text("{")
    (paths["unknown_type"] / "config.json").write_text('{"model_type": "whatever"}')
    (paths["broken_weights"] / "model.safetensors").write_bytes(b"nothing")
    (paths["no_weights"] / "model.safetensors").unlink()
    for file in paths["no_tokenizer"].glob("*token*"):
        file.unlink()
    for name, content in (
        ("rows", "".join(json.dumps(row) + "\n" for row in sorting_rows(8, seed=1))),
        ("broken_rows", '{"messages": [}\n'),
        ("other_columns", '{"question": "1", "answer": "2"}\n'),
        ("chosen", '{"chosen": "1", "rejected": "2"}\n'),
        ("no_answers", '{"messages": [{"role": "user", "content": "1"}]}\n'),
    ):
        paths[name] = root / f"{name}.jsonl"
        paths[name].write_text(content)
    for name, content in (("no_mapping", "- 1\n"), ("no_yaml", "a: [\n"), ("bad_part", "datasets: [{pth: x}]\n")):
        paths[name] = root / f"{name}.yaml"
        paths[name].write_text(content)
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def line(folders, tmp_path, monkeypatch, capsys):
    """Starts an entry point with flags changed; the line it ends with."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(RECIPES))
    named = {**folders, "out": str(tmp_path / "out")}

    def run(name: str, **changed: str) -> str:
        words = []
        for flag, value in {**ENTRY_POINTS[name], **changed}.items():
            words += [] if flag in POSITIONAL else [f"--{flag}"]
            words += [flag if value is None else named.get(value.strip("{}"), value)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        module = "tide_hf.commands.chat" if name == "chat" else name
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(module).main()
        message = stopped.value.code
        if message == 2:  # argparse's own, of the entry points with few flags
            message = capsys.readouterr().err.strip().splitlines()[-1]
        assert isinstance(message, str) and message and "\n" not in message, message
        return message

    return run


def of_models():
    """Each entry point with each model that it cannot take."""
    for name, flags in ENTRY_POINTS.items():
        for flag in ("model", "model_name_or_path", "teacher_model_name_or_path"):
            for given, said in MODELS.items() if flag in flags else ():
                if (name, given) not in TAKEN and (name not in ALIKE or given in list(MODELS)[:5]):
                    yield pytest.param(name, flag, given, said, id=f"{name}-{flag}-{given.strip('{}/')}")


@pytest.mark.parametrize(("name", "flag", "given", "said"), list(of_models()))
def test_a_wrong_model(name, flag, given, said, line):
    """Catches a traceback, and the Hub's words about the letters of a repository's name for a mistyped path."""
    assert re.search(said, line(name, **{flag: given}))


@pytest.mark.parametrize("name", ["dense_teacher", "few_step", "prepare_data"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"dataset_name": "not_there.jsonl"}, "'not_there.jsonl' is neither a file or folder nor a name on the Hub"),
        ({"dataset_name": "nobody/nothing"}, "the dataset nobody/nothing is neither"),
        ({"dataset_name": "{student}"}, "student cannot be read"),
        ({"dataset_name": "{no_yaml}"}, "no_yaml.yaml ends in '.yaml'; expected one of .jsonl"),
        ({"dataset_name": "{broken_rows}"}, "broken_rows.jsonl cannot be read as a dataset"),
        ({"dataset_name": "{other_columns}"}, "has the columns question, answer; expected 'messages'"),
        ({"dataset_name": "{chosen}"}, "For preference data, choose what to train on"),
        ({"dataset_name": "{no_answers}"}, "left to train on: 0 of 1 rows kept"),
        ({"dataset_name": "{no_answers}", "dataset_streaming": "true"}, "left to train on: 0 of 1 rows kept"),
        ({"dataset_train_split": "tran"}, "the splits? train|no 'tran' split, but train"),
        ({"config": "not_there.yaml"}, "not_there.yaml"),
        ({"config": "{no_mapping}"}, "must contain a YAML mapping"),
        ({"config": "{no_yaml}"}, "while parsing a flow node"),
        ({"config": "{bad_part}"}, r"datasets has the entry \{'pth': 'x'\}; expected a path"),
        ({"max_lenght": "8"}, "max_lenght"),
        ({"max_length": "many"}, "argument --max_length.*: invalid int value: 'many'"),
        ({"max_length": "-8"}, "max_length=-8 is out of range"),
        ({"chat_template_kwargs": "{"}, "chat_template_kwargs='{' is not valid JSON"),
        ({"chat_template_kwargs": '{"enable_thinking": true}'}, "'enable_thinking', which no chat template"),
        ({"chat_template": "not_there.jinja"}, "chat_template='not_there.jinja' is neither a file nor a template"),
        ({"chat_template": "{% messages"}, "chat.template|block"),
    ],
    ids=lambda value: " ".join(f"{name}={given}" for name, given in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_rows_files_and_flags(name, flags, said, line):
    """Catches a traceback for a mistyped file, a broken one, or a flag that says nothing sensible."""
    assert re.search(said, line(name, **flags))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"resume_from_checkpoint": "not_there"}, "--resume_from_checkpoint not_there holds no trainer_state.json"),
        ({"model_init_kwargs": "{"}, "model_init_kwargs='{' is not valid JSON"),
        ({"model_init_kwargs": "dtype"}, "model_init_kwargs='dtype' is not a dictionary"),
        ({"eval_strategy": "epoch"}, "needs a 'test' split, and the dataset has train"),
        ({"eval_strategy": "always"}, "always"),
        ({"report_to": "nothing"}, "nothing"),
        ({"optim": "fastest"}, "fastest"),
        ({"block_size": "5"}, "block_size=5 does not fit max_length=16"),
        ({"do_train": "true"}, "--do_train: a recipe trains"),
        ({"dtype": "float17"}, "float17"),
        ({"attn_implementation": "magic"}, "magic"),
        ({"model_revision": "gone", "model_name_or_path": "nobody/nothing"}, "nobody/nothing"),
    ],
    ids=lambda value: " ".join(f"{name}={given}" for name, given in value.items()) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("name", ["sft_student", "few_step"])
def test_wrong_settings_of_a_run(name, flags, said, line):
    """Catches a traceback for a setting that only the trainer, transformers or torch can refuse."""
    assert re.search(said, line(name, **flags))


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("chat", {"dtype": "float17"}, "dtype='float17' is not a precision of torch"),
        ("chat", {"device": "abacus"}, "device='abacus' is not a device of this machine, which has cpu"),
        ("chat", {"max_new_tokens": "many"}, "invalid int value: 'many'"),
        ("chat", {"top_p": "0.9"}, "top_p=0.9 narrows"),
        ("chat", {"chat_template": "not_there.jinja"}, "is neither a file nor a template"),
        ("chat", {"chat_template": "{% messages"}, "unexpected|expected|unknown tag"),
        ("chat", {"chat_template_kwargs": "{"}, "chat_template_kwargs='{' is not valid JSON"),
        ("export", {"format": "onnx"}, "format.*onnx"),
        ("export", {"confidence_threshold": "2"}, "confidence_threshold"),
        ("convert_ar", {"dtype": "float17"}, "float17"),
        ("convert_ar", {"folder": "{rows}"}, "rows.jsonl"),
        ("prepare_data", {"rows_per_part": "0"}, "rows_per_part"),
        ("prepare_data", {"output_dir": "{student}"}, "holds something other than prepared rows"),
        ("prepare_data", {"output_dir": "{rows}"}, "rows.jsonl"),
        ("dense_teacher", {"teacher_dtype": "float17"}, "invalid choice: 'float17'"),
        ("dense_teacher", {"preset": "tide"}, "invalid choice: 'tide'"),
        ("dense_teacher", {"preset": "kl", "alignment": "chunk"}, "calm, reverse_calm"),
        ("dense_teacher", {"shared_vocab_size": "16"}, "shared_vocab_size=16"),
        ("sft_student", {"preset": "kl"}, "This recipe trains without a teacher"),
        ("few_step", {"teacher_model_name_or_path": "{teacher}"}, "takes no --teacher_model_name_or_path"),
        ("few_step", {"student_times": "now"}, "invalid choice: 'now'"),
    ],
)
def test_wrong_settings_of_one_entry_point(name, flags, said, line):
    """Catches a traceback for what one command alone can be told wrongly."""
    assert re.search(said, line(name, **flags))


def test_errors_of_the_program_keep_their_traceback():
    """Catches a bug, or a failure in the middle of training, that ends in one line nobody can trace."""
    for error in (RuntimeError("bug"), KeyError("bug"), AssertionError("bug"), ZeroDivisionError("bug")):
        with pytest.raises(type(error)), refusing():
            raise error
    with pytest.raises(ValueError), refusing(kinds=(DataError,)):
        raise ValueError("in the middle of training")
    with pytest.raises(SystemExit, match=r"^tide-hf: several lines$"), refusing("tide-hf: "):
        raise ValueError("several\n  lines")

"""The card: what it says, what people wrote into it, what the check finds, programs that run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from embedded.cards import report_card
from embedded.table import COMPARISONS
from huggingface_hub import ModelCard
from tiny import tiny_model, tiny_trainer
from transformers import AutoModelForCausalLM

from tide_hf import TIDEConfig
from tide_hf.data import PreparationReport
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.hub import (
    Decoding,
    Measurement,
    RunFacts,
    check_card,
    dataset_card,
    find_source,
    named_model,
    python_blocks,
    write_card,
)
from tide_hf.hub.card_edits import BEGIN, END
from tide_hf.hub.front_matter import split_front_matter
from tide_hf.hub.provenance import command_line
from tide_hf.hub.pushing import has_remote_code
from tide_hf.hub.record import AFTER, record_run, update_record
from tide_hf.hub.sources import Source, resolve_license

START_CARD = (
    "---\nlicense: apache-2.0\nlanguage: en\nbase_model: Qwen/Qwen3-0.6B\n---\n[1](https://arxiv.org/abs/2505.09388)\n"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A distillation of four steps from a start with a card, evaluated before and after; its trainer."""
    folder = tmp_path_factory.mktemp("card")
    tiny_model(dtype=torch.float32).save_pretrained(folder / "student")
    (folder / "student" / "README.md").write_text(START_CARD)
    trainer = tiny_trainer(
        folder / "out",
        model=AutoModelForCausalLM.from_pretrained(folder / "student"),
        teacher=tiny_model(seed=1, dtype=torch.float32),
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=4,
        trainer_kwargs={"eval_dataset": sorting_rows(4, seed=9)},
    )
    trainer.train()
    trainer.save_model()
    return trainer


def card_of(run) -> Path:
    return Path(run.args.output_dir, "README.md")


@pytest.mark.slow
def test_card_of_a_run_is_complete_and_true(run):
    """Catches a card that lacks what a stranger needs, or shows another number than was logged."""
    assert check_card(card_of(run)) == []
    text = card_of(run).read_text()
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "apache-2.0" and data["base_model"] == "Qwen/Qwen3-0.6B"
    assert data["base_model_relation"] == "finetune" and data["distillation"]["objective"] == run.objective.to_dict()
    metrics = [metric for result in data["model-index"][0]["results"] for metric in result["metrics"]]
    logged = [entry for entry in run.state.log_history if "eval_ce" in entry]
    values = {metric["type"]: metric["value"] for metric in metrics}
    assert values["denoising loss, nats per token"] == logged[-1]["eval_ce"] and len(metrics) == 4
    (of_answers,) = (value for name, value in values.items() if "per answer token" in name)
    assert of_answers == logged[-1]["eval_ce_answer"]
    assert f"| {logged[0]['eval_ce']:.4g} | {logged[-1]['eval_ce']:.4g} |" in text
    assert str(Path(run.args.output_dir).parent) not in text and "2505.09388" in text


@pytest.mark.slow
def test_programs_of_the_card_run(run):
    """Catches an example that does not load or generate where a reader would run it: beside the card."""
    programs = python_blocks(card_of(run).read_text())
    assert len(programs) == 3
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=run.args.output_dir, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Traceback" not in done.stderr and done.stdout


def test_what_people_write_survives(run):
    """Catches an update that overwrites a person's text or metadata, and one that no longer updates its own part."""
    text = write_card(run.run_record)
    edited = text.replace(BEGIN, f"My words above.\n\n{BEGIN}").replace(END, f"{END}\n\nMy words below.")
    edited = edited.replace("license: apache-2.0", "license: mit\nthumbnail: https://x.org/a.png")
    edited = edited.replace("- tide\n", "- tide\n- mine\n").replace("## Limits", "## Limits that go")
    again = write_card(replace(run.run_record, model_name="renamed"), existing=edited)
    assert "My words above." in again.split(BEGIN)[0] and "My words below." in again.split(END)[1]
    data = ModelCard(again).data.to_dict()
    assert (data["license"], data["thumbnail"]) == ("mit", "https://x.org/a.png") and "mine" in data["tags"]
    assert "# renamed" in again and "Limits that go" not in again and again.count(BEGIN) == 1
    assert write_card(replace(run.run_record, model_name="renamed"), existing=again) == again, "updates settle"


@pytest.mark.parametrize("lines", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_metadata_of_an_edited_card_is_read_as_it_is_written(run, lines):
    """Catches keys lost because of a Windows editor's line ends or byte order mark, and a tag cut into letters."""
    head = ["---", "thumbnail: https://x.org/a.png", "tags: mine", "version: 1.10", "---", "My words."]
    text = write_card(run.run_record, existing="\ufeff" + lines.join(head))
    metadata, body = split_front_matter(text)
    assert (metadata["thumbnail"], metadata["version"]) == ("https://x.org/a.png", 1.1)
    assert metadata["tags"][-1] == "mine" and len(metadata["tags"]) == 5
    assert metadata["license"] == "apache-2.0"
    assert body.strip().startswith(f"My words.\n\n{BEGIN}") and "thumbnail" not in body


@pytest.mark.parametrize("head", ["- a\n- b", "license: [mit", "just words", "true: yes"])
def test_metadata_that_cannot_be_read_is_kept_as_text(run, head):
    """Catches training that ends because of a person's mistake in the card, and their words thrown away."""
    text = write_card(run.run_record, existing=f"---\n{head}\n---\nMy words.\n")
    assert split_front_matter(text)[0] == split_front_matter(write_card(run.run_record))[0]
    assert f"---\n{head}\n---\nMy words.\n\n{BEGIN}" in text
    second = write_card(run.run_record, existing=text)
    assert second.count(head) == text.count(head) == 1 and write_card(run.run_record, existing=second) == second
    assert check_card(f"---\n{head}\n---\n")[0].startswith("The metadata cannot be parsed")


def test_text_without_metadata_is_kept(run):
    """Catches text of a card without metadata that is taken for metadata, or lost."""
    text = write_card(run.run_record, existing="# Mine\n\nabove\n\n---\n\nbelow\n")
    assert f"---\n\n# Mine\n\nabove\n\n---\n\nbelow\n\n{BEGIN}" in text and check_card(text) == []


def test_stock_cards_are_replaced(run):
    """Catches PEFT's empty sections kept as somebody's words."""
    stock = "---\nlicense: gpl-3.0\n---\n<!-- Provide a quick summary of what the model is/does. -->\n"
    stock += "[More Information Needed]"
    assert check_card(write_card(run.run_record, existing=stock)) == []


def test_measured_results_and_decoding_are_shown(run):
    """Catches a measurement that a user adds and the card leaves out, or shows without how it was made."""
    how = dict(dataset="org/sums", harness="lm-eval 0.4.9", settings="0-shot", num_samples=400, date="2026-11-23")
    results = [Measurement("teacher", "exact match", 0.5, **how), Measurement(AFTER, "exact match", 0.25, **how)]
    decoding = [Decoding("threshold 0.9", 4, "exact match", 0.25, 2.5, 1234.0, "CPU")]
    text = write_card(replace(run.run_record, results=results, decoding=decoding))
    assert check_card(text) == []
    assert "| org/sums | exact match | 0.5 | 0.25 |" in text
    assert "lm-eval 0.4.9; 0-shot; 400 samples; 2026-11-23" in text
    assert "| threshold 0.9 | 4 | 0.25 | 2.5 | 1,234 | CPU |" in text
    assert "## Decoding" not in write_card(run.run_record)


def test_a_named_sampler_is_shown(run, monkeypatch):
    """Catches a card that keeps quiet about how the checkpoint's generation config makes it decode."""
    record = record_run(run._run_facts())
    assert 'decoding="' not in write_card(record)
    monkeypatch.setattr(run.model.generation_config, "decoding", "llada2")
    update_record(record, run._run_facts())
    text = write_card(record)
    assert check_card(text) == [] and '`decoding="llada2"` names' in text
    uniform = replace(record, network={**record.network, "diffusion_type": "uniform", "block_size": None})
    assert 'decoding="' not in write_card(uniform)


def test_the_plan_of_a_run_is_shown(run):
    """Catches a card that hides what the networks were fed, names a folder of this machine, or shows an old plan."""
    plan = {"alignment": "chunk", "student": {"block_size": 4}, "tokenizer": {"name": "/home/me/student", "size": 24}}
    record = record_run(replace(run._run_facts(), plan=plan))
    record.tags, record.model_name = ["mine"], "named"
    text = write_card(record)
    assert check_card(text) == []
    table = text.split("What the run fed its networks:")[1].split("Training arguments")[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    assert lines == ["| `alignment` | chunk |", "| `student.block_size` | 4 |", "| `tokenizer.size` | 24 |"]
    update_record(record, replace(run._run_facts(), plan={}))
    assert "What the run fed" not in write_card(record) and (record.tags, record.model_name) == (["mine"], "named")


def test_facts_alone_make_a_record():
    """Catches a record that needs a trainer for what its facts do not state."""
    tokenizer = build_tokenizer()
    args = TIDEConfig(output_dir="out", use_cpu=True, report_to=[], seed=7, max_length=16, learning_rate=0.25)
    history = [{"step": step, "eval_ce": value, "eval_other": 1.0} for step, value in ((0, 3.0), (2, 2.0), (4, 1.0))]
    facts = RunFacts(
        model=tiny_model(),
        teachers=[named_model(tiny_model(seed=1))],
        tokenizer=tokenizer,
        args=args,
        objective={"method": "mine", "max_length": 16},
        preparation={"train": PreparationReport(10, 8), "eval": PreparationReport(0, 0)},
        step=4,
        max_steps=6,
        log_history=history,
        num_evaluated_rows=3,
        evaluation="MyTrainer.evaluate",
    )
    record = record_run(facts)
    assert (record.step, record.max_steps, record.seeds, record.method) == (4, 6, [7], "mine")
    assert set(record.preparation) == {"train"} and record.preparation["train"]["num_kept"] == 8
    assert record.arguments["learning_rate"] == 0.25 and "max_length" not in record.arguments
    assert record.arguments["teacher_context"] == args.teacher_context and len(record.teachers) == 1
    measured = [(result.network, result.value, result.harness, result.num_samples) for result in record.results]
    expected = [("student before", 3.0, "MyTrainer.evaluate", 3), (AFTER, 1.0, "MyTrainer.evaluate", 3)]
    assert measured == expected
    own = replace(record.results[0], harness="lm-eval")
    record.results.append(own)
    update_record(record, replace(facts, log_history=[*history, {"step": 6, "eval_ce": 0.5}], teachers=[]))
    assert [result.value for result in record.results] == [own.value, 3.0, 0.5]
    assert "teacher_context" not in record.arguments
    update_record(record, replace(facts, num_evaluated_rows=0))
    assert record.results == [own]


def test_a_uniform_student_is_decoded_as_it_can_be(run):
    """Catches a card that recommends decoding settings which `generate` of a uniform-state model refuses."""
    network = {**run.run_record.network, "diffusion_type": "uniform", "block_size": None}
    few_step = replace(run.run_record, network=network, method="idlm", objective={"num_steps": 2, "method": "idlm"})
    text = write_card(few_step)
    assert check_card(text) == [] and "decoded in 2 network calls per answer: `num_steps=2`" in text
    assert "`num_steps` (the number" in write_card(replace(run.run_record, network=network))
    assert not [name for name in ("steps_per_block", "confidence_threshold", "mask token") if name in text]


def has_program_without_library(run) -> bool:
    return "trust_remote_code=True" in card_of(run).read_text()


def test_a_card_says_of_code_what_was_saved_last(run, tmp_path):
    """Catches a card that judges by another run's model or a later config.json in the folder whether the saved model
    carries its code: it would show a program that fails, or hide one that works."""
    trainer = tiny_trainer(tmp_path / "out", model=tiny_model(dtype=torch.float32))
    run.model.save_pretrained(tmp_path / "out" / "checkpoint-2")
    assert has_remote_code(tmp_path / "out" / "checkpoint-2")
    trainer.create_model_card()
    assert not has_program_without_library(trainer), "nothing was saved yet"
    trainer.save_model(tmp_path / "elsewhere")
    assert has_program_without_library(trainer), "saved with its code, outside of the folder of the card"
    (tmp_path / "out" / "evaluation").mkdir()
    (tmp_path / "out" / "evaluation" / "config.json").write_text("{}")
    trainer.create_model_card()
    assert has_program_without_library(trainer), "a later config.json is none of the trainer's"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("license: apache-2.0", "licence: apache-2.0", "has no license"),
        ("license: apache-2.0", "license: apache2", "is not one of the Hub's ids"),
        ("base_model: Qwen/Qwen3-0.6B", "base_model: /data/qwen", "is not a Hub name"),
        ("base_model_relation: finetune", "base_model_relation: distilled", "base_model_relation must be"),
        ("- en", "- no", "is not a language code"),
        ("## Limits", "## Bounds", "'Limits' is missing"),
        ("# out", "# {{ model_name }}", "a leftover"),
        ("# out", "# out\n\nsee /home/me/runs/out", "local path"),
        ("# out", "# out hf_abcdefghijklmnopqrstuvwxyz", "an access token"),
        ("import tide_hf", "import tide_hf)", "does not compile"),
        ("num_samples: 4", "num_samples: 0", "does not say its num_samples"),
        ("training_curves.png", "curves.png", "curves.png is missing"),
        ("---\nbase", "base", "no metadata"),
    ],
)
def test_the_check_finds(run, tmp_path, old, new, found):
    """Catches a check that passes everything."""
    text = card_of(run).read_text()
    assert old in text
    (tmp_path / "README.md").write_text(text.replace(old, new))
    (tmp_path / "training_curves.png").touch()
    assert any(found in sentence for sentence in check_card(tmp_path / "README.md"))


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([Source("a", license="mit"), Source("b", license="apache-2.0")], {"license": "mit"}),
        ([Source("a", license="mit"), Source("b", license="cc-by-nc-4.0")], {"license": "cc-by-nc-4.0"}),
        ([Source("a"), Source("b", license="mit")], {}),
        (
            [Source("o/a", True, license="apache-2.0"), Source("tencent/WeDLM-8B-Instruct", True)],
            {
                "license": "other",
                "license_name": "wedlm-8b-instruct",
                "license_link": "https://huggingface.co/tencent/WeDLM-8B-Instruct",
            },
        ),
    ],
)
def test_licence_of_the_chain(sources, expected):
    """Catches a teacher's conditions lost on the way to the student."""
    assert resolve_license(sources) == expected


def test_the_teachers_conditions_are_shown(run):
    """Catches WeDLM's territorial restriction missing from a card."""
    record = replace(run.run_record, teachers=[Source("tencent/WeDLM-8B-Instruct", True)])
    text = write_card(record)
    assert "not for use in the European Union" in text and check_card(text) == []


def test_missing_licence_is_said(run):
    """Catches an invented licence."""
    text = write_card(replace(run.run_record, start=Source("student")))
    assert {"The metadata has no license.", "The metadata has no language."} <= set(check_card(text))


def test_command_line_without_paths_and_secrets(monkeypatch, tmp_path):
    """Catches a token, a home folder or pytest in the command to reproduce a run."""
    monkeypatch.chdir(tmp_path)
    argv = [
        f"{tmp_path}/recipes/x.py",
        "--hub_token",
        "hf_abcdefghijklmnopqrstuvwx",
        "--output_dir=/home/me/out",
        "--lr",
        "1",
    ]
    assert command_line(argv, {}) == "python recipes/x.py --output_dir=out --lr 1"
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2"}
    assert command_line(["r.py"], launched) == "accelerate launch --num_processes 2 r.py"
    assert command_line(["/x/site-packages/pytest/__main__.py"], {}) is None


def test_source_of_a_folder_is_its_card(tmp_path):
    """Catches a local path as a name, a licence that is not read, and Norwegian, `no`, that YAML reads as false."""
    (tmp_path / "README.md").write_text(START_CARD.replace("language: en", "language: no"))
    source = find_source(str(tmp_path))
    assert source.languages == ["no"]
    assert (source.name, source.on_hub, source.license) == (tmp_path.name, False, "apache-2.0")
    assert source.arxiv_ids == ["2505.09388"]


@pytest.mark.parametrize(("task", "row"), [("sorting", "tide"), ("sorting", "ce"), ("python_stdlib", "kl")])
def test_card_of_an_embedded_run(task, row):
    """Catches a card of an embedded run that hides what it is, or shows another number than the report."""
    report = json.loads((Path(__file__).parents[1] / "recipes" / "reports" / f"{task}.json").read_text())
    made = COMPARISONS["dense_teacher"][task]()
    text = report_card(
        made, report, row, "accelerate launch recipes/dense_teacher.py", "outputs/dense_teacher", 400, "2026-11-23"
    )
    assert check_card(text) == []
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "apache-2.0" and "embedded comparison" in text and "embedded-run" in data["tags"]
    measured = next(entry for entry in report["rows"] if entry["name"] == row)
    values = [metric["value"] for result in data["model-index"][0]["results"] for metric in result["metrics"]]
    expected = measured["exact_match"]["mean"] if task == "sorting" else measured["nll"]["mean"]["0.1"]
    assert expected in values and f"{report['rows'][0]['parameters']:,}" not in text.split("## Load it")[0]


def test_dataset_card(tmp_path):
    """Catches a prepared dataset without the tokenizers it is for, or without what became of its rows."""
    report = PreparationReport(10, 8, 1, {"no answer": 2}, 100, 90, 40, 400, 380)
    text = dataset_card(
        "alice/rows", {"train": report}, ["org/raw"], "org/student", "org/teacher", {"max_length": 16}, "mit", ["en"]
    )
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["source_datasets"]) == ("mit", ["org/raw"])
    for said in ("org/student", "org/teacher", "90.0%", "95.0%", "2 dropped: no answer", "`max_length` | 16"):
        assert said in text
    compile(python_blocks(text)[0], "card", "exec")

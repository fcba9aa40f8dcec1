"""Answers written by a teacher: the prompts, greedy and drawn decoding, the dataset, what it says of itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, load_from_disk
from tiny import SHAPE, tiny_model, tiny_trainer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from tide_hf.commands import answers as command
from tide_hf.commands.answer_arguments import AnswerArguments, TeacherModel
from tide_hf.commands.prepare import parse_prepare_arguments, run_preparation
from tide_hf.data import DataError, PreparationRecord, RowSkipped, prepare_dataset
from tide_hf.data.answers import AnswerRecord, read_prompt
from tide_hf.data.formats import Conversation, PlainText, read_row
from tide_hf.demo.sorting import build_tokenizer, sorting_rows
from tide_hf.models import LLaDAConfig, TIDEUniformQwen3Config
from tide_hf.teachers.answers import AnswerDecoding, AnswerWriter, RowSampling, answer_key, prompt_key

ROOT = Path(__file__).parent.parent
USER, ASSISTANT = {"role": "user", "content": "31"}, {"role": "assistant", "content": "13"}
PROMPTS = [[11, 3, 1, 12], [11, 5, 12], [11, 9, 8, 7, 6, 5, 4, 12], [11, 0, 2, 12], [11, 7, 7, 12], [11, 12]]
KEYS = [answer_key(7, prompt_key(ids), 0) for ids in PROMPTS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the datasets library."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def causal_model(tokenizer=None, seed=0) -> Qwen3ForCausalLM:
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    torch.manual_seed(seed)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return Qwen3ForCausalLM(Qwen3Config(**shape, eos_token_id=tokenizer.eos_token_id)).eval()


def saved(model, tokenizer, folder) -> str:
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def texts(writer, prompts=PROMPTS, keys=KEYS) -> list[tuple[str, bool]]:
    return [(answer.text, answer.is_finished) for answer in writer.write(prompts, keys)]


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, [USER]),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, [USER, ASSISTANT, USER]),
        ({"messages": [USER, ASSISTANT, USER]}, [USER, ASSISTANT, USER]),
        ({"messages": [USER, ASSISTANT], "system": "Be."}, [{"role": "system", "content": "Be."}, USER]),
        ({"conversations": [{"from": "human", "value": "31"}, {"from": "gpt", "value": "13"}]}, [USER]),
        ({"prompt": [USER], "completion": [ASSISTANT]}, [USER]),
        ({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}, [USER, ASSISTANT, USER]),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": [USER], "system": "Be."}, [{"role": "system", "content": "Be."}, USER]),
        ({"instruction": "31", "output": "13"}, [USER]),
        ({"prompt": "31", "completion": "13"}, "31"),
        ({"prompt": "31", "completion": None}, "31"),
    ],
)
def test_prompt_is_what_precedes_the_last_answer(row, expected):
    """Catches an answer that stays in its own prompt, and a format of raw rows whose prompts are not read."""
    content = read_prompt(row)
    if isinstance(expected, str):
        assert content == PlainText(expected, "")
    else:
        assert isinstance(content, Conversation) and content.messages == expected
        assert content.first_trained == len(expected), "a turn that the teacher did not write would be trained on"


@pytest.mark.parametrize(
    "row", [{"text": "31"}, {"completion": "13"}, {"messages": [ASSISTANT]}, {"messages": []}, {"prompt": []}]
)
def test_rows_without_a_prompt_are_skipped(row):
    """Catches a teacher that continues nothing, and text that is lost without a count."""
    with pytest.raises(RowSkipped):
        read_prompt(row)


# -- decoding ---------------------------------------------------------------------------------------------------------


def naive_greedy(model, prompt: list[int], num_new: int, eos: int) -> tuple[list[int], bool]:
    """One row, one token at a time, the whole sequence run anew each time."""
    ids = list(prompt)
    for _ in range(num_new):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == eos:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


def test_greedy_causal_answers_are_the_argmax_whatever_the_batch():
    """Catches padding that is attended, a penalty or sampling of the model's own generation config, a lost order."""
    model, tokenizer = causal_model(), build_tokenizer()
    expected = [naive_greedy(model, ids, 12, tokenizer.eos_token_id) for ids in PROMPTS]
    expected = [(tokenizer.decode(ids, skip_special_tokens=True), finished) for ids, finished in expected]
    assert {finished for _, finished in expected} == {True, False}, "the test should see both"
    own = dict(do_sample=True, temperature=3.0, top_k=2, repetition_penalty=3.0, eos_token_id=tokenizer.eos_token_id)
    for batch_size in (1, 4, 6):
        model.generation_config = GenerationConfig(**own)
        assert texts(AnswerWriter(model, tokenizer, AnswerDecoding(max_new_tokens=12), batch_size)) == expected


@pytest.mark.parametrize("config", [None, LLaDAConfig], ids=["block", "full"])
def test_greedy_diffusion_answers_do_not_depend_on_the_batch(config):
    """Catches a block grid or an end of text that one row takes from another."""
    kind = {} if config is None else {"config_class": config}
    model, tokenizer = tiny_model(dtype=torch.float32, hidden=64, **kind), build_tokenizer()
    decoding = AnswerDecoding(max_new_tokens=11)
    alone, together = (texts(AnswerWriter(model, tokenizer, decoding, size)) for size in (1, 6))
    assert alone == together and len(set(alone)) > 1


@pytest.mark.parametrize("make", [causal_model, lambda: tiny_model(dtype=torch.float32)], ids=["causal", "diffusion"])
def test_drawn_answers_belong_to_their_keys(make):
    """Catches draws that depend on the batch, its order or what was drawn before, and keys that are not used."""
    tokenizer, decoding = build_tokenizer(), AnswerDecoding(1.0, max_new_tokens=8)
    first = texts(AnswerWriter(make(), tokenizer, decoding, 6))
    torch.manual_seed(3)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = AnswerWriter(make(), tokenizer, decoding, 2)
    again = texts(shuffled, [PROMPTS[index] for index in order], [KEYS[index] for index in order])
    assert again == [first[index] for index in order]
    same_prompt = texts(shuffled, [PROMPTS[0]] * 6, [answer_key(7, 1, number) for number in range(6)])
    assert len(set(same_prompt)) > 2, "answers to one prompt should differ"


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.7}])
def test_row_sampling_draws_from_the_distribution(settings):
    """Catches tokens drawn from another distribution than that of temperature, top_k and top_p."""
    logits, temperature, num_rows = torch.tensor([0.3, 2.0, -1.0, 1.2, -torch.inf, 0.9]), 0.8, 40_000
    weights = (logits.double() / temperature).exp()
    order = weights.argsort(descending=True)
    if "top_k" in settings:
        weights[order[3:]] = 0
    if "top_p" in settings:  # the smallest set of most probable tokens that reaches it
        share = (weights / weights.sum())[order].cumsum(0)
        weights[order[int((share < 0.7).sum()) + 1 :]] = 0
    expected = weights / weights.sum()
    keys = torch.tensor([answer_key(0, row, 0) for row in range(num_rows)])
    counts = []
    for place in (0, 5):
        sampling = RowSampling(AnswerDecoding(temperature, **settings), keys, 2)
        scores = sampling(torch.zeros(num_rows, 2 + place, dtype=torch.long), logits.repeat(num_rows, 1))
        assert (scores.isfinite().sum(-1) == 1).all()
        counts.append(scores.argmax(-1))
        found = counts[-1].bincount(minlength=len(logits)) / num_rows
        spread = (expected * (1 - expected) / num_rows).sqrt()
        assert ((found - expected).abs() <= 4.5 * spread).all()
    agreement = (counts[0] == counts[1]).double().mean()
    assert abs(agreement - expected.square().sum()) < 0.015, "two places of an answer share their draws"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(top_p=0.9), "narrow what tokens are drawn from"),
        (dict(temperature=-1.0), "temperature ≥ 0"),
        (dict(max_new_tokens=0), "at least 1"),
        (dict(settings={"num_beams": 4}), "num_beams cannot be given"),
    ],
)
def test_decoding_is_refused(settings, message):
    """Catches settings of decoding that would be ignored."""
    with pytest.raises(ValueError, match=message):
        AnswerDecoding(**settings)


def test_further_settings_reach_generate():
    """Catches `answer_settings` that are dropped on the way, for either kind of teacher."""
    tokenizer = build_tokenizer()
    for model, settings in ((causal_model(), {"min_new_tokens": 8}), (tiny_model(dtype=torch.float32), {"block": 1})):
        writer = AnswerWriter(model, tokenizer, AnswerDecoding(max_new_tokens=8, settings=settings))
        if "block" in settings:
            with pytest.raises(ValueError, match="block"):
                writer.write(PROMPTS, KEYS)
        else:
            assert not any(finished for _, finished in texts(writer)[:1])


# -- the dataset ------------------------------------------------------------------------------------------------------


def raw_rows() -> Dataset:
    """Twenty prompts, one of them twice, and a row without any."""
    rows = sorting_rows(20, seed=1).to_list()
    rows[7] = rows[2]
    rows[5] = {"messages": rows[5]["messages"][1:]}
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> TeacherModel:
    tokenizer = build_tokenizer(("12", "34", "56"))
    return TeacherModel(
        saved(causal_model(tokenizer, seed=5), tokenizer, tmp_path_factory.mktemp("models") / "writer")
    )


def arguments(**changed) -> AnswerArguments:
    values = {"teacher_answers": "sample", "num_answers": 3, "max_new_tokens": 12, "prompts_per_part": 6}
    return AnswerArguments(**{**values, **changed})


def answered(teacher, folder, how=None, rows=None):
    return command.write_answers(
        {"train": raw_rows() if rows is None else rows}, teacher, how or arguments(), folder, {}
    )


def test_answers_by_hand(teacher, tmp_path):
    """Catches rows answered out of order, by other prompts than the template's, and wrong counts."""
    rows = answered(teacher, tmp_path / "a", arguments(teacher_answers="greedy", num_answers=1))["train"]
    model, tokenizer = teacher.load(), teacher.tokenizer()
    expected, counts = [], dict.fromkeys(("num_unfinished", "num_empty", "num_kept"), 0)
    for index, row in enumerate(raw_rows()):
        if index == 5:
            continue
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
        ids, finished = naive_greedy(model, prompt, 12, tokenizer.eos_token_id)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        fate = "num_unfinished" if not finished else "num_kept" if text else "num_empty"
        counts[fate] += 1
        if fate == "num_kept":
            expected.append((index, row["messages"][0]["content"], text))
    found = [(row["prompt_index"], row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]
    assert found == expected and len(expected) > 2
    told = AnswerRecord.read(rows).of_split("train")
    assert counts["num_unfinished"] and {name: told[name] for name in counts} == counts
    assert told["num_prompts"] == told["num_written"] == 19 and told["num_rows"] == 20
    assert list(told["dropped"].values()) == [1]


def test_repeated_prompts_and_answers(teacher, tmp_path):
    """Catches a prompt that the dataset holds twice and that gets the same draws twice; and `distinct_answers`."""
    how = dict(num_answers=8, max_new_tokens=3, keep_unfinished=True)
    rows = answered(teacher, tmp_path / "a", arguments(**how))["train"]
    of = {index: [] for index in range(20)}
    for row in rows:
        of[row["prompt_index"]].append(row["completion"][0]["content"])
    assert of[2] != of[7] and rows[0]["prompt"][0]["content"] == raw_rows()[0]["messages"][0]["content"]
    distinct = answered(teacher, tmp_path / "b", arguments(**how, distinct_answers=True))["train"]
    expected = [text for texts in of.values() for text in dict.fromkeys(texts)]
    assert [row["completion"][0]["content"] for row in distinct] == expected and len(expected) < len(rows)
    assert AnswerRecord.read(distinct).counts["train"]["num_repeated"] == len(rows) - len(expected)


def test_plain_prompts_stay_plain(teacher, tmp_path):
    """Catches text that becomes a number on its way, or that gets a chat template."""
    rows = Dataset.from_list([{"prompt": "31"}, {"prompt": "3177"}])
    rows = answered(teacher, tmp_path / "a", arguments(keep_unfinished=True), rows)["train"]
    contents = [read_row(row) for row in rows]
    assert {content.prompt for content in contents} == {"31", "3177"}
    assert all(isinstance(content, PlainText) and content.answer.isdigit() for content in contents)


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f", "parameters": None}}]])
def test_only_the_written_turn_is_trained_on(teacher, tmp_path, tools):
    """Catches earlier turns of the dataset that are trained on as if the teacher had written them; lost tools."""
    talk = [{"messages": [USER, {**ASSISTANT, "content": "99"}, USER, ASSISTANT], "tools": tools}] * 4
    rows = answered(teacher, tmp_path / "a", arguments(keep_unfinished=True), Dataset.from_list(talk))["train"]
    assert [message["content"] for message in rows[0]["prompt"]] == ["31", "99", "31"]
    assert rows[0]["tools"] == (None if tools is None else [{"type": "function", "function": {"name": "f"}}])
    if tools is not None:  # which this student's template does not read
        return
    trainer = tiny_trainer(tmp_path / "run", rows, max_length=32)
    tokenizer = build_tokenizer()
    trained = [token for token in trainer.train_dataset[0]["labels"] if token >= 0]
    assert tokenizer.decode(trained, skip_special_tokens=True) == rows[0]["completion"][0]["content"]


def test_interrupted_answers_go_on(teacher, tmp_path, monkeypatch):
    """Catches parts that are written again, or lost, or that differ after an interruption."""
    whole = answered(teacher, tmp_path / "whole")["train"]
    write, calls = AnswerWriter.write, []

    def interrupted(self, prompts, keys):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(self, prompts, keys)

    monkeypatch.setattr(AnswerWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answered(teacher, tmp_path / "a")
    assert not (tmp_path / "a").exists() and calls == [18, 18, 18]
    with pytest.raises(ValueError, match="answer_seed: written with 42, this run has 1"):
        answered(teacher, tmp_path / "a", arguments(answer_seed=1))
    rows = answered(teacher, tmp_path / "a")["train"]
    assert calls[3:] == [18, 3] and not (tmp_path / "a.parts").exists()
    assert list(rows) == list(whole) and AnswerRecord.read(rows) == AnswerRecord.read(whole)
    assert list(answered(teacher, tmp_path / "a")["train"]) == list(whole) and len(calls) == 5, "it was there already"
    other = answered(teacher, tmp_path / "b", arguments(answer_batch_size=2, prompts_per_part=4))["train"]
    assert list(other) == list(whole), "answers depend on batches or parts"


def test_nothing_left_is_an_error(teacher, tmp_path):
    """Catches a dataset without rows that only training would notice."""
    with pytest.raises(DataError, match="unfinished"):
        answered(teacher, tmp_path / "a", arguments(max_new_tokens=1))


def test_the_record_reaches_report_and_card(teacher, tmp_path):
    """Catches a student whose card keeps silent about who wrote its data, prepared beforehand or at the start."""
    rows = answered(teacher, tmp_path / "a")["train"]
    trainer = tiny_trainer(tmp_path / "run", rows.shuffle(seed=1).select(range(8)), max_steps=1, max_length=32)
    trainer.train()
    trainer.create_model_card()
    said = "answers written by writer (autoregressive, 3 per prompt drawn at temperature 1, seed 42"
    text = (tmp_path / "run" / "README.md").read_text()
    assert said in text and "trained on answers that a teacher wrote" in text
    prepared, report = prepare_dataset(rows, trainer.plan.preparation)
    assert report.answers["num_written"] == 57
    recorded = PreparationRecord(PreparationRecord.of(trainer.plan.preparation).settings, {"train": report})
    assert PreparationRecord.read(recorded.attach(prepared)).reports["train"] == report
    assert said in (tmp_path / "a" / "README.md").read_text()


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, teacher) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    names = {
        "student": saved(tiny_model(), build_tokenizer(), folder / "student"),
        "diffusion": saved(tiny_model(seed=1), build_tokenizer(), folder / "diffusion"),
        "uniform": saved(tiny_model(config_class=TIDEUniformQwen3Config), build_tokenizer(), folder / "uniform"),
        "causal": teacher.name,
        "rows": str(folder / "rows.jsonl"),
        "prompts": str(folder / "prompts.jsonl"),
        "text": str(folder / "text.jsonl"),
    }
    asked = [row["messages"] for row in raw_rows()]
    rows = {
        "rows": [{"messages": messages} for messages in asked],
        "prompts": [{"prompt": messages[:1]} for messages in asked if len(messages) == 2],
        "text": [{"text": "123"}],
    }
    for name, content in rows.items():
        Path(names[name]).write_text("\n".join(map(json.dumps, content)))
    return names


def flags(files, output, teacher="causal", rows="rows", student="student", **others) -> list[str]:
    values = {
        "teacher_model_name_or_path": files[teacher],
        "dataset_name": files[rows],
        "teacher_answers": "greedy",
        "max_new_tokens": "12",
        "output_dir": str(output),
        "max_length": "32",
        "teacher_max_length": "32",
        **({} if student is None else {"model_name_or_path": files[student]}),
        **others,
    }
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", value)]


@pytest.mark.parametrize("name", ["causal", "diffusion"])
@pytest.mark.parametrize("rows", ["rows", "prompts"])
def test_recipe_prepares_the_answers(files, tmp_path, name, rows, capsys):
    """Catches a run that prepares the dataset's own answers, and a diffusion teacher that gets no side of its own."""
    given = flags(files, tmp_path / "out", name, rows, keep_unfinished="true")
    prepared = run_preparation(parse_prepare_arguments(given))["train"]
    answers = load_from_disk(tmp_path / "out-answers")["train"]
    tokenizer = build_tokenizer()
    trained = [[token for token in row["labels"] if token >= 0] for row in prepared]
    said = [row["completion"][0]["content"] for row in answers]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in trained] == said and len(said) > 10
    assert any(prepared[0]["teacher_input_ids"]) == (name == "diffusion")
    kind = {"causal": "autoregressive", "diffusion": "diffusion"}[name]
    assert PreparationRecord.read(prepared).reports["train"].answers["kind"] == kind
    assert f"{len(said)} answers to 19 prompts kept of 19 written" in capsys.readouterr().out


def test_recipe_writes_answers_without_a_student(files, tmp_path):
    """Catches a student that is demanded where only answers are asked for, and answers that cannot be read again."""
    given = flags(files, tmp_path / "out", student=None, keep_unfinished="true")
    answers = run_preparation(parse_prepare_arguments(given))["train"]
    assert list(load_from_disk(tmp_path / "out")["train"]) == list(answers)
    again = flags(files, tmp_path / "prepared", "diffusion", teacher_answers=None, max_new_tokens=None)
    again[again.index("--dataset_name") + 1] = str(tmp_path / "out")
    prepared = run_preparation(parse_prepare_arguments(again))["train"]
    assert len(prepared) == len(answers)
    assert PreparationRecord.read(prepared).reports["train"].answers["teacher"] == "writer"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(teacher_answers=None), "max_new_tokens says how a teacher writes"),
        (dict(num_answers="2"), "num_answers has no meaning with teacher_answers=greedy"),
        (dict(answer_temperature="2"), "draws nothing"),
        (dict(teacher_answers="sample", answer_temperature="0"), "must be above 0"),
        (dict(teacher_answers="beam"), "invalid choice"),
        (dict(answer_settings="{"), "not valid JSON"),
        (dict(answer_settings='{"top_k": 1}'), "top_k cannot be given"),
        (dict(answer_batch_size="0"), "answer_batch_size=0 must be at least 1"),
        (dict(teacher_model_name_or_path=None), "needs --teacher_model_name_or_path"),
        (dict(dataset_name=None), "needs --teacher_model_name_or_path and --dataset_name"),
        (dict(student=None, hub_dataset_id="a/b"), "there is none"),
        (dict(teacher="uniform"), "is not a known teacher: neither"),
        (dict(rows="text"), "plain text without a prompt"),
        (dict(dataset_streaming="true"), "turn streaming off"),
    ],
)
def test_recipe_refuses(files, tmp_path, changed, message):
    """Catches settings that contradict each other or the teacher, and rows that would be lost silently."""
    with pytest.raises(SystemExit, match=message):
        run_preparation(parse_prepare_arguments(flags(files, tmp_path / "out", **changed)))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(files, tmp_path):
    """Catches parts that are written twice or by nobody, and answers that depend on who wrote them."""
    given = flags(files, tmp_path / "two", teacher_answers="sample", num_answers="2", prompts_per_part="4")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29618"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command_line = [*launch, str(ROOT / "recipes" / "prepare_data.py"), *given]
    done = subprocess.run(command_line, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    given = flags(files, tmp_path / "one", teacher_answers="sample", num_answers="2", prompts_per_part="4")
    one = run_preparation(parse_prepare_arguments(given))["train"]
    assert list(load_from_disk(tmp_path / "two")["train"]) == list(one) and len(one) > 10

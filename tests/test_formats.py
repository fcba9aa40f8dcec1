"""One reader of raw rows: what each documented format means, wherever the rows come from; what is refused by name."""

import json
from pathlib import Path

import datasets
import pytest
import trl
from datasets import Dataset, IterableDataset
from test_data import CHATML, build_tokenizer, chat, preparation, trained_text, write_jsonl

from tide_hf.data import RowPreparation, RowSkipped, prepare_dataset, write_prepared
from tide_hf.data.formats import Conversation, PlainText, read_row, unread_columns
from tide_hf.data.loading import MixtureConfig, load_mixture, load_rows

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
USER, ANSWER = chat("Q", "A")["messages"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def call(name: str, **arguments) -> dict:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "Warm?"},
        call("weather", city="Bern", days=2),
        {"role": "tool", "name": "weather", "content": "9 degrees"},
        {"role": "assistant", "content": "No."},
    ],
    "tools": [WEATHER, CLOCK],
}
OTHER_TOOL_ROW = {"messages": [{"role": "user", "content": "Time?"}, call("clock", city=["a", 1])], "tools": [CLOCK]}
MEANINGS = {
    "messages": (chat("Q", "A"), Conversation([USER, ANSWER])),
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, PlainText("Q", "A")),
    "completion alone": ({"prompt": None, "completion": "A"}, PlainText("", "A")),
    "lists": ({"prompt": [USER], "completion": [ANSWER]}, Conversation([USER, ANSWER], 1)),
    "text": ({"text": "A"}, PlainText("", "A")),
    "instruction": ({"instruction": "Q", "output": "A", "input": ""}, Conversation([USER, ANSWER])),
    "instruction and input": (
        {"instruction": "Q", "input": "x", "output": "A"},
        Conversation([{"role": "user", "content": "Q\n\nx"}, ANSWER]),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        Conversation([USER, ANSWER]),
    ),
    "ShareGPT with a system": (
        {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        Conversation([{"role": "system", "content": "S"}, USER, ANSWER]),
    ),
    "conversation of roles": ({"conversation": [USER, ANSWER]}, Conversation([USER, ANSWER])),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
                {"from": "observation", "value": "9"},
                {"from": "gpt", "value": "A"},
            ],
            "tools": json.dumps([WEATHER]),
        },
        Conversation(
            [
                {"role": "system", "content": "S"},
                USER,
                call("weather", city="Bern"),
                {"role": "tool", "content": "9"},
                ANSWER,
            ],
            tools=[WEATHER],
        ),
    ),
    "tools": (TOOL_ROW, Conversation(TOOL_ROW["messages"], tools=[WEATHER, CLOCK])),
    # texts that are JSON as well
    "number": ({"prompt": "6 + 6 = ", "completion": "12"}, PlainText("6 + 6 = ", "12")),
    "JSON text": ({"text": '{"a": null}'}, PlainText("", '{"a": null}')),
    "null": ({"instruction": "null", "output": '"x"'}, Conversation(chat("null", '"x"')["messages"])),
    "several": ({"text": "t", "instruction": "i", "output": "o", **chat("Q", "A")}, Conversation([USER, ANSWER])),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the datasets library."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def qwen3(**overrides) -> RowPreparation:
    """A small tokenizer with Qwen3's own template."""
    tokenizer = build_tokenizer((TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8"))
    return RowPreparation(tokenizer, None, 4096, 4096, 8, "none", **overrides)


def written(row, prepare=None) -> str:
    prepare = qwen3() if prepare is None else prepare
    return prepare.tokenizer.decode(prepare.prepare(row)[0]["input_ids"])


# -- what a row means -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "meaning"), MEANINGS.values(), ids=MEANINGS.keys())
def test_row_means_one_thing(row, meaning):
    """Catches a format read as another one, its roles swapped, or a part of it lost."""
    assert read_row(row) == meaning
    assert unread_columns([*row, "id", "score"]) == ["id", "score"]


WAYS = ["mixture", "streaming mixture", "parts", "stream without columns"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_file_means_the_same_wherever_it_is_named(tmp_path, way):
    """Catches a file that is plain text by --dataset_name and a chat in a mixture, or loses its tool calls there."""
    kinds = [row for row, _ in MEANINGS.values()] + [OTHER_TOOL_ROW]
    prepare = qwen3()
    expected = [prepare.prepare(row)[0]["input_ids"] for row in kinds]
    paths = [write_jsonl(tmp_path / f"{index}.jsonl", [row]) for index, row in enumerate(kinds)]
    alone = [prepare_dataset(load_rows(path), prepare)[0]["input_ids"][0] for path in paths]
    assert alone == expected
    mixture = MixtureConfig(datasets=[{"path": path} for path in paths], streaming=way == "streaming mixture")
    if way == "stream without columns":
        rows = IterableDataset.from_generator(lambda: iter(kinds))
    else:
        rows = load_mixture(mixture)["train"]
        assert next(row for row in rows if row["messages"] and row["tools"])["messages"][1] == TOOL_ROW["messages"][1]
    if way in ("mixture", "streaming mixture"):
        together = prepare_dataset(rows, prepare)[0]
    else:
        together = write_prepared({"train": rows}, prepare, tmp_path / "out", rows_per_part=5)["train"]
    assert [row["input_ids"] for row in together] == expected


def test_answer_contains_looks_at_the_answer(tmp_path):
    """Catches the filter of a mixture matching the question, or ending the run at a row that cannot be read."""
    kinds = [chat("python?", "no"), chat("Q", "python"), {"messages": []}]
    chats = write_jsonl(tmp_path / "a.jsonl", kinds)
    texts = write_jsonl(
        tmp_path / "b.jsonl", [{"prompt": "python", "completion": "no"}, {"prompt": "", "completion": "x python"}]
    )
    parts = [{"path": path, "answer_contains": "python"} for path in (chats, texts)]
    rows = load_mixture(MixtureConfig(datasets=parts))["train"]
    assert [read_row(row).answer for row in rows] == ["python", "x python"]


# -- tools, tool calls and settings of a row --------------------------------------------------------------------------


def test_tools_and_calls_are_written_as_transformers_writes_them():
    """Catches a row kept without its tools, its calls or a tool's answer."""
    prepare = qwen3()
    text = written(TOOL_ROW, prepare)
    assert '"name": "weather"' in text.partition("<|im_start|>user")[0] and "9 degrees" in text
    expected = prepare.tokenizer.apply_chat_template(
        **{"conversation": TOOL_ROW["messages"]}, tools=TOOL_ROW["tools"], tokenize=False
    )
    assert text == expected.rstrip()
    trained = trained_text(prepare.prepare(TOOL_ROW)[0], prepare.tokenizer)
    assert trained.startswith(
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call><|im_end|>'
    )
    assert trained.endswith("No.<|im_end|>") and "degrees" not in trained


@pytest.mark.parametrize("form", ["JSON text", "filled up by a table", "arguments as JSON text"])
def test_forms_of_tools_are_one(form):
    """Catches the nulls that a table puts into the tools of one row for those of another, and JSON taken for text."""
    row = TOOL_ROW
    if form == "JSON text":
        row = {**row, "tools": json.dumps(row["tools"])}
    elif form == "filled up by a table":
        row = Dataset.from_list([row, {**OTHER_TOOL_ROW, "messages": [USER, call("clock", zone="x")]}])[0]
        assert "zone" in str(row), "the table did fill it"
    else:
        function = {"name": "weather", "arguments": '{"city": "Bern", "days": 2}'}
        calling = {**row["messages"][1], "content": None, "tool_calls": [{"type": "function", "function": function}]}
        row = {**row, "messages": [row["messages"][0], calling, *row["messages"][2:]]}
    assert written(row) == written(TOOL_ROW)


UNWRITTEN = {
    "the tools": {**chat("Q", "A"), "tools": [CLOCK]},
    "the assistant's 'tool_calls'": {"messages": [USER, {**ANSWER, **call("clock")}]},
    "the assistant's 'reasoning_content'": {"messages": [USER, {**ANSWER, "reasoning_content": "because"}]},
    "the assistant's 'function_call'": {"messages": [USER, {**ANSWER, "function_call": {"name": "f"}}]},
}


@pytest.mark.parametrize(("what", "row"), UNWRITTEN.items(), ids=UNWRITTEN.keys())
def test_what_a_template_does_not_write_is_counted_out(what, row):
    """Catches a row that counts as kept while its tools, calls or reasoning are nowhere in its tokens."""
    with pytest.raises(RowSkipped, match=f"leaves out {what}"):
        preparation(with_teacher=False).prepare(row)
    filled = {**chat("Q", "A"), "tools": [], "chat_template_kwargs": None}
    assert preparation().prepare(filled) == preparation().prepare(chat("Q", "A"))


@pytest.mark.parametrize("role", ["user", "tool", "assistant"])
def test_message_that_a_template_does_not_write_is_counted_out(role):
    """Catches messages of a role, or contents of a kind, that a template passes over without a word."""
    template = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != ROLE %}")
    if role == "assistant":
        template = CHATML.replace("{{ message.content }}", "{{ message.content if message.role != ROLE }}")
    prepare = preparation(template.replace("ROLE", repr(role)), with_teacher=False)
    messages = [USER, {"role": "tool", "content": "nine"}, ANSWER]
    with pytest.raises(RowSkipped, match=f"leaves out the {role}'s content"):
        prepare.prepare({"messages": messages})


def test_rewritten_message_is_kept():
    """Catches rows dropped because a template trims, or otherwise rewrites, what a user says."""
    template = CHATML.replace("{{ message.content }}", "{{ message.content|upper|trim }}")
    assert preparation(template, with_teacher=False).prepare(chat(" what? ", "A"))


def test_settings_of_a_row_come_first():
    """Catches a row's own chat_template_kwargs ignored, or leaking into other rows."""
    prepare = qwen3()
    own = {**chat("Q", "A"), "chat_template_kwargs": {"enable_thinking": True}}
    trained = [trained_text(prepare.prepare(row)[0], prepare.tokenizer) for row in (own, chat("Q", "A"))]
    assert trained == ["<think>\n\n</think>\n\nA<|im_end|>", "A<|im_end|>"]
    as_text = {**own, "chat_template_kwargs": '{"enable_thinking": true}'}
    assert prepare.prepare(as_text) == prepare.prepare(own)


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "'images' belongs to the text": {**chat("Q", "A"), "images": ["x.png"]},
    "'documents' belongs to the text": {**chat("Q", "A"), "documents": [{"title": "t"}]},
    "'history' belongs to the text": {"instruction": "Q", "output": "A", "history": [["a", "b"]]},
    "'tools' beside plain text": {"prompt": "Q", "completion": "A", "tools": [CLOCK]},
    "'tools' is not a list": {**chat("Q", "A"), "tools": {"name": "f"}},
    "'tools' is text, but not valid JSON": {**chat("Q", "A"), "tools": "weather(city)"},
    "'chat_template_kwargs' is not a mapping": {**chat("Q", "A"), "chat_template_kwargs": [1]},
    "kwargs set 'enable_thinking', which no chat template": {
        **chat("Q", "A"),
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "kwargs set 'add_generation_prompt', which is not": {
        **chat("Q", "A"),
        "chat_template_kwargs": {"add_generation_prompt": True},
    },
    "arguments are not valid JSON": {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]
    },
    "one of prompt and completion is text": {"prompt": "Q", "completion": [ANSWER]},
    "unknown speaker 'alien'": {"conversations": [{"from": "alien", "value": "Q"}]},
    "not a list of messages": {"messages": ["Q", "A"]},
    "'output' is not text": {"instruction": "Q", "output": 3},
    "content is not text": {"messages": [USER, {"role": "assistant", "content": None}]},
}


@pytest.mark.parametrize(("reason", "row"), REFUSED.items(), ids=REFUSED.keys())
def test_row_that_is_not_read_is_counted_out(reason, row):
    """Catches a row kept without something that belongs to it, or a crash far from its cause."""
    with pytest.raises(RowSkipped, match=reason):
        preparation().prepare(row)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["prompt"], "A prompt alone has no answer to train on"),
        (["prompt", "chosen", "rejected"], "choose what to train on"),
        (["question", "answer"], "rename_column"),
        (["instruction", "input"], "'instruction' and 'output'"),
    ],
)
def test_dataset_without_an_answer_is_refused(names, said):
    """Catches a dataset that no format fits, prepared into nothing row by row."""
    with pytest.raises(ValueError, match=said):
        unread_columns(names)
    with pytest.raises(ValueError, match=said):
        prepare_dataset(Dataset.from_list([dict.fromkeys(names, "x")]), preparation())


def test_unread_columns_are_named_once(monkeypatch):
    """Catches a column that nobody reads passed over without a word."""
    said = []
    monkeypatch.setattr("tide_hf.data.dataset.logger.warning_once", said.append)
    prepare_dataset(Dataset.from_list([{**chat("Q", "A"), "id": 1, "score": 2.0, "tools": None}]), preparation())
    assert said == ["Columns that are not used, since no text depends on them: id, score."]

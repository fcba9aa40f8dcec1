"""What is trained is what is prompted: a row's untrained beginning is what inference gives, token by token."""

import unicodedata
from functools import cache
from pathlib import Path

import pytest
import trl
from datasets import Dataset, IterableDataset
from real_tokenizers import deepseek, qwen, sentencepiece
from test_data import CHATML, END, MARKED, build_tokenizer, chat, preparation, trained_text
from tiny import tiny_trainer
from tokenizers import processors
from transformers import AutoTokenizer

from tide_hf.alignment import resolve_template_kwargs
from tide_hf.alignment.templates import mentions, template_defaults, without_defaults, write_defaults
from tide_hf.data import PreparationRecord, RowPreparation, RowSkipped, prepare_dataset
from tide_hf.data.encoding import Encoder
from tide_hf.demo.sorting import CHAT_TEMPLATE, sorting_rows
from tide_hf.demo.sorting import build_tokenizer as sorting_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(path.name for path in FOLDER.glob("*.jinja"))
# templates that do not write a content that is text, and say so by an error or by leaving it out
OF_PARTS = ("idefics3", "llava_next", "smolvlm")
NO_THINKING = {"enable_thinking": False}


def template(name: str) -> str:
    return (FOLDER / f"{name.removesuffix('.jinja')}.jinja").read_text(encoding="utf-8")


def turns(*contents, **first) -> list[dict]:
    return [*([{"role": "system", **first}] if first else []), *chat(*contents)["messages"]]


CONVERSATIONS = {
    "one turn": turns("Q", "A"),
    "system": turns("Q?", "think", content="Be short."),
    "three turns": turns("one", "two", "three", "four", "five", "six"),
    "line breaks": turns("Q", "\n\nA\n"),
    "leading space": turns("Q", "  A"),
    "hard characters": turns("x😀", "e\u0301 12345 \u0301"),
    "reasoning": turns("Q", "<think>\nhm\n</think>\n\nA", "R", "<think>\nho\n</think>\n\nB"),
    "empty answer": turns("Q", ""),
}


@cache
def prepared_with(kind) -> RowPreparation:
    tokenizer = kind()
    return RowPreparation(tokenizer, None, 1 << 15, 1 << 15, 8, "none", trained_turns="last")


@cache
def small():
    tokenizer = build_tokenizer(CHATML)
    tokenizer.bos_token = "<pad>"
    return tokenizer


@pytest.fixture
def render_with():
    """A preparation with another template and other settings."""
    used = []

    def change(kind, text: str, settings: dict | None = None) -> RowPreparation:
        prepare = prepared_with(kind)
        used.append((prepare.tokenizer, prepare.tokenizer.chat_template))
        prepare.tokenizer.chat_template = text
        object.__setattr__(prepare, "chat_template_kwargs", resolve_template_kwargs(settings, [prepare.tokenizer]))
        return prepare

    yield change
    for tokenizer, text in reversed(used):
        tokenizer.chat_template = text


def prompt_of(prepare, messages, tools=None, tokenize=True):
    return prepare.tokenizer.apply_chat_template(
        messages,
        tools=tools,
        add_generation_prompt=True,
        tokenize=tokenize,
        return_dict=False,
        **prepare.chat_template_kwargs,
    )


def untrained(columns) -> list[int]:
    first = next(index for index, label in enumerate(columns["labels"]) if label != -100)
    return columns["input_ids"][:first]


# -- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("settings", [None, {"enable_thinking": True}], ids=["default", "thinking"])
@pytest.mark.parametrize("kind", [small, qwen, deepseek])
def test_untrained_beginning_is_the_prompt(render_with, kind, settings):
    """Catches a generation prompt that is trained on, an answer's first token that is not, and a prompt tokenised
    together with its answer: for every template of TRL."""
    compared = dict.fromkeys(TEMPLATES, 0)
    for name in TEMPLATES:
        if settings and not mentions(template(name), "enable_thinking"):
            continue
        prepare = render_with(kind, template(name), settings)
        for messages in CONVERSATIONS.values():
            try:
                columns, _ = prepare.prepare({"messages": messages})
            except RowSkipped:
                continue
            whole = prepare.tokenizer.apply_chat_template(messages, tokenize=False, **prepare.chat_template_kwargs)
            if whole.startswith(prompt_of(prepare, messages[:-1], tokenize=False)):
                assert untrained(columns) == prompt_of(prepare, messages[:-1]), (name, messages)
                compared[name] += 1
    if settings is None:
        never = {name for name, count in compared.items() if not count and not name.startswith(OF_PARTS)}
        # these open a reasoning in the prompt that a turn without any does not have
        assert {name.removesuffix(".jinja") for name in never} <= {"deepseek_r1_distill", "deepseekv3", "llama3"} | {
            "deepseekv3_training"
        }, never
    assert sum(compared.values()) > (60 if settings else 300)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_training"])
def test_empty_reasoning_of_the_prompt_is_not_trained_on(render_with, name):
    """Catches a student that masks and learns what it is always given: published ones never had it masked."""
    prepare = render_with(small, template(name))
    assert prepare.chat_template_kwargs == NO_THINKING
    columns, _ = prepare.prepare(chat("Q", "A"))
    assert trained_text(columns, prepare.tokenizer) == "A" + END
    assert prepare.tokenizer.decode(untrained(columns)).endswith("assistant\n<think>\n\n</think>\n\n")
    thinks = render_with(small, template(name), {"enable_thinking": True})
    assert trained_text(thinks.prepare(chat("Q", "A"))[0], prepare.tokenizer) == "<think>\n\n</think>\n\nA" + END


def test_reasoning_is_trained_on_and_counted_where_the_prompt_rules_it_out(render_with):
    """Catches reasoning dropped from training because the run's prompts switch it off, or that said nowhere."""
    row = {"messages": CONVERSATIONS["reasoning"]}
    prepare = render_with(small, template("qwen3"))
    columns, _ = prepare.prepare(row)
    assert trained_text(columns, prepare.tokenizer) == "<think>\nho\n</think>\n\nB" + END
    _, report = prepare_dataset(Dataset.from_list([row, chat("Q", "A")]), prepare)
    assert (report.num_turns, report.num_unprompted_turns, report.num_dropped_reasonings) == (2, 1, 1)
    assert "1 of 2 turns do not follow the generation prompt" in str(report)
    assert "1 reasonings left out" in str(report)
    _, report = prepare_dataset(
        Dataset.from_list([row]), render_with(small, template("qwen3"), {"enable_thinking": True})
    )
    assert (report.num_turns, report.num_unprompted_turns) == (1, 0)


@pytest.mark.parametrize("name", ["phi3_training", "phi3_5_training", "diffusion_gemma_training"])
def test_two_marked_blocks_in_one_turn(render_with, name):
    """Catches rows counted out because a turn, or its end, is marked in two blocks."""
    prepare = render_with(small, template(name))
    object.__setattr__(prepare, "trained_turns", "all")
    try:
        columns, _ = prepare.prepare({"messages": turns("Q", "one", "R", "two")})
    finally:
        object.__setattr__(prepare, "trained_turns", "last")
    end = "<turn|>" if "gemma" in name else "<|end|>"
    closing = "" if "gemma" in name else "\n" + END
    assert trained_text(columns, prepare.tokenizer) == f"one{end}two{end}{closing}"


def test_blocks_of_one_turn_with_a_gap(render_with):
    """Catches what stands between two marked blocks trained on, the second block given to another turn, and pairs of
    student and teacher shifted where one of them marks more blocks."""
    end = "{{ message.content }}<|im_end|>{% endgeneration %}"
    gap = MARKED.replace(end, end.replace("<|im_end|>", "{% endgeneration %}[GAP]{% generation %}!<|im_end|>"))
    rows = {"messages": turns("Q", "one", "R", "two")}
    prepare = preparation(gap, MARKED)
    columns, _ = prepare.prepare(rows)
    assert trained_text(columns, prepare.tokenizer) == f"one!{END}two!{END}"
    pairs = [(ours, theirs) for ours, theirs in zip(*map(_chunked, _sides(columns)), strict=True)]
    assert all(ours == theirs for ours, theirs in pairs)
    assert prepare.tokenizer.decode([ours for ours, _ in pairs]) == "onetwo", "what follows differs"
    other = preparation(MARKED, gap).prepare(rows)[0]
    assert [ours for ours, _ in pairs] == _chunked(_sides(other)[0])


def _sides(columns):
    return [
        (columns["input_ids"], columns["chunk_ids"]),
        (columns["teacher_input_ids"], columns["teacher_chunk_ids"]),
    ]


def _chunked(side) -> list[int]:
    return [token for token, chunk in zip(*side, strict=True) if chunk >= 0]


def test_tool_calls_are_prompted_as_transformers_prompts_them(render_with):
    """Catches a turn of a tool call that begins, or ends, elsewhere than generation would."""
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    asked = [{"role": "user", "content": "Q"}]
    called = [
        *asked,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
    ]
    answered = [*called, {"role": "tool", "name": "f", "content": "9"}, {"role": "assistant", "content": "A"}]
    names = [
        "qwen2_5",
        "qwen2_5_training",
        "qwen3_training",
        "qwen3_instruct_2507",
        "lfm2_v2",
        "glm4moe_training",
        "gptoss_training",
    ]
    compared = 0
    for name in names:
        prepare = render_with(small, template(name))
        for messages in (called, answered):
            try:
                columns, _ = prepare.prepare({"messages": messages, "tools": tools})
            except RowSkipped as reason:
                print(name, reason)
                continue
            prompt = prompt_of(prepare, messages[:-1], tools)
            assert untrained(columns) == prompt, name
            compared += 1
    assert compared >= 10


def test_settings_of_the_wrong_name_are_refused():
    """Catches a misspelt template setting that no template reads, and one that the renderer itself sets."""
    tokenizer = build_tokenizer(template("qwen3"))
    for given, said in (
        ({"enable_thinkng": False}, "'enable_thinkng', which no chat template of this run reads"),
        ({"messages": []}, "sets 'messages', which is not a template's own"),
        ("{", "is not valid JSON"),
        ("[1]", "expected a mapping"),
    ):
        with pytest.raises(ValueError, match=said):
            RowPreparation(tokenizer, None, 64, 64, 8, chat_template_kwargs=given)
    with pytest.raises(ValueError, match="no chat template of this run reads"):
        preparation(chat_template_kwargs=NO_THINKING)
    assert RowPreparation(tokenizer, None, 64, 64, 8, chat_template_kwargs="{}").chat_template_kwargs == {}
    assert preparation().chat_template_kwargs == {}
    assert preparation(CHATML, template("qwen3")).chat_template_kwargs == NO_THINKING, (
        "the teacher's template reads it"
    )


# -- what a checkpoint knows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "\n  {% for m in messages %}{{ m.content }}{% endfor %}|{{ x }}|{{ y.a }}{{ z }}",
        "   lead{{ x }}{{ y }}{{ z }}",
        "  {% if x %}T{% endif %}\n {{ y.b }}{{ z }}",
    ],
)
def test_defaults_in_a_template_render_as_if_given(tmp_path, body):
    """Catches settings written into the checkpoint's template that change its text, get lost on disk, or cannot be
    overridden."""
    settings = {"x": True, "y": {"a": None, "b": ["é😀\n\"'#} %}"]}, "z": "}}#}"}
    tokenizer = build_tokenizer(body)
    messages = chat("Q")["messages"]
    expected = [
        tokenizer.apply_chat_template(messages, tokenize=False, **given) for given in (settings, {**settings, "x": 0})
    ]
    write_defaults(tokenizer, {"x": 5})
    write_defaults(tokenizer, settings)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded.apply_chat_template(messages, tokenize=False, **given) for given in ({}, {"x": 0})] == expected
    assert template_defaults(loaded) == settings and without_defaults(loaded.chat_template) == body
    write_defaults(loaded, {"not_there": 1})
    assert loaded.chat_template == body


THINKS = CHAT_TEMPLATE.replace(
    "{% if add_generation_prompt %}", "{% if add_generation_prompt and enable_thinking is not false %}"
)


@pytest.mark.parametrize("given", [None, {"enable_thinking": True}])
def test_checkpoint_prompts_as_it_was_trained(tmp_path, given):
    """Catches a saved student whose prompts are not those of its training, unless somebody knows the settings."""
    tokenizer = sorting_tokenizer()
    tokenizer.chat_template = THINKS
    trainer = tiny_trainer(tmp_path / "a", trainer_kwargs={"processing_class": tokenizer}, chat_template_kwargs=given)
    trainer.save_model()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    settings = NO_THINKING if given is None else given
    messages = sorting_rows(1, seed=0)[0]["messages"][:1]
    bare = sorting_tokenizer()
    bare.chat_template = THINKS
    expected = bare.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)
    assert loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    again = tiny_trainer(tmp_path / "b", trainer_kwargs={"processing_class": loaded})
    assert again.plan.preparation.chat_template_kwargs == settings, "a run that goes on from it keeps them"
    records = [PreparationRecord.of(run.plan.preparation) for run in (again, trainer)]
    assert records[0].differences(records[1]) == []


def test_rows_of_other_settings_are_refused(tmp_path):
    """Catches training on rows whose prompts are not those that the checkpoint will be given."""
    tokenizer = sorting_tokenizer()
    tokenizer.chat_template = THINKS
    trainer = tiny_trainer(
        tmp_path, trainer_kwargs={"processing_class": tokenizer}, chat_template_kwargs={"enable_thinking": True}
    )
    with pytest.raises(
        ValueError, match=r'chat_template_kwargs: prepared with {"enable_thinking": true}, this run has'
    ):
        tiny_trainer(
            tmp_path,
            rows=trainer.train_dataset,
            trainer_kwargs={"processing_class": tokenizer},
            chat_template_kwargs={"enable_thinking": False},
        )


@pytest.mark.parametrize("form", ["file", "text"])
def test_template_by_flag(tmp_path, form):
    """Catches a tokenizer without a template that cannot train on conversations, or whose checkpoint has none."""
    tokenizer = sorting_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template.* give one with chat_template"):
        tiny_trainer(tmp_path / "without", trainer_kwargs={"processing_class": tokenizer})
    path = tmp_path / "mine.jinja"
    path.write_text(CHAT_TEMPLATE, encoding="utf-8")
    given = str(path) if form == "file" else CHAT_TEMPLATE
    trainer = tiny_trainer(tmp_path / "with", trainer_kwargs={"processing_class": tokenizer}, chat_template=given)
    trainer.save_model()
    assert AutoTokenizer.from_pretrained(tmp_path / "with").chat_template == CHAT_TEMPLATE
    whole = tiny_trainer(tmp_path / "own")
    assert trainer.train_dataset["input_ids"][:] == whole.train_dataset["input_ids"][:]
    records = [PreparationRecord.of(run.plan.preparation) for run in (trainer, whole)]
    assert records[0].settings == records[1].settings
    for wrong, said in (("nowhere.jinja", "neither a file nor a template"), ("{{ text }}", "never reads 'messages'")):
        with pytest.raises(ValueError, match=said):
            tiny_trainer(tmp_path / "wrong", chat_template=wrong)


# -- plain text -------------------------------------------------------------------------------------------------------


def with_bos(kind=build_tokenizer, closing: bool = False):
    """A tokenizer whose `tokenizer(text)` adds BOS, and EOS behind it where asked for."""
    tokenizer = kind()
    bos, eos = tokenizer.convert_tokens_to_ids("<pad>"), tokenizer.eos_token_id
    single = ["<pad>:0", "$A:0", *([f"{END}:0"] if closing else [])]
    tokenizer.bos_token = "<pad>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=[("<pad>", bos), (END, eos)]
    )
    return tokenizer


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("alignment", ["token", "chunk"])
def test_text_begins_as_the_tokenizer_begins_it(alignment, closing):
    """Catches rows of text without the BOS that inference gives, trained on it, given it twice in a chat, or ended
    twice."""
    tokenizer = with_bos(closing=closing)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    prepare = RowPreparation(tokenizer, build_tokenizer(), 64, 64, 8, "none", alignment)
    plain = RowPreparation(build_tokenizer(), build_tokenizer(), 64, 64, 8, "none", alignment)
    for row in ({"prompt": "Q: ", "completion": "hello"}, {"text": "hello"}, {"prompt": "Q", "completion": ""}):
        columns, without = prepare.prepare(row)[0], plain.prepare(row)[0]
        assert columns["input_ids"] == [tokenizer.bos_token_id, *without["input_ids"]]
        assert columns["labels"] == [-100, *without["labels"]] and columns["chunk_ids"] == [-1, *without["chunk_ids"]]
        assert columns["teacher_chunk_ids"] == without["teacher_chunk_ids"]
        given = tokenizer(row.get("prompt") or "")["input_ids"]
        assert untrained(columns) == (given[:-1] if closing else given)
    assert prepare.prepare(chat("Q", "A")) == plain.prepare(chat("Q", "A"))
    cut = RowPreparation(tokenizer, None, 3, 3, 8, "none").prepare({"text": "xyz"})[0]
    assert cut["input_ids"] == tokenizer("xyz")["input_ids"][:3]


PROMPTS = ["Q: ", "Q:  ", "x\n", "12", "it'", "e", "def f(x):\n    ", "(", "a\n\n", "😀", ""]
COMPLETIONS = ["hello hello", "\nx", " world", "345", "s", "\u0301x", "return x", "  y", "\n\n\nz", "é"]


@pytest.mark.parametrize(
    "kind", [build_tokenizer, qwen, deepseek, sentencepiece, lambda: build_tokenizer(trim_offsets=True)]
)
def test_prompt_is_tokenised_alone(kind):
    """Catches an answer that begins inside a token of the prompt, which no generation could produce: such rows trained
    on EOS alone and counted as kept."""
    tokenizer = kind()
    encoder, num_joined = Encoder.of(tokenizer), 0
    for prompt in PROMPTS:
        for completion in COMPLETIONS:
            encoding, joined = encoder.encode(prompt + completion, [len(prompt)])
            alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
            assert encoding.ids[: len(alone)] == alone
            decoded = [unicodedata.normalize("NFC", tokenizer.decode(ids)) for ids in (encoding.ids, whole)]
            assert decoded[0] == decoded[1]
            assert joined == (whole[: len(alone)] != alone)
            if not joined:
                assert encoding.ids == whole
            num_joined += joined
    assert num_joined >= 3


def test_split_answers_are_trained_whole_and_counted():
    """Catches the first characters of an answer left to the prompt's last token, and that said nowhere."""
    prepare = preparation()
    columns, _ = prepare.prepare({"prompt": "Q: ", "completion": "hello"})
    assert trained_text(columns, prepare.tokenizer) == "hello" + END
    rows = [{"prompt": "Q: ", "completion": "hello"}, {"prompt": "Q:", "completion": " hello"}]
    _, report = prepare_dataset(Dataset.from_list(rows), prepare)
    assert report.num_kept == 2 and report.num_split_answers == 1
    assert "1 answers tokenised separately" in str(report)


# -- the end of a row -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{"text": f"abc{END}"}, {"prompt": "abc", "completion": f"d{END}"}])
def test_text_that_ends_in_eos_gets_no_second(row):
    """Catches two ends behind a text that has one already."""
    name = "text" if "text" in row else "completion"
    expected = preparation().prepare({**row, name: row[name].removesuffix(END)})
    assert preparation().prepare(row) == expected


def test_end_of_a_text_is_each_side_s_own():
    """Catches the student's EOS left in the teacher's text as characters, beside its own."""
    teacher = build_tokenizer()
    teacher.eos_token = "<pad>"
    prepare = RowPreparation(build_tokenizer(), teacher, 64, 64, 8, "none", "chunk")
    assert prepare.prepare({"text": f"abc{END}"}) == prepare.prepare({"text": "abc"})
    assert prepare.prepare({"text": "abc"})[0]["teacher_input_ids"][-1] == teacher.eos_token_id


def other_eos(text: str = CHATML, **overrides) -> RowPreparation:
    """Turns end in <|im_end|>, and texts in another token."""
    tokenizer = build_tokenizer(text)
    tokenizer.eos_token = "<pad>"
    return RowPreparation(tokenizer, overrides.pop("teacher", None), 64, 64, 8, **overrides)


@pytest.mark.parametrize("teacher", [None, "same"])
def test_full_block_gets_an_end(teacher):
    """Catches rows that fill their last block without any EOS: what never ends is learnt by some rows in a block."""
    teacher = other_eos().tokenizer if teacher else None
    for size in range(1, 18):
        columns, _ = other_eos(teacher=teacher).prepare(chat("Q", "x" * size))
        assert columns["input_ids"][-1] == columns["labels"][-1] == other_eos().tokenizer.eos_token_id
        assert len(columns["input_ids"]) % 8 == 0
        before, _ = other_eos(eos_fill="none").prepare(chat("Q", "x" * size))
        assert 1 <= len(columns["input_ids"]) - len(before["input_ids"]) <= 8
        if teacher is not None:
            assert columns["teacher_input_ids"] == columns["input_ids"]
            assert columns["chunk_ids"] == columns["teacher_chunk_ids"]
    same, _ = preparation(eos_fill="block", with_teacher=False).prepare({"text": "abcdefg"})
    assert len(same["input_ids"]) == 8, "a row that ends in EOS needs no more"


ENDINGS = {
    "line break outside the markers": MARKED.replace("{% endgeneration %}", "{% endgeneration %}{{ '\n' }}"),
    "line break inside the markers": MARKED.replace("{% endgeneration %}", "{{ '\n' }}{% endgeneration %}"),
    "line breaks without markers": CHATML.replace("<|im_end|>\n", "<|im_end|>\n \n"),
    "nothing but line breaks": CHATML.replace("<|im_end|>\n", "\n\n"),
    "EOS outside the markers": MARKED + "{% if not add_generation_prompt %}{{ '\n' + eos_token }}{% endif %}",
}


@pytest.mark.parametrize("text", ENDINGS.values(), ids=ENDINGS.keys())
@pytest.mark.parametrize("eos_fill", ["block", "end"])
def test_nothing_stands_between_the_answer_and_its_fill(text, eos_fill):
    """Catches white space of the template behind the last answer: the row is not filled, or is behind a line break."""
    prepare = other_eos(text, eos_fill=eos_fill)
    for content in ("A", "A\n"):
        columns, _ = prepare.prepare(chat("Q", content))
        answer = trained_text(columns, prepare.tokenizer).partition("<pad>")[0]
        assert answer == content + ("" if "line breaks" in text and END not in text else END * (END in text))
        assert columns["input_ids"][-1] == columns["labels"][-1] == prepare.tokenizer.eos_token_id
    fits = len(other_eos(text, eos_fill="none").prepare(chat("Q", "A"))[0]["input_ids"])
    exact = RowPreparation(prepare.tokenizer, None, fits, fits, 8, eos_fill)
    assert exact.prepare(chat("Q", "A"))[1] is False, "cut for white space that nobody needs"


# -- the teacher's side -----------------------------------------------------------------------------------------------


def test_teacher_that_sees_no_answer_is_refused():
    """Catches a distillation of nothing, whose report said "0 truncated"."""
    rows = Dataset.from_list([chat("Q", "A"), chat("R", "hello" * 3)])
    with pytest.raises(
        ValueError, match=r"nothing would be distilled: 2 of 2 rows kept \(0 truncated, 2 on the teacher's"
    ):
        prepare_dataset(rows, preparation(teacher_max_length=4))
    stream = IterableDataset.from_generator(lambda: iter([chat("Q", "A")] * 100))
    with pytest.raises(ValueError, match="nothing would be distilled"):
        list(prepare_dataset(stream, preparation(teacher_max_length=4))[0])
    assert len(list(prepare_dataset(stream, preparation())[0])) == 100
    _, report = prepare_dataset(rows, preparation(teacher_max_length=22))
    assert (report.num_truncated, report.num_teacher_truncated) == (0, 1)
    assert 0 < report.num_aligned_tokens < report.num_trained_tokens


def test_report_without_a_teacher_does_not_speak_of_one():
    """Catches "0.0% of them aligned with the teacher" in the report of a run that has none."""
    _, report = prepare_dataset(Dataset.from_list([chat("Q", "A")]), preparation(with_teacher=False))
    assert str(report) == "1 of 1 rows kept (0 truncated), 2 trained-on tokens"

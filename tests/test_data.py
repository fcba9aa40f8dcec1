"""Rows of conversations to aligned token rows: preparation, collator, loading."""

import json
import unicodedata

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tide_hf.data import (
    COLUMNS,
    DistillationCollator,
    RowPreparation,
    RowSkipped,
    is_prepared,
    prepare_dataset,
    row_key,
)
from tide_hf.data.loading import MixtureConfig, as_messages, load_mixture, load_rows

END = "<|im_end|>"
# ChatML without markers: what comes before a turn never changes with what follows
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the same with other role names and markers, the end of the turn inside them
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>model>"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}<|im_start|>the {{ message.role }} says: {{ message.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model>{% endif %}"
)
# reasoning templates: the last turn is written with its reasoning (or an empty one), earlier turns without
DROPS_REASONING = (
    "{%- set last = namespace(user=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role != 'assistant' %}{{- message.content }}"
    "{%- elif loop.index0 < last.user %}{{- message.content.split('</think>')[-1] }}"
    "{%- elif '</think>' in message.content %}{{- message.content }}"
    "{%- else %}{{- '<think>\n\n</think>\n\n' + message.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# behind every answer but outside its markers stands a line break
LINE_AFTER = MARKED.replace("{% endgeneration %}", "{% endgeneration %}{{ '\n' }}")
# as reasoning families do: leading line breaks of the content go, an empty reasoning comes
STRIPS = MARKED.replace(
    "{{ message.content }}<|im_end|>{% end", "<think></think>{{ message.content|trim }}<|im_end|>{% end"
)
REFUSES = CHATML.replace(
    "{% for", "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{% for", 1
)
HARD_TEXTS = {
    "leading line breaks": "\n\nhello",
    "trailing line break": "hello\n",
    "CRLF": "a\r\nb\r\n\r\nc",
    "emoji": "x😀👩‍👩‍👧y",
    "NFD": "cafe\u0301 ole\u0301",
    "indentation": "if hello:\n        hello\n    \thello",
    "only spaces between": "a   b",
}


def build_tokenizer(template=CHATML, normalizer=None, trim_offsets=False):
    """Byte-level BPE with a few merges and ChatML's special tokens."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ġ", "hello")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = ByteLevelDecoder()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<pad>", "<|im_start|>", END)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=END, clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = template
    return wrapped


def preparation(template=CHATML, teacher_template=CHATML, with_teacher=True, **overrides) -> RowPreparation:
    values = {"max_length": 512, "teacher_max_length": 512, "block_size": 8, "eos_fill": "none", **overrides}
    return RowPreparation(
        tokenizer=build_tokenizer(template),
        teacher_tokenizer=build_tokenizer(teacher_template) if with_teacher else None,
        **values,
    )


def chat(*contents) -> dict:
    """A conversation of alternating user and assistant messages."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]}


def trained_text(columns, tokenizer) -> str:
    assert all(label in (-100, token) for label, token in zip(columns["labels"], columns["input_ids"], strict=True))
    return tokenizer.decode([label for label in columns["labels"] if label != -100])


def aligned_pairs(columns) -> list[tuple[int, int]]:
    """(student id, teacher id) of each chunk, after checking that each chunk is one token on each side."""
    sides = []
    for ids, chunks in (("input_ids", "chunk_ids"), ("teacher_input_ids", "teacher_chunk_ids")):
        assert len(columns[ids]) == len(columns[chunks])
        numbered = [(chunk, token) for token, chunk in zip(columns[ids], columns[chunks], strict=True) if chunk >= 0]
        assert len(dict(numbered)) == len(numbered), "a chunk number stands twice on one side"
        sides.append(dict(numbered))
    student, teacher = sides
    assert student.keys() == teacher.keys(), "a chunk stands on one side only"
    return [(student[chunk], teacher[chunk]) for chunk in sorted(student)]


# -- what is trained on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "one<|im_end|>two<|im_end|>"),
        (MARKED, "one<|im_end|>two<|im_end|>"),
        (DROPS_REASONING, "one<|im_end|><think>\n\n</think>\n\ntwo<|im_end|>"),
    ],
    ids=["ChatML", "generation markers", "drops reasoning"],
)
def test_every_assistant_turn_is_trained_on_and_no_prompt(template, expected):
    """Catches a turn left out (only the last one trained) and a prompt, header or system message trained on."""
    prepare = preparation(template, template)
    row = {"messages": [{"role": "system", "content": "be short"}, *chat("Q1", "one", "Q2", "two")["messages"]]}
    columns, truncated = prepare.prepare(row)
    assert not truncated
    assert trained_text(columns, prepare.tokenizer) == expected
    assert len(aligned_pairs(columns)) == sum(label != -100 for label in columns["labels"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q:\n", "completion": "hello"}, "hello" + END),
        ({"prompt": None, "completion": "hello"}, "hello" + END),
        ({"text": "hello there"}, "hello there" + END),
        ({"prompt": chat("Q")["messages"], "completion": [{"role": "assistant", "content": "A"}]}, "A<|im_end|>"),
        (
            {"prompt": chat("Q", "old", "R")["messages"], "completion": [{"role": "assistant", "content": "new"}]},
            "new<|im_end|>",
        ),
        ({"messages": None, "completion": None, "text": "hello"}, "hello" + END),
    ],
    ids=["prompt and completion", "no prompt", "text", "lists", "lists with an old turn", "empty columns"],
)
def test_formats_of_rows(row, expected):
    """Catches a prompt's own assistant turn, or the prompt itself, being trained on in the completion formats."""
    prepare = preparation()
    columns, _ = prepare.prepare(row)
    assert trained_text(columns, prepare.tokenizer) == expected
    assert columns["labels"][-1] != -100
    assert len(aligned_pairs(columns)) == sum(label != -100 for label in columns["labels"])


@pytest.mark.parametrize("template", [CHATML, MARKED, DROPS_REASONING], ids=["ChatML", "markers", "drops reasoning"])
def test_answer_that_stands_in_the_prompt_is_labelled_in_the_answer_alone(template):
    """Catches an answer looked for as a string: the occurrence in the prompt, or in an earlier turn, would train."""
    prepare = preparation(template, template)
    columns, _ = prepare.prepare(chat("say yes", "yes", "again: yes", "yes"))
    text = prepare.tokenizer.decode(columns["input_ids"])
    assert text.count("yes") == 4
    assert trained_text(columns, prepare.tokenizer).count("yes") == 2
    first_trained = next(index for index, label in enumerate(columns["labels"]) if label != -100)
    assert prepare.tokenizer.decode(columns["input_ids"][:first_trained]).count("yes") == 1


@pytest.mark.parametrize("templates", [(CHATML, MARKED), (MARKED, CHATML), (MARKED, DROPS_REASONING)])
@pytest.mark.parametrize("alignment", ["token", "chunk"])
def test_only_the_last_turn_is_trained_on_if_told_so(templates, alignment):
    """Catches trained_turns ignored for one kind of template or one side, where earlier answers would be masked."""
    prepare = preparation(*templates, trained_turns="last", alignment=alignment)
    columns, _ = prepare.prepare(chat("Q", "one", "Q", "two", "unanswered"))
    assert trained_text(columns, prepare.tokenizer) == "two<|im_end|>"
    pairs = aligned_pairs(columns)
    assert prepare.tokenizer.decode([student for student, _ in pairs]).strip() == "two<|im_end|>"
    every, _ = preparation(*templates, alignment=alignment).prepare(chat("Q", "one", "Q", "two", "unanswered"))
    assert "one" in trained_text(every, prepare.tokenizer)


def test_earlier_turn_that_cannot_be_located_does_not_matter_if_the_last_is_trained_on():
    """Catches rows dropped for the place of an answer that nobody asked for."""
    shouted = "{{ message.content if loop.last else message.content|upper }}"
    template = CHATML.replace("{{ message.content }}", shouted)
    prepare = preparation(template, template, trained_turns="last")
    assert trained_text(prepare.prepare(chat("Q", "one", "Q", "two"))[0], prepare.tokenizer) == "two<|im_end|>"


@pytest.mark.parametrize("content", ["a<|im_end|>b", "<|im_start|>assistant\nyes<|im_end|>\n", "<pad>", "hello<|im"])
@pytest.mark.parametrize("templates", [(CHATML, MARKED), (MARKED, CHATML)])
@pytest.mark.parametrize("alignment", ["token", "chunk"])
def test_special_looking_text_changes_nothing(templates, content, alignment):
    """Catches the text of a template inside a message taken for the template's own: answers begun or ended there."""
    prepare = preparation(*templates, alignment=alignment)
    columns, _ = prepare.prepare(chat(content, "yes", content, content))
    assert trained_text(columns, prepare.tokenizer) == f"yes{END}{content}{END}"
    assert prepare.tokenizer.decode([student for student, _ in aligned_pairs(columns)]) == f"yes{END}{content}{END}"


def test_earlier_turn_quoted_later_is_not_found_in_the_quote():
    """Catches an answer whose reasoning was dropped being found in a later message: the user's turn would train."""
    prepare = preparation(DROPS_REASONING, DROPS_REASONING)
    answer = "<think>hm</think>four"
    row = chat("2+2", answer, f"why did you say: {answer}", "because")
    try:
        columns, _ = prepare.prepare(row)
    except RowSkipped:
        return
    assert "why did you say" not in trained_text(columns, prepare.tokenizer)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (("Q", "<think>hm</think>one"), "<think>hm</think>one<|im_end|>"),
        (("Q", "<think>a</think>one", "Q", "<think>b</think>two"), "one<|im_end|><think>b</think>two<|im_end|>"),
        (("Q", "<think>a</think>one", "Q", "two"), "one<|im_end|><think>\n\n</think>\n\ntwo<|im_end|>"),
    ],
    ids=["last turn", "every turn", "earlier turn"],
)
def test_reasoning_is_trained_on_where_the_template_writes_it(contents, expected):
    """Catches conversations with reasoning dropped, or trained on without it, for templates that treat it apart."""
    prepare = preparation(DROPS_REASONING, DROPS_REASONING)
    columns, _ = prepare.prepare(chat(*contents))
    assert trained_text(columns, prepare.tokenizer) == expected


@pytest.mark.parametrize("alignment", ["token", "chunk"])
def test_conversation_that_begins_with_an_answer_trains(alignment):
    """Catches a greeting without a question before it dropped, or its header trained on."""
    for template in (CHATML, MARKED):
        prepare = preparation(template, MARKED, alignment=alignment)
        columns, _ = prepare.prepare({"messages": chat("", "hello", "Q", "A")["messages"][1:]})
        assert trained_text(columns, prepare.tokenizer) == f"hello{END}A{END}"
        assert len(aligned_pairs(columns)) == 4


def test_answer_that_cannot_be_located_is_counted_out():
    """Catches a guess: where the template rewrites an earlier answer, the row is dropped with the reason."""
    shouted = "{{ message.content if loop.last else message.content|upper }}"
    template = CHATML.replace("{{ message.content }}", shouted)
    prepare = preparation(template, template)
    with pytest.raises(RowSkipped, match=r"assistant message 1 .*generation"):
        prepare.prepare(chat("Q", "one", "Q", "two"))


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "{0}<|im_end|>{0}<|im_end|>"),
        (MARKED, "{0}<|im_end|>{0}<|im_end|>"),
        (DROPS_REASONING, "{0}<|im_end|><think>\n\n</think>\n\n{0}<|im_end|>"),
    ],
    ids=["ChatML", "markers", "drops reasoning"],
)
def test_hard_characters_are_trained_on_whole(template, expected, text):
    """Catches an answer cut or shifted by characters that are several bytes, or that a normalizer replaces."""
    for normalizer in (None, normalizers.NFC()):
        tokenizer = build_tokenizer(template, normalizer)
        columns, _ = RowPreparation(tokenizer, tokenizer, 512, 512, 8, "none").prepare(chat(text, text, text, text))
        written = unicodedata.normalize("NFC", text) if normalizer else text
        assert trained_text(columns, tokenizer) == expected.format(written)
        assert len(aligned_pairs(columns)) == sum(label != -100 for label in columns["labels"])


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
def test_tokenizer_that_trims_offsets_trains_on_spaces(text):
    """Catches indentation never trained on: offsets of a token of spaces are empty with trim_offsets (Llama 3)."""
    tokenizer = build_tokenizer(MARKED, trim_offsets=True)
    columns, _ = RowPreparation(tokenizer, tokenizer, 512, 512, 8, "none").prepare(chat("Q", text))
    assert trained_text(columns, tokenizer) == text + END


# -- alignment --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
def test_two_templates_pair_equal_tokens(text):
    """Catches pairs shifted by the other template's header, and answers that lose their partners silently."""
    prepare = preparation(CHATML, MARKED)
    columns, _ = prepare.prepare(chat("Q", text, "again", "hello " + text))
    pairs = aligned_pairs(columns)
    assert all(student == teacher for student, teacher in pairs)
    assert prepare.tokenizer.decode([student for student, _ in pairs]) == f"{text}{END}hello {text}{END}"
    assert columns["input_ids"] != columns["teacher_input_ids"]


@pytest.mark.parametrize(
    "templates", [(CHATML, DROPS_REASONING), (DROPS_REASONING, CHATML)], ids=["teacher", "student"]
)
def test_text_that_one_template_puts_before_the_content_shifts_nothing(templates):
    """Catches an empty reasoning that one side writes moving every token behind it away from its partner."""
    prepare = preparation(*templates)
    columns, _ = prepare.prepare(chat("Q", "hello\n\nhello"))
    pairs = aligned_pairs(columns)
    assert all(student == teacher for student, teacher in pairs)
    assert prepare.tokenizer.decode([student for student, _ in pairs]) == f"hello\n\nhello{END}"


@pytest.mark.parametrize("text", ["hello", "\n\nhello", "hello\n"])
def test_template_that_strips_content_still_aligns(text):
    """Catches alignment lost for a whole answer because one template trims its line breaks behind a prefix."""
    prepare = preparation(STRIPS, CHATML)
    columns, _ = prepare.prepare(chat("Q", text))
    assert "hello" in prepare.tokenizer.decode([student for student, _ in aligned_pairs(columns)])


def test_truncated_teacher_drops_chunks_on_both_sides():
    """Catches chunk numbers that point behind the teacher's cut, and labels lost with them."""
    whole, _ = preparation(CHATML, MARKED).prepare(chat("Q", "abcdefgh"))
    length = len(whole["teacher_input_ids"]) - 4
    cut, truncated = preparation(CHATML, MARKED, teacher_max_length=length).prepare(chat("Q", "abcdefgh"))
    assert not truncated and len(cut["teacher_input_ids"]) == length
    assert cut["labels"] == whole["labels"], "the student trains on the whole answer all the same"
    assert 0 < len(aligned_pairs(cut)) < len(aligned_pairs(whole))
    assert aligned_pairs(cut) == aligned_pairs(whole)[: len(aligned_pairs(cut))]


def test_truncated_student_drops_chunks_on_both_sides():
    """Catches teacher positions masked and asked for tokens that the student lost to its own cut."""
    whole, _ = preparation(CHATML, MARKED).prepare(chat("Q", "abcdefgh"))
    length = len(whole["input_ids"]) - 4
    cut, truncated = preparation(CHATML, MARKED, max_length=length).prepare(chat("Q", "abcdefgh"))
    assert truncated and len(cut["input_ids"]) == length
    assert 0 < len(aligned_pairs(cut)) < len(aligned_pairs(whole))


def test_no_teacher_leaves_its_columns_empty():
    """Catches a run without teacher paying for, or training on, a second rendering."""
    columns, _ = preparation(with_teacher=False, eos_fill="block").prepare(chat("Q", "A"))
    assert columns["teacher_input_ids"] == columns["teacher_chunk_ids"] == []
    assert set(columns["chunk_ids"]) == {-1} and len(columns["chunk_ids"]) == len(columns["input_ids"])


# -- what follows the last answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eos_fill", "text", "length"),
    [
        ("none", "abc", 4),
        ("block", "abc", 8),
        ("block", "abcdefg", 8),
        ("block", "abcdefgi", 16),
        ("end", "abc", 16),
        ("end", "abcdefgijklmnop", 16),
    ],
)
def test_eos_fill(eos_fill, text, length):
    """Catches a fill that is off by a block, not trained on, or not aligned with the teacher's."""
    prepare = preparation(eos_fill=eos_fill, max_length=16, teacher_max_length=16)
    columns, truncated = prepare.prepare({"text": text})
    eos = prepare.tokenizer.eos_token_id
    assert not truncated
    assert columns["input_ids"][: len(text)] == prepare.tokenizer(text)["input_ids"]
    assert columns["input_ids"][len(text) :] == [eos] * (length - len(text))
    assert columns["labels"] == columns["input_ids"] == columns["teacher_input_ids"]
    assert columns["chunk_ids"] == columns["teacher_chunk_ids"] == list(range(length))


@pytest.mark.parametrize("eos_fill", ["block", "end"])
def test_fill_of_two_templates_pairs_in_order(eos_fill):
    """Catches fill of different length on the two sides leaving chunks without a partner."""
    plain, _ = preparation(CHATML, MARKED).prepare(chat("Q", "abcd"))
    limits = {"max_length": 40, "teacher_max_length": 48}
    columns, _ = preparation(CHATML, MARKED, eos_fill=eos_fill, **limits).prepare(chat("Q", "abcd"))
    added = len(columns["input_ids"]) - len(plain["input_ids"])
    teacher_added = len(columns["teacher_input_ids"]) - len(plain["teacher_input_ids"])
    assert added > 0 and teacher_added > 0 and added != teacher_added
    eos = preparation().tokenizer.eos_token_id
    assert aligned_pairs(columns)[len(aligned_pairs(plain)) :] == [(eos, eos)] * min(added, teacher_added)
    assert columns["labels"][-added:] == [eos] * added
    first = len(plain["input_ids"])
    shared = columns["chunk_ids"][first : first + min(added, teacher_added)]
    assert shared == list(range(shared[0], shared[0] + len(shared)))
    assert set(columns["chunk_ids"][first + len(shared) :]) <= {-1}


def test_no_fill_behind_a_prompt():
    """Catches EOS taught as the answer to a last user message that nobody has answered."""
    columns, _ = preparation(eos_fill="end").prepare(chat("Q", "A", "unanswered"))
    assert columns["labels"][-1] == -100


def test_fill_follows_an_answer_that_a_line_break_follows():
    """Catches eos_fill silently off for templates that write a line break behind their {% generation %} block."""
    prepare = preparation(LINE_AFTER, LINE_AFTER, eos_fill="end", max_length=64, teacher_max_length=64)
    columns, _ = prepare.prepare(chat("Q", "A"))
    assert len(columns["input_ids"]) == 64
    assert columns["labels"][-1] == prepare.tokenizer.eos_token_id


def test_truncated_row_gets_no_fill():
    """Catches a model taught to stop in the middle of an answer that was merely cut."""
    for eos_fill in ("block", "end"):
        prepare = preparation(eos_fill=eos_fill, max_length=16, teacher_max_length=64)
        columns, truncated = prepare.prepare({"text": "a" * 40})
        assert truncated and len(columns["input_ids"]) == 16
        assert prepare.tokenizer.eos_token_id not in columns["input_ids"]
        assert len(columns["teacher_input_ids"]) == 41, "the whole answer and its own end, nothing behind it"


def test_truncated_teacher_gets_no_fill_at_its_cut():
    """Catches an EOS right behind the teacher's cut answer, paired with the student's real end."""
    prepare = preparation(eos_fill="block", teacher_max_length=10)
    columns, truncated = prepare.prepare({"text": "abcdefgijklmn"})
    assert not truncated and len(columns["input_ids"]) == 16
    assert prepare.tokenizer.eos_token_id not in columns["teacher_input_ids"]
    assert aligned_pairs(columns) == [(token, token) for token in columns["input_ids"][:10]]


# -- rows that cannot train -------------------------------------------------------------------------------------------

LONG_PROMPT = chat("Q" * 100, "A")
UNTRAINABLE = {
    "no answer token within max_length=64": LONG_PROMPT,
    "empty conversation": {"messages": []},
    "no assistant message": chat("Q"),
    "a message's content is not text": {"messages": [{"role": "user", "content": None}, *chat("Q", "A")["messages"]]},
    "chat template: user first": {"messages": chat("Q", "A")["messages"][1:]},
}


@pytest.mark.parametrize(("reason", "row"), UNTRAINABLE.items(), ids=UNTRAINABLE.keys())
def test_row_that_cannot_train_says_why(reason, row):
    """Catches rows that vanish, or train on nothing, without a reason."""
    with pytest.raises(RowSkipped, match=reason):
        preparation(REFUSES, REFUSES, max_length=64).prepare(row)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("place", ["question", "answer", "behind the cut"])
def test_mask_token_in_the_text_is_counted_out(side, place):
    """Catches a [MASK] of the data taken for noise, or trained on as the answer."""
    texts = {"question": ("hello<pad>", "A"), "answer": ("Q", "x<pad>"), "behind the cut": ("Q", "b" * 90 + "<pad>")}
    rows = Dataset.from_list([chat("Q", "A"), chat(*texts[place])])
    mask = build_tokenizer().convert_tokens_to_ids("<pad>")
    name = {"student": "mask_token_id", "teacher": "teacher_mask_token_id"}[side]
    prepared, report = prepare_dataset(rows, preparation(max_length=64, teacher_max_length=64, **{name: mask}))
    if place == "behind the cut":
        assert len(prepared) == 2
    else:
        assert len(prepared) == 1
        assert report.dropped == {f"the {side}'s mask token '<pad>' is part of the text": 1}


def test_mask_token_that_is_an_ordinary_one_is_counted_out():
    """Catches a word of the vocabulary used as [MASK]: where it stands as a word nothing is masked."""
    mask = build_tokenizer().convert_tokens_to_ids("hello")
    rows = Dataset.from_list([chat("Q", "A"), chat("Q", "hello"), chat("Q", "hell")])
    prepared, report = prepare_dataset(rows, preparation(mask_token_id=mask))
    assert len(prepared) == 2 and sum(report.dropped.values()) == 1
    with pytest.raises(ValueError, match=r"No row is left.*1 dropped: the student's mask token 'hello'"):
        prepare_dataset(rows.select([1]), preparation(mask_token_id=mask))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_mask_token_outside_the_vocabulary_is_refused(side):
    """Catches a mask token that was named and never added: its id is that of all unknown text."""
    tokenizer = build_tokenizer()
    tokenizer.unk_token, tokenizer.mask_token = "<pad>", "<mask>"
    assert tokenizer.mask_token_id == tokenizer.unk_token_id
    sides = (tokenizer, build_tokenizer()) if side == "student" else (build_tokenizer(), tokenizer)
    masks = {"mask_token_id": sides[0].mask_token_id, "teacher_mask_token_id": sides[1].mask_token_id}
    with pytest.raises(ValueError, match=f"The {side}'s mask token '<mask>' is not in its vocabulary.*add_special"):
        RowPreparation(*sides, 64, 64, 8, **masks)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    RowPreparation(
        *sides, 64, 64, 8, **{**masks, f"{'teacher_' * (side == 'teacher')}mask_token_id": len(tokenizer) - 1}
    )


@pytest.mark.parametrize("alignment", ["token", "chunk"])
@pytest.mark.parametrize("side", [0, 1])
def test_slow_tokenizer_of_either_side_is_refused(alignment, side):
    """Catches a slow tokenizer met at the first row, or only where its bytes are needed."""
    sides = [build_tokenizer(), build_tokenizer()]

    class Slow:
        is_fast, name_or_path, eos_token_id = False, "some/model", 1

    sides[side] = Slow()
    with pytest.raises(ValueError, match="some/model is a slow tokenizer"):
        RowPreparation(*sides, 64, 64, 8, alignment=alignment)


def test_template_that_only_the_teacher_refuses_is_counted():
    """Catches a conversation kept without its teacher's side."""
    rows = Dataset.from_list([chat("Q", "A"), {"messages": chat("Q", "A")["messages"][1:]}])
    prepared, report = prepare_dataset(rows, preparation(CHATML, REFUSES, alignment="chunk"))
    assert len(prepared) == 1 and report.dropped == {"chat template: user first": 1}


@pytest.mark.parametrize("messages", [[{"content": "A"}], [{"role": None, "content": "A"}]])
def test_message_without_role_is_counted_out(messages):
    """Catches a KeyError far from its cause for one broken message."""
    with pytest.raises(RowSkipped, match="a message's role is not text"):
        preparation().prepare({"messages": messages})


def test_unknown_settings_are_refused():
    """Catches a misspelt choice taken for the default."""
    with pytest.raises(ValueError, match="trained_turns is 'first'; expected one of all, last"):
        preparation(trained_turns="first")
    with pytest.raises(ValueError, match="eos_fill is 'blocks'; expected one of none, block, end"):
        preparation(eos_fill="blocks")


def test_content_in_parts_is_counted_out():
    """Catches a multimodal message (a list of parts) rendered as its Python representation."""
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, chat("Q", "A")["messages"][1]]}
    with pytest.raises(RowSkipped, match="content is not text"):
        preparation().prepare(parts)


def test_report_counts_every_row_once():
    """Catches reports that do not add up: rows lost, counted twice, or tokens counted before the cut."""
    good, cut = chat("Q", "hello"), chat("Q", "b" * 100)
    rows = [good, LONG_PROMPT, *list(UNTRAINABLE.values())[1:], cut, LONG_PROMPT, good]
    prepare = preparation(REFUSES, REFUSES, max_length=64, eos_fill="end", teacher_max_length=64)
    prepared, report = prepare_dataset(Dataset.from_list(rows), prepare)
    assert (report.num_rows, report.num_kept, report.num_truncated) == (9, 3, 1)
    expected = {f"{reason}": 1 for reason in UNTRAINABLE} | {"no answer token within max_length=64": 2}
    assert report.dropped == expected
    assert report.num_rows == report.num_kept + sum(report.dropped.values())
    assert report.num_trained_tokens == sum(label != -100 for labels in prepared["labels"] for label in labels)
    assert report.num_trained_tokens == report.num_aligned_tokens > 0
    assert str(report).startswith("3 of 9 rows kept (1 truncated, 1 on the teacher's side)")
    assert all(f"dropped: {reason}" in str(report) for reason in expected)
    assert prepared["row_key"][0] == row_key(prepared["input_ids"][0], prepared["labels"][0])
    assert len(set(prepared["row_key"])) == 3, "of equal rows each has a key of its own"
    assert set(prepared.column_names) == set(COLUMNS) and is_prepared(prepared)


def test_report_counts_chunks_of_several_tokens():
    """Catches tokens counted as chunks, and chunks lost or counted twice behind a cut."""
    letters = build_tokenizer()
    letters.backend_tokenizer.model = BPE(letters.get_vocab(), [])
    for teacher_max_length in (512, 30):
        prepare = RowPreparation(letters, build_tokenizer(), 512, teacher_max_length, 8, alignment="chunk")
        rows = [chat("Q", "hello hello    hello"), chat("Q", "hello")]
        prepared, report = prepare_dataset(Dataset.from_list(rows), prepare)
        numbers = [[number for number in row if number >= 0] for row in prepared["chunk_ids"]]
        assert report.num_aligned_tokens == sum(map(len, numbers))
        assert report.num_chunks == sum(len(set(row)) for row in numbers) < report.num_aligned_tokens


def test_several_processes_prepare_the_same_rows():
    """Catches rows that depend on the process of Dataset.map that prepared them."""
    rows = Dataset.from_list([chat("Q", "A" * index) for index in range(1, 7)])
    alone, _ = prepare_dataset(rows, preparation())
    together, report = prepare_dataset(rows, preparation(), num_proc=2)
    assert together.to_list() == alone.to_list()
    assert len(set(together["row_key"])) == report.num_kept == 6


@pytest.mark.parametrize("columns_known", [True, False])
def test_streaming_gives_the_same_rows(columns_known):
    """Catches a streaming dataset that keeps dropped rows or numbers the kept ones anew."""
    rows = [chat("Q", "one"), chat("Q"), LONG_PROMPT, chat("Q", "two")]
    prepare = preparation(max_length=64)
    table, _ = prepare_dataset(Dataset.from_list(rows), prepare)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    if not columns_known:
        stream = IterableDataset.from_generator(lambda: iter(rows))
        assert stream.column_names is None
    streamed, report = prepare_dataset(stream, prepare)
    assert report is None
    assert [{name: row[name] for name in COLUMNS} for row in streamed] == [
        {name: row[name] for name in COLUMNS} for row in table
    ]


def test_missing_columns_are_named():
    """Catches an error far from its cause for data whose conversation has another name."""
    with pytest.raises(
        ValueError, match=r"columns question, answer; expected 'messages', 'conversations'.* 'text'\. Rename"
    ):
        prepare_dataset(Dataset.from_list([{"question": "Q", "answer": "A"}]), preparation())


def test_nothing_left_is_an_error_with_counts():
    """Catches a run of zero steps that reports success."""
    with pytest.raises(ValueError, match=r"No row is left.*0 of 2 rows kept.*2 dropped: no assistant message"):
        prepare_dataset(Dataset.from_list([chat("Q"), chat("R")]), preparation())


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_missing_chat_template_is_an_error(side):
    """Catches every row being dropped one by one for a tokenizer without any template."""
    templates = (None, CHATML) if side == "student" else (CHATML, None)
    with pytest.raises(ValueError, match="has no chat template") as error:
        prepare_dataset(Dataset.from_list([chat("Q", "A")]), preparation(*templates))
    assert "No row is left" not in str(error.value), "said at the first row, not after all of them"


def test_unmarked_assistant_turn_is_an_error():
    """Catches answers shifted by one turn where a template marks some of them only."""
    template = MARKED.replace("{% if message.role == 'assistant' %}", "{% if loop.last %}", 1)
    with pytest.raises(RowSkipped, match="marks 1 generations for 2 assistant messages"):
        preparation(template, template).prepare(chat("Q", "A", "Q", "B"))


# -- collator ---------------------------------------------------------------------------------------------------------


def test_padding_is_never_attended_trained_on_or_aligned():
    """Catches padding that reaches the loss, the teacher or the attention."""
    short = {
        "row_key": 7,
        "input_ids": [1, 2],
        "labels": [-100, 2],
        "chunk_ids": [-1, 0],
        "teacher_input_ids": [3, 4, 2],
        "teacher_chunk_ids": [-1, -1, 0],
    }
    longer = {
        "row_key": 9,
        "input_ids": [1, 5, 6],
        "labels": [-100, 5, 6],
        "chunk_ids": [-1, 0, 1],
        "teacher_input_ids": [5, 6],
        "teacher_chunk_ids": [0, 1],
    }
    batch = DistillationCollator(pad_token_id=50, teacher_pad_token_id=60)([short, longer])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "row_key": [7, 9],
        "input_ids": [[1, 2, 50], [1, 5, 6]],
        "labels": [[-100, 2, -100], [-100, 5, 6]],
        "chunk_ids": [[-1, 0, -1], [-1, 0, 1]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "teacher_input_ids": [[3, 4, 2], [5, 6, 60]],
        "teacher_chunk_ids": [[-1, -1, 0], [0, 1, -1]],
        "teacher_attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    alone = DistillationCollator(pad_token_id=50)([{**short, "teacher_input_ids": [], "teacher_chunk_ids": []}])
    assert not any(name.startswith("teacher") for name in alone)


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the datasets library."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_local_data_loads(tmp_path, cache, suffix):
    """Catches a local path taken for a Hub name, and text changed on the way."""
    rows = [chat("Q\r\n", "é😀"), chat("R", "\n\nA")]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    assert load_rows(str(path)).to_list() == rows
    if suffix:
        assert load_rows(str(path), split=None)["train"].to_list() == rows
        assert list(load_rows(str(path), streaming=True)) == rows


def test_saved_splits_are_chosen(tmp_path, cache):
    """Catches the wrong split of a saved DatasetDict."""
    DatasetDict(
        train=Dataset.from_list([chat("Q", "train")]), test=Dataset.from_list([chat("Q", "test")])
    ).save_to_disk(tmp_path / "data")
    assert load_rows(str(tmp_path / "data"), split="test").to_list() == [chat("Q", "test")]
    assert set(load_rows(str(tmp_path / "data"), split=None)) == {"train", "test"}


@pytest.mark.parametrize("kind", ["one table", "splits"])
def test_part_of_a_saved_split_is_taken(tmp_path, cache, kind):
    """Catches "train[:2]" of a saved folder training on all of it, or failing with a bare KeyError."""
    rows = Dataset.from_list([chat("Q", str(index)) for index in range(4)])
    (rows if kind == "one table" else DatasetDict(train=rows)).save_to_disk(tmp_path / "data")
    try:
        loaded = load_rows(str(tmp_path / "data"), split="train[:2]")
    except ValueError as error:
        assert "split" in str(error)
        return
    assert loaded.to_list() == rows.to_list()[:2]


def test_unknown_file_is_refused(tmp_path):
    """Catches a file of another kind looked up on the Hub."""
    path = tmp_path / "data.txt"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"ends in '\.txt'; expected one of \.jsonl, \.json, \.parquet"):
        load_rows(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "output": "A", "tag": "x"},
        {"prompt": chat("Q")["messages"], "completion": [{"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "id": "1"},
        {**chat("Q", "A"), "score": 0.5},
    ],
    ids=["instruction", "lists", "ShareGPT", "more columns"],
)
def test_columns_become_messages(row):
    """Catches roles swapped in what a comparison prompts with and compares to."""
    rows = as_messages(Dataset.from_list([row]))
    assert rows.column_names == ["messages"]
    assert rows.to_list() == [chat("Q", "A")]


def test_rows_without_conversation_are_no_messages():
    """Catches a comparison of answers to prompts with rows that have neither."""
    with pytest.raises(ValueError, match="plain text: give 'messages'"):
        as_messages(Dataset.from_list([{"text": "hello"}]))


def without_none(rows) -> list[dict]:
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def mixture_parts(tmp_path) -> list[dict]:
    first = write_jsonl(tmp_path / "a.jsonl", [{**chat("Q", f"{i} python"), "source": "a"} for i in range(6)])
    pairs = [{"instruction": "R", "output": ("java", "python")[i % 2], "id": i} for i in range(4)]
    second = write_jsonl(tmp_path / "b.jsonl", pairs)
    return [{"path": first}, {"path": second, "answer_contains": "python"}]


def test_mixture_joins_parts_with_different_columns(tmp_path, cache):
    """Catches a mixture that drops a part, ignores its filter, or evaluates on rows it trains on."""
    parts = mixture_parts(tmp_path)
    expected = [chat("Q", f"{i} python") for i in range(6)] + [{"instruction": "R", "output": "python"}] * 2
    whole = load_mixture(MixtureConfig(datasets=parts))
    assert set(whole) == {"train"} and without_none(whole["train"]) == expected
    split = load_mixture(MixtureConfig(datasets=parts, test_split_size=0.25))
    assert (len(split["train"]), len(split["test"])) == (6, 2)
    assert sorted(without_none([*split["train"], *split["test"]]), key=str) == sorted(expected, key=str)
    again = load_mixture(MixtureConfig(datasets=parts, test_split_size=0.25))
    assert again["test"].to_list() == split["test"].to_list(), "the same rows are held out in every process"


def test_mixture_of_messages_with_and_without_more_fields(tmp_path, cache):
    """Catches parts that cannot be joined because the messages of one carry ids or names, or that lose them."""
    more = [{"messages": [{**message, "name": "x"} for message in chat("Q", "A")["messages"]]}]
    parts = [{"path": write_jsonl(tmp_path / "a.jsonl", more)}]
    parts.append({"path": write_jsonl(tmp_path / "b.jsonl", [chat("R", "B")])})
    assert load_mixture(MixtureConfig(datasets=parts))["train"].to_list() == [*more, chat("R", "B")]


def test_mixture_of_different_string_types(tmp_path, cache):
    """Catches parts that cannot be joined because one writer stores long strings (polars, newer pyarrow)."""
    message = {"role": datasets.Value("large_string"), "content": datasets.Value("large_string")}
    features = datasets.Features({"messages": datasets.List(message)})
    Dataset.from_list([chat("Q", "A")], features=features).to_parquet(tmp_path / "large.parquet")
    plain = write_jsonl(tmp_path / "plain.jsonl", [chat("R", "B")])
    rows = load_mixture(MixtureConfig(datasets=[{"path": str(tmp_path / "large.parquet")}, {"path": plain}]))
    assert rows["train"].to_list() == [chat("Q", "A"), chat("R", "B")]


def test_streaming_mixture(tmp_path, cache):
    """Catches a streaming mixture that fails halfway or silently loads everything."""
    parts = mixture_parts(tmp_path)
    rows = load_mixture(MixtureConfig(datasets=parts, streaming=True))["train"]
    assert isinstance(rows, IterableDataset)
    expected = [chat("Q", f"{i} python") for i in range(6)] + [{"instruction": "R", "output": "python"}] * 2
    assert without_none(rows) == expected


def test_streaming_mixture_cannot_be_split(tmp_path, cache):
    """Catches test_split_size of a stream ending in an AttributeError that names no setting."""
    with pytest.raises(ValueError, match="test_split_size"):
        load_mixture(MixtureConfig(datasets=mixture_parts(tmp_path), streaming=True, test_split_size=0.25))


def test_fraction_is_refused():
    """Catches a share of a part that TRL would take and this mixture would ignore."""
    with pytest.raises(ValueError, match=r"fraction is not supported.*split: train"):
        MixtureConfig(datasets=[{"path": "x", "fraction": 0.5}])

"""Chunks across tokenizers: token bytes, stretches of equal text, cuts, and their use in preparation."""

import copy
import random
import unicodedata
from collections import defaultdict
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset
from real_tokenizers import DEEPSEEK_TEMPLATE, QWEN_TEMPLATE, deepseek, qwen, sentencepiece, wordpiece

from tide_hf.alignment import (
    Answer,
    TokenBytes,
    align_chunks,
    align_equal_tokens,
    answer_tokens,
    answers_in_bytes,
    cut_equal_bytes,
    drop_cut_chunks,
    render_chat,
)
from tide_hf.alignment.stretches import resynchronise
from tide_hf.data import RowPreparation, RowSkipped, prepare_dataset

TOKENIZERS = {
    "qwen": qwen,
    "raw qwen": lambda: qwen(normalize=False),
    "deepseek": deepseek,
    "sentencepiece": sentencepiece,
    "wordpiece": wordpiece,
}
PAIRS = [
    ("raw qwen", "deepseek"),
    ("qwen", "deepseek"),
    ("deepseek", "qwen"),
    ("qwen", "sentencepiece"),
    ("sentencepiece", "deepseek"),
    ("wordpiece", "deepseek"),
    ("wordpiece", "sentencepiece"),
    ("wordpiece", "wordpiece"),
    ("qwen", "qwen"),
]
# what random texts are made of: each kind breaks another assumption about characters, bytes or tokens
PARTS = [
    *("hello", " world", "the answer", " is", "\n", "\r\n", "\n\n", "  ", "        ", "\t", " ", "0", "12345", "3.14"),
    *(
        "def f(x):\n    return x\n",
        "<|im_end|>",
        "<|im_start|>",
        "<｜end▁of▁sentence｜>",
        "</s>",
        "##lo",
        "<0x41>",
        "▁",
    ),
    *(
        "café",
        "cafe\u0301",
        "naïve",
        "o\u0308\u0323",
        "한국어",
        "\u1112\u1161\u11ab",
        "中文分词",
        "日本語です。",
        "Ω",
        "ﬁ",
    ),
    *(
        "😀",
        "👩‍👩‍👧",
        "🇩🇪",
        "\u200b",
        "\u00a0",
        "\u00ad",
        "\x00",
        "\x7f",
        "\ufeff",
        "\ue000",
        "\U0010ffff",
        "ไทย",
        "अनुच्छेद",
    ),
]
HARD_TEXTS = {
    "leading line breaks": "\n\nhello",
    "trailing line breaks": "hello\n\n",
    "CRLF": "a\r\nb\r\n\r\nc",
    "emoji": "x😀👩‍👩‍👧y",
    "indentation": "if hello:\n        hello\n    \thello",
    "special-looking": "say <|im_start|> then </think> or <unk>",
    "CJK": "中文分词，没有空格。",
}


@cache
def table(name: str) -> TokenBytes:
    return TokenBytes.of(TOKENIZERS[name]())


def locate(name: str, text: str):
    """Tokens of a text, in bytes, and the whole text as one answer."""
    encoding = TOKENIZERS[name]()(text, add_special_tokens=False).encodings[0]
    located, _ = table(name).locate(text, encoding)
    size = len(text.encode())
    return located, [Answer(0, size, 0, anchored=True)]


def aligned(student: str, teacher: str, text: str):
    """Both sides' tokens as bytes, and their chunk numbers, after checking what holds for every pair and text."""
    (ours, answers), (theirs, their_answers) = locate(student, text), locate(teacher, text)
    chunks, teacher_chunks = align_chunks(ours, answers, theirs, their_answers)
    sides = []
    for name, located, numbers in ((student, ours, chunks), (teacher, theirs, teacher_chunks)):
        assert len(numbers) == len(located.ids)
        sides.append([table(name)[index] for index in located.ids])
    check_chunks(sides[0], chunks.tolist(), sides[1], teacher_chunks.tolist())
    return sides[0], chunks, sides[1], teacher_chunks


def ends_of(pieces) -> set[int]:
    return set(np.cumsum([len(piece) for piece in pieces]).tolist())


def check_chunks(pieces, chunks, teacher_pieces, teacher_chunks) -> None:
    """Equal bytes, as short as possible, tokens side by side, in order, the same chunks on both sides."""
    held = []
    for side, numbers in ((pieces, chunks), (teacher_pieces, teacher_chunks)):
        places = defaultdict(list)
        for index, number in enumerate(numbers):
            if number >= 0:
                places[number].append(index)
        assert list(places) == list(range(len(places))), "numbers rise from 0 without a hole"
        assert all(found == list(range(found[0], found[-1] + 1)) for found in places.values())
        held.append([[side[index] for index in found] for found in places.values()])
    assert len(held[0]) == len(held[1]), "a chunk stands on one side only"
    for ours, theirs in zip(*held, strict=True):
        assert b"".join(ours) == b"".join(theirs) != b""
        assert len(ends_of(ours) & ends_of(theirs)) == 1, "a chunk that could be cut further"


def covered(pieces, chunks) -> bytes:
    return b"".join(piece for piece, chunk in zip(pieces, chunks, strict=True) if chunk >= 0)


def random_text(generator: random.Random) -> str:
    return "".join(generator.choice(PARTS) for _ in range(generator.randrange(1, 40)))


# -- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=[" - ".join(pair) for pair in PAIRS])
def test_chunks_of_random_text_have_equal_bytes(student, teacher):
    """Catches chunks of different text, too long ones, and tokens out of order, for every kind of tokenizer."""
    generator = random.Random(0)
    for _ in range(60):
        aligned(student, teacher, random_text(generator))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher"), [("raw qwen", "deepseek"), ("deepseek", "raw qwen"), ("qwen", "qwen"), *PAIRS[-2:-1]]
)
def test_nothing_is_left_out_where_the_bytes_agree(student, teacher):
    """Catches tokens that lose their partners without a reason: every token of equal streams is in a chunk."""
    generator = random.Random(1)
    for _ in range(60):
        pieces, chunks, teacher_pieces, teacher_chunks = aligned(student, teacher, random_text(generator))
        assert b"".join(pieces) == b"".join(teacher_pieces)
        assert (chunks >= 0).all() and (teacher_chunks >= 0).all()
        assert chunks.max() + 1 == len(ends_of(pieces) & ends_of(teacher_pieces))


def test_one_tokenizer_gives_chunks_of_one_token():
    """Catches a second meaning of chunks where both sides have the same tokenizer."""
    pieces, chunks, _, teacher_chunks = aligned("qwen", "qwen", "hello 😀 cafe\u0301 world")
    assert chunks.tolist() == teacher_chunks.tolist() == list(range(len(pieces)))


@pytest.mark.parametrize("name", ["raw qwen", "deepseek"])
def test_byte_level_tokens_spell_the_text(name):
    """Catches a byte alphabet read wrong for some byte: bytes are then unequal and the text is not aligned at all."""
    for text in [*PARTS, "".join(map(chr, range(0x300))), *HARD_TEXTS.values()]:
        located, _ = locate(name, text)
        assert located.exact and located.stream == text.encode()
        assert located.spans[:, 0].tolist() == [0, *located.spans[:-1, 1].tolist()]


def test_only_the_normalised_stretch_is_left_out():
    """Catches everything behind the first decomposed character lost because running lengths differ from there on."""
    head, tail = "a plain head in ASCII, then", " and a long tail of words that follow it"
    pieces, chunks, teacher_pieces, teacher_chunks = aligned("qwen", "deepseek", f"{head} cafe\u0301{tail}")
    assert b"".join(pieces) != b"".join(teacher_pieces)
    for side, numbers in ((pieces, chunks), (teacher_pieces, teacher_chunks)):
        text = covered(side, numbers).decode()
        assert text.startswith(head) and text.endswith(tail)
    both = aligned("qwen", "qwen", f"{head} cafe\u0301{tail}")
    assert covered(*both[:2]) == unicodedata.normalize("NFC", f"{head} cafe\u0301{tail}").encode()


def test_only_the_added_prefix_and_the_dropped_space_are_left_out():
    """Catches a whole answer lost to SentencePiece's space before the text, or to WordPiece's missing ones."""
    pieces, chunks, _, _ = aligned("sentencepiece", "deepseek", "hello the answer is: 😀!")
    assert covered(pieces, chunks).decode() == " the answer is: 😀!"
    pieces, chunks, _, _ = aligned("wordpiece", "sentencepiece", "(hello) (the) (answer)")
    assert covered(pieces, chunks) == b"hello)(the)(answer)", "the added space and the first bracket are one place"
    pieces, chunks, _, _ = aligned("wordpiece", "deepseek", "hello\nworld\nanswer")
    assert covered(pieces, chunks) == b"helloworldanswer"


def test_character_of_several_tokens_is_one_chunk():
    """Catches chunks that end inside a character where the other side has no boundary there."""
    pieces, _, teacher_pieces, teacher_chunks = aligned("qwen", "sentencepiece", "hello😀\U0010ffff")
    assert b"\xf0" in teacher_pieces and b"\xf0" not in pieces
    assert covered(teacher_pieces, teacher_chunks).endswith("😀\U0010ffff".encode())
    same = aligned("sentencepiece", "sentencepiece", "a😀")
    assert same[1].tolist() == list(range(len(same[0]))), "two byte tokenizers agree inside the character too"


def test_no_tokens_no_chunks():
    """Catches a crash at an empty text."""
    empty = np.zeros(0, dtype=np.int64)
    assert [side.tolist() for side in cut_equal_bytes(empty, empty)] == [[], []]
    for student, teacher in PAIRS:
        assert aligned(student, teacher, "")[1].tolist() == []


def test_cut_refuses_different_bytes():
    """Catches chunks of two texts that are not the same, numbered as if they were."""
    with pytest.raises(ValueError, match=r"have 5 bytes and the teacher's 6.*align_chunks"):
        cut_equal_bytes(np.array([2, 3]), np.array([6]))


def test_tokens_of_no_bytes_are_in_no_chunk():
    """Catches an empty token that joins, or shifts, the chunks around it."""
    chunks, teacher_chunks = cut_equal_bytes(np.array([0, 2, 0, 1, 3, 0]), np.array([3, 0, 3]))
    assert chunks.tolist() == [-1, 0, -1, 0, 1, -1]
    assert teacher_chunks.tolist() == [0, -1, 1]


# -- stretches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_rewritten_text_is_found_again(seed):
    """Catches everything behind an insertion or a removal lost, and stretches that are not equal or cross."""
    generator = random.Random(seed)
    parts = [generator.randbytes(generator.randrange(20, 200)) for _ in range(8)]
    one, two = b"".join(parts), b"".join([parts[0], b"inserted", *parts[1:4], *parts[5:]])
    found = resynchronise(one, two)
    assert all(one[start : start + size] == two[other : other + size] for start, other, size in found)
    for (start, other, size), (after, behind, _) in pairwise(found):
        assert start + size <= after and other + size <= behind
    assert sum(size for *_, size in found) == len(one) - len(parts[4])


def test_repeated_text_is_not_guessed():
    """Catches pairs of places that merely look alike: a window must stand once on each side."""
    assert resynchronise(b"yes, yes, yes, yes, ", b"no: yes, yes, yes, yes, yes, ") == []


# -- tokens of one vocabulary -----------------------------------------------------------------------------------------


def naive_answer_tokens(spans, answers) -> list[list[int]]:
    """Token by token, as the rule says."""
    return [
        [
            index
            for index, (start, end) in enumerate(spans)
            if (answer.start <= start and end <= answer.end and (start < end or end > answer.start))
        ]
        for answer in answers
    ]


def naive_equal_tokens(ids, spans, answers, teacher_ids, teacher_spans, teacher_answers):
    """Pairs found by a dictionary of what each teacher token covers."""
    chunks, teacher_chunks = [-1] * len(ids), [-1] * len(teacher_ids)
    count = 0
    tokens = naive_answer_tokens(spans, answers), naive_answer_tokens(teacher_spans, teacher_answers)
    for ours, theirs, places, teacher_places in zip(answers, teacher_answers, *tokens, strict=True):
        waiting = defaultdict(list)
        for index in teacher_places:
            start, end = teacher_spans[index]
            waiting[start - theirs.anchor, end - theirs.anchor, teacher_ids[index]].append(index)
        for index in places:
            start, end = spans[index]
            partners = waiting[start - ours.anchor, end - ours.anchor, ids[index]]
            if partners:
                chunks[index] = teacher_chunks[partners.pop(0)] = count
                count += 1
    return chunks, teacher_chunks


def random_side(generator: random.Random, shift: int, answers: list[Answer]):
    """Tokens with gaps, without width, and several on one character, over two answers."""
    spans, place = [], 0
    while place < 40:
        place += generator.choice([0, 0, 0, 1])
        end = place + generator.choice([0, 1, 1, 2, 3])
        spans += [(place, end)] * generator.choice([1, 1, 1, 2, 3])
        place = end if end > place else place + 1
    moved = [Answer(answer.start + shift, answer.end + shift, answer.anchor + shift) for answer in answers]
    ids = [generator.randrange(2) for _ in spans]
    return ids, [(start + shift, end + shift) for start, end in spans], moved


@pytest.mark.parametrize("seed", range(40))
def test_equal_tokens_pair_as_the_rule_says(seed):
    """Catches a vectorised pairing that differs from the rule for repeated, empty or overlapping tokens."""
    generator = random.Random(seed)
    answers = [Answer(5, 14, 6), Answer(20, 33, 20)]
    student = random_side(generator, 0, answers)
    teacher = random_side(generator, 7, answers)
    if not seed % 4:
        teacher = student[0], [(start + 7, end + 7) for start, end in student[1]], teacher[2]
    for _, spans, places in (student, teacher):
        expected = naive_answer_tokens(spans, places)
        assert [list(range(*bounds)) for bounds in answer_tokens(np.array(spans), places)] == expected
    found = align_equal_tokens(*student, *teacher)
    assert [side.tolist() for side in found] == [*map(list, naive_equal_tokens(*student, *teacher))]


def test_different_numbers_of_answers_are_refused():
    """Catches the answers of one side paired with other answers of the other."""
    spans = np.array([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="the student has 2 answers, the teacher 1"):
        align_equal_tokens([1, 2], spans, [Answer(0, 1, 0), Answer(1, 2, 1)], [1, 2], spans, [Answer(0, 1, 0)])


# -- reading vocabularies ---------------------------------------------------------------------------------------------


def test_slow_tokenizer_is_refused():
    """Catches a tokenizer without bytes and offsets failing at the first row with an error about something else."""

    class Slow:
        is_fast, name_or_path = False, "some/model"

    with pytest.raises(ValueError, match="some/model is a slow tokenizer"):
        TokenBytes.of(Slow())


def test_token_added_later_is_named():
    """Catches an IndexError, or bytes of another token, for a token added after the preparation was made."""
    encoding = qwen()("hello", add_special_tokens=False).encodings[0]
    whole = table("qwen")
    short = TokenBytes(whole.data, whole.ends[:10], whole.nbytes[:10])
    with pytest.raises(ValueError, match="outside the 10 ids known"):
        short.locate("hello", encoding)


def test_answers_move_with_the_bytes():
    """Catches character positions used as byte positions behind the first character of several bytes."""
    text = "é😀 中x"
    positions = [len(text[:index].encode()) for index in range(len(text) + 1)]
    encoding = deepseek()(text, add_special_tokens=False).encodings[0]
    _, found = table("deepseek").locate(text, encoding)
    assert found.tolist() == positions
    moved = answers_in_bytes([Answer(1, 5, 3, True)], found)
    assert moved == [Answer(positions[1], positions[5], positions[3], True)]


# -- preparation ------------------------------------------------------------------------------------------------------


def chat(*contents) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


@cache
def unlimited(student, teacher) -> RowPreparation:
    return RowPreparation(student(), teacher(), 512, 512, 8, "none", "chunk")


def preparation(student=qwen, teacher=deepseek, **overrides) -> RowPreparation:
    """A preparation with other settings; the vocabularies are read once."""
    changed = copy.copy(unlimited(student, teacher))
    for name, value in overrides.items():
        object.__setattr__(changed, name, value)
    return changed


@pytest.fixture(scope="module")
def across() -> RowPreparation:
    return preparation()


def chunk_text(columns, prepare: RowPreparation) -> list[bytes]:
    """Bytes of each chunk, after the checks of every alignment."""
    pieces = [[prepare._bytes[index] for index in columns["input_ids"]]]
    pieces.append([prepare._teacher_bytes[index] for index in columns["teacher_input_ids"]])
    numbers = columns["chunk_ids"], columns["teacher_chunk_ids"]
    check_chunks(pieces[0], numbers[0], pieces[1], numbers[1])
    for label, chunk in zip(columns["labels"], columns["chunk_ids"], strict=True):
        assert chunk < 0 or label != -100, "a prompt token in a chunk"
    held = defaultdict(bytes)
    for piece, number in zip(pieces[0], numbers[0], strict=True):
        if number >= 0:
            held[number] += piece
    return list(held.values())


@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS.keys())
def test_hard_answers_align_whole(across, text):
    """Catches answers lost, or found in the prompt, for texts that templates and tokenizers bend."""
    columns, _ = across.prepare(chat(f"say {text}", text, f"again: {text}", text))
    expected = text.strip() if text != text.strip() else text
    found = b"".join(chunk_text(columns, across)).decode()
    assert found.count(expected) == 2
    assert found in (text + text, text.rstrip() + text.rstrip(), expected + expected)


def test_answer_that_normalisation_changes_aligns_up_to_there(across):
    """Catches a row without any chunk because one character is written in two."""
    columns, _ = across.prepare(chat("Q", "The first words, then cafe\u0301 and the last words."))
    found = b"".join(chunk_text(columns, across)).decode()
    assert found.startswith("The first words, then") and found.endswith(" and the last words.")


def test_end_of_turn_of_one_text_is_a_chunk():
    """Catches the end of the answer, where both write it the same, left without a teacher."""
    template = DEEPSEEK_TEMPLATE.replace("<｜end▁of▁sentence｜>", "<|im_end|>")
    prepare = preparation()
    teacher = prepare.teacher_tokenizer
    try:
        teacher.chat_template = template
        columns, _ = prepare.prepare(chat("Q", "hello"))
    finally:
        teacher.chat_template = DEEPSEEK_TEMPLATE
    assert chunk_text(columns, prepare)[-1] == b"<|im_end|>"


@pytest.mark.parametrize("pair", [(qwen, deepseek), (deepseek, qwen), (sentencepiece, qwen)])
def test_last_turn_alone_aligns(pair):
    """Catches an earlier turn trained on, or in a chunk, on either side of two tokenizers."""
    columns, _ = preparation(*pair, trained_turns="last").prepare(chat("Q", "hello world", "Q", "(the answer)"))
    found = b"".join(chunk_text(columns, preparation(*pair))).decode()
    assert found.strip() == "(the answer)"
    trained = [label for label in columns["labels"] if label != -100]
    assert "world" not in preparation(*pair).tokenizer.decode(trained)


@pytest.mark.parametrize(
    ("reason", "row"),
    {
        "empty conversation": {"messages": []},
        "no assistant message": chat("Q"),
        "no conversation": {"other": 1},
    }.items(),
)
def test_rows_without_an_answer_are_counted_out(across, reason, row):
    """Catches rows without any answer crashing the alignment of two tokenizers, or kept."""
    with pytest.raises(RowSkipped, match=reason):
        across.prepare(row)


def test_empty_answer_trains_without_chunks(across):
    """Catches a crash, or a chunk of the end-of-turn texts, at an answer without content."""
    columns, _ = across.prepare(chat("Q", ""))
    assert set(columns["chunk_ids"]) == {-1} == set(columns["teacher_chunk_ids"])
    assert across.tokenizer.decode([label for label in columns["labels"] if label != -100]) == "<|im_end|>"


@pytest.mark.parametrize("row", [{"prompt": "Q: ", "completion": "hello world"}, {"text": "hello world"}])
def test_completions_and_texts_align(across, row):
    """Catches formats without a chat template left without chunks."""
    columns, _ = across.prepare(row)
    assert b"hello world".endswith(b"".join(chunk_text(columns, across))) and max(columns["chunk_ids"]) >= 0


@pytest.mark.parametrize("pair", [(sentencepiece, deepseek), (qwen, sentencepiece), (wordpiece, sentencepiece)])
def test_other_kinds_of_tokenizers_align_behind_their_templates(pair):
    """Catches offsets of the rendered text taken for offsets of the answer, and spaces counted on one side only."""
    prepare = preparation(*pair)
    columns, _ = prepare.prepare(chat("hello", "(hello)\nthe (answer) is: café", "world", "(world)"))
    found = b"".join(chunk_text(columns, prepare)).decode().replace(" ", "")
    assert "hello)" in found and "answer)" in found and found.endswith("world)")


REASONING = QWEN_TEMPLATE.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
EMPTY_REASONING = QWEN_TEMPLATE.replace(
    "{{ message.content }}",
    "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
)


@pytest.mark.parametrize("content", ["<think>let me see</think>The answer is 42.", "think", "think again"])
@pytest.mark.parametrize("template", [REASONING, EMPTY_REASONING], ids=["dropped", "put before"])
def test_text_that_one_template_drops_or_adds_shifts_nothing(template, content):
    """Catches the content looked for in the template's own words, and all of it lost behind a dropped reasoning."""
    prepare = preparation()
    student = prepare.tokenizer
    try:
        student.chat_template = template
        columns, _ = prepare.prepare(chat("Q", content))
    except RowSkipped as reason:
        assert "cannot be located" in str(reason)
        return
    finally:
        student.chat_template = QWEN_TEMPLATE
    found = b"".join(chunk_text(columns, prepare)).decode()
    assert content.endswith(found.lstrip()) and len(found) >= 5


def test_content_in_the_template_s_words_is_anchored_behind_them():
    """Catches an answer "think" anchored in the "<think>" that the template writes before it."""
    tokenizer = qwen()
    try:
        tokenizer.chat_template = EMPTY_REASONING
        text, (answer,) = render_chat(tokenizer, chat("Q", "think")["messages"])
    finally:
        tokenizer.chat_template = QWEN_TEMPLATE
    assert answer.anchored and text[: answer.anchor].endswith("</think>\n\n")


def test_every_cut_drops_chunks_whole(across):
    """Catches a chunk of which one side, or one of several tokens, was cut: it could never be masked whole."""
    row = chat("Q", "naïveté 12345678 😀😀 antidisestablishmentarianism")
    whole, _ = across.prepare(row)
    count = len(chunk_text(whole, across))
    assert count < sum(chunk >= 0 for chunk in whole["chunk_ids"]), "some chunks have several tokens"
    seen = set()
    for side, length in [
        *(("max_length", size) for size in range(4, len(whole["input_ids"]))),
        *(("teacher_max_length", size) for size in range(1, len(whole["teacher_input_ids"]))),
    ]:
        try:
            columns, _ = preparation(**{side: length}).prepare(row)
        except RowSkipped:
            continue
        chunks = chunk_text(columns, across)
        assert chunks == chunk_text(whole, across)[: len(chunks)]
        seen.add(len(chunks))
    assert len(seen) > count // 2


def test_cut_through_a_chunk_drops_it():
    """Catches half a chunk kept because a token of it is left on both sides."""
    kept = drop_cut_chunks(np.array([-1, 0, 0, 1, 1]), 4, np.array([0, 1, 1, -1]), 3)
    assert [side.tolist() for side in kept] == [[-1, 0, 0, -1], [0, -1, -1]]


@pytest.mark.parametrize(("eos_fill", "lengths"), [("block", (8, 8)), ("end", (40, 48))])
def test_each_side_fills_with_its_own_eos(eos_fill, lengths):
    """Catches the student's EOS id written into the teacher's row, where it is another token, and fill aligned."""
    limits = {"max_length": 40, "teacher_max_length": 48}
    plain, _ = preparation(**limits).prepare(chat("Q", "hello"))
    columns, _ = preparation(eos_fill=eos_fill, **limits).prepare(chat("Q", "hello"))
    prepare = preparation()
    for name, chunk_name, tokenizer, length in (
        ("input_ids", "chunk_ids", prepare.tokenizer, lengths[0]),
        ("teacher_input_ids", "teacher_chunk_ids", prepare.teacher_tokenizer, lengths[1]),
    ):
        count = len(plain[name])
        assert columns[name][:count] == plain[name] and len(columns[name]) % length == 0
        assert set(columns[name][count:]) == {tokenizer.eos_token_id}
        assert columns[chunk_name] == plain[chunk_name] + [-1] * (len(columns[name]) - count)
    assert columns["labels"][-1] == prepare.tokenizer.eos_token_id


def test_shared_tokenizer_aligns_the_same_both_ways():
    """Catches two meanings of alignment: with one tokenizer, chunks and equal tokens are the same pairs."""
    by_token, by_chunk = (preparation(qwen, qwen, alignment=kind) for kind in ("token", "chunk"))
    for text in HARD_TEXTS.values():
        row = chat("Q", text, "R", text)
        assert by_token.prepare(row) == by_chunk.prepare(row)


@pytest.mark.slow
def test_report_counts_answer_bytes(across):
    """Catches a coverage over tokens only, where one long unaligned token counts as much as a short one."""
    rows = [chat("Q", "hello world"), chat("Q", "naïve cafe\u0301"), chat("Q", "")]
    end = len(b"<|im_end|>")
    prepared, report = prepare_dataset(Dataset.from_list(rows), preparation(eos_fill="block"))
    sizes = [len(unicodedata.normalize("NFC", row["messages"][1]["content"]).encode()) for row in rows]
    assert report.num_answer_bytes == sum(sizes) + 3 * end
    aligned_bytes = sum(len(chunk) for row in rows for chunk in chunk_text(across.prepare(row)[0], across))
    assert 11 <= report.num_aligned_bytes == aligned_bytes < report.num_answer_bytes
    assert f"of {report.num_answer_bytes} answer bytes" in str(report)
    assert report.num_aligned_tokens == sum(chunk >= 0 for chunks in prepared["chunk_ids"] for chunk in chunks)


@pytest.mark.slow
def test_streaming_rows_carry_no_counts(across):
    """Catches columns of the report left in a streaming dataset, where the collator would meet them."""
    streamed, _ = prepare_dataset(Dataset.from_list([chat("Q", "hello")]).to_iterable_dataset(), across)
    (row,) = streamed
    assert row.pop("row_key") and row == across.prepare(chat("Q", "hello"))[0]


def test_settings_of_the_tokenizer_file_do_not_cut_rows():
    """Catches a truncation or padding that a tokenizer.json (or another caller) switched on."""
    prepare = preparation(sentencepiece, sentencepiece)
    expected = prepare.prepare(chat("Q", "hello " * 20))
    prepare.tokenizer.backend_tokenizer.enable_truncation(8)
    prepare.tokenizer.backend_tokenizer.enable_padding(length=300)
    assert prepare.prepare(chat("Q", "hello " * 20)) == expected


def test_half_a_surrogate_pair_is_counted_out(across):
    """Catches one broken row ending the preparation of all of them."""
    with pytest.raises(RowSkipped, match="not valid Unicode"):
        across.prepare(chat("Q", "a\ud83db"))


def test_unknown_kind_and_missing_eos_are_refused():
    """Catches a misspelt alignment taken for the other one, and a fill with nothing."""
    with pytest.raises(ValueError, match="alignment is 'chunks'; expected one of token, chunk"):
        RowPreparation(wordpiece(), None, 8, 8, 8, alignment="chunks")
    tokenizer = type(wordpiece())(tokenizer_object=wordpiece().backend_tokenizer)
    with pytest.raises(ValueError, match="eos_fill='block' fills with EOS"):
        RowPreparation(tokenizer, None, 8, 8, 8)

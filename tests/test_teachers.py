"""Frozen teachers: the packed forward against separate ones, contracts, mask ids, and the guard on loaded weights."""

import json
import logging

import pytest
import torch
from tiny import BLOCK, MASK, SHAPE, VOCAB
from transformers import AutoModelForCausalLM, ViTConfig

from tide_hf.diffusion import LayoutSpec, NetworkInputs, block_layout
from tide_hf.models import TIDEQwen3Config, TIDEQwen3ForBlockDiffusion, WeDLMConfig, WeDLMForCausalLM
from tide_hf.teachers import (
    FAMILIES,
    Teacher,
    check_rotary_frequencies,
    contract_for,
    load_teacher,
    loading,
    resolve_mask_token_id,
)

TEACHERS = {
    "block": (TIDEQwen3ForBlockDiffusion, TIDEQwen3Config, {"block_size": BLOCK}),
    "full": (TIDEQwen3ForBlockDiffusion, TIDEQwen3Config, {"diffusion_type": "full"}),
    "wedlm": (WeDLMForCausalLM, WeDLMConfig, {}),
}


def tiny(kind="block", **changes):
    model_class, config_class, values = TEACHERS[kind]
    torch.manual_seed(0)
    return model_class(config_class(**{**SHAPE, "mask_token_id": MASK, **values, **changes}))


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- one forward ----


def noised_batch(contract, ids, valid, masks, pack=True):
    layout = block_layout(
        ids,
        valid,
        masks,
        contract,
        pack,
    )
    return NetworkInputs(layout.input_ids, layout.position_ids, layout.stream, layout.block, layout.asked, None)


def naive_logits(teacher, ids, valid, masks):
    """Row by row and block by block, one plain forward of [clean prefix ; noised block] for each view."""
    logits = {}
    for mask in masks:
        for row in range(len(ids)):
            clean, hidden = ids[row][valid[row]], mask[row][valid[row]]
            columns = valid[row].nonzero()[:, 0]
            width = teacher.contract.block_size or len(clean)
            for start in range(0, len(clean), width):
                end = min(start + width, len(clean))
                noised = torch.where(hidden[start:end], MASK, clean[start:end])
                number = torch.arange(end) // width
                visible = (number[:, None] >= number[None, :])[None, None]
                out = teacher.model(torch.cat([clean[:start], noised])[None], attention_mask=visible).logits[0]
                for position in range(start, end):
                    if hidden[position]:
                        logits[row, int(columns[position])] = out[position]
    return torch.stack([logits[key] for key in sorted(logits)])


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", list(TEACHERS))
def test_two_views_in_one_forward_equal_two_forwards(kind, side, pack):
    """Catches CompDemo's views that see each other: the teacher would read the answer in the other copy."""
    model = tiny(kind).double()
    teacher = Teacher(model, contract_for(model.config, MASK, "paper", BLOCK))
    ids = (draw(3, 14, seed=1) * 20).long()
    valid = torch.ones(3, 14, dtype=torch.bool)
    valid[1, slice(None, 5) if side == "left" else slice(-5, None)] = False
    masked = valid & (draw(3, 14, seed=2) < 0.6)
    masked[2, :8] = False
    part_a = masked & (draw(3, 14, seed=3) < 0.5)
    part_b = masked & ~part_a
    together = teacher.logits(teacher.hidden(noised_batch(teacher.contract, ids, valid, [part_b, part_a], pack)))
    in_b = part_b.flatten()[masked.flatten()]
    for part, selected in ((part_b, in_b), (part_a, ~in_b)):
        alone = teacher.logits(teacher.hidden(noised_batch(teacher.contract, ids, valid, [part], pack)))
        torch.testing.assert_close(together[selected], alone, rtol=0, atol=1e-10)
    expected = naive_logits(teacher, ids, valid, [part_b, part_a])
    assert together.shape == (int(masked.sum()), VOCAB)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-10)
    at_once = naive_logits(teacher, ids, valid, [masked])
    assert (at_once - expected).abs().max() > 1e-2, "the revealed tokens never mattered"


CONTRACTS = {
    "blocks": LayoutSpec(MASK, BLOCK),
    "whole rows": LayoutSpec(MASK, None, clean_copy=False),
    "shifted": LayoutSpec(MASK, None, clean_copy=False, shifted=True),
    "causal": LayoutSpec(MASK, BLOCK, causal=True),
}


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_share_a_line_do_not_see_each_other(contract, side):
    """Catches short rows on one line that attend to each other, or predict from their neighbour's last token:
    every row alone gives the same logits."""
    lengths, width = (16, 5, 7, 4, 3), 18
    teacher = Teacher(tiny().double(), contract)
    ids = (draw(len(lengths), width, seed=1) * 20).long()
    columns = torch.arange(width) if side == "right" else width - 1 - torch.arange(width)
    valid = columns < torch.tensor(lengths)[:, None]
    masked = valid & (draw(*ids.shape, seed=2) < 0.7)
    masks = [masked & (draw(*ids.shape, seed=3) < 0.5)]
    masks.append(masked & ~masks[0])
    batch = noised_batch(contract, ids, valid, masks)
    num_lines, columns = batch.input_ids.shape
    alone = [
        noised_batch(contract, ids[row, None], valid[row, None], [mask[row, None] for mask in masks])
        for row in range(len(lengths))
    ]
    assert num_lines < len(lengths) and columns == max(each.input_ids.shape[1] for each in alone)
    expected = torch.cat([teacher.hidden(each) for each in alone])
    torch.testing.assert_close(teacher.hidden(batch), expected, rtol=0, atol=1e-10)


def test_eager_teacher_sees_what_sdpa_sees():
    """Catches a teacher whose attention implementation drops the block mask: its targets would leak the answer."""
    ids, valid = (draw(2, 12, seed=1) * 20).long(), torch.ones(2, 12, dtype=torch.bool)
    masked = draw(2, 12, seed=2) < 0.5
    logits = []
    for implementation in ("sdpa", "eager"):
        model = tiny("wedlm", attn_implementation=implementation).double()
        teacher = Teacher(model, contract_for(model.config, MASK, "paper", BLOCK))
        logits.append(teacher.logits(teacher.hidden(noised_batch(teacher.contract, ids, valid, [masked]))))
    # eager takes its softmax in float32
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_teacher_is_frozen():
    """Catches a teacher that is trained, or answers with dropout: its targets would drift."""
    model = tiny(attention_dropout=0.5).train()
    teacher = Teacher(model, LayoutSpec(MASK, BLOCK, clean_copy=True))
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not any(module.training for module in model.modules())
    ids = (draw(1, 8) * 20).long()
    batch = noised_batch(teacher.contract, ids, torch.ones_like(ids, dtype=torch.bool), [draw(1, 8) < 0.5])
    logits = teacher.logits(teacher.hidden(batch))
    assert len(logits) and not logits.requires_grad and torch.equal(logits, teacher.logits(teacher.hidden(batch)))


# ---- contracts ----


def test_contracts_of_the_known_families():
    """Catches a teacher fed with the student's blocks, or a full-sequence teacher fed with a clean copy."""
    assert contract_for(TIDEQwen3Config(**SHAPE, block_size=8), 5, "paper", 4) == LayoutSpec(5, 8, True)
    assert contract_for(TIDEQwen3Config(**SHAPE, block_size=8), 5, "native", 4) == LayoutSpec(5, 8, True)
    full = TIDEQwen3Config(**SHAPE, diffusion_type="full")
    assert contract_for(full, 5, "paper", 4) == LayoutSpec(5, None, False)
    assert contract_for(WeDLMConfig(**SHAPE), 5, "paper", 4) == LayoutSpec(5, 4, True)


def test_unknown_family_is_refused():
    """Catches a model of any other kind taken for a teacher: its outputs would be read as predictions."""
    with pytest.raises(ValueError, match="'vit' is not a known teacher") as error:
        contract_for(ViTConfig(), MASK, "paper", BLOCK)
    assert set(FAMILIES) >= {"tide_qwen3", "a2d-qwen3", "wedlm"}
    assert all(family in str(error.value) for family in FAMILIES)


@pytest.mark.parametrize("config_class", [WeDLMConfig, TIDEQwen3Config])
def test_unknown_context_is_refused(config_class):
    """Catches a context that is quietly replaced by another one: the reported run would not be the one that ran."""
    with pytest.raises(ValueError, match=r"teacher_context='papre' is not available for .*paper, native"):
        contract_for(config_class(**SHAPE), MASK, "papre", BLOCK)


# ---- mask ids ----


class Tokenizer:
    def __init__(self, mask_token_id):
        self.mask_token_id = mask_token_id


BIG = {**SHAPE, "vocab_size": 151936}


@pytest.mark.parametrize(
    ("given", "in_config", "in_tokenizer", "expected"),
    [
        (0, 5, 6, 0),
        (4, 5, 6, 4),
        (None, 0, 6, 0),
        (None, 5, 6, 5),
        (None, None, 0, 0),
        (None, None, 6, 6),
        (None, None, None, 151665),
    ],
)
def test_mask_token_order(given, in_config, in_tokenizer, expected):
    """Catches an id of 0 taken for none, and a source that overrules a nearer one."""
    config = WeDLMConfig(**BIG, mask_token_id=in_config)
    assert resolve_mask_token_id(given, config, Tokenizer(in_tokenizer), "teacher") == expected
    if in_tokenizer is None:
        assert resolve_mask_token_id(given, config, None, "teacher") == expected


def test_disagreeing_mask_tokens_are_named(caplog):
    """Catches a teacher asked about a token that is not its [MASK]: it answers, and the answers are noise."""
    config = TIDEQwen3Config(**SHAPE, mask_token_id=5)
    with caplog.at_level(logging.WARNING):
        assert resolve_mask_token_id(None, config, Tokenizer(6), "student") == 5
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "student" in message and "5 by its config" in message and "6 by its tokenizer" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        resolve_mask_token_id(None, config, Tokenizer(5), "student")
        resolve_mask_token_id(4, config, Tokenizer(6), "student")  # the user decided
    assert not caplog.records


@pytest.mark.parametrize("index", [VOCAB, -1])
def test_mask_token_outside_the_vocabulary_is_refused(index):
    """Catches an id that would read past the embedding table (an assert on the device, far from its cause)."""
    with pytest.raises(ValueError, match=rf"teacher's mask token id {index} lies outside its vocabulary of 24"):
        resolve_mask_token_id(index, TIDEQwen3Config(**SHAPE), None, "teacher")
    with pytest.raises(ValueError, match="outside its vocabulary"):
        resolve_mask_token_id(None, TIDEQwen3Config(**SHAPE), Tokenizer(index), "student")


@pytest.mark.parametrize(
    ("who", "setting"), [("student", "set mask_token_id"), ("teacher", "set teacher_mask_token_id")]
)
def test_no_mask_token_is_refused(who, setting):
    """Catches a run without [MASK]; the message names the setting that helps."""
    with pytest.raises(ValueError, match=f"The {who} has no mask token.*{setting}") as error:
        resolve_mask_token_id(None, TIDEQwen3Config(**SHAPE), Tokenizer(None), who)
    assert "add_special_tokens" in str(error.value)


# ---- loading ----

CORRUPTIONS = {
    "random": lambda values: torch.rand_like(values),
    "zero": torch.zeros_like,
    "nan": lambda values: torch.full_like(values, torch.nan),
    "last only": lambda values: torch.cat([values[:-1], 1.01 * values[-1:]]),
}


@pytest.mark.parametrize("kind", list(TEACHERS))
def test_good_rotary_frequencies_pass(kind):
    """Catches a guard that would refuse sound models, whatever their theta and precision at load."""
    check_rotary_frequencies(tiny(kind))
    check_rotary_frequencies(tiny(kind, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_cast_rotary_frequencies_pass(dtype):
    """Catches a guard tighter than the precision a model was cast to."""
    check_rotary_frequencies(tiny(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).to(dtype))


@pytest.mark.parametrize("corrupt", list(CORRUPTIONS.values()), ids=list(CORRUPTIONS))
def test_corrupted_rotary_frequencies_are_refused(corrupt):
    """Catches a model that loaded "clean" and computes with uninitialised memory: wrong logits, no error."""
    model = tiny()
    model.model.rotary_emb.inv_freq.copy_(corrupt(model.model.rotary_emb.inv_freq))
    with pytest.raises(ValueError, match=r"rotary_emb.*rope_theta=10000"):
        check_rotary_frequencies(model)


def test_load_teacher_checks_what_it_loaded(tmp_path, monkeypatch):
    """Catches a guard that exists and is never called."""
    tiny("wedlm").save_pretrained(tmp_path)
    assert type(load_teacher(str(tmp_path))) is WeDLMForCausalLM
    original = AutoModelForCausalLM.from_pretrained

    def corrupting(*args, **kwargs):
        model, info = original(*args, **kwargs)
        model.model.rotary_emb.inv_freq.zero_()
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", corrupting)
    with pytest.raises(ValueError, match="rotary"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_load_teacher_precision(saved, tmp_path):
    """Catches a teacher loaded in twice the memory, or rounded although asked for in full."""
    model = tiny(tie_word_embeddings=False).to(saved)
    model.save_pretrained(tmp_path)
    expected = {"auto": saved, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for dtype, wanted in expected.items():
        loaded = load_teacher(str(tmp_path), dtype=dtype)
        assert {weight.dtype for weight in loaded.parameters()} == {wanted}, dtype
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(wanted))
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_load_teacher_runs_no_remote_code(tmp_path):
    """Catches code of a repository being run because its config.json asks for it."""
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "somebodys", "auto_map": {"AutoConfig": "remote.C", "AutoModelForCausalLM": "remote.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "was_run"
    (tmp_path / "remote.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ValueError):
        load_teacher(str(tmp_path))
    assert not marker.exists()


def test_four_bits_without_bitsandbytes_name_the_extra(monkeypatch):
    """Catches an import error far from its cause; nothing is downloaded before the check."""
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'tide-hf\[quant\]'"):
        load_teacher("nobody/nothing", load_in_4bit=True)

"""What every family is shown as a teacher: contracts, and packed forwards against plain ones."""

from dataclasses import replace

import pytest
import torch
from published import FAMILIES as PUBLISHED
from published import VOCAB, naive_logits, write_checkpoint
from tiny import BLOCK, MASK, SHAPE, tiny_trainer
from transformers import AutoModelForCausalLM, Qwen3Config

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.diffusion import LayoutSpec, NetworkInputs, Noising, block_layout
from tide_hf.models import (
    A2DLlamaConfig,
    A2DQwen2Config,
    DreamConfig,
    LLaDA2MoeConfig,
    LLaDAConfig,
    LLaDAMoEConfig,
    SDARConfig,
    SDARMoeConfig,
    WeDLMConfig,
)
from tide_hf.teachers import (
    Teacher,
    TeacherFamily,
    TeacherView,
    contract_for,
    load_teacher,
    resolve_mask_token_id,
)

IDS = torch.arange(11) * 7 % 20
# float32 weights, and rotary tables that are float32 in any case
ATOL = 1e-4


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def teacher_logits(teacher, ids, valid, views, pack=True):
    """The layout that the teacher's contract asks for, and the logits for it."""
    layout = block_layout(
        ids,
        valid,
        views,
        replace(teacher.contract, mask_token_id=MASK),
        pack,
    )
    inputs = NetworkInputs(layout.input_ids, layout.position_ids, layout.stream, layout.block, layout.asked, None)
    hidden = teacher.hidden(inputs)
    return teacher.logits(hidden), layout.asked_position


# ---- what a teacher is shown ----


def test_contracts_of_all_families():
    """Catches a teacher fed in another layout than the paper's or its own."""
    whole = LayoutSpec(5, None, False)
    expected = {
        LLaDA2MoeConfig: (whole, LayoutSpec(5, 32, True)),
        WeDLMConfig: (LayoutSpec(5, 8, True), LayoutSpec(5, 32, True, causal=True)),
        LLaDAConfig: (whole, whole),
        LLaDAMoEConfig: (whole, whole),
        DreamConfig: (LayoutSpec(5, None, False, shifted=True),) * 2,
        SDARConfig: (LayoutSpec(5, 4, True),) * 2,
        SDARMoeConfig: (LayoutSpec(5, 4, True),) * 2,
        A2DQwen2Config: (LayoutSpec(5, 32, True),) * 2,
        A2DLlamaConfig: (LayoutSpec(5, 32, True),) * 2,
    }
    for config_class, contracts in expected.items():
        for context, contract in zip(("paper", "native"), contracts, strict=True):
            assert contract_for(config_class(), 5, context, 8) == contract, (config_class, context)
    assert contract_for(LLaDA2MoeConfig(block_size=16), 5, "native", 8).block_size == 16
    assert contract_for(SDARConfig(block_size=16), 5, "paper", 8).block_size == 16
    assert contract_for(A2DQwen2Config(block_size=16), 5, "paper", 8) == LayoutSpec(5, 16, True)
    assert contract_for(A2DQwen2Config(diffusion_type="full"), 5, "paper", 8) == whole


@pytest.mark.parametrize(
    ("config", "mask_token_id"),
    [
        (LLaDA2MoeConfig(vocab_size=157184), 156895),
        (LLaDAMoEConfig(vocab_size=157184), 156895),
        (LLaDAConfig(vocab_size=126464), 126336),
        (DreamConfig(vocab_size=152064), 151666),
        (SDARConfig(), 151669),
        (SDARMoeConfig(), 151669),
        (WeDLMConfig(), 151665),
        (A2DQwen2Config(), 151665),
    ],
)
def test_mask_token_of_each_family(config, mask_token_id):
    """Catches a teacher asked about another family's [MASK], which for it is an ordinary token."""
    assert resolve_mask_token_id(None, config, None, "teacher") == mask_token_id


def test_a_new_family_is_its_configuration_class():
    """Catches a list elsewhere that a family of somebody else's would have to stand in as well."""

    class NewConfig(Qwen3Config):
        model_type = "new"
        block_size: int = 16
        teacher_family = TeacherFamily(TeacherView("own"), paper=TeacherView("none", shifted=True), mask_token_id=7)

    assert contract_for(NewConfig(), 5, "native", 8) == LayoutSpec(5, 16, True)
    assert contract_for(NewConfig(), 5, "paper", 8) == LayoutSpec(5, None, False, shifted=True)
    assert resolve_mask_token_id(None, NewConfig(), None, "teacher") == 7


def test_shifted_teacher_with_blocks_is_refused():
    """Catches a contract whose asked position may be missing from a packed layout."""
    with pytest.raises(ValueError, match="shifted by one position"):
        LayoutSpec(5, 4, True, shifted=True)


# family, context, block size its contract gets
VIEWS = [(family, context) for family in PUBLISHED for context in ("paper", "native")]


def naive_views(family, context, config, weights, contract, clean, hidden) -> dict[int, torch.Tensor]:
    """Logits of each masked position of one row without padding, by the plainest forward that says what is shown."""
    size, logits = contract.block_size or len(clean), {}
    for start in range(0, len(clean), size):
        end = min(start + size, len(clean))
        order = torch.arange(end)
        noised = torch.where(hidden[:end] & (order >= start), MASK, clean[:end])
        visible = order[:, None] // size >= order[None, :] // size
        if (family, context) in (("wedlm-8b", "native"), ("wedlm-7b", "native")):
            # a single causal stream: clean context, what is observed of the block, what is masked
            block = order[start:]
            order = torch.cat([order[:start], block[~hidden[start:end]], block[hidden[start:end]]])
            visible = torch.ones(end, end, dtype=torch.bool).tril()
        out = naive_logits(family, config, weights, noised[order], visible, order)
        out = out[order.argsort()]
        for position in range(start, end):
            if hidden[position]:
                logits[position] = out[max(position - 1, 0) if family == "dream" else position]
    return logits


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "context"), VIEWS)
def test_teacher_logits_are_those_of_plain_forwards(family, context, side, pack, tmp_path):
    """Catches a teacher shown too much or too little, or asked at the wrong position, in a packed batch."""
    config, weights = write_checkpoint(tmp_path, family)
    model = load_teacher(str(tmp_path))
    if family == "llada2" or "wedlm" in family:
        model.config.block_size = BLOCK
    teacher = Teacher(model, contract_for(model.config, MASK, context, BLOCK))
    ids = (draw(3, 14, seed=1) * 20).long()
    valid = torch.ones(3, 14, dtype=torch.bool)
    valid[1, slice(None, 5) if side == "left" else slice(-5, None)] = False
    masked = valid & (draw(3, 14, seed=2) < 0.6)
    masked[0, :2] = True
    masked[2, :8] = False
    part_a = masked & (draw(3, 14, seed=3) < 0.5)
    views = [masked & ~part_a, part_a]
    actual, asked_position = teacher_logits(teacher, ids, valid, views, pack)
    expected = {}
    for view in views:
        for row in range(3):
            columns = valid[row].nonzero()[:, 0]
            found = naive_views(
                family, context, config, weights, teacher.contract, ids[row][columns], view[row][columns]
            )
            expected |= {(row, int(columns[position])): logits for position, logits in found.items()}
    expected = torch.stack([expected[key] for key in sorted(expected)])
    assert actual.shape == (int(masked.sum()), VOCAB)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=ATOL)
    assert asked_position.tolist() == masked.flatten().nonzero()[:, 0].tolist()


def test_padding_in_the_middle_is_no_previous_position():
    """Catches a shifted teacher asked at a padding column."""
    ids, valid = torch.arange(8)[None], torch.tensor([[1, 1, 0, 0, 1, 1, 0, 1]]).bool()
    for pack, expected in ((True, [0, 1, 2, 3]), (False, [0, 1, 4, 5])):
        layout = block_layout(ids, valid, [valid.clone()], LayoutSpec(9, None, clean_copy=False, shifted=True), pack)
        assert layout.asked.tolist() == [0, *expected]


def test_noising_hands_the_contract_to_the_layout():
    """Catches flags of a contract that never reach the tensors the teacher gets."""
    ids, labels = torch.arange(4)[None], torch.arange(4)[None]
    chunk = torch.arange(4)[None]
    batch = {"input_ids": ids, "labels": labels, "chunk_ids": chunk, "attention_mask": torch.ones(1, 4)}
    batch |= {
        "row_key": torch.zeros(1),
        "teacher_input_ids": ids,
        "teacher_chunk_ids": chunk,
        "teacher_attention_mask": torch.ones(1, 4),
    }
    # positions 0 and 2 are masked
    uniforms = (torch.tensor([0.5]), torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.zeros(1, 4))
    plain = Noising(LayoutSpec(9, 4), LayoutSpec(9, 4))(batch, uniforms, t=0.5)
    causal = Noising(LayoutSpec(9, 4), LayoutSpec(9, 4, causal=True))(batch, uniforms, t=0.5)
    shifted = Noising(LayoutSpec(9, 4), LayoutSpec(9, None, False, shifted=True))(batch, uniforms, t=0.5)
    assert plain.teacher.position_ids.tolist()[0] == [0, 1, 2, 3]
    assert causal.teacher.position_ids.tolist()[0] == [1, 3, 0, 2]
    assert causal.teacher.input_ids.tolist()[0] == [1, 3, 9, 9] and causal.teacher.asked.tolist() == [2, 3]
    assert shifted.teacher.asked.tolist() == [0, 1] and shifted.teacher.targets.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("config_class", "context"),
    [(LLaDA2MoeConfig, "paper"), (LLaDA2MoeConfig, "native"), (WeDLMConfig, "native"), (DreamConfig, "paper")],
)
def test_trainer_takes_every_kind_of_teacher(config_class, context, tmp_path):
    """Catches a contract that the trainer cannot pass on, and a teacher whose head or body it does not find."""
    tokenizer = build_tokenizer()
    shape = {**SHAPE, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if config_class is LLaDA2MoeConfig:
        shape |= {"n_routed_experts": 16, "moe_intermediate_size": 8, "num_experts_per_tok": 4}
    teacher = AutoModelForCausalLM.from_config(config_class(**shape, mask_token_id=tokenizer.mask_token_id))
    trainer = tiny_trainer(tmp_path, teacher=teacher, teacher_context=context, max_steps=2)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2 and all(torch.tensor(entry["distill"]).isfinite() for entry in history)
    assert all(entry["distill"] != 0 for entry in history)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("family", ["llada2", "dream"])
def test_off_loaded_teacher_gives_the_same_logits(family, tmp_path):
    """Catches inputs sent to a device where a teacher's weights are not, or a device_map that is dropped."""
    write_checkpoint(tmp_path, family)
    whole = load_teacher(str(tmp_path))
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head")
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    split = load_teacher(str(tmp_path), device_map=device_map, offload_folder=str(tmp_path / "off"))
    assert split.hf_device_map["model.layers.1"] == "disk"
    valid, logits = torch.ones(1, len(IDS), dtype=torch.bool), []
    for model in (whole, split):
        teacher = Teacher(model, contract_for(model.config, MASK, "paper", BLOCK))
        logits.append(teacher_logits(teacher, IDS[None], valid, [valid])[0])
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["llada2", "dream", "wedlm-8b"])
def test_eager_teacher_equals_sdpa(family, tmp_path):
    """Catches an attention implementation that reads the mask as all True."""
    write_checkpoint(tmp_path, family)
    logits = []
    for implementation in ("sdpa", "eager"):
        model = load_teacher(str(tmp_path), attn_implementation=implementation)
        model.config.block_size = BLOCK
        teacher = Teacher(model, contract_for(model.config, MASK, "native", BLOCK))
        valid = torch.ones(1, len(IDS), dtype=torch.bool)
        logits.append(teacher_logits(teacher, IDS[None], valid, [valid & (IDS % 2 == 0)])[0])
    torch.testing.assert_close(*logits, rtol=0, atol=ATOL)

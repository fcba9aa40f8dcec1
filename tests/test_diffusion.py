"""The forward process and the packed layout: draws, chunk masks, and the same logits from fewer columns."""

import numpy as np
import pytest
import references
import torch
from tiny import BLOCK, MASK, SHAPE

from tide_hf.diffusion import (
    LayoutSpec,
    Noising,
    block_layout,
    chunk_member,
    complementary_split,
    complete_chunks,
    diffusion_time,
    mask_positions,
    masked_chunks,
    row_uniforms,
)
from tide_hf.losses import denoising_loss
from tide_hf.models import (
    CLEAN_STREAM,
    NOISED_STREAM,
    PADDING_STREAM,
    TIDEQwen3Config,
    TIDEQwen3ForBlockDiffusion,
    block_visibility,
)

SCHEDULES = ("linear", "cosine")

# ---- draws ----


def test_row_uniforms_belong_to_the_row():
    """Catches noise that changes with the order, the padding or the neighbours of a row, so with world size."""
    time, mask, demo = row_uniforms(3, 1, [5, 9, 2], 12)
    other_time, other_mask, other_demo = row_uniforms(3, 1, [2, 7, 5, 11], 31)
    assert mask.shape == demo.shape == (3, 12) and time.shape == (3,)
    for here, there in ((0, 2), (2, 0)):
        assert time[here] == other_time[there]
        assert torch.equal(mask[here], other_mask[there, :12])
        assert torch.equal(demo[here], other_demo[there, :12])


@pytest.mark.parametrize(
    ("seed", "epoch", "row"), [(4, 1, 5), (3, 2, 5), (3, None, 5), (3, 1, 6)], ids=["seed", "epoch", "eval", "row"]
)
def test_row_uniforms_differ_by_key(seed, epoch, row):
    """Catches the same noise in every epoch or run: the model would learn one mask per row by heart."""
    for ours, others in zip(row_uniforms(3, 1, [5], 16), row_uniforms(seed, epoch, [row], 16), strict=True):
        assert not torch.isclose(ours, others).any()


def test_row_uniforms_are_uniform_and_independent():
    """Catches the time, mask and demo draws sharing numbers, which ties the split to the mask."""
    time, mask, demo = row_uniforms(0, 0, range(2000), 20)
    for draws in (time, mask, demo):
        assert draws.min() >= 0 and draws.max() < 1
        assert abs(draws.mean() - 0.5) < 4 * (1 / 12 / draws.numel()) ** 0.5
        assert abs(draws.var() - 1 / 12) < 0.01
    pairs = torch.stack([mask.flatten(), demo.flatten(), time[:, None].expand_as(mask).flatten()])
    correlation = torch.corrcoef(pairs) - torch.eye(3)
    assert correlation.abs().max() < 0.03


def test_diffusion_time_range():
    """Catches t = 0, where the weight 1/t is infinite, and t beyond 1."""
    t = diffusion_time(torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert t[0].item() == pytest.approx(1e-3) and t[1].item() == pytest.approx(0.5005) and t[2] <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_masked_fraction(schedule, t):
    """Catches masking with α(t) instead of 1 − α(t), and masked prompts."""
    _, uniform, _ = row_uniforms(1, 0, range(400), 50)
    labels = torch.ones(400, 50, dtype=torch.long)
    labels[:, :10] = -100
    masked = mask_positions(uniform, torch.full((400,), t), labels, schedule)
    assert not masked[:, :10].any()
    probability = references.masked_probability(t, schedule)
    deviation = (probability * (1 - probability) / (400 * 40)) ** 0.5
    assert abs(masked[:, 10:].float().mean().item() - probability) < 4 * deviation


def test_mask_follows_the_time_of_its_own_row():
    """Catches t broadcast along positions: every row would be masked at another row's rate."""
    uniform = torch.full((2, 2), 0.5)
    masked = mask_positions(uniform, torch.tensor([0.2, 0.8]), torch.zeros(2, 2, dtype=torch.long))
    assert masked.tolist() == [[False, False], [True, True]]


# ---- chunks and the split ----


def random_chunks(num_rows=40, length=15, num_chunks=6, seed=0):
    """Masks, chunk ids (some −1, some numbers absent) and labels with a prompt that cuts into chunks."""
    generator = torch.Generator().manual_seed(seed)
    chunk_ids = torch.randint(-1, num_chunks, (num_rows, length), generator=generator)
    labels = torch.where(torch.rand(num_rows, length, generator=generator) < 0.7, 1, -100)
    masked = (torch.rand(num_rows, length, generator=generator) < 0.2) & (labels != -100)
    return masked, chunk_ids, labels, num_chunks


def test_complete_chunks_matches_its_definition():
    """Catches half-masked chunks, chunks completed in another row, and prompt tokens masked along."""
    masked, chunk_ids, labels, num_chunks = random_chunks()
    completed, hit = complete_chunks(masked, chunk_ids, labels, num_chunks)
    expected_completed, expected_hit = references.complete_chunks(masked, chunk_ids, labels, num_chunks)
    assert expected_completed.sum() > masked.sum()
    np.testing.assert_array_equal(completed.numpy(), expected_completed)
    np.testing.assert_array_equal(hit.numpy(), expected_hit)
    assert torch.equal(hit, masked_chunks(masked, chunk_ids, num_chunks))
    assert not (completed & (labels == -100)).any()


def test_complete_chunks_without_chunks():
    """Catches an index of −1 that reads the last chunk: tokens in no chunk stay as they were drawn."""
    masked, chunk_ids, labels, _ = random_chunks()
    for num_chunks in (0, 3):
        completed, hit = complete_chunks(masked, torch.full_like(chunk_ids, -1), labels, num_chunks)
        assert torch.equal(completed, masked) and not hit.any() and hit.shape == (len(masked), num_chunks)


def test_chunk_member():
    """Catches tokens outside every chunk that follow the last chunk's flag."""
    flag = torch.tensor([[True, False, True], [False, False, True]])
    chunk_ids = torch.tensor([[-1, 0, 1, 2], [2, 2, 0, -1]])
    assert chunk_member(flag, chunk_ids).tolist() == [[False, True, False, True], [True, True, False, False]]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_complementary_split(ratio):
    """Catches a position in both parts or in neither: it would be shown to the teacher, or never asked."""
    masked = torch.rand(300, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    uniform = row_uniforms(0, 0, range(300), 40)[2]
    part_a, part_b = complementary_split(masked, uniform, ratio)
    expected_a, expected_b = references.complementary_split(masked, uniform, ratio)
    np.testing.assert_array_equal(part_a.numpy(), expected_a)
    np.testing.assert_array_equal(part_b.numpy(), expected_b)
    assert torch.equal(part_a | part_b, masked) and not (part_a & part_b).any()
    assert abs(part_a.sum() / masked.sum() - ratio) < 0.02


# ---- who sees whom ----


@pytest.mark.parametrize("order", ["xt_x0", "x0_xt"])
@pytest.mark.parametrize(("length", "block_size"), [(8, 4), (13, 5), (6, 1), (5, 8)])
def test_block_visibility_matches_its_rule(order, length, block_size):
    """Catches a leak of x0's own block into xt, which makes the loss fall and the model useless."""
    block = (torch.arange(length) // block_size).repeat(2)[None]
    streams = torch.tensor([NOISED_STREAM, CLEAN_STREAM])
    stream = (streams if order == "xt_x0" else streams.flip(0)).repeat_interleave(length)[None]
    visible = block_visibility(stream, block, stream, block)
    assert visible.shape == (1, 1, 2 * length, 2 * length)
    np.testing.assert_array_equal(visible[0, 0].numpy(), references.block_visibility_mask(length, block_size, order))


def test_block_visibility_of_padding_and_of_two_noised_copies():
    """Catches attended padding, empty mask rows (NaN in softmax), and one noised copy that sees the other."""
    stream = torch.tensor([[CLEAN_STREAM, NOISED_STREAM, NOISED_STREAM + 1, PADDING_STREAM]])
    block = torch.tensor([[0, 1, 1, -1]])
    visible = block_visibility(stream, block, stream, block)[0, 0]
    assert visible.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]


# ---- the packed layout ----


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TIDEQwen3Config(**SHAPE, mask_token_id=MASK, block_size=BLOCK)
    return TIDEQwen3ForBlockDiffusion(config).double().eval()


LENGTHS = (18, 9, 12)


def token_rows(num_masks=1):
    """Rows of different lengths, masked in few of their blocks, so that packing has something to leave out."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, MASK, (length,), generator=generator) for length in LENGTHS]
    hit = [torch.zeros(length, dtype=torch.bool) for length in LENGTHS]
    for row, places in zip(hit, ([5, 6, 9], [8], [1, 2, 3, 11]), strict=True):
        row[places] = True
    if num_masks == 1:
        return rows, [[row] for row in hit]
    part_a = [torch.arange(len(row)) % 2 == 0 for row in hit]
    return rows, [[row & part, row & ~part] for row, part in zip(hit, part_a, strict=True)]


def pad(rows, side, value, extra=3):
    """Rows padded on one side to the longest plus `extra` columns."""
    width = max(LENGTHS) + extra
    filled = []
    for row in rows:
        fill = torch.full((width - len(row),), value, dtype=row.dtype)
        filled.append(torch.cat([row, fill] if side == "right" else [fill, row]))
    return torch.stack(filled)


CONTRACT = LayoutSpec(MASK, BLOCK)


def lay_out(rows, masks, side="right", spec=CONTRACT, pack=True):
    """`block_layout` of padded rows; padding holds a real token id, which must not matter."""
    valid = pad([torch.ones(len(row), dtype=torch.bool) for row in rows], side, False)
    padded_masks = [pad([row[index] for row in masks], side, False) for index in range(len(masks[0]))]
    return block_layout(pad(rows, side, 7), valid, padded_masks, spec, pack)


def asked_logits(model, layout):
    """One forward over the layout: logits at the asked columns, (N, V)."""
    visible = block_visibility(layout.stream, layout.block, layout.stream, layout.block)
    logits = model(layout.input_ids, attention_mask=visible, position_ids=layout.position_ids).logits
    return logits.flatten(0, 1)[layout.asked]


def textbook_logits(model, row, mask):
    """Logits (L, V) of the noised half of one unpadded row, run as [xt ; x0] under the three-case mask."""
    noised = row.clone()
    noised[mask] = MASK
    visible = torch.from_numpy(references.block_visibility_mask(len(row), BLOCK))[None, None]
    position = torch.arange(len(row)).repeat(2)[None]
    return model(torch.cat([noised, row])[None], attention_mask=visible, position_ids=position).logits[0, : len(row)]


@torch.no_grad()
@pytest.mark.parametrize("num_masks", [1, 2], ids=["one copy", "CompDemo's two copies"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pack", [True, False])
def test_layout_gives_the_textbook_logits(model, num_masks, side, pack):
    """Catches a left-out block that was seen, shifted positions, attended padding, and copies that see each other."""
    rows, masks = token_rows(num_masks)
    layout = lay_out(rows, masks, side, pack=pack)
    # row by row, in each row by position: whichever copy a position is masked in
    expected = []
    for row, row_masks in zip(rows, masks, strict=True):
        copies = [textbook_logits(model, row, mask) for mask in row_masks]
        for place in range(len(row)):
            expected += [copy[place] for copy, mask in zip(copies, row_masks, strict=True) if mask[place]]
    torch.testing.assert_close(asked_logits(model, layout), torch.stack(expected), rtol=0, atol=1e-10)
    full = (num_masks + 1) * (max(LENGTHS) + 3)
    assert layout.input_ids.shape[1] < full if pack else layout.input_ids.shape[1] == full


@pytest.mark.parametrize("num_masks", [1, 2])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pack", [True, False])
def test_layout_says_where_its_answers_belong(num_masks, side, pack):
    """Catches targets read at another position than the logits: a loss that falls to the unigram entropy and stays."""
    rows, masks = token_rows(num_masks)
    layout = lay_out(rows, masks, side, pack=pack)
    width = max(LENGTHS) + 3
    expected = [
        index * width + place + (width - len(row) if side == "left" else 0)
        for index, row in enumerate(rows)
        for place in range(len(row))
        if any(mask[place] for mask in masks[index])
    ]
    assert layout.asked_position.tolist() == expected
    assert (layout.input_ids.flatten()[layout.asked] == MASK).all()
    assert (layout.input_ids == MASK).sum() == len(expected), "a masked column that is not asked"
    within = [place for row in masks for place in range(len(row[0])) if any(mask[place] for mask in row)]
    assert layout.position_ids.flatten()[layout.asked].tolist() == within


@torch.no_grad()
@pytest.mark.parametrize("pack", [True, False])
def test_full_sequence_layout(model, pack):
    """Catches a clean copy, or a block grid, in the layout of a network that sees the noised sequence alone."""
    rows, masks = token_rows()
    layout = lay_out(rows, masks, spec=LayoutSpec(MASK, None, clean_copy=False), pack=pack)
    assert layout.input_ids.shape[1] == max(LENGTHS) + (0 if pack else 3)
    expected = []
    for row, (mask,) in zip(rows, masks, strict=True):
        visible = torch.ones(1, 1, len(row), len(row), dtype=torch.bool)
        noised = torch.where(mask, MASK, row)[None]
        expected.append(model(noised, attention_mask=visible).logits[0, mask])
    torch.testing.assert_close(asked_logits(model, layout), torch.cat(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_masks", [1, 2])
@pytest.mark.parametrize("clean_copy", [True, False])
def test_nothing_masked_still_runs_with_a_graph(model, num_masks, clean_copy):
    """Catches a batch that was not masked anywhere: no columns to run, or a loss whose backward raises."""
    rows, masks = token_rows(num_masks)
    masks = [[torch.zeros_like(mask) for mask in row] for row in masks]
    layout = lay_out(rows, masks, spec=LayoutSpec(MASK, BLOCK, clean_copy=clean_copy))
    assert layout.input_ids.numel() > 0 and layout.asked.numel() == 0
    logits = asked_logits(model, layout)
    loss = denoising_loss(logits, torch.zeros(0, dtype=torch.long), num_items=0)
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    used = [gradient for gradient in gradients if gradient is not None]
    assert used and all(gradient.abs().max() == 0 for gradient in used), "zero, and not NaN from an empty softmax"
    assert len(used) == len(gradients), "DDP waits for every parameter"


def test_rows_do_not_see_each_other(model):
    """Catches state shared between rows: one row's mask must not move the logits of the others."""
    rows, masks = token_rows()
    with torch.no_grad():
        together = asked_logits(model, lay_out(rows, masks))
        masks[1][0][:] = True
        again = asked_logits(model, lay_out(rows, masks))
    first, last = int(masks[0][0].sum()), int(masks[2][0].sum())
    torch.testing.assert_close(again[:first], together[:first], rtol=0, atol=1e-10)
    torch.testing.assert_close(again[-last:], together[-last:], rtol=0, atol=1e-10)


def test_noising_names_the_row_of_each_chunk():
    """Catches chunks that take t, so λ and ω, from another row: nothing else tells chunk TIDAL where it is."""
    chunk_ids = torch.tensor([[-1, 0, 0, 1], [0, 2, 2, 2]])
    batch = {
        "input_ids": torch.arange(8).view(2, 4),
        "labels": torch.arange(8).view(2, 4),
        "chunk_ids": chunk_ids,
        "attention_mask": torch.ones(2, 4, dtype=torch.long),
        "teacher_input_ids": torch.arange(10, 18).view(2, 4),
        "teacher_chunk_ids": torch.tensor([[0, 1, 1, -1], [2, 0, 0, 0]]),
        "teacher_attention_mask": torch.ones(2, 4, dtype=torch.long),
        "row_key": torch.arange(2),
    }
    out = Noising(CONTRACT, CONTRACT)(batch, (torch.full((2,), 0.5), torch.zeros(2, 4), None))
    assert out.pairs.chunk_row.tolist() == [0, 0, 1, 1]
    # each token's chunk by number, student then teacher: the clean ids tell which token it is
    assert list(zip(out.student.targets.tolist(), out.pairs.student_chunk.tolist(), strict=False)) == [
        *[(1, 0), (2, 0), (3, 1)],
        *[(4, 2), (5, 3), (6, 3), (7, 3)],
    ]
    teacher_targets = out.teacher.targets.tolist()
    assert list(zip(teacher_targets, out.pairs.teacher_chunk.tolist(), strict=True)) == [
        *[(10, 0), (11, 1), (12, 1)],
        *[(15, 2), (16, 2), (17, 2), (14, 3)],
    ]
    assert [int(count) for count in out.counts] == [8, 7, 4, 2, 0, 0]

"""Autoregressive teachers: which models, their rows and logits, where they are targets, and the step as a whole."""

import inspect
import math
import re

import pytest
import references
import torch
import transformers
from test_trainer import naive_logits
from tiny import tiny_model, tiny_trainer
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tide_hf.demo.sorting import build_tokenizer
from tide_hf.diffusion import NetworkInputs, causal_layout, row_uniforms
from tide_hf.teachers import Teacher, check_logits, contract_for, is_autoregressive, load_teacher
from tide_hf.teachers import autoregressive as module

PAIRS = ("12", "34", "56", "78", "89", "01")
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=64,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_local_experts=4)
FAMILIES = {
    "qwen3": {},
    "qwen2": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "smollm3": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 1.5, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "gemma3_text": {"final_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "phi": {"num_key_value_heads": 2},
    "phi3": {},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 2},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "mamba": {"state_size": 4},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "num_hidden_layers": 3, "attention_window_size": 4},
    "hyperclovax": {"logits_scaling": 4.0},
    "minicpm3": {
        "dim_model_base": 8,
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}


def causal_model(model_type="qwen3", vocab_size=15, seed=1, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    values = {**SIZES, **FAMILIES.get(model_type, {}), "vocab_size": vocab_size, **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).to(dtype).eval()


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_signal_is_the_models_own_prediction(model_type, side):
    """Catches a position off by one, a row that is read with its padding or its neighbour, a window, a position or a
    bias of the family that is lost, and a soft cap or scale that its class applies behind the head."""
    # grouped products of experts exist in single precision only
    dtype = torch.float32 if EXPERTS.items() <= FAMILIES[model_type].items() else torch.float64
    model = causal_model(model_type, dtype=dtype)
    teacher = Teacher(model, contract_for(model.config, None, "paper", 4))
    lengths, width = (11, 4, 1, 7), 12
    ids = (draw(4, width, seed=1) * 15).long()
    column = torch.arange(width) if side == "right" else width - 1 - torch.arange(width)
    valid = column < torch.tensor(lengths)[:, None]
    first = valid & (valid.cumsum(1) == 1)
    asked = valid & ~first & (draw(4, width, seed=2) < 0.6)
    layout = causal_layout(ids, valid, asked)
    inputs = NetworkInputs(layout.input_ids, layout.position_ids, layout.stream, layout.block, layout.asked, None)
    found = teacher.logits(teacher.hidden(inputs))
    expected = []
    for row, columns in enumerate(valid):
        logits = model(input_ids=ids[row][columns][None]).logits[0]
        asked_here = asked[row][columns].nonzero()[:, 0]
        expected += [logits[place - 1] for place in asked_here.tolist()]
    assert layout.input_ids.shape[1] < max(lengths), "what stands behind the last asked token is run"
    # some families compute parts in float32
    assert_close(found.double(), torch.stack(expected).double(), rtol=0, atol=1e-5)
    assert layout.asked_position.tolist() == asked.flatten().nonzero()[:, 0].tolist()
    check_logits(teacher)


def test_nothing_asked():
    """Catches a batch without any target that has no layout, or whose run fails."""
    model = causal_model()
    ids, valid = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)
    layout = causal_layout(ids, valid, torch.zeros_like(valid))
    inputs = NetworkInputs(layout.input_ids, layout.position_ids, layout.stream, layout.block, layout.asked, None)
    assert Teacher(model, module.AUTOREGRESSIVE).hidden(inputs).shape == (0, 32)
    assert causal_layout(ids[:0], valid[:0], valid[:0]).input_ids.shape == (1, 1)


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unknown_change_of_logits_is_refused(model_type, dtype, monkeypatch):
    """Catches a family whose class changes its logits in a way that is not known here: its predictions would be
    sharper or flatter than it is."""
    # weights as large as the transforms need to show
    model = causal_model(model_type, dtype=dtype, initializer_range=0.5)
    teacher = Teacher(model, module.AUTOREGRESSIVE)
    check_logits(teacher)
    monkeypatch.setattr(module, "TRANSFORMS", ())
    with pytest.raises(ValueError, match=rf"{type(model).__name__}.*are not those of its output embedding"):
        check_logits(teacher)


def test_bidirectional_network_is_refused():
    """Catches a network that sees the answer it is asked for."""
    model = causal_model("bert", is_decoder=False)
    with pytest.raises(ValueError, match="is_decoder=False"):
        contract_for(model.config, None, "paper", 4)
    with pytest.raises(ValueError, match="lets a token see what follows"):
        check_logits(Teacher(model, module.AUTOREGRESSIVE))


def test_every_installed_class_is_known_or_checked():
    """Catches a new version of transformers with a family whose logits are changed behind the head: what follows the
    head in the source of every installed causal class is one of the known transforms, or the class is named here, as
    one that the check on trial rows refuses or that is refused by its config."""
    known = re.compile(r"final_logit_softcapping|logits_scaling|logit_scale|soft_cap|tanh\(logits( / cap)?\)")
    checked = {
        "inkling_text",
        "inkling2_text",
        "inkling2_loop_text",
        "musicgen",
        "musicgen_melody",
        "prophetnet",
        "git",
    }
    odd = set()
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in [names] if isinstance(names, str) else names:
            source = inspect.getsource(getattr(transformers, name).forward)
            source = re.sub(r'r?""".*?"""', "", source, flags=re.S)
            changes = re.findall(r"^\s*(?:lm_)?logits = (.*logits.*)$", source, flags=re.M)
            changes = [line for line in changes if not re.search(r"lm_head\(|logits_to_keep|\.float\(\)$", line)]
            if any(not known.search(line) for line in changes):
                odd.add(model_type)
    assert odd <= checked, odd - checked


@pytest.mark.parametrize("model_type", ["tide_qwen3", "a2d-llama", "wedlm", "llada", "Dream"])
def test_diffusion_models_are_not_autoregressive(model_type):
    """Catches a student, whose class is a subclass of a causal one, fed with clean text."""
    assert not is_autoregressive(AutoConfig.for_model(model_type))


REFUSED = {
    "bart": "encoder-decoder",
    "gemma3": "Load its language model alone",
    "diffusion_gemma": "no mask",
    "vit": "not a known teacher",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_teach_is_refused_by_name(model_type):
    """Catches an error deep inside a model that has no next-token predictions of a text."""
    with pytest.raises(ValueError, match=rf"model_type={model_type!r}.*{REFUSED[model_type]}"):
        contract_for(AutoConfig.for_model(model_type), None, "paper", 4)


def test_loading_by_name(tmp_path):
    """Catches a guard of diffusion teachers that refuses a plain checkpoint."""
    model = causal_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert type(load_teacher(str(tmp_path))) is type(model)


# -- where it is a target ---------------------------------------------------------------------------------------------


def trainer_for(tmp_path, alignment="token", **fields):
    tokenizers = build_tokenizer(PAIRS if alignment == "chunk" else ()), build_tokenizer()
    given = {"preset": "ar-kl" if alignment == "token" else "ar-calm", **fields}
    # id 14 of the sorting tokenizer is its mask, which an autoregressive teacher has no row for
    return tiny_trainer(
        tmp_path,
        model=given.pop("model", None) or tiny_model(0, vocab_size=len(tokenizers[0])),
        teacher=given.pop("teacher", None) or causal_model(vocab_size=14),
        trainer_kwargs={"processing_class": tokenizers[0], "teacher_processing_class": tokenizers[1]},
        alignment=alignment,
        **given,
    )


def naive_suffix(labels, block_size, draws):
    """Masks of one row and each position's probability, block by block; every cut of a block is equally likely."""
    masked, probability = [False] * len(labels), [0.0] * len(labels)
    size = block_size or len(labels)
    for block in range(math.ceil(len(labels) / size)):
        trained = [i for i in range(block * size, min((block + 1) * size, len(labels))) if labels[i] != -100]
        for rank, i in enumerate(trained):
            masked[i] = rank >= int(float(draws[block]) * len(trained))
            probability[i] = (rank + 1) / len(trained)
    return masked, probability


def naive_step(trainer, rows, progress):
    """Loss, target share: by loops over rows, positions and chunks, whole rows and full logits."""
    objective, args = trainer.objective, trainer.args
    student, teacher, block_size = trainer.model, trainer.teacher, trainer.model.config.block_size
    width = max(len(row["labels"]) for row in rows)
    nats, terms, num_tokens, num_masked, num_paired = [], [], 0, 0, 0
    for row in rows:
        ids, labels, chunks = (row[name] for name in ("input_ids", "labels", "chunk_ids"))
        teacher_ids, teacher_chunks = row["teacher_input_ids"], row["teacher_chunk_ids"]
        u_time, u_mask, _ = row_uniforms(args.seed, 0, [row["row_key"]], width)
        chosen, cuts, _ = row_uniforms(args.seed, 0, [row["row_key"]], width, stream=0)
        t = float(1e-3 + (1 - 1e-3) * u_time[0])
        masked = [float(u_mask[0][i]) < t and labels[i] != -100 for i in range(len(ids))]
        is_suffix = float(chosen[0]) < objective.suffix_mask_fraction
        if is_suffix:
            masked, probability = naive_suffix(labels, block_size, cuts[0])
        member = {c: [i for i, chunk in enumerate(chunks) if chunk == c] for c in set(chunks) - {-1}}
        hit = {c for c, places in member.items() if any(masked[i] for i in places)}
        for c in hit:
            for i in member[c]:
                masked[i] = labels[i] != -100
        num_tokens += sum(label != -100 for label in labels)
        num_masked += sum(masked)
        clean = torch.tensor(ids)
        noised = torch.where(torch.tensor(masked), student.config.mask_token_id, clean)
        log_s = naive_logits(student, noised, clean, block_size).log_softmax(-1)
        with torch.no_grad():
            logits_t = teacher(input_ids=torch.tensor(teacher_ids)[None]).logits[0]
        for i in [i for i, is_masked in enumerate(masked) if is_masked]:
            own = [j for j in member.get(chunks[i], [i]) if labels[j] != -100]
            weight = references.chunk_loss_weight(t, len(own), "linear")
            if is_suffix:
                last = {j // block_size: j for j in own}  # of each block the last one
                weight = 1 / (1 - math.prod(1 - probability[j] for j in last.values()))
            nats.append(-weight * log_s[i, ids[i]])
        # of the EOS tokens at the end only the first is the end
        end = max(i for i, token in enumerate(teacher_ids) if token != teacher_ids[-1]) + 1
        for c in sorted(hit):
            places, theirs = member[c], [j for j, chunk in enumerate(teacher_chunks) if chunk == c]
            if not theirs or any(labels[i] == -100 for i in places) or max(theirs) > end:
                continue
            exact = not any(
                not masked[j] for i in places for j in range(i + 1, min((i // block_size + 1) * block_size, len(ids)))
            )
            if objective.ar_targets == "exact" and not exact:
                continue
            num_paired += len(places)
            if objective.by_token:
                size = min(len(logits_t[0]), 14)
                p = logits_t[theirs[0] - 1][:size].log_softmax(-1)
                q = log_s[places[0]][:size].log_softmax(-1)
                value = (p.exp() * (p - q)).sum()
            else:
                p = sum(logits_t[j - 1].log_softmax(-1)[teacher_ids[j]] for j in theirs).exp()
                q = sum(log_s[i, ids[i]] for i in places).exp()
                p, q = p.clamp(1e-7, 1 - 2.0**-23), q.clamp(1e-7, 1 - 2.0**-23)
                value = -(p * q.log() + (1 - p) * (1 - q).log())
            terms.append(value * (1 if exact or objective.ar_targets != "annealed" else 1 - progress))
    loss = sum(nats) / num_tokens + (sum(terms) / len(terms) if terms else 0)
    return loss, num_paired / num_masked


@pytest.mark.parametrize("targets", ["exact", "all", "annealed"])
@pytest.mark.parametrize("alignment", ["token", "chunk"])
def test_step_equals_a_straightforward_one(tmp_path, alignment, targets):
    """Catches any error of layout, exactness, suffix masks, their weights, counts or annealing: loss and gradient of
    a whole step of two micro-batches against loops over rows, positions and chunks."""
    trainer = trainer_for(
        tmp_path,
        alignment,
        ar_targets=targets,
        suffix_mask_fraction=0.5,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        max_steps=1,
        eos_fill="end",
    )
    rows = [trainer.train_dataset[index] for index in range(8)]
    trainer.state.max_steps, trainer.state.global_step = 10, 3
    collated = [trainer.data_collator(rows[:4]), trainer.data_collator(rows[4:])]
    batches, _ = trainer.get_batch_samples(iter(collated), 2, torch.device("cpu"))
    trainer.model.zero_grad()
    losses = [trainer.compute_loss(trainer.model, batch) for batch in batches]
    sum(losses).backward()
    got = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    expected, share = naive_step(trainer, rows, 0.3)
    expected.backward()
    assert_close(sum(losses), expected, rtol=1e-6, atol=0)
    for name, value in trainer.model.named_parameters():
        assert_close(got[name], value.grad, rtol=0, atol=1e-6 * max(float(value.grad.abs().max()), 1e-3), msg=name)
    assert trainer._num_targets / trainer._num_masked == pytest.approx(share)
    assert 0 < share < 1 and any((batch.suffix_weight > 0).any() for batch in batches)
    if targets != "exact":
        assert not all(batch.pairs.is_exact.all() for batch in batches)

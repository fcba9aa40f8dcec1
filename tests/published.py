"""Tiny random checkpoints in the key layouts and config.json fields of their publishers, and one naive forward.

The forward reads the published tensors by their published names and is written from the models' formulas, token by
token and expert by expert, in float64; it knows nothing of transformers.
"""

import json

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTER, LAYERS, VOCAB = 32, 4, 2, 8, 48, 2, 24
EXPERTS, CHOSEN, EXPERT_INTER = 8, 3, 16
QWEN_NAMES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LLADA_NAMES = {
    **QWEN_NAMES,
    "embed": "model.transformer.wte",
    "final_norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}.",
    "attention_norm": "attn_norm",
    "mlp_norm": "ff_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
LLADA2_NAMES = {
    **QWEN_NAMES,
    "embed": "model.word_embeddings",
    "qkv": "attention.query_key_value",
    "o": "attention.dense",
    "q_norm": "attention.query_layernorm",
    "k_norm": "attention.key_layernorm",
}
QWEN_CONFIG = {
    "attention_dropout": 0.0,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "initializer_range": 0.02,
    "max_position_embeddings": 128,
    "max_window_layers": 2,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.52.3",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}
LLADA_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": HIDDEN,
    "embedding_size": VOCAB,
    "eos_token_id": 20,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_device": "meta",
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 23,
    "max_sequence_length": 128,
    "mlp_hidden_size": INTER,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "n_layers": LAYERS,
    "pad_token_id": 20,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": VOCAB,
    "weight_tying": False,
}
LLADA2_CONFIG = {
    **QWEN_CONFIG,
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": EXPERT_INTER,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "pad_token_id": 20,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "rotary_dim": HEAD_DIM // 2,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "topk_group": 2,
    "use_bias": False,
    "use_qkv_bias": False,
}
LLADA_MOE_CONFIG = {
    **{name: value for name, value in QWEN_CONFIG.items() if name not in ("intermediate_size", "max_window_layers")},
    "attention_bias": False,
    "clip_qkv": None,
    "dense_intermediate_size": INTER,
    "expert_intermediate_size": EXPERT_INTER,
    "head_dim": None,
    "moe_layer_freq": [1] * LAYERS,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "n_group": None,
    "norm_topk_prob": None,
    "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "output_router_logits": None,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_aux_loss_coef": None,
    "shared_expert_intermediate_size": None,
    "topk_group": None,
}
# family -> (model_type, architecture, config.json, key names, parts of the layer)
FAMILIES = {
    "llada2": ("llada2_moe", "LLaDA2MoeModelLM", LLADA2_CONFIG, LLADA2_NAMES, {"qk_norm", "grouped", "fused"}),
    "wedlm-8b": (
        "wedlm",
        "WeDLMForCausalLM",
        {**QWEN_CONFIG, "attention_bias": False, "mask_token_id": None, "qk_norm": True},
        QWEN_NAMES,
        {"qk_norm"},
    ),
    "wedlm-7b": (
        "wedlm",
        "WeDLMForCausalLM",
        {**QWEN_CONFIG, "attention_bias": True, "head_dim": None, "mask_token_id": None, "qk_norm": False},
        QWEN_NAMES,
        {"bias"},
    ),
    "llada-8b": ("llada", "LLaDAModelLM", LLADA_CONFIG, LLADA_NAMES, set()),
    "llada-moe": ("llada", "LLaDAMoEModelLM", LLADA_MOE_CONFIG, QWEN_NAMES, {"qk_norm", "softmax"}),
    "dream": (
        "Dream",
        "DreamModel",
        {**QWEN_CONFIG, "head_dim": None, "mask_token_id": 23, "pad_token_id": 20},
        QWEN_NAMES,
        {"bias"},
    ),
    "sdar": (
        "sdar",
        "SDARForCausalLM",
        {**QWEN_CONFIG, "attn_implementation": "flex_attention", "fuse_cross_entropy": True, "block_size": 4},
        QWEN_NAMES,
        {"qk_norm"},
    ),
    "sdar-moe": (
        "sdar_moe",
        "SDARMoeForCausalLM",
        {
            **QWEN_CONFIG,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": EXPERT_INTER,
            "norm_topk_prob": True,
            "num_experts": EXPERTS,
            "num_experts_per_tok": CHOSEN,
        },
        QWEN_NAMES,
        {"qk_norm", "softmax"},
    ),
    "a2d-qwen3": ("a2d-qwen3", "A2DQwen3LMHeadModel", {**QWEN_CONFIG, "block_size": 4}, QWEN_NAMES, {"qk_norm"}),
    "a2d-qwen2": ("a2d-qwen2", "A2DQwen2LMHeadModel", {**QWEN_CONFIG, "head_dim": None}, QWEN_NAMES, {"bias"}),
    "a2d-llama": ("a2d-llama", "A2DLlamaLMHeadModel", {**QWEN_CONFIG, "mlp_bias": False}, QWEN_NAMES, set()),
}


def write_checkpoint(path, family: str, without=(), **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """Writes a published folder, its remote code raising if it is run; returns config.json and the tensors."""
    model_type, architecture, config, names, parts = FAMILIES[family]
    classes = {name: f"modeling_remote.{architecture}" for name in ("AutoModel", "AutoModelForCausalLM")}
    config = {
        "architectures": [architecture],
        "auto_map": {"AutoConfig": "modeling_remote.RemoteConfig", **classes},
        "model_type": model_type,
        **config,
        **changes,
    }
    config = {name: value for name, value in config.items() if name not in without}
    weights = draw_weights(names, parts)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_remote.py").write_text("raise RuntimeError('remote code was run')\n")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return config, weights


def draw_weights(names: dict, parts: set[str]) -> dict[str, torch.Tensor]:
    """Random tensors under their published keys, far enough from zero that a swapped one shows."""
    generator = torch.Generator().manual_seed(0)
    query, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {names["embed"]: (VOCAB, HIDDEN), names["final_norm"]: (HIDDEN,), names["head"]: (VOCAB, HIDDEN)}
    for number in range(LAYERS):
        layer = names["layer"].format(number)
        part = {names["attention_norm"]: (HIDDEN,), names["mlp_norm"]: (HIDDEN,), names["o"]: (HIDDEN, query)}
        if "fused" in parts:
            part[names["qkv"]] = (query + 2 * keys, HIDDEN)
        else:
            part |= {names["q"]: (query, HIDDEN), names["k"]: (keys, HIDDEN), names["v"]: (keys, HIDDEN)}
        if "qk_norm" in parts:
            part |= {names["q_norm"]: (HEAD_DIM,), names["k_norm"]: (HEAD_DIM,)}
        mixture = "softmax" in parts or ("grouped" in parts and number > 0)
        feed_forwards = {"mlp": INTER}
        if mixture:
            feed_forwards = {f"mlp.experts.{expert}": EXPERT_INTER for expert in range(EXPERTS)}
            part["mlp.gate"] = (EXPERTS, HIDDEN)
        if mixture and "grouped" in parts:
            feed_forwards["mlp.shared_experts"] = EXPERT_INTER
        for prefix, width in feed_forwards.items():
            for name, shape in (("gate", (width, HIDDEN)), ("up", (width, HIDDEN)), ("down", (HIDDEN, width))):
                part[names[name].replace("mlp", prefix)] = shape
        shapes |= {layer + name: shape for name, shape in part.items()}
    weights = {}
    for name, shape in shapes.items():
        values = 0.3 * torch.randn(shape, generator=generator)
        weights[f"{name}.weight"] = values + 1 if len(shape) == 1 else values
        if "bias" in parts and name.endswith((names["q"], names["k"], names["v"])):
            weights[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)
        if "grouped" in parts and name.endswith("mlp.gate"):
            weights[f"{name}.expert_bias"] = 0.3 * torch.randn(EXPERTS, generator=generator)
    return weights


# ---- the naive forward ----


def naive_logits(family: str, config: dict, weights: dict, ids, visible=None, positions=None) -> torch.Tensor:
    """(L, V) logits of one row; `visible (L, L)` is full by default, `positions (L,)` counts from 0."""
    names, parts = FAMILIES[family][3:]
    weights = {name: tensor.double() for name, tensor in weights.items()}
    length = len(ids)
    visible = torch.ones(length, length, dtype=torch.bool) if visible is None else visible
    positions = torch.arange(length) if positions is None else positions
    eps = config["rms_norm_eps"]
    hidden = weights[names["embed"] + ".weight"][ids]
    for number in range(LAYERS):
        prefix = names["layer"].format(number)
        layer = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        normed = rms_norm(hidden, layer[names["attention_norm"] + ".weight"], eps)
        hidden = hidden + attention(normed, layer, names, parts, config, visible, positions)
        normed = rms_norm(hidden, layer[names["mlp_norm"] + ".weight"], eps)
        if "mlp.gate.weight" in layer:
            hidden = hidden + torch.stack([mixture(token, layer, parts, config) for token in normed])
        else:
            hidden = hidden + feed_forward(
                normed, *(layer[names[name] + ".weight"] for name in ("gate", "up", "down"))
            )
    return rms_norm(hidden, weights[names["final_norm"] + ".weight"], eps) @ weights[names["head"] + ".weight"].T


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def feed_forward(x, gate, up, down):
    activated = x @ gate.T
    return (activated * torch.sigmoid(activated) * (x @ up.T)) @ down.T


def attention(x, layer, names, parts, config, visible, positions):
    if "fused" in parts:
        q, k, v = (x @ layer[names["qkv"] + ".weight"].T).split([32, 16, 16], -1)
    else:
        q, k, v = (
            x @ layer[names[name] + ".weight"].T + layer.get(names[name] + ".bias", torch.zeros(()))
            for name in ("q", "k", "v")
        )
    rotated = int(HEAD_DIM * (config.get("partial_rotary_factor") or 1))
    heads = []
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        query = q[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
        key, value = (side[:, shared * HEAD_DIM : (shared + 1) * HEAD_DIM] for side in (k, v))
        if "qk_norm" in parts:
            query = rms_norm(query, layer[names["q_norm"] + ".weight"], config["rms_norm_eps"])
            key = rms_norm(key, layer[names["k_norm"] + ".weight"], config["rms_norm_eps"])
        query, key = (rotate(side, positions, config["rope_theta"], rotated) for side in (query, key))
        scores = (query @ key.T / HEAD_DIM**0.5).masked_fill(~visible, -torch.inf)
        heads.append(scores.softmax(-1) @ value)
    return torch.cat(heads, -1) @ layer[names["o"] + ".weight"].T


def rotate(x, positions, theta, rotated):
    half = rotated // 2
    angle = positions[:, None] * theta ** (-2 * torch.arange(half, dtype=torch.float64) / rotated)
    first, second, rest = x[:, :half], x[:, half:rotated], x[:, rotated:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def expert(token, layer, name):
    return feed_forward(token, *(layer[f"mlp.{name}.{part}_proj.weight"] for part in ("gate", "up", "down")))


def mixture(token, layer, parts, config):
    """One token through its experts; the two routers as their formulas say."""
    scores = layer["mlp.gate.weight"] @ token
    if "softmax" in parts:
        share = scores.softmax(-1)
        chosen = sorted(range(EXPERTS), key=lambda index: -share[index])[:CHOSEN]
        total = sum(share[index] for index in chosen) if config["norm_topk_prob"] else 1
        return sum(share[index] / total * expert(token, layer, f"experts.{index}") for index in chosen)
    share = torch.sigmoid(scores)
    choice = share + layer["mlp.gate.expert_bias"]
    size = EXPERTS // config["n_group"]
    groups = [list(range(start, start + size)) for start in range(0, EXPERTS, size)]
    groups.sort(key=lambda group: -sum(sorted((float(choice[index]) for index in group), reverse=True)[:2]))
    allowed = [index for group in groups[: config["topk_group"]] for index in group]
    chosen = sorted(allowed, key=lambda index: -choice[index])[:CHOSEN]
    total = sum(share[index] for index in chosen) + 1e-20
    routed = sum(share[index] / total * expert(token, layer, f"experts.{index}") for index in chosen)
    return config["routed_scaling_factor"] * routed + expert(token, layer, "shared_experts")

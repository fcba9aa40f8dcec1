"""Uniform-state diffusion LM (Duo 2506.10892): tokens are replaced by random ones, not by [MASK].

The network is given each position's noise level, 0 for a prompt, and takes soft inputs: probabilities times the
embedding matrix. This file travels with checkpoints: it imports its siblings, torch and transformers alone.

Shapes: B rows, L positions, V vocabulary.
"""

import math

import torch
from torch import nn
from transformers import GenerationConfig, Qwen3ForCausalLM
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_uniform import TIDEUniformQwen3Config
from .prompts_tide import padding_mask, token_rows
from .refusals import RefusesNextTokenTrainers
from .row_noise import fresh_keys, mean_nats, random_tokens, row_keys, row_positions, stratified_times, uniforms
from .settings_tide import FOR_UNIFORM, REFUSED_FOR_UNIFORM, MergedSettings
from .uniform_diffusion import NOISE_EPSILON, reverse_step, uniform_divergence

NUM_NOISE_FEATURES = 16


class TIDEUniformQwen3ForDiffusion(RefusesNextTokenTrainers, Qwen3ForCausalLM):
    """Qwen3 as a uniform-state diffusion LM over the full sequence.

    Args:
        config ([`TIDEUniformQwen3Config`]): of the model.

    Attributes:
        eval_num_times (`int`): noise levels at which `forward(labels=…)` runs each row in eval mode, one drawn from
            each of as many equal parts of [0, 1]; each takes a forward.
    """

    eval_num_times: int = 8

    config_class = TIDEUniformQwen3Config
    config: TIDEUniformQwen3Config

    def __init__(self, config):
        super().__init__(config)
        self.noise_embedding = nn.Linear(NUM_NOISE_FEATURES, config.hidden_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
        token_probabilities: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Runs the network; with `labels` also the forward process and the NELBO.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): clean tokens with `labels`, noised ones otherwise.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): padding mask.
            noise_level (`torch.Tensor` of shape `(B, L)`): 1 − α of each position, in [0, 1]; 0 is a clean token.
            token_probabilities (`torch.Tensor` of shape `(B, L, V)`, *optional*): soft inputs instead of `input_ids`,
                with or without a gradient.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): `input_ids` where trained on, −100 elsewhere. α
                is uniform per row. In eval mode a row is run at `eval_num_times` levels, and its noise follows from
                its tokens and labels alone.
            inputs_embeds (`None`): not taken; in the signature because PEFT passes it by name.
            num_items_in_batch (`int`, *optional*): trained-on tokens of the whole batch, the loss's divisor; in eval
                mode this call's share of the batch follows from it.
            kwargs: passed to the decoder.

        Returns:
            [`~transformers.modeling_outputs.MaskedLMOutput`]: logits of the clean token at the same position, and with
            `labels` the loss, nats per trained-on token: the mean over tokens in training, in eval mode the mean over
            rows of each row's mean, with the logits of the middle level.

        Raises:
            ValueError: without exactly one input, or without a noise level.
        """
        if labels is not None:
            return self._denoise(input_ids, attention_mask, labels, num_items_in_batch, **kwargs)
        if (input_ids is None) == (token_probabilities is None) or inputs_embeds is not None:
            raise ValueError("forward takes either input_ids or token_probabilities, and no inputs_embeds.")
        if noise_level is None:
            raise ValueError(
                "A uniform-state diffusion LM needs the noise level of each position (1 − α, 0 for clean tokens): "
                "pass noise_level or labels, or call generate."
            )
        return self._network(input_ids, token_probabilities, noise_level, attention_mask, **kwargs)

    def _network(self, input_ids, token_probabilities, noise_level, attention_mask, **kwargs) -> MaskedLMOutput:
        """Logits of the clean tokens."""
        if input_ids is not None:
            embeds = self.model.embed_tokens(input_ids)
        else:
            weight = self.model.embed_tokens.weight
            embeds = token_probabilities.to(weight.dtype) @ weight
        order = torch.arange(NUM_NOISE_FEATURES, device=embeds.device)
        features = torch.cos(math.pi * order * noise_level[..., None].float())
        embeds = embeds + self.noise_embedding(features.to(embeds.dtype))
        if attention_mask is not None:
            kwargs["position_ids"] = attention_mask.long().cumsum(-1).sub(1).clamp(min=0)
        kwargs["use_cache"] = False
        outputs = self.run_body(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
        return MaskedLMOutput(logits=self.lm_head(outputs.last_hidden_state))

    def _denoise(self, input_ids, attention_mask, labels, num_items_in_batch, **kwargs) -> MaskedLMOutput:
        """Replaces trained-on tokens by random ones, at one level in training and at several in eval mode; α = 1 − t.

        Returns the NELBO and the logits.
        """
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        trained, positions = (labels != -100) & valid, row_positions(valid)
        keys_B = row_keys(input_ids, labels, valid)
        keys_B, num_times = (fresh_keys(keys_B), 1) if self.training else (keys_B, self.eval_num_times)
        clean_NV = nn.functional.one_hot(input_ids[trained], self.config.vocab_size).float()
        nats_B = 0
        for number in range(num_times):
            uniform_B1 = stratified_times(keys_B, number, number, num_times)
            level_B1 = NOISE_EPSILON + (1 - 2 * NOISE_EPSILON) * uniform_B1
            random = random_tokens(keys_B, num_times + number, positions, self.config.vocab_size)
            replaced = (uniforms(keys_B, number, positions) < level_B1) & trained
            noised = torch.where(replaced, random, input_ids)
            outputs = self._network(noised, None, level_B1 * trained, attention_mask, **kwargs)
            predicted_NV = outputs.logits[trained].float().softmax(-1)
            alpha_N = (1 - level_B1).expand_as(labels)[trained]
            values_N = uniform_divergence(clean_NV, predicted_NV, noised[trained], alpha_N, rate_N=1.0)
            values_BL = values_N.new_zeros(trained.shape).masked_scatter(trained, values_N)
            nats_B = nats_B + values_BL.sum(1) / num_times
            if number == num_times // 2:
                returned = outputs
        returned.loss = mean_nats(nats_B, trained.sum(1), num_items_in_batch, self.training)
        return returned

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        num_steps: int | None = None,
        greedy_tail: bool = True,
        generator: torch.Generator | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> torch.LongTensor:
        """Ancestral sampling: random tokens after the prompt, denoised together in steps of equal length in α.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, P)`): prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): 0 at their padding. Without it
                `pad_token_id` at the ends of a row is padding, unless that is EOS too.
            max_new_tokens (`int`, *optional*): N, length of the answer, 32 by default.
            num_steps (`int`, *optional*): network calls, at least 1; `config.num_steps` by default.
            greedy_tail (`bool`): the last step takes the most probable token instead of a draw.
            generator (`torch.Generator`, *optional*): source of all random draws.
            generation_config (`GenerationConfig`, *optional*), kwargs: `max_length` (P + N), `eos_token_id` and
                `pad_token_id` as in transformers, over `model.generation_config` and the model's config.

        Returns:
            `torch.LongTensor` of shape `(B, P + N)`; after an answer's first EOS stands padding (or EOS).

        Raises:
            ValueError: any other setting that is not off, in a keyword or a config; prompts or masks of the wrong
                shape, type or vocabulary.

        Source: Duo 2506.10892 (the sampler, and its greedy tail).
        """
        input_ids = token_rows(input_ids)
        given = kwargs | ({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})
        num_new, ids = self._answer_settings(given, generation_config, input_ids.shape[1])
        num_steps = self.config.num_steps if num_steps is None else num_steps
        if num_steps < 1 or num_new < 1:
            raise ValueError(f"generate needs num_steps and max_new_tokens ≥ 1, got {num_steps}, {num_new}.")
        special = GenerationConfig(bos_token_id=self.config.bos_token_id, mask_token_id=None, **ids)
        valid = padding_mask(input_ids, attention_mask, special, self.config.vocab_size)
        answer = self._denoised_answer(input_ids, valid, num_new, num_steps, greedy_tail, generator)
        return torch.cat([input_ids, _padded_after_eos(answer, **ids)], 1)

    def _answer_settings(self, keywords: dict, generation_config, num_columns: int) -> tuple[int, dict]:
        """Length of the answer, and the ids of EOS and padding."""
        merged = MergedSettings(
            "generate", self.generation_config, generation_config, keywords, FOR_UNIFORM, (), REFUSED_FOR_UNIFORM
        )
        if merged.values.get("do_sample") is False:
            raise ValueError(
                "do_sample=False: a uniform-state diffusion LM begins with random tokens and draws in each step but "
                "the last, with greedy_tail=True. Set do_sample to None, and pass a generator for a repeatable answer."
            )
        ids = {name: merged.values.get(name, getattr(self.config, name)) for name in ("eos_token_id", "pad_token_id")}
        return merged.answer_length(num_columns, default=32), ids

    def _denoised_answer(self, input_ids, valid, num_new: int, num_steps: int, greedy_tail: bool, generator):
        """The reverse process from random tokens, `(B, N)`."""
        (rows, prompt_length), device = input_ids.shape, input_ids.device
        answer = torch.randint(self.config.vocab_size, (rows, num_new), device=device, generator=generator)
        attention_mask = None if bool(valid.all()) else torch.cat([valid.long(), torch.ones_like(answer)], 1)
        prompts = input_ids.masked_fill(~valid, 0)  # padding may be an id without a row in the embedding
        noise_level = torch.zeros(rows, prompt_length + num_new, device=device)
        for step in range(num_steps):
            alpha, next_alpha = step / num_steps, (step + 1) / num_steps
            noise_level[:, prompt_length:] = 1 - alpha
            logits = self(torch.cat([prompts, answer], 1), attention_mask, noise_level).logits[:, prompt_length:]
            predicted = logits.flatten(0, 1).float().softmax(-1)
            law = reverse_step(predicted, answer.flatten(), alpha, next_alpha)
            is_greedy = greedy_tail and step == num_steps - 1
            drawn = law.argmax(-1) if is_greedy else torch.multinomial(law, 1, generator=generator)[:, 0]
            answer = drawn.view_as(answer)
        return answer


def _padded_after_eos(answer: torch.Tensor, eos_token_id, pad_token_id: int | None) -> torch.Tensor:
    """The answer with padding after each row's first EOS, or with EOS where there is no padding."""
    if eos_token_id is None:
        return answer
    is_eos = torch.isin(answer, torch.tensor(eos_token_id, device=answer.device))
    has_ended = is_eos.cumsum(1) - is_eos.long() > 0
    first_eos = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
    return answer.masked_fill(has_ended, first_eos if pad_token_id is None else pad_token_id)

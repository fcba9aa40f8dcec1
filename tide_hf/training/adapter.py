"""Adapters on a student: what PEFT is told, and checks for what it would silently do wrong."""

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

TASK_TYPE = "CAUSAL_LM"
# the linear layers of all student families; short names match however the student is wrapped
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# settings of generation, which are in the base's config.json, not in the adapter
DECODING_FIELDS = ("diffusion_type", "block_size", "mask_token_id")


def prepare_adapter(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None = None, revision: str | None = None
) -> PreTrainedModel | PeftModel:
    """Makes a student ready for training: with `peft_config` it gets a new adapter on a frozen base.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the student, which may already have an adapter.
        peft_config (`PeftConfig`, *optional*): LoRA, DoRA, …; a missing `task_type` becomes CAUSAL_LM, and missing
            `target_modules` of LoRA become all linear layers except the head. The packed experts of a mixture are
            parameters, not layers: they are adapted where `target_parameters` names them.
        revision (`str`, *optional*): of the base on the Hub; written into the adapter's configuration.

    Raises:
        ValueError: for an adapter that could not be trained, merged or loaded correctly.
    """
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError("The student already has an adapter: leave peft_config out, or give its base.")
        _complete(peft_config, model)
        _check_base(model, revision)
        model = get_peft_model(model, peft_config, revision=revision)
    _check_layers(model)
    return model


def _complete(peft_config: PeftConfig, model: PreTrainedModel) -> None:
    """Fills in what a student's adapter needs, and refuses kinds that cannot work."""
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} puts virtual tokens before the input, which the block-diffusion layout "
            "does not support: use LoRA or another method that changes layers."
        )
    if peft_config.task_type is None:
        logger.info(f"peft_config.task_type is None: set to {TASK_TYPE}, so that AutoPeftModelForCausalLM loads it.")
        peft_config.task_type = TASK_TYPE
    if peft_config.task_type != TASK_TYPE:
        raise ValueError(
            f"peft_config.task_type={str(peft_config.task_type)!r}: a student is loaded by the causal-LM classes, "
            f"diffusion or not; use task_type={TASK_TYPE!r}."
        )
    if isinstance(peft_config, LoraConfig) and not (peft_config.target_modules or peft_config.target_parameters):
        logger.info(f"peft_config names no target_modules: adapting {', '.join(LINEAR_LAYERS)}.")
        peft_config.target_modules = set(LINEAR_LAYERS)
        packed = {name.split(".", 3)[-1]: weight for name, weight in model.named_parameters() if weight.ndim == 3}
        if packed:
            logger.warning(
                f"The experts of this {type(model).__name__} are packed parameters, which target_modules does not "
                f"reach: they stay frozen. To adapt them as well, set target_parameters={sorted(packed)} beside "
                "target_modules in the LoraConfig (lora_dropout must be 0)."
            )


def _check_base(model: PreTrainedModel, revision: str | None) -> None:
    """An adapter is loaded onto its base as saved, so the run's settings must not contradict the base's."""
    name = model.name_or_path
    saved = None
    if name:
        try:
            saved = AutoConfig.from_pretrained(name, revision=revision)
        except OSError:
            logger.warning(f"The adapter's base {name!r} can no longer be read.")
    if saved is None:
        logger.warning(
            "The adapter will not name a base that can be loaded: load it with PeftModel.from_pretrained(model, "
            "folder), or save the student first and train from its folder."
        )
        return
    for field in DECODING_FIELDS:
        theirs, ours = getattr(saved, field, None), getattr(model.config, field)
        # generate refuses to run without a mask token, but with another one it would be silently wrong
        if theirs != ours and not (field == "mask_token_id" and theirs is None):
            raise ValueError(
                f"The run trains with {field}={ours}, but the config.json of the adapter's base {name!r} has "
                f"{theirs}, and whoever loads the adapter would generate with that. Train with {field}={theirs}, or "
                f"save the base with {field}={ours} (model.config.{field} = {ours}; model.save_pretrained(folder)) "
                "and start from there."
            )


def _check_layers(model: PreTrainedModel | PeftModel) -> None:
    """Refuses adapter layers that the loss would bypass or that cannot be merged."""
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "The adapter targets lm_head, whose weight the loss uses directly: leave lm_head out of target_modules, "
            "or list it in modules_to_save."
        )
    if isinstance(model.get_input_embeddings(), BaseTunerLayer) and model.config.tie_word_embeddings:
        raise ValueError(
            "The adapter targets embed_tokens, whose weight is also lm_head's: merging it would change the head, "
            "which was trained without it. Use modules_to_save=['embed_tokens'] with ensure_weight_tying=True."
        )

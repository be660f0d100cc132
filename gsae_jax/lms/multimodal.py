"""The language models of multimodal checkpoints: Gemma 3 and 4. What reads images and sound is not loaded."""

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from gsae_jax.lms import gemma, gemma4, hugging_face
from gsae_jax.lms.transformer import Config

# Of the language model's tensors, as older and newer versions of transformers write them.
PREFIX = ("language_model.model.", "model.language_model.", "language_model.", "model.")
IGNORED = rf"{gemma4.IGNORED}|^(vision_tower|multi_modal_projector|audio_tower|embed_vision|embed_audio)\."
MODEL_TYPES = {"gemma3": gemma.MODEL_TYPES["gemma3_text"], "gemma4": gemma4.MODEL_TYPES["gemma4_text"]}
# Hub checkpoints leave out what has the default value, so that fewer fields are required than of text models.
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers")
logger = logging.getLogger(__name__)


def config(settings: Mapping[str, Any]) -> Config:
    """The language model of the model that a `config.json` describes.

    Raises:
        ValueError: fields are missing, or ask for a feature that we lack.
    """
    model_type, text = settings["model_type"], settings.get("text_config")
    if not isinstance(text, dict):
        raise ValueError("lacks text_config")
    if model_type == "gemma3" and text.get("final_logit_softcapping"):  # transformers ignores it
        raise ValueError(f"has final_logit_softcapping in text_config, which is not supported with {model_type}")
    outer = {name: settings[name] for name in hugging_face.QUANTISATION if name in settings}
    tied = settings.get("tie_word_embeddings", True)
    inner = text | outer | {"model_type": f"{model_type}_text", "tie_word_embeddings": tied}
    understood = (gemma if model_type == "gemma3" else gemma4).config(inner, REQUIRED)
    _say_once(model_type)
    return understood


@lru_cache
def _say_once(model_type: str) -> None:
    logger.info("the language model of this %s checkpoint is used; its vision part is not read", model_type)

import json

import numpy as np

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import config_trees, pretraining


def test_pretraining_writes_a_checkpoint_that_loads_and_its_own_loss(tmp_path, text_dir):
    tree = {
        "data": {"corpus": "text", "path": str(text_dir), "data_dir": str(tmp_path / "tfds"), "context_length": 16},
        "vocab_size": 300,
        "model": {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 32},
        "epochs": 0.5,
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "test_tokens": 4096,
    }
    loss = pretraining.pretrain(config_trees.from_dict(config_lib.Pretrain, tree), tmp_path / "lm")
    assert loss < 0.9 * np.log(300)  # better than chance
    facts = json.loads((tmp_path / "lm" / "training.json").read_text())
    assert facts["test_cross_entropy"] == loss
    assert facts["curve"][-1][0] == facts["steps"]
    assert (tmp_path / "lm" / "loss.png").exists()
    lm = gsae_jax.load_lm(tmp_path / "lm")
    assert lm.config.d_vocab == len(lm.tokenizer) <= 300
    assert lm.logits([[lm.tokenizer.bos_token_id, 5]]).shape == (1, 2, lm.config.d_vocab)

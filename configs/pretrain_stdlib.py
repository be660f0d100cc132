"""The embedded language model: GELU-1L's shape at half its width, on the Python standard library's source."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            data=base.data(),
            vocab_size=4096,
            model=dict(n_layers=1, d_model=256, n_heads=4, d_head=64, d_mlp=1024),
            epochs=3.0,
            batch_size=64,  # rows of data.context_length tokens
            learning_rate=3e-3,
            b2=0.95,
            weight_decay=0.05,
            warmup_steps=200,
            test_tokens=2**18,
        )
    )

"""Every field of an experiment, once, with its default; experiments start from `get_config()` and change it."""

from ml_collections import ConfigDict


def data() -> ConfigDict:
    return ConfigDict(
        dict(
            corpus="stdlib",  # stdlib (this Python's own library), text (your files) or tfds (a prepared data set)
            path="",  # text: a file, folder or glob of .txt, .md, .json, .jsonl, .ndjson, .parquet, compressed or not
            field="text",  # field of a JSON object, column of a .parquet (a.b for a nested one), feature of a TFDS set
            on_bad_row="error",  # text: a row without text ends the command ("error"), or is left out ("skip")
            separator="",  # text: stands between documents in a .txt or .md file; "" = a file is one document
            name="",  # tfds: name of the data set, such as "wiki40b/en"
            train_split="train",  # the split to train on, in TFDS' notation: "train[:90%]" works
            test_split="test",  # the split to measure on
            held_out="hash",  # text: "hash" of the text decides what is held out; "position" did in earlier versions
            data_dir="",  # where prepared data lives; "" = TFDS' own default (~/tensorflow_datasets)
            context_length=128,  # tokens in a row, BOS included
            prepend_bos=True,  # start every row with BOS
        )
    )


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of the data order and the exchange buffer; SAEs have their own
    config.lm = ConfigDict(
        dict(
            path="",  # Hugging Face checkpoint directory or hub name; "" = the embedded model
            revision="",  # of a hub name: branch, tag or commit; a run records the commit
            dtype="float32",  # of the language model and the exchange buffer
        )
    )
    config.data = data()
    config.activations = ConfigDict(
        dict(
            rows_per_forward=32,  # rows of tokens in one forward pass of the language model
            buffer_size=2**20,  # activations in the exchange buffer (all devices together)
            center=True,  # subtract each site's mean from the SAEs' inputs; False: the paper's units
            scale_tokens=2**16,  # tokens that measure each site's mean, scale and median norm before training
            drop_special_tokens=True,  # keep BOS, EOS, padding and other special tokens from the SAEs
            max_norm_multiple=0.0,  # drop tokens whose norm exceeds this multiple of the site's median; 0 = keep
        )
    )
    config.stacks = ConfigDict()  # name -> stack(...)
    config.train = ConfigDict(
        dict(
            steps=10_000,  # SAE updates
            batch_size=4096,  # activations in one SAE update (all devices together)
            warmup_steps=1000,  # linear warm-up of the learning rate
            decay_fraction=0.0,  # last part of training in which the rate falls to zero (cosine); 0 = none
            compute_dtype="float32",  # of the SAEs' matrix products; bfloat16 suits accelerators
            log_every=50,  # steps between lines of metrics
            dead_after=1000,  # a feature that fired on no token of so many steps is dead
            max_skipped=100,  # updates in a row that an SAE may skip as not finite before training ends
            resample_steps=(),  # steps after which dead features begin again; () = never
            resample_warmup_steps=1000,  # the learning rate then returns from a tenth over so many steps
        )
    )
    config.mesh = ConfigDict(
        dict(
            data=0,  # devices along the batch; 0 = all that `latent` leaves
            latent=1,  # devices along the dictionary
        )
    )
    config.checkpoint = ConfigDict(
        dict(
            every=1000,  # steps between checkpoints
            keep=2,  # how many of the last to keep
            keep_every=0,  # also keep checkpoints at least so many steps apart; 0 = none
            keep_best="",  # also keep the one with the lowest mean of STACK/loss or STACK/mse; "" = none
            buffer=True,  # save the exchange buffer; without it a resumed run fills it with other text
        )
    )
    config.loggers = ("tensorboard",)  # of metrics, beside metrics.jsonl: tensorboard, wandb
    config.evaluation = ConfigDict(
        dict(
            tokens=2**17,  # held-out tokens
            rows_per_forward=32,
        )
    )
    return config


def stack(
    architecture: str,
    site: str,
    width: int,
    l1_coefficients,
    learning_rates=(3e-4,),
    seeds=(0,),
    target_l0=(),
    start_from="",
    **options,
) -> ConfigDict:
    """SAEs that differ in l1 coefficient, learning rate, seed and target only (matched up; one value serves all).

    `options` are fields of the architecture's Config, such as `tie_encoder=False` for a gated SAE.
    """
    return ConfigDict(
        dict(
            architecture=architecture,  # a file of gsae_jax/saes: gated, relu
            site=site,  # a TransformerLens hook name: blocks.0.hook_mlp_out
            width=width,  # features (the paper's M)
            l1_coefficients=tuple(l1_coefficients),
            learning_rates=tuple(learning_rates),
            seeds=tuple(seeds),
            # L0 that the l1 coefficients are moved to meet by two thirds of training; () = they stay
            target_l0=tuple(target_l0),
            # "RUN:STACK", or a folder of exported SAEs: the parameters of as many SAEs of this shape; "" = random ones
            start_from=start_from,
            options=dict(options),
        )
    )

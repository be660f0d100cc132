"""What the notebooks share: the quickstart, trained for 80 seconds on two CPU cores."""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.train.steps = 300
    config.train.warmup_steps = 50
    config.train.dead_after = 100
    config.evaluation.tokens = 2**15
    return config

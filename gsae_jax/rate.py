"""Rate how interpretable features are, without people: by rules about tokens, or by a language model as judge.

python -m gsae_jax.rate --workdir runs/quickstart [--sae gated_1] [--feature 3,17]
python -m gsae_jax.rate --study STUDY
python -m gsae_jax.rate --workdir runs/quickstart --judge_url http://localhost:8000/v1 --judge_model NAME [--yes]
"""

from absl import flags

from gsae_jax import cli, scoring
from gsae_jax.errors import UserError


def main() -> None:
    """The command."""
    wanted = scoring.Wanted(WORKDIR.value, FEATURES.value, SAE.value, scoring.numbers(FEATURE.value), STUDY.value)
    judge = None
    if JUDGE_URL.value:
        judge = scoring.Judge(JUDGE_URL.value, JUDGE_MODEL.value, PARALLEL.value, TOKENS.value, YES.value)
    else:
        for name in ("judge_model", "judge_parallel", "judge_tokens", "yes"):
            if flags.FLAGS[name].present:
                raise UserError("goes with --judge_url only; write that as well, or leave it out", f"--{name}")
    scoring.command(wanted, judge)


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", "", "Directory of a training run, local or gs://bucket/folder.")
    FEATURES = flags.DEFINE_string(
        "features", "", "Folder that `collect` wrote; default: `features` in the run's directory."
    )
    SAE = cli.define_list("sae", [], "Name of an SAE; default: all.")
    FEATURE = cli.define_list("feature", [], "Numbers of features, such as 3,17; default: all that are active.")
    STUDY = flags.DEFINE_string("study", "", "Rate the features of this study, and keep the ratings in it.")
    JUDGE_URL = flags.DEFINE_string(
        "judge_url", "", "A language model rates: server of the OpenAI chat protocol. OPENAI_API_KEY has its key."
    )
    JUDGE_MODEL = flags.DEFINE_string("judge_model", "", "The model's name on the server.")
    PARALLEL = flags.DEFINE_integer("judge_parallel", 4, "Requests at once.")
    TOKENS = flags.DEFINE_integer("judge_tokens", 400, "The most tokens of an answer; a model that thinks needs more.")
    YES = flags.DEFINE_bool("yes", False, "Send the requests. Without it, their number is shown and nothing is sent.")
    cli.run(main)

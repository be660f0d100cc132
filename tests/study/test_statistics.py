"""The statistics of a study, against float64 references that follow the definitions."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from scipy import special, stats

from gsae_jax.rating import analysis, statistics
from gsae_jax.rating.statistics import Paired

MODELS = {"small": (0, 2, 4), "large": (0, 3, 9)}  # and their layers
SITES = ("hook_mlp_out", "hook_resid_post", "attn.hook_z")


def designed(rate, raters=3, pairs=2, models=("small", "large")):
    """Paired ratings of a whole design; `rate(number)` gives both."""
    cells = [
        (m, layer, site, rater) for m in models for layer in MODELS[m] for site in SITES for rater in range(raters)
    ]
    numbered = enumerate(cell for cell in cells for _ in range(pairs))
    return [Paired(n, model, layer, site, rater, *rate(n)) for n, (model, layer, site, rater) in numbered]


def drawn(p_first, p_second, seed=0):
    random = np.random.default_rng(seed)
    return lambda _: (float(random.choice(3, p=p_first)), float(random.choice(3, p=p_second)))


DATA = {
    "ties": designed(drawn((0.3, 0.3, 0.4), (0.4, 0.3, 0.3))),
    "zeros": designed(lambda n: (1.0, 1.0) if n % 5 else (2.0, float(n % 2))),
    "one rater": designed(drawn((0.2, 0.3, 0.5), (0.3, 0.4, 0.3), 1), raters=1),
    "no difference": designed(lambda n: (float(n % 3), float(n % 3))),
    "large difference": designed(lambda n: (2.0, float(n % 2)) if n % 7 else (1.0, 2.0)),
    "scores": designed(lambda n: tuple(np.random.default_rng(n).uniform(0.5, 1, 2)), raters=1),
}


def ranks(values):
    """Average ranks from 1."""
    values = np.asarray(values)
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values.ravel()]).reshape(values.shape)


def tie_sizes(values):
    return np.unique(values, return_counts=True)[1].astype(float)


def normal_tail(z):
    return 0.5 * math.erfc(z / math.sqrt(2))


def chi_tail(x, degrees):
    return float(special.gammaincc(degrees / 2, x / 2))


def reference_wilcoxon(d):
    """Pratt: zeros are ranked and then dropped. Normal approximation; exact for few values without ties."""
    r = ranks(np.abs(d))
    plus, n, zeros = r[d > 0].sum(), len(d), int((d == 0).sum())
    if n <= 50 and not zeros and len(set(np.abs(d))) == n:
        counts = np.zeros(n * (n + 1) // 2 + 1)  # of signs, by the sum of positive ranks
        counts[0] = 1
        for rank in range(1, n + 1):
            counts[rank:] += counts[:-rank].copy()
        return plus, counts[int(plus) :].sum() / 2**n
    mean = (n * (n + 1) - zeros * (zeros + 1)) / 4
    variance = (n * (n + 1) * (2 * n + 1) - zeros * (zeros + 1) * (2 * zeros + 1)) / 24
    variance -= sum(t**3 - t for t in tie_sizes(r[d != 0])) / 48
    return plus, normal_tail((plus - mean) / math.sqrt(variance))


def reference_mann_whitney(a, b):
    r, n, m = ranks(np.concatenate([a, b])), len(a), len(b)
    u = r[:n].sum() - n * (n + 1) / 2
    ties = sum(t**3 - t for t in tie_sizes(r)) / ((n + m) * (n + m - 1))
    deviation = math.sqrt(n * m / 12 * (n + m + 1 - ties))
    z = (abs(u - n * m / 2) - 0.5) / deviation  # with correction for continuity
    return u, min(1, 2 * normal_tail(z))


def reference_kruskal(groups):
    every = np.concatenate(groups)
    r, n = ranks(every), len(every)
    parts = np.split(r, np.cumsum([len(group) for group in groups])[:-1])
    h = 12 / (n * (n + 1)) * sum(part.sum() ** 2 / len(part) for part in parts) - 3 * (n + 1)
    h /= 1 - sum(t**3 - t for t in tie_sizes(r)) / (n**3 - n)
    return h, chi_tail(h, len(groups) - 1)


def reference_friedman(blocks):
    r = np.array([ranks(block) for block in blocks])
    n, k = r.shape
    ties = sum(t**3 - t for block in r for t in tie_sizes(block))
    statistic = 12 / (n * k * (k + 1)) * (r.sum(0) ** 2).sum() - 3 * n * (k + 1)
    if ties == n * k * (k * k - 1):
        return math.nan, math.nan
    statistic /= 1 - ties / (n * k * (k * k - 1))
    return statistic, chi_tail(statistic, k - 1)


def reference_page(blocks):
    r = np.array([ranks(block) for block in blocks])
    n, k = r.shape
    statistic = (r.sum(0) * np.arange(1, k + 1)).sum()
    variance = n * k**2 * (k + 1) * (k * k - 1) / 144
    z = (statistic - n * k * (k + 1) ** 2 / 4) / math.sqrt(variance)
    return statistic, normal_tail(z)


def exact_page(blocks):
    """The chance of a statistic as large as this one, rounded down, if all orders of each block were as likely."""
    k = blocks.shape[1]
    orders = [
        sum((place + 1) * rank for place, rank in enumerate(each)) for each in itertools.permutations(range(1, k + 1))
    ]
    chances = {0: 1.0}
    for _ in blocks:
        following = {}
        for (total, chance), score in itertools.product(chances.items(), orders):
            following[total + score] = following.get(total + score, 0) + chance / len(orders)
        chances = following
    statistic = math.floor(reference_page(blocks)[0])
    return sum(chance for total, chance in chances.items() if total >= statistic)


def blocks_of(ratings, over):
    """[blocks, treatments] of means, from a whole design."""
    depth = {model: sorted({r.layer for r in ratings if r.model == model}) for model in MODELS}

    def facts(r):
        return {"model": r.model, "layer": depth[r.model].index(r.layer), "site": r.site, "rater": r.rater}

    table = {}
    for r in ratings:
        mine = facts(r)
        treatment = mine.pop(over)
        table.setdefault(tuple(mine.values()), {}).setdefault(treatment, []).extend((r.first, r.second))
    return np.array([[np.mean(row[each]) for each in sorted(row)] for row in table.values()])


def both(ratings, model):
    return np.array([value for r in ratings if r.model == model for value in (r.first, r.second)])


@pytest.mark.parametrize("name", DATA)
def test_tests_equal_their_definitions(name):
    ratings = DATA[name]
    tests = {(test.name.split()[0], test.about.split(" over ")[-1]): test for test in statistics.tests(ratings)}
    small, large = ([r for r in ratings if r.model == model] for model in MODELS)
    d = np.array([r.first - r.second for r in ratings])
    expected = {
        ("Mann-Whitney", "ratings of large and of small"): reference_mann_whitney(
            both(ratings, "large"), both(ratings, "small")
        ),
        ("Kruskal-Wallis", "models"): reference_kruskal([both(ratings, model) for model in MODELS]),
        ("Friedman", "sites"): reference_friedman(blocks_of(ratings, "site")),
        ("Friedman", "layers of small"): reference_friedman(blocks_of(small, "layer")),
        ("Friedman", "layers of large"): reference_friedman(blocks_of(large, "layer")),
    }
    if name in ("scores", "one rater"):
        assert "3 raters" in tests["Friedman", "raters"].why
    else:
        expected["Friedman", "raters"] = reference_friedman(blocks_of(ratings, "rater"))
    if name == "no difference":
        assert tests["Wilcoxon-Pratt,", "first above second"].p is None
    else:
        expected["Wilcoxon-Pratt,", "first above second"] = reference_wilcoxon(d)
    for key, (statistic, p) in expected.items():
        test = tests[key]
        if not math.isfinite(p):
            assert test.p is None
            continue
        assert test.statistic == pytest.approx(statistic, rel=1e-12), key
        assert test.p == pytest.approx(p, rel=1e-9), key
    for model, mine in zip(MODELS, (small, large), strict=True):
        blocks = blocks_of(mine, "layer")
        test = tests["Page's", f"layers of {model}"]
        assert test.statistic == pytest.approx(reference_page(blocks)[0])
        assert test.p == pytest.approx(exact_page(blocks), abs=1e-9)


def test_a_trend_over_layers_is_found():
    """Page's test is exact for few blocks, and near its normal approximation for these."""
    ratings = designed(lambda n: (float(n % 18 // 6), float(n % 18 // 6)), raters=1, models=("small",))
    rising = [r._replace(first=float(MODELS["small"].index(r.layer)), second=0.0) for r in ratings]
    test = statistics.page(rising)
    assert test.p == pytest.approx((1 / 6) ** 3)  # all of 3 blocks are in order
    falling = [r._replace(first=2.0 - MODELS["small"].index(r.layer), second=0.0) for r in ratings]
    assert statistics.page(falling).p == pytest.approx(1)


def reference_bca(values, resamples, seed):
    """The definition of Efron (1987), with draws of its own."""
    random, n = np.random.default_rng(seed), len(values)
    means = values[random.integers(0, n, (resamples, n))].mean(1)
    share = (np.sum(means < values.mean()) + np.sum(means <= values.mean())) / (2 * resamples)
    z0 = special.ndtri(share)
    jackknife = (values.sum() - values) / (n - 1)
    centred = jackknife.mean() - jackknife
    a = (centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
    z = z0 + special.ndtri(np.array([0.05, 0.95]))
    return np.percentile(means, 100 * special.ndtr(z0 + z / (1 - a * z)))


@pytest.mark.parametrize("name", [name for name in DATA if name != "no difference"])
def test_the_interval_is_bca(name):
    d = statistics.differences(DATA[name])
    result = statistics.mean_difference(d)
    assert (result.pairs, result.mean) == (len(d), pytest.approx(d.mean(), abs=1e-12))
    low, high = reference_bca(d, 200_000, 7)
    # 9,999 draws put an end of the interval off by about a tenth of a standard error.
    within = 0.1 * d.std() / math.sqrt(len(d)) + 1 / len(d)
    assert result.low == pytest.approx(low, abs=within)
    assert result.high == pytest.approx(high, abs=within)
    assert statistics.mean_difference(d) == result


def test_an_interval_that_has_no_width_is_none():
    for values in ([1.0], [0.5, 0.5, 0.5]):
        result = statistics.mean_difference(np.array(values))
        assert (result.mean, result.low, result.high) == (values[0], None, None)


def test_several_raters_of_a_pair_are_one_pair():
    ratings = [Paired(0, "m", 0, "s", rater, float(rater), 0.0) for rater in range(3)]
    ratings.append(Paired(1, "m", 0, "s", 0, 2.0, 1.0))
    np.testing.assert_array_equal(statistics.differences(ratings), [1.0, 1.0])


def test_blocks_that_lack_a_treatment_are_left_out():
    ratings = [r for r in DATA["ties"] if (r.rater, r.site) != (0, "attn.hook_z")]
    test = statistics.friedman(ratings, "site")
    assert test.n == 12  # of 18: 2 models, 3 layers and 3 raters
    whole = [r for r in DATA["ties"] if r.rater != 0]
    assert test.statistic == pytest.approx(statistics.friedman(whole, "site").statistic)


@pytest.mark.parametrize("left_out", ["models", "sites", "everything but one pair"])
def test_what_has_too_few_ratings_says_so(left_out):
    keep = {
        "models": lambda r: r.model == "small",
        "sites": lambda r: r.site == "hook_mlp_out",
        "everything but one pair": lambda r: r.pair == 0,
    }[left_out]
    ratings = [r for r in DATA["large difference"] if keep(r)]
    tests = statistics.tests(ratings)
    assert all((test.p is None) == bool(test.why) for test in tests)
    result = analysis.analyse("people", ("gated", "baseline"), ratings, True)
    assert result.sentences


def test_the_interval_covers_the_difference():
    """1,000 studies of 171 pairs, whose answers have the paper's mean difference of 0.13.

    The paper states neither its number of pairs nor each side's mean. With 171 pairs the interval has its width.
    """
    random = np.random.default_rng(0)
    better, worse = np.array([0.25, 0.27, 0.48]), np.array([0.31, 0.28, 0.41])  # no, maybe, yes
    truth = (better - worse) @ np.arange(3)
    assert truth == pytest.approx(0.13)
    firsts = random.choice(3, (1000, 171), p=better)
    seconds = random.choice(3, (1000, 171), p=worse)
    inside = 0
    for first, second in zip(firsts, seconds, strict=True):
        each = statistics.mean_difference(first.astype(float) - second, resamples=999)
        inside += each.low <= truth <= each.high
    assert abs(inside / 1000 - statistics.CONFIDENCE) < 3 * math.sqrt(0.9 * 0.1 / 1000)


def test_the_report_has_all_numbers_and_no_names(tmp_path):
    ratings = DATA["ties"]
    people = analysis.analyse("people", ("gated", "<baseline>"), ratings, True)
    rules = analysis.analyse("rules", ("gated", "<baseline>"), DATA["scores"], False)
    saes = [{"model": "m", "site": "s", "side": "gated", "sae": "gated_0", "l0": 12.0}]
    facts = {"sides": ["gated", "<baseline>"], "saes": saes}
    answers = [{"rater": "people", "explanation": 'a "quoted", word'}]
    analysis.write([people, rules], facts, answers, tmp_path)
    analysis.write([people, rules], facts, answers, tmp_path)  # replaces
    page = (tmp_path / "report.html").read_text()
    assert "<baseline>" not in page
    for each in (people, rules):
        for test in each.tests:
            assert (test.why or f"{test.p:.3g}") in page
        assert f"{each.difference.low:+.3f}" in page
    contents = json.loads((tmp_path / "analysis.json").read_text())
    first, second = contents["analyses"]
    assert first["difference"]["mean"] == people.difference.mean
    assert sum(first["answers"]["gated"].values()) == len(ratings)
    assert second["answers"] == {}
    assert list(csv.DictReader((tmp_path / "answers.csv").read_text().splitlines())) == answers
    assert page.count('src="data:image/svg+xml;base64,') == 4


def test_sentences_follow_the_test():
    large = analysis.analyse("people", ("a", "b"), DATA["large difference"], True)
    assert large.tests[0].p < analysis.LEVEL
    same = analysis.analyse("people", ("a", "b"), DATA["no difference"], True)
    assert same.difference.low is None
    swapped = [r._replace(first=r.second, second=r.first) for r in DATA["large difference"]]
    worse = analysis.analyse("people", ("a", "b"), swapped, True)
    one, other, nothing, last = (" ".join(each.sentences) for each in (large, same, analyse_none(), worse))
    assert "features of a are rated above those of b" in one
    assert "are rated above" not in other + nothing
    assert "features of b are rated above those of a" in last


def test_means_differ_by_the_mean_difference():
    """Also where several rate one pair and one rates another."""
    ratings = [Paired(0, "m", 0, "s", rater, 2.0, 1.0) for rater in range(3)] + [Paired(1, "m", 0, "s", 0, 0.0, 2.0)]
    result = analysis.analyse("people", ("a", "b"), ratings, True)
    assert result.means == (1.0, 1.5)
    assert result.difference.mean == -0.5


def test_models_of_other_depths_have_tests_of_their_own():
    deep = [r for r in DATA["ties"] if r.model == "small"]
    shallow = [r for r in DATA["ties"] if (r.model, r.layer) in (("large", 0), ("large", 3))]
    tests = {(test.name, test.about): test for test in statistics.tests(deep + shallow)}
    assert tests["Friedman", "ratings over layers of small"].n == 9
    assert "3 layers" in tests["Friedman", "ratings over layers of large"].why


def test_a_rater_who_stopped_early_is_left_out_of_the_test_over_raters():
    whole = statistics.friedman(DATA["ties"], "rater")
    more = [*DATA["ties"], DATA["ties"][0]._replace(rater=7)]
    test = statistics.friedman(more, "rater")
    assert (test.n, test.p) == (whole.n, whole.p)
    assert "without 1" in test.about


def test_several_raters_of_a_feature_are_one_value():
    alone = [Paired(n, "ab"[n % 2], 0, "s", 0, float(n % 3), 1.0) for n in range(12)]
    shared = [r._replace(rater=rater) for r in alone for rater in range(3)]
    assert statistics.mann_whitney(shared) == statistics.mann_whitney(alone)
    assert statistics.kruskal_wallis(shared) == statistics.kruskal_wallis(alone)


def test_the_interval_equals_scipys():
    values = np.random.default_rng(1).integers(-2, 3, 60).astype(float)
    ours = statistics.mean_difference(values, seed=5, resamples=999)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=999, confidence_level=0.9, method="BCa", rng=np.random.default_rng(5)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=1e-12)


def analyse_none():
    return analysis.analyse("people", ("a", "b"), designed(drawn((0.3, 0.3, 0.4), (0.3, 0.3, 0.4), 3)), True)


def test_all_combinations_of_models_are_compared():
    ratings = [Paired(n, model, 0, "s", 0, float(n % 3), 1.0) for n, model in enumerate("aaabbbccc")]
    pairs = [tuple(test.about.split()[i] for i in (2, 5)) for test in statistics.mann_whitney(ratings)]
    assert pairs == list(itertools.combinations("abc", 2))

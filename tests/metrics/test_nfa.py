"""A-contrario scores against the reference, a literal implementation, exact tails, simulation."""

import itertools

import numpy as np
import pytest
from scipy import ndimage
from scipy.integrate import quad
from scipy.special import gammaln
from scipy.stats import binom, chi2

from benchmarks.bench_nfa import LAYOUTS, naive_log_probability, score_maps
from benchmarks.nfa_false_alarms import false_alarms
from metrics.nfa import (
    TAILS,
    TESTS,
    Null,
    calibrate,
    latent_energies,
    log_regions,
    log_tail,
    log_tests,
    region_log_nfa,
    standard_nulls,
    tree_score,
)
from metrics.nfa_block import (
    block_score,
    block_score_of_counts,
    continuous_log_tail,
    exceedance_level,
    exceedances,
    window_log_probability,
)
from utils.errors import UserError

CASES = ("uflow_nfa_2scales_two_regions", "uflow_nfa_3scales", "uflow_nfa_weak_not_meaningful")
IMAGES = list(itertools.product(CASES, (0, 1)))


def latents_of(case: dict[str, np.ndarray], image: int) -> list[np.ndarray]:
    scales = sum(key.startswith("z") for key in case)
    return [case[f"z{s}"][image].astype(np.float64) for s in range(scales)]


@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_tree_matches_the_reference(golden, name, image):
    case = golden(name)
    latents = latents_of(case, image)
    energies = latent_energies(latents)
    nulls = standard_nulls([z.shape[0] for z in latents])
    assert log_tests([e.size for e in energies]) == pytest.approx(case["log_n_tests"], abs=1e-4)
    for scale, (energy, null) in enumerate(zip(energies, nulls, strict=True)):
        regions = region_log_nfa(energy, null, np.zeros(energy.size), tail="both")
        expected = case[f"tree_logprob_map_s{scale}_b{image}"]  # nan outside clusters, too
        np.testing.assert_allclose(regions, expected, rtol=1e-6, atol=2e-6)
    expected = case["tree_score_minus_log_nfa"][image, 0]
    score = tree_score(energies, nulls, expected.shape, tail="both")
    np.testing.assert_allclose(score, expected, rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(score > 0, case["tree_segmentation_gt0"][image, 0])
    one_sided = tree_score(energies, nulls, expected.shape)
    np.testing.assert_array_equal(one_sided > 0, score > 0)  # defects are the same with both


@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_blocks_match_the_reference(golden, name, image):
    case = golden(name)
    latents = latents_of(case, image)
    size = case["tree_score_minus_log_nfa"].shape[2:]
    compared = 0
    for key, value in case.items():
        if not key.startswith(("block", "anomalib")) or key == "anomalib_map":
            continue
        window, probability = int(key.split("win")[1][0]), float(key.split("thr")[1][:3])
        if "binom" in key:
            scale = int(key[-1])
            half = max(int(window / 2**scale / 2), 1)
            actual = window_log_probability(
                exceedances(latents[scale], probability),
                len(latents[scale]),
                half,
                probability,
                False,
            )
        else:
            precise = key.endswith("high_precision")
            actual = block_score(
                latents, size, window=window, probability=probability, high_precision=precise
            )
        if "mask" in key:  # of inverted polarity
            np.testing.assert_array_equal(actual < 0, value[image, 0])
        else:
            np.testing.assert_allclose(actual, value[image, 0], atol=1e-7)
        compared += 1
    assert compared >= 10


def test_worked_numbers():
    assert log_tests([784, 196]) == pytest.approx(476.923711, abs=1e-6)
    assert log_tests([196]) == pytest.approx(118.949355, abs=1e-6)
    assert log_tests([4096, 1024, 256]) == pytest.approx(2493.272, abs=1e-3)
    assert log_tests([16]) == pytest.approx(9.374292, abs=1e-6)
    assert log_tests([4]) == pytest.approx(2.114846, abs=1e-6)
    ratios = np.array([1.1, 1.5, 2.0])
    np.testing.assert_allclose(
        log_tail(ratios, 816), [-0.830999, -16.750841, -54.371910], rtol=1e-6
    )
    np.testing.assert_allclose(log_tail(ratios, 192), [-0.195529, -3.941374, -12.793391], rtol=1e-5)
    counts = np.array([2.5, 5, 10, 12.7])
    np.testing.assert_allclose(
        continuous_log_tail(counts, 25, 0.9), [-0.3328, -1.2150, -4.4481, -6.9003], atol=1e-4
    )


def literal(energy: np.ndarray, null: Null, by_area: np.ndarray, tail: str) -> np.ndarray:
    """Follow the five steps of the definition on sets of pixels, found level by level."""
    regions: dict[frozenset[int], float] = {}
    for level in np.unique(energy):
        labels, count = ndimage.label(energy >= level)
        for number in range(1, count + 1):
            region = frozenset(np.flatnonzero(labels == number).tolist())
            ratio = energy.flat[list(region)].min() / np.float64(null.mean)
            cost = len(region) * float(log_tail(ratio, null.freedom, tail=tail))
            regions[region] = cost + by_area[len(region) - 1]
    by_size = sorted(regions, key=len)
    parent = {r: next((q for q in by_size if r < q), None) for r in regions}

    def children(node: frozenset[int]) -> list[frozenset[int]]:
        return [r for r in parent if parent[r] == node]

    def prune() -> None:
        for leaf in [r for r in parent if not children(r)]:
            chain = [leaf]
            while (above := parent[chain[-1]]) is not None and len(children(above)) == 1:
                chain.append(above)
            best = min(chain, key=regions.__getitem__)
            for node in chain:
                del parent[node]
            parent[best] = above

    def merge() -> bool:
        changed = False
        for node in list(parent):
            below = children(node) if node in parent else []
            if len(below) < 2 or any(children(child) for child in below):
                continue
            if regions[node] <= min(regions[child] for child in below):
                for child in below:
                    del parent[child]
                changed = True
        return changed

    prune()
    while merge():
        prune()
    painted = np.full(energy.size, np.nan)
    for node in parent:
        if not children(node):
            painted[list(node)] = regions[node]
    return painted.reshape(energy.shape)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tests", TESTS)
@pytest.mark.parametrize("levels", [None, 4])
def test_tree_equals_the_literal_definition(levels, tests, tail):
    """On smooth and rough maps; `levels`: so few that most neighbours tie."""
    rng = np.random.default_rng(0)
    null = Null(12.0, 12.0)
    for trial in range(12):
        energy = rng.chisquare(12, (7, 9)) * 1.2
        if trial % 3:
            energy = 12 + (ndimage.gaussian_filter(energy, 0.5 * (trial % 3)) - 12) * 2
        if levels:
            energy = np.ceil(energy / 8).clip(1, levels) * 8
        by_area = log_regions(63) + 2 if tests == "by_size" else np.zeros(63)
        expected = literal(energy, null, by_area, tail)
        actual = region_log_nfa(energy, null, by_area, tail=tail)
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
        if tests == "total":
            naive = naive_log_probability(energy, null, tail)
            np.testing.assert_allclose(naive, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 3), (3, 6), (5, 3)])
@pytest.mark.parametrize("kind", ["constant", "rising", "zero"])
def test_small_and_flat_maps(shape, kind):
    energy = np.full(shape, 40.0)
    if kind == "rising":
        energy += np.arange(energy.size).reshape(shape)
    elif kind == "zero":
        energy *= 0
    null, zeros = Null(8.0, 8.0), np.zeros(energy.size)
    for tail in TAILS:
        actual = region_log_nfa(energy, null, zeros, tail=tail)
        np.testing.assert_allclose(actual, literal(energy, null, zeros, tail))
        score = tree_score([energy], [null], (12, 10), tail=tail)
        assert score.shape == (12, 10)
        assert np.isfinite(score).all()


def test_equal_regions_are_all_kept():
    """The reference keeps regions by their probability, so that one of these disappears."""
    energy = np.full((9, 9), 8.0)
    energy[1:3, 1:3] = energy[6:8, 6:8] = 80.0
    regions = region_log_nfa(energy, Null(8.0, 8.0), np.zeros(81))
    np.testing.assert_array_equal(regions < 0, energy > 8)
    assert np.unique(regions[energy > 8]).size == 1


@pytest.mark.parametrize("freedom", [1.0, 3.7, 30.0, 816.0])
def test_chernoff_bounds_the_exact_tail(freedom):
    ratio = np.linspace(1, 4, 50)
    exact = chi2.logsf(ratio * freedom, freedom) / np.log(10)
    bound = log_tail(ratio, freedom)
    assert (bound >= exact).all()
    assert (bound[1:] < 0).all()
    below = np.array([0.0, 0.5, 1.0])
    np.testing.assert_array_equal(log_tail(below, freedom), 0)
    assert (log_tail(below[:2], freedom, tail="both") < 0).all()


def test_number_of_regions_bounds_the_true_number():
    """All connected sets of positions of a 3×4 map, counted one by one, by size and together."""
    counts = np.zeros(12)
    for bits in range(1, 2**12):
        cells = np.array([bits >> i & 1 for i in range(12)]).reshape(3, 4)
        if ndimage.label(cells)[1] == 1:
            counts[cells.sum() - 1] += 1
    assert (log_regions(12) >= np.log10(counts)).all()
    assert log_tests([12]) >= np.log10(counts.sum())
    # free of borders, the approximation is above the number of polyominoes of every small size
    polyominoes = [1, 2, 6, 19, 63, 216, 760, 2725, 9910, 36446, 135268, 505861]  # OEIS A001168
    excess = log_regions(12) - np.log10(12) - np.log10(polyominoes)
    assert (excess > 0).all()
    assert excess[-1] < 0.03


SIMULATED = list(itertools.product(LAYOUTS.values(), (0.9, 1.0), TESTS))


@pytest.mark.parametrize(("shapes", "variance", "tests"), SIMULATED)
def test_false_alarms_under_the_null_stay_below_the_bound(shapes, variance, tests):
    areas, _, highest = false_alarms(shapes, variance, 25, tests=tests)
    assert areas < 1
    assert highest < 0  # no alarm at all in so few images


def test_two_sided_tail_calls_normal_images_abnormal():
    """The reference's defect, and the reason for the default."""
    areas, share, _ = false_alarms(LAYOUTS["mcait 448"], 0.9, 25, tail="both")
    assert share > 0.8
    assert areas > 0.8
    energies = [np.random.default_rng(0).chisquare(816, (28, 28)) * 0.5]
    nulls = standard_nulls([816])
    assert (tree_score(energies, nulls, (28, 28), tail="both") > 0).all()
    assert (tree_score(energies, nulls, (28, 28)) < 0).all()


def test_score_by_size_is_the_stated_formula():
    """One square of energy 3n on each of two scales; on the larger, 16 positions of 20·20."""
    energies = [np.full((20, 20), 8.0), np.full((10, 10), 8.0)]
    energies[0][4:8, 4:8] = 24.0
    score = tree_score(energies, standard_nulls([8, 8]), (20, 20), tests="by_size")
    regions = 400 * 0.316915 * 4.062570**16 / 16
    log_p = 16 * -0.5 * 8 * (3 - 1 - np.log(3)) / np.log(10)
    assert score[5, 5] == pytest.approx(-(np.log10(2 * 400 * regions) + log_p), abs=1e-9)
    single = 100 * 0.316915 * 4.062570  # the scale with fewer tests decides where nothing is
    np.testing.assert_allclose(score[12:, 12:], -np.log10(2 * 100 * single), atol=1e-9)


def test_by_size_finds_smaller_defects():
    rng = np.random.default_rng(0)
    energies = [rng.chisquare(30, (32, 32))]
    energies[0][8:12, 8:12] = 80
    nulls = standard_nulls([30])
    assert (tree_score(energies, nulls, (32, 32)) < 0).all()
    found = tree_score(energies, nulls, (32, 32), tests="by_size") > 0
    expected = np.zeros((32, 32), dtype=bool)
    expected[8:12, 8:12] = True
    np.testing.assert_array_equal(found, expected)


def heavy_tailed(rng: np.random.Generator, images: int, side: int, mean: float) -> np.ndarray:
    """Return energies as 40 channels would have that vary together: 8 degrees of freedom."""
    return mean * rng.chisquare(8, (images, side, side)) / 8


def test_calibration_finds_mean_and_freedom():
    rng = np.random.default_rng(0)
    energies = [heavy_tailed(rng, 50, 16, 60), 1.3 * rng.chisquare(20, (50, 8, 8))]
    first, second = calibrate([e.astype(np.float32) for e in energies], [40, 20])
    assert first.mean == pytest.approx(60, rel=0.02)
    assert first.freedom == pytest.approx(8, rel=0.15)
    assert second.mean == pytest.approx(26, rel=0.02)
    assert second.freedom == pytest.approx(20, rel=0.15)
    # the largest energies decide: one bad image makes the test more careful
    spoilt = energies[0].copy()
    spoilt[7, :3, :4] = 400
    assert calibrate([spoilt], [40])[0].freedom < 0.9 * first.freedom
    # never narrower than a perfect flow's, never wider than one channel's
    (narrow,) = calibrate([np.full((3, 4, 4), 7.0)], [5])
    assert narrow == Null(7.0, 5.0)
    spikes = np.ones((3, 20, 20))
    spikes[:, 0, :2] = 1e4
    assert calibrate([spikes], [5])[0].freedom == 1


def test_calibration_restores_the_bound():
    rng = np.random.default_rng(1)
    held_out = [heavy_tailed(rng, 30, 24, 50), heavy_tailed(rng, 30, 12, 50)]
    new = [heavy_tailed(rng, 30, 24, 50), heavy_tailed(rng, 30, 12, 50)]

    def alarmed(nulls):
        scores = [
            tree_score([e[i] for e in new], nulls, (24, 24), tests="by_size") for i in range(30)
        ]
        return np.mean([(score > 0).any() for score in scores])

    assert alarmed(standard_nulls([40, 40])) == 1
    assert alarmed(calibrate(held_out, [40, 40])) < 0.1


def test_energies():
    z = np.random.default_rng(0).standard_normal((2, 5, 3, 4))
    (energy,) = latent_energies([z])
    np.testing.assert_allclose(energy, (z**2).sum(1))
    np.testing.assert_allclose(latent_energies([z[0]])[0], energy[0])


@pytest.mark.parametrize("cells", [9, 25, 49])
@pytest.mark.parametrize("probability", [0.5, 0.9])
def test_high_precision_table_equals_quadrature(cells, probability):
    def density(t):
        choices = gammaln(cells + 1) - gammaln(t + 1) - gammaln(cells - t + 1)
        return np.exp(choices + t * np.log1p(-probability) + (cells - t) * np.log(probability))

    for count in (0.0, 0.31, 1.7, cells / 2, cells - 1.01, cells - 1e-3):
        exact = np.log10(quad(density, count, cells, epsabs=0, epsrel=1e-11, limit=200)[0])
        actual = continuous_log_tail(np.array(count), cells, probability)
        assert actual == pytest.approx(exact, abs=1e-7)


def test_exceedances_are_counted_from_the_quantile():
    assert exceedance_level(0.9) == pytest.approx(2.705543, abs=1e-6)
    for probability in (0.01, 0.5, 0.9, 0.999):
        expected = chi2.ppf(probability, 1)
        assert exceedance_level(probability) == pytest.approx(expected, rel=1e-12)
    z = np.zeros((3, 2, 2))
    z[:2, 0, 1] = -9
    z[2, 0, 1] = np.sqrt(exceedance_level(0.9)) * (1 + 1e-12)
    np.testing.assert_array_equal(exceedances(z, 0.9), [[0, 3], [0, 0]])
    everything = np.random.default_rng(0).standard_normal((50, 40, 40))
    assert exceedances(everything, 0.8).mean() == pytest.approx(10, abs=0.2)


@pytest.mark.parametrize("probability", [0.5, 0.9])
def test_low_precision_is_the_binomial_tail(probability):
    found = np.random.default_rng(0).integers(0, 8, (9, 11)).astype(float)
    sums = ndimage.convolve(found, np.ones((3, 3)), mode="mirror")
    expected = binom.logsf(np.minimum(sums / 7, 9 - 1e-9), 9, 1 - probability) / np.log(10)
    actual = window_log_probability(found, 7, 1, probability, False)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
    # a window so improbable that floats end
    lowest = window_log_probability(np.full((30, 30), 7.0), 7, 5, 0.9999, False)
    np.testing.assert_allclose(lowest, -300)


def test_counts_are_all_that_blocks_need():
    rng = np.random.default_rng(1)
    latents = [rng.standard_normal((6, 12, 8)), rng.standard_normal((4, 6, 4))]
    counts = [exceedances(z, 0.9).astype(np.float32) for z in latents]  # as the network gives them
    for precise in (False, True):
        np.testing.assert_allclose(
            block_score_of_counts(counts, [6, 4], (24, 16), high_precision=precise),
            block_score(latents, (24, 16), high_precision=precise),
            rtol=1e-9,
        )


@pytest.mark.parametrize("precise", [False, True])
def test_counts_in_float32_stay_finite_when_everything_exceeds(precise):
    """In float32, 25 - 1e-9 is 25, whose tail is 0."""
    counts = [np.full((12, 8), 6, np.float32), np.full((6, 4), 4, np.float32)]
    score = block_score_of_counts(counts, [6, 4], (24, 16), high_precision=precise)
    assert np.isfinite(score).all()
    assert (score > 0).all()


@pytest.mark.parametrize("precise", [False, True])
def test_blocks_stay_finite_when_everything_exceeds(precise):
    latents = [np.full((4, 12, 8), 9.0), np.full((6, 6, 4), 9.0)]
    score = block_score(latents, (24, 16), high_precision=precise)
    assert np.isfinite(score).all()
    assert (score > 0).all()
    lowest = window_log_probability(
        exceedances(latents[0], 0.9), len(latents[0]), 2, 0.9, precise
    ).min()
    assert lowest <= 25 * np.log10(0.1) + 1e-9
    if not precise:
        assert lowest == pytest.approx(binom.logpmf(25, 25, 0.1) / np.log(10))


def test_user_errors():
    energies, nulls = [np.ones((4, 4))], [Null(1.0, 1.0)]
    with pytest.raises(UserError, match="tail 'lower'"):
        tree_score(energies, nulls, (8, 8), tail="lower")
    with pytest.raises(UserError, match="tests 'few'"):
        tree_score(energies, nulls, (8, 8), tests="few")
    with pytest.raises(UserError, match="for 2 scales"):
        tree_score(energies, nulls * 2, (8, 8))
    with pytest.raises(UserError, match="3 axes"):
        calibrate(energies, [4])
    with pytest.raises(UserError, match="at least 3 rows"):
        tree_score([np.ones((2, 4))], nulls, (8, 8))
    with pytest.raises(UserError, match="energies of latents: 1 of 16 values"):
        tree_score([np.where(np.eye(4, k=3) > 0, np.nan, 1.0)], nulls, (8, 8))
    with pytest.raises(UserError, match="too small for a window of 5"):
        block_score([np.ones((3, 2, 9))], (8, 8))
    with pytest.raises(UserError, match="window 1"):
        block_score([np.ones((3, 9, 9))], (8, 8), window=1)


@pytest.mark.slow
def test_both_sides_of_the_benchmark_find_the_same():
    fine, _ = LAYOUTS["mcait 448"]
    maps = [call() for call in score_maps([fine]).values()]
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-6)
    assert (maps[0] > 0).any()

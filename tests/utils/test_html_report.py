"""The report as a page: sound HTML of one file, true figures, and nothing hidden or invented."""

import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest

from metrics.threshold import fixed, nfa, percentile
from tests.utils.html_cases import CUTS, chapter, names, pictures
from utils.html import charts
from utils.html.charts import Cut
from utils.html.comparison import comparison_page
from utils.html.evaluation import FIRST, MOST_BYTES, evaluation_page, verdict_line
from utils.html.page import element, page, slug, table
from utils.names import CATEGORIES

SCORES = [0.1, 0.7, 0.3, 0.9, 0.2, 0.45, 0.8, 0.95]  # three good images, five defective ones
Make = Callable[..., str]


def parsed(text: str) -> ElementTree.Element:
    """Read a page as XML, which is stricter than HTML; style and script are left out."""
    assert text.startswith("<!DOCTYPE html>\n")
    body = re.sub(r"<(style|script)>.*?</\1>", "", text.partition("\n")[2], flags=re.S)
    return ElementTree.fromstring(body)


def texts(root: ElementTree.Element) -> list[str]:
    return [" ".join(text.split()) for text in root.itertext() if text.strip()]


def check_sound(text: str) -> ElementTree.Element:
    """Check what holds for every page: well-formed, whole, nothing from outside."""
    root = parsed(text)
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    for node in root.iter():
        for name, value in node.items():
            if name == "href":
                assert value[1:] in ids, value
            elif name == "src":
                assert value.startswith("data:image/jpeg;base64,")
            assert "http:" not in value
            assert "https:" not in value
            assert not name.startswith("on")
        assert node.tag not in ("link", "iframe", "object", "form", "base")
        assert node.tag != "img" or node.get("alt")
    assert "url(" not in re.sub(r'src="[^"]*"', "", text)
    assert "@import" not in text
    policy = root.find(".//meta[@http-equiv='Content-Security-Policy']")
    assert policy is not None
    assert "default-src 'none'" in str(policy.get("content"))
    assert not re.search(r"\b(nan|None|inf)\b", " ".join(texts(root)).replace("None is known", ""))
    return root


@pytest.fixture
def make(tmp_path) -> Make:
    """Return a function that gives a page of one category of eight images."""

    def report(files=None, scores=SCORES, **options) -> str:
        paths = pictures(tmp_path, files or names(3, 5))
        return evaluation_page([chapter(paths, scores, **options)], "today")

    return report


def shots(root: ElementTree.Element) -> list[list[str]]:
    """Return verdict, score and name of every picture in the order of the page."""
    found = root.findall(".//figure/figcaption/..")
    return [texts(f.find("figcaption")) for f in found if "shot" in f.get("class", "")]  # type: ignore[arg-type]


def test_the_page_is_sound_and_says_what_was_run(make):
    said = texts(check_sound(make()))
    assert said[:2] == ["Evaluation: bottle", "Evaluation: bottle"]  # title and heading
    assert "made_up · evaluated today" in said
    assert (
        "3 of 8 verdicts wrong: 1 of 3 good images called defective, 2 of 5 defective ones missed."
    ) in said
    assert "2 s, 4 images/s with all metrics" in said
    assert "512 MB" in said
    assert said.count("n/a: not in the run's log") == 2
    assert "numpy, training" in said
    assert "a" * 64 in said
    assert "flow: fastflow" in " ".join(said)


def test_wrong_verdicts_come_first_and_the_most_wrong_first(make):
    root = check_sound(make())
    assert [found[:3] for found in shots(root)] == [
        ["✗ missed defect", "score 0.2", "hole/001.png"],
        ["✗ false alarm", "score 0.7", "good/001.png"],
        ["✗ missed defect", "score 0.45", "crack/002.png"],
        ["good, recognised", "score 0.3", "good/002.png"],
        ["defective, recognised", "score 0.8", "hole/003.png"],
        ["defective, recognised", "score 0.9", "crack/000.png"],
        ["good, recognised", "score 0.1", "good/000.png"],
        ["defective, recognised", "score 0.95", "crack/004.png"],
    ]
    assert len(root.findall(".//figure[@class='shot wrong']")) == 3
    assert "Right verdicts (5)" in texts(root)


def test_a_picture_can_be_enlarged_and_closed_without_a_script(make):
    root = check_sound(make())
    for figure in root.findall(".//figure[@class='shot wrong']"):
        links = {a.get("class"): a.get("href") for a in figure.iter("a")}
        assert links["open"] == f"#{figure.get('id')}"
        assert links["close"] == f"#at-{figure.get('id')}"
    assert ".shot:target" in make()


def test_many_wrong_verdicts_are_folded(make):
    count = FIRST + 3
    text = make(names(0, count), [0.1 + i / 100 for i in range(count)])
    root = check_sound(text)
    assert len(shots(root)) == count
    assert "3 more" in texts(root)
    assert f"{count} images, the most wrong first." in texts(root)


def test_fifteen_categories_of_the_worst_pictures_stay_below_the_limit(tmp_path):
    """About as many images as MVTec AD has; noise needs more bytes than any photograph."""
    paths = pictures(tmp_path, names(35, 80), size=256)
    rng = np.random.default_rng(1)
    scores = rng.random(115).round(3).tolist()
    chapters = [chapter(paths, scores, category=name, of=15) for name in CATEGORIES]
    text = evaluation_page(chapters, "today")
    root = check_sound(text)
    assert 8_000_000 < len(text.encode()) < MOST_BYTES
    one = chapters[0]
    shown = one.gallery
    assert min(len(shown.wrong), shown.wrong_left_out) > 0
    wrong = one.row["metrics"]["image_fp"] + one.row["metrics"]["image_fn"]
    assert len(shown.wrong) + shown.wrong_left_out == wrong
    assert len(shown.right) + shown.right_left_out == 115 - wrong
    assert any(f"; {shown.wrong_left_out} more not shown" in said for said in texts(root))
    links = [a.get("href") for a in root.findall(".//nav/a")]
    assert links == [f"#{name}" for name in CATEGORIES]
    assert "mean textures" in texts(root)
    assert "mean image AUROC" in texts(root)


def test_names_are_text_and_nothing_else(make):
    evil = "<script>alert(1)</script>&\"'.png".replace("/", "∕")
    root = check_sound(
        make(["good/a.png", f"<b>&/{evil}"], [0.1, 0.9], category='<i>"x"</i> & ümläut')
    )
    assert any(evil in text for text in texts(root))
    assert '<i>"x"</i> & ümläut' in texts(root)
    assert "script" not in {node.tag for node in root.find(".//main").iter()}  # type: ignore[union-attr]
    assert not root.findall(".//b")


def test_control_characters_and_half_surrogates_do_not_break_the_page():
    text = page("a\x00b\ud800c\ufffe", element("p", "x\x1by", id="a b"))
    assert "a\ufffdb\ufffdc\ufffd" in texts(parsed(text))
    text.encode("utf-8")


# --- n/a


def test_without_masks(make):
    root = check_sound(make(masked=False))
    said = texts(root)
    assert any(text.startswith("n/a: no ground-truth mask for 5 images (") for text in said)
    assert any(text.startswith("n/a for pixels: no ground-truth mask") for text in said)
    assert said.count("no mask") == 5
    assert any(text.startswith("images: AUROC 0.") for text in said)
    assert not any(text.startswith("pixels: AUROC") for text in said)


def test_only_good_images(make):
    root = check_sound(make(names(4, 0), [0.1, 0.2, 0.3, 0.9]))
    said = texts(root)
    assert "n/a: test set has no defective images" in said
    assert (
        "1 of 4 verdicts wrong: 1 of 4 good images called defective, 0 of 0 defective ones missed."
        in said
    )
    assert "1 of 4" in said
    assert said.count("good: nothing to mark") == 4


def test_only_defective_images(make):
    said = texts(check_sound(make(names(0, 4), [0.1, 0.2, 0.8, 0.9])))
    assert any("test set has no normal images" in text for text in said)
    assert "false-positive rate" in said  # pixels have one


def test_without_thresholds(make):
    root = check_sound(make(cuts=None))
    said = texts(root)
    assert "3 good and 5 defective test images; verdicts n/a: no image threshold." in said
    assert "n/a of 3" in said
    assert "image threshold n/a: none is stored with the run" in said
    assert not root.findall(".//figure[@class='shot wrong']")
    assert shots(root)[0][0] == "defective"  # 0.2, least like a defect
    assert root.findall(".//path[@class='cut']") == []


def test_scores_that_depend_on_the_test_set(make):
    settings = {"preset": "p", "epoch": 1, "seed": 0, "runs": 1, "norm": "dataset"}
    said = texts(check_sound(make(cuts=None, settings=settings)))
    assert any("scores of eval.norm dataset depend on the other" in text for text in said)


def test_warnings_are_shown(make):
    root = check_sound(make(warnings=["2 mask(s) resized"]))
    assert "2 mask(s) resized" in texts(root)


# --- figures


def test_every_figure_of_the_row_is_in_the_table(make, tmp_path):
    shown = chapter(pictures(tmp_path, names(3, 5)), SCORES)
    said = texts(parsed(evaluation_page([shown], "today")))
    metrics = shown.row["metrics"]
    start = said.index("misses", said.index("Metrics, as fractions")) + 2
    assert said[start : start + 2] == [f"{metrics[k]:.3f}" for k in ("image_auroc", "pixel_auroc")]
    assert f"images: AUROC {metrics['image_auroc']:.3f}" in said
    assert f"pixels: AP {metrics['pixel_ap']:.3f}" in said
    assert f"AUPRO 0.3: {metrics['aupro_0.3']:.3f}, 0.05: {metrics['aupro_0.05']:.3f}" in said


def test_recall_of_each_defect_type(make):
    root = check_sound(make())
    (laid_out,) = [t for t in root.iter("table") if "recall or false-alarm rate" in texts(t)]
    assert [texts(tr) for tr in laid_out.findall("tbody/tr")] == [
        ["crack", "2 of 3", "0.667"], ["hole", "1 of 2", "0.500"],
        ["good (false alarms)", "1 of 3", "0.333"],
    ]  # fmt: skip


def test_published_figures_stand_beside_those_of_the_same_network(make):
    said = texts(check_sound(make(category="bottle")))
    assert "published [1]" in said
    assert any(
        t.startswith("[1] FastFlow, PyTorch re-implementation (README); resnet18") for t in said
    )
    assert "0.975" in said  # of bottle; fastflow.md's table
    assert "not comparable: 3 of 20 good test images, 5 of 63 defective test images" in said


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model": {"backbone": "efficientnet_lite0"}}, "None is known of FastFlow on efficient"),
        ({"category": "cap"}, "None is known of these categories."),
        ({"model": {"flow": "cflow", "backbone": "mobilenet_v3_large"}}, "None is known of these"),
    ],
)
def test_no_published_figures_are_shown_for_anything_else(make, options, text):
    said = texts(check_sound(make(**options)))
    assert any(each.startswith(text) for each in said)
    assert "published [1]" not in said


def test_the_published_mean_needs_all_categories(tmp_path):
    paths = pictures(tmp_path, names(1, 1))
    model = {"flow": "cflow", "backbone": "mobilenet_v3_large"}
    chapters = [chapter(paths, [0.1, 0.9], category=c, model=model, of=15) for c in CATEGORIES]
    said = texts(check_sound(evaluation_page(chapters, "today")))
    assert "0.984" in said
    assert "0.947" in said


def test_the_verdict_line_is_true_of_a_perfect_run(tmp_path):
    shown = chapter(pictures(tmp_path, names(1, 1)), [0.1, 0.9])
    assert verdict_line(shown.row) == (
        "none of 2 verdicts wrong: 0 of 1 good images called defective, "
        "0 of 1 defective ones missed."
    )


# --- charts


def test_the_histogram_counts_every_image_and_draws_every_threshold():
    good, bad = np.array([0.0, 0.1, 0.1]), np.array([0.9, 1.0])
    cuts = [Cut("own", 0.5, True), Cut("other", 0.7, False)]
    chart = charts.histogram("Scores", good, bad, cuts)
    root = ElementTree.fromstring(chart)
    assert len(root.findall(".//rect[@class='good']")) == 2
    assert len(root.findall(".//rect[@class='bad']")) == 2
    tall, low = sorted(
        (float(r.get("height", 0)) for r in root.findall(".//rect[@class='good']")), reverse=True
    )
    assert tall == pytest.approx(2 * low, abs=0.2)
    (own,) = root.findall(".//path[@class='cut']")
    middle = (charts.LEFT + charts.RIGHT) / 2
    assert str(own.get("d")).startswith(f"M{middle} ")
    assert len(root.findall(".//path[@class='oracle']")) == 1


def test_far_outliers_do_not_squeeze_the_histogram():
    good = np.linspace(0, 1, 60)
    chart = ElementTree.fromstring(charts.histogram("S", good, np.array([1e6]), []))
    assert any(text.startswith("≥ ") for text in texts(chart))
    assert len(chart.findall(".//rect[@class='good']")) > 15
    assert len(chart.findall(".//rect[@class='bad']")) == 1


@pytest.mark.parametrize("scores", [[1.0, 1.0], [-5.0, -4.0], [0.0]])
def test_any_scores_can_be_drawn(scores):
    for good, bad in ((scores, []), ([], scores), (scores, scores)):
        chart = charts.histogram("S", np.array(good), np.array(bad), [])
        root = ElementTree.fromstring(chart)
        assert root.findall(".//rect")
        assert "nan" not in chart


def test_all_thresholds_of_a_run_are_drawn(make):
    root = check_sound(make())
    assert len(root.findall(".//path[@class='cut']")) == 1
    assert len(root.findall(".//path[@class='oracle']")) == 3
    said = texts(root)
    assert any("threshold of the run, 0.5 (fixed:0.5)" in text for text in said)


def test_a_threshold_on_something_else_is_not_drawn_among_the_scores(make):
    """-log10 NFA decides; its threshold says nothing about the scores."""
    cuts = {"image": nfa([-1.0, 2.0]), "pixel": CUTS["pixel"]}
    thresholds = {kind: cut.to_dict() for kind, cut in cuts.items()}
    root = check_sound(make(thresholds=thresholds))
    assert root.findall(".//path[@class='cut']") == []
    assert any("NFA below 1" in text for text in texts(root))


def test_thresholds_are_described(make):
    cuts = {"image": percentile([0.1, 0.2, 0.5]), "pixel": fixed(0.4)}
    said = texts(check_sound(make(cuts=cuts)))
    assert any("false-alarm rate at most 25 %" in text for text in said)
    assert any("pixel threshold 0.4 (fixed" in text for text in said)


# --- elements


def test_elements_escape_what_is_not_markup():
    assert element("p", "<&>", element("b", '"'), class_="x", data_a='"&', hidden=False) == (
        '<p class="x" data-a="&quot;&amp;">&lt;&amp;&gt;<b>&quot;</b></p>'
    )
    assert element("img", src="a", open=True) == '<img src="a" open="open" />'


def test_ids_of_distinct_names_are_distinct():
    assert slug("metal_nut") == "metal_nut"
    found = {slug(name) for name in ("a b", "a-b", "a.b", "a  b", "a/b", "ab")}
    assert len(found) == 6
    assert all(re.fullmatch(r"[\w-]+", each) for each in found)


def test_columns_of_words_stand_on_the_left():
    laid_out = ElementTree.fromstring(
        table(["a", "b", "c"], [["x", "0.5 ± 0.1", "word"], ["y", "n/a", "1 of 2"]], caption="t")
    )
    styles = [cell.get("class") for cell in laid_out.findall(".//tbody/tr/td")]
    assert styles == [None, "text", None, "text"]


def test_the_comparison_is_sound():
    row = {
        "category": "bottle", "run": "<a>", "settings": {"preset": "p", "seed": 0},
        "metrics": {"image_auroc": 0.5}, "reasons": {"miou": "no masks"},
        "spread": {"image_auroc": 0.01}, "cost": {"seconds": 1.0},
    }  # fmt: skip
    root = check_sound(comparison_page([row, {**row, "run": "b"}]))
    said = texts(root)
    assert said.count("0.500 ± 0.010") == 2
    assert "Time and memory" in said
    assert "bottle: n/a because no masks." in said

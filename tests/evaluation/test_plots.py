"""Figures: what they draw for known numbers, and that no sensible or silly input breaks them."""

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.image import imread
from PIL import Image

from memdiff.evaluation import plots
from tests import support

pytestmark = pytest.mark.filterwarnings("error")


def names(num_classes: int) -> list[str]:
  return [f"class {c}" for c in range(num_classes)]


def long_tail(num_classes: int) -> np.ndarray:
  return np.maximum(1, 300 * 0.002 ** np.linspace(0, 1, num_classes)).astype(int)


def heights(container) -> list[float]:
  return [bar.get_height() for bar in container]


def tick_names(figure) -> list[str]:
  return [label.get_text() for label in figure.axes[0].get_xticklabels()]


def legend_names(figure) -> list[str]:
  return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def pixels(figure, dpi: int) -> np.ndarray:
  """uint8 [H, W, 3]."""
  return np.asarray(Image.open(io.BytesIO(plots.to_png(figure, dpi))).convert("RGB"))


class TestLongTailProfile:
  def test_bars_are_the_counts_from_the_largest_class_down(self):
    figure = plots.long_tail_profile(
      ["cat", "dog", "eel"], [5, 90, 40], [85, 0, 50], ["few", "many", "medium"]
    )
    real, synthetic = figure.axes[0].containers
    assert heights(real) == [90, 40, 5]
    assert heights(synthetic) == [0, 50, 85]
    assert [bar.get_y() for bar in synthetic] == [90, 40, 5]
    assert tick_names(figure) == ["dog", "eel", "cat"]

  def test_every_run_of_a_group_is_named_once(self):
    figure = plots.long_tail_profile(
      names(4), [200, 150, 50, 2], [0] * 4, ["many", "many", "medium", "few"]
    )
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [t for t in texts if t in ("many", "medium", "few")] == ["many", "medium", "few"]

  @pytest.mark.parametrize(
    ("counts", "scale"), [([100, 1], "linear"), ([101, 1], "log"), ([500, 0], "linear")]
  )
  def test_scale_is_logarithmic_only_above_a_ratio_of_100(self, counts, scale):
    figure = plots.long_tail_profile(["a", "b"], counts, [0, 0], ["many", "few"])
    assert figure.axes[0].get_yscale() == scale

  def test_without_synthetic_features_the_legend_names_none(self):
    figure = plots.long_tail_profile(names(3), [3, 2, 1], [0, 0, 0], ["few"] * 3)
    assert legend_names(figure) == ["real training examples"]


class TestPerClassAccuracy:
  def test_dots_are_percentages_in_the_order_of_counts(self):
    rows = [("csl", [0.5, 0.9], [0.02, 0.01]), ("memdiff", [0.6, 0.8], [0.0, 0.0])]
    figure = plots.per_class_accuracy(["rare", "common"], [2, 80], rows)
    drawn = {c.get_label(): c[0].get_ydata() for c in figure.axes[0].containers}
    np.testing.assert_allclose(drawn["csl"], [90, 50])
    np.testing.assert_allclose(drawn["memdiff"], [80, 60])
    assert tick_names(figure) == ["common\n(80)", "rare\n(2)"]
    assert legend_names(figure) == ["csl", "memdiff"]

  def test_error_bars_show_the_std_and_stay_within_0_and_100_percent(self):
    figure = plots.per_class_accuracy(["a", "b"], [9, 1], [("csl", [0.99, 0.5], [0.05, 0.1])])
    ((segments,),) = (c[2] for c in figure.axes[0].containers)
    ends = [segment[:, 1] for segment in segments.get_segments()]
    np.testing.assert_allclose(ends, [[94, 100], [40, 60]])

  def test_many_classes_become_one_smoothed_line_per_method(self):
    accuracy = np.linspace(1, 0, 100)
    figure = plots.per_class_accuracy(
      names(100), long_tail(100), [("csl", accuracy, np.zeros(100)), ("new", accuracy, accuracy)]
    )
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["csl", "new"]
    np.testing.assert_allclose(lines[0].get_ydata()[10:90], 100 * accuracy[10:90], atol=1e-9)

  def test_a_class_without_a_value_is_left_out(self):
    rows = [("csl", [np.nan, 0.5], [np.nan, 0.1])]
    assert plots.to_png(plots.per_class_accuracy(["a", "b"], [9, 0], rows))

  def test_unknown_methods_differ_from_each_other(self):
    rows = [(f"method {i}", [0.5], [0.1]) for i in range(9)]
    figure = plots.per_class_accuracy(["a"], [9], rows)
    looks = {(c[0].get_color(), c[0].get_marker()) for c in figure.axes[0].containers}
    assert len(looks) == 9


def features(counts, dim: int = 8, shift: float = 0.0):
  """Blobs of `counts[c]` features around a corner of its own for each class."""
  generator = np.random.default_rng(len(counts))
  labels = np.repeat(np.arange(len(counts)), counts)
  centres = 4 * generator.standard_normal((len(counts), dim)) + shift
  return centres[labels] + generator.standard_normal((len(labels), dim)), labels


def scatters(figure) -> list[PathCollection]:
  drawn = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
  return [c for c in drawn if len(c.get_offsets())]


def map_of(*arguments, **options):
  """The map of three kinds of features with labels and the classes' names."""
  *kinds, class_names = arguments[:7]
  pairs = list(zip(kinds[::2], kinds[1::2], strict=True))
  plane = plots.embed(*pairs, len(class_names), *arguments[7:], **options)
  return plots.feature_map(plane, class_names)


class TestFeatureMap:
  def test_one_cloud_per_kind_and_class_thinned_to_the_limit(self):
    figure = map_of(
      *features([30, 4]), *features([0, 20]), *features([0, 25]), names(2), max_per_class=10
    )
    sizes = sorted(len(cloud.get_offsets()) for cloud in scatters(figure))
    assert sizes == [4, 10, 10, 10]
    assert [text.get_text() for text in figure.axes[0].texts] == names(2)
    assert len(legend_names(figure)) == 3

  def test_same_seed_same_map(self):
    arguments = (*features([30, 4]), *features([0, 20]), *features([0, 25]), names(2))
    first, second, third = (
      np.concatenate([c.get_offsets() for c in scatters(map_of(*arguments, seed, 10))])
      for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, third)

  def test_does_not_touch_the_global_random_state(self):
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    map_of(*features([9, 9]), *features([0, 0]), *features([0, 5]), names(2))
    np.testing.assert_array_equal(np.random.get_state()[1], before)

  def test_many_classes_colour_the_rarest_with_synthetic_features(self):
    counts = np.arange(40, 0, -1)
    made = np.where(np.arange(40) % 2, 3, 0)
    figure = map_of(
      *features(counts), *features([0] * 40), *features(made), names(40), max_per_class=5
    )
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == [f"class {c}" for c in range(21, 40, 2)]
    assert "other classes" in legend_names(figure)

  @pytest.mark.parametrize("counts", [[0, 0], [1, 0], [1, 1], [2, 1], [3, 2], [9, 0]])
  def test_very_few_features(self, counts):
    empty = features([0, 0])
    figure = map_of(*features(counts), *empty, *empty, names(2))
    assert sum(len(cloud.get_offsets()) for cloud in scatters(figure)) == sum(counts)
    assert plots.to_png(figure)

  def test_identical_one_dimensional_and_non_finite_features(self):
    empty = features([0, 0], dim=1)
    same = (np.ones((20, 1)), np.zeros(20, int))
    assert plots.to_png(map_of(*same, *empty, *empty, names(2)))
    line = (np.arange(20.0)[:, None], np.zeros(20, int))
    assert plots.to_png(map_of(*line, *empty, *empty, names(2)))
    broken = (np.where(np.arange(20) < 5, np.nan, np.arange(20.0))[:, None], np.zeros(20, int))
    figure = map_of(*broken, *empty, *empty, names(2))
    assert sum(len(cloud.get_offsets()) for cloud in scatters(figure)) == 15


class TestTrainingCurves:
  CURVES = (
    {"stage": "encoder", "metric": "loss", "step": [0, 9], "mean": [2, 1], "std": [0, 0]},
    {"stage": "encoder", "metric": "accuracy", "step": [0, 9], "mean": [0.1, 0.9], "std": [0, 0]},
    {"stage": "diffusion", "metric": "loss", "step": [0, 9], "mean": [100, 0.5], "std": [1, 0]},
  )

  def test_one_panel_per_stage_with_accuracies_in_percent_on_their_own_axis(self):
    figure = plots.training_curves(self.CURVES)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["encoder", "diffusion", ""]
    loss, _, accuracy = (axes.get_lines()[0].get_ydata() for axes in figure.axes)
    np.testing.assert_allclose(loss, [2, 1])
    np.testing.assert_allclose(accuracy, [10, 90])

  def test_a_loss_that_falls_far_gets_a_logarithmic_axis(self):
    scales = [axes.get_yscale() for axes in plots.training_curves(self.CURVES).axes]
    assert scales == ["linear", "log", "linear"]

  @pytest.mark.parametrize("number", [0, 1, 4, 7])
  def test_any_number_of_stages_and_single_points(self, number):
    curves = [
      {"stage": f"stage {i}", "metric": m, "step": [5], "mean": [0.5], "std": [0.1]}
      for i in range(number)
      for m in ("loss", "loss of another kind", "top1")
    ]
    assert plots.to_png(plots.training_curves(curves))


class TestConfidenceHistogram:
  def test_one_ridge_and_median_for_each_class_that_has_features(self):
    figure = plots.confidence_histogram([0.2, 0.4, 0.9, 0.7], [0, 0, 0, 2], ["a", "b", "c"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "a"]
    assert [text.get_text() for text in axes.texts] == [
      "median 0.40   n = 3",
      "median 0.70   n = 1",
    ]

  def test_axis_widens_for_values_outside_0_and_1(self):
    figure = plots.confidence_histogram([-0.5, 2.0], [0, 0], ["a"])
    assert figure.axes[0].get_xlim() == (-0.5, 2.0)

  @pytest.mark.parametrize("values", [[], [0.5], [1.0] * 50, [np.nan, 0.3]])
  def test_no_one_and_equal_values(self, values):
    labels = np.zeros(len(values), int)
    assert plots.to_png(plots.confidence_histogram(values, labels, ["a"]))


class TestGapClosed:
  ROWS = (
    ("real+csl", 0.0, (0.0, 0.0)),
    ("memdiff+balanced_softmax", 0.6, (0.45, 0.7)),
    ("gaussian_shrunk+csl", -0.25, (-0.3, -0.1)),
  )

  def drawn(self, rows):
    """(method, mean, ends of the interval, colour) from the top to the bottom."""
    axes = plots.gap_closed(rows).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    bars, dots = (
      {line.get_ydata()[0]: line for line in axes.get_lines() if line.get_marker() == marker}
      for marker in ("|", "o")
    )
    return [
      (names[y], dots[y].get_xdata()[0], tuple(bars[y].get_xdata()), dots[y].get_color())
      for y in reversed(range(len(names)))
    ]

  def test_methods_stand_in_percent_with_the_best_on_top(self):
    shown = self.drawn(self.ROWS)
    assert [line[0] for line in shown] == [
      "memdiff+balanced_softmax", "real+csl", "gaussian_shrunk+csl"
    ]  # fmt: skip
    np.testing.assert_allclose([line[1] for line in shown], [60, 0, -25], atol=1e-9)

  def test_intervals_are_drawn_as_they_are_and_need_not_be_symmetric(self):
    ends = [line[2] for line in self.drawn(self.ROWS)]
    np.testing.assert_allclose(ends, [[45, 70], [0, 0], [-30, -10]], atol=1e-9)

  def test_the_order_of_the_rows_does_not_matter(self):
    assert self.drawn(self.ROWS) == self.drawn(self.ROWS[::-1])

  def test_control_and_oracle_are_lines_and_memdiff_has_its_own_colour(self):
    axes = plots.gap_closed(self.ROWS).axes[0]
    upright = [x for x in (line.get_xdata() for line in axes.get_lines()) if len(x) == 2]
    assert [x[0] for x in upright if x[0] == x[1]] == [0, 0, 100]  # the first is an interval
    colors = [line[3] for line in self.drawn(self.ROWS)]
    assert colors == [plots.SYNTHETIC, plots.REAL, plots.REAL]

  @pytest.mark.parametrize("number", [0, 1, 60])
  def test_any_number_of_methods(self, number):
    rows = [
      (f"a generator of a very long name indeed {i}+csl", i / 60, (i / 60 - 0.1, i / 60 + 0.2))
      for i in range(number)
    ]
    figure = plots.gap_closed(rows)
    assert plots.to_png(figure, 40)
    assert len(figure.axes[0].get_yticklabels()) == number


class TestReliability:
  def drawn(self, *arguments, **options):
    """Confidence, median and quartiles of every group."""
    axes = plots.reliability(*arguments, **options).axes[0]
    middle = next(line for line in axes.get_lines() if line.get_label() == "median")
    (band,) = (c for c in axes.collections if c.get_label() == "quartiles")
    corners = band.get_paths()[0].vertices
    ends = [corners[corners[:, 0] == x][:, 1] for x in middle.get_xdata()]
    low, high = [min(e) for e in ends], [max(e) for e in ends]
    return middle.get_xdata(), middle.get_ydata(), low, high

  def test_groups_of_equal_size_by_confidence_with_median_and_quartiles(self):
    rng = np.random.default_rng(0)
    confidence, distance = rng.random(40), rng.exponential(size=40)
    x, middle, low, high = self.drawn(confidence, distance, num_bins=4)
    ranked = sorted(zip(confidence, distance, strict=True))
    for group in range(4):
      own = np.array(ranked[10 * group : 10 * group + 10])
      assert x[group] == pytest.approx(np.sort(own[:, 0])[4:6].mean())
      quartiles = np.percentile(own[:, 1], [25, 50, 75])
      np.testing.assert_allclose([low[group], middle[group], high[group]], quartiles)

  def test_what_is_not_finite_is_left_out(self):
    confidence = np.array([0.1, 0.2, np.nan, 0.4, 0.5])
    distance = np.array([1.0, np.nan, 9.0, 3.0, 5.0])
    x, middle, _, _ = self.drawn(confidence, distance, num_bins=3)
    np.testing.assert_allclose(x, [0.1, 0.4, 0.5])
    np.testing.assert_allclose(middle, [1, 3, 5])

  def test_the_distance_between_real_features_is_a_line_at_1(self):
    axes = plots.reliability([0.1, 0.9], [2.0, 0.5]).axes[0]
    (line,) = (line for line in axes.get_lines() if line.get_label() == "real to real")
    assert list(line.get_ydata()) == [1, 1]
    assert legend_names(axes.figure) == ["quartiles", "median", "real to real"]

  @pytest.mark.parametrize("values", [[], [np.nan], [0.5], [0.3] * 50])
  def test_few_and_equal_values(self, values):
    assert plots.to_png(plots.reliability(values, values), 40)


@pytest.mark.parametrize("num_classes", [2, 10, 100, 1000])
def test_every_figure_draws_at_every_size(num_classes):
  counts = long_tail(num_classes)
  synthetic = np.where(counts < 20, 3, 0)
  groups = ["many" if n > 100 else "medium" if n >= 20 else "few" for n in counts]
  accuracy = np.linspace(1, 0.2, num_classes)
  labels = np.repeat(np.arange(num_classes), synthetic)
  confidence = np.linspace(0, 1, len(labels))
  for figure in (
    plots.long_tail_profile(names(num_classes), counts, synthetic, groups),
    plots.per_class_accuracy(names(num_classes), counts, [("memdiff", accuracy, 0.1 * accuracy)]),
    plots.confidence_histogram(confidence, labels, names(num_classes)),
  ):
    assert pixels(figure, 40).std() > 0


def test_names_are_drawn_as_they_are():
  odd = ["$x", "a_b$^{", "猫", "<b>", "a very long name of a class indeed", ""]
  figure = plots.long_tail_profile(odd, [6, 5, 4, 3, 2, 1], [0] * 6, ["few"] * 6)
  assert plots.to_png(figure)
  assert tick_names(figure)[:4] == odd[:4]
  assert tick_names(figure)[4] == "a very long name …"


def test_a_picture_has_the_size_of_the_figure():
  figure = plots.long_tail_profile(names(2), [2, 1], [0, 1], ["many", "few"])
  width, height = figure.get_size_inches()
  drawn = pixels(figure, 50)
  assert drawn.shape == (int(height * 50), int(width * 50), 3)
  assert drawn.max() == 255 and drawn.min() < 100


def test_to_png_is_a_png_and_reproducible():
  first, second = (
    plots.to_png(plots.long_tail_profile(names(2), [2, 1], [0, 1], ["many", "few"]), 50)
    for _ in range(2)
  )
  assert first == second
  assert imread(io.BytesIO(first)).shape[2] in (3, 4)


def test_style_leaves_no_trace_and_pyplot_is_never_imported():
  code = (
    "import sys, matplotlib\n"
    "from memdiff.evaluation import plots\n"
    "plots.to_png(plots.long_tail_profile(['a'], [1], [0], ['few']), 40)\n"
    "assert 'matplotlib.pyplot' not in sys.modules\n"
    "assert dict(matplotlib.rcParams) == dict(matplotlib.rcParamsDefault) | "
    "{'backend': matplotlib.rcParams['backend']}\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=support.HANG)

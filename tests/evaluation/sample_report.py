"""A report with every part, as an experiment on features writes it; for tests."""

METHODS = {
  "own_head": 0.80, "own_head+logit_adjustment": 0.82, "real+csl": 0.85, "memdiff+csl": 0.87,
  "oracle+csl": 0.92, "unseen_exemplars+csl": 0.95,
}  # fmt: skip
REFERENCES = ("oracle+csl", "unseen_exemplars+csl")
SHOWN = ("own_head", "real+csl", "memdiff+csl", "oracle+csl")


def stat(mean, std=0.01):
  return {"mean": mean, "std": std}


def difference(mean, low, high, theirs):
  """A paired difference on the test set, as result.json has it."""
  return {"mean": mean, "interval": [low, high], "ours": theirs + mean, "theirs": theirs}


def metric(mean, **more):
  return stat(mean) | {
    "per_class": [None, mean, mean],
    "meaning": "what it means",
    "better": "close to 1",
    **more,
  }


def advise(method, control, best, gain, interval, **more) -> dict:
  scores = {"real+csl": 0.8, "memdiff+csl": 0.831, "own_head": 0.764}
  return {
    "method": method,
    "control": control,
    "best": best,
    "expected_gain": gain,
    "interval": list(interval),
    "scores": {
      name: {
        "score": score,
        "gain": score - 0.8,
        "interval": [score - 0.82, score - 0.78],
        "settings": 8,
      }
      for name, score in scores.items()
    },
    "basis": {"folds": 5, "repeats": 2, "encoder": "retrained"},
    "agreement": {
      "kendall_tau": 0.375,
      "pairs": 0.6875,
      "regret": 0.0,
      "methods": 3,
      "test_gain": stat(0.02, 0.01),
      "regret_of_recommended": 0.013,
    },
    **more,
  }


def make_report() -> dict:
  classification = [
    {
      "method": method,
      "description": f"Description of {method}.",
      "reference": method in REFERENCES,
      "seeds": [0, 1, 2, 3, 4],
      "shown": method in SHOWN,
      "top1": stat(score),
      "balanced_accuracy": stat(score - 0.01),
      "many": stat(score + 0.05),
      "medium": stat(score),
      "few": stat(score - 0.05),
      "macro_f1": stat(score - 0.02),
      "per_class_top1": {"mean": [score] * 3, "std": [0.01] * 3},
      "per_class_f1": {"mean": [score] * 3, "std": [0.01] * 3},
    }
    for method, score in METHODS.items()
  ]
  for row in classification:
    share = (row["top1"]["mean"] - 0.85) / 0.07
    row["gap_closed"] = {"mean": share, "interval": [share - 0.2, share + 0.1]}
  return {
    "schema": 1,
    "criterion": "balanced_accuracy",
    "name": "digits_lt",
    "command": "python main.py --config=configs/digits_lt.py --workdir=runs/x",
    "config": {"encoder": {"width": 32}},
    "versions": {"memdiff": "0.1.0", "jax": "0.10.2"},
    "hardware": {"platform": "cpu", "devices": 1},
    "dataset": {
      "name": "digits",
      "num_classes": 3,
      "class_names": ["zero", "one", "two"],
      "train_counts": [120, 40, 5],
      "left_out_counts": [0, 80, 115],
      "test_count": 360,
      "split_sha256": "ab" * 32,
      "imbalance": 24.0,
      "classes_without_test_rows": [],
    },
    "groups": [
      {"name": "many", "rule": "more than 100 training images", "classes": [0]},
      {"name": "medium", "rule": "20 to 100 training images", "classes": [1]},
      {"name": "few", "rule": "fewer than 20 training images", "classes": [2]},
    ],
    "classification": classification,
    "comparison": {
      "method": "memdiff+csl",
      "control": "real+csl",
      "reference": "oracle+csl",
      "gain": stat(0.02, 0.005) | {"interval": [0.014, 0.026]},
      "headroom": stat(0.07, 0.01) | {"interval": [0.058, 0.082]},
      "gap_closed": {"mean": 0.29, "interval": [0.19, 0.38]},
    },
    "headline": {
      "recommended": "memdiff+csl",
      "by": "cross-validation",
      "plain": "own_head",
      "over_plain": {
        "overall": difference(0.07, 0.05, 0.09, theirs=0.79),
        "many": difference(0.07, -0.01, 0.15, theirs=0.85),
        "medium": None,
        "few": difference(0.086, 0.051, 0.12, theirs=0.75),
      },
      "synthetic": {
        "method": "memdiff+csl",
        "control": "real+csl",
        "overall": difference(0.02, 0.014, 0.026, theirs=0.84),
        "few": difference(0.03, -0.01, 0.07, theirs=0.8),
        "expected": {"mean": 0.031, "interval": [0.012, 0.05]},
        "recommended": True,
      },
      "room": {"reference": "oracle+csl", "overall": difference(0.07, 0.058, 0.082, theirs=0.84)},
    },
    "recommendation": advise("memdiff+csl", "real+csl", "memdiff+csl", 0.031, (0.012, 0.05)),
    "features": {
      "diversity": metric(0.912),
      "mmd": metric(0.0123, reference={"label": "two halves of real", **stat(0.001)}),
      "truth_test": {"frechet": metric(12.5), "precision": metric(0.8)},
    },
    "synthetic_counts": [0, 60, 95],
    "timing": {
      "phases": {"encoder": {"seconds": 12.3, "compile_seconds": 4.5, "cpu_seconds": 20.6}},
      "total_seconds": 130.0,
      "total_compile_seconds": 4.5,
      "total_cpu_seconds": 161.0,
    },
  }

"""Embeddings of any encoder (CLIP, DINO, a tabular model): features and labels in, a head out.

  python main.py --config=configs/features.py --workdir=runs/mine \\
    --config.dataset.train_path=train.parquet --config.dataset.test_path=test.parquet

Reads .npz, .npy, Parquet and folders of Parquet files; `dataset.test_share=0.2` splits a test set
off if there is none. The workdir gets report.html, the recommended head if it is linear
(recommended_head.npz), and the synthetic embeddings in the format of the training set
(synthetic_embeddings.npz or .parquet).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "default") -> ConfigDict:
  config = base.features("features")
  config.seeds = (0, 1, 2, 3, 4)  # of banks, generators and heads
  config.head.training.start = "zeros"
  config.head.exponents = (1.0, 0.5)
  base.choose(variant, {})
  return config

"""One thread, no progress bars, no network: what every test assumes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import torch
from hub_client import client, hub  # noqa: F401
from transformers.utils import logging

torch.set_num_threads(1)
datasets.disable_progress_bars()
logging.disable_progress_bar()

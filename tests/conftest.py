import torch
from transformers.utils import logging


# Tiny models lose far more to the hand-over between threads than they gain
torch.set_num_threads(1)
logging.disable_progress_bar()

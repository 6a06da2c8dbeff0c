"""Environment variables that libraries read when they are imported, and silence at their start. Import before torch."""

import logging
import os
import warnings

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM on a CPU logs NUMA warnings on every rank
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns about forks
# oneDNN and PyTorch each keep 1,024 compiled products, and compile one for each new shape: with SmolLM2, every new
# length of a packed row takes 14 MB more, up to gigabytes. 64 are as fast, since lengths hardly ever come again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # there is no Triton on a CPU
warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")

"""Silences start-up messages of libraries. Import this before torch, which reads the first variable only once."""

import logging
import os
import warnings

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # vLLM on a CPU logs NUMA warnings on every rank
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns about forks
logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # there is no Triton on a CPU
warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")

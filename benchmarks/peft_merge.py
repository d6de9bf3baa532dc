"""The merge that PEFT's documentation shows, as a program of its own.

python benchmarks/peft_merge.py BASE ADAPTER OUT
"""

import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

# an adapter tensor that PEFT does not find would be a warning, and less work than infold does
warnings.filterwarnings("error", message=".*missing adapter keys.*")

base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter)
model = model.merge_and_unload()
model.save_pretrained(out)

"""TRAINING. One module for every method: attach, train, combine, merge in memory, save.

from infold.tuners import LoraConfig, attach, load

model = attach(model, LoraConfig(r=16, lora_alpha=32))
...                                   # train it with anything
model.save_pretrained("adapter")      # PEFT's layout
model = model.merge_and_unload()      # the bytes that `infold merge` writes
"""

from __future__ import annotations

from infold.tuners.config import IA3Config, LoraConfig
from infold.tuners.model import AdaptedModel, attach, load

__all__ = ["AdaptedModel", "IA3Config", "LoraConfig", "attach", "load"]

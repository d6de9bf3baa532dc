"""ONE EDIT IN MEMORY: a stored tensor, the steps of its methods, one rounding.

    from infold.adapters import METHODS, Settings
    from infold.edit import Step, edit_tensor

    lora = METHODS["lora"].prepare({"lora_A": a, "lora_B": b}, Settings(scaling=2.0))
    merged = edit_tensor(linear.weight, [Step(lora)], "q_proj.weight")

It knows nothing of files, plans or adapters' keys. The merge of checkpoints and the merge of models
in memory both stand on it, so they give the same bytes.
"""

from infold.edit.steps import Step
from infold.edit.tensor import TensorEdit, edit_tensor, edit_tensors, on_all_cores

__all__ = ["Step", "TensorEdit", "edit_tensor", "edit_tensors", "on_all_cores"]

"""Tensors that the merge writes with other bytes than the base's, which are no floats."""

from __future__ import annotations

import json
from collections.abc import Mapping

from infold.checkpoint.inputs import InputFiles
from infold.checkpoint.safetensors import TensorInfo
from infold.checkpoint.shards import Checkpoint
from infold.verify.tensors import Tally, Workspace

__all__ = ["AmendedCheck"]


class AmendedCheck:
    """A quant_state of bitsandbytes whose absmax is no longer nested: the JSON of all entries but
    those of the nested part, in their order."""

    step = 1 << 20

    def __init__(self, base: Checkpoint, info: TensorInfo, files: InputFiles) -> None:
        self.base, self.info, self.files = base, info, files
        self.tally = Tally()

    def check(
        self, merged: memoryview, offset: int, own: memoryview | None, workspace: Workspace
    ) -> None:
        was = bytearray(self.info.nbytes)
        shard = self.base.shards[self.base.where[self.info.name]]
        self.files.read(shard.path, memoryview(was), self.info.begin)
        told: Mapping[str, object] = json.loads(bytes(was))
        wanted = {name: told[name] for name in told if name.split("_")[0] != "nested"}
        right = json.dumps(wanted).encode()[offset : offset + len(merged)]
        pairs = enumerate(zip(bytes(merged), right, strict=False))
        wrong = [number for number, (one, two) in pairs if one != two]
        if wrong or len(right) != len(merged):
            first = wrong[0] if wrong else min(len(right), len(merged))
            stored, expected = bytes(merged)[first : first + 1], right[first : first + 1]
            self.tally.add(max(1, len(wrong)), (offset + first, repr(stored), repr(expected)))

    def done(self, count: int) -> None: ...

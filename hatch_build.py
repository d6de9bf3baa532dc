"""Compiles src/infold/kernel: while a package is built or installed, or by `python hatch_build.py`.

Without a C compiler nothing is compiled, and PyTorch does that work: the same bytes, more slowly.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # as a script
    BuildHookInterface = object  # type: ignore[assignment, misc]

FOLDER = Path(__file__).parent / "src/infold/kernel"
FLAGS = "-std=gnu11 -O3 -fPIC -fno-math-errno -fno-trapping-math -Wall -Wextra"
# The product's sums are exact, so that fusing them changes nothing. Nowhere else may it be done.
FUSING = {"kernel.c": "-ffp-contract=off", "product.c": "-ffp-contract=fast"}


def library() -> ModuleType:
    """infold.kernel.library, without what its package imports."""
    spec = importlib.util.spec_from_file_location("library", FOLDER / "library.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler() -> list[str] | None:
    """$CC, or the usual names."""
    if "CC" in os.environ:
        return shlex.split(os.environ["CC"])
    names = (name for name in ("cc", "gcc", "clang") if shutil.which(name))
    return next(([name] for name in names), None)


def compile_kernel() -> str | None:
    """Put the compiled file beside its sources. Returns why not, where that fails."""
    kernel = library()
    target = FOLDER / kernel.FILE
    target.unlink(missing_ok=True)
    command = compiler()
    if command is None:
        return "there is no C compiler"
    sources = kernel.digest((FOLDER / name).read_bytes() for name in kernel.SOURCES)
    shared = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared"]
    with tempfile.TemporaryDirectory() as made:
        objects = []
        try:
            for name, fusing in FUSING.items():
                objects.append(str(Path(made, name).with_suffix(".o")))
                known_by = f'-DINFOLD_SOURCES="{sources}"'
                flags = [*FLAGS.split(), fusing, known_by, "-c", str(FOLDER / name)]
                run([*command, *flags, "-o", objects[-1]])
            linked = str(Path(made, kernel.FILE))
            run([*command, *shared, *objects, "-lm", "-o", linked])
            shutil.copy2(linked, target.with_suffix(".new"))  # a running process has the old one
            target.with_suffix(".new").replace(target)
        except (OSError, subprocess.CalledProcessError) as error:
            return getattr(error, "stderr", None) or str(error)
    return None


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class KernelHook(BuildHookInterface):  # type: ignore[misc, type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        why = compile_kernel()
        if why is not None:
            self.app.display_warning(f"nothing is compiled, so infold is slower: {why}")
            return
        build_data["artifacts"].append(f"/src/infold/kernel/{library().FILE}")
        if version != "editable":
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"


if __name__ == "__main__":
    if (failed := compile_kernel()) is not None:
        sys.exit(f"not compiled: {failed}")

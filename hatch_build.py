"""Compiles src/infold/kernel: while a package is built or installed, or by `python hatch_build.py`.

Without a C compiler nothing is compiled, and PyTorch does that work: the same bytes, more slowly.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # as a script
    BuildHookInterface = object  # type: ignore[assignment, misc]

FOLDER = Path(__file__).parent / "src/infold/kernel"


def library() -> ModuleType:
    """infold.kernel.library, without what its package imports."""
    spec = importlib.util.spec_from_file_location("library", FOLDER / "library.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler() -> list[str]:
    """$CC, or one of the usual names. Raises OSError."""
    if "CC" in os.environ:
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("there is no C compiler")


def compile_kernel() -> str | None:
    """Put the compiled file beside its sources. Returns why not, where that fails."""
    kernel = library()
    target = FOLDER / kernel.FILE
    try:
        target.unlink(missing_ok=True)
        command, flags = compiler(), kernel.FLAGS.split()
        known_by = f'-DINFOLD_SOURCES="{kernel.digest()}"'
        shared = "-dynamiclib" if sys.platform == "darwin" else "-shared"
        with tempfile.TemporaryDirectory(prefix=".build-", dir=FOLDER) as made:  # to rename from
            objects = [str(Path(made, name).with_suffix(".o")) for name in kernel.FUSING]
            for (name, fusing), compiled in zip(kernel.FUSING.items(), objects, strict=True):
                source = str(FOLDER / name)
                run([*command, *flags, fusing, known_by, "-c", source, "-o", compiled])
            linked = Path(made, kernel.FILE)
            run([*command, *flags, shared, *objects, "-lm", "-o", str(linked)])
            linked.replace(target)  # a running process keeps the old one
    except subprocess.CalledProcessError as error:
        return error.stderr.strip() or f"{error.cmd[0]} ended with {error.returncode}"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class KernelHook(BuildHookInterface):  # type: ignore[misc, type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # elsewhere the compiled code is not used, but by INFOLD_KERNEL=plain
        if self.target_name != "wheel" or platform.machine() not in ("x86_64", "AMD64"):
            return
        why = compile_kernel()
        if why is not None:
            self.app.display_warning(f"nothing is compiled, so infold is slower: {why}")
            return
        build_data["artifacts"].append(f"/src/infold/kernel/{library().FILE}")
        if version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{wheel_platform()}"


def wheel_platform() -> str:
    """What this machine takes: of Linux its plain name, since nobody has checked for another."""
    from packaging.tags import sys_tags  # hatchling brings it

    names = (tag.platform for tag in sys_tags())
    return next(name for name in names if "manylinux" not in name and "musllinux" not in name)


if __name__ == "__main__":
    if (failed := compile_kernel()) is not None:
        sys.exit(f"not compiled: {failed}")

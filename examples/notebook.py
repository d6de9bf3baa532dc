"""Run examples/ia3_merge_and_deploy.ipynb from its beginning.

python examples/notebook.py            # fails where a cell fails; writes nothing
python examples/notebook.py --save     # and keeps the outputs in the notebook
python examples/notebook.py --within 300   # fails, too, where all of it takes longer, in seconds
"""

import argparse
import os
import re
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("ia3_merge_and_deploy.ipynb")


def anonymous(text: str) -> str:
    """Without the paths of this machine."""
    temporary = re.escape(tempfile.gettempdir())
    text = re.sub(rf"{temporary}/infold-notebook-\w+/?", "", text)
    return text.replace(str(NOTEBOOK.parents[1].resolve()), ".").replace(str(Path.home()), "~")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep the outputs in the notebook")
    parser.add_argument("--within", type=float, help="seconds that all cells may take")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    began = time.monotonic()
    client = NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        record_timing=False,
    )  # fmt: skip
    client.execute()
    took = time.monotonic() - began
    print(f"{NOTEBOOK.name}: every cell ran, {took:.0f} s")
    if given.within is not None and took > given.within:
        raise SystemExit(f"{NOTEBOOK.name}: may take {given.within:.0f} s, not {took:.0f} s")
    if not given.save:
        return
    for cell in notebook.cells:
        if "outputs" in cell:  # warnings name the places of this machine's packages
            cell["outputs"] = [out for out in cell["outputs"] if out.get("name") != "stderr"]
        for output in cell.get("outputs", ()):
            if "text" in output:
                output["text"] = anonymous(output["text"])
            for kind, value in output.get("data", {}).items():
                output["data"][kind] = anonymous(value)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()

